"""Starts of an adapter: each against its formula with loops, what they make of the weight, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles_lora
import tiny
from excise.errors import UsageError
from excise.forward import Anatomy, Batch
from excise.initialise import apply, importance
from excise.initialise.moments import Moments
from excise.initialise.starts import (
    EXACT_BELOW,
    STARTS,
    Variances,
    fila,
    pissa,
    plain,
    rila,
    row_weights,
    top_singular,
    vila,
    weighted,
)

OUT, IN, RANK, SCALE = 7, 5, 3, 2.0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = drawn(OUT, IN)


def sides(n: int = 40, m: int = 60) -> dict[str, Tensor]:
    """Outputs of a layer on both sides, with a mean and a direction of their own on each."""
    forget, retain = drawn(n, OUT, seed=1) + 1.0, drawn(m, OUT, seed=2) - 0.5
    forget[:, 0] *= 3
    retain[:, 1] *= 4
    return {"forget": forget, "retain": retain}


def moments(rows: dict[str, Tensor]) -> dict[str, Moments]:
    return {side: Moments.of(x) for side, x in rows.items()}


# --- rila ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("n", [3, 40], ids=["rows kept", "sums"])
def test_rila_projects_on_the_leading_directions(center: bool, normalised: bool, beta: float, n: int) -> None:
    rows = sides(n, n + 2)
    made = rila(beta, normalised, center=center).fn(WEIGHT, 2, SCALE, **moments(rows))
    matrix = torch.tensor(
        oracles_lora.contrast_matrix(
            rows["forget"].tolist(), rows["retain"].tolist(), beta, center=center, normalised=normalised
        ),
        dtype=torch.float64,
    )
    values, vectors = torch.linalg.eigh(matrix)
    spanned = values.abs() > 1e-9 * values.abs().max()  # directions that no row has are arbitrary
    q = vectors[:, spanned][:, -2:]
    assert made.B.dtype == made.A.dtype == torch.float32
    assert torch.allclose(made.B.T @ made.B, torch.eye(2), atol=1e-5)
    assert torch.allclose(SCALE * made.B @ made.A, (q @ q.T).float() @ WEIGHT, atol=1e-4)
    assert made.positive == int((values[spanned][-2:] > 0).sum())


def test_rila_tells_forget_from_retain() -> None:
    made = rila(0.5).fn(WEIGHT, 1, SCALE, **moments(sides()))
    assert abs(float(made.B[0, 0])) > 0.95, "the direction that varies on forget rows alone"
    other = rila(0.5).fn(WEIGHT, 1, SCALE, **moments({"forget": sides()["retain"], "retain": sides()["forget"]}))
    assert abs(float(other.B[1, 0])) > 0.95


def test_rila_is_the_best_of_all_projections() -> None:
    """Ky Fan: no orthonormal Q has a larger trace(Q' Cov_D Q)."""
    rows = sides()
    matrix = torch.tensor(
        oracles_lora.contrast_matrix(
            rows["forget"].tolist(), rows["retain"].tolist(), 0.4, center=True, normalised=False
        )
    )
    made = rila(0.4).fn(WEIGHT, RANK, SCALE, **moments(rows))
    best = float((made.B.T @ matrix @ made.B).trace())
    for seed in range(50):
        q = torch.linalg.qr(drawn(OUT, RANK, seed=seed)).Q
        assert float((q.T @ matrix @ q).trace()) <= best + 1e-5


def test_rila_counts_the_directions_with_positive_contrast() -> None:
    flat = torch.zeros(20, OUT)
    flat[:, 0] = drawn(20, seed=5)  # forget rows differ in one direction alone
    rows = {"forget": flat, "retain": sides()["retain"]}
    assert rila(0.5).fn(WEIGHT, RANK, SCALE, **moments(rows)).positive == 1


def test_rila_refuses_more_directions_than_the_rows_span() -> None:
    rows = {"forget": drawn(2, OUT), "retain": drawn(2, OUT, seed=1)}
    assert rila().fn(WEIGHT, 2, SCALE, **moments(rows)).B.shape == (OUT, 2)  # centred: one direction a side
    with pytest.raises(UsageError, match="rank 3 is above what the rows support: they span 2 directions"):
        rila().fn(WEIGHT, 3, SCALE, **moments(rows))


# --- pissa, fila, vila --------------------------------------------------------------------------------------------


def test_pissa_is_the_best_approximation_of_the_weight() -> None:
    made = pissa().fn(WEIGHT, RANK, SCALE)
    u, s, vh = torch.linalg.svd(WEIGHT)
    assert torch.allclose(SCALE * made.B @ made.A, u[:, :RANK] * s[:RANK] @ vh[:RANK], atol=1e-5)
    assert torch.allclose(made.A.norm(dim=1), made.B.norm(dim=0), atol=1e-5), "both factors carry the root"


def test_fila_weighs_rows_by_the_ratio_of_importance() -> None:
    forget, retain = drawn(OUT, IN, seed=1) ** 2, drawn(OUT, IN, seed=2) ** 2
    rows = torch.tensor(oracles_lora.importance_rows(forget.tolist(), retain.tolist(), 0.1))
    assert torch.allclose(row_weights(forget, retain, 0.1), rows, rtol=1e-5)
    made = fila(epsilon=0.1).fn(WEIGHT, RANK, SCALE, forget=forget, retain=retain)
    u, s, vh = torch.linalg.svd(rows[:, None] * WEIGHT, full_matrices=False)
    best = (u[:, :RANK] * s[:RANK] @ vh[:RANK]) / (rows + 0.1)[:, None]
    assert torch.allclose(SCALE * made.B @ made.A, best, atol=1e-5)


def test_fila_at_full_rank_is_the_weight_itself() -> None:
    made = weighted(WEIGHT, IN, SCALE, torch.rand(OUT) + 1.0, 1e-9)
    assert torch.allclose(SCALE * made.B @ made.A, WEIGHT, atol=1e-5)


def test_rows_without_any_importance_stay_out_of_the_start() -> None:
    forget, retain = torch.ones(OUT, IN), torch.ones(OUT, IN)
    forget[2] = 0.0
    made = fila().fn(WEIGHT, RANK, SCALE, forget=forget, retain=retain)
    assert bool(torch.isfinite(made.B).all())
    assert float((made.B @ made.A)[2].abs().max()) < 1e-6


def test_vila_lifts_the_variances_of_the_factors() -> None:
    own = {s: Variances(drawn(RANK, IN, seed=i) ** 2, drawn(OUT, RANK, seed=9 + i) ** 2) for i, s in enumerate(sides())}
    lifted = {side: v.B @ v.A for side, v in own.items()}
    made, same = vila().fn(WEIGHT, RANK, SCALE, **own), fila().fn(WEIGHT, RANK, SCALE, **lifted)
    assert torch.allclose(made.B @ made.A, same.B @ same.A, atol=1e-5)


def test_large_weights_are_decomposed_nearly_as_well() -> None:
    matrix = drawn(EXACT_BELOW + 40, EXACT_BELOW + 60) / 30 + 3 * drawn(EXACT_BELOW + 40, 4) @ drawn(
        4, EXACT_BELOW + 60
    )
    u, s, _ = top_singular(matrix, 8)
    assert torch.allclose(u.T @ u, torch.eye(8), atol=1e-4)
    exact = torch.linalg.svdvals(matrix)[:8]
    assert torch.allclose(s[:4], exact[:4], rtol=1e-4)
    assert float(s[4:].square().sum()) > 0.9 * float(exact[4:].square().sum()), "the flat rest: energy, not directions"
    assert torch.equal(top_singular(matrix, 8)[0], u), "the same every time"


# --- the table ----------------------------------------------------------------------------------------------------


def test_plain_needs_nothing_and_moves_nothing() -> None:
    assert not plain().moves
    assert not plain().changes_base
    assert not plain().needs


@pytest.mark.parametrize("name", [n for n in STARTS if n != "plain"])
def test_every_start_changes_the_base_unless_it_is_to_be_kept(name: str) -> None:
    assert STARTS[name]().changes_base
    kept = STARTS[name](base="kept")
    assert kept.moves
    assert not kept.changes_base
    with pytest.raises(ValueError, match="base is 'both'"):
        STARTS[name](base="both")


@pytest.mark.parametrize("name", STARTS)
def test_every_start_says_where_it_comes_from(name: str) -> None:
    assert "Source:" in inspect.getdoc(STARTS[name])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rila", {"beta": 1.5}, "beta is 1.5"),
        ("rila", {"beta": float("nan")}, "beta is nan"),
        ("rila", {"trace_normalised": "perhaps"}, "trace_normalised"),
        ("fila", {"epsilon": 0}, "epsilon is 0"),
        ("fila", {"batch_rows": 1.5}, "batch_rows is 1.5"),
        ("vila", {"deviation": -1}, "deviation is -1"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        STARTS[name](**options)


# --- importance ---------------------------------------------------------------------------------------------------

DATA = tiny.Data({"forget": 7})


def batches(size: int = 3) -> Iterator[Batch]:
    for start in range(0, 7, size):
        yield DATA.batch("forget", range(start, min(start + size, 7)))


def batch_gradients(net: Any, parameter: Tensor) -> tuple[list[Any], list[int]]:
    """Gradients of the plain cross-entropy of each batch's labels, by the model's own logits."""
    found, tokens = [], []
    for batch in batches():
        logits = net(batch.input_ids, attention_mask=batch.attention_mask).logits
        rows, places = batch.label_mask.nonzero(as_tuple=True)
        loss = torch.nn.functional.cross_entropy(logits[rows, places - 1], batch.input_ids[rows, places])
        found.append(torch.autograd.grad(loss, parameter)[0].tolist())
        tokens.append(len(rows))
    return found, tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_squared_gradients(kind: str) -> None:
    net = tiny.adapted(tiny.model(kind, depth=1))
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in net.named_parameters()}
    name, layer = list(apply.layers(net).items())[1]
    weight = layer.get_base_layer().weight
    loss = importance.label_loss(net, Anatomy.of(net))
    found = importance.squared_gradients(net, {name: weight}, batches(), loss)
    for n, p in net.named_parameters():
        assert p.requires_grad == before[n][0]
        assert p.grad is None
        assert torch.equal(p, before[n][1])
    weight.requires_grad_(True)
    wanted = torch.tensor(oracles_lora.mean_square(*batch_gradients(net, weight)))
    assert torch.allclose(found[name], wanted, rtol=1e-3, atol=1e-9)
    assert float(wanted.max()) > 1e-6


def test_squared_gradients_by_groups_are_the_same() -> None:
    net = tiny.adapted(tiny.model("llama", depth=1))
    weights = {n: x.get_base_layer().weight for n, x in apply.layers(net).items()}
    loss = importance.label_loss(net, Anatomy.of(net))
    whole = importance.squared_gradients(net, weights, batches(), loss)
    for name in weights:
        own = importance.squared_gradients(net, {name: weights[name]}, batches(), loss)
        assert torch.allclose(own[name], whole[name], rtol=1e-5)


def test_prompt_and_padding_do_not_count() -> None:
    net = tiny.adapted(tiny.model("llama", depth=1))
    weights = {n: x.get_base_layer().weight for n, x in list(apply.layers(net).items())[:1]}
    loss = importance.label_loss(net, Anatomy.of(net))
    plain = importance.squared_gradients(net, weights, [DATA.batch("forget", range(4))], loss)
    padded = importance.squared_gradients(net, weights, [DATA.batch("forget", range(4), extra=5)], loss)
    for name in weights:
        assert torch.allclose(plain[name], padded[name], rtol=1e-3, atol=1e-10)


def test_variances_of_an_adapters_gradients() -> None:
    net = tiny.adapted(tiny.model("llama", depth=1))
    before = tiny.weights(net)
    factors = apply.factors_of(net)
    loss = importance.label_loss(net, Anatomy.of(net))
    found = importance.adapter_variances(net, factors, batches(), loss, deviation=0.05, seed=3)
    assert tiny.apart(before, tiny.weights(net)) == 0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(factors):
            for p in factors[name]:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    name = sorted(factors)[2]
    for which, p in zip(("A", "B"), factors[name], strict=True):
        wanted = torch.tensor(oracles_lora.variance(*batch_gradients(net, p)))
        assert torch.allclose(getattr(found[name], which), wanted, rtol=2e-2, atol=1e-9)
        assert float(wanted.max()) > 1e-9
