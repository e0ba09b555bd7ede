"""Where an adapter starts: pure functions from a layer's weight and the statistics they name to the factors A and B.

A start is a function plus, as data, what feeds it, as a term of the objective is. All weights are ``[out, in]``, the
adapter's update is s B A with s = alpha / r, and every start but ``plain`` has s B A other than zero: the base weight
is changed by as much, or a second, frozen adapter takes it off again, so that the model's function stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.initialise.moments import Moments, contrast_directions

Base = Literal["changed", "kept"]
Kind = Literal["output_moments", "input_moments", "squared_gradient", "adapter_gradient_variance"]

#: Smaller side of a matrix up to which its singular vectors are computed exactly.
EXACT_BELOW = 1024


@dataclass(frozen=True)
class Statistic:
    """What a start reads of one side: its kind, the side, and the settings that it is taken with."""

    kind: Kind
    side: str
    options: tuple[tuple[str, Any], ...] = ()


class Factors(NamedTuple):
    """``A [r, in]`` and ``B [out, r]``, fp32; ``positive``: directions with positive contrast, where defined."""

    A: Tensor
    B: Tensor
    positive: int | None = None


class Variances(NamedTuple):
    """Variances of the gradients of an adapter's factors: ``A [r, in]`` and ``B [out, r]``."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Start:
    """A start: ``fn(weight, rank, scale, **statistics) -> Factors``.

    Attributes:
        name: As recipes call it.
        fn: Pure function; None where PEFT's own initialisation stays (B = 0).
        needs: Parameter of ``fn`` -> the statistic that feeds it.
        base: Whether the base weight is changed, or kept (a frozen second adapter takes the start off again).
        options: Settings, for the record of a run.
    """

    name: str
    fn: Callable[..., Factors] | None
    needs: Mapping[str, Statistic] = field(default_factory=dict)
    base: Base = "changed"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether s B A is other than zero at the start."""
        return self.fn is not None

    @property
    def changes_base(self) -> bool:
        """Whether base weights are changed."""
        return self.moves and self.base == "changed"


def plain() -> Start:
    """PEFT's own: A random, B zero. Nothing is changed and no statistic is taken.

    Source: Hu et al. 2022, arXiv 2106.09685.

    Example:
        >>> plain().moves
        False
    """
    return Start("plain", None)


def pissa(base: Base = "changed") -> Start:
    """The layer's own leading singular directions: s B A is the best rank-r approximation of the weight.

    Args:
        base: ``changed`` or ``kept``.

    Source: PiSSA, Meng et al. 2024, arXiv 2404.02948.

    Example:
        >>> made = pissa().fn(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1, 2.0)
        >>> (2.0 * made.B @ made.A).round(decimals=4).tolist()[0]
        [3.0, 0.0, 0.0]
    """

    def fn(weight: Tensor, rank: int, scale: float) -> Factors:
        u, s, vh = top_singular(weight.float(), rank)
        root = (s / scale).sqrt()
        return Factors(root[:, None] * vh, u * root)

    return Start("pissa", fn, {}, _base(base))


def rila(beta: float = 0.5, trace_normalised: bool = False, base: Base = "changed", *, center: bool = True) -> Start:
    """The directions of a layer's output that tell forget rows from retained ones.

    B = Q_r, the leading eigenvectors of Cov_D = (1 - beta) Cov_F - beta Cov_R, and A = Q_r' W / s, so that
    s B A = Q Q' W: the layer's output, projected on them.

    Args:
        beta: Weight of the retained rows, from 0 (forget rows alone) to 1.
        trace_normalised: Divide both covariances by their trace first: beta then weighs shapes, not sizes.
        base: ``changed`` or ``kept``.
        center: Covariances; second moments where false. A recipe says so for all statistics (``statistics.center``).

    ``trace_normalised`` and ``kept`` are ours.

    Source: ReGLU (RILA), Xiao, Mo et al. 2026, arXiv 2604.17396.

    Example:
        >>> rila(beta=0.7).needs["forget"]
        Statistic(kind='output_moments', side='forget', options=())
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: give 0 to 1")
    if not isinstance(trace_normalised, bool):
        raise ValueError(f"trace_normalised is {trace_normalised!r}: give true or false")

    def fn(weight: Tensor, rank: int, scale: float, *, forget: Moments, retain: Moments) -> Factors:
        found = contrast_directions(forget, retain, beta, rank, center=center, trace_normalised=trace_normalised)
        if found.vectors.shape[1] < rank:
            raise UsageError(
                f"rank {rank} is above what the rows support: they span {found.vectors.shape[1]} directions: "
                "lower r, give more rows, or pool by token"
            )
        return from_directions(weight, found.vectors, scale, found.positive)

    needs = {side: Statistic("output_moments", side) for side in ("forget", "retain")}
    options = {"beta": beta, "trace_normalised": trace_normalised, "center": center}
    return Start("rila", fn, needs, _base(base), options)


def fila(epsilon: float = 1e-5, batch_rows: int = 16, base: Base = "changed") -> Start:
    """A low-rank part of the weight, fitted where forget rows need it more than retained ones do.

    The rows of the weight are scaled by the root of the summed ratio of squared gradients, I_F / (epsilon + I_R),
    before the singular value decomposition, and back after it. Gradients are of the mean negative log-likelihood of a
    batch's label tokens.

    Args:
        epsilon: Keeps the ratio finite. Mean squared gradients are often far below the default, which is the paper's:
            the retained side then hardly counts.
        batch_rows: Rows whose gradient is taken together.
        base: ``changed`` or ``kept``.

    Source: LoKU (FILA), Cha et al. 2025, ICLR.
    """
    epsilon, batch_rows = _positive("epsilon", epsilon), _whole("batch_rows", batch_rows)

    def fn(weight: Tensor, rank: int, scale: float, *, forget: Tensor, retain: Tensor) -> Factors:
        return weighted(weight, rank, scale, row_weights(forget, retain, epsilon), epsilon)

    needs = {side: Statistic("squared_gradient", side, (("batch_rows", batch_rows),)) for side in ("forget", "retain")}
    return Start("fila", fn, needs, _base(base), {"epsilon": epsilon, "batch_rows": batch_rows})


def vila(
    epsilon: float = 1e-5, batch_rows: int = 16, deviation: float = 0.05, seed: int = 0, base: Base = "changed"
) -> Start:
    """FILA with importance read off the adapter alone: the variance of the gradients of A and B, lifted to the weight.

    A and B are drawn from N(0, deviation^2) for the pass; the importance of the weight is I_B I_A.

    Args:
        epsilon: As for FILA.
        batch_rows: Rows whose gradient is taken together; a variance needs several batches.
        deviation: Standard deviation of the entries of A and B during the pass.
        seed: Of those entries.
        base: ``changed`` or ``kept``.

    Source: VILA, Kim et al. 2025, arXiv 2508.21300.
    """
    epsilon, batch_rows = _positive("epsilon", epsilon), _whole("batch_rows", batch_rows)
    drawn = (("deviation", _positive("deviation", deviation)), ("seed", _whole("seed", seed, least=0)))

    def fn(weight: Tensor, rank: int, scale: float, *, forget: Variances, retain: Variances) -> Factors:
        f, r = (own.B.float() @ own.A.float() for own in (forget, retain))
        return weighted(weight, rank, scale, row_weights(f, r, epsilon), epsilon)

    options = (("batch_rows", batch_rows), *drawn)
    needs = {side: Statistic("adapter_gradient_variance", side, options) for side in ("forget", "retain")}
    return Start("vila", fn, needs, _base(base), {"epsilon": epsilon, **dict(options)})


STARTS: Mapping[str, Callable[..., Start]] = {"plain": plain, "pissa": pissa, "rila": rila, "fila": fila, "vila": vila}


# --- parts --------------------------------------------------------------------------------------------------------


def from_directions(weight: Tensor, directions: Tensor, scale: float, positive: int | None = None) -> Factors:
    """B = Q and A = Q' W / s for orthonormal ``directions [out, r]``."""
    q = directions.to(weight.device, torch.float32)
    return Factors(q.T @ weight.float() / scale, q, positive)


def row_weights(forget: Tensor, retain: Tensor, epsilon: float) -> Tensor:
    """``[out]`` w_i = sqrt(sum_j F_ij / (epsilon + R_ij)) of two importances ``[out, in]``."""
    return (forget / (epsilon + retain)).sum(1).sqrt()


def weighted(weight: Tensor, rank: int, scale: float, rows: Tensor, epsilon: float) -> Factors:
    """Factors of the best rank-r approximation of diag(rows) W, scaled back: s B A is about W where rows count."""
    rows = rows.to(weight.device, torch.float32)
    u, s, vh = top_singular(rows[:, None] * weight.float(), rank)
    root = (s / scale).sqrt()
    # A row without weight is zero in U but for rounding, which the division would blow up.
    back = torch.where(rows > 0, 1 / (rows + epsilon), 0.0)
    return Factors(root[:, None] * vh, (u * root) * back[:, None])


def top_singular(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, r], S [r], Vh [r, n]`` of the ``rank`` largest singular values.

    Exact for small matrices; for large ones a randomised range with four power iterations, which loses little of the
    energy even where the spectrum is flat (Halko, Martinsson and Tropp 2011).
    """
    if min(matrix.shape) <= max(EXACT_BELOW, 4 * rank):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(matrix.shape[1], rank + 16, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    inner, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner[:, :rank], s[:rank], vh[:rank]


def _base(value: Any) -> Base:
    if value not in ("changed", "kept"):
        raise ValueError(f"base is {value!r}: give changed or kept")
    return value


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}: give a number above 0")
    return float(value)


def _whole(name: str, value: Any, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number, {least} or more")
    return int(value)
