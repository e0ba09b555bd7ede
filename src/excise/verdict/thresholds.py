"""The thresholds of a verdict: what they may be, and the hash that fixes them before a run."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from excise import recipe
from excise.errors import UsageError

#: Key -> what it may be: (above, up to).
RANGES = {
    "level": (0.0, 0.25), "rows": (1, math.inf), "recalled": (0.0, 1.0), "came_back": (0.0, 1.0),
    "answers": (0.0, 1.0), "written": (0.0, 1.0), "truth": (0.0, 0.5), "membership": (0.0, 0.5),
    "inside": (0.0, 0.5), "below": (0.0, 0.5), "perplexity": (1.0, math.inf), "babble": (0.0, 1.0),
    "attacks": (0.0, 1.0), "savings": (0.0, 1.0), "leak": (0.0, 1.0), "classes": (0.0, 1.0), "outside": (0.0, 1.0),
    "choices": (0.0, 1.0), "kept": (0.0, 1.0),
}  # fmt: skip


def check(limits: recipe.Verify, names: tuple[str, ...]) -> None:
    """Refuse thresholds that no test could use, and names of tests that there are none of.

    Args:
        limits: The recipe's section.
        names: Keys of all tests.

    Raises:
        UsageError: Naming the key.

    Example:
        >>> check(recipe.Verify(level=0.5), ())
        Traceback (most recent call last):
        excise.errors.UsageError: verify.level is 0.5: give a number above 0 and up to 0.25
    """
    for key, (above, most) in RANGES.items():
        value = getattr(limits, key)
        inside = value >= above if key == "rows" else value > above
        if not (math.isfinite(value) and inside and value <= most):
            bound = f"{above:g} or more" if key == "rows" else f"a number above {above:g}"
            raise UsageError(
                f"verify.{key} is {value}: give {bound}" + (f" and up to {most:g}" if most < math.inf else "")
            )
    for key in ("require", "beside"):
        for name in getattr(limits, key):
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
                raise UsageError(f"verify.{key}: no test {name!r}{hint}")
    both = sorted(set(limits.require) & set(limits.beside))
    if both:
        raise UsageError(f"verify.beside: {both[0]!r} is also required: name it in one of the two")


def plain(limits: recipe.Verify) -> dict[str, Any]:
    """The thresholds as plain values."""
    return dict(recipe.plain(limits))


def digest(limits: recipe.Verify | Mapping[str, Any]) -> str:
    """SHA-256 of the thresholds with every default filled in, whatever order or notation a file has.

    Args:
        limits: The section, or as a run folder's recipe has it written out: keys that a later version adds are not in
            there, so the hash of an old run stays what it was.

    Example:
        >>> digest(recipe.Verify()) == digest(recipe.build({"verify": {"level": "5e-2"}}).verify)
        True
        >>> digest(recipe.Verify()) == digest(recipe.Verify(kept=0.9))
        False
    """
    values = plain(limits) if isinstance(limits, recipe.Verify) else dict(limits)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
