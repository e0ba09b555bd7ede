"""When to stop: a rule with two sides that needs no gold, and the way back to the best weights that it saw.

Unlearning that runs on drives the forgotten rows further down than rows that were never seen, which is a trace by
itself. So the forgotten rows are held against never-seen ones while the run goes on: admissible are weights under which
the two cannot be told apart by their likelihood and the retained rows are as good as they were.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from excise import files, recipe
from excise.between import Stretch

#: Where a rule's folder says what it counts from, if a model that never saw the forgotten rows was asked.
BEGINNING = "never_saw.json"
#: Where looks may be rare, they are at most so many times ``every`` apart.
STRIDE = 4
#: How near to what it aims at a search ends, as a share of the band's width.
CLOSE = 0.1


@dataclass(frozen=True)
class Check:
    """What was seen after a step: forgotten rows against never-seen ones, and the retained.

    Attributes:
        step: Optimiser steps so far; between two of them where weights on the way were looked at.
        auc: `matched.matched_auc`; a half where the two meet, or are as far apart as for who never saw either.
        quality: Probability of the retained, 1 = before. Outside the band they decide nothing and are not read: None.
        gap: `matched.matched_gap`; 0 where the two meet. None in runs of a time before it was kept.
        f1: Strict F1 of the forgotten rows' entities less that of never-seen ones, where the rule goes by it.
        at: Of a mix the step after which it was looked at, which is the later end of the way; else None.
    """

    step: float
    auc: float
    quality: float | None
    gap: float | None = None
    at: int | None = None
    f1: float | None = None


def aimed(check: Check, settings: recipe.Stop) -> float:
    """The statistic that the rule looks at."""
    value = {"auc": check.auc, "gap": check.gap, "f1": check.f1}[settings.statistic]
    return math.nan if value is None else value


def middle(settings: recipe.Stop) -> float:
    """What the rule aims at: the middle of its band."""
    return sum(settings.band) / 2


def close(settings: recipe.Stop) -> float:
    """How near to its aim a search ends: `CLOSE` of the band's width."""
    return CLOSE * (settings.band[1] - settings.band[0])


def inside(check: Check, settings: recipe.Stop) -> bool:
    """Whether the statistic is in the band, so that the retained rows decide."""
    low, high = settings.band
    return low <= aimed(check, settings) <= high


def admissible(check: Check, settings: recipe.Stop) -> bool:
    """Whether weights may be kept: inside the band, and the retained as good as demanded."""
    return inside(check, settings) and check.quality is not None and check.quality >= settings.quality


def best(checks: Sequence[Check], settings: recipe.Stop) -> Check | None:
    """The admissible check nearest to the middle of the band; the better quality where two are as near."""
    allowed = [c for c in checks if admissible(c, settings)]
    return min(allowed, key=lambda c: (abs(aimed(c, settings) - middle(settings)), -(c.quality or 0.0)), default=None)


def enough(checks: Sequence[Check], settings: recipe.Stop) -> bool:
    """Whether to stop: something admissible was seen, and the run has crossed the middle or no longer comes nearer.

    Where looks are rare (``between``) one at the middle, give or take `CLOSE`, is enough.
    """
    found = best(checks, settings)
    if found is None:
        return False
    later, near = [c for c in checks if c.step > found.step], close(settings) if settings.between else 0.0
    aim = middle(settings)
    there = abs(aimed(found, settings) - aim) <= near or aimed(checks[-1], settings) <= aim
    return there or len(later) >= settings.patience


def passed(checks: Sequence[Check], settings: recipe.Stop) -> bool:
    """Whether the band lies behind for good: nothing was admissible, and ``patience`` looks below it lead further down.

    Only where looks are searched ``between``, so that none was jumped over; after a collapse the looks lead back up.
    """
    late = [aimed(c, settings) for c in checks[-settings.patience - 1 :]]
    if not settings.between or best(checks, settings) is not None or len(late) <= settings.patience:
        return False
    return max(late) < settings.band[0] and late[-1] < late[0]


def due(step: int, checks: Sequence[Check], settings: recipe.Stop) -> bool:
    """Whether to look after this step: as rarely as the band allows, since a look reads several times what a step does.

    With ``between``, every ``every`` steps, and less often (a fourth at most) while the middle is further away at the
    fastest pace of late: what lies between two looks is searched. Without, the statistic must not jump over the band:
    every so often above it, near it after as many steps as would bring it half-way to the middle, inside it and just
    below it after each step. Far below it the way back is as long as it was down.

    Example:
        >>> rule = recipe.Stop(band=(0.45, 0.55), near=0.1, every=5)
        >>> [[s for s in range(11, 16) if due(s, [Check(9, a, 1.0), Check(10, b, 1.0)], rule)]
        ...  for a, b in ((0.9, 0.8), (0.65, 0.63), (0.68, 0.6), (0.6, 0.5))]
        [[15], [13, 14, 15], [11, 12, 13, 14, 15], [11, 12, 13, 14, 15]]
    """
    low, high = settings.band
    late = [(c.step, aimed(c, settings)) for c in checks[-4:]]
    if not late:
        return step % settings.every == 0
    last, value = late[-1]
    fastest = max((abs(v - u) / (t - s) for (s, u), (t, v) in pairwise(late)), default=math.inf)
    there = (value - middle(settings)) / fastest if fastest else math.inf
    if settings.between:
        return step - last >= min(max(there, settings.every), STRIDE * settings.every)
    if max(value - high, low - value) > settings.near:
        return step % settings.every == 0
    return value <= high or step - last >= max(round(min(there / 2, settings.every)), 1)


def crossing(above: tuple[float, float], below: tuple[float, float], aim: float) -> float:
    """Where on the way from one look to another the statistic is what is aimed at, were it to fall in a line.

    Args:
        above: ``(share of the way, statistic)`` of the look above the aim.
        below: The same of the one at or below it, further on.
        aim: The statistic to be met.

    Returns:
        A share of the way, a tenth of the stretch away from either look at least: so that a curve is closed in on.

    Source: regula falsi, kept off the ends.

    Example:
        >>> crossing((0.0, 0.25), (1.0, -0.25), 0.0), crossing((0.0, 0.25), (1.0, 0.0), 0.0)
        (0.5, 0.9)
    """
    (start, high), (end, low) = above, below
    share = (high - aim) / (high - low) if high > low else 0.5
    return start + min(max(share, 0.1), 0.9) * (end - start)


def record(settings: recipe.Stop, folder: Path | None) -> dict[str, Any]:
    """What a run's record says of its stopping rule: every check, and the one whose weights were kept (or none)."""
    path = folder / "checks.json" if folder else None
    if settings.rule == "none" or path is None or not path.is_file():
        return {}
    checks = [Check(**entry) for entry in json.loads(path.read_text())]
    found = best(checks, settings)
    bounds = {"band": list(settings.band), "quality": settings.quality}
    bounds |= {"statistic": settings.statistic} if settings.statistic != "auc" else {}
    began = path.with_name(BEGINNING)
    bounds |= {"never_saw": json.loads(began.read_text())} if began.is_file() else {}
    return {"stopping": {**bounds, "checks": [asdict(c) for c in checks], "kept": found and found.step}}


def clear(folder: Path) -> None:
    """Remove weights that were kept aside: the run's own folder holds the chosen ones now."""
    for kept in folder.glob("step-*"):
        shutil.rmtree(kept)


class Stopping:
    """The rule at work: looks, decides, keeps the best weights aside, and goes back to them.

    Where the recipe searches ``between`` looks, one below the middle after one above it (or one in the band whose
    retained are not good enough) is followed by looks at mixes of both weights; training goes on from the present ones.

    Args:
        model: Whose trained parameters are kept.
        settings: The recipe's section.
        folder: Where checks and the best weights are written.
        look: The model as it is after a step; see `Check` for what may be None.
        steps: Of the run; where looks may be far apart the last is looked at, whenever the one before was.
        writes: Whether this process writes.

    Example:
        >>> import tempfile
        >>> seen = iter([Check(1, 0.9, None), Check(2, 0.52, 0.99), Check(3, 0.3, None)])
        >>> rule = Stopping(nn.Linear(1, 1), recipe.Stop(rule="two_sided", every=1), Path(tempfile.mkdtemp()),
        ...                 lambda step: next(seen))
        >>> [rule(step) for step in (1, 2, 3)], rule.roll_back().step
        ([False, False, True], 2)
    """

    def __init__(
        self,
        model: nn.Module,
        settings: recipe.Stop,
        folder: Path,
        look: Callable[[float], Check],
        *,
        steps: int | None = None,
        writes: bool = True,
    ) -> None:
        self.model, self.settings, self.folder, self.look, self.writes = model, settings, folder, look, writes
        self.last = steps if settings.between else None
        self.checks: list[Check] = []
        self.stretch = Stretch(model)

    @property
    def decided(self) -> bool:
        """Whether the checks so far end the run: an interrupted one may only have weights left to save."""
        return bool(self.checks) and (enough(self.checks, self.settings) or passed(self.checks, self.settings))

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Start after ``step``: what an interrupted run saw later is seen again, to the same numbers."""
        if checkpoint is not None:
            self.stretch.load(checkpoint)
        path = self.folder / "checks.json"
        saved = json.loads(path.read_text()) if path.is_file() else []
        self.checks = [c for c in (Check(**entry) for entry in saved) if (c.at or c.step) <= step]

    def __call__(self, step: int) -> bool:
        """Look if it is time to; true ends the run."""
        if step != self.last and not due(step, self.checks, self.settings):
            return False
        self._see(step)
        if self.settings.between:
            self._search(step)
            self.stretch.begin()
        if self.writes:
            files.write_json(self.folder / "checks.json", [asdict(c) for c in self.checks])
        return self.decided

    def _see(self, step: float, at: int | None = None) -> Check:
        seen = replace(self.look(step), at=at)
        self.checks = sorted([*self.checks, seen], key=lambda c: c.step)
        if best(self.checks, self.settings) is seen:
            self._keep(step)
        return seen

    def _search(self, step: int) -> None:
        """Where the last two looks lie on either side of the aim, look at mixes of their weights until one is there."""
        if len(self.checks) < 2 or not self.stretch.start:
            return
        last, now = self.checks[-2:]
        above, below = (0.0, aimed(last, self.settings)), (1.0, aimed(now, self.settings))
        aim = self._aim(last, self._aim(now, middle(self.settings)))
        if not above[1] > aim > below[1]:
            return
        with self.stretch.walked() as go:
            for _ in range(self.settings.between):
                share = crossing(above, below, aim)
                go(share)
                seen = self._see(round(last.step + share * (now.step - last.step), 3), at=step)
                value = aimed(seen, self.settings)
                if admissible(seen, self.settings) and abs(value - aim) <= close(self.settings):
                    return
                aim = self._aim(seen, aim)
                above, below = ((share, value), below) if value > aim else (above, (share, value))

    def _aim(self, seen: Check, aim: float) -> float:
        """What a search looks for: the middle, or nearer to the upper edge where the retained are harmed there."""
        value, high = aimed(seen, self.settings), self.settings.band[1]
        harmed = inside(seen, self.settings) and not admissible(seen, self.settings)
        return (max(value, aim) + high) / 2 if harmed and value >= aim - close(self.settings) else aim

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint, before it is sealed."""
        self.stretch.save(checkpoint)

    def _keep(self, step: float) -> None:
        if not self.writes:
            return
        weights = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        with files.staged(self._weights(step)) as folder:
            save_file(weights, folder / "weights.safetensors")

    def _weights(self, step: float) -> Path:
        return self.folder / f"step-{step}"

    def roll_back(self) -> Check | None:
        """Load the best weights that were seen; None (and the weights as they are) if none were admissible."""
        found = best(self.checks, self.settings)
        if found is not None:
            files.verify(self._weights(found.step))
            kept = load_file(self._weights(found.step) / "weights.safetensors")
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])
        return found
