"""What lies inside, layer by layer, every model's line beside the gold's: entanglement, membership, the logit lens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import FixedLocator, NullLocator

from excise.reporting.figures import Figure, Key, Panel
from excise.reporting.record import as_list, as_map
from excise.reporting.style import key_mark, marking, model_look, model_title, side_title
from excise.reporting.svg import STYLE, canvas_of, inline, log_ticks, plain_ticks
from excise.reporting.words import number

Curves = Mapping[str, Sequence[float | None]]
#: Metric by layer -> heading and axis, in the order of the panels.
_LATENT = {
    "latent_membership_auc": ("A classifier tells them apart", "AUC"),
    "latent_projection_auc": ("One direction gives them away", "AUC"),
    "neighbours_never_seen": ("Neighbours: never-seen rows", "share of its own kind"),
    "neighbours_retain": ("Neighbours: kept rows", "share of its own kind"),
}


def entanglement(picture: Mapping[str, Any], others: Sequence[str]) -> Figure | None:
    """Entanglement of forget and retain states at each layer, one line a model."""
    layers, shown = as_list(picture.get("layers")), curves(as_map(picture.get("models")), picture.get("layers"))
    if not shown:
        return None
    told = "; ".join(f"{model_title(m)}: last layer {number(v[-1])}" for m, v in shown.items())
    label = f"Line chart of entanglement at {len(layers)} layers. {told}."
    return Figure(
        "entanglement",
        "Entanglement by layer",
        "How much the model's inner states of forgotten and kept records overlap. Lower means further apart, "
        "which is not better by itself: the gold's line is the aim. "
        "The last layer is the one that answers are read from.",
        (Panel("", label, _drawn(shown, layers, others, "entanglement", "entanglement", None)),),
        _keys(shown, others),
    )


def latent(picture: Mapping[str, Any], others: Sequence[str]) -> Figure | None:
    """Whether forgotten rows can be told by their inner states, at each layer, one panel a measure."""
    layers, metrics = as_list(picture.get("layers")), as_map(picture.get("metrics"))
    named = [name for name in _LATENT if name in metrics] + [name for name in metrics if name not in _LATENT]
    panels: list[Panel] = []
    seen: dict[str, Any] = {}
    for place, name in enumerate(named[:8]):
        title, axis = _LATENT.get(name, (name.replace("_", " "), "value"))
        shown = curves(as_map(metrics[name]), layers)
        if not shown:
            continue
        seen |= shown
        svg = _drawn(shown, layers, others, axis, f"latent{place}", (-0.03, 1.03))
        told = "; ".join(f"{model_title(m)}: last {number(v[-1])}" for m, v in shown.items())
        panels.append(Panel(title, f"Line chart by layer, {title.lower()}. {told}.", svg))
    if not panels:
        return None
    return Figure(
        "latent",
        "Recognised from inside, layer by layer",
        "Can somebody who reads the inner states tell forgotten records from others? AUC of 0.5 is guessing, 1 is "
        "certain. The gold's line is the aim: above it a trace remains, or unlearning put the records apart.",
        tuple(panels),
        _keys(seen, others),
    )


def lens(picture: Mapping[str, Any], others: Sequence[str]) -> Figure | None:
    """Probability of the answers as read from each layer, one panel a side."""
    layers, sides = as_list(picture.get("layers")), as_map(picture.get("sides"))
    panels: list[Panel] = []
    seen: dict[str, Any] = {}
    for place, (side, models) in enumerate(list(sides.items())[:6]):
        shown = curves(as_map(models), layers)
        if not shown:
            continue
        seen |= shown
        svg = _drawn(shown, layers, others, "probability", f"lens{place}", (-0.03, 1.03))
        told = "; ".join(f"{model_title(m)}: from {number(v[0])} to {number(v[-1])}" for m, v in shown.items())
        panels.append(
            Panel(side_title(side), f"Line chart of answers read from each layer, {side_title(side)}. {told}.", svg)
        )
    if not panels:
        return None
    return Figure(
        "lens",
        "Answers read from inner layers",
        "How likely the answers are when each layer is read as if it were the last (logit lens). A forgotten answer "
        "that is likely in the middle and unlikely at the end was covered up rather than removed.",
        tuple(panels),
        _keys(seen, others),
    )


def curves(models: Mapping[str, Any], layers: Any) -> dict[str, list[float | None]]:
    """Models that have a value for each layer, and at least one that is there."""
    points = len(as_list(layers))
    read = {m: [v if isinstance(v, int | float) else None for v in as_list(values)] for m, values in models.items()}
    return {m: v for m, v in read.items() if len(v) == points and any(x is not None for x in v)}


def _drawn(
    shown: Curves, layers: Sequence[Any], others: Sequence[str], axis: str, prefix: str,
    limits: tuple[float, float] | None,
) -> Any:  # fmt: skip
    """One line a model over the layers; with limits between them, else from 0, or logarithmic where that is wide."""
    finite = [v for values in shown.values() for v in values if v is not None and v > 0]
    with mpl.rc_context(STYLE):
        canvas, axes = canvas_of(340, 235) if limits is None else canvas_of(250, 190)
        for name, values in shown.items():
            look = model_look(name, others)
            drawn = [math.nan if value is None else float(value) for value in values]
            axes.plot(range(len(layers)), drawn, dashes=look.dashes or (None, None), **marking(look))
        if limits is not None:
            axes.set_ylim(*limits)
        elif finite and max(finite) / min(finite) > 12:
            axes.set_yscale("log")
            axes.yaxis.set(major_locator=FixedLocator(log_ticks(min(finite), max(finite))), minor_locator=NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain_ticks())
        places = list(range(0, len(layers), max(1, math.ceil(len(layers) / 9))))
        axes.set_xticks(places, [_layer(layers[place]) for place in places])
        axes.set(xlabel="layer", ylabel=axis)
        return inline(canvas, prefix)


def _layer(name: Any) -> str:
    """Layers are numbers; anything else has no place in a drawing."""
    return f"{name:g}" if isinstance(name, int | float) else "?"


def _keys(names: Mapping[str, Any], others: Sequence[str]) -> tuple[Key, ...]:
    return tuple(Key(key_mark(model_look(name, others), line=True), model_title(name)) for name in names)
