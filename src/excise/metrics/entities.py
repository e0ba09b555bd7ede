"""Entities in sequences of tags (IOB2, strict): which there are, which were found, and F1 of them. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
OUTSIDE, BEGIN, INSIDE = 0, 1, 2
_PREFIXES = {"B-": BEGIN, "I-": INSIDE}


@dataclass(frozen=True)
class Scheme:
    """What the classes of a tagger mean.

    Attributes:
        types: Names of the entity types, sorted.
        prefix: ``[C]`` OUTSIDE, BEGIN or INSIDE for each class.
        type_of: ``[C]`` number of its type, -1 for O.
    """

    types: tuple[str, ...]
    prefix: Ints
    type_of: Ints


def scheme(classes: Sequence[str]) -> Scheme | None:
    """The scheme of a model's classes; None where they are no tags (one of them is neither O nor B-X nor I-X).

    Example:
        >>> scheme(("O", "B-person", "I-person")).types, scheme(("sport", "politics"))
        (('person',), None)
    """
    if not classes or any(name != "O" and (name[:2] not in _PREFIXES or len(name) < 3) for name in classes):
        return None
    types = tuple(sorted({name[2:] for name in classes if name != "O"}))
    number = {name: i for i, name in enumerate(types)}
    prefix = np.array([_PREFIXES.get(name[:2], OUTSIDE) for name in classes], np.int64)
    return Scheme(types, prefix, np.array([number.get(name[2:], -1) for name in classes], np.int64))


class Entities(NamedTuple):
    """Entities of sequences that follow each other: first token, the one after the last, type."""

    start: Ints
    end: Ints
    type: Ints


def entities(tags: NDArray, offsets: NDArray, of: Scheme) -> Entities:
    """The entities of tag sequences, read strictly: an I- counts only behind a B- or I- of its own type.

    Args:
        tags: ``[n]`` classes of the tokens of all sequences.
        offsets: ``[S + 1]`` where sequences begin and end.
        of: What the classes mean.

    Source:
        seqeval's strict mode with the scheme IOB2 (a test holds both against each other).

    Example:
        >>> tags = scheme(("O", "B-x", "I-x", "B-y", "I-y"))
        >>> found = entities(np.array([1, 2, 4, 0, 2, 3]), np.array([0, 6]), tags)
        >>> found.start.tolist(), found.end.tolist()
        ([0, 5], [2, 6])
    """
    n = len(tags)
    if not n:
        empty = np.zeros(0, np.int64)
        return Entities(empty, empty, empty)
    tags = np.asarray(tags, np.int64)
    prefix, kind = of.prefix[tags], of.type_of[tags]
    goes_on = np.zeros(n, bool)
    goes_on[1:] = (prefix[1:] == INSIDE) & (prefix[:-1] != OUTSIDE) & (kind[1:] == kind[:-1])
    goes_on[offsets[:-1][offsets[:-1] < n]] = False
    heads = np.flatnonzero(~goes_on)
    ends = np.append(heads[1:], n)
    whole = prefix[heads] == BEGIN
    return Entities(heads[whole], ends[whole], kind[heads][whole])


class Counts(NamedTuple):
    """Entities of each row, ``[rows]``: found rightly, found, and there to be found."""

    right: Floats
    found: Floats
    there: Floats


def counts(
    gold: NDArray, predicted: NDArray, offsets: NDArray, row: NDArray, rows: int, of: Scheme, only: int | None = None
) -> Counts:
    """How many entities each row has, how many were found, and how many of these are right in borders and type.

    Args:
        gold: ``[n]`` true classes.
        predicted: ``[n]`` classes that the model gives.
        offsets: ``[S + 1]`` where sequences begin and end.
        row: ``[S]`` the row of each sequence.
        rows: Number of rows.
        of: What the classes mean.
        only: Count one type alone.
    """
    there, found = (entities(tags, offsets, of) for tags in (gold, predicted))
    owner = np.repeat(np.asarray(row, np.int64), np.diff(offsets))
    true_end, true_type = np.full(len(gold), -1), np.full(len(gold), -1)
    true_end[there.start], true_type[there.start] = there.end, there.type
    right = (true_end[found.start] == found.end) & (true_type[found.start] == found.type)

    def per_row(what: Entities, also: NDArray) -> Floats:
        take = also & ((what.type == only) if only is not None else np.ones(len(also), bool))
        return np.bincount(owner[what.start[take]], minlength=rows).astype(np.float64)

    every = (np.ones(len(part.start), bool) for part in (found, there))
    return Counts(per_row(found, right), per_row(found, next(every)), per_row(there, next(every)))


def f1(right: Floats, found: Floats, there: Floats) -> Floats:
    """F1 = 2 right / (found + there), of sums or of arrays of sums; 0 where nothing was found rightly.

    Example:
        >>> f1(np.array([1.0, 0.0]), np.array([2.0, 0.0]), np.array([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    total = np.asarray(found, np.float64) + there
    return np.divide(2.0 * np.asarray(right), total, out=np.zeros(np.shape(total)), where=total > 0)


def drawn_f1(own: Counts, draws: Floats) -> Floats:
    """``[resamples]`` F1 of drawn rows, from ``draws [resamples, rows]``: how often each row was drawn."""
    return f1(draws @ own.right, draws @ own.found, draws @ own.there)


def class_counts(gold: NDArray, predicted: NDArray, row: NDArray, rows: int, classes: int) -> tuple[Floats, ...]:
    """Of labels that stand alone: rightly given, given, and true, each ``[classes, rows]``; like `Counts`."""
    out = []
    for where, value in ((gold == predicted, gold), (np.ones(len(gold), bool), predicted), (gold >= 0, gold)):
        flat = np.asarray(value, np.int64)[where] * rows + np.asarray(row, np.int64)[where]
        out.append(np.bincount(flat, minlength=classes * rows).reshape(classes, rows).astype(np.float64))
    return tuple(out)


def macro_f1(right: Floats, found: Floats, there: Floats) -> Floats:
    """``[...]`` mean F1 of the classes that occur as true or given, from sums ``[classes, ...]`` (as scikit-learn's).

    Example:
        >>> float(macro_f1(np.array([1.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0])).round(4))
        0.3333
    """
    occurs = (np.asarray(found) + there) > 0
    many = occurs.sum(0)
    total = np.where(occurs, f1(right, found, there), 0.0).sum(0)
    return np.divide(total, many, out=np.zeros(np.shape(many)), where=many > 0)
