"""What an attack did to a model, row by row at each budget: saved without text, turned into numbers without a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from excise.errors import InputRefused
from excise.files import write_bytes
from excise.metrics.statistics import RESAMPLES, bootstrap_counts, bootstrap_means, interval

FORMAT = "1"
UNITS = ("probability", "leak")


@dataclass(frozen=True)
class Outcome:
    """What one attack did to one model: at each budget a value for each row that it is measured on.

    Args:
        name: Key of the attack in the table of attacks.
        unit: ``probability`` (of the true answer) or ``leak`` (how much of it came out, 0 to 1).
        budget: What the budget counts: steps, bits, samples, prompt, scale, layer.
        budgets: Names of the points of the curve.
        values: Side -> ``[budgets, n]``: "forget" (the rows that the attacker wants), and where it makes sense
            "retain": what the attack costs. NaN: not measured.
        rows: Side -> ``[n]``: numbers of these rows within the measured side.
        extra: Settings and whatever a reader must know. No text of any row.
        seconds: How long it took.

    Raises:
        ValueError: Shapes that contradict each other, no side "forget", an unknown unit.

    Example:
        >>> Outcome("quantise", "probability", "bits", ("16", "4"), {"forget": np.array([[0.1, 0.2], [0.3, 0.4]])},
        ...     {"forget": np.array([0, 1])}).mean().round(2).tolist()
        [0.15, 0.35]
    """

    name: str
    unit: str
    budget: str
    budgets: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    rows: Mapping[str, NDArray[np.int64]]
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(str(b) for b in self.budgets))
        object.__setattr__(self, "values", {k: np.asarray(v, np.float64) for k, v in self.values.items()})
        object.__setattr__(self, "rows", {k: np.asarray(v, np.int64) for k, v in self.rows.items()})
        if self.unit not in UNITS:
            raise ValueError(f"unit {self.unit!r} is none of {', '.join(UNITS)}")
        if "forget" not in self.values or set(self.values) != set(self.rows):
            raise ValueError("values and rows need the same sides, 'forget' among them")
        if len(set(self.budgets)) != len(self.budgets) or not self.budgets:
            raise ValueError("budgets must have names of their own, at least one")
        for side, values in self.values.items():
            if self.rows[side].ndim != 1 or values.shape != (len(self.budgets), len(self.rows[side])):
                raise ValueError(f"side {side!r}: values are not [budgets, rows]")

    def mean(self, side: str = "forget") -> NDArray[np.float64]:
        """``[budgets]`` means over the rows of a side, rows that were not measured left out."""
        values = self.values[side]
        seen = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return np.where(seen, values, 0.0).sum(axis=1) / np.where(seen.any(axis=1), seen.sum(axis=1), np.nan)


def save(outcome: Outcome, path: str | os.PathLike[str]) -> None:
    """Write an outcome as safetensors, replacing the file in one step.

    Example:
        >>> import tempfile
        >>> o = Outcome("prompts", "leak", "prompt", ("plain",), {"forget": [[0.5]]}, {"forget": [3]})
        >>> with tempfile.TemporaryDirectory() as d:
        ...     save(o, d + "/prompts.safetensors"); load(d + "/prompts.safetensors").rows["forget"].tolist()
        [3]
    """
    tensors = {f"values.{side}": np.ascontiguousarray(values) for side, values in outcome.values.items()}
    tensors |= {f"rows.{side}": np.ascontiguousarray(rows) for side, rows in outcome.rows.items()}
    meta = {"format": FORMAT, "name": outcome.name, "unit": outcome.unit, "budget": outcome.budget}
    meta |= {"budgets": json.dumps(outcome.budgets), "extra": json.dumps(dict(outcome.extra), sort_keys=True)}
    write_bytes(path, to_bytes(tensors, {**meta, "seconds": repr(float(outcome.seconds))}))


def load(path: str | os.PathLike[str]) -> Outcome:
    """Read an outcome and check it.

    Raises:
        InputRefused: The file is absent, damaged, of another format, or contradicts itself.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such outcome: run the attack first") from None
    except (SafetensorError, OSError):
        raise InputRefused(f"{path}: not a readable safetensors file: copy it again or attack again") from None
    if meta.get("format") != FORMAT:
        raise InputRefused(f"{path}: not an outcome of format {FORMAT}: attack again with this version")
    parts: dict[str, dict[str, NDArray]] = {"values": {}, "rows": {}}
    try:
        for name, tensor in tensors.items():
            what, _, side = name.partition(".")
            parts[what][side] = tensor
        return Outcome(
            meta["name"], meta["unit"], meta["budget"], tuple(json.loads(meta["budgets"])), parts["values"],
            parts["rows"], json.loads(meta["extra"]), float(meta["seconds"]),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError):
        raise InputRefused(f"{path}: the outcome contradicts itself: attack again") from None


# --- numbers ------------------------------------------------------------------------------------------------------


def numbers(
    outcome: Outcome, gold: Outcome | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float | int | None]]:
    """Mean over forget rows at each budget, and how far it is from the gold's on the same rows.

    Args:
        outcome: What the attack did to the model.
        gold: The same attack on the gold. Budgets and rows are matched by name and number.
        resamples: Of the bootstrap over rows.
        seed: Of the bootstrap.

    Returns:
        ``attack/<name>/<budget>`` -> value, low, high, n; and with a gold gap, gap_low, gap_high: the mean of the
        paired differences, model minus gold. ``None`` stands for what cannot be said.

    Example:
        >>> def made(v): return Outcome("prompts", "leak", "prompt", ("plain",), {"forget": [v]}, {"forget": [0, 1]})
        >>> found = numbers(made([0.5, 1.0]), made([0.5, 0.5]))["attack/prompts/plain"]
        >>> found["value"], found["low"], found["high"], found["n"], found["gap"]
        (0.75, 0.5, 1.0, 2, 0.25)
    """
    result = {}
    for at, budget in enumerate(outcome.budgets):
        mine = outcome.values["forget"][at]
        value, low, high, n = _mean(mine, resamples, seed)
        entry: dict[str, float | int | None] = {"value": value, "low": low, "high": high, "n": n}
        if gold is not None and budget in gold.budgets:
            gap = _paired(outcome.rows["forget"], mine, gold, gold.budgets.index(budget))
            entry["gap"], entry["gap_low"], entry["gap_high"], _ = _mean(gap, resamples, seed)
        result[f"attack/{outcome.name}/{budget}"] = entry
    return result


def _paired(rows: NDArray, mine: NDArray, gold: Outcome, at: int) -> NDArray:
    theirs = dict(zip(gold.rows["forget"].tolist(), gold.values["forget"][at].tolist(), strict=True))
    return mine - np.array([theirs.get(row, math.nan) for row in rows.tolist()], np.float64)


def _mean(values: NDArray, resamples: int, seed: int) -> tuple[float | None, float | None, float | None, int]:
    n = int(np.sum(~np.isnan(values)))
    if not n:
        return None, None, None, 0
    draws = bootstrap_means(values, bootstrap_counts(len(values), resamples, seed))
    low, high = interval(draws)
    return float(np.nanmean(values)), low, high, n


def picture(outcomes: Mapping[str, Outcome], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The curves of one attack on several models, as the report draws them.

    Args:
        outcomes: Model -> outcome of the same attack with the same budgets.
        resamples: Of the bootstrap over rows.
        seed: Of the bootstrap.

    Returns:
        budget, budgets, unit, and for each model value, low, high and (where measured) retain: one entry per budget.
    """
    first = next(iter(outcomes.values()))
    return {
        "budget": first.budget,
        "budgets": list(first.budgets),
        "unit": first.unit,
        "models": {
            model: _curve(outcome, first.budgets, resamples, seed) for model, outcome in outcomes.items()
        },
    }  # fmt: skip


def _curve(outcome: Outcome, budgets: Sequence[str], resamples: int, seed: int) -> dict[str, list[float | None]]:
    found = numbers(outcome, resamples=resamples, seed=seed)
    entries = [found.get(f"attack/{outcome.name}/{budget}", {}) for budget in budgets]
    curve = {key: [entry.get(key) for entry in entries] for key in ("value", "low", "high")}
    if "retain" in outcome.values:
        means = dict(zip(outcome.budgets, outcome.mean("retain").tolist(), strict=True))
        kept = [means.get(budget, math.nan) for budget in budgets]
        curve["retain"] = [value if math.isfinite(value) else None for value in kept]
    return curve
