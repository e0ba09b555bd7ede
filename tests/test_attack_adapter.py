"""Removing, scaling and negating what unlearning added, and lending a model: it comes back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import attacked
import oracles_evidence as oracle
from attacked import HOW, Bytes, assert_same, gpt2, llama, lora, sides, snapshot
from excise.attacks import adapter
from excise.attacks.lending import Difference, lent, plain_name, trained_by_an_attacker, weights_of
from excise.errors import InputRefused, NotShown, UsageError
from excise.tasks import causal_lm

ROWS = sides(forget=4, retain=3)


def made(model: Any, **options: Any) -> Any:
    return attacked.made(adapter.attack, model, ROWS, **options)


def probabilities(model: Any, side: str = "forget") -> list[float]:
    return [oracle.answer_probability(model, e) for e in causal_lm.encode_records(ROWS[side], Bytes(), HOW)]


def test_of_an_adapter_the_base_is_what_is_left_without_it() -> None:
    base = llama()
    model = lora(copy.deepcopy(base))
    before = snapshot(model)
    found = made(model)
    assert_same(model, before)
    assert found.budgets == ("1", "0.5", "0", "-1")
    assert found.extra["delivered"] == "adapter"
    named = [(plain_name(n), w) for n, w in model.named_parameters()]
    a = {n.replace(".lora_A.default", ""): w for n, w in named if "lora_A" in n}
    b = {n.replace(".lora_B.default", ""): w for n, w in named if "lora_B" in n}
    for place, scale in enumerate((1, 0.5, 0, -1)):
        clone = copy.deepcopy(base)
        with torch.no_grad():
            for name, p in clone.named_parameters():
                if name in a:
                    p.add_(scale * 2 * b[name] @ a[name])  # alpha / r = 2
        np.testing.assert_allclose(found.values["forget"][place], probabilities(clone), rtol=1e-3)
        np.testing.assert_allclose(found.values["retain"][place], probabilities(clone, "retain"), rtol=1e-3)


def test_what_a_start_took_out_of_the_base_comes_back_too_where_the_original_is_given() -> None:
    original = llama()
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(0.2)
    model = lora(changed)
    before = snapshot(model)
    found = made(model, original=weights_of(original), scales=(0, 1))
    assert_same(model, before)
    np.testing.assert_allclose(found.values["forget"][0], probabilities(original), rtol=1e-4)
    without = made(model, scales=(0, 1))
    np.testing.assert_allclose(without.values["forget"][0], probabilities(changed_of(model)), rtol=1e-4)
    assert not np.allclose(without.values["forget"][0], found.values["forget"][0], rtol=1e-2)
    np.testing.assert_array_equal(without.values["forget"][1], found.values["forget"][1])


def changed_of(model: Any) -> Any:
    """The base below an adapter, on a copy."""
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_whole_model_the_difference_is_scaled(kind: str) -> None:
    original = llama() if kind == "llama" else gpt2()
    model = llama(seed=3) if kind == "llama" else gpt2(seed=3)
    before = snapshot(model)
    found = made(model, original=weights_of(original))
    assert_same(model, before)
    assert found.budgets == ("1", "0.5", "-1")  # 0 is the original: nothing that an attack brings to light
    assert found.extra["delivered"] == "whole model"
    for place, scale in enumerate((1, 0.5, -1)):
        clone = copy.deepcopy(model)
        start = dict(original.named_parameters())
        with torch.no_grad():
            for name, p in clone.named_parameters():
                p.copy_(start[name] + scale * (p - start[name]))
        np.testing.assert_allclose(found.values["forget"][place], probabilities(clone), rtol=1e-3)
    back = made(model, original=weights_of(original), scales=[0])
    np.testing.assert_allclose(back.values["forget"][0], probabilities(original), rtol=1e-5)


def test_the_ends_are_exact_and_equal_weights_are_left_alone() -> None:
    original, model = llama(), llama(seed=2)
    with torch.no_grad():
        model.model.norm.weight.copy_(original.model.norm.weight)
    difference = Difference(model, weights_of(original))
    assert all(p is not model.model.norm.weight for p in difference.changed)
    own = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad(), lent(model, difference.changed) as before:
        difference.at(0, before)
        assert all(torch.equal(p, dict(original.named_parameters())[n]) for n, p in model.named_parameters())
        difference.at(1, before)
        assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())


def test_put_back_after_an_error_too() -> None:
    model = lora(llama())
    chosen = next(p for p in model.parameters() if p.requires_grad)
    chosen.grad = torch.ones_like(chosen)
    before, done = snapshot(model.train()), []

    def failing(step: int, _: int) -> None:
        done.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, progress=failing)
    assert done == [1, 2]
    assert_same(model, before)


def test_who_trains_what() -> None:
    model = llama()
    assert len(trained_by_an_attacker(model)) == len(list(model.parameters()))
    adapted = lora(llama())
    assert all(p.requires_grad for p in trained_by_an_attacker(adapted))
    assert len(trained_by_an_attacker(adapted)) < len(list(adapted.parameters()))
    adapted.requires_grad_(False)
    assert len(trained_by_an_attacker(adapted)) == len(list(adapted.parameters()))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="needs its original"):
        made(llama())
    with pytest.raises(UsageError, match="merge it first"):
        weights_of(lora(llama()))
    weights = weights_of(llama())
    with pytest.raises(InputRefused, match="no weight"):
        made(llama(seed=1), original={k: v for k, v in weights.items() if "norm" in k})
    with pytest.raises(InputRefused, match="another shape"):
        made(llama(seed=1), original={k: v[:3] for k, v in weights.items()})
    for scales in ([], [1, 1.0], [float("nan")]):
        with pytest.raises(UsageError, match="finite numbers"):
            made(lora(llama()), scales=scales)
    with pytest.raises(NotShown, match="forget rows"):
        attacked.made(adapter.attack, lora(llama()), {})
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    with pytest.raises(UsageError, match="cannot be scaled"):
        made(dora)
