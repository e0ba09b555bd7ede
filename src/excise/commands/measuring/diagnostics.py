"""Where an adapter's update acts: its output directions beside those of the forgotten and of the retained records.

For each adapted layer, before and after training: the angles to the leading directions of either side, the share of
either side's variance that the update's directions hold, and the spectrum of the contrast of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from excise import recipe
from excise.forward import lora_factors
from excise.initialise.moments import Moments
from excise.initialise.starts import Factors
from excise.subspace import captured, low_rank_top, orthonormal, principal_angles, top_directions

SIDES = ("forget", "retain")
#: Eigenvalues of the contrast that are kept at either end.
ENDS = 4
#: Singular values below this share of the largest are rounding, not a direction of the update.
NEGLIGIBLE = 1e-5
#: Variance below this share of the mean square is rounding: the side's vectors are all the same.
ROUNDING = 1e-10


def wanted(settings: recipe.Recipe) -> bool:
    """Whether a run takes statistics for this picture, needed otherwise or not: an adapter, and states are measured.

    Example:
        >>> adapted = {"model": {"lora": {"r": 4}}}
        >>> wanted(recipe.build(adapted)), wanted(recipe.build({**adapted, "evaluate": {"latent": False}}))
        (True, False)
    """
    return settings.model.lora is not None and settings.evaluate.latent


def factors(model: nn.Module) -> dict[str, Factors]:
    """A copy of the trained adapter's factors by layer, in fp32 on the CPU; before it is merged."""
    a, b = (lora_factors(model, which) for which in ("A", "B"))
    copied = {which: {n: x.detach().float().cpu().clone() for n, x in m.items()} for which, m in (("A", a), ("B", b))}
    return {name: Factors(copied["A"][name], own) for name, own in copied["B"].items()}


def geometry(
    moments: Mapping[str, Mapping[str, Moments]],
    trained: Mapping[str, Factors],
    start: Mapping[str, Factors] | None = None,
    *,
    k: int = 8,
    beta: float = 0.5,
    center: bool = True,
    taken_for: str = "start",
) -> dict[str, Any]:
    """``pictures.json``'s ``geometry``: one entry for each layer that both sides have moments of.

    Args:
        moments: Side (``forget``, ``retain``) -> layer -> moments of the original layer's outputs; each is
            looked up once.
        trained: Layer -> the factors after training (`factors`).
        start: Layer -> the factors that training began with, which the base weight (or a second adapter) has less of;
            None or missing layers: B was zero.
        k: Directions of each side's leading subspace.
        beta: Weight of the retained side in the contrast (1 - beta) Cov_F - beta Cov_R.
        center: Covariances rather than second moments.
        taken_for: ``start`` (the statistics were needed anyway) or ``picture``.

    Returns:
        ``{"k", "beta", "taken_for", "layers": [{"name", "width", "rank", "chance", "before", "after", "spectrum"}]}``;
        see `layer`.

    Example:
        >>> geometry({"forget": {}, "retain": {}}, {})["layers"]
        []
    """
    names = [name for name in trained if all(name in moments[side] for side in SIDES)]
    entries = []
    for name in names:
        sides = {side: moments[side][name] for side in SIDES}
        begun = (start or {}).get(name)
        entries.append({"name": name, **layer(sides, trained[name], begun, k=k, beta=beta, center=center)})
    return {"k": k, "beta": beta, "taken_for": taken_for, "layers": entries}


def layer(
    moments: Mapping[str, Moments],
    trained: Factors,
    start: Factors | None = None,
    *,
    k: int = 8,
    beta: float = 0.5,
    center: bool = True,
) -> dict[str, Any]:
    """What one layer's update does, as plain numbers.

    Args:
        moments: Side -> moments of the layer's outputs ``[out]``.
        trained: ``A [r, in]`` and ``B [out, r]`` after training.
        start: The same at the start, None where B was zero.
        k: Directions of each side's leading subspace.
        beta: Weight of the retained side in the contrast.
        center: Covariances rather than second moments.

    Returns:
        ``rank`` and ``width`` (r, out); ``chance`` (share of any variance that r random directions hold on average);
        ``before`` and ``after``: side -> ``{"share", "cosines"}`` of the space that the adapter writes to at the start
        (the columns of B) and of the r leading output directions of the update, None where there are none (``share``:
        None where the side's vectors are all the same);
        ``spectrum``: the ``top`` and ``bottom`` eigenvalues of the contrast, the outermost first, over the largest
        magnitude of all.

    Source: principal angles: Bjorck and Golub 1973; the contrast: ReGLU, Xiao, Mo et al. 2026, arXiv 2604.17396; as a
    diagnostic: ours.

    Example:
        >>> seen = {s: Moments.of(torch.tensor([[v, 0.0], [-v, 0.0], [0.0, 1.0], [0.0, -1.0]])) for s, v in
        ...         (("forget", 3.0), ("retain", 1.0))}
        >>> found = layer(seen, Factors(torch.ones(1, 5), torch.tensor([[1.0], [0.0]])), k=1)
        >>> found["after"]["forget"], found["after"]["retain"]["share"], found["before"], found["spectrum"]["top"]
        ({'share': 0.9, 'cosines': [1.0]}, 0.5, None, [1.0, 0.0])
    """
    width, rank = trained.B.shape
    spread = {side: _spread(moments[side], center) for side in SIDES}
    varies = {side: moments[side].trace(center) > ROUNDING * moments[side].trace(center=False) for side in SIDES}
    leading = {side: _leading(spread[side], min(k, width)) for side in SIDES}
    begun = None if start is None or not bool(start.B.any()) else orthonormal(start.B.double())
    spaces = {"before": begun, "after": update_directions(trained, start)}

    def beside(q: Tensor | None) -> dict[str, Any] | None:
        if q is None:
            return None
        return {
            side: {
                "share": _share(q, spread[side]) if varies[side] else None,
                "cosines": [float(c) for c in principal_angles(q, leading[side].to(q))],
            }
            for side in SIDES
        }

    return {
        "width": width,
        "rank": rank,
        "chance": rank / width,
        **{when: beside(q) for when, q in spaces.items()},
        "spectrum": _spectrum(spread["forget"], spread["retain"], beta, min(ENDS, width)),
    }


def update_directions(trained: Factors, start: Factors | None = None) -> Tensor | None:
    """``[out, r']`` fp64: the leading left singular vectors of B A - B0 A0, at most r; None where nothing moved.

    Example:
        >>> update_directions(Factors(torch.ones(1, 2), torch.zeros(3, 1))) is None
        True
    """
    left, right = trained.B.double(), trained.A.double()
    if start is not None:
        left = torch.cat((left, -start.B.to(left)), dim=1)
        right = torch.cat((right, start.A.to(right)))
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)  # without forming [out, in]
    u, sizes, _ = torch.linalg.svd(outer.R @ inner.R.T)
    scale = float(torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right))
    found = (outer.Q @ u[:, : len(sizes)])[:, sizes > max(NEGLIGIBLE * float(sizes.max()), 1e-9 * scale)]
    return found[:, : trained.B.shape[1]] if found.shape[1] else None


# --- parts: a side's spread is X [n, d] with X'X its covariance, or that covariance [d, d] --------------------------


def _spread(moments: Moments, center: bool) -> tuple[Tensor | None, Tensor | None]:
    """(X, None) where there are fewer vectors than the width, else (None, covariance)."""
    if moments.second is not None:
        return None, moments.covariance(center)
    x, weights = moments.factor(center)
    return x * weights.sqrt()[:, None], None


def _matrix(spread: tuple[Tensor | None, Tensor | None]) -> Tensor:
    x, cov = spread
    if x is not None:
        return x.T @ x
    assert cov is not None
    return cov


def _leading(spread: tuple[Tensor | None, Tensor | None], k: int) -> Tensor:
    x, cov = spread
    if x is not None:
        return low_rank_top(x, x[:0], (1.0, 1.0), k).vectors
    assert cov is not None
    return top_directions(cov, len(cov), k).vectors


def _share(q: Tensor, spread: tuple[Tensor | None, Tensor | None]) -> float:
    """Share of the variance that lies in the span of ``q``."""
    x, cov = spread
    if x is not None:
        return float((x @ q.to(x)).square().sum()) / float(x.square().sum())
    assert cov is not None
    return captured(q.to(cov), cov)


def _spectrum(
    forget: tuple[Tensor | None, Tensor | None], retain: tuple[Tensor | None, Tensor | None], beta: float, ends: int
) -> dict[str, list[float]]:
    signs = (1 - beta, -beta)
    if forget[0] is not None and retain[0] is not None:
        top, low = (low_rank_top(forget[0], retain[0], (s * signs[0], s * signs[1]), ends) for s in (1, -1))
    else:
        contrast = signs[0] * _matrix(forget) + signs[1] * _matrix(retain)
        top, low = (top_directions(s * contrast, len(contrast), ends) for s in (1, -1))
    largest = max(float(top.values[0]), float(low.values[0]), 1e-300) if len(top.values) else 1.0
    return {
        "top": [float(v) / largest for v in top.values],
        "bottom": [-float(v) / largest for v in low.values],
    }
