"""What one model yields when it is measured, whatever its task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from excise.attacks.outcome import Outcome
from excise.metrics.table import Table

Numbers = dict[str, dict[str, Any]]


@dataclass
class Measured:
    """What was found, by side: scores, states by layer, texts; relearning curves, multiple choice, MUSE's tables.

    ``curves`` has ``probability`` (and ``f1`` of a classifier) at each step of the relearning attack; ``attacks`` are
    the outcomes of those that the recipe names, and ``not_attacked`` says why one is missing.
    """

    tables: dict[str, Table]
    states: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    choices: Numbers = field(default_factory=dict)
    muse: dict[str, Table] = field(default_factory=dict)
    attacks: dict[str, Outcome] = field(default_factory=dict)
    not_attacked: dict[str, str] = field(default_factory=dict)


def relearning_picture(measured: dict[str, Measured], steps: tuple[int, ...]) -> dict[str, Any]:
    """The picture of the relearning attack: probability at each step by model; empty where nobody was attacked."""
    curves = {name: m.curves["probability"] for name, m in measured.items() if m.curves}
    return {"relearning": {"steps": list(steps), "models": curves}} if curves else {}


def relearned(own: Measured, rows: int) -> Numbers:
    """The last points of the relearning curves as numbers; ``rows`` is how many were to be forgotten."""
    return {
        f"relearned_{what}": {"value": curve[-1], "low": None, "high": None, "n": rows // 2}
        for what, curve in own.curves.items()
    }
