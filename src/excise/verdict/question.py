"""A question that a verdict asks, how its rule answers, and what becomes of the answer: the result of one test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from excise.errors import NotShown
from excise.verdict.equivalence import Estimate, Outcome, settle
from excise.verdict.evidence import Evidence

Group = Literal["forgotten", "traces", "over", "kept"]
Direction = Literal["", "short", "over", "harm"]
Role = Literal["required", "counts", "beside"]
#: A test on fewer rows is not even a failure.
LEAST_TO_FAIL = 10
_NEED = "Put more rows into the forget set, or more never-seen rows beside it; or state a wider margin before the run."


@dataclass(frozen=True)
class Answer:
    """What a rule found: an estimate, between which bounds it should lie, and beside what it was measured."""

    estimate: Estimate
    least: float | None
    most: float | None
    measure: str
    against: str
    detail: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked, in plain words, and what to say and try for each outcome.

    Args:
        key: Name of the test; ``require`` and ``beside`` of the recipe speak of it.
        group: Where it belongs: is it gone, do traces remain, did it go too far, is the rest kept.
        title: Heading.
        question: The question, for a reader who knows no machine learning.
        rule: Finds the answer, or raises `NotShown` with the reason.
        passed: What passing means.
        above: What it means that the estimate lies above the margin, and what to try next.
        below: The same below the margin.
        signs: What above and below are: short of forgetting, over-forgetting, or harm.
    """

    key: str
    group: Group
    title: str
    question: str
    rule: Callable[[Evidence], Answer]
    passed: str
    above: tuple[str, str] = ("", "")
    below: tuple[str, str] = ("", "")
    signs: tuple[Direction, Direction] = ("short", "over")


@dataclass(frozen=True)
class Tested:
    """The result of one test: everything that a page needs to show it.

    Args:
        key: Name of the test.
        group: ``forgotten``, ``traces``, ``over`` or ``kept``.
        role: ``required`` (must pass), ``counts`` (must not fail) or ``beside`` (does not decide).
        title: Heading.
        question: In plain words.
        outcome: ``passed``, ``failed`` or ``not shown``.
        direction: Of a failure: ``short`` (still there), ``over`` (over-forgetting) or ``harm``; else empty.
        measure: What the estimate is, in words.
        against: Beside what: the gold, never-seen rows, the original, or a fixed level.
        estimate: The value; None where nothing was measured.
        low: Lower one-sided bound.
        high: Upper one-sided bound.
        least: The threshold below which the estimate must not lie; None: none.
        most: The threshold above which it must not lie; None: none.
        level: Level of each bound.
        n: Rows behind it.
        units: What the interval counts: groups, or rows.
        unit: ``group`` or ``row``.
        detail: The point of a curve that decided, for instance.
        meaning: What the outcome means.
        next: What to try next; empty after a pass.
        measured: Whether there was anything to test.
    """

    key: str
    group: Group
    role: Role
    title: str
    question: str
    outcome: Outcome
    direction: Direction
    measure: str
    against: str
    estimate: float | None
    low: float | None
    high: float | None
    least: float | None
    most: float | None
    level: float
    n: int
    units: int
    unit: Literal["row", "group"]
    detail: str
    meaning: str
    next: str
    measured: bool

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def put(question: Question, evidence: Evidence) -> Tested:
    """Ask one question of the evidence."""
    limits = evidence.limits
    role: Role = (
        "required" if question.key in limits.require else "beside" if question.key in limits.beside else "counts"
    )
    try:
        answer = question.rule(evidence)
    except NotShown as reason:
        return Tested(
            question.key, question.group, role, question.title, question.question, "not shown", "", "", "", None, None,
            None, None, None, limits.level, 0, 0, "row", "", f"Not measured: {reason}.", _how_to_measure(str(reason)),
            False,
        )  # fmt: skip
    found = answer.estimate
    outcome, direction, meaning, following = _read(question, answer, limits.rows)
    values = [v if math.isfinite(v) else None for v in (found.value, found.low, found.high)]
    return Tested(
        question.key, question.group, role, question.title, question.question, outcome, direction, answer.measure,
        answer.against, values[0], values[1], values[2], answer.least, answer.most, limits.level, found.n, found.units,
        "group" if found.grouped else "row", answer.detail, meaning, following, True,
    )  # fmt: skip


def _read(question: Question, answer: Answer, enough: int) -> tuple[Outcome, Direction, str, str]:
    """Outcome, direction, what it means and what to try; few rows never pass, and very few never fail."""
    found = answer.estimate
    outcome, place = settle(found, answer.least, answer.most)
    if outcome == "failed" and found.n >= LEAST_TO_FAIL:
        what, following = question.above if place == "above" else question.below
        return "failed", question.signs[0] if place == "above" else question.signs[1], what, following
    if found.n < enough:
        return "not shown", "", f"{found.n} rows are too few: this recipe asks for {enough}.", _NEED
    if outcome == "passed":
        return "passed", "", question.passed, ""
    if not math.isfinite(found.value):
        return "not shown", "", "The comparison has no value: what it is measured against is 0.", _NEED
    room = min(
        math.inf if answer.most is None else answer.most - found.value,
        math.inf if answer.least is None else found.value - answer.least,
    )
    if room <= 0:  # the estimate itself is outside
        what, following = question.above if _over_most(answer) else question.below
        first = "The estimate lies outside the margin, but with so few rows chance could have put it there."
        return "not shown", "", f"{first} It points to this: {what[:1].lower()}{what[1:]}", following
    half = max(found.high - found.value, found.value - found.low)
    need = math.ceil(found.units * (half / room) ** 2)
    unit = "groups" if found.grouped else "rows"
    text = f"The estimate lies inside the margin, the interval does not: {found.units} {unit}; about {need} would do."
    return "not shown", "", text, _NEED


def _over_most(answer: Answer) -> bool:
    return answer.most is not None and answer.estimate.value >= answer.most


def _how_to_measure(reason: str) -> str:
    """What to do about a test that was not made."""
    advice = (
        ("attack", "Run the attacks on the model and on the gold: excise evaluate RUN --suite attack."),
        ("gold", "Train a gold (excise finetune on the rows to keep) and name it: evaluate.gold."),
        ("never-seen", "Give rows of the same kind that no model was trained on: data.never_seen."),
        ("generations", "Let the evaluation write answers: evaluate.generate."),
    )
    return next((text for word, text in advice if word in reason), "Measure it: excise evaluate RUN --suite all.")
