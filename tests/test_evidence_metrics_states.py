"""Inner layers, gradients and neighbours against loops; a planted memorised row, and labels dealt at random."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import oracles_evidence as evidence
import tiny
from excise.forward import Anatomy
from excise.metrics import measure, rows
from excise.metrics.apart import apart, neighbours, spread
from excise.metrics.gradients import gradient_norms
from excise.metrics.scores import score
from excise.metrics.table import check
from excise.records import Record
from excise.tasks import causal_lm

HOW = causal_lm.Encoding(template="{prompt} ", max_length=48)


class Letters:
    """A tokenizer of words of one letter and a number: 0 pads and ends."""

    eos_token_id, pad_token_id, chat_template = 0, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + int(w[1:]) % (tiny.VOCABULARY - 1) for w in text.split()]}


def records(n: int, seed: int, group: str | None = None) -> list[Record]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"v{k}" for k in rng.integers(0, 60, rng.integers(low, high)))

    return [
        Record(text(2, 6), text(3, 9), paraphrases=((None, text(3, 9)),), false_answers=(text(3, 9), text(3, 9)),
               group=group and f"{group}{i % 3}")
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model("llama")


# --- the logit lens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [30, 4096])
def test_the_lens_is_the_oracle_in_any_batch(net: Any, budget: int) -> None:
    sides = {"forget": records(5, 1), "retain": records(4, 2), "facts": records(3, 3)}
    anatomy = Anatomy.of(net)
    swept = measure.sweep(net, anatomy, Letters(), sides, HOW, batch_tokens=budget, lens=("forget", "retain"))
    for side in ("forget", "retain"):
        table = check(swept.tables[side])
        found = rows.lens(table)
        assert list(found) == [1, 2], "the last layer is the model itself"
        for row, example in enumerate(causal_lm.encode_records(sides[side], Letters(), HOW)):
            for layer in found:
                expected = evidence.lens_of_row(net, example, layer)
                assert np.log(found[layer][row]) == pytest.approx(expected, rel=1e-4)
    assert not any(name.startswith("lens") for name in swept.tables["facts"].columns)
    plain = measure.sweep(net, anatomy, Letters(), sides, HOW, batch_tokens=budget)
    for side, table in plain.tables.items():
        for name, values in table.columns.items():
            np.testing.assert_array_equal(values, swept.tables[side].columns[name])


def test_the_lens_costs_no_pass_of_its_own(net: Any) -> None:
    sides, calls = {"forget": records(6, 1)}, []
    handle = net.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        measure.sweep(net, Anatomy.of(net), Letters(), sides, HOW)
        alone = len(calls)
        measure.sweep(net, Anatomy.of(net), Letters(), sides, HOW, lens=("forget",), layers=[1, 2, 3])
    finally:
        handle.remove()
    assert len(calls) == 2 * alone


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradient_norms_are_the_oracle_and_leave_no_trace(net: Any) -> None:
    model, given = copy.deepcopy(net), records(4, 5)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before, state = tiny.weights(model), torch.get_rng_state()
    found = gradient_norms(model, Anatomy.of(model), Letters(), given, HOW)
    assert tiny.apart(before, tiny.weights(model)) == 0
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert bool((model.model.norm.weight.grad == 1).all())
    assert torch.equal(state, torch.get_rng_state())
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    examples = causal_lm.encode_records(given, Letters(), HOW)
    expected = [evidence.gradient_norm_of_row(copy.deepcopy(net), e) for e in examples]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- neighbours and controls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("people", [False, True])
def test_neighbours_are_the_oracle(people: bool) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(14, 4)) + 0.7, rng.normal(size=(14, 4))
    ids, others = (np.arange(14) % 3, np.array([2, 3] * 6 + [-1] * 2)) if people else (None, None)
    found = neighbours(torch.tensor(a), torch.tensor(b), ids, others, k=4)
    plain = (None, None) if ids is None or others is None else (ids.tolist(), others.tolist())
    assert found["value"] == pytest.approx(evidence.neighbours_of_own(a.tolist(), b.tolist(), *plain, k=4))
    assert found["by"] == ("group" if people else "row")
    assert found["low"] <= found["value"] <= found["high"]
    one = neighbours(torch.tensor(a), torch.tensor(b), np.zeros(14, int), others)
    assert one["by"] == "row", "one person alone has nobody else to be near to"


def test_neighbours_of_alike_rows_are_at_chance_whatever_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in ((60, 200), (60, 60), (120, 40)):
        alike = [neighbours(*(torch.randn(k, 8, generator=generator) for k in (n, m)), seed=s) for s in range(6)]
        mean = np.mean([found["value"] - found["chance"] for found in alike])
        assert abs(mean) < 0.06
        assert alike[0]["n"] == min(n, m)
    far = neighbours(torch.randn(30, 8, generator=generator) + 9, torch.randn(30, 8, generator=generator))
    assert far["value"] == 1


def test_people_who_are_near_themselves_do_not_stand_apart() -> None:
    """Rows of one person lie together: by row that looks like standing apart, by person it does not."""
    rng, ids, beside = np.random.default_rng(0), np.repeat(np.arange(10), 8), []
    for _ in range(12):
        a, b = (torch.tensor(np.repeat(rng.normal(size=(10, 20)), 8, 0) * 3 + rng.normal(size=(80, 20))) for _ in "ab")
        assert neighbours(a, b, k=7)["value"] > 0.8
        found = neighbours(a, b, ids, ids + 10)
        beside.append(found["value"] - found["chance"])
    assert abs(np.mean(beside)) < 0.1


def planes(gap: float, seed: int = 0, n: int = 50) -> dict[str, dict[int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = {
        side: {layer: rng.normal(size=(n, 6)) for layer in (1, 2)} for side in ("forget", "untouched", "never_seen")
    }
    made["forget"][2] += gap
    return made


def test_every_layer_is_looked_at_and_every_probe_has_a_control() -> None:
    found = apart(planes(4.0))
    assert found.layers == [1, 2]
    for name in ("latent_membership_auc", "latent_projection_auc", "neighbours_retain", "neighbours_never_seen"):
        low, high = found.by_layer[name]
        assert high > 0.99, name
        assert low < 0.75, name
    assert not found.not_shown
    controls = [n for n in found.values if n.endswith("shuffled")]
    assert sorted(controls) == ["latent_membership_shuffled", "latent_projection_shuffled", "probe_auc_retain_shuffled"]
    for seed in range(3):
        for entry in (apart(planes(4.0, seed), seed=seed).values[name] for name in controls):
            assert abs(entry["value"] - 0.5) < 0.17, "labels dealt at random: chance, though the clouds are far apart"


def test_what_apart_cannot_say() -> None:
    own = planes(1.0)
    alone = apart({"forget": own["forget"]})
    assert not alone.values
    assert len(alone.not_shown) == 5
    without = apart({"forget": own["forget"], "never_seen": own["never_seen"]})
    assert "latent_projection_shuffled" in without.not_shown
    assert "latent_membership_shuffled" in without.values
    assert spread([3]) == [3]


# --- a planted row --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Tables of a model that learned twelve rows by heart and of one that did not, with twelve others beside them."""
    sides = {"forget": records(12, 11, "p"), "never_seen": records(12, 12, "q"), "retain": records(12, 13, "r")}
    examples = causal_lm.encode_records(sides["forget"], Letters(), HOW)
    made: dict[str, Any] = {"blank": tiny.model("llama", seed=4)}
    made["knows"] = copy.deepcopy(made["blank"])
    batch = causal_lm.collate(examples, pad_id=0)
    labels = batch["input_ids"].masked_fill(~batch["label_mask"], -100)
    optimiser = torch.optim.AdamW(made["knows"].parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        made["knows"](
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        optimiser.step()
    made["knows"].eval()
    tables = {}
    for name, model in made.items():
        anatomy = Anatomy.of(model)
        swept = measure.sweep(model, anatomy, Letters(), sides, HOW, lens=tuple(sides), layers=[1, 2, 3])
        for side in ("forget", "never_seen"):
            norms = gradient_norms(model, anatomy, Letters(), sides[side], HOW)
            swept.tables[side].columns["attack_gradient_norm"] = norms
        tables[name] = {side: check(table) for side, table in swept.tables.items()}
    return tables


ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")


def test_every_memorisation_metric_finds_what_was_planted_and_nothing_else(planted: dict[str, Any]) -> None:
    known = score(planted["knows"], planted["blank"], resamples=50).values
    never = score({"forget": planted["knows"]["never_seen"]}, resamples=50).values
    for metric in ("forget_probability", "exact_memorization", "extraction_strength"):
        assert known[metric]["low"] > 0.9, metric
        assert never[metric]["high"] < 0.2, metric
    assert known["logit_lens_probability"]["value"] > 2 * never["logit_lens_probability"]["value"]
    assert known["forget_score"]["value"] < 0.1 < 0.7 < never["forget_score"]["value"]
    assert known["never_seen_gap"]["low"] > 1
    for attack in ATTACKS:
        assert known[f"mia_{attack}_auc"]["value"] > 0.95, attack
    blank = score(planted["blank"], planted["blank"], resamples=50).values
    for attack in ATTACKS:
        assert 0.15 < blank[f"mia_{attack}_auc"]["value"] < 0.85, "a model that never saw either side"
    for metric in ("forget_probability", "exact_memorization", "extraction_strength", "logit_lens_probability"):
        assert blank[metric]["value"] < 0.2, metric


def test_membership_of_shuffled_labels_is_at_chance(planted: dict[str, Any]) -> None:
    tables, rng = planted["knows"], np.random.default_rng(0)
    for attack in ATTACKS[:-1]:
        both = np.concatenate([rows.attack_score(tables[s], attack) for s in ("forget", "never_seen")])
        values = []
        for _ in range(200):
            dealt = rng.permutation(both)
            values.append(np.mean(dealt[:12, None] > dealt[None, 12:]))
        assert np.mean(values) == pytest.approx(0.5, abs=0.03), attack
