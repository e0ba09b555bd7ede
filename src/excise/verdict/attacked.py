"""The questions that attacks answer: what comes back when somebody tries, beside the same attack on the gold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from excise.artifacts import GOLD
from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.verdict import equivalence, shares
from excise.verdict.equivalence import Estimate, settle
from excise.verdict.evidence import Attack, Evidence
from excise.verdict.question import Answer, Question

_WORST = {"passed": 0, "not shown": 1, "failed": 2}


def curve(name: str, most: float, evidence: Evidence, *, final: bool = False) -> Answer:
    """The point of an attack's curve that speaks most against the model: all points must pass, one may fail.

    With ``final`` the last point alone, where the first says nothing of its own. Beside the gold's rows under the same
    attack. Without a gold: beside never-seen rows that were attacked in the same way, or else as they are without any
    attack, which is the stricter control; for leaks beside no leak at all.
    """
    own = evidence.attack(name)
    what = "what leaks of forgotten answers" if own.unit == "leak" else "probability of forgotten answers"
    points: list[tuple[int, float, Estimate, str]] = []
    against = "nothing"
    for budget, found, beside in _points(name, own, evidence):
        against = beside
        outcome, _ = settle(found, None, most)
        high = found.high if math.isfinite(found.high) else math.inf
        points.append((_WORST[outcome], high, found, budget))
    if not points:
        raise NotShown("this attack measured no forget rows that could be compared")
    _, _, found, budget = points[-1] if final else max(points, key=lambda point: point[:2])
    minus = "model minus gold" if against == "gold" else f"forgotten minus {against}"
    measure = f"{what} after the attack, {minus}" if against != "no leak" else "share of rows of which anything leaks"
    detail = f"{own.budget} {budget}" if final else f"worst of {len(points)}: {own.budget} {budget}"
    return Answer(found, None, most, measure, against, detail)


def _points(name: str, own: Attack, evidence: Evidence) -> Iterator[tuple[str, Estimate, str]]:
    """Budget, estimate and beside what, for each point that can be compared."""
    level = evidence.limits.level
    numbers, values = own.rows["forget"], own.values["forget"]
    groups = evidence.groups("forget", numbers)
    if evidence.has_gold:
        gold = evidence.attack(name, GOLD)
        place = {int(row): i for i, row in enumerate(gold.rows["forget"])}
        order = np.array([place.get(int(row), -1) for row in numbers], np.int64)
        for at, budget in enumerate(own.budgets):
            if budget in gold.budgets and (order >= 0).any():
                theirs = np.where(order >= 0, gold.values["forget"][gold.budgets.index(budget)][order], np.nan)
                pair = equivalence.rows(values[at], groups), equivalence.rows(theirs, groups)
                yield budget, equivalence.difference(*pair, paired=True, level=level), "gold"
        return
    if "never_seen" in own.values:
        others = evidence.groups("never_seen", own.rows["never_seen"])
        for at, budget in enumerate(own.budgets):
            pair = equivalence.rows(values[at], groups), equivalence.rows(own.values["never_seen"][at], others)
            yield budget, equivalence.difference(*pair, paired=False, level=level), "never-seen rows"
    elif own.unit == "leak":
        for at, budget in enumerate(own.budgets):
            seen = values[at][~np.isnan(values[at])]
            yield budget, shares.share(int((seen > 0).sum()), len(seen), level=level), "no leak"
    elif name == "savings":  # whatever is trained is likelier than what was not: there is no stricter control
        raise NotShown("this attack needs a gold, or never-seen rows that were trained in the same way")
    elif evidence.basis == "never-seen rows":
        control = evidence.rows(evidence.model, "never_seen", per_row.probability)
        for at, budget in enumerate(own.budgets):
            found = equivalence.difference(equivalence.rows(values[at], groups), control, paired=False, level=level)
            yield budget, found, "never-seen rows without attack"
    else:
        raise NotShown("this attack needs the same attack on a gold, or never-seen rows")


def _asked(name: str, key: str, evidence: Evidence) -> Answer:
    return curve(name, getattr(evidence.limits, key), evidence)


def _question(
    name: str, title: str, question: str, above: str, following: str, key: str = "attacks", passed: str = ""
) -> Question:
    return Question(
        name, "traces", title, question, partial(_asked, name, key),
        passed or "Nothing more comes back than from a model that never saw the rows, within the margin.",
        (above, following), signs=("short", ""),
    )  # fmt: skip


_HIDDEN = "Part of the knowledge was hidden, not removed."
_DEEPER = "Train more weights, and longer; reset rows of tokens that only the forget set uses (`edit.reset_rows`)."

QUESTIONS = (
    _question(
        "relearn", "Relearning on half of the forgotten rows",
        "After a short training on half of the forgotten rows, does the model know the other half?", _HIDDEN, _DEEPER),
    _question(
        "related", "Relearning on text of the same kind",
        "After a short training on text of the same kind, does the model know the forgotten rows again?", _HIDDEN,
        _DEEPER),
    _question(
        "quantise", "Quantised copies", "Do forgotten answers come back when the weights are rounded to few bits?",
        "The update is small enough to be rounded away.",
        "A higher rate over fewer steps, or full fine-tuning: updates that are larger than the rounding."),
    _question(
        "sample", "Many sampled answers", "Does an answer come out if the model is asked many times, with chance?",
        "Asked often enough, the model says what it should have forgotten.",
        "More steps, and forget rows in several wordings.", "leak"),
    _question(
        "prompts", "Other prompts", "Do other wordings, a friendly beginning or examples bring the answers back?",
        "The given questions were silenced, not the knowledge.", "Forget rows in several wordings, and longer.",
        "leak"),
    _question(
        "adapter", "The adapter taken off, scaled or turned round",
        "Do forgotten answers come back when the update is removed, scaled or negated?",
        "Whoever holds adapter and base holds the original: an adapter delivered alone hides, it does not remove.",
        "Deliver merged weights (excise export RUN --to merged), and delete the original."),
    _question(
        "direction", "One direction taken out", "Do answers come back when one direction of the states is taken out?",
        "A single direction holds the answers back.", "Objectives that change more than one direction; more layers."),
)  # fmt: skip
