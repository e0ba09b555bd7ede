"""Estimates with intervals that rows or groups support, and what an interval says of a margin (TOST). Pure numpy.

Every statistic here is a mean, a ratio of sums, an AUC, or a difference or ratio of these. Its variance is that of the
influence of each row, summed within groups: for means Student's, for AUCs that of DeLong et al. (1988), in groups that
of Obuchowski (1997). With a t-quantile of as many groups as there are, two one-sided tests keep their level from about
20 rows on, which percentile bootstraps do not; tests hold it by simulation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Outcome = Literal["passed", "failed", "not shown"]
#: With fewer groups than this rows stand for themselves: an interval over two or three persons says nothing.
LEAST_GROUPS = 5


@dataclass(frozen=True)
class Rows:
    """A score as a ratio of sums over rows, and which rows belong together.

    Args:
        top: ``[n]`` numerators, 0 for rows that were not measured.
        bottom: ``[n]`` denominators, 0 for rows that were not measured; 1 of a plain mean. A measured row may have 0.
        seen: ``[n]`` whether the row was measured.
        units: ``[n]`` number of the group of each row, or of the row itself.
        grouped: Whether units are groups.
    """

    top: Floats
    bottom: Floats
    seen: NDArray[np.bool_]
    units: NDArray[np.int64]
    grouped: bool

    @property
    def value(self) -> float:
        """The score."""
        return float(self.top.sum() / self.bottom.sum()) if self.bottom.sum() else math.nan

    @property
    def n(self) -> int:
        """Rows that were measured."""
        return int(self.seen.sum())

    @property
    def influence(self) -> Floats:
        """``[n]`` how much each row moves the score; they add up to 0."""
        return (self.top - self.value * self.bottom) / self.bottom.sum()


def rows(values: ArrayLike, groups: ArrayLike | None = None, bottom: ArrayLike | None = None) -> Rows:
    """Rows of a plain mean, or with ``bottom`` of a ratio of sums; NaN is a row that was not measured.

    Args:
        values: ``[n]`` values, or numerators.
        groups: ``[n]`` group of each row, -1 where it has none; groups count where all rows have one and there are at
            least `LEAST_GROUPS` of them.
        bottom: ``[n]`` denominators.

    Example:
        >>> rows([0.5, float("nan"), 1.0]).value, rows([1.0, 2.0], bottom=[2.0, 4.0]).value
        (0.75, 0.5)
    """
    top = np.asarray(values, np.float64)
    under = np.ones(len(top)) if bottom is None else np.asarray(bottom, np.float64)
    seen = ~np.isnan(top) & ~np.isnan(under)
    units, grouped = np.arange(len(top)), False
    if groups is not None and len(top):
        known = np.asarray(groups, np.int64)
        if np.all(known >= 0) and len(np.unique(known[seen])) >= LEAST_GROUPS:
            units, grouped = known, True
    return Rows(np.where(seen, top, 0.0), np.where(seen, under, 0.0), seen, units, grouped)


@dataclass(frozen=True)
class Estimate:
    """A value with the two one-sided bounds of a level: below ``low`` and above ``high`` it is ruled out.

    Args:
        value: The estimate.
        low: Lower bound.
        high: Upper bound.
        n: Rows of the smaller side.
        units: Groups (or rows) behind the interval, of the smaller side.
        grouped: Whether units are groups.
    """

    value: float
    low: float
    high: float
    n: int
    units: int
    grouped: bool = False

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))


def settle(found: Estimate, least: float | None, most: float | None) -> tuple[Outcome, Literal["", "above", "below"]]:
    """What two one-sided tests say: inside the margins, outside on one side, or neither.

    Inside on both sides at once is Schuirmann's TOST (1987) at the level of each bound; with one margin it is a test of
    non-inferiority.

    Example:
        >>> settle(Estimate(0.01, -0.02, 0.04, 100, 100), -0.05, 0.05)
        ('passed', '')
        >>> settle(Estimate(0.2, 0.1, 0.3, 100, 100), None, 0.05), settle(Estimate(0.0, -0.1, 0.1, 9, 9), None, 0.05)
        (('failed', 'above'), ('not shown', ''))
    """
    if not all(map(math.isfinite, (found.value, found.low, found.high))):
        return "not shown", ""
    if (least is None or found.low >= least) and (most is None or found.high <= most):
        return "passed", ""
    if most is not None and found.low > most:
        return "failed", "above"
    if least is not None and found.high < least:
        return "failed", "below"
    return "not shown", ""


Part = tuple[Floats, NDArray, bool]  # influence of each row, its unit, whether units are groups


def _linear(value: float, parts: Sequence[Part], n: int, level: float, floor: float = 0.0) -> Estimate:
    """An estimate from influences; each part has units of its own. ``floor`` is a least variance."""
    from scipy import stats

    variances, freedom, counts = [], [], []
    for influence, units, _ in parts:
        seen, place = np.unique(units, return_inverse=True)
        many = len(seen)
        sums = np.bincount(place, weights=influence, minlength=many)
        variances.append(many / (many - 1) * float(((sums - sums.mean()) ** 2).sum()) if many > 1 else math.inf)
        freedom.append(max(many - 1, 1))
        counts.append(many)
    total = sum(variances)
    below = sum(v**2 / d for v, d in zip(variances, freedom, strict=True)) if math.isfinite(total) else 0.0
    degrees = total**2 / below if below > 0 else min(freedom)  # Welch and Satterthwaite
    half = float(stats.t.ppf(1 - level, degrees)) * math.sqrt(max(total, floor))
    return Estimate(value, value - half, value + half, n, min(counts), any(grouped for *_, grouped in parts))


def _measured(part: Floats, of: Rows) -> Part:
    return part[of.seen], of.units[of.seen], of.grouped


def _both(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """The rows that both have measured."""
    if len(a.top) != len(b.top):
        raise ValueError("paired rows need two measurements of the same rows")
    seen = a.seen & b.seen
    cut = [Rows(x.top * seen, x.bottom * seen, seen, x.units, x.grouped) for x in (a, b)]
    return cut[0], cut[1]


def difference(a: Rows, b: Rows, *, paired: bool, level: float = 0.05) -> Estimate:
    """``a`` minus ``b``: of the same rows (``paired``), or of two sides; of probabilities or shares.

    Example:
        >>> found = difference(rows([0.2] * 30 + [0.4] * 30), rows([0.1] * 60), paired=True)
        >>> round(found.value, 3), found.n, found.low < 0.2 < found.high
        (0.2, 60, True)
    """
    if paired:
        a, b = _both(a, b)
        return _never_certain(_linear(a.value - b.value, [_measured(a.influence - b.influence, a)], a.n, level), level)
    parts = [_measured(a.influence, a), _measured(b.influence, b)]
    return _never_certain(_linear(a.value - b.value, parts, min(a.n, b.n), level), level)


def _never_certain(found: Estimate, level: float) -> Estimate:
    """Rows that all agree (no row leaks by either model) have no spread; the next one may differ, by up to 1."""
    if found.low < found.high or not found.n:
        return found
    half = 1 - level ** (1 / found.n)  # exact bound of a share of which no row was seen
    return dataclasses.replace(found, low=found.value - half, high=found.value + half)


def ratio(a: Rows, b: Rows, *, level: float = 0.05) -> Estimate:
    """``a`` over ``b`` on the same rows, by the delta method: for ratios near 1 of scores far from 0.

    Example:
        >>> round(ratio(rows([0.4, 0.5, 0.6]), rows([0.5, 0.5, 0.5])).value, 3)
        1.0
    """
    a, b = _both(a, b)
    if not b.value > 0:
        return Estimate(math.nan, math.nan, math.nan, a.n, a.n)
    share = a.value / b.value
    return _linear(share, [_measured((a.influence - share * b.influence) / b.value, a)], a.n, level)


def harmonic_ratio(
    a: Mapping[str, Rows], b: Mapping[str, Rows], sides: Mapping[str, str], *, level: float = 0.05
) -> Estimate:
    """Harmonic mean of several scores over that of the same scores of another model, on the same rows.

    Args:
        a: Part -> its rows, all of them also in ``b``.
        b: The same of the other model.
        sides: Part -> the set of rows that it is of: parts of one set move together.
        level: Of each one-sided bound.
    """
    both = {name: _both(a[name], b[name]) for name in a}
    values = np.array([[x.value, y.value] for x, y in both.values()])
    if not np.all(values > 0):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean_a, mean_b = len(values) / (1 / values).sum(0)
    share = mean_a / mean_b
    parts: dict[str, Part] = {}
    for name, (x, y) in both.items():
        slope_a, slope_b = mean_a**2 / (len(both) * x.value**2), mean_b**2 / (len(both) * y.value**2)
        own = (slope_a * x.influence - share * slope_b * y.influence) / mean_b
        before = parts.get(sides[name])
        parts[sides[name]] = (own if before is None else before[0] + own, x.units, x.grouped)
    return _linear(float(share), list(parts.values()), min(x.n for x, _ in both.values()), level)


def _placements(positive: Rows, negative: Rows) -> tuple[float, Floats, Floats]:
    """The AUC, and the influence of each positive and each negative on it; ties count half."""
    up, un = positive.seen, negative.seen
    p, q = positive.top[up], negative.top[un]
    if not len(p) or not len(q):
        raise ValueError("an AUC needs rows on both sides")
    p_sorted, q_sorted = np.sort(p), np.sort(q)
    of_p = (np.searchsorted(q_sorted, p, "left") + np.searchsorted(q_sorted, p, "right")) / (2 * len(q))
    of_q = 1 - (np.searchsorted(p_sorted, q, "left") + np.searchsorted(p_sorted, q, "right")) / (2 * len(p))
    area = float(of_p.mean())
    moved_p, moved_q = np.zeros(len(up)), np.zeros(len(un))
    moved_p[up], moved_q[un] = (of_p - area) / len(p), (of_q - area) / len(q)
    return area, moved_p, moved_q


def _least_variance(area: float, n: int, m: int) -> float:
    """Variance of an AUC of exactly 0 or 1, where ranks show none: Hanley and McNeil (1982), half a row inside."""
    if 0 < area < 1:
        return 0.0
    inside = 1 - 0.5 / min(n, m)
    one, two = inside / (2 - inside), 2 * inside**2 / (1 + inside)
    spread = inside * (1 - inside) + (n - 1) * (one - inside**2) + (m - 1) * (two - inside**2)
    return max(spread, 0.0) / (n * m)


def auc(positive: Rows, negative: Rows, *, same: bool = False, level: float = 0.05) -> Estimate:
    """Chance that a positive scores above a negative; ``same``: both are measurements of the same rows.

    Example:
        >>> found = auc(rows(np.arange(40.0) + 4), rows(np.arange(40.0)))
        >>> round(found.value, 2), found.low < 0.5 < found.high
        (0.59, True)
    """
    area, of_p, of_q = _placements(positive, negative)
    floor = _least_variance(area, positive.n, negative.n)
    parts = [_measured(of_p + of_q, positive)] if same else [_measured(of_p, positive), _measured(of_q, negative)]
    return _on_logits(_linear(area, parts, min(positive.n, negative.n), level, floor))


def _on_logits(found: Estimate) -> Estimate:
    """The bounds of an AUC, taken on its logit: near 0 and 1 the plain ones are too short on the inner side."""
    inside = min(max(found.value, 0.25 / found.n), 1 - 0.25 / found.n)
    half = (found.high - found.value) / (inside * (1 - inside))
    middle = math.log(inside / (1 - inside))
    low, high = (1 / (1 + math.exp(min(-(middle + sign * half), 700.0))) for sign in (-1, 1))
    return dataclasses.replace(found, low=min(low, found.value), high=max(high, found.value))


def auc_difference(
    positive: Rows, negative: Rows, other_positive: Rows, other_negative: Rows, *, level: float = 0.05
) -> Estimate:
    """AUC by one model minus that by another, on the same positives and the same negatives.

    Example:
        >>> member, stranger = rows(np.arange(30.0)), rows(np.arange(30.0))
        >>> found = auc_difference(member, stranger, member, stranger)
        >>> found.value, found.low, found.high
        (0.0, 0.0, 0.0)
    """
    positive, other_positive = _both(positive, other_positive)
    negative, other_negative = _both(negative, other_negative)
    area, of_p, of_q = _placements(positive, negative)
    theirs, their_p, their_q = _placements(other_positive, other_negative)
    parts = [_measured(of_p - their_p, positive), _measured(of_q - their_q, negative)]
    n, m = positive.n, negative.n
    floor = abs(_least_variance(area, n, m) - _least_variance(theirs, n, m))
    return _linear(area - theirs, parts, min(n, m), level, floor)
