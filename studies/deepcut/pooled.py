"""Gaps to the gold over several runs together: a dozen forgotten sentences say little, ten dozen something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from excise.artifacts import RunFolder
from excise.metrics import entities
from excise.metrics.class_scores import GAP_LEVEL
from excise.metrics.statistics import RESAMPLES, bootstrap_counts, interval
from excise.metrics.table import load

Floats = NDArray[np.float64]
ROLES = ("unlearned", "gold")


def counted(folder: Path, role: str, side: str) -> entities.Counts | None:
    """Entities of each row of a side as one model of a run found them; None for what is no tagger's table."""
    path = RunFolder(folder).table(role, side)
    if not path.is_file():
        return None
    table = load(path)
    of, c = entities.scheme(table.classes), table.columns
    if of is None:
        return None
    return entities.counts(c["gold_class"], c["predicted_class"], c["offsets"], c["row"], table.rows, of)


def joined(folders: Sequence[Path], side: str) -> dict[str, entities.Counts] | None:
    """The rows of all runs, one run after the other, of the unlearned models and of their golds."""
    found = {role: [counted(folder, role, side) for folder in folders] for role in ROLES}
    if not folders or any(own is None for parts in found.values() for own in parts):
        return None
    return {
        role: entities.Counts(*(np.concatenate(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]
        for role, parts in found.items()
    }


def drawn_gaps(counts: Mapping[str, entities.Counts], draws: Floats) -> Floats:
    """``[resamples]`` F1 of the unlearned models minus that of their golds, on the same drawn rows."""
    mine, theirs = (entities.drawn_f1(counts[role], draws) for role in ROLES)
    return mine - theirs


def gap(folders: Sequence[Path], side: str = "forget") -> tuple[float, float, float, int] | None:
    """The gap over all rows of all runs, its 90 % interval, and the number of rows."""
    counts = joined(folders, side)
    if counts is None:
        return None
    value = [float(entities.f1(*(part.sum() for part in counts[role]))) for role in ROLES]
    rows = len(counts["gold"].there)
    low, high = interval(drawn_gaps(counts, bootstrap_counts(rows, RESAMPLES, 0)), GAP_LEVEL)
    return value[0] - value[1], low, high, rows


def nearer(ours: Sequence[Path], theirs: Sequence[Path]) -> tuple[float, float, float] | None:
    """``|gap of ours| - |gap of theirs|`` with its 90 % interval: below 0, ours is nearer to the gold.

    The runs are of the same splits in the same order, so the rows are the same and are drawn together.
    """
    pair = [joined(folders, "forget") for folders in (ours, theirs)]
    if pair[0] is None or pair[1] is None:
        return None
    if len(pair[0]["gold"].there) != len(pair[1]["gold"].there):
        return None
    draws = bootstrap_counts(len(pair[0]["gold"].there), RESAMPLES, 0)
    ones = np.ones((1, draws.shape[1]))
    value, drawn = ([np.abs(drawn_gaps(counts, how)) for counts in pair if counts is not None] for how in (ones, draws))
    low, high = interval(drawn[0] - drawn[1], GAP_LEVEL)
    return float(value[0][0] - value[1][0]), low, high
