"""Pure mathematics of subspaces: leading directions of symmetric matrices, principal angles, captured energy.

Matrices are ``[d, d]`` symmetric and possibly indefinite; bases are ``[d, r]`` with orthonormal columns. The work is
done in the precision of what is given (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

#: Blocks of a Krylov space before its residual is checked for the first time (then after every second one), and the
#: number that is not passed: the exact decomposition is asked instead.
BLOCKS, MOST_BLOCKS = 8, 24
#: Columns of a block beyond the rank.
OVERSAMPLING = 4
#: Largest ||C v - lambda v|| of a direction, relative to the largest |lambda|, that is taken as found. The error of an
#: eigenvalue is of the order of its square.
TOLERANCE = 1e-3
#: Rows up to which their span is decomposed as a whole; above, multiplying by them is cheaper.
SPAN_BELOW = 1024


@dataclass(frozen=True)
class Directions:
    """Leading eigenvectors, by algebraically decreasing eigenvalue.

    Attributes:
        values: ``[r]``, descending; some may be negative.
        vectors: ``[d, r]`` orthonormal; the largest entry of each column is positive.
        residual: Largest ||C v - lambda v|| relative to ``scale``; 0 where the decomposition was exact.
        scale: Largest magnitude of an eigenvalue of the whole matrix.
        supported: Directions that the matrix reaches at all (its rank); from a Krylov space, at least so many.

    Example:
        >>> found = top_directions(torch.diag(torch.tensor([1.0, -5.0, 2.0])), 3, 2)
        >>> found.values.tolist(), found.positive, found.scale, found.supported
        ([2.0, 1.0], 2, 5.0, 3)
    """

    values: Tensor
    vectors: Tensor
    residual: float
    scale: float
    supported: int

    @property
    def positive(self) -> int:
        """How many of the directions have a positive eigenvalue, rounding aside."""
        return int((self.values > _zero(self.values.dtype, len(self.vectors)) * self.scale).sum())


def top_directions(
    matrix: Tensor | Operator,
    size: int,
    rank: int,
    *,
    exact_below: int = 1024,
    seed: int = 0,
    in_range: bool = False,
    like: Tensor | None = None,
) -> Directions:
    """The ``rank`` algebraically largest eigenvalues of a symmetric matrix and their vectors.

    Up to ``exact_below`` by a full decomposition, above by a block Krylov space (blocks of ``rank + 4``, each made
    orthogonal to all before it) whose residual is checked: more blocks where it is too large, and the full
    decomposition where that does not help.

    Args:
        matrix: ``[d, d]`` symmetric, or a function from ``[d, m]`` to ``[d, m]`` that multiplies by it.
        size: d.
        rank: r, at most d.
        exact_below: Largest size that is decomposed as a whole at once.
        seed: Of the first block.
        in_range: Leave out the null space, whose directions are arbitrary: after the positive eigenvalues come the
            negative ones. Fewer than ``rank`` directions are returned where the matrix has no more.
        like: Precision and device for an operator (default float64 on the CPU).

    Raises:
        ValueError: Not ``[d, d]``, not finite, or ``rank`` outside 1 to d.

    Source:
        Block Krylov with Rayleigh-Ritz: Musco and Musco 2015, arXiv 1504.05477; it needs no shift for an indefinite
        matrix. Numbers of blocks: ours, by trial.

    Example:
        >>> top_directions(lambda v: torch.tensor([[3.0], [1.0]]).double() * v, 2, 1).vectors.abs().tolist()
        [[1.0], [0.0]]
    """
    if not 1 <= rank <= size:
        raise ValueError(f"rank {rank}: must be from 1 to the width {size}")
    if isinstance(matrix, Tensor):
        if matrix.shape != (size, size):
            raise ValueError(f"expected a [{size}, {size}] matrix, got {tuple(matrix.shape)}")
        like, dense = matrix, matrix
        apply: Operator = lambda v: dense @ v  # noqa: E731 - one line says it best
    else:
        apply, like = matrix, torch.empty(0, dtype=torch.float64) if like is None else like
    if size > exact_below and 2 * BLOCKS * (rank + OVERSAMPLING) < size:
        found = _krylov(apply, size, rank, seed, in_range, like)
        if found is not None:
            return found
    whole = matrix if isinstance(matrix, Tensor) else apply(torch.eye(size, dtype=like.dtype, device=like.device))
    return _exact(whole, rank, in_range)


def _zero(dtype: torch.dtype, size: int) -> float:
    """Magnitude, relative to the largest eigenvalue, below which an eigenvalue is rounding."""
    return 4 * torch.finfo(dtype).eps * size**0.5


def _signed(vectors: Tensor) -> Tensor:
    """The same directions with the largest entry of each positive, so that two ways give one answer."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return vectors * sign.to(vectors.dtype)


def _finite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("NaN or inf: there are no directions")


def _exact(matrix: Tensor, rank: int, in_range: bool) -> Directions:
    _finite(matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    chosen, scale, supported = _choice(values, len(matrix), rank, in_range)
    return Directions(values[chosen], _signed(vectors[:, chosen]), 0.0, scale, supported)


def _choice(values: Tensor, size: int, rank: int, in_range: bool) -> tuple[Tensor, float, int]:
    """Of ascending eigenvalues: which to take, the largest magnitude, and how many are not zero."""
    scale = float(values.abs().max()) if len(values) else 0.0
    reached = values.abs() > _zero(values.dtype, size) * scale
    order = torch.arange(len(values) - 1, -1, -1, device=values.device)
    return (order[reached.flip(0)] if in_range else order)[:rank], scale, int(reached.sum())


def _krylov(apply: Operator, size: int, rank: int, seed: int, in_range: bool, like: Tensor) -> Directions | None:
    """Rayleigh-Ritz in a growing block Krylov space; None where the residual stays too large."""
    width = rank + OVERSAMPLING
    block = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
    block = apply(block) if in_range else block
    _finite(block)
    room = min(MOST_BLOCKS * width, size)
    basis, images = block.new_empty(2, size, room)  # filled from the left
    used, scale = 0, float(block.norm(dim=0).max())
    for number in range(1, MOST_BLOCKS + 1):
        block = _new_part(block, basis[:, :used], scale)
        if block.shape[1]:
            image = apply(block)
            _finite(image)  # NaN or inf anywhere reaches a product, which is smaller than the matrix
            norm = float(image.norm(dim=0).max())
            scale = norm if number == 1 else max(scale, norm)
            start, used = used, used + block.shape[1]
            basis[:, start:used], images[:, start:used] = block, image
        exhausted = not block.shape[1] or used + width > room
        if exhausted or (number >= BLOCKS and number % 2 == 0):
            found = _ritz(basis[:, :used], images[:, :used], rank, in_range)
            if found.residual <= TOLERANCE:
                return found
            if exhausted:
                return None
        block = image
    return None


def _new_part(block: Tensor, basis: Tensor, scale: float) -> Tensor:
    """Orthonormal columns for what ``block`` adds to ``basis``; none where it adds nothing but rounding."""
    block = block - basis @ (basis.T @ block)
    q, r = torch.linalg.qr(block)
    u, s, _ = torch.linalg.svd(r)
    new = q @ u[:, s > _zero(block.dtype, len(block)) * scale]
    if basis.shape[1] and new.shape[1]:
        # Once more: what remains of a small difference is not orthogonal yet. It is nearly so, and Cholesky suffices.
        new = new - basis @ (basis.T @ new)
        new = torch.linalg.solve_triangular(torch.linalg.cholesky(new.T @ new), new.T, upper=False).T
    return new


def _ritz(basis: Tensor, images: Tensor, rank: int, in_range: bool) -> Directions:
    small = basis.T @ images
    values, inner = torch.linalg.eigh((small + small.T) / 2)
    chosen, scale, supported = _choice(values, len(basis), rank, in_range)
    values, inner = values[chosen], inner[:, chosen]
    vectors = basis @ inner
    worst = (images @ inner - vectors * values).norm(dim=0)
    residual = float(worst.max()) / scale if len(values) and scale > 0 else 0.0
    return Directions(values, _signed(vectors), residual, scale, supported)


def low_rank_top(
    rows_f: Tensor, rows_r: Tensor, weights: tuple[float | Tensor, float | Tensor], rank: int, *, seed: int = 0
) -> Directions:
    """`top_directions` of w_f F'F + w_r R'R without forming it, exact in the span of the rows.

    Directions outside the span have eigenvalue zero and are arbitrary: they are left out, so that after the positive
    eigenvalues come the negative ones, and fewer than ``rank`` directions are returned where the rows span no more.

    Args:
        rows_f: ``[n, d]``.
        rows_r: ``[m, d]``; may be empty.
        weights: Signed weight of each side, a number or one for each row.
        rank: r, at most d.
        seed: Of the first Krylov block, where there are so many rows that a decomposition would be slower.

    Source:
        ours: with [F; R]' = QT, the matrix is Q (T S T') Q' for the diagonal S of weights.

    Example:
        >>> found = low_rank_top(torch.tensor([[3.0, 0, 0]]), torch.tensor([[0, 2.0, 0]]), (1.0, -1.0), 2)
        >>> found.values.tolist(), found.positive, found.supported
        ([9.0, -4.0], 1, 2)
    """
    rows = torch.cat((rows_f, rows_r))
    _finite(rows)
    sides = ((rows_f, weights[0]), (rows_r, weights[1]))
    signed = torch.cat([torch.as_tensor(w, dtype=x.dtype, device=x.device).expand(len(x)) for x, w in sides])

    def apply(v: Tensor) -> Tensor:
        return rows.T @ (signed[:, None] * (rows @ v))

    if len(rows) > SPAN_BELOW:
        return top_directions(apply, rows.shape[1], rank, seed=seed, in_range=True, like=rows)
    if not 1 <= rank <= rows.shape[1]:
        raise ValueError(f"rank {rank}: must be from 1 to the width {rows.shape[1]}")
    basis, inner = torch.linalg.qr(rows.T)
    found = _exact((inner * signed) @ inner.T, min(rank, inner.shape[0]), in_range=True)
    return Directions(found.values, _signed(basis @ found.vectors), 0.0, found.scale, found.supported)


def orthonormal(columns: Tensor) -> Tensor:
    """``[d, k]`` orthonormal basis of the span of ``[d, m]`` columns; k < m where they depend on each other."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > _zero(s.dtype, max(columns.shape)) * s.max()] if s.numel() else u


def principal_angles(q1: Tensor, q2: Tensor) -> Tensor:
    """Cosines of the principal angles between two subspaces, descending: 1 = shared direction, 0 = orthogonal.

    Args:
        q1: ``[d, r]`` columns that span the first; they need not be orthonormal.
        q2: ``[d, k]``.

    Returns:
        ``[min(r, k)]`` of the dimensions that are spanned.

    Source:
        Björck and Golub, 1973.

    Example:
        >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).tolist()
        [1.0, 0.0]
    """
    wide = torch.promote_types(q1.dtype, q2.dtype)
    return torch.linalg.svdvals(orthonormal(q1.to(wide)).T @ orthonormal(q2.to(wide))).clamp(0, 1)


def captured(q: Tensor, cov: Tensor) -> float:
    """Share of the trace of ``cov`` ``[d, d]`` that lies in the span of orthonormal ``q`` ``[d, r]``: tr(Q'CQ) / tr(C).

    Example:
        >>> captured(torch.eye(2)[:, :1], torch.diag(torch.tensor([3.0, 1.0])))
        0.75
    """
    total = float(cov.trace())
    if total == 0:
        raise ValueError("the trace is zero: there is nothing to share")
    return float((q * (cov.to(q) @ q)).sum()) / total
