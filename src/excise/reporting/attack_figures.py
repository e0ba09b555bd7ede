"""What the attacks found, drawn: one small panel an attack, every model's curve over the attacker's budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from excise.artifacts import GOLD, ORIGINAL
from excise.reporting.figures import Figure, Key, Panel
from excise.reporting.record import as_list, as_map
from excise.reporting.style import key_mark, marking, model_look, model_title
from excise.reporting.svg import STYLE, canvas_of, inline
from excise.reporting.words import number

Curve = list[tuple[float, float, float]]
#: Budgets that have no order: each is a way of its own, and no line joins them.
_WAYS = ("prompt", "layer")
_LONGEST = 14
_MOST = 16

#: What an attack is called, and what its curve says, for a reader who knows no machine learning.
TITLES = {
    "relearn": ("Training on half of the forgotten", "probability of the other half"),
    "related": ("Training on related text", "probability of the forgotten"),
    "savings": ("Training on all of them again", "probability reached"),
    "quantise": ("Rounding the weights", "probability of the forgotten"),
    "sample": ("Asking again and again", "share of questions that leak"),
    "prompts": ("Asking in other ways", "probability of the forgotten"),
    "adapter": ("Turning the change down or back", "probability of the forgotten"),
    "direction": ("Removing the change's direction", "probability of the forgotten"),
}
#: Which attacks come first: those that everybody can make, then those on the weights.
_ORDER = ("sample", "prompts", "relearn", "related", "savings", "quantise", "adapter", "direction")
_AXES = {
    "steps": "training steps", "bits": "bits of a weight", "samples": "answers drawn for a question",
    "scale": "share of the change that is kept",
}  # fmt: skip


def attacks(picture: Mapping[str, Any], others: Sequence[str]) -> Figure | None:
    """One panel an attack; a curve above the gold's means that the attack found something.

    Args:
        picture: ``pictures.json``'s ``attacks``: name -> budget, budgets, unit, models (value, low, high by budget).
        others: The unlearned models in order.
    """
    panels: list[Panel] = []
    seen: dict[str, None] = {}
    given = as_map(picture)
    for place, name in enumerate(sorted(given, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))):
        drawn = as_map(given[name])
        budgets = [_plain(str(b)) for b in as_list(drawn.get("budgets"))[:_MOST]]
        read = {m: _curve(as_map(own), len(budgets)) for m, own in as_map(drawn.get("models")).items()}
        curves = {m: values for m, values in read.items() if values}
        if not budgets or not curves:
            continue
        seen |= dict.fromkeys(curves)
        title, measure = TITLES.get(name, (name.replace("_", " "), "probability"))
        axis = "share of questions that leak" if drawn.get("unit") == "leak" else measure
        panels.append(_panel((title, axis), drawn.get("budget"), budgets, curves, others, f"attack{place}"))
    if not panels:
        return None
    return Figure(
        "attacks",
        "Under attack",
        "Each drawing is one attack. On curves the attacker has more to the right, and upwards more of the forgotten "
        "comes back; where there are several ways to attack, each has a line of its own. Bars are intervals. The gold "
        "under the same attack is the measure: what it gives away was never learned.",
        tuple(panels),
        tuple(Key(key_mark(model_look(m, others), line=True), model_title(m)) for m in sorted(seen, key=_place)),
    )


def _place(model: str) -> int:
    """The original and the gold first, as in the other legends."""
    return {ORIGINAL: 0, GOLD: 1}.get(model, 2)


def _plain(name: str) -> str:
    """A budget's name as a drawing may hold it: nothing but plain letters, digits and signs, and not long.

    Example:
        >>> _plain("apart-1"), _plain("<b>$x$")
        ('apart-1', '?b??x?')
    """
    return re.sub(r"[^A-Za-z0-9 .+_-]", "?", name)[:_LONGEST].replace("-", "\N{MINUS SIGN}" if name[:1] == "-" else "-")


def _curve(own: Mapping[str, Any], points: int) -> Curve | None:
    """(value, low, high) at each budget; None where a model has no such curve."""
    columns = [as_list(own.get(key))[:points] for key in ("value", "low", "high")]
    if len(columns[0]) != points or not any(isinstance(v, int | float) for v in columns[0]):
        return None

    def at(column: Sequence[Any], i: int) -> float:
        return float(column[i]) if i < len(column) and isinstance(column[i], int | float) else float("nan")

    return [(at(columns[0], i), at(columns[1], i), at(columns[2], i)) for i in range(points)]


def _panel(
    words: tuple[str, str], budget: Any, budgets: Sequence[str], curves: Mapping[str, Curve], others: Sequence[str],
    prefix: str,
) -> Panel:  # fmt: skip
    """One attack; ``words`` are its heading and the words at the axis of values."""
    (title, axis), ways = words, budget in _WAYS
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(270, 40 + 21 * len(budgets) if ways else 205)
        (_ways if ways else _over)(axes, budgets, curves, others)
        axes.set(xlabel=axis) if ways else axes.set(xlabel=_AXES.get(str(budget), "budget"), ylabel=axis)
        svg = inline(canvas, prefix)
    told = "; ".join(f"{model_title(m)}: from {number(p[0][0])} to {number(p[-1][0])}" for m, p in curves.items())
    kind = f"Dot plot, {len(budgets)} ways" if ways else f"Line chart, {len(budgets)} budgets"
    return Panel(title, f"{kind}: {title.lower()}. {told}.", svg)


def _over(axes: Axes, budgets: Sequence[str], curves: Mapping[str, Curve], others: Sequence[str]) -> None:
    """A curve a model over ordered budgets, moved a little sideways so that intervals stand beside each other."""
    for shift, (model, points) in enumerate(curves.items()):
        look = model_look(model, others)
        where = [x + 0.05 * (shift - (len(curves) - 1) / 2) for x in range(len(points))]
        axes.plot(where, [p[0] for p in points], dashes=look.dashes or (None, None), **marking(look))
        axes.vlines(where, [p[1] for p in points], [p[2] for p in points], color=look.colour, linewidth=1.1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(budgets)), list(budgets))


def _ways(axes: Axes, budgets: Sequence[str], curves: Mapping[str, Curve], others: Sequence[str]) -> None:
    """A line a way of attacking, each model's mark and interval on it."""
    for shift, (model, points) in enumerate(curves.items()):
        look = model_look(model, others)
        where = [y + 0.12 * (shift - (len(curves) - 1) / 2) for y in range(len(points))]
        axes.plot([p[0] for p in points], where, linestyle="", **marking(look))
        axes.hlines(where, [p[1] for p in points], [p[2] for p in points], color=look.colour, linewidth=1.1)
    axes.set(xlim=(-0.03, 1.03), ylim=(len(budgets) - 0.5, -0.5))
    axes.set_yticks(range(len(budgets)), list(budgets))
