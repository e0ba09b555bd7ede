"""What the numbers of a recipe may be: refused by name at the start, not by a library in the middle of a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from excise import recipe
from excise.errors import UsageError

#: Key -> the least value; the open ones must be above it.
LEAST = {
    "schedule.forget_batch": 1, "schedule.retain_batch": 1, "schedule.accumulate": 1, "schedule.steps": 1,
    "schedule.retain_steps": 0, "schedule.contrast_batch": 0,
    "optimiser.weight_decay": 0, "optimiser.warmup": 0, "optimiser.floor": 0, "optimiser.clip": 0,
    "evaluate.batch_tokens": 1, "evaluate.max_rows": 1, "evaluate.generate": 0,
    "checkpoint_every": 0, "statistics.rows": 1, "statistics.layers_at_once": 1, "log_every": 1, "seed": 0,
}  # fmt: skip
ABOVE_ZERO = ("schedule.epochs", "optimiser.lr", "optimiser.adamw_lr", "evaluate.relearn_lr")
MOST = {"optimiser.warmup": 1, "optimiser.floor": 1, "seed": 2**32 - 1}


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
    steps = list(settings.evaluate.relearn_steps)
    if steps != sorted(set(steps)) or (steps and steps[0] < 0):
        raise UsageError(f"evaluate.relearn_steps is {steps}: give steps that ascend from 0 or above")
    if settings.evaluate.map == "umap" and importlib.util.find_spec("umap") is None:  # not after an hour of training
        raise UsageError("evaluate.map: umap needs umap-learn: pip install 'excise[umap]', or set pca")


def _value(settings: Any, key: str) -> float | None:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings
