"""Pure mathematics of hidden states: pooling, cosine, entanglement, kernel and transport distances, projections.

States are ``[n, d]`` with one row per example unless said otherwise. Distances and scores are computed in float64 on
the CPU and return plain floats; ``pool`` and ``cosine`` keep gradients and serve training as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def pool(states: Tensor, attended: Tensor, answer: Tensor | None = None, pooling: str = "attended") -> Tensor:
    """One vector per row, in float32, equal under left and right padding.

    Args:
        states: ``[B, T, D]``.
        attended: ``[B, T]`` true on real tokens (from lengths, never ``ids != pad``: end-of-sequence may be the padding
            token).
        answer: ``[B, T]`` true on answer tokens; for ``pooling="answer"``.
        pooling: "attended" or "answer" for a masked mean, "last" for the last attended token.

    Returns:
        ``[B, D]``; zeros for a row whose mask is empty.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [100.0]]])
        >>> pool(x, torch.tensor([[True, True, False]])).tolist()
        [[2.0]]
    """
    where = attended.bool()
    if pooling == "last":
        places = torch.arange(states.shape[1], device=states.device)
        last = torch.where(where, places, -1).amax(dim=1)
        where = places == last[:, None]
    elif pooling == "answer":
        if answer is None:
            raise ValueError("pooling 'answer' needs the answer mask")
        where = answer.bool()
    elif pooling != "attended":
        raise ValueError(f"unknown pooling {pooling!r}: attended, answer or last")
    # torch.where, not a product: padding may hold NaN or inf, and 0 * inf is NaN.
    kept = torch.where(where[..., None], states.float(), 0.0)
    return kept.sum(dim=1) / where.sum(dim=1, keepdim=True).clamp(min=1)


def cosine(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """``[n, m]`` cosine similarities of the rows of ``a`` ``[n, d]`` and ``b`` ``[m, d]``, in float32 or better.

    Example:
        >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist()
        [[1.0, 0.0]]
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    return (a / a.norm(dim=-1, keepdim=True).clamp(min=eps)) @ (b / b.norm(dim=-1, keepdim=True).clamp(min=eps)).T


def _rows(x: Tensor) -> Tensor:
    x = x.detach().to("cpu", torch.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"expected [n, d] states with at least one row, got {tuple(x.shape)}")
    return x


def entanglement(a: Tensor, b: Tensor, *, center: str = "class_mean", normalize: bool = False) -> float:
    """Spread within two sets against the gap between them: high = mixed, 0 = two points.

    (mean |a - mu_a|^2 + mean |b - mu_b|^2) / (1/2 (|mu_a - mu|^2 + |mu_b - mu|^2)); with the class-mean centre the
    denominator is a quarter of the squared gap. Infinite when the two means coincide.

    Args:
        a: ``[n, d]``.
        b: ``[m, d]``.
        center: mu, "class_mean" (midpoint of the two means, as in RUM's code) or "pooled" (mean of all rows).
        normalize: bring rows to length 1 first.

    Source:
        Zhao et al., 2406.01257, after Goldblum et al., 2002.06753. That CLReg (2601.22028) uses this form is our
        reading.

    Example:
        >>> entanglement(torch.tensor([[0.0], [2.0]]), torch.tensor([[9.0], [11.0]]))
        0.09876543209876543
    """
    a, b = _rows(a), _rows(b)
    if normalize:
        a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (a, b))
    mean_a, mean_b = a.mean(0), b.mean(0)
    if center == "class_mean":
        middle = (mean_a + mean_b) / 2
    elif center == "pooled":
        middle = torch.cat((a, b)).mean(0)
    else:
        raise ValueError(f"unknown center {center!r}: class_mean or pooled")
    within = ((a - mean_a) ** 2).sum(1).mean() + ((b - mean_b) ** 2).sum(1).mean()
    between = (((mean_a - middle) ** 2).sum() + ((mean_b - middle) ** 2).sum()) / 2
    return float(within / between) if between > 0 else float("inf")


def entanglement_shuffled(a: Tensor, b: Tensor, *, repeats: int = 20, seed: int = 0, **options: Any) -> float:
    """Control for `entanglement`: its median when the rows are dealt to two sets of the same sizes at random."""
    both = torch.cat((_rows(a), _rows(b)))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(repeats):
        order = torch.randperm(len(both), generator=generator)
        values.append(entanglement(both[order[: len(a)]], both[order[len(a) :]], **options))
    return float(torch.tensor(values, dtype=torch.float64).median())


def _kernel(both: Tensor) -> Tensor:
    """Mean of five kernels exp(-d^2 / (s 2^k)), k = -2..2, s = mean squared distance over pairs of both sets."""
    # The expanded form of cdist loses the small distances of large states; the subtracting one does not.
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    scale = squared.sum() / max(1, len(both) * (len(both) - 1))
    if scale <= 0:
        return torch.ones_like(squared)
    return torch.stack([torch.exp(-squared / (scale * factor)) for factor in BANDWIDTHS]).mean(0)


def _mmd(kernel: Tensor, first: Tensor, *, biased: bool) -> Tensor:
    """Squared MMD for each column of ``first`` ``[N, R]``: 1 for rows of the first set, 0 for the others."""
    second = 1 - first
    n, m = first.sum(0), second.sum(0)
    inner = kernel @ first
    aa, ab = (first * inner).sum(0), (second * inner).sum(0)
    bb = (second * (kernel @ second)).sum(0)
    if biased:
        return aa / n**2 + bb / m**2 - 2 * ab / (n * m)
    # The kernel of a row with itself is 1: leave these n and m terms out.
    return (aa - n) / (n * (n - 1)) + (bb - m) / (m * (m - 1)) - 2 * ab / (n * m)


def mk_mmd(a: Tensor, b: Tensor, *, biased: bool = False) -> float:
    """Squared maximum mean discrepancy, five bandwidths; 0 = the same distribution (the unbiased form may be below 0).

    Args:
        a: ``[n, d]``, n >= 2 unless biased.
        b: ``[m, d]``.
        biased: V-statistic instead of U-statistic.

    Source:
        Gretton et al., JMLR 2012; bandwidths as in DAN, Long et al., 1502.02791. CLReg's own choice is not known.

    Example:
        >>> mk_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]), biased=True)
        0.0
    """
    a, b = _rows(a), _rows(b)
    if not biased and min(len(a), len(b)) < 2:
        raise ValueError("the unbiased MMD needs two rows on each side")
    first = torch.cat((torch.ones(len(a), 1), torch.zeros(len(b), 1))).double()
    return float(_mmd(_kernel(torch.cat((a, b))), first, biased=biased))


def mk_mmd_p(a: Tensor, b: Tensor, *, resamples: int = 999, seed: int = 0) -> float:
    """Permutation p-value of `mk_mmd`: the kernel is computed once, only the labels move. Rows must be exchangeable."""
    a, b = _rows(a), _rows(b)
    kernel, generator = _kernel(torch.cat((a, b))), torch.Generator().manual_seed(seed)
    observed = torch.cat((torch.ones(len(a)), torch.zeros(len(b)))).double()
    labels = [observed] + [observed[torch.randperm(len(observed), generator=generator)] for _ in range(resamples)]
    values = _mmd(kernel, torch.stack(labels, dim=1), biased=True)
    return float((values >= values[0] - 1e-12).double().mean())


def w2_gaussian(a: Tensor, b: Tensor, *, shrinkage: float = 0.1) -> float:
    """Wasserstein-2 distance of the two Gaussians with the sets' means and shrunk covariances (Bures, Fréchet).

    Covariance: (1 - shrinkage) Sigma + shrinkage tr(Sigma)/d I. Outside the span of the rows both are multiples of the
    identity, so only min(d, n + m) dimensions are decomposed, exactly.

    Source:
        Dowson and Landau, 1982. Whether CLReg uses this, the exact or another form is not known.

    Example:
        >>> round(w2_gaussian(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])), 6)
        3.0
    """
    a, b = _rows(a), _rows(b)
    gap = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    d, (a, b) = a.shape[1], ((x - x.mean(0)) / len(x) ** 0.5 for x in (a, b))
    if d > len(a) + len(b):
        basis = torch.linalg.qr(torch.cat((a, b)).T).Q
        a, b = a @ basis, b @ basis
    spherical = [shrinkage * float((x**2).sum()) / d for x in (a, b)]
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    cov_a, cov_b = ((1 - shrinkage) * x.T @ x + s * eye for x, s in zip((a, b), spherical, strict=True))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    inside = float(cov_a.trace() + cov_b.trace() - 2 * cross)
    outside = (d - a.shape[1]) * (spherical[0] ** 0.5 - spherical[1] ** 0.5) ** 2
    return max(0.0, gap + inside + outside) ** 0.5


def w2_exact(a: Tensor, b: Tensor, *, limit: int = 1000, seed: int = 0) -> float:
    """Wasserstein-2 distance between the rows themselves, by optimal one-to-one matching.

    Sets of different size, or larger than ``limit``, are thinned to the smaller size by a seeded draw without
    replacement. In many dimensions with few rows two samples of one distribution lie far apart too: compare with the
    gold's value.

    Example:
        >>> w2_exact(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]))
        2.0
    """
    from scipy.optimize import linear_sum_assignment

    a, b = _rows(a), _rows(b)
    size = min(len(a), len(b), limit)
    generator = torch.Generator().manual_seed(seed)
    a, b = (x[torch.randperm(len(x), generator=generator)[:size]] if len(x) > size else x for x in (a, b))
    cost = (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2).numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def w2_sliced(a: Tensor, b: Tensor, *, projections: int = 128, seed: int = 0) -> float:
    """Root of the mean squared Wasserstein-2 distance along random directions of length 1 (quantiles matched by rank).

    Source:
        Bonneel et al., 2015. For sets of one size; other sizes are compared at the quantiles of the larger one.

    Example:
        >>> round(w2_sliced(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])), 6)
        2.0
    """
    a, b = _rows(a), _rows(b)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    x, y = ((s @ directions).sort(dim=0).values for s in (a, b))
    if len(x) != len(y):
        middles = (torch.arange(max(len(x), len(y)), dtype=torch.float64) + 0.5) / max(len(x), len(y))
        x, y = (s[(middles * len(s)).long().clamp(max=len(s) - 1)] for s in (x, y))
    return float(((x - y) ** 2).mean() ** 0.5)


@dataclass(frozen=True)
class Projection:
    """Principal axes of one set, to be applied to others: ``mean`` [d], ``axes`` [k, d], ``explained`` [k] shares."""

    mean: Tensor
    axes: Tensor
    explained: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """``[n, k]`` coordinates of ``[n, d]`` states."""
        return (_rows(states) - self.mean) @ self.axes.T


def fit_pca(states: Tensor, k: int = 2) -> Projection:
    """Principal components of ``[n, d]`` states; signs are fixed, so that two runs draw the same map.

    Example:
        >>> fit_pca(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 1)(torch.tensor([[5.0, 7.0]])).tolist()
        [[5.0]]
    """
    states = _rows(states)
    mean = states.mean(0)
    _, values, axes = torch.linalg.svd(states - mean, full_matrices=False)
    axes = axes[:k]
    largest = axes.abs().argmax(dim=1, keepdim=True)
    return Projection(mean, axes * axes.gather(1, largest).sign(), values[:k] ** 2 / (values**2).sum().clamp(min=1e-30))


def relative_drift(now: Tensor, before: Tensor) -> Tensor:
    """``[n]`` distance of each row from where it was, relative to its former length.

    Example:
        >>> relative_drift(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])).tolist()
        [0.5]
    """
    now, before = _rows(now), _rows(before)
    return (now - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)
