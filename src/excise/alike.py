"""Which never-seen rows are as easy as the forgotten ones: what rows are about makes some likelier to everybody.

Unlearning aims at what a model would say that never saw the rows, and reads that off never-seen rows. Where those are
about other things, the aim is off by as much. A model that saw neither says how hard each is; a smaller one will do.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise import draws
from excise.metrics.statistics import auc

#: How far from a half the share of pairs may be in which a forgotten row is the likelier, for rows to count as alike.
NEAR = 0.02


def alike(forget: ArrayLike, never: ArrayLike, *, seed: int = 0) -> list[int]:
    """The never-seen rows to read, at most half of them: those whose likelihoods are nearest to the forgotten rows'.

    The forgotten rows take turns, in an order drawn by ``seed``, each with the nearest row that is still free; it ends
    after as many rounds as leave the two alike (`NEAR`), after one if none does.

    Args:
        forget: ``[n]`` mean log-likelihood per token of each forgotten row, by a model that never saw it.
        never: ``[m]`` the same of the never-seen rows; at least two.
        seed: Of the order.

    Returns:
        Their numbers, ascending: a whole multiple of ``n``, or ``m // 2`` where there are fewer than ``2 n``.

    Source: ours; nearest-neighbour matching without replacement, Rubin 1973.

    Example:
        >>> alike([-1.0, -3.0], [-9.0, -3.1, -1.2, -0.1])
        [1, 2]
    """
    mine, others = np.asarray(forget, np.float64), np.asarray(never, np.float64)
    most = len(others) // 2
    chosen = _nearest(mine, others, most // len(mine) * len(mine) or most, seed)
    while len(chosen) > len(mine) and abs(auc(mine, others[chosen]) - 0.5) > NEAR:
        chosen = chosen[: -len(mine)]
    return sorted(chosen.tolist())


def _nearest(mine: NDArray, others: NDArray, count: int, seed: int) -> NDArray[np.int64]:
    free, chosen = others.copy(), []
    for row in islice(draws.stream(len(mine), seed, "alike", 0), count):
        chosen.append(int(np.argmin(np.abs(free - mine[row]))))
        free[chosen[-1]] = np.inf
    return np.array(chosen, np.int64)
