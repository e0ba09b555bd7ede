"""Rounding weights: grids against loops, which layers are rounded, adapters, and updates too small to survive."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attacked
import oracles_evidence as oracle
from attacked import HOW, Bytes, assert_same, gpt2, llama, lora, sides, snapshot
from excise.attacks import quantise
from excise.attacks.lending import weights_of
from excise.errors import UsageError
from excise.tasks import causal_lm


def made(model: Any, records: dict | None = None, **options: Any) -> Any:
    return attacked.made(quantise.attack, model, records or sides(forget=4, retain=3), **options)


def probabilities(model: Any, records: list) -> list[float]:
    return [oracle.answer_probability(model, e) for e in causal_lm.encode_records(records, Bytes(), HOW)]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6), st.floats(-1, 1))
def test_every_weight_goes_to_the_nearest_point_of_its_groups_grid(bits, group, width, seed, shift) -> None:
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) + shift
    weight[0] = 0.0
    found = quantise.rounded(weight, bits, group)
    for row, got in zip(weight.double().tolist(), found.double().tolist(), strict=True):
        expected = oracle.rounded_row(row, bits, group)
        # A weight half-way between two points may go either way: what counts is that it is no farther off.
        for w, mine, theirs in zip(row, got, expected, strict=True):
            assert abs(abs(mine - w) - abs(theirs - w)) <= 1e-5 * max(1.0, abs(w))
    assert len({round(v, 5) for v in found[1, :group].tolist()}) <= 2**bits
    torch.testing.assert_close(quantise.rounded(found, bits, group), found, rtol=1e-4, atol=1e-6)  # on the grid already


def test_more_bits_are_nearer_and_eight_are_near() -> None:
    weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    errors = [float((quantise.rounded(weight, bits) - weight).norm() / weight.norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < 0.05 < errors[2] < 0.2  # 8 bits; 4 bits
    assert torch.equal(quantise.rounded(torch.zeros(2, 3), 4), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_linear_layers_of_the_blocks_are_rounded_and_nothing_else(kind: str) -> None:
    model = gpt2() if kind == "gpt2" else lora(llama()) if kind == "lora" else llama().train()
    records = sides(forget=4, retain=3)
    before = snapshot(model)
    found = made(model, records, bits=["8", "3"], group=10)
    assert_same(model, before)
    clone = copy.deepcopy(model).eval()
    clone = clone.merge_and_unload() if kind == "lora" else clone
    assert found.budgets == ("none", "8", "3")
    np.testing.assert_allclose(found.values["forget"][0], probabilities(clone, records["forget"]), rtol=1e-3)
    error = total = 0.0
    with torch.no_grad():
        for name, p in clone.named_parameters():
            if p.ndim == 2 and ("layers." in name or ".h." in name):
                w = p.T if kind == "gpt2" else p
                q = torch.tensor([oracle.rounded_row(row, 3, 10) for row in w.double().tolist()])
                error += float((q - w).square().sum())
                total += float(w.square().sum())
                p.copy_(q.T if kind == "gpt2" else q)
    np.testing.assert_allclose(found.values["forget"][2], probabilities(clone, records["forget"]), rtol=1e-3)
    np.testing.assert_allclose(found.values["retain"][2], probabilities(clone, records["retain"]), rtol=1e-3)
    assert found.extra["weight_error"][1] == pytest.approx((error / total) ** 0.5, rel=1e-3)
    assert found.extra["layers"] == {"llama": 14, "gpt2": 12, "lora": 14}[kind]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT on tied embeddings
def test_an_adapter_beyond_the_blocks_is_put_back_too() -> None:
    model = lora(llama(), targets=["embed_tokens", "up_proj"])
    before = snapshot(model)
    found = made(model)
    assert_same(model, before)
    assert found.extra["layers"] == 14


def test_changes_below_half_a_step_are_rounded_away() -> None:
    original = llama()
    model, changed = copy.deepcopy(original), 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" not in name:
                continue
            q = quantise.rounded(p, 3)
            p.copy_(q)  # on the grid
            dict(original.named_parameters())[name].copy_(q)
            low, high = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
            inner = (q > low) & (q < high)  # bounds stay, so the grid does
            p.add_(0.4 * inner * (high - low) / 7 * torch.where(torch.rand(p.shape, generator=generator) < 0.5, 1, -1))
            changed += int(inner.sum())
    assert changed > 1000
    found, before = made(model, original=weights_of(original)), made(original)
    assert not np.allclose(found.values["forget"][0], before.values["forget"][0], rtol=0.05)  # it was another model
    place = found.budgets.index("3")
    np.testing.assert_allclose(found.values["forget"][place], before.values["forget"][place], rtol=1e-3)
    same = found.extra["same_as_original"]
    assert same[2] > 0.999
    assert same[0] < 0.05  # 8 bits are fine enough to keep it
    assert "same_as_original" not in before.extra


def test_refuses_unknown_forms_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (["9"], ["fp4"], [], ["4", 4]):
        with pytest.raises(UsageError, match="2 to 8, nf4, int8"):
            made(llama(), bits=bits)
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'excise\[bnb\]'"):
        made(llama(), bits=["nf4"])


def test_bitsandbytes_forms() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed: NF4 and INT8 are not tested")
    weight = torch.randn(10, 96, generator=torch.Generator().manual_seed(0))  # no multiple of a block of 64
    expected = torch.tensor(oracle.nf4(weight.flatten().tolist()), dtype=torch.float64).view_as(weight)
    torch.testing.assert_close(quantise._formed(weight, "nf4", 128, False).double(), expected, rtol=1e-3, atol=1e-4)
    scale = weight.abs().amax(1, keepdim=True) / 127
    off = (quantise._formed(weight, "int8", 128, False) - weight).abs()
    assert bool((off <= 0.51 * scale + 2e-3 * weight.abs()).all())  # half a step, and what half precision loses
    model = llama()
    before = snapshot(model)
    found = made(model, bits=["nf4", "int8"])
    assert_same(model, before)
    assert 0.05 < found.extra["weight_error"][0] < 0.15
    assert found.extra["weight_error"][1] < 0.02
