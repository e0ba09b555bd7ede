"""Gaps to the gold over several runs together: a dozen forgotten sentences say little, ten dozen something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Gap(NamedTuple):
    """A mean gap with its interval, as shares of 1, and how many sentences it was measured on."""

    value: float
    low: float
    high: float
    rows: int


def gap(rows: Sequence[Row], side: str = "forget") -> Gap | None:
    """The mean over runs of F1 less the gold's, each with a gold of its own; None where a run shows none.

    Its 90 % interval is recovered from the paired intervals of the runs (bootstrap over sentences, the same for both
    models): the distances to each end add up as independent errors do, since draws share no sentence. On a side that
    all runs share (``test``) they are not independent, and it is too narrow.

    Source: Zou and Donner 2008 (MOVER), for a mean.

    Example:
        >>> one, two = ({"metrics": {"unlearned": {"forget_f1_gap": {"value": v, "low": v - 0.06, "high": v + 0.08,
        ...                                                           "n": 60}}}} for v in (0.1, 0.0))
        >>> [round(x, 4) for x in gap([one, two])]
        [0.05, 0.0076, 0.1066, 120]
    """
    found = [row["metrics"].get("unlearned", {}).get(f"{side}_f1_gap") for row in rows]
    if not found or any(own is None or "low" not in own for own in found):
        return None
    many, value = len(found), sum(own["value"] for own in found) / len(found)
    below, above = (math.hypot(*(own["value"] - own[end] for own in found)) / many for end in ("low", "high"))
    return Gap(value, value - below, value + above, sum(own["n"] for own in found))


def nearer(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float, float] | None:
    """``|gap of ours| - |gap of theirs|`` with a 90 % interval: below 0, ours is nearer to the gold.

    The interval is that of independent gaps. They are of the same sentences beside the same golds and move together, so
    it is wider than need be.

    Source: Zou and Donner 2008 (MOVER), for a difference.

    Example:
        >>> one, other = ({"metrics": {"unlearned": {"forget_f1_gap": {"value": v, "low": v - 0.03, "high": v + 0.04,
        ...                                                             "n": 60}}}} for v in (-0.1, 0.2))
        >>> [round(x, 3) for x in nearer([one], [other])]
        [-0.1, -0.157, -0.058]
    """
    pair = [gap(rows) for rows in (ours, theirs)]
    if pair[0] is None or pair[1] is None:
        return None
    a, b = (_size(own) for own in pair if own is not None)
    below, above = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return a.value - b.value, a.value - b.value - below, a.value - b.value + above


def _size(own: Gap) -> Gap:
    """The interval of a gap without its sign."""
    ends = sorted((abs(own.low), abs(own.high)))
    return Gap(abs(own.value), 0.0 if own.low < 0 < own.high else ends[0], ends[1], own.rows)
