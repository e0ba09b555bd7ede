"""Packed rows are read as if they stood alone, and log-probabilities made tile by tile are those of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from excise.forward import Batch, View, head, hidden, pooled, running, token_logp, vocabulary
from excise.forward.packing import ARCHITECTURES, can_pack, pack

VIEW = View("forget", -2, 0.2)
NEEDS = [token_logp("forget"), hidden("forget", 1), hidden("forget", -1), pooled("forget", -1), pooled(VIEW, -1)]


def rows() -> Batch:
    """Two long rows and several short ones: half of the positions would be padding."""
    data = tiny.Data({"forget": 12})
    order = sorted(range(12), key=lambda i: len(data.rows["forget"][i]))
    return data.batch("forget", [*order[:9], *order[-2:]], extra=1)


def products(net: nn.Module, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What is read of a pass, padding set to 0, and the gradients of its sum."""
    made = tiny.step_of(net, ("forget", batch), seed=3).run(NEEDS)
    read = [made[p] * batch.attention_mask[..., None] if p.what == "hidden" else made[p] for p in NEEDS]
    loss = sum(((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in read), torch.zeros(()))
    return [v.detach() for v in read], tiny.gradients(net, loss)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, way) for kind in sorted(ARCHITECTURES) for way in ("sdpa", "eager") if (kind, way) != ("gemma2", "sdpa")],
)
def test_packed_rows_are_read_as_if_they_stood_alone(
    kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch = tiny.model(kind, attn_implementation=attention), rows()
    assert can_pack(net.config)
    packing = pack(batch.attention_mask, width=tiny.WIDTH)
    assert packing is not None
    assert packing.position_ids.numel() < 0.9 * batch.attention_mask.numel()
    got, got_gradients = products(net, batch)
    monkeypatch.setattr(running, "can_pack", lambda _: False)
    want, want_gradients = products(net, batch)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)
    scale = max(float(g.abs().max()) for g in want_gradients.values())
    assert tiny.apart(got_gradients, want_gradients) < 1e-5 * scale


def test_what_was_not_compared_is_not_packed() -> None:
    class Config:
        model_type, _attn_implementation = "mamba", "sdpa"

    assert not can_pack(Config())
    assert not can_pack(None)
    Config.model_type, Config._attn_implementation = "llama", "flash_attention_2"
    assert not can_pack(Config())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(8, 4096))
def test_every_position_has_a_place_of_its_own(lengths: list[int], width: int) -> None:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packing = pack(mask, width=width)
    if packing is None:
        return
    places = packing.index[packing.attended].tolist()
    assert len(set(places)) == len(places) == sum(lengths)
    assert packing.position_ids.numel() <= 0.9 * mask.numel()
    steps = torch.arange(mask.shape[1]).expand_as(mask)
    assert torch.equal(packing.back(packing.position_ids)[packing.attended], steps[packing.attended])
    assert torch.equal(packing.back(packing.lay(steps))[packing.attended], steps[packing.attended])


def whole(states: Tensor, matrix: Tensor, names: Tensor) -> Tensor:
    """Log-probabilities from whole logits, row by row: of what is named, and of all others together."""
    made = []
    for h, own in zip(states, names, strict=True):
        logp = (matrix @ h).log_softmax(0)
        others = [i for i in range(len(matrix)) if i not in own.tolist()]
        made.append(torch.cat([logp[own], logp[others].logsumexp(0)[None]]))
    return torch.stack(made)


NAMES = {
    "one": [[0], [63], [64], [199], [130]],
    "some": [[0, 199, 63], [64, 63, 65], [127, 128, 129], [199, 1, 0], [130, 30, 90]],
    "all of a tile": [[*range(64), i] for i in (64, 199, 100, 128, 150)],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("keep", [0, 300, 10**6])  # no tile is kept, some are, all are
def test_tiles_change_neither_values_nor_gradients(
    names: list[list[int]], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "TILE_ELEMENTS", 1)  # tiles of 64 columns
    monkeypatch.setattr(vocabulary, "KEEP_ELEMENTS", keep)
    torch.manual_seed(0)
    weights = torch.randn(5, len(names[0]) + 1)
    made: list[Any] = []
    for way in (vocabulary.named_logp, whole):
        torch.manual_seed(1)
        states, matrix = torch.randn(5, 8) * 3, torch.randn(200, 8) * 3
        states.requires_grad_(), matrix.requires_grad_()
        logp = way(states, matrix, torch.tensor(names))
        (logp * weights).sum().backward()
        made.append((logp.detach(), states.grad, matrix.grad))
    for mine, other in zip(*made, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


def test_a_label_is_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TILE_ELEMENTS", 1)
    torch.manual_seed(0)
    states, matrix, targets = torch.randn(5, 8), torch.randn(200, 8), torch.tensor([0, 63, 64, 199, 130])
    want = whole(states, matrix, targets[:, None])[:, 0]
    torch.testing.assert_close(vocabulary.label_logp(states, matrix, targets), want)


@pytest.mark.parametrize("named", [3, 200], ids=["some", "every class"])
def test_a_head_that_is_no_matrix_says_the_same_in_chunks(named: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 400)  # two labels at a time
    torch.manual_seed(0)
    states, matrix = torch.randn(5, 8) * 3, torch.randn(200, 8)
    names = torch.stack([torch.randperm(200)[:named] for _ in range(5)])
    weights, made = torch.randn(5, named + (named < 200)), []
    for way in (None, matrix, whole):  # a head in chunks, tiles of its matrix, and whole logits
        own = states.clone().requires_grad_()
        if way is whole:
            logp = whole(own, matrix, names)[:, : weights.shape[1]]
        else:
            logp = head.named_logp_of(head.Logits(own, lambda h: h @ matrix.T, 200, way), names)
        (logp * weights).sum().backward()
        made.append((logp.detach(), own.grad))
    for mine in made[:2]:
        for got, want in zip(mine, made[2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_tiles_of_huge_logits_stay_finite_and_frozen_heads_get_no_gradient() -> None:
    states = torch.full((1, 1), 1e4, requires_grad=True)
    matrix = torch.tensor([[1.0], [-1.0], [1.0]])
    logp = vocabulary.label_logp(states, matrix, torch.tensor([2]))
    assert logp.tolist() == pytest.approx([-0.6931], abs=1e-4)
    logp.sum().backward()
    assert states.grad is not None
    assert matrix.grad is None


def test_tiles_keep_the_precision_of_the_run() -> None:
    torch.manual_seed(0)
    layer, states, targets = nn.Linear(16, 300, bias=False), torch.randn(40, 16), torch.arange(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = vocabulary.label_logp(states, layer.weight, targets)
        want = -nn.functional.cross_entropy(layer(states).float(), targets, reduction="none")
    torch.testing.assert_close(logp, want)
    gradients = [torch.autograd.grad(v.sum(), layer.weight)[0] for v in (logp, want)]
    assert all(g.dtype == torch.float32 for g in gradients)
    assert float((gradients[0] - gradients[1]).abs().max()) < 0.02 * float(gradients[1].abs().max())
