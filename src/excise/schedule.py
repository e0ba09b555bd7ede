"""Which rows a step reads: a pure function of (seed, step), the same for any number of ranks and after any restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from excise import recipe

#: Sides whose rows stand beside the forget rows, one for one.
ALIGNED = ("forget_alternative", "forget_paraphrase")


@dataclass(frozen=True)
class Draw:
    """Rows of one side in one micro-batch on one rank; ``weight`` 0 marks a row that only evens the ranks out."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """The whole run's batches.

    A batch is what all ranks together see, so results do not change with their number. Forget rows are visited in a
    new order in each epoch, none twice and none left out, in batches of even size; retain rows and any further side
    (general knowledge, for instance) are streams of epochs.

    Attributes:
        rows: Rows of each side that the objective reads; ``forget`` may be absent, and its aligned sides there.
        settings: Batch sizes, accumulation and length.
        seed: Decides every order.

    Example:
        >>> plan = Plan({"forget": 5, "retain": 9}, recipe.Schedule(epochs=1, forget_batch=4, retain_batch=2), seed=0)
        >>> plan.steps, [len(plan.draw(m)["forget"].indices) for m in range(plan.micro_steps)]
        (2, [2, 3])
    """

    rows: dict[str, int]
    settings: recipe.Schedule
    seed: int = 0

    @property
    def _forgetting(self) -> list[str]:
        """The forget side and those aligned with it, as far as they are read (refusals may be, without the rows)."""
        return [side for side in ("forget", *ALIGNED) if side in self.rows]

    @property
    def anchor(self) -> str:
        """The side that epochs are counted over."""
        if self._forgetting:
            return "forget"
        return "retain" if "retain" in self.rows else next(iter(self.rows))

    def _count(self, side: str) -> int:
        return self.rows[self._forgetting[0]] if side == "forget" else self.rows[side]

    def _batch(self, side: str) -> int:
        return self.settings.forget_batch if side == "forget" else self.settings.retain_batch

    @property
    def micro_per_epoch(self) -> int:
        """Micro-batches that visit every row of the anchor side once (a whole number of optimizer steps)."""
        accumulate = self.settings.accumulate
        return math.ceil(self._count(self.anchor) / (self._batch(self.anchor) * accumulate)) * accumulate

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.settings.steps is not None:
            return self.settings.steps
        own = self.micro_per_epoch // self.settings.accumulate
        return max(1, round(self.settings.epochs * own)) * (1 + self._extra)

    @property
    def micro_steps(self) -> int:
        """Micro-batches of the run."""
        return self.steps * self.settings.accumulate

    @property
    def _extra(self) -> int:
        return self.settings.retain_steps if self.anchor == "forget" and len(self.rows) > len(self._forgetting) else 0

    def draw(self, micro: int, rank: int = 0, world: int = 1) -> dict[str, Draw]:
        """Rows of every side that is present in micro-batch ``micro``, as ``rank`` of ``world`` sees them."""
        step, part = divmod(micro, self.settings.accumulate)
        cycle, place = divmod(step, 1 + self._extra)
        out: dict[str, Draw] = {}
        if self._forgetting and place == 0:
            indices = self._anchored("forget", cycle * self.settings.accumulate + part)
            out = dict.fromkeys(self._forgetting, _share(indices, rank, world))
        for side in [s for s in self.rows if s not in self._forgetting]:
            rows = self._anchored(side, micro) if side == self.anchor else self._stream(side, micro)
            out[side] = _share(rows, rank, world)
        return {side: draw for side, draw in out.items() if draw.indices}

    def _anchored(self, side: str, micro: int) -> list[int]:
        epoch, part = divmod(micro, self.micro_per_epoch)
        order, batch = self._order(side, epoch), self._batch(side)
        # Spread the rows evenly, so that the last micro-batches of an epoch are neither empty nor tiny.
        count, parts = len(order), self.micro_per_epoch
        if count >= parts * batch or parts == 1:
            return [int(i) for i in order[part * batch : (part + 1) * batch]]
        return [int(i) for i in order[part * count // parts : (part + 1) * count // parts]]

    def _stream(self, side: str, micro: int) -> list[int]:
        batch = self.settings.retain_batch
        count, start = self.rows[side], micro * batch
        return [int(self._order(side, (start + i) // count)[(start + i) % count]) for i in range(batch)]

    def _order(self, side: str, epoch: int) -> np.ndarray:
        return _permutation(self._count(side), self.seed, side, epoch)


@lru_cache(maxsize=64)
def _permutation(count: int, seed: int, side: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, *side.encode()]).permutation(count)


def _share(indices: list[int], rank: int, world: int) -> Draw:
    """Every ``world``-th row; ranks that would get fewer repeat a row with weight 0."""
    if world == 1 or not indices:
        return Draw(tuple(indices), (1.0,) * len(indices))
    each = math.ceil(len(indices) / world)
    own = indices[rank::world]
    filler = [own[0] if own else indices[0]] * (each - len(own))
    return Draw(tuple(own + filler), (1.0,) * len(own) + (0.0,) * len(filler))
