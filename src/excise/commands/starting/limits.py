"""What the numbers of a recipe may be: refused by name at the start, not by a library in the middle of a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from excise import recipe, verdict
from excise.errors import UsageError

#: Key -> the least value; the open ones must be above it.
LEAST = {
    "schedule.forget_batch": 1, "schedule.retain_batch": 1, "schedule.accumulate": 1, "schedule.steps": 1,
    "schedule.retain_steps": 0, "schedule.contrast_batch": 0, "schedule.never_seen_batch": 1,
    "optimiser.weight_decay": 0, "optimiser.warmup": 0, "optimiser.floor": 0, "optimiser.tail": 0,
    "optimiser.clip": 0, "stop.after": 0,
    "evaluate.batch_tokens": 1, "evaluate.max_rows": 1, "evaluate.generate": 0, "evaluate.savings_steps": 0,
    "checkpoint_every": 0, "statistics.rows": 1, "statistics.layers_at_once": 1, "log_every": 1, "seed": 0,
    "stop.between": 0, "stop.every": 1,
}  # fmt: skip
ABOVE_ZERO = ("schedule.epochs", "optimiser.lr", "optimiser.adamw_lr", "evaluate.relearn_lr")
MOST = {"optimiser.warmup": 1, "optimiser.floor": 1, "optimiser.tail": 1, "stop.after": 1, "seed": 2**32 - 1}

#: Statistic of the stopping rule -> its value where forgotten and never-seen rows meet.
MET = {"auc": 0.5, "gap": 0.0, "f1": 0.0}


def check(settings: recipe.Recipe) -> None:
    """Refuse numbers out of range, and an extra that is not installed.

    Raises:
        UsageError: Naming the key and what it may be.

    Example:
        >>> check(recipe.build({"schedule": {"forget_batch": 0}}))
        Traceback (most recent call last):
        excise.errors.UsageError: schedule.forget_batch is 0: give 1 or more
    """
    for key, least in LEAST.items():
        value = _value(settings, key)
        if value is not None and not (math.isfinite(value) and least <= value <= MOST.get(key, math.inf)):
            bound = f"{least} to {MOST[key]}" if key in MOST else f"{least} or more"
            raise UsageError(f"{key} is {value}: give {bound}")
    for key in ABOVE_ZERO:
        value = _value(settings, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{key} is {value}: give a number above 0")
    (low, high), met = settings.stop.band, MET[settings.stop.statistic]
    if not low <= met <= high:
        raise UsageError(
            f"stop.band is {low:g} to {high:g}: give one around {met:g}, where forgotten and never-seen rows meet by "
            f"stop.statistic {settings.stop.statistic}"
        )
    betas = settings.optimiser.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UsageError(f"optimiser.betas is {list(betas)}: give two numbers from 0 to below 1")
    edit = settings.edit.reset_rows
    if edit is not None and not 0 < edit.share <= 1:
        raise UsageError(f"edit.reset_rows.share is {edit.share}: give a number above 0 and up to 1")
    steps = list(settings.evaluate.relearn_steps)
    if steps != sorted(set(steps)) or (steps and steps[0] < 0):
        raise UsageError(f"evaluate.relearn_steps is {steps}: give steps that ascend from 0 or above")
    verdict.check(settings.verify, verdict.NAMES)
    if settings.evaluate.map == "umap" and importlib.util.find_spec("umap") is None:  # not after an hour of training
        raise UsageError("evaluate.map: umap needs umap-learn: pip install 'excise[umap]', or set pca")


def _value(settings: Any, key: str) -> float | None:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings
