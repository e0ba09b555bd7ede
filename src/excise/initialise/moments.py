"""Second moments of what one layer puts out (or reads) on one side, and the contrast of two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.errors import InputRefused, UsageError
from excise.subspace import Directions, low_rank_top, top_directions

#: Width up to which a matrix is formed and decomposed as a whole, where there are enough vectors to fill it.
EXACT_BELOW = 1024


@dataclass(frozen=True)
class Moments:
    """Vectors of one place on one side, summed up; while they are fewer than the width, the vectors themselves.

    Attributes:
        count: Number of vectors, or the sum of their weights.
        total: ``[d]`` fp64 (weighted) sum.
        second: ``[d, d]`` fp64 (weighted) sum of outer products, not centred; None on the Gram side.
        rows: ``[n, d]`` the vectors, in the precision they came in; None once there are as many as the width.
        weights: ``[n]`` fp64 weight of each of ``rows``; None for 1 each.

    Example:
        >>> seen = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> seen.covariance(center=True).tolist(), seen.trace(center=False)
        ([[1.0, 0.0], [0.0, 0.0]], 5.0)
    """

    count: float
    total: Tensor
    second: Tensor | None
    rows: Tensor | None
    weights: Tensor | None = None

    @staticmethod
    def of(vectors: Tensor, weights: Tensor | None = None) -> Moments:
        """Moments of ``[n, d]`` vectors, with optional weights ``[n]``."""
        wide = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
        w = None if weights is None else weights.detach().to(wide.device, torch.float64)
        count = float(len(wide)) if w is None else float(w.sum())
        total = wide.double().sum(0) if w is None else w @ wide.double()
        return _settled(Moments(count, total, None, wide, w))

    @property
    def width(self) -> int:
        """The number of entries of a vector."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """``[d]`` fp64."""
        return self.total / self.count

    def factor(self, center: bool) -> tuple[Tensor, Tensor]:
        """``X [n, d]`` and ``w [n]`` in fp64 with X' diag(w) X = `covariance`; on the Gram side only."""
        if self.rows is None:
            raise ValueError("as many vectors as the width were seen: they are no longer held")
        x = self.rows.double()
        ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
        return (x - self.mean if center else x), (ones if self.weights is None else self.weights) / self.count

    def covariance(self, center: bool = True) -> Tensor:
        """``[d, d]`` fp64 covariance (divided by the count), or the second moment where ``center`` is false."""
        if self.second is None:
            x, w = self.factor(center)
            return (x.T * w) @ x
        cov = self.second / self.count
        return cov.addr_(self.mean, self.mean, alpha=-1) if center else cov

    def trace(self, center: bool = True) -> float:
        """Trace of `covariance`, without forming it."""
        if self.second is None:
            x, w = self.factor(center)
            return float(w @ (x**2).sum(1))
        return float(self.second.trace() / self.count) - (float((self.mean**2).sum()) if center else 0.0)

    def through(self, matrix: Tensor) -> Moments:
        """Moments of ``matrix @ x`` ``[o]`` for every vector x, ``matrix`` being ``[o, d]``; exact, in fp64."""
        w = matrix.to(self.total)
        if self.second is not None:
            return Moments(self.count, w @ self.total, w @ self.second @ w.T, None)
        assert self.rows is not None
        return _settled(Moments(self.count, w @ self.total, None, self.rows.double() @ w.T, self.weights))

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        second, rows, weights = (None if x is None else x.to(device) for x in (self.second, self.rows, self.weights))
        return Moments(self.count, self.total.to(device), second, rows, weights)


def _settled(seen: Moments) -> Moments:
    """Without the vectors once they are as many as the width."""
    if seen.rows is None or len(seen.rows) < seen.width:
        return seen
    return Moments(seen.count, seen.total, seen.covariance(center=False) * seen.count, None)


def merge(*parts: Moments) -> Moments:
    """Moments of all vectors of several parts.

    Example:
        >>> merge(Moments.of(torch.tensor([[1.0]])), Moments.of(torch.tensor([[3.0]]))).mean.tolist()
        [2.0]
    """
    count, total = sum(p.count for p in parts), torch.stack([p.total for p in parts]).sum(0)
    if all(p.rows is not None for p in parts):
        rows = torch.cat([p.rows for p in parts if p.rows is not None])
        weighted = any(p.weights is not None for p in parts)
        weights = torch.cat([_weights(p) for p in parts]) if weighted else None
        return _settled(Moments(count, total, None, rows, weights))
    second = torch.zeros(len(total), len(total), dtype=torch.float64, device=total.device)
    for p in parts:
        second += p.covariance(center=False) * p.count if p.second is None else p.second
    return Moments(count, total, second, None)


def _weights(part: Moments) -> Tensor:
    assert part.rows is not None
    ones = torch.ones(len(part.rows), dtype=torch.float64, device=part.total.device)
    return ones if part.weights is None else part.weights


def contrast(forget: Moments, retain: Moments, beta: float, *, center: bool, trace_normalised: bool = False) -> Tensor:
    """``[d, d]`` fp64: (1 - beta) Cov_F - beta Cov_R.

    Args:
        forget: Moments of the forget side.
        retain: Of the retain side, at the same place.
        beta: From 0 (only forget) to 1 (only retain).
        center: Covariances; second moments where false.
        trace_normalised: Divide each by its trace first, so that ``beta`` weighs shapes and not lengths (ours).

    Source:
        ReGLU, Xiao et al. 2026, arXiv 2604.17396.

    Example:
        >>> a, b = (Moments.of(torch.tensor([[x], [-x]])) for x in (1.0, 2.0))
        >>> contrast(a, b, 0.25, center=True).tolist()
        [[-0.25]]
    """
    first, second = _shares(forget, retain, beta, center, trace_normalised)
    return (first * forget.covariance(center)).add_(retain.covariance(center), alpha=second)


def _shares(forget: Moments, retain: Moments, beta: float, center: bool, normalised: bool) -> tuple[float, float]:
    if not 0 <= beta <= 1:
        raise UsageError(f"beta {beta}: must be from 0 to 1")
    if forget.width != retain.width:
        raise ValueError(f"sides of different width: {forget.width} and {retain.width}")
    if not normalised:
        return 1 - beta, -beta
    traces = forget.trace(center), retain.trace(center)
    if min(traces) <= 0:
        raise InputRefused("all vectors of a side are the same: there is no trace to normalise by")
    return (1 - beta) / traces[0], -beta / traces[1]


def contrast_directions(
    forget: Moments, retain: Moments, beta: float, rank: int, *, center: bool, trace_normalised: bool = False
) -> Directions:
    """The leading directions of `contrast`, by whichever way is cheaper, in fp64.

    Directions that neither side reaches have eigenvalue zero and are arbitrary: they are left out. ``.positive`` says
    how many of the directions carry positive contrast; where ``.supported`` is below ``rank``, the data span no more
    directions than that, and only those are returned.

    Example:
        >>> forget, retain = (Moments.of(torch.tensor([[0.0, 0, 0], x])) for x in ([4.0, 0, 0], [0.0, 4, 0]))
        >>> found = contrast_directions(forget, retain, 0.5, 2, center=True)
        >>> [round(v, 6) for v in found.values.tolist()], found.positive, found.supported
        ([2.0, -2.0], 1, 2)
    """
    return _directions([forget, retain], _shares(forget, retain, beta, center, trace_normalised), rank, center)


def leading_directions(side: Moments, rank: int, *, center: bool) -> Directions:
    """The leading directions of one side's covariance (ROL's basis), by whichever way is cheaper, in fp64.

    Example:
        >>> leading_directions(Moments.of(torch.eye(2) * torch.tensor([1.0, 3.0])), 1, center=False).vectors.tolist()
        [[0.0], [1.0]]
    """
    return _directions([side], [1.0], rank, center)


def _directions(sides: Sequence[Moments], weights: Sequence[float], rank: int, center: bool) -> Directions:
    width = sides[0].width
    held = [side.factor(center) for side in sides if side.second is None]
    if len(held) == len(sides) and sum(len(x) for x, _ in held) < width:
        (x, u), (y, v) = held[0], held[-1]
        y, v = (y, v) if len(held) > 1 else (y[:0], v[:0])
        return low_rank_top(x, y, (weights[0] * u, weights[-1] * v), rank)
    if width <= EXACT_BELOW or not held:
        dense = weights[0] * sides[0].covariance(center)
        for side, weight in zip(sides[1:], weights[1:], strict=True):
            dense.add_(side.covariance(center), alpha=weight)
        return top_directions(dense, width, rank, exact_below=EXACT_BELOW, in_range=True)
    parts = [side.factor(center) if side.second is None else side.covariance(center) for side in sides]

    def apply(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for part, weight in zip(parts, weights, strict=True):
            if isinstance(part, Tensor):
                out += weight * (part @ v)
            else:
                out += weight * (part[0].T @ (part[1][:, None] * (part[0] @ v)))
        return out

    return top_directions(apply, width, rank, exact_below=EXACT_BELOW, in_range=True, like=sides[0].total)
