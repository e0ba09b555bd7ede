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
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from excise import files, recipe
from excise.averaging import Window
from excise.metrics.statistics import auc


@dataclass(frozen=True)
class Check:
    """What was seen after a step: forgotten rows against never-seen ones, and the retained.

    Attributes:
        step: Optimiser steps so far.
        auc: `matched_auc`; a half where the two meet.
        quality: Probability of the retained, 1 = before. Outside the band they decide nothing and are not read: None.
        gap: `matched_gap`; 0 where the two meet. None in runs of a time before it was kept.
    """

    step: int
    auc: float
    quality: float | None
    gap: float | None = None


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


def aimed(check: Check, settings: recipe.Stop) -> float:
    """The statistic that the rule looks at."""
    value = check.gap if settings.statistic == "gap" else check.auc
    return math.nan if value is None else value


def inside(check: Check, settings: recipe.Stop) -> bool:
    """Whether the statistic is in the band, so that the retained rows decide."""
    low, high = settings.band
    return low <= aimed(check, settings) <= high


def admissible(check: Check, settings: recipe.Stop) -> bool:
    """Whether weights may be kept: inside the band, and the retained as good as demanded."""
    return inside(check, settings) and check.quality is not None and check.quality >= settings.quality


def best(checks: Sequence[Check], settings: recipe.Stop) -> Check | None:
    """The admissible check nearest to the middle of the band; the better quality where two are as near."""
    middle = sum(settings.band) / 2
    allowed = [c for c in checks if admissible(c, settings)]
    return min(allowed, key=lambda c: (abs(aimed(c, settings) - middle), -(c.quality or 0.0)), default=None)


def enough(checks: Sequence[Check], settings: recipe.Stop) -> bool:
    """Whether to stop: something admissible was seen, and the run has crossed the middle or no longer comes nearer."""
    found = best(checks, settings)
    if found is None:
        return False
    later = [c for c in checks if c.step > found.step]
    return aimed(checks[-1], settings) <= sum(settings.band) / 2 or len(later) >= settings.patience


def due(step: int, checks: Sequence[Check], settings: recipe.Stop) -> bool:
    """Whether to look after this step: every so often, and near the band before it could be half-way to its middle.

    A look reads some hundreds of rows, several times what a step reads; yet the statistic falls by some hundredths a
    step where it matters, so a coarse rule would jump over the band. How fast it moves says how soon to look again:
    inside the band and just below it after each step, above it after as many as would bring it half-way to the
    middle, where it is aimed, at its fastest of late. Far below it the way back is as long as it was down.

    Example:
        >>> rule = recipe.Stop(band=(0.45, 0.55), near=0.1, every=5)
        >>> [[s for s in range(11, 16) if due(s, [Check(9, a, 1.0), Check(10, b, 1.0)], rule)]
        ...  for a, b in ((0.9, 0.8), (0.65, 0.63), (0.68, 0.6), (0.6, 0.5))]
        [[15], [13, 14, 15], [11, 12, 13, 14, 15], [11, 12, 13, 14, 15]]
    """
    (low, high), middle = settings.band, sum(settings.band) / 2
    late = [(c.step, aimed(c, settings)) for c in checks[-4:]]
    if not late or max(late[-1][1] - high, low - late[-1][1]) > settings.near:
        return step % settings.every == 0
    last, value = late[-1]
    if value <= high:
        return True
    fastest = max((abs(v - u) / (t - s) for (s, u), (t, v) in pairwise(late)), default=math.inf)
    gap = round((value - middle) / 2 / fastest) if fastest else settings.every
    return step - last >= min(max(gap, 1), settings.every)


def pace(checks: Sequence[Check], settings: recipe.Stop) -> float:
    """The share of the learning rate for the step to come: finer steps while the last check was near the band.

    Near on either side: far below it (a collapse at the start) the way back is as long as it was down.

    Example:
        >>> rule = recipe.Stop(band=(0.45, 0.55), near=0.1, finer=0.25)
        >>> [pace([Check(1, auc, 1.0)], rule) for auc in (0.9, 0.6, 0.2)], pace([], rule)
        ([1.0, 0.25, 1.0], 1.0)
    """
    low, high = settings.band
    near = bool(checks) and low - settings.near <= aimed(checks[-1], settings) <= high + settings.near
    return settings.finer if near else 1.0


def record(settings: recipe.Stop, folder: Path | None) -> dict[str, Any]:
    """What a run's record says of its stopping rule: every check, and the one whose weights were kept (or none)."""
    path = folder / "checks.json" if folder else None
    if settings.rule == "none" or path is None or not path.is_file():
        return {}
    checks = [Check(**entry) for entry in json.loads(path.read_text())]
    found = best(checks, settings)
    bounds = {"band": list(settings.band), "quality": settings.quality}
    bounds |= {key: getattr(settings, key) for key in ("average", "finer") if getattr(settings, key) != 1}
    bounds |= {"statistic": settings.statistic} if settings.statistic != "auc" else {}
    return {"stopping": {**bounds, "checks": [asdict(c) for c in checks], "kept": found and found.step}}


def clear(folder: Path) -> None:
    """Remove weights that were kept aside: the run's own folder holds the chosen ones now."""
    for kept in folder.glob("step-*"):
        shutil.rmtree(kept)


class Stopping:
    """The rule at work: looks, decides, keeps the best weights aside, and goes back to them.

    Where the recipe averages, what is looked at, judged and kept is the mean of the last few steps' weights; training
    goes on from the present ones.

    Args:
        model: Whose trained parameters are kept.
        settings: The recipe's section.
        folder: Where checks and the best weights are written.
        look: The model as it is after a step; see `Check` for what may be None.
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
        look: Callable[[int], Check],
        *,
        writes: bool = True,
    ) -> None:
        self.model, self.settings, self.folder, self.look, self.writes = model, settings, folder, look, writes
        self.checks: list[Check] = []
        self.window = Window(model, settings.average)

    @property
    def decided(self) -> bool:
        """Whether the checks so far already end the run: an interrupted one may only have weights left to save."""
        return bool(self.checks) and enough(self.checks, self.settings)

    def pace(self) -> float:
        """The share of the learning rate for the step to come."""
        return pace(self.checks, self.settings)

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Start after ``step``: what an interrupted run saw later is seen again, to the same numbers."""
        if checkpoint is not None:
            self.window.load(checkpoint)
        path = self.folder / "checks.json"
        saved = json.loads(path.read_text()) if path.is_file() else []
        self.checks = [Check(**entry) for entry in saved if entry["step"] <= step]

    def __call__(self, step: int) -> bool:
        """Look if it is time to; true ends the run."""
        if not due(step, self.checks, self.settings):
            return False
        with self.window.mean(step):
            self.checks.append(self.look(step))
            if best(self.checks, self.settings) is self.checks[-1]:
                self._keep(step)
        if self.writes:
            files.write_json(self.folder / "checks.json", [asdict(c) for c in self.checks])
        return enough(self.checks, self.settings)

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint, before it is sealed."""
        self.window.save(checkpoint)

    def _keep(self, step: int) -> None:
        if not self.writes:
            return
        weights = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        with files.staged(self._weights(step)) as folder:
            save_file(weights, folder / "weights.safetensors")

    def _weights(self, step: int) -> Path:
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
