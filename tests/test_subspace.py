"""Leading directions are those of the full decomposition, whichever way they are found; angles and energy by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise import subspace
from excise.subspace import captured, low_rank_top, orthonormal, principal_angles, top_directions

torch.set_num_threads(1)


def indefinite(size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> Tensor:
    """A contrast of two noisy sets that share most of what they do: negative eigenvalues are as large as positive."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
    own = orthonormal(torch.randn(size, 12, generator=generator, dtype=torch.float64))
    f, r = (torch.randn(2 * size, size, generator=generator, dtype=torch.float64) * scale * noise for _ in range(2))
    f, r = (
        x + torch.randn(2 * size, 6, generator=generator, dtype=torch.float64) @ q.T
        for x, q in ((f, own[:, :6]), (r, own[:, 6:]))
    )
    return ((f.T @ f - r.T @ r) / (4 * size)).to(dtype)


def top_of_eigh(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_operator", [False, True])
def test_krylov_finds_what_the_full_decomposition_finds(dtype: torch.dtype, as_operator: bool) -> None:
    matrix = indefinite(600, dtype=dtype)
    values, vectors = top_of_eigh(matrix, 8)
    assert float(torch.linalg.eigvalsh(matrix)[0]) < -0.8 * float(values[0])
    given_ = (lambda v: matrix @ v) if as_operator else matrix
    found = top_directions(given_, 600, 8, exact_below=64, like=matrix)
    assert found.vectors.dtype == dtype
    assert 0 < found.residual <= subspace.TOLERANCE
    total = float(torch.trace(found.vectors.double().T @ matrix.double() @ found.vectors.double()))
    assert total == pytest.approx(float(values.sum()), rel=1e-5)
    assert float(principal_angles(found.vectors[:, :6], vectors[:, :6]).min()) > 1 - 1e-5
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(8, dtype=dtype), rtol=0, atol=1e-5)
    assert found.scale == pytest.approx(float(torch.linalg.eigvalsh(matrix).abs().max()), rel=1e-4)


def test_a_residual_that_stays_too_large_asks_the_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = indefinite(400)
    monkeypatch.setattr(subspace, "TOLERANCE", 1e-30)
    for given_ in (matrix, lambda v: matrix @ v):
        found = top_directions(given_, 400, 4, exact_below=64)
        torch.testing.assert_close(found.values, top_of_eigh(matrix, 4)[0])
        assert found.residual == 0


def test_more_blocks_are_added_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eigenvalues of a symmetric matrix of noise lie close together at both ends."""
    matrix = torch.randn(600, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, calls = matrix + matrix.T, []

    def counted(v: Tensor) -> Tensor:
        calls.append(v.shape[1])
        return matrix @ v

    found = top_directions(counted, 600, 8, exact_below=64)
    assert len(calls) > subspace.BLOCKS
    assert max(calls) < 600
    assert 0 < found.residual <= subspace.TOLERANCE
    monkeypatch.setattr(subspace, "MOST_BLOCKS", subspace.BLOCKS)
    calls.clear()
    assert top_directions(counted, 600, 8, exact_below=64).residual == 0
    assert calls[-1] == 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_space_that_is_used_up_is_exact(dtype: torch.dtype) -> None:
    """A matrix of low rank leaves nothing to add after a few blocks."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 500, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1.0] * 5 + [-1.0] * 4, dtype=torch.float64)
    matrix = ((x.T * signs) @ x).to(dtype)
    found = top_directions(matrix, 500, 8, exact_below=64, in_range=True)
    exact = top_directions(matrix, 500, 8, in_range=True)
    assert found.positive == exact.positive == 5
    torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=1e-4)
    # Asked for more than there is: zeros are made up only where they are wanted.
    assert exact.supported == 9
    assert top_directions(matrix, 500, 12, in_range=True).vectors.shape == (500, 9)
    plain = top_directions(matrix, 500, 8)
    assert plain.positive == 5
    assert float(plain.values[5:].abs().max()) < 1e-3 * plain.scale


def test_same_answer_every_time_and_signs_are_fixed() -> None:
    matrix = indefinite(400)
    a, b = (top_directions(matrix, 400, 4, exact_below=64) for _ in range(2))
    assert torch.equal(a.vectors, b.vectors)
    exact = top_directions(matrix, 400, 4)
    torch.testing.assert_close(a.vectors, exact.vectors, rtol=0, atol=1e-3)
    assert bool((exact.vectors.gather(0, exact.vectors.abs().argmax(0, keepdim=True)) > 0).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(1, 20), st.integers(0, 10**6))
def test_the_gram_side_is_the_dense_side(n: int, m: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    f, r = (torch.randn(k, 20, generator=generator, dtype=torch.float64) for k in (n, m))
    own = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    found = low_rank_top(f, r, (own, -0.7), rank)
    values, _ = top_of_eigh((f.T * own) @ f - 0.7 * r.T @ r, 20)
    reached = values[values.abs() > 1e-9]
    assert found.supported == len(reached) == min(20, n + m)
    torch.testing.assert_close(found.values, reached[:rank], rtol=1e-8, atol=1e-9)
    assert found.positive == int((reached[:rank] > 0).sum())
    eye = torch.eye(len(found.values), dtype=torch.float64)
    torch.testing.assert_close(found.vectors.T @ found.vectors, eye, rtol=0, atol=1e-10)
    inside = orthonormal(torch.cat((f, r)).T)
    torch.testing.assert_close(inside @ (inside.T @ found.vectors), found.vectors, rtol=0, atol=1e-9)


def test_many_rows_are_multiplied_rather_than_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, 1201).double() ** -1
    f, r = (torch.randn(300, 1200, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    exact = low_rank_top(f, r, (0.5, -0.5), 6)
    monkeypatch.setattr(subspace, "SPAN_BELOW", 100)
    found = low_rank_top(f, r, (0.5, -0.5), 6)
    assert exact.residual == 0 < found.residual
    assert float(found.values.sum()) == pytest.approx(float(exact.values.sum()), rel=1e-5)


def test_equal_rows_span_one_direction() -> None:
    row = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)).double()
    found = low_rank_top(row.repeat(5, 1), row[:0], (0.2, 0.0), 3)
    assert (found.supported, found.positive, len(found.values)) == (1, 1, 1)


def test_angles_by_hand() -> None:
    at = math.radians(30)
    a = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    b = torch.tensor([[1.0, 0], [0, math.cos(at)], [0, math.sin(at)]])
    torch.testing.assert_close(principal_angles(a, b), torch.tensor([1.0, math.cos(at)]))
    # Any columns that span the same will do, and dependent ones do not count twice.
    mixed = b @ torch.tensor([[2.0, 1.0, 3.0], [0.5, -1.0, -0.5]])
    torch.testing.assert_close(principal_angles(a, mixed), torch.tensor([1.0, math.cos(at)]))
    assert principal_angles(a, torch.tensor([[0.0], [0.0], [2.0]])).tolist() == [0.0]


def test_captured_is_the_sum_of_eigenvalues_over_the_trace() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double()
    cov = x.T @ x
    found = top_directions(cov, 8, 3)
    assert captured(found.vectors, cov) == pytest.approx(float(found.values.sum() / cov.trace()))
    assert captured(torch.eye(8).double(), cov) == pytest.approx(1)
    with pytest.raises(ValueError, match="trace is zero"):
        captured(torch.eye(2), torch.zeros(2, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    small, large = indefinite(20), indefinite(400)
    for matrix in (small, large):
        matrix[3, 4] = matrix[4, 3] = bad
        for in_range in (False, True):
            with pytest.raises(ValueError, match="NaN or inf"):
                top_directions(matrix, len(matrix), 4, exact_below=64, in_range=in_range)
    with pytest.raises(ValueError, match="NaN or inf"):
        low_rank_top(torch.full((1, 4), bad), torch.zeros(1, 4), (1.0, 1.0), 1)


def test_ranks_and_shapes_that_make_no_sense_are_refused() -> None:
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank"):
            top_directions(torch.eye(4), 4, rank)
        with pytest.raises(ValueError, match="rank"):
            low_rank_top(torch.eye(4)[:2], torch.eye(4)[:1], (1.0, 1.0), rank)
    with pytest.raises(ValueError, match=r"expected a \[4, 4\]"):
        top_directions(torch.eye(3), 4, 2)
