"""Moments of vectors: sums against loops, the Gram side against the dense one, merging, contrast, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles_lora as oracles
from excise.errors import InputRefused, UsageError
from excise.initialise import Accumulator, Moments, contrast, contrast_directions, leading_directions, merge, moments
from excise.subspace import principal_angles

torch.set_num_threads(1)
WIDTH = 6


def vectors(count: int, width: int = WIDTH, *, seed: int = 0, shift: float = 2.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def streamed(x: Tensor, sizes: Sequence[int], weights: Tensor | None = None) -> Moments:
    """Moments of vectors that come in updates of some sizes."""
    stream, start = Accumulator(x.shape[1]), 0
    for size in [*sizes, len(x) - sum(sizes)]:
        stop = start + size
        stream.update(x[start:stop], None if weights is None else weights[start:stop])
        start = stop
    return stream.finish()


def overlap(a: Tensor, b: Tensor) -> float:
    return float(principal_angles(a, b).min())


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [4, 40])  # held as they are, and summed up
def test_streamed_moments_are_those_of_loops(count: int, weighted: bool, center: bool) -> None:
    x = vectors(count)
    weights = torch.linspace(0.0, 2.0, count, dtype=torch.float64) if weighted else None
    seen = streamed(x, [1, 0, 2], weights)
    assert (seen.rows is not None) == (count < WIDTH)
    assert (seen.second is None) == (count < WIDTH)
    want = torch.tensor(
        oracles.covariance(x.double().tolist(), center, None if weights is None else weights.tolist()),
        dtype=torch.float64,
    )
    got = seen.covariance(center=center)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert seen.trace(center=center) == pytest.approx(float(want.trace()), rel=1e-6)
    assert seen.count == pytest.approx(count if weights is None else float(weights.sum()))
    whole = Moments.of(x, weights)
    torch.testing.assert_close(whole.covariance(center=center), want, rtol=1e-9, atol=1e-9)


def test_a_common_mean_costs_no_digits() -> None:
    """Massive activations: a mean a thousand times the spread, in products of fp32."""
    x = vectors(400, shift=0.0) + 1000
    want = torch.tensor(oracles.covariance(x.double().tolist(), True), dtype=torch.float64)
    got = streamed(x, [100, 100, 100]).covariance(center=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_products_stay_fp32_under_autocast() -> None:
    x = vectors(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = streamed(x, [20])
    torch.testing.assert_close(inside.covariance(), streamed(x, [20]).covariance(), rtol=0, atol=0)


def test_half_precision_is_widened_first() -> None:
    x = vectors(50).bfloat16()
    want = Moments.of(x.double()).covariance()
    torch.testing.assert_close(streamed(x, [20]).covariance(), want, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_merged_parts_are_the_whole(sizes: list[int], weighted: bool, center: bool) -> None:
    x = vectors(sum(sizes))
    weights = torch.linspace(0.5, 2.0, len(x)).double() if weighted else None
    parts = zip(x.split(sizes), [None] * len(sizes) if weights is None else weights.split(sizes), strict=True)
    both = merge(*(Moments.of(part, w) for part, w in parts))
    whole = Moments.of(x, weights)
    assert (both.rows is None) == (whole.rows is None)
    assert both.count == pytest.approx(whole.count)
    torch.testing.assert_close(both.mean, whole.mean)
    torch.testing.assert_close(both.covariance(center), whole.covariance(center), rtol=1e-9, atol=1e-9)


def test_weights_and_none_are_merged_as_ones() -> None:
    x = vectors(4)
    both = merge(Moments.of(x[:2]), Moments.of(x[2:], torch.tensor([2.0, 0.5])))
    want = Moments.of(x, torch.tensor([1.0, 1.0, 2.0, 0.5]))
    torch.testing.assert_close(both.covariance(), want.covariance())


@pytest.mark.parametrize("count", [4, 40])
def test_moments_through_a_matrix_are_those_of_the_images(count: int) -> None:
    x, matrix = vectors(count), vectors(9, seed=5)
    for rows in (matrix, matrix[:3]):  # to more entries and to fewer
        got, want = Moments.of(x).through(rows), Moments.of(x.double() @ rows.double().T)
        torch.testing.assert_close(got.mean, want.mean)
        torch.testing.assert_close(got.covariance(), want.covariance())
        assert got.count == count


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("n", "m"), [(3, 2), (3, 40), (40, 3), (40, 50)])
def test_contrast_and_its_directions(
    n: int, m: int, center: bool, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors(n), vectors(m, seed=1, shift=1.0)
    options = {"center": center, "trace_normalised": normalised}
    forget, retain = Moments.of(x), Moments.of(y)
    loops = (oracles.covariance(v.double().tolist(), center) for v in (x, y))
    want = torch.tensor(oracles.contrast(*loops, 0.3, normalised), dtype=torch.float64)
    torch.testing.assert_close(contrast(forget, retain, 0.3, **options), want, rtol=1e-6, atol=1e-7)
    values = torch.linalg.eigvalsh(want).flip(0)
    reached = values[values.abs() > 1e-6]
    for exact_below in (1024, 2):  # formed as a whole, and where one side is held: multiplied by
        monkeypatch.setattr(moments, "EXACT_BELOW", exact_below)
        found = contrast_directions(forget, retain, 0.3, 3, **options)
        torch.testing.assert_close(found.values, reached[:3], rtol=1e-6, atol=1e-7)
        assert found.positive == int((reached[:3] > 0).sum())
        assert found.supported == len(reached)
        projected = found.vectors.T @ want @ found.vectors
        torch.testing.assert_close(projected, torch.diag(reached[:3]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_the_gram_side_and_the_dense_side_find_one_subspace(center: bool) -> None:
    x, y = vectors(20, 100), vectors(30, 100, seed=1)
    sparse = [Moments.of(v) for v in (x, y)]
    dense = [Moments(s.count, s.total, s.covariance(center=False) * s.count, None) for s in sparse]
    a, b = (contrast_directions(*sides, 0.5, 8, center=center) for sides in (sparse, dense))
    torch.testing.assert_close(a.values, b.values)
    torch.testing.assert_close(a.vectors, b.vectors, rtol=0, atol=1e-8)
    assert a.supported == b.supported == (48 if center else 50)
    one, other = (leading_directions(sides[1], 8, center=center) for sides in (sparse, dense))
    torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=1e-8)


def test_a_wide_layer_with_few_directions_of_its_own() -> None:
    """Krylov and full decomposition agree where the outputs fill a small part of the width only."""
    generator = torch.Generator().manual_seed(0)
    wider = torch.randn(1100, 40, generator=generator, dtype=torch.float64)
    f, r = (torch.randn(2000, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    f[:, :3] *= 3
    forget, retain = (Moments.of(x @ wider.T) for x in (f, r * 1.5))
    assert forget.rows is None
    found = contrast_directions(forget, retain, 0.5, 8, center=True)
    assert found.positive == 3
    assert found.supported == 40
    matrix = contrast(forget, retain, 0.5, center=True)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    assert overlap(found.vectors[:, :3], vectors[:, -3:]) > 1 - 1e-9
    # The rest lies where the data are: directions outside would be arbitrary.
    inside = torch.linalg.qr(wider).Q
    assert overlap(inside, found.vectors) > 1 - 1e-9


def test_too_few_vectors_are_said_to_support_fewer_directions() -> None:
    forget, retain = Moments.of(vectors(2)), Moments.of(vectors(2, seed=1))
    found = contrast_directions(forget, retain, 0.5, 4, center=True)
    assert (found.supported, found.positive, found.vectors.shape) == (2, 1, (WIDTH, 2))


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float, count: int) -> None:
    x = vectors(count)
    x[1, 2] = bad
    with pytest.raises(InputRefused, match="NaN or inf"):
        streamed(x, [2])
    with pytest.raises(InputRefused, match="NaN or inf"):
        streamed(torch.cat((vectors(40), x)), [40])


def test_refusals() -> None:
    with pytest.raises(InputRefused, match="no position"):
        Accumulator(3).finish()
    one, other = Moments.of(vectors(3)), Moments.of(vectors(3, seed=1))
    with pytest.raises(UsageError, match="beta"):
        contrast(one, other, 1.5, center=True)
    with pytest.raises(ValueError, match="different width"):
        contrast_directions(one, Moments.of(vectors(3, 4)), 0.5, 1, center=True)
    still = Moments.of(torch.ones(3, WIDTH))
    with pytest.raises(InputRefused, match="trace"):
        contrast_directions(one, still, 0.5, 1, center=True, trace_normalised=True)
    with pytest.raises(ValueError, match="no longer held"):
        Moments.of(vectors(40)).factor(center=True)
