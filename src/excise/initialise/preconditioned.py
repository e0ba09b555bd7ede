"""The shape of updates that retained rows hardly feel: pure functions from a layer's input moments to W = W0 + Q M P.

An update M P acts on an input x as M (P x). With P the inverse of what retained inputs look like, directions in which
they are large are made small, so that the same step moves the outputs of other rows more and theirs less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excise.errors import InputRefused, UsageError
from excise.initialise.moments import Moments, contrast_directions
from excise.initialise.starts import Statistic


@dataclass(frozen=True)
class Shaper:
    """How the updates of whole weights are shaped.

    Attributes:
        name: As recipes call it.
        options: Settings, for the record of a run.
        inputs: ``inputs(retain, forget) -> P`` from moments of a layer's input on both sides.
        outputs: ``outputs(retain, forget) -> Q`` from moments of its output, or None for all outputs.
    """

    name: str
    options: Mapping[str, Any]
    inputs: Callable[[Moments, Moments], Tensor]
    outputs: Callable[[Moments, Moments], Tensor] | None = None

    @property
    def statistics(self) -> list[Statistic]:
        """What is taken of the rows, once for all layers."""
        kinds = ("input_moments",) if self.outputs is None else ("input_moments", "output_moments")
        return [Statistic(kind, side) for kind in kinds for side in ("retain", "forget")]  # type: ignore[arg-type]


def preconditioned(ridge: float = 0.1, rank: int | None = None, beta: float = 0.5, *, center: bool = True) -> Shaper:
    """Updates shaped by the inverse second moment of each layer's input on retained rows; decay pulls back to W0.

    ``P = c (C_R / mean eigenvalue + ridge)^-1``, c such that tr(P C_F P) = tr C_F: a step is as large on forget rows as
    it would be without. Second moments are not centred, whatever ``statistics.center`` says.

    Args:
        ridge: Added to the eigenvalues of C_R, whose mean is 1: below it a direction counts as unused by retained rows.
            A large one makes P the identity, which leaves the decay towards the start alone.
        rank: Confine the outputs to so many directions of RILA: the leading eigenvectors of (1 - beta) Cov_F - beta
            Cov_R of the layer's outputs. The update then has this rank and is exported as an adapter without loss.
        beta: Weight of the retained rows in those directions.
        center: Covariances of the outputs; second moments where false (``statistics.center``).

    Source: ours; the subspace: ReGLU (RILA), Xiao, Mo et al. 2026, arXiv 2604.17396.

    Example:
        >>> both = Moments.of(torch.eye(2))
        >>> [round(v, 3) for v in preconditioned(ridge=1.0).inputs(both, both).diagonal().tolist()]
        [1.0, 1.0]
    """
    for key, value in (("ridge", ridge), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} is {value!r}: give a number")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}: give a number above 0")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: give 0 to 1")
    if rank is not None and (isinstance(rank, bool) or rank != int(rank) or rank < 1):
        raise ValueError(f"rank is {rank!r}: give a whole number, 1 or more, or leave it out for all directions")
    options: dict[str, Any] = {"ridge": float(ridge)}
    if rank is None:
        return Shaper("preconditioned", options, lambda retain, forget: inverse(retain, forget, ridge))
    width = int(rank)
    return Shaper(
        "preconditioned", {**options, "rank": width, "beta": float(beta), "center": center},
        lambda retain, forget: inverse(retain, forget, ridge),
        lambda retain, forget: directions(retain, forget, width, beta, center=center),
    )  # fmt: skip


SHAPERS: Mapping[str, Callable[..., Shaper]] = {"preconditioned": preconditioned}


def inverse(retain: Moments, forget: Moments, ridge: float) -> Tensor:
    """``[in, in]`` fp32, symmetric: c (C_R / mean eigenvalue + ridge)^-1 with tr(P C_F P) = tr C_F; in fp64.

    Raises:
        InputRefused: The inputs of a side are all zero.

    Example:
        >>> seen = Moments.of(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> other = Moments.of(torch.tensor([[0.0, 1.0]]))
        >>> [round(v, 3) for v in inverse(seen, other, 0.5).diagonal().tolist()]
        [0.2, 1.0]
    """
    kept, gone = retain.covariance(center=False), forget.covariance(center=False)
    if float(kept.trace()) <= 0 or float(gone.trace()) <= 0:
        raise InputRefused("its inputs are all zero: nothing can be learnt of them")
    width = len(kept)
    shifted = kept * (width / kept.trace())
    shifted.diagonal().add_(ridge)
    p = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    # For a symmetric P: tr(P C P) = sum of P * (C P).
    p = p * (gone.trace() / (p * (gone @ p)).sum()).sqrt()
    return ((p + p.T) / 2).float()


def directions(retain: Moments, forget: Moments, rank: int, beta: float, *, center: bool) -> Tensor:
    """``[out, rank]`` fp32: the leading directions of (1 - beta) Cov_F - beta Cov_R.

    Raises:
        UsageError: The rows span fewer directions.
    """
    found = contrast_directions(forget, retain, beta, rank, center=center).vectors
    if found.shape[1] < rank:
        raise UsageError(f"rank {rank} is above the {found.shape[1]} directions that it has or the rows span: lower it")
    return found.float()
