"""Gaps to the gold over several runs together: a dozen forgotten sentences say little, ten dozen something."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.artifacts import RunFolder
from excise.metrics import entities
from excise.metrics.class_scores import GAP_LEVEL
from excise.metrics.statistics import RESAMPLES, bootstrap_counts, interval
from excise.metrics.table import load

Floats = NDArray[np.float64]
Row = dict[str, Any]
ROLES, SIDES = ("unlearned", "gold"), ("forget", "test")


def counted(run: RunFolder) -> dict[str, dict[str, list[str]]]:
    """Side -> model -> the columns of its counts, a number for each sentence; empty for what is no tagger's run.

    As text, so that a row of the study stays one line of a file; `joined` reads it.
    """
    out: dict[str, dict[str, list[str]]] = {}
    for side, role in itertools.product(SIDES, ROLES):
        table = load(run.table(role, side))
        of, c = entities.scheme(table.classes), table.columns
        if of is not None:
            found = entities.counts(c["gold_class"], c["predicted_class"], c["offsets"], c["row"], table.rows, of)
            out.setdefault(side, {})[role] = [" ".join(f"{x:g}" for x in column) for column in found]
    return out


def joined(rows: Sequence[Row], side: str) -> dict[str, entities.Counts] | None:
    """The sentences of all rows of the study, one run after the other, of the unlearned models and of their golds."""
    if not rows or any(side not in row["counts"] for row in rows):
        return None
    own = {role: zip(*(row["counts"][side][role] for row in rows), strict=True) for role in ROLES}
    return {
        role: entities.Counts(*(np.array(" ".join(parts).split(), np.float64) for parts in columns))
        for role, columns in own.items()
    }


def drawn_gaps(counts: Mapping[str, entities.Counts], draws: Floats) -> Floats:
    """``[resamples]`` F1 of the unlearned models minus that of their golds, on the same drawn rows."""
    mine, theirs = (entities.drawn_f1(counts[role], draws) for role in ROLES)
    return mine - theirs


def gap(rows: Sequence[Row], side: str = "forget") -> tuple[float, float, float, int] | None:
    """The gap over all sentences of all runs, its 90 % interval, and the number of sentences."""
    counts = joined(rows, side)
    if counts is None:
        return None
    value = [float(entities.f1(*(part.sum() for part in counts[role]))) for role in ROLES]
    many = len(counts["gold"].there)
    low, high = interval(drawn_gaps(counts, bootstrap_counts(many, RESAMPLES, 0)), GAP_LEVEL)
    return value[0] - value[1], low, high, many


def nearer(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float, float] | None:
    """``|gap of ours| - |gap of theirs|`` with its 90 % interval: below 0, ours is nearer to the gold.

    The runs are of the same splits in the same order, so the rows are the same and are drawn together.
    """
    pair = [joined(rows, "forget") for rows in (ours, theirs)]
    if pair[0] is None or pair[1] is None:
        return None
    if len(pair[0]["gold"].there) != len(pair[1]["gold"].there):
        return None
    draws = bootstrap_counts(len(pair[0]["gold"].there), RESAMPLES, 0)
    ones = np.ones((1, draws.shape[1]))
    value, drawn = ([np.abs(drawn_gaps(counts, how)) for counts in pair if counts is not None] for how in (ones, draws))
    low, high = interval(drawn[0] - drawn[1], GAP_LEVEL)
    return float(value[0][0] - value[1][0]), low, high
