"""Single rows for a report: how forgotten rows lie beside never-seen ones, and which stand out. Numbers, never text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows
from excise.metrics.table import Table

Floats = NDArray[np.float64]
Tables = Mapping[str, Mapping[str, Table]]
BINS = 28
#: Rows of a side that a report lists.
MOST = 10
_SIDES = ("forget", "never_seen")


def losses(table: Table) -> Floats:
    """``[rows]`` nats per token of each row's answer, without rows that have none.

    Example:
        >>> columns = {"row": np.arange(2), "kind": np.zeros(2), "mean_nll": np.array([0.5, 2.0])}
        >>> losses(Table("forget", 2, columns)).tolist()
        [0.5, 2.0]
    """
    found = -rows.attack_score(table, "loss")
    return found[~np.isnan(found)]


def membership(tables: Tables) -> dict[str, Any]:
    """Rows by their loss, forgotten and never seen, by model: what a membership attack by likelihood sees.

    Bins are of one width from 0 to the largest loss but one in a hundred; what lies above is in the last.

    Args:
        tables: Model -> side -> table.

    Returns:
        ``{"membership": {"edges": [nats], "models": {model: {side: [rows]}}}}``, or an empty mapping.
    """
    found = {
        model: {side: losses(own[side]) for side in _SIDES}
        for model, own in tables.items()
        if set(_SIDES) <= own.keys()
    }
    everything = [values for sides in found.values() for values in sides.values()]
    if not everything or not all(len(values) for values in everything):
        return {}
    edges = np.linspace(0.0, max(float(np.percentile(np.concatenate(everything), 99)), 1e-3), BINS + 1)
    counts = {
        model: {side: np.histogram(np.clip(v, 0.0, edges[-1]), edges)[0].tolist() for side, v in sides.items()}
        for model, sides in found.items()
    }
    return {"membership": {"edges": edges.tolist(), "models": counts}}


def worst(tables: Tables, lines: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Forgotten rows that are still likeliest beside the gold, and kept rows that lost most beside the original.

    Without a gold, or without an original, the rows stand beside nothing and their own value decides.

    Args:
        tables: Model -> side -> table.
        lines: Side -> the line of each row in its file, from 1; 0 where it is not known.

    Returns:
        ``{"worst": {"forget": {"beside": name, "models": {model: [row]}}, "kept": ..}}``, a row being ``row`` (from 0),
        ``line`` (or None), ``value`` and ``beside``; or an empty mapping.
    """
    out: dict[str, Any] = {}
    judged = [model for model in tables if model not in ("original", "gold")]
    kept = next((s for s in ("untouched", "retain") if any(s in tables[m] for m in judged)), "retain")
    for name, side, beside, sign in (("forget", "forget", "gold", 1.0), ("kept", kept, "original", -1.0)):
        models = {}
        for model in judged:
            own, theirs = _probability(tables, model, side), _probability(tables, beside, side)
            if own is not None:
                theirs = theirs if theirs is not None and len(theirs) == len(own) else None
                models[model] = _listed(own, theirs, sign, lines.get(side, ()))
        if models:
            out[name] = {"side": side, "beside": beside, "models": models}
    return {"worst": out} if out else {}


def _probability(tables: Tables, model: str, side: str) -> Floats | None:
    try:
        return rows.probability(tables[model][side])
    except (KeyError, NotShown):
        return None


def _listed(own: Floats, theirs: Floats | None, sign: float, lines: Sequence[int]) -> list[dict[str, Any]]:
    gap = sign * (own if theirs is None else own - theirs)
    order = [int(i) for i in np.argsort(-gap, kind="stable") if not np.isnan(gap[i])][:MOST]
    return [
        {
            "row": i,
            "line": (lines[i] or None) if i < len(lines) else None,
            "value": float(own[i]),
            "beside": None if theirs is None else float(theirs[i]),
        }
        for i in order
    ]
