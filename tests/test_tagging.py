"""Scores of classifiers: strict F1 is seqeval's, and everything else agrees with loops over plain numbers."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import oracles_class as oracle
import small_tagger as small
from excise.attacks import relearn_classes, training
from excise.attacks.target import Target
from excise.errors import InputRefused
from excise.forward import Anatomy
from excise.metrics import class_scores, class_states, entities, tagging
from excise.metrics.class_catalogue import CATALOGUES, find
from excise.metrics.statistics import bootstrap_counts, privleak
from excise.metrics.table import Table, load, save
from excise.tasks import TASKS, causal_lm
from tokenizers_tiny import word_piece

TAGS = small.TAGS
HOW = causal_lm.Encoding(max_length=64)


def table(
    side: str = "forget", rows: int = 12, *, seed: int = 0, classes: tuple[str, ...] = TAGS, right: float = 0.6
) -> Table:
    """Random true classes, and answers that are right about so often."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, rows)
    n = int(lengths.sum())
    gold = rng.integers(0, len(classes), n)
    given = np.where(rng.random(n) < right, gold, rng.integers(0, len(classes), n))
    columns = {
        "row": np.arange(rows), "kind": np.zeros(rows), "eos": np.zeros(rows, bool),
        "offsets": np.concatenate(([0], np.cumsum(lengths))), "logp": np.log(rng.uniform(0.01, 1, n)),
        "hit": gold == given, "gold_class": gold, "predicted_class": given,
    }  # fmt: skip
    return Table(side, rows, columns, classes)


def strings(of: Table, column: str) -> list[list[str]]:
    cut = of.columns["offsets"]
    return [[of.classes[c] for c in of.columns[column][a:b]] for a, b in pairwise(cut)]


# --- F1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_f1_is_that_of_seqeval_strict(seed: int) -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="NO SEQEVAL: pip install -e '.[dev]'")
    from seqeval.scheme import IOB2

    found = table(rows=1 + seed, seed=seed, right=0.2 + 0.02 * seed)
    gold, given = strings(found, "gold_class"), strings(found, "predicted_class")
    how = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    values = class_scores.score({"forget": found}).values
    expected = seqeval.f1_score(gold, given, average="micro", **how)
    assert values["forget_f1"]["value"] == pytest.approx(expected, abs=1e-12)
    assert oracle.strict_f1(gold, given) == pytest.approx(expected, abs=1e-12)
    by_type = seqeval.classification_report(gold, given, output_dict=True, **how)
    for kind in ("place", "work-of-art"):
        if f"forget_f1/{kind}" in values:
            value = values[f"forget_f1/{kind}"]["value"]
            assert value == pytest.approx(oracle.strict_f1(gold, given, kind), abs=1e-12)
            if kind in by_type:
                assert value == pytest.approx(by_type[kind]["f1-score"], abs=1e-12)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-place B-place", [(1, 2)]),
        ("B-place I-place I-work-of-art I-place", [(0, 2)]),
        ("B-place B-place I-place O I-place", [(0, 1), (1, 3)]),
        ("O O", []),
        ("I-place I-place", []),
    ],
)
def test_an_entity_begins_with_b(tags: str, expected: list[tuple[int, int]]) -> None:
    of = entities.scheme(TAGS)
    assert of is not None
    ids = np.array([TAGS.index(tag) for tag in tags.split()])
    found = entities.entities(ids, np.array([0, len(ids)]), of)
    assert list(zip(found.start.tolist(), found.end.tolist(), strict=True)) == expected


def test_no_entity_reaches_into_the_next_sentence() -> None:
    of = entities.scheme(TAGS)
    assert of is not None
    found = entities.entities(np.array([1, 2, 2]), np.array([0, 1, 1, 3]), of)  # B | empty | I I
    assert (found.start.tolist(), found.end.tolist()) == ([0], [1])


def test_texts_have_accuracy_and_macro_f1() -> None:
    rng = np.random.default_rng(1)
    gold, given = rng.integers(0, 3, 30), rng.integers(0, 3, 30)
    columns = {
        "row": np.arange(30), "kind": np.zeros(30), "eos": np.zeros(30, bool), "offsets": np.arange(31),
        "logp": np.log(rng.uniform(0.1, 1, 30)), "hit": gold == given, "gold_class": gold, "predicted_class": given,
    }  # fmt: skip
    found = class_scores.score({"test": Table("test", 30, columns, (*small.LABELS, "never"))}).values
    assert found["test_accuracy"]["value"] == pytest.approx((gold == given).mean())
    assert found["test_macro_f1"]["value"] == pytest.approx(f1_score(gold, given, average="macro"))
    assert "test_f1" not in found
    low, value, high = (found["test_macro_f1"][key] for key in ("low", "value", "high"))
    assert low < value < high


# --- gaps, membership -----------------------------------------------------------------------------------------------


def test_the_gap_is_drawn_in_pairs() -> None:
    mine, gold = table(seed=1), table(seed=1, right=0.9)
    found = class_scores.score({"forget": mine}, {"forget": gold}, resamples=50).values["forget_f1_gap"]
    truth, given, gold_given = (
        strings(t, c) for t, c in ((mine, "gold_class"), (mine, "predicted_class"), (gold, "predicted_class"))
    )
    assert found["value"] == pytest.approx(oracle.strict_f1(truth, given) - oracle.strict_f1(truth, gold_given))
    drawn = []
    for counts in bootstrap_counts(12, 50, sum(b"forget")).astype(int):
        rows = [i for i, times in enumerate(counts) for _ in range(times)]
        pair = [oracle.strict_f1([truth[i] for i in rows], [own[i] for i in rows]) for own in (given, gold_given)]
        drawn.append(pair[0] - pair[1])
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(drawn, [5, 95])))
    assert found["level"] == 0.9
    other = class_scores.score({"forget": gold}, {"forget": mine}, resamples=50).values["forget_f1_gap"]
    assert other["value"] == pytest.approx(-found["value"])
    same = class_scores.score({"forget": gold}, {"forget": gold}).values["forget_f1_gap"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)


def test_a_gold_with_other_numbers_for_its_classes_is_the_same_gold() -> None:
    mine, gold = table(seed=1), table(seed=1, right=0.9)
    order = [3, 0, 4, 2, 1]
    renamed = tuple(TAGS[i] for i in order)
    back = np.argsort(order)
    columns = {**gold.columns, **{c: back[gold.columns[c]] for c in ("gold_class", "predicted_class")}}
    other = Table("forget", gold.rows, columns, renamed)
    a, b = (class_scores.score({"forget": mine}, {"forget": g}).values["forget_f1_gap"] for g in (gold, other))
    assert a == b


def test_membership_reads_the_loss() -> None:
    tables = {"forget": table(seed=3), "never_seen": table("never_seen", 15, seed=4)}
    golds = {"forget": table(seed=3), "never_seen": table("never_seen", 15, seed=9)}
    golds["forget"].columns["logp"] = golds["forget"].columns["logp"] * 1.3
    found = class_scores.score(tables, golds).values

    def losses(of: Table, *, entity_only: bool) -> list[float]:
        out = []
        for row, (a, b) in enumerate(zip(of.columns["offsets"][:-1], of.columns["offsets"][1:], strict=True)):
            assert of.columns["row"][row] == row
            own = [of.columns["logp"][i] for i in range(a, b) if not entity_only or of.columns["gold_class"][i] != 0]
            out += [sum(own) / len(own)] if own else []
        return out

    for name, only in (("membership_auc", False), ("entity_membership_auc", True)):
        a, b = (losses(tables[side], entity_only=only) for side in ("forget", "never_seen"))
        assert found[name]["value"] == pytest.approx(oracle.auc(a, b))
        assert (found[name]["n"], found[name]["n_never_seen"]) == (len(a), len(b))
    c, d = (losses(golds[side], entity_only=True) for side in ("forget", "never_seen"))
    assert found["privleak"]["value"] == pytest.approx(float(privleak(oracle.auc(a, b), oracle.auc(c, d))))
    tokens = [
        math.exp(v) for v, g in zip(*(tables["forget"].columns[k] for k in ("logp", "gold_class")), strict=True) if g
    ]
    assert found["forget_probability"]["value"] == pytest.approx(sum(tokens) / len(tokens))


def test_words_outside_of_entities_are_counted_by_themselves() -> None:
    """By a loop; over all of them, not over sentences."""
    tables = {"forget": table(seed=3), "never_seen": table("never_seen", 15, seed=4), "retain": table("retain", seed=5)}
    found = class_scores.score(tables).values
    for side in ("forget", "never_seen"):
        columns = tables[side].columns
        pairs = zip(columns["gold_class"], columns["predicted_class"], strict=True)
        own = [predicted == 0 for gold, predicted in pairs if gold == 0]
        entry = found[f"{side}_outside_accuracy"]
        assert entry["value"] == pytest.approx(sum(own) / len(own))
        assert 0 < entry["low"] <= entry["value"] <= entry["high"] <= 1
    assert "retain_outside_accuracy" not in found


def test_what_cannot_be_shown_says_why() -> None:
    found = class_scores.score({"forget": table(), "news": table("news", 5)})
    assert "news_f1" in found.values
    assert "gold" in found.not_shown["forget_f1_gap"]
    assert "never-seen" in found.not_shown["membership_auc"]
    assert "test" in found.not_shown["test_f1"]
    assert "hidden states" in found.not_shown["same_class_neighbours"]
    short = class_scores.score({"forget": table()}, {"forget": table(rows=3)})
    assert "other" in short.not_shown["forget_f1_gap"]
    plain = table()
    plain.columns["gold_class"][:] = 0
    plain.columns["predicted_class"][:] = 0
    assert "no entities" in class_scores.score({"forget": plain}).not_shown["forget_f1"]


def test_the_catalogue_never_says_that_less_is_better() -> None:
    for task, metrics in CATALOGUES.items():
        for name, metric in metrics.items():
            assert name == metric.name
            words = f"{metric.sentence} {metric.against_gold} {metric.unit}".lower()
            assert "is better" not in words
            assert find(name, task) is not None
    for name in ("forget_f1", "forget_probability", "membership_auc", "forget_f1_gap", "same_class_neighbours"):
        assert CATALOGUES["token_classification"][name].direction == "gold"
    assert find("nothing", "token_classification") is None


def test_tables_keep_their_classes(tmp_path: Path) -> None:
    save(table(), tmp_path / "forget.safetensors")
    back = load(tmp_path / "forget.safetensors")
    assert back.classes == TAGS
    assert class_scores.task_of({"forget": back}) == "token_classification"
    assert back.columns["gold_class"].dtype == np.int16
    for change in ({"classes": ()}, {"classes": TAGS[:2]}):
        with pytest.raises(InputRefused, match="class"):
            save(Table("forget", 12, table().columns, **change), tmp_path / "bad.safetensors")


# --- the sweep ------------------------------------------------------------------------------------------------------


def swept(net: Any, sides: dict[str, Any], task: str = "token_classification", **more: Any) -> Any:
    return tagging.sweep(net, Anatomy.of(net), word_piece(), sides, HOW, task=task, layers=[-1], **more)


@pytest.mark.parametrize("task", ["token_classification", "sequence_classification"])
def test_the_sweep_is_the_models_own_answer(task: str) -> None:
    tags = task == "token_classification"
    rows = small.sentences(7) if tags else small.texts(7)
    net = small.model(TAGS if tags else small.LABELS)
    found = swept(net, {"forget": rows, "test": rows[:2]}, task)
    own = found.tables["forget"]
    labels, states = [], []
    for row, example in enumerate(TASKS[task].encode_records(rows, word_piece(), HOW, names=own.classes)):
        out = net(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True)
        logits = out.logits[0][list(example.places)] if tags else out.logits
        logp = logits.log_softmax(-1)
        at = slice(int(own.columns["offsets"][row]), int(own.columns["offsets"][row + 1]))
        wanted = logp[range(len(example.classes)), list(example.classes)]
        np.testing.assert_allclose(own.columns["logp"][at], wanted.detach(), rtol=1e-4, atol=1e-5)
        assert own.columns["predicted_class"][at].tolist() == logits.argmax(-1).tolist()
        assert own.columns["gold_class"][at].tolist() == list(example.classes)
        labels += example.classes
        states += list(out.hidden_states[-1][0][list(example.places)].detach().numpy())
    places = class_states.chosen(np.array(labels), own.classes)
    np.testing.assert_allclose(found.states["forget"][-1], np.array(states)[places], rtol=1e-3, atol=1e-4)
    assert (own.columns["hit"] == (own.columns["gold_class"] == own.columns["predicted_class"])).all()
    assert found.tables["test"].rows == 2


def test_order_and_batch_size_do_not_matter() -> None:
    net, rows = small.model(), small.sentences(9)
    one = swept(net, {"forget": rows, "retain": []}, batch_tokens=32)
    two = swept(net, {"forget": rows})
    np.testing.assert_allclose(one.tables["forget"].columns["logp"], two.tables["forget"].columns["logp"], atol=1e-5)
    np.testing.assert_allclose(one.states["forget"][-1], two.states["forget"][-1], atol=1e-4)
    assert one.tables["retain"].sequences == 0


def test_a_class_that_the_model_lacks_is_refused_by_line() -> None:
    with pytest.raises(InputRefused, match="forget:1"):
        swept(small.model(("O", "B-other")), {"forget": small.sentences(2)})


# --- states ---------------------------------------------------------------------------------------------------------


def test_few_states_are_kept_and_the_same_for_every_model() -> None:
    gold = np.array([0, 1, 0, 0, 2, 0, 0, 3])
    kept = class_states.chosen(gold, TAGS)
    assert kept[:3].tolist() == [1, 4, 7]
    assert len(kept) == 6
    assert (gold[kept[3:]] == 0).all()
    assert kept.tolist() == class_states.chosen(gold, TAGS).tolist()
    assert len(class_states.chosen(np.ones(5000, int), TAGS, most=100)) == 100
    assert len(class_states.chosen(np.arange(6) % 3, small.LABELS)) == 6


def cloud(side: str, types: list[int], rows: list[int], centre: dict[int, Any], seed: int) -> tuple[Table, Any]:
    """A side whose labels of a type lie around a place of their own; one label a word, O as given."""
    rng = np.random.default_rng(seed)
    gold = np.array([{-1: 0, 0: 1, 1: 3}[kind] for kind in types])
    cut = [0, *[i + 1 for i in range(len(rows) - 1) if rows[i] != rows[i + 1]], len(rows)]
    columns = {
        "row": np.arange(len(cut) - 1), "kind": np.zeros(len(cut) - 1), "eos": np.zeros(len(cut) - 1, bool),
        "offsets": np.array(cut), "logp": np.full(len(gold), -0.1), "hit": np.ones(len(gold), bool),
        "gold_class": gold, "predicted_class": gold,
    }  # fmt: skip
    made = Table(side, len(cut) - 1, columns, TAGS)
    places = class_states.chosen(gold, TAGS)
    states = np.array([centre[types[p]] + 0.4 * rng.normal(size=6) for p in places])
    return made, states


def test_geometry_is_that_of_loops() -> None:
    rng = np.random.default_rng(0)
    centre = {kind: rng.normal(size=6) for kind in (-1, 0, 1)}
    kept, kept_states = cloud("untouched", [0, 1, -1, -1] * 10, [i // 4 for i in range(40)], centre, 1)
    lost, lost_states = cloud("forget", [0, 1, -1, 1] * 4, [i // 4 for i in range(16)], centre, 2)
    found = class_states.latent({"untouched": kept, "forget": lost}, {"untouched": kept_states, "forget": lost_states})
    among = class_states.labels_of(kept, kept_states)
    pairs = list(zip(among.states.tolist(), among.type.tolist(), strict=True))
    asked = class_states.labels_of(lost, lost_states)
    inside = [(z, t) for z, t in zip(asked.states.tolist(), asked.type.tolist(), strict=True) if t >= 0]
    assert len(inside) == 12
    expected = {
        "same_class_neighbours": [oracle.neighbours(z, t, pairs, 10) for z, t in inside],
        "own_class_cosine": [oracle.middle_cosine(z, t, pairs) for z, t in inside],
        "outside_cosine": [oracle.middle_cosine(z, -1, pairs) for z, _ in inside],
    }
    for name, values in expected.items():
        entry = found.values[name]
        assert entry["value"] == pytest.approx(sum(values) / len(values), abs=1e-9), name
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] == 4
    np.testing.assert_allclose(found.scatter["forget"], list(zip(*list(expected.values())[1:], strict=True)), atol=1e-4)
    mine = class_states.same_class(among, among, 3)
    others = [oracle.neighbours(z, t, pairs[:i] + pairs[i + 1 :], 3) for i, (z, t) in enumerate(pairs)]
    np.testing.assert_allclose(mine, others)
    left_out = class_states.cosines(among, among)[0]
    alone = [oracle.middle_cosine(z, t, pairs[:i] + pairs[i + 1 :]) for i, (z, t) in enumerate(pairs)]
    np.testing.assert_allclose(left_out, alone)


def test_geometry_knows_a_word_that_moved_to_o() -> None:
    centre = {-1: np.eye(6)[0] * 3, 0: np.eye(6)[1] * 3, 1: np.eye(6)[2] * 3}
    kept = cloud("retain", [0, 1, -1, -1] * 10, [i // 4 for i in range(40)], centre, 1)
    stays = cloud("forget", [0, 1] * 6, [i // 2 for i in range(12)], centre, 2)
    moved = (
        stays[0],
        cloud("forget", [0, 1] * 6, [i // 2 for i in range(12)], centre | {0: centre[-1], 1: centre[-1]}, 2)[1],
    )
    values = [
        class_states.latent({"retain": kept[0], "forget": f[0]}, {"retain": kept[1], "forget": f[1]}).values
        for f in (stays, moved)
    ]
    assert values[0]["same_class_neighbours"]["value"] > 0.95 > 0.05 > values[1]["same_class_neighbours"]["value"]
    assert values[0]["own_class_cosine"]["value"] > values[0]["outside_cosine"]["value"]
    assert values[1]["own_class_cosine"]["value"] < values[1]["outside_cosine"]["value"]


def test_no_row_or_person_is_on_both_sides_of_the_probe() -> None:
    """Each row has a mark of its own: a probe that has met the row finds its side, one that has not cannot."""
    rng = np.random.default_rng(0)

    def side(name: str, first: int) -> tuple[Table, Any]:
        made, _ = cloud(name, [0] * 60, [i // 6 for i in range(60)], {0: np.zeros(6)}, 0)
        marks = rng.normal(size=(10, 40)) * 3
        return made, np.array([marks[i // 6] + 0.05 * rng.normal(size=40) for i in range(60)])

    (a, x), (b, y) = side("forget", 0), side("never_seen", 1)
    found = class_states.latent({"forget": a, "never_seen": b}, {"forget": x, "never_seen": y}).values
    own = found["latent_membership_auc"]
    assert (own["folds_by"], own["n"], own["n_other"]) == ("row", 10, 10)
    assert own["value"] < 0.7
    by_label = class_states.probe_auc(torch.from_numpy(x), torch.from_numpy(y))
    assert by_label > 0.9
    people = {"forget": [i // 5 for i in range(10)], "never_seen": [10 + i // 5 for i in range(10)]}
    again = class_states.latent({"forget": a, "never_seen": b}, {"forget": x, "never_seen": y}, people).values
    assert again["latent_membership_auc"]["folds_by"] == "group"
    one = class_states.latent(
        {"forget": a, "never_seen": b}, {"forget": x, "never_seen": y}, {**people, "forget": [1] * 10}
    )
    assert one.values["latent_membership_auc"]["folds_by"] == "row"


# --- relearning -----------------------------------------------------------------------------------------------------


def relearned(net: Any, rows: Any, **how: Any) -> relearn_classes.ClassCurve:
    return relearn_classes.class_curve(Target(net, Anatomy.of(net), word_piece(), {"forget": rows}, HOW), **how)


def test_relearning_is_that_of_a_loop_on_a_copy_and_leaves_no_trace() -> None:
    net, rows = small.model(), small.sentences(8)
    before = copy.deepcopy(net.state_dict())
    how: dict[str, Any] = {"task": "token_classification", "steps": (0, 1, 3), "lr": 1e-2, "batch_rows": 3}
    found = relearned(net, rows, **how)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    clone = copy.deepcopy(net)
    trained, held = training.halves([None] * 8, 0)
    order = training.order(trained, 3, 0)
    examples = TASKS["token_classification"].encode_records(rows, word_piece(), HOW, names=TAGS)

    def logits(i: int) -> torch.Tensor:
        return clone(input_ids=torch.tensor([examples[i].input_ids])).logits[0][list(examples[i].places)]

    adam = torch.optim.AdamW(clone.parameters(), lr=1e-2, weight_decay=0.0)
    probability, f1 = [], []
    for step in range(4):
        if step in (0, 1, 3):
            with torch.no_grad():
                p = [(logits(i).softmax(-1), examples[i].classes) for i in held]
            tokens = [float(row[c]) for rows_, classes in p for row, c in zip(rows_, classes, strict=True) if c != 0]
            probability.append(sum(tokens) / len(tokens))
            given = [[TAGS[int(c)] for c in rows_.argmax(-1)] for rows_, _ in p]
            f1.append(oracle.strict_f1([[TAGS[c] for c in classes] for _, classes in p], given))
        loss = [
            torch.nn.functional.cross_entropy(logits(i), torch.tensor(examples[i].classes), reduction="none")
            for i in next(order)
        ]
        adam.zero_grad()
        torch.cat(loss).mean().backward()
        adam.step()
    assert found.probability == pytest.approx(probability, rel=1e-3)
    assert found.f1 == pytest.approx(f1)


def test_relearning_that_diverges_is_not_a_number() -> None:
    net = small.model()
    found = relearned(net, small.sentences(6), task="token_classification", steps=(0, 2), lr=1e30)
    assert math.isfinite(found.probability[0])
    assert math.isnan(found.probability[1])
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    with pytest.raises(ValueError, match="two rows"):
        relearned(net, small.sentences(1), task="token_classification", lr=1e-3)
