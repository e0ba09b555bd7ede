"""Orders of rows by (seed, name, epoch): streams that never repeat within an epoch, and class-balanced draws."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np


@lru_cache(maxsize=64)
def order(count: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """The rows 0 to ``count - 1`` in the order of an epoch.

    Example:
        >>> sorted(order(3, 0, "retain", 1).tolist())
        [0, 1, 2]
    """
    return np.random.default_rng([seed, epoch, *name.encode()]).permutation(count)


def stream(count: int, seed: int, name: str, start: int) -> Iterator[int]:
    """Epoch after epoch from the place ``start`` on, without end.

    Example:
        >>> list(islice(stream(5, 0, "retain", 2), 2)) == list(islice(stream(5, 0, "retain", 0), 4))[2:]
        True
    """
    while True:
        yield int(order(count, seed, name, start // count)[start % count])
        start += 1


def distinct(count: int, seed: int, name: str, start: int, last: Collection[int] = ()) -> Iterator[int]:
    """Each of the rows once, as the stream brings them; those in ``last`` after all others.

    Example:
        >>> rows = list(distinct(5, 0, "contrast", 2, last={3}))
        >>> sorted(rows), rows[-1]
        ([0, 1, 2, 3, 4], 3)
    """
    seen: set[int] = set()
    for wanted in (False, True):
        for row in islice(stream(count, seed, name, start), 2 * count):  # what is left of an epoch, and a whole one
            if len(seen) < count and row not in seen and (row in last) is wanted:
                seen.add(row)
                yield row


@dataclass(frozen=True)
class Groups:
    """Rows by class: ``members[g]`` are the rows of a group, ``of_row[i]`` the groups of a row.

    Rows without a class are a group of their own.

    Example:
        >>> Groups.of([(1,), (1, 2), ()]).members
        ((2,), (0, 1), (1,))
    """

    members: tuple[tuple[int, ...], ...]
    of_row: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(classes: Sequence[tuple[int, ...]]) -> Groups:
        """From the classes of each row."""
        given = [tuple(sorted(set(own))) or (None,) for own in classes]
        names = sorted({name for own in given for name in own}, key=lambda name: -1 if name is None else name)
        place = {name: g for g, name in enumerate(names)}
        members: list[list[int]] = [[] for _ in names]
        for row, own in enumerate(given):
            for name in own:
                members[place[name]].append(row)
        return Groups(tuple(map(tuple, members)), tuple(tuple(place[name] for name in own) for own in given))

    def draw(self, turn: int, size: int, *, seed: int, name: str, last: Collection[int] = ()) -> list[int]:
        """``size`` rows, none twice: each next one is of a group that occurs least among those drawn so far.

        So each group occurs in at least ``size // len(members)`` of them, as far as it has so many rows; a row that has
        several classes counts for each. All rows where there are fewer than ``size``.

        Args:
            turn: The number of the draw; each begins its groups where even draws before it would have ended.
            size: Rows to draw.
            seed: Decides the orders.
            name: Of the stream.
            last: Rows to take of a group only when it has no others.
        """
        groups = range(len(self.members))
        ties = np.random.default_rng([seed, turn, *name.encode()]).permutation(len(self.members)).tolist()
        start = turn * math.ceil(size / len(self.members))
        left = {g: self._walk(g, seed, f"{name}/{g}", start, last) for g in groups}
        occurs, out = [0] * len(self.members), dict[int, None]()
        while left and len(out) < size:
            group = min(left, key=lambda g: (occurs[g], ties[g]))
            row = next((row for row in left[group] if row not in out), None)
            if row is None:
                del left[group]
                continue
            out[row] = None
            for g in self.of_row[row]:
                occurs[g] += 1
        return list(out)

    def _walk(self, group: int, seed: int, name: str, start: int, last: Collection[int]) -> Iterator[int]:
        rows = self.members[group]
        held = {place for place, row in enumerate(rows) if row in last} if last else ()
        return (rows[place] for place in distinct(len(rows), seed, name, start, held))
