"""The table of numbers: which rows, in which order, and what each says beside the gold's number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.metrics.catalogue import Metric, label
from excise.metrics.class_catalogue import find, of_task
from excise.reporting.style import model_title
from excise.reporting.words import NOT_SHOWN, interval, number, times

#: Rows that are always there, "not shown" where the run has no value.
KEY_NUMBERS = (
    "forget_probability", "forget_quality_log10", "retain_probability", "model_utility", "privleak",
    "latent_membership_auc", "entanglement", "relearned_probability",
)  # fmt: skip

_KEYS = {
    "token_classification": (
        "forget_f1", "forget_f1_gap", "forget_outside_accuracy", "retain_f1", "test_f1", "never_seen_f1",
        "entity_membership_auc", "privleak", "latent_membership_auc", "same_class_neighbours", "relearned_probability",
    ),
    "sequence_classification": (
        "forget_accuracy", "forget_accuracy_gap", "retain_accuracy", "test_accuracy", "never_seen_accuracy",
        "membership_auc", "privleak", "latent_membership_auc", "same_class_neighbours", "relearned_probability",
    ),
}  # fmt: skip

_AIMS = {"gold": "the gold's", "up": "higher", "down": "lower"}
_GROUPS = (
    "Forgetting",
    "Keeping",
    "Both in one number",
    "What an outsider can tell",
    "Inside the model",
    "Under attack",
    "Multiple choice",
    "MUSE",
    "Other numbers",
)


@dataclass(frozen=True)
class Cell:
    """One value as printed."""

    value: str
    interval: str
    n: str
    shown: bool


@dataclass(frozen=True)
class Row:
    """One metric over all models."""

    name: str
    title: str
    sentence: str
    cells: tuple[Cell, ...]
    aim: str
    reading: str
    meaning: str
    source: str


@dataclass(frozen=True)
class Group:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


def columns(results: Results) -> list[str]:
    """Models in the order of the columns: unlearned ones, the gold, the original.

    Example:
        >>> columns(Results({"original": {}, "without_clreg": {}, "unlearned": {}}))
        ['unlearned', 'without_clreg', 'gold', 'original']
    """
    return [*results.unlearned(), GOLD, ORIGINAL]


def key_numbers(task: str) -> tuple[str, ...]:
    """Names of the rows that a task always shows."""
    return _KEYS.get(task, KEY_NUMBERS)


def key_rows(results: Results) -> list[Row]:
    """The key numbers, whether the run has a value for them or not; none where nothing was evaluated."""
    return [_row(results, name) for name in key_numbers(results.task)] if results.models else []


def groups(results: Results) -> list[Group]:
    """The other numbers: all rows beside the key numbers that have a value, under their headings."""
    present = {name for numbers in results.models.values() for name, value in numbers.items() if value.shown}
    known, keys = of_task(results.task), key_numbers(results.task)
    names = [name for name in known if name in present and name not in keys]
    names += sorted(present - set(known))
    rows: dict[str, list[Row]] = {title: [] for title in _GROUPS}
    for name in names:
        rows[_group(name, results.task)].append(_row(results, name))
    return [Group(title, tuple(found)) for title, found in rows.items() if found]


def missing(results: Results) -> dict[str, str]:
    """Name -> title of the catalogue's numbers that no unlearned model of this run has; MUSE's where any was asked."""
    models = results.unlearned()
    known = of_task(results.task)
    if not any(name.startswith("muse_") for m in models for name in results.models[m]):
        known = {name: metric for name, metric in known.items() if metric.source != "muse"}
    return {k: metric.title for k, metric in known.items() if not any(results.number(m, k).shown for m in models)}


def cited(results: Results) -> dict[str, list[str]]:
    """Source -> titles of the numbers shown that come from it."""
    present = {name for numbers in results.models.values() for name, value in numbers.items() if value.shown}
    sources: dict[str, list[str]] = {}
    for name, metric in of_task(results.task).items():
        if name in present and metric.citation != "ours":
            sources.setdefault(metric.citation, []).append(metric.title)
    return sources


def beside_gold(found: Number, gold: Number) -> str:
    """How a number stands to the gold's, in words.

    Example:
        >>> beside_gold(Number(0.03), Number(0.001)), beside_gold(Number(-23.0), Number(0.0))
        ("30 times the gold's", "23.0 below the gold's")
        >>> beside_gold(Number(0.5, 0.4, 0.6), Number(0.45, 0.35, 0.55)), beside_gold(Number(0.5), Number(None))
        ('not told apart: the intervals overlap', 'not shown')
    """
    if found.value is None or gold.value is None:
        return NOT_SHOWN
    if found.value == gold.value:
        return "the same as the gold's"
    if None not in (found.low, found.high, gold.low, gold.high) and found.low <= gold.high and gold.low <= found.high:  # type: ignore[operator]
        return "not told apart: the intervals overlap"
    if found.value > 0 and gold.value > 0 and not 2 / 3 < found.value / gold.value < 1.5:
        return f"{times(found.value, gold.value)} the gold's"
    gap = found.value - gold.value
    return f"{number(abs(gap))} {'above' if gap > 0 else 'below'} the gold's"


def summary_rows(results: Results) -> list[list[str]]:
    """The key numbers as plain strings for a terminal, a heading row first."""
    names = columns(results)
    rows = [["number", *map(model_title, names), "aim"]]
    for name in key_numbers(results.task):
        cells = [results.number(model, name) for model in names]
        texts = [number(c.value) + (f" [{interval(c.low, c.high)}]" if interval(c.low, c.high) else "") for c in cells]
        rows.append([_title(results, name), *texts, _AIMS[of_task(results.task)[name].direction]])
    return rows


def _row(results: Results, name: str) -> Row:
    metric = find(name, results.task)
    names = columns(results)
    cells = tuple(_cell(results.number(model, name)) for model in names)
    reading = beside_gold(results.number(names[0], name), results.number(GOLD, name))
    if metric is None:
        return Row(name, name.replace("_", " "), "", cells, "", reading, "", "")
    source = f"{_unit(metric, results, name)}; source: {metric.citation}"
    return Row(
        name,
        _title(results, name),
        metric.sentence,
        cells,
        _AIMS[metric.direction],
        reading,
        metric.against_gold,
        source,
    )


def _unit(metric: Metric, results: Results, name: str) -> str:
    """The unit; of multiple choice also the chance level, and how many questions were cut."""
    extra = next((found.extra for m in columns(results) if (found := results.number(m, name)).shown), {})
    unit = metric.unit if extra.get("chance") is None else f"{metric.unit}; chance {number(extra['chance'])}"
    cut = extra.get("cut")
    return unit if not cut else f"{unit}; {cut} questions lost their beginning: longer than the model's context"


def _title(results: Results, name: str) -> str:
    for model in columns(results):
        found = results.number(model, name)
        if found.extra.get("complete") is False:
            return label(name, found.extra)
    metric = find(name, results.task)
    return metric.title if metric else label(name)


def _cell(found: Number) -> Cell:
    return Cell(
        number(found.value), interval(found.low, found.high), "" if found.n is None else f"{found.n:,}", found.shown
    )


def _group(name: str, task: str) -> str:
    metric = find(name, task)
    if metric is None:
        return "Other numbers"
    if metric.source == "muse":
        return "MUSE"
    if metric.source == "choices":
        return "Multiple choice"
    if metric.source != "tables":
        return "Inside the model" if metric.source == "states" else "Under attack"
    if "never_seen" in metric.sides:
        return "What an outsider can tell"
    if "forget" not in metric.sides:
        return "Keeping"
    return "Forgetting" if _only_forget(metric.sides) else "Both in one number"


def _only_forget(sides: Sequence[str]) -> bool:
    return all(side.startswith("forget") for side in sides)
