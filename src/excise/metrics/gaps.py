"""Numbers of people apart: how unevenly forgetting and keeping fell on the groups that rows belong to, from tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.bench import Bench, Entry
from excise.metrics.table import Table

Floats = NDArray[np.float64]
DEALS = 500
#: Groups of a picture; with more, the largest.
MOST = 100


def by_group(table: Table) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Groups of a side in order, the mean probability of each group's answers, and their rows.

    Rows without a group are left out. Raises `NotShown` where fewer than two groups have a row with a value.

    Example:
        >>> columns = {"row": np.arange(3), "kind": np.zeros(3), "mean_nll": np.log([2.0, 4.0, 1.0])}
        >>> [x.tolist() for x in by_group(Table("forget", 3, columns | {"group": np.array([5, 5, 7])}))]
        [[5, 7], [0.375, 1.0], [2, 1]]
    """
    values, groups = _grouped(table)
    ids, where = np.unique(groups, return_inverse=True)
    counts = np.bincount(where)
    return ids, np.bincount(where, weights=values) / counts, counts


def _grouped(table: Table) -> tuple[Floats, NDArray[np.int64]]:
    if not table.has("group"):
        raise NotShown(f"the {table.side} rows carry no group")
    values, groups = per_row.probability(table), table.columns["group"].astype(np.int64)
    taken = (groups >= 0) & ~np.isnan(values)
    if len(np.unique(groups[taken])) < 2:
        raise NotShown(f"the {table.side} rows are of fewer than two groups")
    return values[taken], groups[taken]


def gap(where: str, bench: Bench) -> Entry:
    """Mean probability of the group with the highest minus that of the group with the lowest.

    The largest of several means is above the smallest by chance alone: ``chance`` is the median gap when the same rows
    are dealt to groups of the same sizes at random, and ``p`` the share of deals with at least this gap. No interval.

    Source:
        Ours.
    """
    values, groups = _grouped(bench.kept() if where == "kept" else bench.side(where))
    ids, place = np.unique(groups, return_inverse=True)
    members = (place[:, None] == np.arange(len(ids))).astype(np.float64)
    counts = members.sum(0)
    rng = np.random.default_rng(bench.seed)
    dealt = np.stack([rng.permutation(values) for _ in range(DEALS)]) @ members / counts
    value, chance = float(np.ptp(values @ members / counts)), np.ptp(dealt, axis=1)
    p = (1 + int(np.sum(chance >= value - 1e-12))) / (DEALS + 1)
    more = {"groups": len(ids), "chance": float(np.median(chance)), "p": p}
    return {"value": value, "low": None, "high": None, "n": len(values), **more}


def picture(tables: Mapping[str, Mapping[str, Table]]) -> dict[str, Any]:
    """Mean probability of every group by model, for the sides whose rows carry groups; groups are numbers.

    Args:
        tables: Model -> side -> table.

    Returns:
        ``{"by_group": {side: {"groups", "n", "models": {model: [value]}}}}``, or an empty mapping.
    """
    sides: dict[str, Any] = {}
    for model, own in tables.items():
        for side in ("forget", "untouched", "retain"):
            try:
                ids, means, counts = by_group(own[side])
            except (KeyError, NotShown):
                continue
            shown = np.sort(np.argsort(-counts, kind="stable")[:MOST])
            entry = sides.setdefault(side, {"groups": ids[shown].tolist(), "n": counts[shown].tolist(), "models": {}})
            if entry["groups"] == ids[shown].tolist():
                entry["models"][model] = means[shown].tolist()
    return {"by_group": sides} if sides else {}
