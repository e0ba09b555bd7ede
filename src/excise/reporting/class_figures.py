"""The report's figures of a classifier: scores by side, gaps to the gold, places among the classes, membership.

As in `figures`: no text in a drawing but our own; names of sides and models stand in the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.reporting.class_checks import GAP_LIMIT
from excise.reporting.figures import Figure, Key, Panel
from excise.reporting.record import as_list, as_map
from excise.reporting.style import (
    STAND_INS,
    key_mark,
    line_mark,
    marking,
    model_look,
    model_title,
    side_look,
    side_title,
    target_mark,
)
from excise.reporting.svg import STYLE, canvas_of, inline, plain_ticks
from excise.reporting.words import number

_SCORE = {"token_classification": ("f1", "F1"), "sequence_classification": ("accuracy", "accuracy")}
_SIDES = ("forget", "never_seen", "retain", "untouched", "test", "dev")
_MOST_SIDES = 12


def scores(results: Results) -> Figure | None:
    """F1 (or accuracy) of each model on each side, with intervals, the gold among them."""
    suffix, named = _SCORE[results.task]
    names = [GOLD, ORIGINAL, *results.unlearned()]
    present = {k for numbers in results.models.values() for k, v in numbers.items() if v.shown and "/" not in k}
    sides = [k.removesuffix(f"_{suffix}") for k in sorted(present) if k.endswith(f"_{suffix}")]
    sides = [s for s in sides if s != "relearned" and not s.endswith("_macro")]
    sides.sort(key=lambda s: (_SIDES.index(s) if s in _SIDES else len(_SIDES), s))
    panels = tuple(
        _dots(results, names, f"{side}_{suffix}", side_title(side), f"score{place}", named)
        for place, side in enumerate(sides[:_MOST_SIDES])
    )
    if not panels:
        return None
    return Figure(
        "scores",
        f"{named[0].upper()}{named[1:]}, side by side",
        "One panel a set of rows; lines are 95 % intervals. On the forgotten rows the aim is the gold's mark, not 0: a "
        f"model that never saw them has about the {named} that it has on never-seen rows. On all others it is the "
        "original's.",
        panels,
        _keys(results, names),
    )


def gaps(results: Results) -> Figure | None:
    """Distance of each model from the gold on forgotten rows and on the set test, with 90 % intervals."""
    suffix, named = _SCORE[results.task]
    names = [ORIGINAL, *results.unlearned()]
    panels = tuple(
        _dots(results, names, name, side_title(side), f"gap{place}", f"{named} less the gold's", gap=True)
        for place, side in enumerate(("forget", "test"))
        if any(results.number(model, name := f"{side}_{suffix}_gap").shown for model in names)
    )
    if not panels:
        return None
    return Figure(
        "gaps",
        "Gap to the gold",
        f"The {named} of each model less that of the gold; lines are 90 % intervals, both on the same drawn rows. "
        "Right of 0: still known. Left of 0, on the forgotten rows: pushed further than a model that never saw them, "
        "which gives them away as well.",
        panels,
        (*_keys(results, names), Key(target_mark(), f"within {GAP_LIMIT:g} of the gold")),
    )


def _dots(
    results: Results, names: Sequence[str], metric: str, title: str, prefix: str, axis: str, *, gap: bool = False
) -> Panel:
    others = results.unlearned()
    shown = {m: n for m in names if (n := results.number(m, metric)).value is not None}
    with mpl.rc_context({**STYLE, "axes.spines.left": False}):
        canvas, axes = canvas_of(340 if gap else 230, 74 + 17 * len(shown))  # two panels are drawn wider than five
        if gap:
            axes.axvspan(-GAP_LIMIT, GAP_LIMIT, color=STAND_INS["target"], linewidth=0, zorder=0)
            axes.axvline(0, color=STAND_INS["s-gold"], linewidth=1.2, zorder=1)
        for place, (model, found) in enumerate(shown.items()):
            look = model_look(model, others)
            axes.plot(_line(found), [-place, -place], color=look.colour, linewidth=1.3)
            axes.plot([found.value or 0.0], [-place], linestyle="", **{**marking(look), "markersize": 7})
        reach = max([1.15 * abs(v) for n in shown.values() for v in _line(n)] + [3 * GAP_LIMIT])
        axes.set(ylim=(0.7 - len(shown) - 0.4, 0.7), yticks=[], xlabel=axis)
        axes.set_xlim(*((-reach, reach) if gap else (-0.03, 1.03)))
        axes.xaxis.set(major_locator=MaxNLocator(5), major_formatter=plain_ticks())
        svg = inline(canvas, prefix)
    told = "; ".join(f"{model_title(m)} {number(n.value)}" for m, n in shown.items())
    return Panel(title, f"Dot plot of {axis}, {title}: {told}.", svg)


def _line(found: Number) -> list[float]:
    middle = found.value or 0.0
    return [middle if found.low is None else found.low, middle if found.high is None else found.high]


def _keys(results: Results, names: Sequence[str]) -> tuple[Key, ...]:
    others = results.unlearned()
    return tuple(Key(key_mark(model_look(m, others), line=False), model_title(m)) for m in names if m in results.models)


def classes(picture: Mapping[str, Any], others: Sequence[str]) -> Figure | None:
    """Nearness of entities to their own class and to the words outside entities, one panel a model."""
    models = {
        name: {side: found for side, values in as_map(sides).items() if len(found := _points(values))}
        for name, sides in as_map(picture.get("models")).items()
    }
    models = {name: sides for name, sides in models.items() if sides}
    if not models:
        return None
    everything = np.concatenate([values for sides in models.values() for values in sides.values()])
    low, high = everything.min(0) - 0.05, everything.max(0) + 0.05
    drawn = sorted({s for sides in models.values() for s in sides}, key=lambda s: (s == "forget", s == "never_seen", s))

    def draw(axes: Axes, sides: Mapping[str, np.ndarray]) -> None:
        both = [max(low[0], low[1]), min(high[0], high[1])]
        if both[0] < both[1]:
            axes.plot(both, both, color=STAND_INS["rule"], linewidth=1, dashes=(3, 3))
        for side in drawn:
            values = sides.get(side, np.empty((0, 2)))
            axes.plot(values[:, 0], values[:, 1], linestyle="", **{**marking(side_look(side)), "markersize": 4.2})
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="nearness to own class", ylabel="nearness to O")
        for line in (axes.xaxis, axes.yaxis):
            line.set(major_locator=MaxNLocator(4), major_formatter=plain_ticks())

    panels = []
    for place, name in enumerate(_ordered(models, others)):
        told = ", ".join(f"{len(values)} {side_title(side)}" for side, values in models[name].items())
        label = f"Scatter plot of nearness to the own class and to words outside, {model_title(name)} model: {told}."
        panels.append(_panel(partial(draw, sides=models[name]), model_title(name), label, f"class{place}", 210))
    return Figure(
        "classes",
        "Where the words lie among their classes",
        "Each mark is a word of an entity: how near it lies to the middle of its own class (right) and to the words "
        "that are no entity, O (up), as cosines. Below the broken line it is nearer to its class. What matters is that "
        "the forgotten words lie as they do in the gold: in their class, in O, or some here and some there. Smeared "
        "between the two where the gold has two groups, they stand out.",
        tuple(panels),
        tuple(Key(key_mark(side_look(side), line=False), side_title(side)) for side in drawn),
    )


def membership(
    picture: Mapping[str, Any], others: Sequence[str], what: str = "the right classes of a row"
) -> Figure | None:
    """Loss of forgotten and never-seen rows, one panel a model; a logarithmic axis where edges begin above 0."""
    edges = [float(v) for v in as_list(picture.get("edges")) if isinstance(v, int | float) and v >= 0]
    models = {name: _shares(as_map(sides), len(edges) - 1) for name, sides in as_map(picture.get("models")).items()}
    models = {name: sides for name, sides in models.items() if sides}
    if not models or len(edges) < 2 or edges[-1] <= edges[0]:
        return None
    wide = edges[0] > 0
    top = max(max(values) for sides in models.values() for values in sides.values())
    ticks = [10.0**k for k in range(-6, 4) if edges[0] <= 10.0**k * 1.001 and 10.0**k <= edges[-1] * 1.001]

    def draw(axes: Axes, sides: Mapping[str, list[float]]) -> None:
        for side, values in sides.items():
            look = side_look(side)
            axes.stairs(values, edges, color=look.colour, linewidth=1.8, linestyle="-" if side == "forget" else "--")
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08 * top), xlabel="loss (nats)", ylabel="share")
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(plain_ticks())
        axes.yaxis.set(major_locator=MaxNLocator(4), major_formatter=plain_ticks())

    panels = []
    for place, name in enumerate(_ordered(models, others)):
        label = f"Histogram of the loss of forgotten and never-seen rows, {model_title(name)} model: "
        label += "; ".join(f"{side_title(s)} mostly near {number(_mode(v, edges))}" for s, v in models[name].items())
        panels.append(_panel(partial(draw, sides=models[name]), model_title(name), f"{label}.", f"member{place}", 160))
    return Figure(
        "membership",
        "Who looks known",
        f"How surprised the model is by {what}: the share of rows at each loss"
        f"{', on a logarithmic axis' if wide else ''}. Forgotten rows left of never-seen ones look known, right of "
        "them they look avoided; an outsider can use either. They need not lie on each other: the aim is the gold's "
        "picture.",
        tuple(panels),
        tuple(
            Key(line_mark(side_look(side), broken=side != "forget"), side_title(side))
            for side in ("forget", "never_seen")
        ),
    )


def _shares(sides: Mapping[str, Any], bins: int) -> dict[str, list[float]]:
    out = {}
    for side in ("forget", "never_seen"):
        counts = [float(v) for v in as_list(sides.get(side)) if isinstance(v, int | float)]
        if len(counts) == bins and sum(counts) > 0:
            out[side] = [v / sum(counts) for v in counts]
    return out


def _mode(values: Sequence[float], edges: Sequence[float]) -> float:
    at = max(range(len(values)), key=values.__getitem__)
    low, high = edges[at], edges[at + 1]
    return float(np.sqrt(low * high)) if edges[0] > 0 else (low + high) / 2


def _ordered(models: Mapping[str, Any], others: Sequence[str]) -> list[str]:
    """The original, the unlearned models, the gold last, as on the map."""
    return sorted(models, key=lambda m: (m == GOLD, m != ORIGINAL, list(others).index(m) if m in others else 99))


def _points(values: Any) -> np.ndarray:
    rows = [
        row
        for row in as_list(values)
        if isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(v, int | float) for v in row)
    ]
    return np.asarray(rows, dtype=float).reshape(-1, 2)


def _panel(draw: Callable[[Axes], None], title: str, label: str, prefix: str, height: int) -> Panel:
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(230, height)
        draw(axes)
        return Panel(title, label, inline(canvas, prefix))
