"""Where a classifier puts forgotten labels inside: neighbours, nearness to their class and to O, membership, pictures.

Only the states of chosen labels are held: all entities and as many words outside them, up to a bound a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from excise.metrics import entities
from excise.metrics.latent import assign_folds, probe_auc
from excise.metrics.states import auc_interval
from excise.metrics.statistics import bootstrap_counts, bootstrap_means, interval
from excise.metrics.table import Table

Entry = dict[str, Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: Labels of a side whose states are held, of entities and outside each: a few megabytes.
MOST_LABELS = 4000
NEIGHBOURS = 10
OUTSIDE = -1
_FEW = "needs hidden states of forgotten and of kept entities"
_GEOMETRY = ("same_class_neighbours", "own_class_cosine", "outside_cosine")
_MOST_POINTS = 150


def chosen(gold_class: NDArray, classes: Sequence[str], *, most: int = MOST_LABELS, seed: int = 0) -> Ints:
    """Which labels of a side keep their states: entities up to ``most``, then outside words, no more than entities.

    The choice follows from the true classes alone, so that it is the same for every model, and states find their labels
    again in a saved table. Of text classifiers all labels count as entities.

    Args:
        gold_class: ``[n]`` true classes of the side.
        classes: The model's classes.
        most: Bound of either kind.
        seed: Of the draw where there are more.

    Returns:
        Places in ``[0, n)``, ascending within either kind.

    Example:
        >>> chosen(np.array([0, 1, 0, 2, 0]), ("O", "B-x", "I-x")).tolist()[:2]
        [1, 3]
    """
    types = kinds(gold_class, classes)
    rng = np.random.default_rng([seed, len(types)])
    inside, outside = np.flatnonzero(types != OUTSIDE), np.flatnonzero(types == OUTSIDE)
    inside = _drawn(inside, most, rng)
    return np.concatenate((inside, _drawn(outside, len(inside), rng)))


def _drawn(places: Ints, most: int, rng: np.random.Generator) -> Ints:
    return places if len(places) <= most else np.sort(rng.choice(places, most, replace=False))


def kinds(gold_class: NDArray, classes: Sequence[str]) -> Ints:
    """``[n]`` entity type (B- and I- are one) of each label, -1 outside; the class itself for text classifiers."""
    of = entities.scheme(classes)
    gold = np.asarray(gold_class, np.int64)
    return gold if of is None else of.type_of[gold]


@dataclass(frozen=True)
class Labels:
    """States of the chosen labels of one side, with what they are: ``states [k, D]``, ``type [k]``, ``row [k]``."""

    states: Floats
    type: Ints
    row: Ints

    def only(self, where: NDArray) -> Labels:
        """The labels where ``where`` is true."""
        return Labels(self.states[where], self.type[where], self.row[where])


def labels_of(table: Table, states: NDArray) -> Labels:
    """The chosen labels of a saved table with their states ``[k, D]``, in the order of `chosen`."""
    places = chosen(table.columns["gold_class"], table.classes)
    if len(places) != len(states):
        raise ValueError(f"{len(states)} states for {len(places)} labels of {table.side}")
    owner = np.repeat(np.asarray(table.columns["row"], np.int64), table.lengths)
    types = kinds(table.columns["gold_class"], table.classes)
    return Labels(np.asarray(states, np.float64), types[places], owner[places])


# --- geometry -------------------------------------------------------------------------------------------------------


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def same_class(queries: Labels, among: Labels, k: int = NEIGHBOURS) -> Floats:
    """``[q]`` share of the ``k`` nearest labels of ``among`` (by cosine) whose type is the query's own.

    A label is never its own neighbour where both are the same set (the same object).
    """
    out = np.empty(len(queries.states))
    known = _unit(among.states)
    k = min(k, len(known) - (queries is among))
    for start in range(0, len(out), 512):  # a block of similarities at a time
        block = _unit(queries.states[start : start + 512]) @ known.T
        if queries is among:
            block[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf
        near = np.argpartition(-block, k - 1, axis=1)[:, :k]
        out[start : start + 512] = (among.type[near] == queries.type[start : start + 512, None]).mean(1)
    return out


def cosines(queries: Labels, among: Labels) -> tuple[Floats, Floats]:
    """``[q]`` cosine of each label to the middle of its own type in ``among``, and to that of the labels outside.

    The middle is the mean of directions (vectors brought to length 1). NaN where ``among`` has no such label. A label
    that is itself in ``among`` (the same object) is left out of its own middle.
    """
    directions, known = _unit(queries.states), _unit(among.states)
    own = np.full(len(directions), np.nan)
    for kind in np.unique(queries.type):
        members, mine = known[among.type == kind], queries.type == kind
        if queries is among and len(members) > 1:
            middles = (members.sum(0) - directions[mine]) / (len(members) - 1)
            own[mine] = (directions[mine] * _unit(middles)).sum(1)
        elif queries is not among and len(members):
            own[mine] = directions[mine] @ _unit(members.mean(0, keepdims=True))[0]
    outside = known[among.type == OUTSIDE]
    to_outside = directions @ _unit(outside.mean(0, keepdims=True))[0] if len(outside) else np.full(len(own), np.nan)
    return own, to_outside


def _by_row(values: Floats, row: Ints, seed: int = 0) -> Entry | None:
    """Mean over labels, with a bootstrap over the rows that they stand in: labels of a row are not independent."""
    there = ~np.isnan(values)
    if not there.any():
        return None
    names, place = np.unique(row[there], return_inverse=True)
    total = np.bincount(place, weights=values[there], minlength=len(names)).astype(np.float64)
    number = np.bincount(place, minlength=len(names)).astype(np.float64)
    draws = bootstrap_counts(len(names), seed=seed)
    low, high = interval(bootstrap_means(total, draws) / bootstrap_means(number, draws))
    return {"value": float(values[there].mean()), "low": low, "high": high, "n": len(names)}


@dataclass(frozen=True)
class ClassLatent:
    """The numbers that states give of one classifier; ``scatter`` is side -> [[own cosine, outside cosine], ...]."""

    values: dict[str, Entry]
    not_shown: dict[str, str] = field(default_factory=dict)
    scatter: dict[str, list[list[float]]] = field(default_factory=dict)


def latent(
    tables: Mapping[str, Table],
    states: Mapping[str, NDArray],
    groups: Mapping[str, Sequence[Any] | None] | None = None,
    *,
    seed: int = 0,
) -> ClassLatent:
    """Class geometry of forgotten (and never-seen) entities among kept ones, and latent membership.

    Kept means ``untouched`` where there is one, else ``retain``. Neighbours and middles are those of kept entities and
    as many kept words outside entities. The membership probe is a logistic regression whose folds are cut by person or
    author where those are known, else by row: never a row on both sides of the split.

    Args:
        tables: Side -> saved table.
        states: Side -> ``[k, D]`` states of the labels that `chosen` names.
        groups: Side -> person or author of each row (None: not known).
        seed: Of splits and draws.

    Returns:
        ``same_class_neighbours``, ``own_class_cosine``, ``outside_cosine`` of forgotten entities (and, with
        ``/never_seen``, of never-seen ones), ``latent_membership_auc``.

    Source:
        Geometry: ours. Probe: Alain and Bengio, 1610.01644.
    """
    kept = "untouched" if "untouched" in states else "retain"
    sides = {side: labels_of(tables[side], own) for side, own in states.items()}
    inside = {side: own.only(own.type != OUTSIDE) for side, own in sides.items()}
    values: dict[str, Entry] = {}
    not_shown: dict[str, str] = {}
    scatter: dict[str, list[list[float]]] = {}
    among = sides.get(kept)
    queries = [side for side in ("forget", "never_seen") if side in inside and len(inside[side].states)]
    if among is None or len(among.states) < 2 or "forget" not in queries:
        not_shown |= dict.fromkeys(_GEOMETRY, _FEW)
    else:
        for side in queries:
            found, points = _geometry(inside[side], among, seed)
            values |= {name if side == "forget" else f"{name}/{side}": entry for name, entry in found.items()}
            scatter[side] = points
        scatter[kept] = _points(inside[kept], *cosines(among, among), among.type != OUTSIDE)
    membership = _membership(inside.get("forget"), inside.get("never_seen"), groups or {}, seed)
    if membership is None:
        not_shown["latent_membership_auc"] = "needs hidden states in two forgotten and two never-seen rows"
    else:
        values["latent_membership_auc"] = membership
    return ClassLatent(values, not_shown, scatter)


def _geometry(queries: Labels, among: Labels, seed: int) -> tuple[dict[str, Entry], list[list[float]]]:
    own, outside = cosines(queries, among)
    measured = {"same_class_neighbours": same_class(queries, among), "own_class_cosine": own, "outside_cosine": outside}
    found = {name: _by_row(values, queries.row, seed) for name, values in measured.items()}
    return {k: v for k, v in found.items() if v}, _points(queries, own, outside, np.ones(len(own), bool))


def _points(labels: Labels, own: Floats, outside: Floats, where: NDArray) -> list[list[float]]:
    """Points of a picture, at most ``_MOST_POINTS``; text classifiers have no words outside and no picture."""
    pairs = np.stack((own, outside), 1)[where]
    pairs = pairs[np.isfinite(pairs).all(1)]
    take = np.linspace(0, max(len(pairs) - 1, 0), min(len(pairs), _MOST_POINTS)).astype(int)
    return [[round(float(a), 4), round(float(b), 4)] for a, b in pairs[take]]


def _membership(
    forget: Labels | None, never: Labels | None, groups: Mapping[str, Sequence[Any] | None], seed: int
) -> Entry | None:
    if forget is None or never is None:
        return None
    ids, by = _folds_by(forget, never, groups)
    rows = [len(np.unique(side.row)) for side in (forget, never)]
    if min(rows) < 2:
        return None
    value = probe_auc(torch.from_numpy(forget.states), torch.from_numpy(never.states), *ids, seed=seed)
    if not math.isfinite(value):
        return None
    low, high = auc_interval(value, *rows)  # rows, not labels: labels of a row say much the same
    return {"value": value, "low": low, "high": high, "n": rows[0], "n_other": rows[1], "folds_by": by}


def _folds_by(forget: Labels, never: Labels, groups: Mapping[str, Sequence[Any] | None]) -> tuple[list[Ints], str]:
    """What a fold must not cut through: persons, where every label of both sides has one and each side two; or rows."""
    given = [groups.get(side) for side in ("forget", "never_seen")]
    if all(own is not None for own in given):
        both = zip(given, (forget, never), strict=True)
        names = [[own[i] for i in side.row] for own, side in both if own is not None]
        if all(None not in own and len(set(own)) > 1 for own in names):
            number = {name: i for i, name in enumerate(sorted({str(n) for own in names for n in own}))}
            ids = [np.array([number[str(n)] for n in own], np.int64) for own in names]
            if assign_folds([len(own) for own in ids], ids)[1] == "group":
                return ids, "group"
    return [forget.row, never.row + 1 + (int(forget.row.max()) if len(forget.row) else 0)], "row"
