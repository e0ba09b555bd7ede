"""The table of numbers: which rows, in which order, and what each says beside the gold's number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.metrics.catalogue import METRICS, label
from excise.reporting.style import model_title
from excise.reporting.words import NOT_SHOWN, interval, number, times

#: Rows that are always there, "not shown" where the run has no value.
KEY_NUMBERS = (
    "forget_probability", "forget_quality_log10", "retain_probability", "model_utility", "privleak",
    "latent_membership_auc", "entanglement", "relearned_probability",
)  # fmt: skip

_AIMS = {"gold": "the gold's", "up": "higher", "down": "lower"}
_GROUPS = (
    "Forgetting",
    "Keeping",
    "Both in one number",
    "What an outsider can tell",
    "Inside the model",
    "Under attack",
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


def key_rows(results: Results) -> list[Row]:
    """The key numbers, whether the run has a value for them or not; none where nothing was evaluated."""
    return [_row(results, name) for name in KEY_NUMBERS] if results.models else []


def groups(results: Results) -> list[Group]:
    """The other numbers: all rows beside the key numbers that have a value, under their headings."""
    present = {name for numbers in results.models.values() for name, value in numbers.items() if value.shown}
    names = [name for name in METRICS if name in present and name not in KEY_NUMBERS]
    names += sorted(present - set(METRICS))
    rows: dict[str, list[Row]] = {title: [] for title in _GROUPS}
    for name in names:
        rows[_group(name)].append(_row(results, name))
    return [Group(title, tuple(found)) for title, found in rows.items() if found]


def missing(results: Results) -> dict[str, str]:
    """Name -> title of the catalogue's numbers that no unlearned model of this run has."""
    models = results.unlearned()
    return {k: metric.title for k, metric in METRICS.items() if not any(results.number(m, k).shown for m in models)}


def cited(results: Results) -> dict[str, list[str]]:
    """Source -> titles of the numbers shown that come from it."""
    present = {name for numbers in results.models.values() for name, value in numbers.items() if value.shown}
    sources: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
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
    for name in KEY_NUMBERS:
        cells = [results.number(model, name) for model in names]
        texts = [number(c.value) + (f" [{interval(c.low, c.high)}]" if interval(c.low, c.high) else "") for c in cells]
        rows.append([_title(results, name), *texts, _AIMS[METRICS[name].direction]])
    return rows


def _row(results: Results, name: str) -> Row:
    metric = METRICS.get(name)
    names = columns(results)
    cells = tuple(_cell(results.number(model, name)) for model in names)
    reading = beside_gold(results.number(names[0], name), results.number(GOLD, name))
    if metric is None:
        return Row(name, name.replace("_", " "), "", cells, "", reading, "", "")
    source = f"{metric.unit}; source: {metric.citation}"
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


def _title(results: Results, name: str) -> str:
    for model in columns(results):
        found = results.number(model, name)
        if found.extra.get("complete") is False:
            return label(name, found.extra)
    return label(name)


def _cell(found: Number) -> Cell:
    return Cell(
        number(found.value), interval(found.low, found.high), "" if found.n is None else f"{found.n:,}", found.shown
    )


def _group(name: str) -> str:
    metric = METRICS.get(name)
    if metric is None:
        return "Other numbers"
    if metric.source != "tables":
        return "Inside the model" if metric.source == "states" else "Under attack"
    if "never_seen" in metric.sides:
        return "What an outsider can tell"
    if "forget" not in metric.sides:
        return "Keeping"
    return "Forgetting" if _only_forget(metric.sides) else "Both in one number"


def _only_forget(sides: Sequence[str]) -> bool:
    return all(side.startswith("forget") for side in sides)
