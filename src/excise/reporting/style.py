"""How models and sides look in every figure: one colour and one marker each, safe for colour-blind readers.

Colours are CSS variables, so that the same drawing is legible on paper, on a light and on a dark screen. matplotlib
knows no CSS variables: each variable is drawn in a stand-in colour that `excise.reporting.figures` replaces afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from excise.artifacts import GOLD, ORIGINAL

#: CSS variable -> stand-in colour: values that no drawing uses by itself.
STAND_INS = {
    name: f"#0101{index:02x}"
    for index, name in enumerate(
        ("ink", "muted", "rule", "target", "s-original", "s-gold", "s-0", "s-1", "s-2", "s-3", "side-forget",
         "side-retain", "side-never", "side-other"),
        start=16,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Colour (a CSS variable), marker (matplotlib's letter), whether it is filled, and the dashes of its line."""

    variable: str
    marker: str
    filled: bool = True
    dashes: tuple[int, ...] = ()

    @property
    def colour(self) -> str:
        """The stand-in colour to draw with."""
        return STAND_INS[self.variable]


def marking(look: Look) -> dict[str, Any]:
    """Colour and marker as matplotlib takes them."""
    hollow = not look.filled or look.marker in "x+"
    return {
        "color": look.colour,
        "marker": look.marker,
        "markerfacecolor": "none" if hollow else look.colour,
        "markeredgecolor": look.colour,
        "markeredgewidth": 1.3,
    }


_MODELS = {ORIGINAL: Look("s-original", "o", filled=False, dashes=(2, 2)), GOLD: Look("s-gold", "D", dashes=(6, 2))}
_OTHERS = (Look("s-0", "s"), Look("s-1", "^"), Look("s-2", "v"), Look("s-3", "P"))
_SIDES = {
    "forget": Look("side-forget", "^"),
    "untouched": Look("side-retain", "o", filled=False),
    "retain": Look("side-other", "s", filled=False),
    "never_seen": Look("side-never", "x"),
    "outside": Look("muted", "+"),
}
_SIDE_TITLES = {
    "forget-never-saw": "models that never saw them",
    "forget": "to be forgotten",
    "retain": "to be kept",
    "untouched": "to be kept, not used in unlearning",
    "never_seen": "never seen",
    "outside": "kept words outside entities",
}


def model_look(name: str, others: Sequence[str]) -> Look:
    """The look of a model; ``others`` are the unlearned models in their order.

    Example:
        >>> model_look("gold", []).marker, model_look("unlearned", ["unlearned"]).marker
        ('D', 's')
    """
    if name in _MODELS:
        return _MODELS[name]
    place = list(others).index(name) if name in others else len(others)
    return _OTHERS[place % len(_OTHERS)]


def side_look(name: str) -> Look:
    """The look of a side on the map."""
    return _SIDES.get(name, Look("ink", "+"))


def model_title(name: str) -> str:
    """A model's name as people read it.

    Example:
        >>> model_title("without_clreg")
        'without clreg'
    """
    return name.replace("_", " ")


def side_title(name: str) -> str:
    """A side's name as people read it."""
    return _SIDE_TITLES.get(name, name.replace("_", " "))


_SHAPES = {
    "o": '<circle cx="14" cy="8" r="4.2"/>',
    "s": '<rect x="10" y="4" width="8" height="8"/>',
    "D": '<path d="M14 2.6 19.4 8 14 13.4 8.6 8z"/>',
    "^": '<path d="M14 3 18.8 12H9.2z"/>',
    "v": '<path d="M14 13 18.8 4H9.2z"/>',
    "P": '<path d="M12.3 3h3.4v3.3H19v3.4h-3.3V13h-3.4V9.7H9V6.3h3.3z"/>',
    "x": '<path d="M10 4l8 8M18 4l-8 8" stroke-width="2"/>',
    "+": '<path d="M14 3v10M9 8h10" stroke-width="2"/>',
}


def key_mark(look: Look, *, line: bool) -> Markup:
    """The small drawing that stands before a legend entry; made of fixed strings only."""
    stroke = f'style="stroke: var(--{look.variable})"'
    fill = f"var(--{look.variable})" if look.filled and look.marker not in "x+" else "var(--paper)"
    dashes = f' stroke-dasharray="{" ".join(map(str, look.dashes))}"' if look.dashes else ""
    rule = f'<path d="M0 8h28" {stroke} stroke-width="1.8"{dashes}/>' if line else ""
    shape = f'<g style="stroke: var(--{look.variable}); fill: {fill}" stroke-width="1.6">{_SHAPES[look.marker]}</g>'
    return Markup(f'<svg class="key" viewBox="0 0 28 16" aria-hidden="true" focusable="false">{rule}{shape}</svg>')


def line_mark(look: Look, *, broken: bool) -> Markup:
    """The legend's piece of a line without marks."""
    dashes = ' stroke-dasharray="6 4"' if broken else ""
    return Markup(
        '<svg class="key" viewBox="0 0 28 16" aria-hidden="true" focusable="false">'
        f'<path d="M0 8h28" style="stroke: var(--{look.variable})" stroke-width="2"{dashes}/></svg>'
    )


def target_mark() -> Markup:
    """The legend's patch for the area that a result should lie in."""
    return Markup(
        '<svg class="key" viewBox="0 0 28 16" aria-hidden="true" focusable="false">'
        '<rect x="2" y="2" width="24" height="12" rx="2" style="fill: var(--target); stroke: var(--rule)"/></svg>'
    )
