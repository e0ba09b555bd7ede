"""Every number that a classifier's saved tables give, with interval and row count, or why it is not shown. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import entities
from excise.metrics.bench import Bench, Entry
from excise.metrics.class_catalogue import of_task
from excise.metrics.scores import Scores, taken
from excise.metrics.statistics import (
    RESAMPLES,
    auc,
    bootstrap_auc,
    interval,
    privleak,
)
from excise.metrics.table import Table

Floats = NDArray[np.float64]
#: Level of the interval of a gap: two one-sided tests at 5 %, as equivalence is tested.
GAP_LEVEL = 0.9
_ELSEWHERE = {
    "states": "needs hidden states, which saved tables do not hold: it is measured while the model is loaded",
    "attack": "needs an attack on a copy of the model",
}


def task_of(tables: Mapping[str, Table]) -> str | None:
    """The task that tables are of; None for those of a language model."""
    classes = next((t.classes for t in tables.values() if t.classes), ())
    if not classes:
        return None
    return "sequence_classification" if entities.scheme(classes) is None else "token_classification"


def _golds(bench: Bench, name: str) -> Table:
    """The gold's table of a side; `NotShown` where there is none on the same rows."""
    if bench.gold is None or name not in bench.gold:
        raise NotShown("needs the gold: the same model trained without the forget rows, evaluated on these rows")
    if bench.gold[name].rows != bench.side(name).rows:
        raise NotShown(f"the gold was evaluated on other {name.replace('_', '-')} rows")
    return bench.gold[name]


# --- one value per row or side --------------------------------------------------------------------------------------


def entity_tokens(table: Table) -> NDArray[np.bool_]:
    """``[n]`` labels that count where forgetting is measured: words of entities; of text classifiers, all."""
    of = entities.scheme(table.classes)
    gold = table.columns["gold_class"]
    return np.ones(len(gold), bool) if of is None else of.type_of[gold] >= 0


def row_logp(table: Table, *, entity_only: bool) -> Floats:
    """``[rows]`` mean log p of the right class over a row's labels, of entities alone or all; NaN without any."""
    total, number = _per_row(table, table.columns["logp"], entity_only)
    return np.divide(total, number, out=np.full(table.rows, np.nan), where=number > 0)


def _per_row(table: Table, values: NDArray, entity_only: bool) -> tuple[Floats, Floats]:
    take = entity_tokens(table) if entity_only else np.ones(len(values), bool)
    owner = np.repeat(table.columns["row"], table.lengths)[take]
    total = np.bincount(owner, weights=np.asarray(values, np.float64)[take], minlength=table.rows)
    number = np.bincount(owner, minlength=table.rows).astype(np.float64)
    return total.astype(np.float64), number


Score = tuple[float, Floats]  # value, drawn values


def _f1(table: Table, draws: Floats, only: str | None = None) -> Score:
    of = entities.scheme(table.classes)
    if of is None or (only is not None and only not in of.types):
        raise NotShown("the model's classes are no tags of this kind")
    c = table.columns
    kind = None if only is None else of.types.index(only)
    own = entities.counts(c["gold_class"], c["predicted_class"], c["offsets"], c["row"], table.rows, of, kind)
    if not own.there.sum() and not own.found.sum():
        raise NotShown("there are no entities")
    return float(entities.f1(*(part.sum() for part in own))), entities.drawn_f1(own, draws)


def _accuracy(table: Table, draws: Floats) -> Score:
    right, number = _per_row(table, table.columns["hit"], False)
    return float(right.sum() / number.sum()), (draws @ right) / np.maximum(draws @ number, 1)


def _macro(table: Table, draws: Floats) -> Score:
    c = table.columns
    owner = np.repeat(c["row"], table.lengths)
    parts = entities.class_counts(c["gold_class"], c["predicted_class"], owner, table.rows, len(table.classes))
    value = float(entities.macro_f1(*(part.sum(1) for part in parts)))
    return value, entities.macro_f1(*(part @ draws.T for part in parts))


def outside_words(table: Table) -> tuple[Floats, Floats]:
    """``[rows]`` how many words outside of entities each row has right, and how many it has."""
    take = ~entity_tokens(table)
    owner = np.repeat(table.columns["row"], table.lengths)[take]
    right = np.bincount(owner, weights=table.columns["hit"][take], minlength=table.rows)
    return right.astype(np.float64), np.bincount(owner, minlength=table.rows).astype(np.float64)


def _outside(table: Table, draws: Floats) -> Score:
    """Share of the words outside of entities that are taken for none: a model that never saw them errs on some."""
    right, number = outside_words(table)
    if not number.sum():
        raise NotShown("there are no words outside of entities")
    drawn = np.divide(draws @ right, draws @ number, out=np.full(len(draws), np.nan), where=draws @ number > 0)
    return float(right.sum() / number.sum()), drawn


_SCORES: dict[str, Callable[[Table, Floats], Score]] = {
    "f1": _f1, "accuracy": _accuracy, "macro_f1": _macro, "outside_accuracy": _outside,
}  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------------------------


def _side_score(bench: Bench, side: str, kind: str, only: str | None = None) -> Entry:
    table = bench.side(side)
    if not table.sequences:
        raise NotShown("there are no rows")
    how = _SCORES[kind] if only is None else partial(_f1, only=only)
    value, drawn = how(table, bench.counts(side, table.rows))
    low, high = interval(drawn)
    return {"value": value, "low": low, "high": high, "n": table.rows}


def _gap(bench: Bench, side: str, kind: str) -> Entry:
    table, gold = bench.side(side), _golds(bench, side)
    draws = bench.counts(side, table.rows)
    (mine, drawn), (theirs, theirs_drawn) = _SCORES[kind](table, draws), _SCORES[kind](gold, draws)
    low, high = interval(drawn - theirs_drawn, GAP_LEVEL)
    return {"value": mine - theirs, "low": low, "high": high, "n": table.rows, "level": GAP_LEVEL}


def _probability(bench: Bench, where: str) -> Entry:
    table = bench.side(where if where == "forget" or "untouched" not in bench.tables else "untouched")
    total, number = _per_row(table, np.exp(table.columns["logp"].astype(np.float64)), True)
    if not number.sum():
        raise NotShown("there are no entities")
    draws = bench.counts(table.side, table.rows)
    drawn = np.divide(draws @ total, draws @ number, out=np.full(len(draws), np.nan), where=draws @ number > 0)
    low, high = interval(drawn)
    return {"value": float(total.sum() / number.sum()), "low": low, "high": high, "n": int((number > 0).sum())}


def _losses(tables: Mapping[str, Table], entity_only: bool) -> tuple[Floats, Floats]:
    forget, other = (row_logp(tables[side], entity_only=entity_only) for side in ("forget", "never_seen"))
    return forget, other


def _membership(bench: Bench, entity_only: bool) -> Entry:
    bench.side("forget"), bench.side("never_seen")
    member, other = _losses(bench.tables, entity_only)
    low, high = interval(_auc_draws(bench, member, other))
    return {"value": auc(member, other), "low": low, "high": high, **_counted(member, other)}


def _counted(member: Floats, other: Floats) -> dict[str, int]:
    return {"n": int((~np.isnan(member)).sum()), "n_never_seen": int((~np.isnan(other)).sum())}


def _auc_draws(bench: Bench, member: Floats, other: Floats) -> Floats:
    return bootstrap_auc(member, other, bench.counts("forget", len(member)), bench.counts("never_seen", len(other)))


def _privleak(bench: Bench) -> Entry:
    bench.side("forget"), bench.side("never_seen"), _golds(bench, "forget"), _golds(bench, "never_seen")
    assert bench.gold is not None
    mine, theirs = _losses(bench.tables, True), _losses(bench.gold, True)
    value = float(privleak(auc(*mine), auc(*theirs)))
    if math.isnan(value):
        raise NotShown("the gold ranks every forget row as a member, so its AUC cannot be a reference")
    low, high = interval(privleak(_auc_draws(bench, *mine), _auc_draws(bench, *theirs)))
    return {"value": value, "low": low, "high": high, **_counted(*mine)}


def _wanted(tables: Mapping[str, Table], task: str) -> dict[str, Callable[[Bench], Entry]]:
    """Name -> how it is made: every score of every side, the gaps, then what is one number for all sides."""
    kinds = ("f1",) if task == "token_classification" else ("accuracy", "macro_f1")
    wanted: dict[str, Callable[[Bench], Entry]] = {}
    for side, table in tables.items():
        for kind in kinds:
            wanted[f"{side}_{kind}"] = partial(_side_score, side=side, kind=kind)
        if task == "token_classification" and side in ("forget", "never_seen"):
            wanted[f"{side}_outside_accuracy"] = partial(_side_score, side=side, kind="outside_accuracy")
        of = entities.scheme(table.classes) if task == "token_classification" else None
        present = np.unique(of.type_of[table.columns["gold_class"]]) if of else ()
        for i in present:
            if of and i >= 0 and len(of.types) > 1:
                name = of.types[i]
                wanted[f"{side}_f1/{name}"] = partial(_side_score, side=side, kind="f1", only=name)
    for side in ("forget", "test"):
        wanted[f"{side}_{kinds[0]}_gap"] = partial(_gap, side=side, kind=kinds[0])
    wanted |= {f"{side}_probability": partial(_probability, where=side) for side in ("forget", "retain")}
    wanted["membership_auc"] = partial(_membership, entity_only=False)
    if task == "token_classification":
        wanted["entity_membership_auc"] = partial(_membership, entity_only=True)
    return wanted | {"privleak": _privleak}


def score(
    tables: Mapping[str, Table],
    against: Mapping[str, Table] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Every number of the task's catalogue that one classifier's tables can give.

    F1 is that of entities, strict: borders and type have to agree. Intervals are 95 % percentile bootstraps over rows
    (sentences); gaps to the gold have 90 % intervals, with model and gold on the same draws. F1 by type is named
    ``forget_f1/person``. PrivLeak compares the attack on entities (on all labels for text classifiers).

    Args:
        tables: Side -> table of the model.
        against: The same of the gold; its classes may be numbered otherwise.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Source:
        F1: seqeval, strict and IOB2. Membership: 1709.01604; PrivLeak: 2407.06460, on the loss instead of Min-K.

    Example:
        >>> columns = {"row": np.array([0]), "kind": np.array([0]), "eos": np.array([False]),
        ...     "offsets": np.array([0, 2]), "logp": np.log([0.5, 0.25]), "hit": np.array([True, False]),
        ...     "gold_class": np.array([1, 0]), "predicted_class": np.array([1, 1])}
        >>> found = score({"forget": Table("forget", 1, columns, ("O", "B-x", "I-x"))})
        >>> round(found.values["forget_f1"]["value"], 3), found.values["forget_probability"]["value"]
        (0.667, 0.5)
        >>> found.not_shown["forget_f1_gap"]
        'needs the gold: the same model trained without the forget rows, evaluated on these rows'
    """
    task = task_of(tables) or "token_classification"
    bench = Bench(tables, against, resamples, seed)
    wanted = _wanted(tables, task)
    elsewhere = {}
    for name, metric in of_task(task).items():
        if metric.source != "tables":
            elsewhere[name] = _ELSEWHERE[metric.source]
        elif name not in wanted:
            elsewhere[name] = f"no {metric.sides[0].replace('_', '-')} rows were evaluated"
    return taken(wanted, bench, elsewhere)


def loss_histogram(table: Table, edges: NDArray) -> list[int]:
    """Rows by their mean loss on entities, for a picture: counts between ``edges``, values outside in the end bins."""
    losses = -row_logp(table, entity_only=True)
    losses = losses[~np.isnan(losses)]
    return [int(v) for v in np.histogram(np.clip(losses, edges[0], edges[-1]), edges)[0]]
