"""The least change in closed form: against loops and LEACE's own formula, what it does to probes, that it is least."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from excise.erasure import Change, Moments, applied, least_change

D, M = 5, 7


def rows(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(n, width, generator=draw, dtype=torch.float64) @ mix + shift


def by_hand(x: list[float], z: list[float], metric: list[list[float]]) -> list[list[float]]:
    """-x (zᵀ S⁻¹ z)⁻¹ zᵀ S⁻¹ with loops; S⁻¹ z by Gauss and Jordan."""
    n = len(z)
    a = [[*metric[i], z[i]] for i in range(n)]
    for i in range(n):
        lead = max(range(i, n), key=lambda r: abs(a[r][i]))
        a[i], a[lead] = a[lead], a[i]
        a[i] = [v / a[i][i] for v in a[i]]
        for r in range(n):
            if r != i:
                a[r] = [v - a[r][i] * w for v, w in zip(a[r], a[i], strict=True)]
    read = [a[i][n] for i in range(n)]
    scale = sum(read[i] * z[i] for i in range(n))
    return [[-x[d] * read[m] / scale for m in range(n)] for d in range(len(x))]


def leace(states: Tensor, labels: Tensor) -> Tensor:
    """Belrose et al., theorem 4.3, as it is written: r(x) = x - W⁺ P W (x - E x), W the whitening of all rows."""
    centred = states - states.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(states))
    white = vectors @ torch.diag(values**-0.5) @ vectors.T
    white_inverse = vectors @ torch.diag(values**0.5) @ vectors.T
    z = labels.double() - labels.double().mean()
    cross = white @ (centred.T @ z / len(states))[:, None]
    project = cross @ torch.linalg.pinv(cross)
    return states - centred @ (white_inverse @ project @ white).T


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_formula_with_loops(seed: int) -> None:
    kept = Moments.of(rows(40, M, seed))
    x, z = rows(1, D, seed + 1)[0], rows(1, M, seed + 2)[0]
    found = least_change(x, z, kept)
    hand = torch.tensor(by_hand(x.tolist(), z.tolist(), kept.second.tolist()), dtype=torch.float64)
    assert torch.allclose(found.weight, hand, rtol=1e-6, atol=1e-9)
    assert found.bias is None


def test_it_is_leace_where_all_rows_are_kept_and_the_states_are_read_themselves() -> None:
    a, b = rows(30, D, 0), rows(50, D, 0, 2.0)
    states, labels = torch.cat((a, b)), torch.arange(80) < 30
    change = least_change(a.mean(0) - b.mean(0), a.mean(0) - b.mean(0), Moments.of(states), biased=True)
    assert torch.allclose(applied(change, states, states), leace(states, labels), atol=1e-8)
    matrix = torch.eye(D, dtype=torch.float64) + change.weight
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-9), "a projection"


@pytest.mark.parametrize("biased", [False, True])
def test_afterwards_the_means_agree_and_a_probe_is_at_chance(biased: bool) -> None:
    """States that depend on the inputs in a way of their own (a residual stream), 60 + 80 rows."""
    z = torch.cat((rows(60, M, 1, 1.0), rows(80, M, 1, -0.5)))
    x = z[:, :D] ** 2 + z[:, 2:] + rows(140, D, 3)
    labels = np.arange(140) < 60
    change = least_change(
        x[:60].mean(0) - x[60:].mean(0), z[:60].mean(0) - z[60:].mean(0), Moments.of(rows(200, M, 5)), biased=biased
    )
    after = applied(change, x, z)
    assert torch.allclose(after[:60].mean(0), after[60:].mean(0), atol=1e-9)

    def loss(states: Tensor) -> tuple[float, float]:
        probe = LogisticRegression(C=1e6, max_iter=5000, tol=1e-10).fit(states.numpy(), labels)
        p = probe.predict_proba(states.numpy())[:, 1]
        return float(-np.mean(np.log(np.where(labels, p, 1 - p)))), float(np.abs(probe.coef_).max())

    rate = 60 / 140
    constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert loss(x)[0] < constant - 0.02, "before, a probe tells them apart"
    assert loss(after)[0] == pytest.approx(constant, abs=1e-6), "no linear probe does better than a constant"
    assert loss(after)[1] < 1e-3
    assert (change.bias is None) is not biased


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_no_other_change_that_does_it_moves_the_kept_rows_less(biased: bool, k: int) -> None:
    kept_rows = rows(300, M, 8, 0.7)
    kept = Moments.of(kept_rows)
    x, z = rows(k, D, 9), rows(k, M, 10)
    best = least_change(x, z, kept, biased=biased)
    moved = float(best.of(kept_rows).square().sum(1).mean())
    assert best.cost(kept) == pytest.approx(moved, rel=1e-9), "the cost is the mean squared move"
    free = torch.eye(M, dtype=torch.float64) - torch.linalg.pinv(z) @ z  # what leaves the constraint alone
    draw = torch.Generator().manual_seed(11)
    costs = []
    for number in range(200):
        size = 10.0 ** -(number % 4)
        weight = best.weight + size * torch.randn(D, M, generator=draw, dtype=torch.float64) @ free
        bias = None
        if biased:
            bias = best.bias + size * torch.randn(D, generator=draw, dtype=torch.float64)
        other = Change(weight, bias)
        assert torch.allclose(other.weight @ z.T, -x.T, atol=1e-8), "it does the same to the means"
        costs.append(other.cost(kept))
    assert min(costs) > best.cost(kept)
    if biased:
        assert best.cost(kept) < least_change(x, z, kept).cost(kept), "a bias can only help"


def test_several_differences_at_once() -> None:
    x, z = rows(3, D, 20), rows(3, M, 21)
    change = least_change(x, z, Moments.of(rows(50, M, 22)))
    assert torch.allclose(z @ change.weight.T, -x, atol=1e-8)
    assert int(torch.linalg.matrix_rank(change.weight)) == 3
    twice = least_change(torch.cat((x, x[:1])), torch.cat((z, z[:1])), Moments.of(rows(50, M, 22)))
    assert torch.allclose(twice.weight, change.weight, atol=1e-6), "saying it twice changes nothing"


def test_what_cannot_be_done_is_refused() -> None:
    kept = Moments.of(rows(50, M, 1))
    with pytest.raises(ValueError, match="does not differ"):
        least_change(torch.ones(D), torch.zeros(M), kept)
    with pytest.raises(ValueError, match="does not differ"):  # one input cannot undo two differences
        least_change(torch.eye(D)[:2], torch.ones(2, M), kept)
    few = Moments.of(rows(3, M, 1))
    with pytest.raises(ValueError, match="ridge"):
        least_change(torch.ones(D), torch.ones(M), few)
    assert least_change(torch.ones(D), torch.ones(M), few, ridge=1e-3).weight.isfinite().all()


def test_moments_join() -> None:
    one, two = rows(20, M, 1), rows(31, M, 2, 1.0)
    joined, whole = Moments.of(one).joined(Moments.of(two)), Moments.of(torch.cat((one, two)))
    assert torch.allclose(joined.second, whole.second)
    assert torch.allclose(joined.covariance, torch.cov(torch.cat((one, two)).T, correction=0))
    assert joined.count == 51
