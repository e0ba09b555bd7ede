"""ROL: keeps what an adapter writes orthogonal to the directions that retained records use.

Source: Xiao, Mo et al. 2026 (ReGLU), arXiv 2604.17396. The update of a layer is ``B A x``, so its output lies in the
columns of ``B``; the basis ``P`` holds the top directions of the retained rows' outputs of the same layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.forward import constant, lora
from excise.objectives.arithmetic import one_of, upcast
from excise.objectives.term import Term, Weight

#: Gram matrices have a rank that a factor of this share of the largest eigenvalue decides.
TOLERANCE = 1e-10


def _chosen(
    factors: Mapping[str, Tensor], basis: Mapping[str, Tensor], layers: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, ``B`` and ``P`` of every layer that is held; there is no stand-in for a basis that is missing."""
    found = [name for name in factors if layers == "all" or re.search(layers, name)]
    if not found:
        raise UsageError(f"rol: option 'layers' is {layers!r}, which no adapted layer of the model matches")
    for name in found:
        if name not in basis:
            raise UsageError(f"rol: there is no retain basis for the layer {name}: collect it from the retained rows")
        if len(basis[name]) != len(factors[name]):
            raise UsageError(f"rol: the retain basis of the layer {name} is of another model: collect it again")
        own = upcast(factors[name])
        yield name, own, basis[name].detach().to(own)


def orthogonality(factors: Mapping[str, Tensor], basis: Mapping[str, Tensor], *, normalise: str, layers: str) -> Tensor:
    """How much of an adapter's output factors lies in the retain basis, a number: ``sum ||B' P||_F^2``.

    Args:
        factors: Layer -> ``B`` ``[out, r]``.
        basis: Layer -> ``P`` ``[out, k]``, orthonormal columns; receives no gradient.
        normalise: ``"paper"`` (the sum over layers), ``"layers_rank"`` (that over the number of layers and
            ``min(r, k)``: 1 where an orthonormal ``B`` lies wholly in the basis) or ``"cosine"`` (mean over layers of
            ``||B' P||^2 / ||B||^2``: the size of ``B`` does not count, and a ``B`` of zeros has the value 0).
        layers: ``"all"``, or a regular expression that is searched in the layers' names.

    Returns:
        A tensor without axes.

    Raises:
        UsageError: A layer has no basis, or one of other rows; or none is chosen.

    Source: Xiao, Mo et al. 2026 (ReGLU), arXiv 2604.17396, the loss ROL; both normalised forms are ours.

    Example:
        >>> b, p = torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]
        >>> float(orthogonality({"q": b}, {"q": p}, normalise="paper", layers="all"))
        1.0
    """
    values = []
    for _, b, p in _chosen(factors, basis, layers):
        inside = (b.T @ p).square().sum()
        if normalise == "cosine":
            inside = inside / b.square().sum().clamp_min(torch.finfo(b.dtype).tiny)
        elif normalise == "layers_rank":
            inside = inside / min(b.shape[1], p.shape[1])
        values.append(inside)
    total = torch.stack(values)
    return total.sum() if normalise == "paper" else total.mean()


def retain_share(factors: Mapping[str, Tensor], basis: Mapping[str, Tensor], *, layers: str) -> dict[str, Tensor]:
    """What to watch: the share of the adapter's output directions that the retain basis holds, mean over layers.

    For one layer it is the sum of the squared cosines of the principal angles between the columns of ``B`` and the
    basis, over the rank of ``B``: 0 is orthogonal, 1 is inside. Layers whose ``B`` is zero count as 0.

    Args:
        factors: As in `orthogonality`.
        basis: As in `orthogonality`.
        layers: As in `orthogonality`.

    Source: principal angles, Bjorck and Golub 1973; as a monitor: ours.

    Example:
        >>> b, p = torch.eye(4)[:, :2] * 9, torch.eye(4)[:, 1:3]
        >>> round(float(retain_share({"q": b}, {"q": p}, layers="all")["retain_share"]), 6)
        0.5
    """
    shares = []
    with torch.no_grad():
        for _, b, p in _chosen(factors, basis, layers):
            values, vectors = torch.linalg.eigh((b.T @ b).double())  # the angles from r x r products alone
            kept = values > TOLERANCE * values.amax().clamp_min(torch.finfo(values.dtype).tiny)
            inside = ((p.T @ b).double() @ vectors).square().sum(0)
            cosines = torch.where(kept, inside / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
            shares.append(cosines.sum() / kept.sum().clamp_min(1))
    return {"retain_share": torch.stack(shares).mean()}


def rol(
    k: int = 8,
    normalise: Literal["paper", "layers_rank", "cosine"] = "paper",
    layers: str = "all",
    weight: Weight = 0.01,
) -> Term:
    """Representation orthogonality: the adapter's output directions away from those of the retained rows.

    A value of the weights, counted once in every optimizer step. Needs an adapter, and the retain basis, which a run
    collects from the retained rows before training. A ``B`` of zeros (plain LoRA at its start) has the value 0 and no
    gradient.

    In our own trials it never helped: with a start by `rila` the retained rows came out worse the larger the weight
    was (0.01: unchanged; 1: clearly worse), in models of width 256 with ``r = k = 8``. A start that changes the base
    moves a part of the model's own function into ``B A``, which this pushes out of the retained directions as well;
    with plain LoRA there is little to hold (`docs/results/reglu.md`, where holding the net update is tried, too).
    Hence the small default. The public code takes 0.5 with the plain sum over about 150 layers, which can outweigh a
    bounded forget loss; with ``layers_rank`` a weight means the same whatever the model's depth.

    Args:
        k: Directions of the retain basis, 1 or more (the public code: 128).
        normalise: ``"paper"``, ``"layers_rank"`` or ``"cosine"``, see `orthogonality`. With ``"cosine"`` the gradient
            grows as ``B`` shrinks: use it with a start whose ``B`` is not zero.
        layers: ``"all"``, or a regular expression of module paths (``v_proj`` is the public code's other choice).
        weight: Weight of the term.

    Raises:
        UsageError: An option is none of the values above.

    Source: Xiao, Mo et al. 2026 (ReGLU), arXiv 2604.17396. The normalised forms and the default weight are ours.

    Example:
        >>> term = rol(k=4, weight=0.5)
        >>> term.per, term.inputs["basis"].detail
        ('step', 'retain_basis/4')
    """
    one_of("rol", "normalise", normalise, ("paper", "layers_rank", "cosine"))
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k) or k < 1:
        raise UsageError(f"rol: option 'k' is {k!r}: give a whole number of at least 1")
    try:
        re.compile(layers)
    except (re.error, TypeError):
        raise UsageError(f"rol: option 'layers' is {layers!r}: use all, or a regular expression") from None
    return Term(
        "rol",
        partial(orthogonality, normalise=normalise, layers=layers),
        {"factors": lora("B"), "basis": constant(f"retain_basis/{int(k)}")},
        per="step",
        weight=weight,
        monitor=partial(retain_share, layers=layers),
    )
