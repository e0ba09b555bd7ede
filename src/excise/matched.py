"""Forgotten units held against never-seen ones of their kind: by ranks, and by how much probability."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.metrics.statistics import auc


def matched_auc(forget: ArrayLike, forget_kinds: ArrayLike, never: ArrayLike, never_kinds: ArrayLike) -> float:
    """How often a forgotten unit is likelier than a never-seen unit of its kind: 1 before, 1/2 where they meet.

    Args:
        forget: ``[n]`` log-likelihoods of the forgotten units (rows, or entity tokens).
        forget_kinds: ``[n]`` what they are compared within: the type of an entity; one kind for all rows.
        never: ``[m]`` the same of never-seen units.
        never_kinds: ``[m]``.

    Returns:
        The mean over kinds, each counted by its forgotten units; kinds without a never-seen unit are left out. NaN
        where no kind has both.

    Source: ours; AUC as Mann and Whitney's statistic.

    Example:
        >>> matched_auc([3.0, 0.0], [1, 2], [2.0, 1.0], [1, 2])
        0.5
    """
    return _matched(auc, forget, forget_kinds, never, never_kinds)


def matched_gap(forget: ArrayLike, forget_kinds: ArrayLike, never: ArrayLike, never_kinds: ArrayLike) -> float:
    """How much likelier forgotten units are than never-seen units of their kind, as a difference of probabilities.

    Arguments and what is returned as in `matched_auc`; 0 where they meet. What is read off a tagger are its hits, of
    which probabilities say more than ranks (docs/log.md): those are met as well by many tokens that are half known as
    by some that are known and some that are not.

    Source: ours.

    Example:
        >>> round(matched_gap([0.0, -0.7], [1, 2], [-0.7, -0.7], [1, 2]), 2)
        0.25
    """
    probabilities = [np.exp(np.asarray(x, np.float64)) for x in (forget, never)]
    return _matched(_further, probabilities[0], forget_kinds, probabilities[1], never_kinds)


def _further(some: NDArray, others: NDArray) -> float:
    return float(some.mean() - others.mean())


def _matched(
    how: Callable[..., float],
    forget: ArrayLike,
    forget_kinds: ArrayLike,
    never: ArrayLike,
    never_kinds: ArrayLike,
) -> float:
    values, kinds, others, their_kinds = map(np.asarray, (forget, forget_kinds, never, never_kinds))
    shared = [k for k in np.unique(kinds) if (their_kinds == k).any()]
    counts = [int((kinds == k).sum()) for k in shared]
    if not shared:
        return float("nan")
    return float(np.average([how(values[kinds == k], others[their_kinds == k]) for k in shared], weights=counts))
