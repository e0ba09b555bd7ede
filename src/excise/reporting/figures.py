"""The report's figures: matplotlib drawings as inline SVG, with no text in them but our own.

Names of models, sides and terms come from people and stand in the page's HTML (legends, captions), where Jinja2
escapes them; a drawing holds axis words and numbers only. Each figure is drawn for a phone's width and scales up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from excise.artifacts import Number
from excise.reporting.style import (
    STAND_INS,
    key_mark,
    marking,
    model_look,
    model_title,
    side_look,
    side_title,
    target_mark,
)
from excise.reporting.svg import STYLE, canvas_of, inline, plain_ticks
from excise.reporting.words import number

_MOST_POINTS = 150  # per side and model on a map: enough to see the shape, small enough to mail
_MOST_STEPS = 240  # per loss curve


@dataclass(frozen=True)
class Key:
    """A legend entry: the drawn mark and the words beside it."""

    mark: Markup
    words: str


@dataclass(frozen=True)
class Panel:
    """One drawing: its heading (empty for a single panel), the words a screen reader says, the SVG."""

    title: str
    label: str
    svg: Markup


@dataclass(frozen=True)
class Figure:
    """One or several drawings under one legend and one caption."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()


def trade_off(
    points: Mapping[str, tuple[Number, Number]],
    others: Sequence[str],
    *,
    forget_bar: float | None,
    retain_bar: float | None,
) -> Figure | None:
    """Forget probability against retained probability, one point a model, with intervals and the target area.

    Args:
        points: Model -> (forget probability, retained probability); models without both are left out.
        others: The unlearned models in order.
        forget_bar: Right edge of the target area.
        retain_bar: Lower edge of the target area.
    """
    shown = {name: pair for name, pair in points.items() if pair[0].shown and pair[1].shown}
    if not shown:
        return None
    floor = 1e-4
    xs = [max(pair[0].value or 0.0, floor) for pair in shown.values()]
    ys = [pair[1].value or 0.0 for pair in shown.values()]
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(360, 250)
        low = max(0.0, min(0.75, min(ys) - 0.06))
        left = min(*xs, floor * 10, 1.0) / 1.6
        axes.set(xscale="log", xlim=(left, 1.35), ylim=(low, 1.02))
        if forget_bar is not None and retain_bar is not None:
            axes.fill_between([left, forget_bar], retain_bar, 1.02, color=STAND_INS["target"], linewidth=0, zorder=0)
        for name, (forget, retain) in shown.items():
            look = model_look(name, others)
            x, y = max(forget.value or 0.0, floor), retain.value or 0.0
            axes.plot(_span(forget, floor), [y, y], color=look.colour, linewidth=1.1)
            axes.plot([x, x], _span(retain, 0.0), color=look.colour, linewidth=1.1)
            axes.plot([x], [y], linestyle="", markersize=8, **marking(look))
        ticks = [10.0**k for k in range(math.ceil(math.log10(left)), 1)]
        axes.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator(), major_formatter=plain_ticks())
        axes.set_xlabel("probability of the forgotten answers")
        axes.set_ylabel("probability of the kept ones")
        svg = inline(canvas, "tradeoff")
    told = "; ".join(
        f"{model_title(m)}: forgotten {number(f.value)}, kept {number(r.value)}" for m, (f, r) in shown.items()
    )
    keys = [Key(key_mark(model_look(m, others), line=False), model_title(m)) for m in shown]
    if forget_bar is not None and retain_bar is not None:
        keys.append(Key(target_mark(), "where a result should lie"))
    return Figure(
        "trade-off",
        "Forgetting against keeping",
        "Further left: the forgotten answers are less likely (the axis is logarithmic). Further up: the kept answers "
        "are as likely as before. The gold, not the corner, is the aim. Thin lines are intervals.",
        (Panel("", f"Scatter plot of forgetting against keeping. {told}.", svg),),
        tuple(keys),
    )


def relearning(
    curves: Mapping[str, Sequence[float | None]], steps: Sequence[float], others: Sequence[str], what: str = "answers"
) -> Figure | None:
    """How fast each model learns the forgotten again: probability (of ``what``) after so many training steps."""
    shown = {name: list(values) for name, values in curves.items() if _any(values) and len(values) == len(steps)}
    if not shown or not steps:
        return None
    places = [math.log2(step + 1) for step in steps]  # 0 has a place, and 1, 2, 4, 8 stand apart
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(340, 235)
        for name, values in shown.items():
            look = model_look(name, others)
            axes.plot(places, _gaps(values), dashes=look.dashes or (None, None), **marking(look))
        axes.set(ylim=(-0.03, 1.03), xlabel="training steps on forgotten records", ylabel="probability of the others")
        axes.set_xticks(places, [f"{step:g}" for step in steps])
        svg = inline(canvas, "relearning")
    told = "; ".join(f"{model_title(m)}: from {number(v[0])} to {number(v[-1])}" for m, v in shown.items())
    return Figure(
        "relearning",
        "Learning it again",
        "An attacker who holds some of the records trains on them; drawn is how likely the other forgotten "
        f"{what} become. A curve above the gold's means that the knowledge was hidden rather than gone.",
        (Panel("", f"Line chart of relearning over {steps[0]:g} to {steps[-1]:g} steps. {told}.", svg),),
        _line_keys(shown, others),
    )


def state_map(picture: Mapping[str, Any], others: Sequence[str], mark: str = "record") -> Figure | None:
    """Inner states in two dimensions, one panel a model, the same axes in all; each is that of one ``mark``."""
    models: dict[str, dict[str, np.ndarray]] = {}
    for name, sides in (picture.get("models") or {}).items():
        found = {side: _points(values) for side, values in sides.items()}
        if any(len(values) for values in found.values()):
            models[name] = found
    if not models:
        return None
    ordered = sorted(models, key=lambda m: (m == "gold", m != "original", list(others).index(m) if m in others else 99))
    everything = np.concatenate([values for sides in models.values() for values in sides.values() if len(values)])
    low, high = everything.min(0), everything.max(0)
    pad = 0.05 * np.maximum(high - low, 1e-9)
    drawn = sorted(
        {side for sides in models.values() for side in sides}, key=lambda s: (s == "forget", s == "never_seen", s)
    )
    panels = tuple(
        _map_panel(models[name], drawn, f"map{place}", (low - pad, high + pad), model_title(name))
        for place, name in enumerate(ordered)
    )
    explained = [float(v) for v in picture.get("explained") or [] if isinstance(v, int | float)][:2]
    method = str(picture.get("method", "pca")).upper()
    share = f" The two axes hold {100 * sum(explained):.0f} % of the variance." if explained else ""
    return Figure(
        "map",
        "Where the records lie inside the model",
        f"Each mark is one {mark}'s inner state, brought down to two dimensions ({method}), the same axes in every "
        f"panel.{share} For the gold, forgotten records are never-seen ones as well. A cluster of their own, where the "
        "gold has none, is a trace; seeing none proves nothing, because two dimensions show only a part.",
        panels,
        tuple(Key(key_mark(side_look(side), line=False), side_title(side)) for side in drawn),
    )


def losses(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each term of the objective over the steps, one panel a term with its own scale."""
    names: list[str] = []
    for row in log:
        names.extend(name for name in row.get("terms") or {} if name not in names)
    panels = []
    for place, name in enumerate(names[:12]):
        found = [(row["step"], (row.get("terms") or {}).get(name)) for row in log]
        pairs = [(float(step), float(value)) for step, value in found if isinstance(value, int | float)]
        if pairs:
            panels.append(_loss_panel(name, pairs[:: max(1, math.ceil(len(pairs) / _MOST_STEPS))], f"loss{place}"))
    if not panels:
        return None
    return Figure(
        "losses",
        "Training, term by term",
        "The value of each term before its weight, over the optimizer steps; every panel has its own scale.",
        tuple(panels),
    )


# ---------------------------------------------------------------------------------------------------- parts


def _map_panel(
    sides: Mapping[str, np.ndarray], drawn: Sequence[str], name: str, limits: tuple[np.ndarray, np.ndarray], title: str
) -> Panel:
    with mpl.rc_context(
        {**STYLE, "axes.spines.top": True, "axes.spines.right": True, "axes.edgecolor": STAND_INS["rule"]}
    ):
        canvas, axes = canvas_of(230, 210)
        for side in drawn:
            values = sides.get(side, np.empty((0, 2)))
            axes.plot(values[:, 0], values[:, 1], linestyle="", **{**marking(side_look(side)), "markersize": 4.2})
        low, high = limits
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        svg = inline(canvas, name)
    told = ", ".join(f"{len(values)} {side_title(side)}" for side, values in sides.items())
    return Panel(title, f"Map of inner states of the {title} model: {told}.", svg)


def _loss_panel(name: str, pairs: Sequence[tuple[float, float]], prefix: str) -> Panel:
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(230, 150)
        axes.plot([p[0] for p in pairs], [p[1] for p in pairs], color=STAND_INS["s-0"])
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set(major_locator=MaxNLocator(4), major_formatter=plain_ticks())
        svg = inline(canvas, prefix)
    return Panel(name, f"Line chart of the term {name}: from {number(pairs[0][1])} to {number(pairs[-1][1])}.", svg)


def _line_keys(names: Mapping[str, Any], others: Sequence[str]) -> tuple[Key, ...]:
    return tuple(Key(key_mark(model_look(name, others), line=True), model_title(name)) for name in names)


def _points(values: Any) -> np.ndarray:
    rows = [row for row in values if isinstance(row, list | tuple) and len(row) == 2 and None not in row]
    every = max(1, math.ceil(len(rows) / _MOST_POINTS))
    return np.asarray(rows[::every], dtype=float).reshape(-1, 2)


def _any(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _span(value: Number, floor: float) -> list[float]:
    middle = value.value or 0.0
    return [
        max(value.low if value.low is not None else middle, floor),
        max(value.high if value.high is not None else middle, floor),
    ]
