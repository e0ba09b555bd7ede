"""Which rows a step reads: a pure function of (seed, step), the same for any number of ranks and after any restart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice

from excise import recipe
from excise.draws import Groups, distinct, order, stream
from excise.errors import UsageError

#: Sides whose rows stand beside the forget rows, one for one.
ALIGNED = ("forget_alternative", "forget_paraphrase")
#: Retain rows that only serve as contrast, by a name of their own: their numbers are those of ``retain``.
CONTRAST = "contrast"
#: Rows that no model was trained on: what forget rows are to become like.
NEVER_SEEN = "never_seen"


@dataclass(frozen=True)
class Draw:
    """Rows of one side in one micro-batch on one rank; ``weight`` 0 marks a row that only evens the ranks out."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """The whole run's batches.

    A batch is what all ranks together see, so results do not change with their number. Forget rows are visited in a
    new order in each epoch, none twice and none left out, in batches of even size; retain rows, never-seen ones and any
    further side (general knowledge, for instance) are streams of epochs. In ``mixed`` batches epochs are those of both
    together.

    Attributes:
        rows: Rows of each side that the objective reads; ``forget`` may be absent, and its aligned sides there.
            ``contrast`` is the retain side again, for terms that only contrast with its rows.
        settings: Batch sizes, composition, accumulation and length.
        seed: Decides every order.
        classes: Classes of each row of ``retain``, where the settings balance by them; without the class that nearly
            every row has (O).

    Raises:
        UsageError: Settings that contradict each other, or that need classes or contrast rows which are not there.

    Example:
        >>> plan = Plan({"forget": 5, "retain": 9}, recipe.Schedule(epochs=1, forget_batch=4, retain_batch=2), seed=0)
        >>> plan.steps, [len(plan.draw(m)["forget"].indices) for m in range(plan.micro_steps)]
        (2, [2, 3])
    """

    rows: Mapping[str, int]
    settings: recipe.Schedule
    seed: int = 0
    classes: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        how, reads = self.settings, self.rows
        if how.mixed and (how.retain_steps or how.balance == "classes"):
            raise UsageError("schedule.mixed draws natural batches: leave out retain_steps, and balance: classes")
        if CONTRAST in reads and how.contrast_batch < 1:
            raise UsageError("the objective reads contrast rows: set schedule.contrast_batch to 1 or more")
        if how.contrast_batch > 0 and CONTRAST not in reads and self._forgetting:
            raise UsageError(
                "schedule.contrast_batch: no term reads contrast rows: set deepcut's contrast: drawn or both"
            )
        for side in (s for s in ("retain", CONTRAST) if s in reads and self._balanced(s)):
            if len(self.classes.get("retain", ())) != reads[side]:
                raise UsageError(
                    f"schedule.balance: {how.balance} needs the classes of each retain row: only classifiers"
                )

    # --- length ---------------------------------------------------------------------------------------------------

    @property
    def _forgetting(self) -> list[str]:
        """The forget side and those aligned with it, as far as they are read (refusals may be, without the rows)."""
        return [side for side in ("forget", *ALIGNED) if side in self.rows]

    @property
    def anchor(self) -> str:
        """The side that epochs are counted over; in mixed batches ``"forget+retain"``, which is both."""
        if self._mixed:
            return "forget+retain"
        if self._forgetting:
            return "forget"
        return "retain" if "retain" in self.rows else next(iter(self.rows))

    @property
    def _mixed(self) -> bool:
        return self.settings.mixed and bool(self._forgetting) and "retain" in self.rows

    def _count(self, side: str) -> int:
        if side == "forget+retain":
            return self._count("forget") + self._count("retain")
        return self.rows[self._forgetting[0]] if side == "forget" else self.rows[side]

    def _batch(self, side: str) -> int:
        how = self.settings
        sizes = {"forget": how.forget_batch, "forget+retain": how.forget_batch + how.retain_batch}
        return {**sizes, CONTRAST: how.contrast_batch, NEVER_SEEN: how.never_seen_batch}.get(side) or how.retain_batch

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
        others = set(self.rows) - {*self._forgetting, CONTRAST}
        return self.settings.retain_steps if self.anchor == "forget" and others else 0

    # --- rows -----------------------------------------------------------------------------------------------------

    def draw(self, micro: int, rank: int = 0, world: int = 1) -> dict[str, Draw]:
        """Rows of every side that is present in micro-batch ``micro``, as ``rank`` of ``world`` sees them."""
        step, part = divmod(micro, self.settings.accumulate)
        cycle, place = divmod(step, 1 + self._extra)
        rows: dict[str, list[int]] = {}
        if self._mixed:
            rows = self._mixture(micro)
        elif self._forgetting and place == 0:
            rows = dict.fromkeys(self._forgetting, self._anchored("forget", cycle * self.settings.accumulate + part))
        forgets = any(rows.get(side) for side in self._forgetting)
        for side in [s for s in self.rows if s not in (*self._forgetting, *rows)]:
            if side != CONTRAST:
                rows[side] = self._anchored(side, micro) if side == self.anchor else self._further(side, step, part)
            elif forgets:
                rows[side] = self._further(side, step, part)
        return {side: _share(rows[side], rank, world) for side in rows if rows[side]}

    def visited(self) -> dict[str, list[int]]:
        """The rows of each side that the run reads at all: few steps read a part of a large side.

        Example:
            >>> plan = Plan({"forget": 2, "retain": 9}, recipe.Schedule(steps=2, forget_batch=1, retain_batch=3))
            >>> len(plan.visited()["retain"])
            6
        """
        seen: dict[str, set[int]] = {side: set() for side in self.rows}
        for micro in range(self.micro_steps):
            for side, draw in self.draw(micro).items():
                seen[side].update(draw.indices)
            if all(len(seen[side]) == count for side, count in self.rows.items()):
                break
        return {side: sorted(rows) for side, rows in seen.items()}

    def _anchored(self, side: str, micro: int) -> list[int]:
        epoch, part = divmod(micro, self.micro_per_epoch)
        count, parts, batch = self._count(side), self.micro_per_epoch, self._batch(side)
        rows = order(count, self.seed, side, epoch)
        # Spread the rows evenly, so that the last micro-batches of an epoch are neither empty nor tiny.
        if count >= parts * batch or parts == 1:
            return [int(i) for i in rows[part * batch : (part + 1) * batch]]
        return [int(i) for i in rows[part * count // parts : (part + 1) * count // parts]]

    def _mixture(self, micro: int) -> dict[str, list[int]]:
        """Forget and retain rows of a natural batch; the forget rows come first in the numbers of both together."""
        rows, first = self._anchored("forget+retain", micro), self._count("forget")
        forget, retain = [i for i in rows if i < first], [i - first for i in rows if i >= first]
        return {**{side: forget for side in self._forgetting}, "retain": retain}

    def _further(self, side: str, step: int, part: int) -> list[int]:
        """A micro-batch's part of what the step reads of a side: however a step is cut, it reads the same rows."""
        batch = self._batch(side)
        return self._of_step(side, step)[part * batch : (part + 1) * batch]

    def _of_step(self, side: str, step: int) -> list[int]:
        size = self._batch(side) * self.settings.accumulate
        turn, last = (step // (1 + self._extra), self._retained(step)) if side == CONTRAST else (step, set())
        if self._balanced(side):
            return self._groups.draw(turn, size, seed=self.seed, name=side, last=last)
        drawn = stream if side != CONTRAST else partial(distinct, last=last)
        return list(islice(drawn(self.rows[side], self.seed, side, turn * size), size))

    def _retained(self, step: int) -> set[int]:
        """Rows of the step's retain batch: as contrast too they would count twice."""
        if "retain" not in self.rows:
            return set()
        micros = range(step * self.settings.accumulate, (step + 1) * self.settings.accumulate)
        return (
            {i for micro in micros for i in self._mixture(micro)["retain"]}
            if self._mixed
            else set(self._of_step("retain", step))
        )

    def _balanced(self, side: str) -> bool:
        if side == "retain":
            return self.settings.balance == "classes" and side != self.anchor
        return self.settings.balance != "none" and side == CONTRAST

    @cached_property
    def _groups(self) -> Groups:
        return Groups.of(self.classes["retain"])


def _share(indices: list[int], rank: int, world: int) -> Draw:
    """Every ``world``-th row; ranks that would get fewer repeat a row with weight 0."""
    if world == 1 or not indices:
        return Draw(tuple(indices), (1.0,) * len(indices))
    each = math.ceil(len(indices) / world)
    own = indices[rank::world]
    filler = [own[0] if own else indices[0]] * (each - len(own))
    return Draw(tuple(own + filler), (1.0,) * len(own) + (0.0,) * len(filler))
