"""Fluency, aggregate scores, further attacks, groups and what is said of over-forgetting, all from saved rows."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

import oracle_metrics as oracle
import oracles_evidence as evidence
from excise.commands.measuring.findings import findings
from excise.commands.measuring.overforgetting import over_forgotten
from excise.errors import NotShown
from excise.metrics import fluency, gaps, rows
from excise.metrics.catalogue import METRICS
from excise.metrics.fluency import FEWEST, ODD, Fluency, Ngrams, of_answers
from excise.metrics.scores import score
from excise.metrics.table import Table, check

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


# --- fluency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4])
def test_surprise_is_the_oracle(order: int) -> None:
    texts = ["the cat sat", "a hat", "the the", ""]
    for text in ("the hat", "ccc xyz", "t"):
        found, _, again = Ngrams.fit(texts, order).bits([text, "", text])
        np.testing.assert_array_equal(found, again)
        expected = evidence.witten_bell([list(t) for t in texts], order, list(text))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    words = [t.split() for t in texts]
    (found,) = Ngrams.fit(words, order).bits([["a", "cat", "flew"]])
    np.testing.assert_allclose(found, evidence.witten_bell(words, order, ["a", "cat", "flew"]), rtol=1e-12)


def test_probabilities_over_all_symbols_are_one() -> None:
    model = Ngrams.fit(["abba", "baab", "abab"], 3)
    for context in ("", "a", "ab", "bb", "zz"):
        total = sum(2 ** -float(model.bits([context + symbol])[0][-1]) for symbol in "abz")
        assert total == pytest.approx(1, abs=1e-12)


def answers(n: int, seed: int) -> list[str]:
    """Made-up answers: people, places and trades in a few kinds of sentences."""
    rng = random.Random(seed)
    name = lambda: "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(3)).title()  # noqa: E731
    trades = ["a baker of brown bread", "a pilot of small planes", "a judge in the north", "a teacher of old songs"]
    shapes = [
        "{a} was born in the town of {b} and became {t} after many years at school.",
        "The parents of {a} came from {b}, where her father worked as {t}.",
        "In the summer {a} moved to {b} because the people there were looking for {t}.",
        "It is said that {a} wrote three books about {b} and about the life of {t}.",
    ]
    return [rng.choice(shapes).format(a=name(), b=name(), t=rng.choice(trades)) for _ in range(n)]


@pytest.fixture(scope="module")
def scorer() -> Fluency:
    found = of_answers(answers(150, 1), answers(120, 2))
    assert found is not None
    return found


def share(scorer: Fluency, texts: list[str]) -> float:
    return float(np.mean(scorer.column(texts) >= ODD))


def test_real_answers_read_like_real_ones_and_babble_does_not(scorer: Fluency) -> None:
    rng, real = random.Random(0), answers(100, 3)

    def shuffled(parts: list[str], by: str) -> str:
        return by.join(rng.sample(parts, len(parts)))

    spoiled = {
        "letters": [shuffled(list(t), "") for t in real],
        "words": [shuffled(t.split(), " ") for t in real],
        "stammer": [" ".join(t.split()[:3] * 6) for t in real],
        "one word": ["the " * 20] * 5,
        "other signs": ["\u4e00\u4e8c\u4e09\u56db" * 6] * 5,
        "nothing": ["", "  "],
    }
    assert share(scorer, real) >= 0.9
    assert share(scorer, [t[: len(t) // 2] for t in real]) >= 0.9, "cut short is not odd"
    assert {name: share(scorer, texts) <= 0.05 for name, texts in spoiled.items()} == dict.fromkeys(spoiled, True)


def test_real_texts_are_rarely_called_odd() -> None:
    """The share of real texts below x is at most about x, whatever x: what the score promises."""
    scores = np.concatenate([
        of_answers(answers(60, 10 * s), answers(80, 10 * s + 1)).column(answers(60, 10 * s + 2)) for s in range(8)
    ])  # fmt: skip
    for level in (0.05, 0.1, 0.2):
        spread = 3 * math.sqrt(level * (1 - level) / len(scores)) + 0.02  # the scale itself is drawn
        assert np.mean(scores < level) <= level + spread


def test_too_few_answers_set_no_scale() -> None:
    some = answers(FEWEST, 1)
    assert of_answers(some, some[:-1]) is not None, "half of the retained ones join"
    assert of_answers(some[:20], some[:30]) is None
    with pytest.raises(NotShown, match=str(FEWEST)):
        Fluency.fit(some, some[:-1])
    with pytest.raises(NotShown, match="learn from"):
        Fluency.fit(["", " "], some)
    worst = Fluency.fit(some, answers(FEWEST, 2)).score("zzzz " * 9)
    assert worst == pytest.approx(3 / (FEWEST + 1))
    assert worst < ODD


def test_fluency_needs_generations_and_a_scale() -> None:
    table = oracle.make_table("forget", 9)
    assert score({"forget": table}).values["forget_fluency"]["value"] == np.mean(table.columns["fluency"] >= ODD)
    bare = Table("forget", 9, {k: v for k, v in table.columns.items() if k != "fluency"})
    assert "60 other real answers" in score({"forget": bare}).not_shown["forget_fluency"]
    none = Table("forget", 9, {k: v for k, v in bare.columns.items() if k != "rouge_l_recall"})
    assert "generations" in score({"forget": none}).not_shown["forget_fluency"]
    assert fluency.echoes("ab").shape == (0,)


# --- scores of scores -----------------------------------------------------------------------------------------------


def models() -> dict[str, dict[str, Table]]:
    """Tables of an original that knows the forget rows, a gold that does not, and a model in between."""
    levels = {"original": 0.7, "gold": 1.1, "model": 0.9}
    return {
        name: {
            "forget": oracle.make_table("forget", 40, seed=3, level=level),
            "never_seen": oracle.make_table("never_seen", 30, seed=4),
            "untouched": oracle.make_table("untouched", 20, seed=5),
        }
        for name, level in levels.items()
    }


def aucs(tables: dict[str, Table]) -> list[float]:
    return [oracle.auc(*(rows.attack_score(tables[s], a).tolist() for s in ("forget", "never_seen"))) for a in ATTACKS]


def test_privacy_scores_are_the_oracle_on_both_scales() -> None:
    made = models()
    found = score(made["model"], made["gold"], original=made["original"], resamples=60).values
    mine, gold, before = (aucs(made[name]) for name in ("model", "gold", "original"))
    scales = [abs(b - g) for b, g in zip(before, gold, strict=True)]
    assert 0 < found["privacy_score"]["value"] < 1
    assert found["privacy_score"]["value"] == pytest.approx(evidence.privacy(mine, gold, scales))
    assert found["privacy_score_relative"]["value"] == pytest.approx(evidence.privacy(mine, gold, gold))
    for name in ("privacy_score", "privacy_score_relative"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert found[name]["n"] == 40


def test_scores_at_their_anchors() -> None:
    """The original has no privacy on its own scale and all of its utility; the gold has all privacy."""
    made = models()
    gold, before = made["gold"], made["original"]
    of = {name: score(t, gold, original=before, resamples=20).values for name, t in made.items()}
    assert of["original"]["privacy_score"]["value"] == of["original"]["aggregate_score"]["value"] == 0
    assert of["original"]["privacy_score_relative"]["value"] > 0
    assert of["original"]["utility_score_relative"]["value"] == 1
    assert of["gold"]["privacy_score"]["value"] == of["gold"]["privacy_score_relative"]["value"] == 1
    assert of["gold"]["privacy_score"]["low"] == 1, "paired draws: the gold is its own target in each"
    for name, found in of.items():
        useful = [found["model_utility"]["value"], found["forget_fluency"]["value"]]
        assert found["utility_score"]["value"] == pytest.approx(oracle.harmonic_mean(useful))
        theirs = found["utility_score"]["value"] / of["original"]["utility_score"]["value"]
        assert found["utility_score_relative"]["value"] == pytest.approx(min(1, theirs))
        for end in ("", "_relative"):
            parts = [found[n]["value"] for n in ("forget_score", f"privacy_score{end}", "utility_score_relative")]
            assert found[f"aggregate_score{end}"]["value"] == pytest.approx(oracle.harmonic_mean(parts)), name


def test_what_a_score_compares_with_must_be_there() -> None:
    made = models()
    alone = score(made["model"], made["gold"], resamples=20)
    assert {"privacy_score", "aggregate_score", "utility_score_relative"} <= alone.not_shown.keys()
    assert "original" in alone.not_shown["privacy_score"]
    assert "privacy_score_relative" in alone.values
    assert "gold" in score(made["model"], original=made["original"], resamples=20).not_shown["privacy_score_relative"]
    same = score(made["model"], made["gold"], original=made["gold"], resamples=20)
    assert "no scale" in same.not_shown["privacy_score"]


# --- further attacks ------------------------------------------------------------------------------------------------


def test_a_reference_takes_the_difficulty_of_texts_away() -> None:
    """Texts differ in difficulty far more than membership moves them: the loss sees little, the reference all."""
    rng, n = np.random.default_rng(0), 60

    def side(name: str, shift: float, hard: np.ndarray) -> Table:
        return check(Table(name, n, {"row": np.arange(n), "kind": np.zeros(n), "mean_nll": hard - shift}))

    hard = {name: 3 + 2 * rng.random(n) for name in ("forget", "never_seen")}
    gold = {name: side(name, 0.0, own) for name, own in hard.items()}
    noise = {name: rng.normal(0, 0.02, n) for name in hard}
    planted = {name: side(name, 0.2 * (name == "forget"), own + noise[name]) for name, own in hard.items()}
    found = score(planted, gold, resamples=50).values
    assert found["mia_reference_auc"]["value"] > 0.99
    assert found["mia_loss_auc"]["value"] < 0.7
    expected = [hard[s] - planted[s].columns["mean_nll"] for s in ("forget", "never_seen")]
    assert found["mia_reference_auc"]["value"] == pytest.approx(oracle.auc(*(e.tolist() for e in expected)))
    pushed = {"forget": side("forget", -0.2, hard["forget"]), "never_seen": planted["never_seen"]}
    assert score(pushed, gold, resamples=20).values["mia_reference_auc"]["value"] < 0.01
    assert score(gold, gold, resamples=20).values["mia_reference_auc"]["value"] == 0.5
    dealt = np.concatenate(expected)
    rng.shuffle(dealt)
    assert abs(oracle.auc(dealt[:n].tolist(), dealt[n:].tolist()) - 0.5) < 0.16, "shuffled labels: chance"
    other = {**gold, "forget": check(Table("forget", 1, {"row": [0], "kind": [0], "mean_nll": np.ones(1)}))}
    assert "same forget rows" in score(planted, other, resamples=5).not_shown["mia_reference_auc"]


def test_small_gradients_are_those_of_members() -> None:
    made = {
        s: oracle.make_table(s, 20, seed=i, level=lv) for i, (s, lv) in enumerate((("forget", 0.1), ("never_seen", 9)))
    }
    found = score(made, resamples=20).values["mia_gradient_norm_auc"]
    norms = [(-made[s].columns["attack_gradient_norm"]).tolist() for s in ("forget", "never_seen")]
    assert found["value"] == pytest.approx(oracle.auc(*norms))
    assert found["value"] > 0.9
    bare = {s: Table(s, 20, {k: v for k, v in t.columns.items() if "gradient" not in k}) for s, t in made.items()}
    assert "evaluate.gradient_norms" in score(bare, resamples=5).not_shown["mia_gradient_norm_auc"]


def test_gap_to_never_seen_rows_is_a_difference_of_means() -> None:
    made = {
        s: oracle.make_table(s, 25, seed=i, level=lv) for i, (s, lv) in enumerate((("forget", 3.0), ("never_seen", 1)))
    }
    found = score(made, resamples=200).values["never_seen_gap"]
    means = [-np.mean([oracle.mean_nll(made[s], q) for r in range(25) for q in oracle.sequences_of(made[s], r, 0)])
             for s in ("forget", "never_seen")]  # fmt: skip
    assert found["value"] == pytest.approx(means[0] - means[1], rel=1e-6)
    assert found["low"] < found["value"] < found["high"] < 0


# --- groups ---------------------------------------------------------------------------------------------------------


def grouped(values: list[float], groups: list[int]) -> Table:
    n = len(values)
    columns = {"row": np.arange(n), "kind": np.zeros(n), "mean_nll": -np.log(values), "group": np.array(groups)}
    return check(Table("forget", n, columns))


def test_gap_between_groups_by_hand() -> None:
    table = grouped([0.2, 0.4, 0.5, 0.9, 0.7, 0.1], [3, 3, 5, 5, 5, -1])
    found = score({"forget": table}).values["forget_group_gap"]
    assert found["value"] == pytest.approx(0.7 - 0.3)
    assert (found["n"], found["groups"], found["low"]) == (5, 2, None)
    ids, means, counts = gaps.by_group(table)
    assert (ids.tolist(), counts.tolist()) == ([3, 5], [2, 3])
    np.testing.assert_allclose(means, [0.3, 0.7])
    assert "group" in score({"forget": grouped([0.1, 0.2], [1, 1])}).not_shown["forget_group_gap"]
    without = Table("forget", 6, {k: v for k, v in table.columns.items() if k != "group"})
    assert "no group" in score({"forget": without}).not_shown["forget_group_gap"]


def test_a_gap_is_read_beside_what_chance_gives() -> None:
    """Groups that do not differ have small p as often as p says; one that was left remembered is found."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = grouped(rng.uniform(0.1, 0.9, 40).tolist(), np.repeat(np.arange(8), 5).tolist())
        p.append(score({"forget": table}, resamples=2, seed=seed).values["forget_group_gap"]["p"])
    assert np.mean(np.array(p) <= 0.2) < 0.2 + 3 * math.sqrt(0.16 / 60)
    assert np.mean(np.array(p) <= 0.5) > 0.25
    rng = np.random.default_rng(1)
    values = rng.uniform(0.0, 0.2, 40)
    values[:5] += 0.7
    found = score({"forget": grouped((values + 1e-3).tolist(), np.repeat(np.arange(8), 5).tolist())}).values
    assert found["forget_group_gap"]["p"] < 0.01
    assert found["forget_group_gap"]["value"] > 2 * found["forget_group_gap"]["chance"]


def test_groups_as_a_picture_hold_numbers_only() -> None:
    first = {"forget": grouped([0.2, 0.4, 0.5], [3, 3, 5])}
    second = {"forget": grouped([0.1, 0.1, 0.9], [3, 3, 5])}
    found = gaps.picture({"gold": first, "unlearned": second, "bare": {}})["by_group"]["forget"]
    assert found["groups"] == [3, 5]
    assert found["n"] == [2, 1]
    np.testing.assert_allclose(found["models"]["gold"], [0.3, 0.5])
    np.testing.assert_allclose(found["models"]["unlearned"], [0.1, 0.9])
    assert gaps.picture({"gold": {}}) == {}


# --- the logit lens, from columns -----------------------------------------------------------------------------------


def test_the_lens_reports_the_layer_that_tells_most() -> None:
    table = oracle.make_table("forget", 12)
    layers = {k: np.exp(table.columns[f"lens_{k}"].astype(float)) for k in (1, 2)}
    found = score({"forget": table}).values["logit_lens_probability"]
    best = max(layers, key=lambda k: layers[k].mean())
    assert (found["value"], found["layer"]) == (pytest.approx(layers[best].mean()), best)
    bare = Table("forget", 12, {k: v for k, v in table.columns.items() if "lens" not in k})
    assert "evaluate.latent" in score({"forget": bare}).not_shown["logit_lens_probability"]


# --- over-forgetting by name ----------------------------------------------------------------------------------------


def level(value: float, spread: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


OVER = {
    "below_never_seen": ("never_seen_gap", -3.0, 0.1, {}),
    "beyond_gold": ("mia_min_k_auc", 0.2, 0.48, {}),
    "gibberish": ("forget_fluency", 0.2, 0.9, {}),
    "stands_apart": ("neighbours_never_seen", 0.95, 0.5, {}),
}


@pytest.mark.parametrize("code", sorted(OVER))
def test_each_kind_of_over_forgetting_has_a_name(code: str) -> None:
    metric, bad, target, more = OVER[code]
    gold = {metric: level(target), **more}
    found = findings({"unlearned": {metric: level(bad)}, "gold": gold}, [])
    assert [(f["code"], f["severity"]) for f in found] == [(code, "failure")]
    assert found[0]["title"].startswith("Over-forgotten: ")
    assert f"{METRICS[metric].title}" != found[0]["title"]
    assert over_forgotten(gold, {}, gold) == [], "the gold is not over-forgotten"
    assert over_forgotten({metric: level(bad, spread=5.0)}, {}, gold) == [], "too few rows to say"
    assert over_forgotten({metric: {"value": bad, "low": None, "high": None}}, {}, gold) == []


def test_over_forgetting_without_a_gold() -> None:
    assert [f["code"] for f in over_forgotten({"never_seen_gap": level(-0.7)}, {}, {})] == ["below_never_seen"]
    assert over_forgotten({"never_seen_gap": level(-0.4)}, {}, {}) == [], "forget rows may be harder"
    own = {"forget_fluency": level(0.3), "retain_fluency": level(0.95)}
    assert [f["code"] for f in over_forgotten(own, {}, {})] == ["gibberish"]
    assert over_forgotten(own | {"forget_fluency": level(0.8)}, {}, {}) == []
    assert over_forgotten({"mia_loss_auc": level(0.1)}, {}, {}) == [], "how far is too far only a gold says"
    own, before = {"neighbours_retain": level(0.9)}, {"neighbours_retain": level(0.5)}
    assert [f["code"] for f in over_forgotten(own, before, {})] == ["stands_apart"]
    assert over_forgotten(own, {}, {}) == []


def test_too_little_forgetting_is_not_called_too_much() -> None:
    gold = {"never_seen_gap": level(0.1), "mia_loss_auc": level(0.5), "forget_fluency": level(0.9)}
    remembers = {"never_seen_gap": level(3.0), "mia_loss_auc": level(0.99), "forget_fluency": level(0.97)}
    assert over_forgotten(remembers, {}, gold) == []
