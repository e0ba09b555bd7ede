"""The report's section on an adapter: in which directions its update acts, layer by layer, in words and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from excise.reporting.figures import Figure, Key, Panel
from excise.reporting.record import as_list, as_map
from excise.reporting.style import Look, key_mark, marking
from excise.reporting.svg import STYLE, canvas_of, inline, plain_ticks
from excise.reporting.words import number, percent

_MOST_PANELS = 28  # a picture of every layer of a small model; of a large one, of so many at even distances
_SIDES = {
    "forget": ("to be forgotten", Look("side-forget", "^"), Look("side-forget", "x", dashes=(2, 2))),
    "retain": ("to be kept", Look("side-retain", "o", filled=False), Look("side-retain", "+", dashes=(2, 2))),
}
_ABSENT = (
    "Not shown: this run trained no adapter, or the statistics of its layers were not taken (evaluate.latent switches "
    "them on)."
)


@dataclass(frozen=True)
class Line:
    """One layer of the table, as text."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """What the page says of an adapter: two sentences, two figures, a table; or why there is nothing."""

    said: tuple[str, ...] = ()
    missing: str = ""
    figures: tuple[Figure, ...] = ()
    head: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()


_HEAD = (
    "Layer", "Rank", "Forgotten, start", "Forgotten, after", "Kept, start", "Kept, after", "By chance", "Nearest kept",
    "Contrast, largest", "Contrast, smallest",
)  # fmt: skip


def section(picture: Any) -> Section:
    """The section, from ``pictures.json``'s ``geometry``; whatever is not there reads "not shown"."""
    given = as_map(picture)
    layers = [as_map(entry) for entry in as_list(given.get("layers")) if isinstance(entry, Mapping)]
    shown = [entry for entry in layers if _share(entry, "after", "forget") is not None]
    if not shown:
        return Section(missing=str(given.get("not_shown") or _ABSENT))
    k = given.get("k")
    figures = [_captured(shown), _angles(shown, k if isinstance(k, int) else None)]
    return Section(
        said=_sentences(shown, given.get("taken_for") == "picture"),
        figures=tuple(figure for figure in figures if figure is not None),
        head=_HEAD,
        lines=tuple(_line(entry) for entry in shown),
    )


def _share(entry: Mapping[str, Any], when: str, side: str) -> float | None:
    value = as_map(as_map(entry.get(when)).get(side)).get("share")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _cosines(entry: Mapping[str, Any], when: str, side: str) -> list[float]:
    values = as_list(as_map(as_map(entry.get(when)).get(side)).get("cosines"))
    return [float(v) for v in values if isinstance(v, int | float)]


def _middle(layers: Sequence[Mapping[str, Any]], when: str, side: str) -> float | None:
    found = [value for entry in layers if (value := _share(entry, when, side)) is not None]
    return median(found) if found else None


def _sentences(layers: Sequence[Mapping[str, Any]], for_picture: bool) -> tuple[str, ...]:
    now, before = ({s: _middle(layers, when, s) for s in _SIDES} for when in ("after", "before"))
    chance = [float(c) for entry in layers if isinstance(c := entry.get("chance"), int | float)]
    of = "the only adapted layer" if len(layers) == 1 else f"the middle one of {len(layers)} adapted layers"
    first = (
        f"In {of}, the directions that training changed hold {_percent(now['forget'])} of what differs between the "
        f"records to be forgotten and {_percent(now['retain'])} of what differs between those to be kept"
    )
    first += f"; directions chosen at random would hold {percent(median(chance))} of either." if chance else "."
    if before["forget"] is None:
        second = "At the start the adapter wrote nothing"
    else:
        second = (
            f"Those that the adapter started with hold {_percent(before['forget'])} and {_percent(before['retain'])}"
        )
    second += "; this says where the update acts, and nothing about whether the records are gone."
    extra = ("The statistics of the layers were taken for these pictures alone.",) if for_picture else ()
    return (first, second, *extra)


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else percent(share)


def _captured(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(340, 235)
        for side, (_, now, before) in _SIDES.items():
            for when, look in (("before", before), ("after", now)):
                found = [(i, v) for i, e in enumerate(layers, 1) if (v := _share(e, when, side)) is not None]
                axes.plot([p[0] for p in found], [p[1] for p in found], linestyle="", **marking(look))
        axes.set(ylim=(-0.03, 1.03), xlabel="adapted layer, input to output", ylabel="share held")
        axes.set_xlim(0.3, len(layers) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(plain_ticks())
        svg = inline(canvas, "captured")
    middle = {side: _middle(layers, "after", side) for side in _SIDES}
    told = f"after training, in the middle one: forgotten {number(middle['forget'])}, kept {number(middle['retain'])}"
    return Figure(
        "captured",
        "What the update's directions hold",
        "Of what differs between the records of a side in a layer's output, the share that lies in the directions that "
        "the update writes to. Forgotten high and kept low: the update acts where the two sides differ.",
        (Panel("", f"Scatter plot of the shares held in {len(layers)} adapted layers; {told}.", svg),),
        _keys(layers),
    )


def _angles(layers: Sequence[Mapping[str, Any]], k: int | None) -> Figure | None:
    able = [entry for entry in layers if _cosines(entry, "after", "forget")]
    if not able:
        return None
    count = min(len(able), _MOST_PANELS)
    places = sorted({round(i * (len(able) - 1) / max(count - 1, 1)) for i in range(count)})
    some = "" if len(places) == len(able) else f" Drawn are {len(places)} of {len(able)} layers, at even distances."
    of = f"{k} strongest" if k else "strongest"
    return Figure(
        "angles",
        "Angles of the update, layer by layer",
        f"How near the update's directions come to the {of} directions of either side: 1 is a direction that both "
        f"have, 0 one at a right angle to all; the nearest pair is left.{some}",
        tuple(_angle_panel(able[place], f"angle{place}") for place in places),
        _keys(layers),
    )


def _angle_panel(entry: Mapping[str, Any], prefix: str) -> Panel:
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(230, 150)
        most = 1
        for side, (_, now, before) in _SIDES.items():
            for when, look in (("before", before), ("after", now)):
                values = _cosines(entry, when, side)
                most = max(most, len(values))
                axes.plot(range(1, len(values) + 1), values, dashes=look.dashes or (None, None), **marking(look))
        axes.set(ylim=(-0.05, 1.05), xlabel="pair of directions", ylabel="cosine")
        axes.set_xlim(0.6, most + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.yaxis.set(major_locator=MaxNLocator(4), major_formatter=plain_ticks())
        svg = inline(canvas, prefix)
    nearest = {side: max(_cosines(entry, "after", side), default=None) for side in _SIDES}
    told = f"nearest forgotten {number(nearest['forget'])}, nearest kept {number(nearest['retain'])}"
    name = _short(entry)
    return Panel(name, f"Line chart of the cosines of principal angles in the layer {name}: {told}.", svg)


def _line(entry: Mapping[str, Any]) -> Line:
    shares = [number(_share(entry, when, side)) for side in _SIDES for when in ("before", "after")]
    spectrum = as_map(entry.get("spectrum"))
    rank, chance = entry.get("rank"), entry.get("chance")
    cells = (
        str(rank) if isinstance(rank, int) else number(None),
        *shares,
        number(chance if isinstance(chance, int | float) else None),
        number(max(_cosines(entry, "after", "retain"), default=None)),
        *(", ".join(number(v) for v in as_list(spectrum.get(end)) if isinstance(v, int | float)) or number(None)
          for end in ("top", "bottom")),
    )  # fmt: skip
    return Line(_short(entry), cells)


def _short(entry: Mapping[str, Any]) -> str:
    """A layer's path without what all of them share.

    Example:
        >>> _short({"name": "base_model.model.model.layers.3.mlp.up_proj"})
        'layers.3.mlp.up_proj'
    """
    name = str(entry.get("name") or "layer")
    while True:
        for prefix in ("base_model.", "model.", "transformer."):
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        else:
            return name


def _keys(layers: Sequence[Mapping[str, Any]]) -> tuple[Key, ...]:
    begun = any(_share(entry, "before", "forget") is not None for entry in layers)
    whens = (("after training", 1), ("at the start", 2)) if begun else (("after training", 1),)
    return tuple(
        Key(key_mark(looks[place], line=False), f"{looks[0]}, {when}")  # type: ignore[arg-type]
        for when, place in whens
        for looks in _SIDES.values()
    )
