"""How a drawing is set up and how it becomes one inline <svg> element that fits into a page beside others."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from excise.reporting.style import STAND_INS

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

#: Settings of every drawing; text stays text, names in ids are the same in every run.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "excise",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_INS["muted"],
    "axes.labelcolor": STAND_INS["ink"],
    "xtick.color": STAND_INS["muted"],
    "ytick.color": STAND_INS["muted"],
    "xtick.labelcolor": STAND_INS["ink"],
    "ytick.labelcolor": STAND_INS["ink"],
    "grid.color": STAND_INS["rule"],
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


def canvas_of(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty drawing of this size (in points: at a scale of one, pixels) and its axes, both without background."""
    canvas = Figure(figsize=(width / 72, height / 72), layout="constrained")
    canvas.patch.set_visible(False)
    axes = canvas.add_subplot()
    axes.patch.set_visible(False)
    return canvas, axes


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1 and 3 of each power of ten from ``low`` to ``high``, at most about seven."""
    ticks = [m * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 3)]
    inside = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    return inside[:: max(1, math.ceil(len(inside) / 7))]


def plain_ticks() -> FuncFormatter:
    """Ticks without mathtext, which has no place in a drawing whose text is kept as text."""
    return FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "\N{MINUS SIGN}"))


def inline(canvas: Figure, prefix: str) -> Markup:
    """The drawing as one <svg> element: own ids, CSS variables for colours, no size, no style sheet, no metadata."""
    out = io.BytesIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, f"#{prefix}-{value.removeprefix('#')}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")  # the figure around it carries the words
    root.set("focusable", "false")
    text = ET.tostring(root, encoding="unicode")
    names = {colour: name for name, colour in STAND_INS.items()}
    text = re.sub("|".join(names), lambda match: f"var(--{names[match.group()]})", text)
    return Markup(text)
