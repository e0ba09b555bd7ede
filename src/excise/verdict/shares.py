"""Estimates where no rows were kept or needed: exact shares, differences of shares, differences of saved numbers."""

from __future__ import annotations

import math
from typing import Any

from excise.metrics.statistics import wilson
from excise.verdict.equivalence import Estimate

_NORMAL = 1.959964


def share(found: int, n: int, *, level: float = 0.05) -> Estimate:
    """A share of rows with exact bounds (Clopper and Pearson 1934), each at the level.

    Example:
        >>> round(share(0, 58).high, 4), round(share(0, 59).high, 4)
        (0.0503, 0.0495)
    """
    from scipy import stats

    if n < 1:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    low = 0.0 if found == 0 else float(stats.beta.ppf(level, found, n - found + 1))
    high = 1.0 if found == n else float(stats.beta.ppf(1 - level, found + 1, n - found))
    return Estimate(found / n, low, high, n, n)


def share_difference(found: int, n: int, other: int, m: int, *, level: float = 0.05) -> Estimate:
    """Difference of two shares of separate rows, from the two Wilson intervals (Newcombe 1998, method 10).

    Example:
        >>> found = share_difference(30, 60, 30, 60)
        >>> found.value, found.low < 0 < found.high
        (0.0, True)
    """
    if n < 1 or m < 1:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    p, q = found / n, other / m
    (low_p, high_p), (low_q, high_q) = (wilson(k, size, 1 - 2 * level) for k, size in ((found, n), (other, m)))
    low = p - q - math.hypot(p - low_p, high_q - q)
    return Estimate(p - q, low, p - q + math.hypot(high_p - p, q - low_q), min(n, m), min(n, m))


def of_numbers(entry: Any, other: Any | float, *, level: float = 0.05) -> Estimate:
    """Difference of two saved numbers with 95 % intervals, or of one and a constant, where rows were not kept.

    Both are taken as independent. Measured on the same rows they move together, so the interval is too wide, not too
    narrow; but it counts rows, even where few persons stand behind them.

    Args:
        entry: Has ``value``, ``low``, ``high``, ``n``.
        other: The same, or a constant.
        level: Of each one-sided bound.

    Example:
        >>> from excise.artifacts import Number
        >>> found = of_numbers(Number(0.6, 0.5, 0.7, 80), 0.5)
        >>> round(found.value, 2), round(found.high, 3), found.n
        (0.1, 0.184, 80)
    """
    from scipy import stats

    numbers = [entry] if isinstance(other, int | float) else [entry, other]
    target = other if isinstance(other, int | float) else other.value
    if any(x.value is None or x.low is None or x.high is None for x in numbers):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    spread = math.hypot(*(max(x.high - x.value, x.value - x.low) / _NORMAL for x in numbers))
    value, half = entry.value - target, float(stats.norm.ppf(1 - level)) * spread
    n = min(x.n or 0 for x in numbers)
    return Estimate(value, value - half, value + half, n, n)
