"""A verdict of `excise verify` as the page says it: four questions for a manager, every test for an engineer.

It is read from ``verdict.json`` alone and nothing is judged again here: this page only sorts and words it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise.reporting.checks import Kind
from excise.reporting.record import as_list, as_map
from excise.reporting.style import model_title
from excise.reporting.verdict import Statement, Verdict
from excise.reporting.words import NOT_SHOWN, number, percent

#: Group of tests -> what a manager asks, and what it means that the tests of the group passed.
QUESTIONS = {
    "forgotten": ("Is it gone?", "The model knows the records no better than if they had never been there"),
    "traces": (
        "Do traces remain?",
        "Neither attacks nor a look inside brought out more than if they had never been there",
    ),
    "over": ("Did it go too far?", "It does not shun the records more than if they had never been there"),
    "kept": ("Is the rest kept?", "What was to be kept is still there"),
}
_OUTCOMES: dict[str, Kind] = {"passed": "like", "failed": "harm", "not shown": "unknown"}
_SIGNS: dict[str, tuple[Kind, str]] = {
    "short": ("short", "failed"),
    "over": ("over", "failed: over-forgetting"),
    "harm": ("harm", "failed"),
}
_ROLES = {"required": "must pass", "counts": "must not fail", "beside": "does not decide"}


@dataclass(frozen=True)
class Line:
    """One test as a table shows it."""

    title: str
    question: str
    kind: Kind
    word: str
    estimate: str
    bounds: str
    rows: str
    groups: str
    threshold: str
    measure: str
    role: str
    said: str
    next: str


@dataclass(frozen=True)
class Group:
    """Tests under the question that they answer."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Tests:
    """All tests of a verdict, and what a reader must know to read them."""

    groups: tuple[Group, ...] = ()
    note: str = ""
    cautions: tuple[str, ...] = ()
    thresholds: tuple[tuple[str, str], ...] = ()


def verdict(found: Mapping[str, Any]) -> Verdict:
    """The first page's words of a verdict, one statement for each question that its tests answer.

    Args:
        found: ``verdict.json``, its strings made visible.

    Example:
        >>> verdict({"outcome": "not shown", "headline": "Not shown: no test was made."}).headline
        'No test was made.'
    """
    word = str(found.get("outcome") or NOT_SHOWN)
    tests = [as_map(t) for t in as_list(found.get("tests"))]
    titles = {str(t.get("key")): str(t.get("title") or t.get("key")) for t in tests}
    tries = [str(line).replace("`", "") for line in as_list(found.get("next"))]
    headline = str(found.get("headline") or "").removeprefix(f"{word.capitalize()}: ")
    return Verdict(
        model=str(found.get("model") or ""),
        outcome=(_OUTCOMES.get(word, "unknown"), word[:1].upper() + word[1:]),
        headline=headline[:1].upper() + headline[1:],
        tally=str(found.get("means") or ""),
        statements=tuple(_statement(key, own) for key in QUESTIONS if (own := _deciding(tests, key))),
        over=tuple(titles.get(str(key), str(key)) for key in as_list(found.get("over"))),
        next=tuple(line for line in tries if not any(line in other and line != other for other in tries)),
    )


def tests(found: Mapping[str, Any]) -> Tests:
    """Every test with estimate, bounds, rows and threshold, under the questions; empty where nobody verified."""
    tests = [as_map(t) for t in as_list(found.get("tests"))]
    groups = [(title, [t for t in tests if t.get("group") == key]) for key, (title, _) in QUESTIONS.items()]
    if not tests:
        return Tests()
    level = _value(as_map(found.get("thresholds")).get("level"))
    confidence = "" if level is None else f", each at {percent(1 - level)}"
    fixed = "were recorded before the run" if found.get("fixed") else "were not recorded before the run: nothing passes"
    note = (
        f"Judged: {model_title(str(found.get('model') or 'the model'))}. Small print under an estimate: a lower and an "
        f"upper bound{confidence}. A test passes where both bounds lie within the threshold, fails where they lie "
        f"outside it, and shows nothing in between. The thresholds {fixed}."
    )
    return Tests(
        tuple(Group(title, tuple(map(_line, own))) for title, own in groups if own),
        note,
        tuple(str(line) for line in as_list(found.get("cautions"))),
        tuple((str(k).replace("_", " "), _plain(v)) for k, v in as_map(found.get("thresholds")).items()),
    )


def _deciding(tests: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    return [t for t in tests if t.get("group") == group and t.get("role") != "beside"]


def _statement(key: str, tests: Sequence[Mapping[str, Any]]) -> Statement:
    """One question, answered by its tests: failed by one that fails, passed by all that must."""
    title, passed = QUESTIONS[key]
    by = {word: [t for t in tests if t.get("outcome") == word] for word in _OUTCOMES}
    failed, still = by["failed"], [t for t in by["not shown"] if t.get("role") == "required"]
    points = tuple((str(t.get("title") or ""), str(t.get("meaning") or "")) for t in failed)
    kind: Kind
    if failed:
        signs = [_sign(t) for t in failed]
        kind, word = next((s for s in signs if (s[0] == "over") == (key == "over")), signs[0])
        text = ""
    elif still or not by["passed"]:
        kind, word = "unknown", NOT_SHOWN
        named = (str(t.get("title") or "") for t in still or by["not shown"])
        text = f"Undecided, or not made: {', '.join(f'“{name}”' for name in named)}."
    else:
        kind, word, text = "like", "passed", f"{passed}, within the margins."
    beside = tuple((name, str(len(own)), "") for name, own in by.items())
    return Statement(key, kind, word, title, text, beside, points)


def _sign(test: Mapping[str, Any]) -> tuple[Kind, str]:
    return _SIGNS.get(str(test.get("direction")), ("harm", "failed"))


def _line(test: Mapping[str, Any]) -> Line:
    outcome = str(test.get("outcome") or NOT_SHOWN)
    kind, word = _sign(test) if outcome == "failed" else (_OUTCOMES.get(outcome, "unknown"), outcome)
    made = bool(test.get("measured"))
    low, high, n, units = (_value(test.get(key)) for key in ("low", "high", "n", "units"))
    return Line(
        title=str(test.get("title") or test.get("key") or ""),
        question=str(test.get("question") or ""),
        kind=kind,
        word=word if made else "not made",
        estimate=number(_value(test.get("estimate"))),
        bounds="" if low is None and high is None else f"{number(low)} to {number(high)}",
        rows=f"{n:,.0f}" if made and n is not None else NOT_SHOWN,
        groups=f"{units:,.0f} groups" if made and units is not None and test.get("unit") == "group" else "",
        threshold=_threshold(_value(test.get("least")), _value(test.get("most"))),
        measure=str(test.get("measure") or ""),
        role=_ROLES.get(str(test.get("role")), str(test.get("role") or "")),
        said=" ".join(x for x in (str(test.get("meaning") or ""), _detail(test)) if x),
        next=str(test.get("next") or "").replace("`", ""),
    )


def _detail(test: Mapping[str, Any]) -> str:
    detail = str(test.get("detail") or "")
    return f"({detail})" if detail else ""


def _threshold(least: float | None, most: float | None) -> str:
    """Between which values an estimate must lie.

    Example:
        >>> _threshold(-0.05, 0.05), _threshold(None, 0.05), _threshold(0.95, None), _threshold(None, None)
        ('−0.050 to 0.050', 'at most 0.050', 'at least 0.950', 'not shown')
    """
    if least is not None and most is not None:
        return f"{number(least)} to {number(most)}"
    return (
        f"at most {number(most)}"
        if most is not None
        else f"at least {number(least)}"
        if least is not None
        else NOT_SHOWN
    )


def _value(given: Any) -> float | None:
    known = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    return float(given) if known else None


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
