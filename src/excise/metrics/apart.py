"""Do forgotten rows stand apart inside the model: neighbours, every layer, and controls with labels dealt at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excise.metrics.latent import probe_auc, projection_auc
from excise.metrics.states import Entry, States, auc_entry, group_numbers, tensor
from excise.metrics.statistics import bootstrap_counts, bootstrap_means, interval

NEAREST = 10
#: Layers at which everything is measured: of deeper models evenly spread ones, the last among them.
MOST_LAYERS = 8
DEALS = 3


@dataclass(frozen=True)
class Apart:
    """How far forgotten rows stand apart.

    Attributes:
        values: Metric -> {"value", "low", "high", "n", "n_other"}, at the highest layer.
        layers: Layers that ``by_layer`` is of, lowest first.
        by_layer: Metric -> its value at each of ``layers``.
        not_shown: Metric -> reason.
    """

    values: dict[str, Entry]
    layers: list[int] = field(default_factory=list)
    by_layer: dict[str, list[float]] = field(default_factory=dict)
    not_shown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Forgotten rows, rows to tell them from, retained rows, and the groups of the first two."""

    forget: Tensor
    other: Tensor
    kept: Tensor | None
    groups: tuple[NDArray | None, NDArray | None]


_NAMES = {
    "retain": ("neighbours_retain", "probe_auc_retain_shuffled"),
    "never_seen": ("neighbours_never_seen", "latent_membership_shuffled", "latent_projection_shuffled"),
}


def apart(states: States, groups: Mapping[str, Sequence[Any] | None] | None = None, *, seed: int = 0) -> Apart:
    """Neighbours and controls of the probes at the highest layer; membership and neighbours at every layer.

    Args:
        states: Side -> layer -> ``[rows, D]``, the same layers for every side; retained rows are ``untouched`` where
            there are any, else ``retain``.
        groups: Side -> person or author of each row (None: not known).
        seed: Of draws, folds and deals.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(30, 4))
        >>> found = apart({"forget": {2: x + 5}, "retain": {2: x}})
        >>> found.values["neighbours_retain"]["value"], found.by_layer["neighbours_retain"]
        (1.0, [1.0])
    """
    kept = "untouched" if "untouched" in states else "retain"
    ids = group_numbers(groups or {})
    layers = spread(sorted(states.get("forget", {})))
    found = Apart({}, layers)
    for name, side in (("retain", kept), ("never_seen", "never_seen")):
        rows = []
        for layer in layers:
            sets = [tensor(states[s][layer]) if s in states else None for s in ("forget", side, kept)]
            if sets[0] is None or sets[1] is None or min(len(sets[0]), len(sets[1])) < 2:
                break
            third = sets[2] if sets[2] is not None and len(sets[2]) else None
            rows.append(_Rows(sets[0], sets[1], third, (ids.get("forget"), ids.get(side))))
        if not rows:
            reason = f"needs hidden states of at least two forget rows and two {name.replace('_', '-')} rows"
            found.not_shown.update(dict.fromkeys(_NAMES[name], reason))
            continue
        found.values.update(_controls(rows[-1], name, seed))
        near = [neighbours(r.forget, r.other, *r.groups, seed=seed) for r in rows]
        found.values[f"neighbours_{name}"] = near[-1]
        found.by_layer[f"neighbours_{name}"] = [entry["value"] for entry in near]
        if name == "never_seen":
            found.by_layer.update(_membership(rows, seed))
            if rows[-1].kept is None:
                found.not_shown["latent_projection_shuffled"] = "needs hidden states of retained rows"
    return found


def spread(layers: Sequence[int], most: int = MOST_LAYERS) -> list[int]:
    """At most ``most`` of ascending layers, evenly spread, the last among them.

    Example:
        >>> spread(range(1, 33), 4), spread([1, 2])
        ([8, 16, 24, 32], [1, 2])
    """
    n = min(most, len(layers))
    return [layers[round((k + 1) * len(layers) / n) - 1] for k in range(n)]


def neighbours(
    a: Tensor, b: Tensor, groups_a: NDArray | None = None, groups_b: NDArray | None = None, *, k: int = NEAREST,
    seed: int = 0,
) -> Entry:  # fmt: skip
    """Share of the ``k`` nearest rows of a row of ``a`` that are of ``a`` too, among equally many of ``a`` and ``b``.

    Near is by cosine once the mean of both sets is taken off. Rows of one person are near each other whatever was
    forgotten, so they never count for one another; where groups are unknown, or ``a`` has one only, every row counts.

    Args:
        a: ``[n, d]`` states.
        b: ``[m, d]`` states.
        groups_a: Person of each row, -1 where it is not known.
        groups_b: The same for ``b``.
        k: Neighbours of a row; fewer where there are fewer rows.
        seed: Of the draw that makes both sets equally large.

    Returns:
        The share with its interval over rows; ``chance``: the share of rows of ``a`` among those that could be near;
        ``by``: ``group`` where rows of one person were left out, else ``row``.

    Source:
        Ours.
    """
    rng, n = np.random.default_rng(seed), min(len(a), len(b))
    chosen = [np.sort(rng.permutation(len(x))[:n]) for x in (a, b)]
    x = torch.cat((a[chosen[0]], b[chosen[1]])).double()
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    near = (x[:n] @ x.T).numpy()
    allowed = ~np.eye(n, 2 * n, dtype=bool)
    ids = [None if g is None else np.asarray(g)[c] for g, c in zip((groups_a, groups_b), chosen, strict=True)]
    by = "row"
    if ids[0] is not None and len(np.unique(ids[0][ids[0] >= 0])) > 1:
        other = np.full(n, -1) if ids[1] is None else ids[1]
        both = np.concatenate((ids[0], other))
        allowed &= (ids[0][:, None] != both) | (both < 0)
        by = "group"
    same, possible = allowed[:, :n].sum(1), allowed.sum(1)
    near[~allowed] = -np.inf
    order = np.argsort(-near, axis=1, kind="stable")
    take = np.minimum(k, possible)
    counted = np.arange(order.shape[1]) < take[:, None]
    share = ((order < n) & counted).sum(1) / np.maximum(take, 1)
    share = np.where(take > 0, share, np.nan)
    low, high = interval(bootstrap_means(share, bootstrap_counts(n, seed=seed)))
    chance = float(np.mean(same / np.maximum(possible, 1)))
    counted_rows = {"n": n, "n_other": n, "chance": chance, "by": by}
    return {"value": float(np.nanmean(share)), "low": low, "high": high, **counted_rows}


def _controls(rows: _Rows, name: str, seed: int) -> dict[str, Entry]:
    """Each probe again with labels dealt at random, the mean of three deals; about 0.5 unless the probe is broken."""
    n, m = len(rows.forget), len(rows.other)
    dealt = [probe_auc(rows.forget, rows.other, *rows.groups, seed=seed + d, shuffled=True) for d in range(DEALS)]
    names = _NAMES[name]
    found = {names[1]: auc_entry(float(np.mean(dealt)), n, m)}
    if name == "never_seen" and rows.kept is not None:
        both = torch.cat((rows.forget, rows.other))
        values = []
        for deal in range(DEALS):
            order = np.random.default_rng(seed + deal).permutation(n + m)
            values.append(projection_auc(both[order[:n]], both[order[n:]], rows.kept, seed=seed))
        found[names[2]] = auc_entry(float(np.mean(values)), n, m)
    return found


def _membership(layers: Sequence[_Rows], seed: int) -> dict[str, list[float]]:
    """The two membership attacks at each layer."""
    probed = [probe_auc(r.forget, r.other, *r.groups, seed=seed) for r in layers]
    if any(r.kept is None for r in layers):
        return {"latent_membership_auc": probed}
    along = [projection_auc(r.forget, r.other, r.kept, r.groups[0], seed=seed) for r in layers if r.kept is not None]
    return {"latent_membership_auc": probed, "latent_projection_auc": along}
