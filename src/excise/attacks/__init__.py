"""What an adversary would do to the result, done to a copy or undone afterwards: `ATTACKS`, by name.

The table stands in `excise.attacks.table` and is loaded when it is asked for: who only reads saved outcomes
(`excise.attacks.outcome`) needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from excise.attacks.table import ATTACKS

__all__ = ["ATTACKS"]


def __getattr__(name: str) -> Any:
    if name == "ATTACKS":
        from excise.attacks.table import ATTACKS

        return ATTACKS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
