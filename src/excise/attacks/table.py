"""The table of attacks: what `evaluate.attacks` may name, and the settings that each takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from excise.attacks import adapter, direction, prompts, quantise, relearn, sample
from excise.attacks.outcome import Outcome
from excise.errors import UsageError

#: Name -> attack(target, *, settings of its own).
ATTACKS: dict[str, Callable[..., Outcome]] = {
    "relearn": relearn.attack,
    "related": relearn.related,
    "savings": relearn.savings,
    "quantise": quantise.attack,
    "sample": sample.attack,
    "prompts": prompts.attack,
    "adapter": adapter.attack,
    "direction": direction.attack,
}


def defaults(name: str) -> dict[str, Any]:
    """The settings of an attack with their defaults.

    Example:
        >>> defaults("sample")["samples"]
        64
    """
    parameters = inspect.signature(ATTACKS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def settled(asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The attacks that a recipe names, each with all its settings; every attack where it names none.

    Args:
        asked: Name -> settings (None or an empty mapping: the defaults).

    Raises:
        UsageError: An unknown attack or setting, with the nearest known name.

    Example:
        >>> settled({"prompts": None}).keys()
        dict_keys(['prompts'])
        >>> settled({"smaple": {}})
        Traceback (most recent call last):
        excise.errors.UsageError: evaluate.attacks: unknown attack 'smaple'; did you mean 'sample'?
    """
    out = {}
    for name, own in (asked or dict.fromkeys(ATTACKS)).items():
        if name not in ATTACKS:
            raise _unknown("evaluate.attacks", "attack", name, list(ATTACKS))
        known = defaults(name)
        if not isinstance(own or {}, Mapping):
            raise UsageError(f"evaluate.attacks.{name}: expected a mapping of settings, found {type(own).__name__}")
        for key in own or {}:
            if key not in known:
                raise _unknown(f"evaluate.attacks.{name}", "setting", key, list(known))
        out[name] = {**known, **(own or {})}
    return out


def _unknown(where: str, what: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    return UsageError(f"{where}: unknown {what} {name!r}{hint}")
