"""Which weights Muon takes, what decays, how the rate runs, and that a pair of optimizers resumes as one."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from excise import optimise, recipe
from excise.optimise import Pair, optimizer, rate


def names_of(net: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    known = {id(p): name for name, p in net.named_parameters()}
    return {known[id(p)] for p in parameters}


def parts(made: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """Parameters by the class of the optimizer that moves them."""
    each = made.parts if isinstance(made, Pair) else (made,)
    return {type(part).__name__: [p for g in part.param_groups for p in g["params"]] for part in each}


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_hidden_matrices_and_nothing_else(tied: bool) -> None:
    net = tiny.model(tie_word_embeddings=tied)
    made = parts(optimizer(net, recipe.Optimiser(name="muon")))
    muon, rest = names_of(net, made["Muon"]), names_of(net, made["AdamW"])
    assert muon == {n for n, p in net.named_parameters() if p.ndim == 2 and ".layers." in n}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= rest
    assert ("lm_head.weight" in rest) is not tied
    assert not muon & rest
    assert muon | rest == {n for n, _ in net.named_parameters()}
    assert sum(map(len, made.values())) == len(list(net.parameters())), "a tied matrix is moved once"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_weights_are_left_alone_and_vectors_do_not_decay(name: str) -> None:
    net = tiny.model()
    net.model.layers[0].requires_grad_(False)
    made = optimizer(net, recipe.Optimiser(name=name, weight_decay=0.1, lr=1e-3, adamw_lr=2e-3))  # type: ignore[arg-type]
    held = [p for group in made.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad}
    for group in made.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    if name == "muon":
        assert {group["lr"] for group in made.param_groups} == {1e-3, 2e-3}


def test_weights_of_one_shape_only_are_enough() -> None:
    """An adapter has matrices only; an objective may train vectors only."""
    adapted = tiny.adapted(tiny.model())
    made = parts(optimizer(adapted, recipe.Optimiser(name="muon")))
    assert all("lora_" in name for name in names_of(adapted, made["Muon"]))
    assert set(made) == {"Muon"}
    vectors = tiny.model()
    for parameter in vectors.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    assert set(parts(optimizer(vectors, recipe.Optimiser(name="muon")))) == {"AdamW"}


def move(net: nn.Module, made: Any, steps: int, seed: int) -> None:
    """Steps along made-up gradients, with a rate that falls."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made.step()
        rates.step()


def test_a_pair_moves_weights_as_its_parts_alone() -> None:
    one, other = tiny.model(depth=1), tiny.model(depth=1)
    settings = recipe.Optimiser(name="muon", lr=1e-2, adamw_lr=3e-3, weight_decay=0.1)
    move(one, optimizer(one, settings), 3, seed=1)
    made = optimizer(other, settings)
    assert isinstance(made, Pair)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for parameter in other.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for part, base in zip(made.parts, (1e-2, 3e-3), strict=True):
            for group in part.param_groups:
                group["lr"] = base / (1 + step)
            part.step()
    assert tiny.apart(tiny.weights(one), tiny.weights(other)) == 0
    made.zero_grad()
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state(name: str) -> None:
    settings = recipe.Optimiser(name=name, lr=1e-2)  # type: ignore[arg-type]
    net = tiny.model(depth=1)
    made = optimizer(net, settings)
    move(net, made, 3, seed=1)
    buffer, middle = io.BytesIO(), tiny.weights(net)
    torch.save(made.state_dict(), buffer)
    move(net, made, 2, seed=2)
    again = tiny.model(depth=1, seed=9)
    again.load_state_dict(middle)
    fresh = optimizer(again, settings)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    move(again, fresh, 2, seed=2)
    assert tiny.apart(tiny.weights(net), tiny.weights(again)) == 0
    for group in fresh.param_groups:  # what a schedule sets is what the parts use
        group["lr"] = 0.0
    before = tiny.weights(again)
    for parameter in again.parameters():
        parameter.grad = torch.ones_like(parameter)
    fresh.step()
    assert tiny.apart(before, tiny.weights(again)) == 0


DECAYS = ["linear", "cosine", "constant"]
shapes = st.builds(
    recipe.Optimiser,
    warmup=st.floats(0, 1),
    decay=st.sampled_from(DECAYS),
    floor=st.floats(0, 0.9),
)


@given(st.integers(1, 200), shapes)
def test_the_rate_rises_once_then_never_again(steps: int, settings: recipe.Optimiser) -> None:
    values = [rate(step, steps, settings) for step in range(steps)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    warm = round(settings.warmup * steps)
    assert values[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    rest = values[warm:]
    assert all(a >= b - 1e-12 for a, b in pairwise(rest))
    if rest:
        assert rest[0] == pytest.approx(1)
        assert min(rest) >= settings.floor - 1e-12
    assert values[0] > 0, "the first step must move"


def test_shapes_of_decay_at_half_way() -> None:
    half = {k: rate(50, 100, recipe.build({"optimiser": {"warmup": 0, "decay": k}}).optimiser) for k in DECAYS}
    assert half == pytest.approx({"linear": 0.5, "cosine": 0.5, "constant": 1.0})
    quarter = rate(25, 100, recipe.Optimiser(warmup=0, decay="cosine", floor=0.2))
    assert quarter == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 2**-0.5))
    assert rate(100, 100, recipe.Optimiser(decay="cosine", floor=0.25)) == pytest.approx(0.25)
    assert rate(10**6, 100, recipe.Optimiser(floor=0.25)) == pytest.approx(0.25)
    assert optimise.rate(0, 1, recipe.Optimiser()) == 1.0


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_muon_in_full_precision_is_torchs_but_for_rounding(shape: tuple[int, int]) -> None:
    from excise.optimise import _orthogonal

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = 3.4445, -4.775, 2.0315
    u, s, v = torch.linalg.svd(grad, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):  # the iteration moves singular values alone
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(_orthogonal(grad, (a, b, c), 5, 1e-7), u @ torch.diag(s) @ v)
