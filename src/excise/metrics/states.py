"""What hidden states say about forgetting: entanglement, distances, probes, drift, with row counts, and a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excise import geometry
from excise.errors import UsageError
from excise.metrics.latent import probe_auc, projection_auc
from excise.metrics.statistics import bootstrap_counts, bootstrap_means, interval

Entry = dict[str, Any]
States = Mapping[str, Mapping[int, NDArray]]
MAPPED = ("forget", "untouched", "retain", "never_seen", "outside")
MOST_POINTS = 300
_NORMAL = 1.959964


@dataclass(frozen=True)
class Latent:
    """The numbers that hidden states give of one model.

    Attributes:
        values: Metric -> {"value", "low", "high", "n"}; n is the smaller number of rows behind it. ``mk_mmd`` adds
            "p", a permutation test, where rows are exchangeable (no groups given).
        entanglement_by_layer: Raw entanglement at each measured layer, lowest first; NaN where the means coincide.
        layers: These layers.
        not_shown: Metric -> reason.
    """

    values: dict[str, Entry]
    entanglement_by_layer: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    not_shown: dict[str, str] = field(default_factory=dict)


def latent(
    states: States,
    groups: Mapping[str, Sequence[Any] | None] | None = None,
    *,
    reference_states: States | None = None,
    layer: int | None = None,
    seed: int = 0,
) -> Latent:
    """Every latent metric of the catalogue that the given sides allow, at one layer.

    The retained side is ``untouched`` where there is one, else ``retain``: rows that unlearning trained on flatter.

    Intervals (95 %): entanglement by the jackknife over rows on its logarithm, and only where the gap between the means
    is clearly more than sampling noise; drift by the bootstrap over rows; AUCs by Hanley and McNeil (1982). All speak
    of more rows of the same people, not of more people: with few groups the latter would be wider. Distances (MMD, W2)
    have none: resampled rows repeat, which moves such distances by itself.

    Args:
        states: Side -> layer -> ``[rows, D]``.
        groups: Side -> person or author of each row (None: not known), for splits that never share one.
        reference_states: The original's states of the same rows, for drift.
        layer: The layer that numbers are taken at; default the highest measured.
        seed: Of splits and permutations.

    Returns:
        Values, reasons for what is not shown, and entanglement by layer.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(30, 4)).astype(np.float32)
        >>> found = latent({"forget": {2: x + 5}, "retain": {2: x}})
        >>> found.values["probe_auc_retain"]["value"], "latent_projection_auc" in found.values
        (1.0, False)
    """
    kept = "untouched" if "untouched" in states else "retain"
    values: dict[str, Entry] = {}
    not_shown: dict[str, str] = {}
    top = {side: tensor(own[max(own) if layer is None else layer]) for side, own in states.items() if own}
    ids = group_numbers(groups or {})
    forget, retain, never = top.get("forget"), top.get(kept), top.get("never_seen")
    if forget is None or retain is None or min(len(forget), len(retain)) < 2:
        reason = "needs hidden states of at least two forget rows and two retained rows"
        not_shown |= dict.fromkeys(_BETWEEN, reason)
    else:
        values |= _between(forget, retain, ids.get("forget"), ids.get(kept), seed)
    if forget is None or never is None or min(len(forget), len(never)) < 2:
        reason = "needs hidden states of at least two forget rows and two never-seen rows"
        not_shown |= dict.fromkeys(("latent_membership_auc", "latent_projection_auc"), reason)
    else:
        found = probe_auc(forget, never, ids.get("forget"), ids.get("never_seen"), seed=seed)
        values["latent_membership_auc"] = auc_entry(found, len(forget), len(never))
        if retain is not None and len(retain):
            found = projection_auc(forget, never, retain, ids.get("forget"), seed=seed)
            values["latent_projection_auc"] = auc_entry(found, len(forget), len(never))
    before = (reference_states or {}).get(kept)
    if retain is None or not before:
        not_shown["retain_drift"] = "needs the original's hidden states of the same rows"
    else:
        drift = _drift(retain, tensor(before[max(before) if layer is None else layer]), seed)
        values |= {"retain_drift": drift} if drift else {}
    for name in [k for k, v in values.items() if not math.isfinite(v["value"])]:
        del values[name]
        not_shown[name] = "the result is not a finite number"
    layers = sorted(states.get("forget", {}).keys() & states.get(kept, {}).keys())
    return Latent(values, entanglement_by_layer(states, layers), layers, not_shown)


_BETWEEN = (
    "entanglement", "entanglement_normalised", "entanglement_shuffled", "mk_mmd", "w2_gaussian", "w2_exact",
    "w2_sliced", "probe_auc_retain",
)  # fmt: skip


def _between(forget: Tensor, retain: Tensor, forget_ids: NDArray | None, retain_ids: NDArray | None, seed: int) -> dict:
    """Numbers of forget against retained states."""
    n = min(len(forget), len(retain))
    plain = {
        "entanglement_shuffled": geometry.entanglement_shuffled(forget, retain, seed=seed),
        "mk_mmd": geometry.mk_mmd(forget, retain),
        "w2_gaussian": geometry.w2_gaussian(forget, retain),
        "w2_exact": geometry.w2_exact(forget, retain, seed=seed),
        "w2_sliced": geometry.w2_sliced(forget, retain, seed=seed),
    }
    values: dict[str, Entry] = {k: {"value": v, "low": None, "high": None, "n": n} for k, v in plain.items()}
    if forget_ids is None and retain_ids is None:
        values["mk_mmd"]["p"] = geometry.mk_mmd_p(forget, retain, seed=seed)
    for name, normalize in (("entanglement", False), ("entanglement_normalised", True)):
        low, high = entanglement_interval(forget, retain, normalize=normalize)
        value = geometry.entanglement(forget, retain, normalize=normalize)
        values[name] = {"value": value, "low": low, "high": high, "n": n}
    found = probe_auc(forget, retain, forget_ids, retain_ids, seed=seed)
    return values | {"probe_auc_retain": auc_entry(found, len(forget), len(retain))}


def entanglement_by_layer(states: States, layers: Sequence[int]) -> list[float]:
    """Raw entanglement of forget and retained states at each layer; NaN where it is not finite."""
    kept = "untouched" if "untouched" in states else "retain"
    out = []
    for layer in layers:
        forget, retain = tensor(states["forget"][layer]), tensor(states[kept][layer])
        value = geometry.entanglement(forget, retain) if len(forget) and len(retain) else math.nan
        out.append(value if math.isfinite(value) else math.nan)
    return out


def entanglement_interval(a: Tensor, b: Tensor, *, normalize: bool = False) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of `geometry.entanglement` by the jackknife over rows, on its logarithm (ours).

    (None, None) with fewer than five rows on a side, or where the squared gap between the means is less than twice what
    sampling alone gives: the ratio is then that of two noises, and no resampling describes it.
    """
    if min(len(a), len(b)) < 5:
        return None, None
    x, y = (s.double().numpy() for s in (a, b))
    if normalize:
        x, y = (s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-12) for s in (x, y))
    within = [float(((s - s.mean(0)) ** 2).sum(1).mean()) for s in (x, y)]
    gap = float(((x.mean(0) - y.mean(0)) ** 2).sum())
    if gap <= 2 * (within[0] / (len(x) - 1) + within[1] / (len(y) - 1)) or min(within) <= 0:
        return None, None
    variance = 0.0
    for one, other, own, rest in ((x, y, within[0], within[1]), (y, x, within[1], within[0])):
        n, offset = len(one), one - one.mean(0)
        spread = (offset**2).sum(1)
        # Leaving row i out: the mean moves by -offset_i/(n-1), the mean squared spread becomes this.
        left = (n * own - n / (n - 1) * spread) / (n - 1)
        gaps = ((one.mean(0) - offset / (n - 1) - other.mean(0)) ** 2).sum(1)
        logs = np.log(np.maximum(left + rest, 1e-300)) - np.log(np.maximum(gaps, 1e-300))
        variance += (n - 1) / n * float(((logs - logs.mean()) ** 2).sum())
    centre, half = math.log(4 * sum(within) / gap), _NORMAL * math.sqrt(variance)
    return math.exp(centre - half), math.exp(centre + half)


def auc_entry(value: float, n: int, m: int) -> Entry:
    """An AUC with the interval of `auc_interval` and both row counts."""
    low, high = auc_interval(value, n, m)
    return {"value": value, "low": low, "high": high, "n": n, "n_other": m}


def auc_interval(value: float, n: int, m: int) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of an AUC from its value and the two row counts (Hanley and McNeil, 1982).

    At 0 and 1 the formula has no width; it is then taken half a row inside.

    Example:
        >>> [round(v, 3) for v in auc_interval(0.5, 60, 60)], [round(v, 3) for v in auc_interval(1.0, 60, 60)]
        ([0.396, 0.604], [0.975, 1.0])
    """
    if not math.isfinite(value) or not n or not m:
        return None, None
    inside = min(max(value, 0.5 / min(n, m)), 1 - 0.5 / min(n, m))
    one, two = inside / (2 - inside), 2 * inside**2 / (1 + inside)
    variance = inside * (1 - inside) + (n - 1) * (one - inside**2) + (m - 1) * (two - inside**2)
    half = _NORMAL * math.sqrt(max(0.0, variance) / (n * m))
    return max(0.0, min(value, inside) - half), min(1.0, max(value, inside) + half)


def _drift(now: Tensor, before: Tensor, seed: int) -> Entry | None:
    if now.shape != before.shape or not len(now):
        return None
    rows = geometry.relative_drift(now, before).numpy()
    low, high = interval(bootstrap_means(rows, bootstrap_counts(len(rows), seed=seed)))
    return {"value": float(rows.mean()), "low": low, "high": high, "n": len(rows)}


def tensor(states: NDArray) -> Tensor:
    """States in fp64."""
    return torch.from_numpy(np.ascontiguousarray(states, np.float64))


def group_numbers(groups: Mapping[str, Sequence[Any] | None]) -> dict[str, NDArray[np.int64]]:
    """One number per group, the same over all sides; -1 where a row has none. Sides without any group are left out."""
    given = {side: [None if g == -1 else g for g in own] for side, own in groups.items() if own is not None}
    names = sorted({str(g) for own in given.values() for g in own if g is not None})
    number = {name: i for i, name in enumerate(names)}
    return {
        side: np.array([-1 if g is None else number[str(g)] for g in own], np.int64)
        for side, own in given.items()
        if any(g is not None for g in own)
    }


# --- a map --------------------------------------------------------------------------------------------------------


def state_map(
    states: Mapping[str, Mapping[str, NDArray]], *, fit_on: str = "original", method: str = "pca"
) -> dict[str, Any]:
    """Two-dimensional places of states: axes found on one model, applied to all, so that panels can be compared.

    Args:
        states: Model -> side -> ``[rows, D]``. Forget, untouched (else retain) and never-seen rows are drawn, the first
            300 of each.
        fit_on: The model whose states fix the axes.
        method: ``pca``, or ``umap`` (extra).

    Returns:
        ``{"method", "models": {model: {side: [[x, y], ...]}}, "explained": [share of variance by axis]}``.

    Raises:
        UsageError: UMAP was asked for and is not installed, or the model to fit on is absent.

    Example:
        >>> state_map({"original": {"forget": np.array([[-1.0, 0.0], [1.0, 0.0]])}})["models"]["original"]["forget"]
        [[-1.0, 0.0], [1.0, 0.0]]
    """
    if fit_on not in states:
        raise UsageError(f"the map needs the states of {fit_on!r}: measure that model too")
    drawn = {model: {s: v[:MOST_POINTS] for s, v in own.items() if _mapped(s, own)} for model, own in states.items()}
    basis = np.concatenate([np.asarray(v, np.float64) for v in drawn[fit_on].values()])
    explained: list[float] = []
    if method == "pca":
        projection = geometry.fit_pca(torch.from_numpy(basis), 2)
        place, explained = lambda x: projection(tensor(x)).numpy(), [float(v) for v in projection.explained]
    elif method == "umap":
        place = _umap(basis)
    else:
        raise UsageError(f"unknown map {method!r}: pca, umap or none")
    models = {
        model: {s: [[round(float(a), 5) for a in row] for row in place(v)] for s, v in own.items() if len(v)}
        for model, own in drawn.items()
    }
    return {"method": method, "models": models, "explained": explained}


def _mapped(side: str, sides: Mapping[str, Any]) -> bool:
    return side in MAPPED and not (side == "retain" and "untouched" in sides)


def _umap(basis: NDArray) -> Any:
    import warnings

    try:
        import umap
    except ImportError:
        hint = "pip install 'excise[umap]', or set evaluate.map: pca"
        raise UsageError(f"the UMAP map needs umap-learn: {hint}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # McInnes et al., 1802.03426; library defaults. A seed makes it deterministic and single-threaded.
        fitted = umap.UMAP(n_components=2, n_neighbors=min(15, len(basis) - 1), random_state=0).fit(basis)
    return fitted.transform
