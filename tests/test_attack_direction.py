"""Ablating a direction: mean states and ablation against loops, and a planted direction that hides what is known."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import attacked
import oracles_evidence as oracle
from attacked import HOW, Bytes, assert_same, gpt2, llama, lora, rows, sides, snapshot, trained
from excise.attacks import direction, training
from excise.attacks.answers import Answers
from excise.attacks.lending import weights_of
from excise.errors import NotShown, UsageError
from excise.tasks import causal_lm


def made(model: Any, records: dict, **options: Any) -> Any:
    return attacked.made(direction.attack, model, records, **options)


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def mean_after(model: Any, block: int, records: list) -> torch.Tensor:
    """Mean state after a block, a row and a position at a time."""
    seen: list[torch.Tensor] = []
    handle = blocks(model)[block - 1].register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0].detach())
    )
    total = torch.zeros(24)
    for example in causal_lm.encode_records(records, Bytes(), HOW):
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([example.input_ids]))
        places = range(example.label_start - 1, len(example.input_ids) - 1)
        total += sum(seen[0][t] for t in places) / len(places)
    handle.remove()
    return total / len(records)


def ablated(model: Any, v: torch.Tensor, at: list[int]) -> Any:
    """A copy whose blocks give states without a direction, position by position."""
    clone, v = copy.deepcopy(model), v / v.norm()

    def hook(_m: Any, _a: Any, out: Any) -> Any:
        states = (out[0] if isinstance(out, tuple) else out).clone()
        for t in range(states.shape[1]):
            states[0, t] -= float(torch.dot(states[0, t], v)) * v
        return (states, *out[1:]) if isinstance(out, tuple) else states

    for block in at:
        blocks(clone)[block - 1].register_forward_hook(hook)
    return clone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mean_states_are_those_of_a_loop(kind: str) -> None:
    model, records = (llama() if kind == "llama" else gpt2()).train(), rows(7)
    before = snapshot(model)
    answers = Answers.of(attacked.target(model, {"forget": records}))
    for size in (1, 3, 32):
        found = direction.mean_states(answers, [0, 2, 5, 6], [1, 2], size=size)
        for layer in (1, 2):
            expected = mean_after(model.eval(), layer, [records[i] for i in (0, 2, 5, 6)])
            torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)
        model.train()
    assert_same(model, before)


def test_each_budget_is_an_ablation_by_hand() -> None:
    original, model = gpt2(), gpt2(seed=4)
    records = sides(forget=6, retain=4)
    before = snapshot(model)
    found = made(model, records, original=weights_of(original), seed=1)
    assert_same(model, before)
    had, held = training.halves([r.group for r in records["forget"]], 1)
    assert found.rows["forget"].tolist() == held
    assert found.budgets == (
        "none", "moved-1", "moved-2", "moved-3", "moved-each", "apart-1", "apart-2", "apart-3", "apart-each", "random",
    )  # fmt: skip
    theirs = [records["forget"][i] for i in had]
    moved = {k: mean_after(model, k, theirs) - mean_after(original, k, theirs) for k in (1, 2, 3)}
    apart = {k: mean_after(model, k, theirs) - mean_after(model, k, records["retain"]) for k in (1, 2, 3)}
    each = model
    for k, v in apart.items():
        each = ablated(each, v, [k])
    expected = {
        "none": model,
        "moved-2": ablated(model, moved[2], [1, 2, 3]),
        "apart-3": ablated(model, apart[3], [1, 2, 3]),
        "apart-each": each,
    }
    for name, by_hand in expected.items():
        for side, numbers in (("forget", held), ("retain", range(4))):
            encoded = causal_lm.encode_records([records[side][i] for i in numbers], Bytes(), HOW)
            values = [oracle.answer_probability(by_hand, e) for e in encoded]
            np.testing.assert_allclose(found.values[side][found.budgets.index(name)], values, rtol=2e-3)
    assert found.extra["length_moved"] == pytest.approx([float(v.norm()) for v in moved.values()], rel=1e-3)


def test_a_planted_direction_is_found_and_taken_out() -> None:
    records = sides(forget=10, retain=6)
    original = trained(gpt2(), records["forget"] + records["retain"])
    hidden = copy.deepcopy(original)
    v = torch.randn(24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():  # everything that the second block gives is moved along one direction
        hidden.transformer.h[1].mlp.c_proj.bias.add_(60 * v / v.norm())
    found = made(hidden, records, original=weights_of(original))
    forget = dict(zip(found.budgets, found.mean().tolist(), strict=True))
    known = float(np.mean([oracle.answer_probability(original, e) for e in causal_lm.encode_records(
        [records["forget"][i] for i in found.rows["forget"]], Bytes(), HOW)]))  # fmt: skip
    assert forget["none"] < 0.2 * known
    assert forget["moved-2"] > 0.7 * known
    assert forget["moved-3"] > 0.7 * known
    assert forget["random"] < 0.5 * known
    # Nothing was hidden in the original: there is nothing to take out, and the zero difference changes nothing.
    same = made(original, records, original=weights_of(original))
    np.testing.assert_allclose(same.values["forget"][1], same.values["forget"][0])


def test_an_adapter_is_held_against_its_base() -> None:
    base = llama()
    model, records = lora(copy.deepcopy(base)), sides(forget=6)
    before = snapshot(model)
    found = made(model, records)
    assert_same(model, before)
    assert found.budgets == ("none", "moved-1", "moved-2", "moved-each", "random")
    again = made(model, records, original=weights_of(base))
    np.testing.assert_allclose(again.values["forget"], found.values["forget"], rtol=1e-6)
    assert set(found.values) == {"forget"}


def test_layers_are_spread_over_the_depth() -> None:
    assert direction._tried(None, 2) == [1, 2]
    assert direction._tried(None, 1) == [1]
    assert direction._tried(None, 8) == list(range(1, 9))
    many = direction._tried(None, 33)
    assert (len(many), many[0], many[-1]) == (8, 1, 33)
    assert direction._tried([3, 1, 3], 4) == [1, 3]


def test_refusals_and_nothing_left_after_an_error() -> None:
    model, records = llama(), sides(forget=4, retain=3)
    for layers in ([0], [3], []):
        with pytest.raises(UsageError, match="blocks from 1 to 2"):
            made(model, records, layers=layers)
    with pytest.raises(NotShown, match="original's weights"):
        made(model, {"forget": rows(4)})
    with pytest.raises(ValueError, match="two rows"):
        made(model, sides(forget=1, retain=3))

    def failing(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        made(model, records, progress=failing)
    assert_same(model, before)
