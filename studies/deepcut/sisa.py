"""SISA: shards that do not know of each other, each trained slice by slice, so that only what was hit is trained again.

Source: Bourtoule et al. 2021, arXiv 1912.03817. The prediction is the argmax of the averaged logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

SHARDS, SLICES = 3, 2


@dataclass(frozen=True)
class Stage:
    """One training of one shard: on its slices up to ``slice``, from the weights of the stage before.

    Attributes:
        shard: From 0.
        slice: From 0.
        rows: All rows that the stage trains on, forgotten ones left out.
        again: Whether it has to be trained again: a forgotten row is in this slice or in one before it.
    """

    shard: int
    slice: int
    rows: tuple[int, ...]
    again: bool


def stages(
    count: int, forget: Collection[int], *, shards: int = SHARDS, slices: int = SLICES, seed: int = 0
) -> list[Stage]:
    """Every stage of every shard, after ``forget`` of ``count`` rows were taken out.

    A stage that no forgotten row touches has the rows that it had before: its weights would be the same, so what is
    counted as the cost of forgetting is the stages ``again`` alone.

    Example:
        >>> [(s.shard, s.slice, len(s.rows), s.again) for s in stages(8, {0}, shards=2, slices=2)]
        [(0, 0, 1, True), (0, 1, 3, True), (1, 0, 2, False), (1, 1, 4, False)]
    """
    out, order = [], np.random.default_rng([seed, 11]).permutation(count)
    for shard, rows in enumerate(np.array_split(order, shards)):
        parts = np.array_split(rows, slices)
        for number in range(slices):
            own = [int(i) for part in parts[: number + 1] for i in part]
            kept = tuple(i for i in own if i not in forget)
            out.append(Stage(shard, number, kept, len(kept) < len(own)))
    return out


def epochs(whole: float, *, shards: int = SHARDS, slices: int = SLICES) -> float:
    """Epochs of one stage, so that each shard takes as many steps in all as a model on all rows.

    A shard sees ``1 / shards`` of the rows, and its stages ``1 / slices, 2 / slices, ... 1`` of those; with as many
    epochs as a whole model it would be under-trained.

    Example:
        >>> epochs(8, shards=3, slices=2)
        16.0
    """
    return whole * shards / sum((number + 1) / slices for number in range(slices))


def averaged(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Row by row the mean of the shards' logits."""
    return [sum(rows) / len(rows) for rows in zip(*parts, strict=True)]  # type: ignore[misc]
