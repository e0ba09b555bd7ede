"""What the stopping rule saw: forgotten beside never-seen rows, and the retained, step by step, as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from excise.reporting.figures import Figure, Key, Panel
from excise.reporting.record import as_list, as_map
from excise.reporting.style import STAND_INS, Look, key_mark, marking, target_mark
from excise.reporting.svg import STYLE, canvas_of, inline, plain_ticks
from excise.reporting.words import number

NOTHING_KEPT = (
    "The stopping rule found no weights to keep: after no step did the forgotten rows look like never-seen ones while "
    "the retained were good enough. The weights are those of the last step, and this run is no success."
)
#: Statistic of the rule -> what its axis is called, what it is.
_SAID = {
    "auc": ("share of pairs", "how often a forgotten row is likelier than a never-seen one of its kind; a half"),
    "gap": (
        "probability",
        "by how much probability on average a forgotten row is likelier than never-seen ones of its kind; zero",
    ),
    "f1": ("F1", "by how much strict F1 the forgotten rows' entities are found better than never-seen ones; zero"),
}
_SEEN, _KEPT = Look("s-0", "o"), Look("s-1", "^")


def nothing_kept(stopping: Any) -> bool:
    """Whether there was a rule and it kept nothing."""
    return isinstance(stopping, Mapping) and stopping.get("kept") is None


def figure(stopping: Any) -> Figure | None:
    """Both of the rule's numbers over the run with what was admissible; None without a rule."""
    given = as_map(stopping)
    checks = [c for c in map(as_map, as_list(given.get("checks"))) if {"step", "auc", "quality"} <= set(c)]
    if not checks:
        return None
    kept = next((c for c in checks if c["step"] == given.get("kept")), None)
    low, high = (*map(float, as_list(given.get("band"))), 0.0, 1.0)[:2]
    least = float(given.get("quality") or 0.0)
    judged = [c for c in checks if c["quality"] is not None]  # outside the band the retained are not looked at
    name = str(given.get("statistic") or "auc")
    name = name if name in _SAID and all(c.get(name) is not None for c in checks) else "auc"
    axis, said = _SAID[name]
    panels, second = [_panel("forgotten beside never-seen", name, axis, checks, kept, (low, high))], ""
    if judged:
        panels.append(_panel("the retained", "quality", "share of the original's", judged, kept, (least, None)))
        second = (
            "Second: the probability of retained rows as a share of the original's, looked at while the first is "
            "admissible. "
        )
    ended = "None was kept." if kept is None else f"Kept: {_of(kept)}."
    return Figure(
        "stopping",
        "When it stopped",
        f"First: {said} is where a model that never saw either would be.{_beginning(given, name)} {second}The rule "
        f"reads rows that nothing else here is measured on. {ended}",
        tuple(panels),
        (
            Key(key_mark(_SEEN, line=True), "after a step"),
            Key(target_mark(), "admissible"),
            *([Key(key_mark(_KEPT, line=False), "kept")] if kept else []),
        ),
    )


def _beginning(given: Mapping[str, Any], name: str) -> str:
    """What was taken off, where a model that never saw the forgotten rows was asked."""
    easier = as_map(given.get("never_saw")).get(name)
    if easier is None:
        return ""
    return f" It is counted from what a model that never saw the forgotten rows says of both: {float(easier):+.3f}."


def _of(kept: Mapping[str, Any]) -> str:
    if kept.get("at") is None:
        return f"the weights after step {kept['step']}"
    return f"a mix of the weights of the steps before and after it that were looked at (at step {kept['step']:.1f})"


def _panel(
    title: str,
    name: str,
    axis: str,
    checks: list[Mapping[str, Any]],
    kept: Mapping[str, Any] | None,
    bounds: tuple[float, float | None],
) -> Panel:
    values = [float(c[name]) for c in checks]
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(340, 200)
        top = bounds[1] if bounds[1] is not None else max(1.02, *values) * 2
        axes.axhspan(bounds[0], top, color=STAND_INS["target"], zorder=0)
        axes.plot([c["step"] for c in checks], values, **{**marking(_SEEN), "markersize": 3})
        if kept is not None:
            axes.plot([kept["step"]], [float(kept[name])], **{**marking(_KEPT), "markersize": 8})
        reach = [*values, bounds[0], *([bounds[1]] if bounds[1] is not None else [1.0])]
        room = max(0.02, 0.06 * (max(reach) - min(reach)))
        axes.set(xlabel="step", ylabel=axis, ylim=(min(reach) - room, max(reach) + room))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(plain_ticks())
        svg = inline(canvas, f"stopping-{name}")
    told = f"from {number(values[0])} to {number(values[-1])}" + (
        f"; kept at {number(float(kept[name]))}" if kept is not None else "; nothing kept"
    )
    return Panel(title, f"Line chart over the steps, {title}: {told}.", svg)
