"""What was found, in plain words: statements, and one headline over them; here by the report's own checks.

A run that was verified has its statements from `excise.reporting.tested` instead. Neither says that data was erased or
that a law is kept: they say what tests saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from excise.artifacts import Results
from excise.reporting.checks import CHECKS, Evidence, Kind
from excise.reporting.class_checks import CLASS_CHECKS
from excise.reporting.words import NOT_SHOWN, interval, number

#: The word printed beside each check, so that nothing hangs on colour.
KIND_WORDS: dict[Kind, str] = {
    "like": "within the limit",
    "short": "falls short",
    "over": "goes too far",
    "harm": "damage",
    "unknown": NOT_SHOWN,
}
_COUNTED: dict[Kind, str] = {
    "like": "{} within the limit",
    "short": "{} short of the gold",
    "over": "{} past the gold (over-forgetting)",
    "harm": "{} with damage to what was to be kept",
    "unknown": "{} not shown",
}


@dataclass(frozen=True)
class Statement:
    """One question: how it came out, as kind and as a word, what was seen, and (name, value, small print) beside it.

    Beside a check stand this model, the gold and the original; beside the tests of a verdict, how many came out how,
    and as points each that failed with what that means.
    """

    key: str
    kind: Kind
    word: str
    title: str
    text: str
    beside: tuple[tuple[str, str, str], ...]
    points: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the first page says.

    Args:
        model: The model that was judged.
        outcome: A verdict's outcome: how it is shown, and the word; empty where there were only checks.
        headline: The outcome in a sentence.
        tally: What it means, or how many checks came out how.
        statements: The questions.
        over: What was over-forgotten, by name.
        next: What to try next.
    """

    model: str
    headline: str
    tally: str
    statements: tuple[Statement, ...]
    outcome: tuple[Kind, str] | None = None
    over: tuple[str, ...] = ()
    next: tuple[str, ...] = ()


def judge(
    results: Results, model: str, *, null_spread: float | None = None, finding_codes: Sequence[str] = ()
) -> Verdict:
    """The verdict on one unlearned model.

    Args:
        results: All numbers of the run.
        model: The unlearned model to judge.
        null_spread: Standard deviation of PrivLeak (points) when nothing leaks, where it is known.
        finding_codes: Codes of the failure signatures that the run reported.

    Example:
        >>> from excise.artifacts import Number
        >>> judge(Results({"unlearned": {"forget_probability": Number(0.4)}}), "unlearned").headline
        'The model still gives answers that it was asked to forget.'
    """
    evidence = Evidence(results, model, null_spread, tuple(finding_codes))
    statements = []
    for check in CLASS_CHECKS.get(results.task, CHECKS):
        numbers = evidence.of(check.metric)
        kind, text = check.rule(evidence, *numbers)
        beside = tuple(
            (whose, number(n.value), interval(n.low, n.high) if n.shown else "")
            for whose, n in zip(("this model", "gold", "original"), numbers, strict=True)
        )
        statements.append(Statement(check.key, kind, KIND_WORDS[kind], check.title, text, beside))
    return Verdict(
        model, _headline({s.key: s.kind for s in statements}, results.task), _tally(statements), tuple(statements)
    )


#: Task -> how the headline begins when the forgotten is still there, is as in the gold, is beyond it, is not shown.
_FIRST = {
    "causal_lm": (
        "The model still gives answers that it was asked to forget",
        "The model no longer gives the answers that it was asked to forget",
        "The model avoids the answers that it was asked to forget",
        "Whether the model still gives the answers is not shown",
    ),
    "token_classification": (
        "The model still knows the tags of rows that it was asked to forget",
        "The model tags the rows that it was asked to forget as one that never saw them does",
        "The model tags the rows that it was asked to forget worse than one that never saw them does",
        "Whether the model still knows the tags of the forgotten rows is not shown",
    ),
    "sequence_classification": (
        "The model still knows the classes of rows that it was asked to forget",
        "The model judges the rows that it was asked to forget as one that never saw them does",
        "The model judges the rows that it was asked to forget worse than one that never saw them does",
        "Whether the model still knows the classes of the forgotten rows is not shown",
    ),
}


def _headline(kinds: dict[str, Kind], task: str) -> str:
    short, like, over, unknown = _FIRST.get(task, _FIRST["causal_lm"])
    harm = "harm" in (kinds["kept"], kinds.get("general"))
    if kinds["answers"] == "short":
        return f"{short}{', and it lost knowledge that it was asked to keep' if harm else ''}."
    if kinds["answers"] == "like":
        first, lost, rest = like, ", but it lost knowledge that it was asked to keep", ", and it keeps the rest"
    else:
        first = over if kinds["answers"] == "over" else unknown
        lost, rest = "; it lost knowledge that it was asked to keep", "; it keeps the rest"
    kept = lost if harm else rest if kinds["kept"] == "like" else ""
    return f"{first}{kept}. {_ending(kinds)}"


def _ending(kinds: dict[str, Kind]) -> str:
    traces = [kinds[key] for key in ("membership", "outside", "inside", "relearned", "alike") if key in kinds]
    if "over" in kinds.values():
        more = " Traces of them remain as well." if "short" in traces else ""
        if "over" in (kinds["answers"], kinds.get("past"), kinds["membership"], kinds.get("outside")):
            return f"It went too far: it avoids the records more than a model that never saw them.{more}"
        return f"It went too far inside: the records lie further off than a model that never saw them has them.{more}"
    if "short" in traces:
        return "Traces of the records remain."
    if "unknown" in traces:
        return "Whether traces remain is shown only in part."
    return "No test made here found a trace of the records beyond the gold's."


def _tally(statements: Sequence[Statement]) -> str:
    counts = {kind: sum(s.kind == kind for s in statements) for kind in _COUNTED}
    return f"{len(statements)} checks: " + ", ".join(_COUNTED[k].format(n) for k, n in counts.items() if n) + "."
