"""Numbers and strings as people read them: the same everywhere in the report and in the terminal's table."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

NOT_SHOWN = "not shown"
_MINUS = "\N{MINUS SIGN}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TURNS_WRITING = {
    chr(code) for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}


def number(value: float | None) -> str:
    """A number at three significant digits, "not shown" for none.

    Example:
        >>> number(0.00123), number(0.95), number(-15.659), number(None), number(1234.5)
        ('0.0012', '0.950', '−15.7', 'not shown', '1,234')
        >>> number(0.00002), number(3.4e-9), number(2.5e7)
        ('0.00002', '3.4 × 10⁻⁹', '2.5 × 10⁷')
    """
    if value is None or not math.isfinite(value):
        return NOT_SHOWN
    size = float(f"{abs(value):.3g}")  # after rounding: 99.97 is written as 100 is
    if size == 0:
        text = "0"
    elif size < 1e-6 or size >= 1e6:
        digits, power = f"{value:.1e}".split("e")
        text = f"{digits} × 10{str(int(power)).translate(_RAISED)}"
    elif size < 1e-4:
        text = f"{value:.6f}".rstrip("0")
    elif size < 0.01:
        text = f"{value:.4f}"
    elif size < 1:
        text = f"{value:.3f}"
    elif size < 10:
        text = f"{value:.2f}"
    elif size < 100:
        text = f"{value:.1f}"
    else:
        text = f"{value:,.0f}"
    return text.replace("-", _MINUS)


def interval(low: float | None, high: float | None) -> str:
    """An interval in words, empty where there is none or where it is a single point (the gold beside itself).

    Example:
        >>> interval(0.1, 0.25), interval(None, None), interval(0.0, 0.0)
        ('0.100 to 0.250', '', '')
    """
    return "" if low is None or high is None or low == high else f"{number(low)} to {number(high)}"


def times(value: float, other: float) -> str:
    """How many times ``other`` the ``value`` is.

    Example:
        >>> times(0.03, 0.001), times(0.5, 1.0), times(1.0, 0.0)
        ('30 times', '0.50 times', 'many times')
    """
    if other == 0 or not math.isfinite(value / other):
        return "many times"
    ratio = value / other
    if ratio >= 1000:
        return "over 1,000 times"
    return f"{ratio:.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times" if ratio >= 1.5 else f"{ratio:.2f} times"


def percent(share: float) -> str:
    """A share as a percentage without decimals beyond need.

    Example:
        >>> percent(0.968), percent(0.0012)
        ('97 %', '0.1 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """A duration.

    Example:
        >>> seconds(3.21), seconds(75), seconds(7322)
        ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def visible(value: Any) -> Any:
    r"""``value`` with every control character of its strings written out, so that nothing acts on a terminal or page.

    Line breaks and tabs stay; ANSI escapes, NUL, and characters that turn the direction of writing do not.

    Example:
        >>> len("\x1b"), len(visible("\x1b"))
        (1, 4)
    """
    if isinstance(value, str):
        return re.sub(r"[^\n\t -~]", _written, value)
    if isinstance(value, dict):
        return {visible(str(key)): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    return value


def _written(match: re.Match[str]) -> str:
    char = match.group()
    if char in _TURNS_WRITING or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char
