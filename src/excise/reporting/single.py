"""Single rows that stand out and what an audit bounds, as tables: row numbers, lines and numbers, no text of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise.reporting.record import as_list, as_map
from excise.reporting.style import model_title, side_title
from excise.reporting.words import NOT_SHOWN, number, percent


@dataclass(frozen=True)
class Listing:
    """A small table: heading, a sentence, names of columns, cells."""

    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Audit:
    """The audited bound: sentences, and what each layer's states are shown to carry."""

    said: tuple[str, ...] = ()
    layers: tuple[tuple[str, ...], ...] = ()
    proves: tuple[str, ...] = ()


_TITLES = {
    "forget": ("Still known", "Rows {side} whose answers are likeliest beside {beside}, the worst first."),
    "kept": ("Lost", "Rows {side} whose answers lost most beside {beside}, the worst first."),
}


def worst(picture: Mapping[str, Any], others: Sequence[str]) -> tuple[Listing, ...]:
    """The rows that stand out, a table for each unlearned model and kind.

    Args:
        picture: ``pictures.json``'s ``worst``.
        others: The unlearned models in order.
    """
    out = []
    for kind, (title, note) in _TITLES.items():
        given = as_map(picture.get(kind))
        beside, side = str(given.get("beside") or "gold"), str(given.get("side") or kind)
        models = as_map(given.get("models"))
        for model in [m for m in others if m in models]:
            lines = [_row(as_map(row)) for row in as_list(models[model])]
            head = ("Row", "Line in its file", model_title(model), model_title(beside))
            said = note.format(side=side_title(side), beside=f"the {model_title(beside)}")
            if lines:
                out.append(Listing(f"{title}: {model_title(model)}", said, head, tuple(lines)))
    return tuple(out)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (_whole(row.get("row")), _whole(row.get("line")), _number(row.get("value")), _number(row.get("beside")))


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else NOT_SHOWN


def _number(value: Any) -> str:
    return number(float(value) if isinstance(value, int | float) else None)


def audit(found: Mapping[str, Any]) -> Audit:
    """What ``audit.json`` says in sentences; empty where there is none."""
    epsilon, proves = as_map(found.get("epsilon")), as_map(found.get("proves"))
    layers = tuple(
        tuple(_whole(layer.get(k)) for k in ("layer", "n", "errors"))
        + tuple(_number(layer.get(k)) for k in ("bits", "epsilon"))
        for layer in map(as_map, as_list(found.get("layers")))
    )
    if not epsilon and not layers:
        return Audit()
    level = found.get("level")
    confidence = (
        f"With {percent(level)} confidence " if isinstance(level, int | float) else "With the stated confidence "
    )
    said = (
        f"{confidence}the privacy loss (epsilon) that remains of a canary is at least {_number(epsilon.get('bound'))}; "
        f"with this many canaries no more than {_number(epsilon.get('at_most'))} could have been shown.",
        f"A coin dealt out {_whole(epsilon.get('canaries'))} canaries; of {_whole(epsilon.get('guesses'))} guesses "
        f"which the model was trained on, {_whole(epsilon.get('right'))} were right.",
    )
    return Audit(said, layers, tuple(str(text) for text in proves.values()))
