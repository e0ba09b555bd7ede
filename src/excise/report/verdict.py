"""What was found, in plain words: a few checks, each with the gold's number beside it, and one headline over them.

The rules are ours and are fixed here, not chosen after looking at a run. None of them says that data was erased or
that a law is kept: they say what a test saw. Going past the gold counts as a failure like falling short of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.report.words import NOT_SHOWN, interval, number, percent, times

Kind = Literal["like", "short", "over", "harm", "unknown"]

#: The word printed beside each check, so that nothing hangs on colour.
KIND_WORDS: dict[Kind, str] = {
    "like": "within its bar",
    "short": "falls short",
    "over": "goes too far",
    "harm": "damage",
    "unknown": NOT_SHOWN,
}

FORGET_TIMES_GOLD = 5.0  # forgotten answers: at most this many times the gold's probability ...
FORGET_FLOOR = 0.05  # ... or this, whichever is larger
KEEP_SHARE = 0.95  # kept answers: at least this share of the original's probability
PRIVLEAK_BAR = 10.0  # points; twice the spread under the null hypothesis where that was measured and is larger
LATENT_BAR = 0.10  # distance of the latent membership AUC from the gold's
LOG10_P_BAR = math.log10(0.05)  # forget quality below this: told apart from the gold
PERPLEXITY_TIMES_GOLD = 3.0  # forgotten answers more surprising than this many times the gold's: over-forgetting
OVER_CODES = ("over_unlearning", "over-unlearning", "overunlearning")


@dataclass(frozen=True)
class Statement:
    """One check: how it came out, what was seen, and the gold's number (words, "not shown" where there is none)."""

    key: str
    kind: Kind
    title: str
    text: str
    value: str
    gold: str
    original: str

    @property
    def word(self) -> str:
        """The outcome as a word."""
        return KIND_WORDS[self.kind]


@dataclass(frozen=True)
class Verdict:
    """The headline, a sentence that counts the checks, and the checks."""

    model: str
    headline: str
    tally: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at: the numbers of one unlearned model, of the gold and of the original."""

    results: Results
    model: str
    null_spread: float | None = None
    finding_codes: tuple[str, ...] = ()

    def of(self, metric: str) -> tuple[Number, Number, Number]:
        """The metric of the unlearned model, the gold, the original."""
        number_of = self.results.number
        return number_of(self.model, metric), number_of(GOLD, metric), number_of(ORIGINAL, metric)


def forget_bar(gold: Number) -> float:
    """The largest forget probability that passes.

    Example:
        >>> forget_bar(Number(0.02)), forget_bar(Number(None))
        (0.1, 0.05)
    """
    return FORGET_FLOOR if gold.value is None else max(FORGET_TIMES_GOLD * gold.value, FORGET_FLOOR)


def judge(
    results: Results, model: str, *, null_spread: float | None = None, finding_codes: Sequence[str] = ()
) -> Verdict:
    """The verdict on one unlearned model.

    Args:
        results: All numbers of the run.
        model: The unlearned model to judge.
        null_spread: Standard deviation of PrivLeak (points) when nothing leaks, where it was measured.
        finding_codes: Codes of the failure signatures that the run reported.

    Example:
        >>> r = Results({"unlearned": {"forget_probability": Number(0.4)}, "gold": {"forget_probability": Number(0.001)}})
        >>> judge(r, "unlearned").headline
        'The model still gives answers that it was asked to forget.'
    """
    evidence = Evidence(results, model, null_spread, tuple(finding_codes))
    statements = tuple(check(evidence) for check in CHECKS)
    return Verdict(model, _headline(statements), _tally(statements), statements)


def _statement(key: str, kind: Kind, title: str, text: str, numbers: tuple[Number, Number, Number]) -> Statement:
    value, gold, original = (_shown(n) for n in numbers)
    return Statement(key, kind, title, text, value, gold, original)


def _shown(value: Number) -> str:
    between = interval(value.low, value.high)
    return f"{number(value.value)} ({between})" if value.shown and between else number(value.value)


def _answers(evidence: Evidence) -> Statement:
    numbers = found, gold, original = evidence.of("forget_probability")
    title = "Are the answers gone?"
    if found.value is None:
        return _statement("answers", "unknown", title, "The probability of the answers to be forgotten was not measured.", numbers)
    bar = forget_bar(gold)
    before = f" Before, it was {number(original.value)}." if original.shown else ""
    beside = f", beside {number(gold.value)} in the gold" if gold.shown else "; there is no gold to compare with"
    text = f"The model gives the answers to be forgotten a probability of {number(found.value)}{beside}.{before}"
    if found.value > bar:
        more = f" That is {times(found.value, gold.value)} the gold's" if gold.value is not None else " That is"
        return _statement("answers", "short", title, f"{text}{more}, above the bar of {number(bar)}.", numbers)
    return _statement("answers", "like", title, f"{text} The bar is {number(bar)}.", numbers)


def _kept(evidence: Evidence) -> Statement:
    numbers = found, gold, original = evidence.of("retain_probability")
    title = "Is the rest kept?"
    if found.value is None or original.value is None:
        return _statement("kept", "unknown", title, "The kept answers were not measured in both models.", numbers)
    share = found.value / original.value if original.value else 0.0
    text = (
        f"Answers that were to be kept have a probability of {number(found.value)}: {percent(share)} of the original's "
        f"{number(original.value)}. The gold's is {number(gold.value)}. The bar is {percent(KEEP_SHARE)}."
    )
    return _statement("kept", "like" if share >= KEEP_SHARE else "harm", title, text, numbers)


def _membership(evidence: Evidence) -> Statement:
    numbers = found, gold, _ = evidence.of("privleak")
    title = "Can an outsider tell from the model's answers?"
    if found.value is None:
        text = "PrivLeak needs a gold model and records that were never seen; this run does not have both."
        return _statement("membership", "unknown", title, text, numbers)
    bar = _privleak_bar(evidence)
    text = f"PrivLeak is {number(found.value)} points beside {number(gold.value)} in the gold; chance alone stays within {number(bar)}."
    if found.value < -bar:
        more = " A membership test still recognises the records as ones that the model was trained on."
        return _statement("membership", "short", title, text + more, numbers)
    if found.value > bar:
        more = " The records stand out because the model avoids them: over-forgetting, which gives them away as well."
        return _statement("membership", "over", title, text + more, numbers)
    return _statement("membership", "like", title, text + " This test does not tell the records from never-seen ones.", numbers)


def _inside(evidence: Evidence) -> Statement:
    numbers = found, gold, _ = evidence.of("latent_membership_auc")
    title = "Do traces remain inside the model?"
    if found.value is None or gold.value is None:
        text = "Telling the records from never-seen ones by inner states needs a gold model and never-seen records."
        return _statement("inside", "unknown", title, text, numbers)
    gap = found.value - gold.value
    text = (
        f"Read from its inner states, the records can be told from never-seen ones with an AUC of {number(found.value)} "
        f"beside {number(gold.value)} in the gold (0.5 is guessing, 1 is certain)."
    )
    if abs(gap) <= LATENT_BAR:
        return _statement("inside", "like", title, f"{text} That is within {LATENT_BAR:g} of the gold.", numbers)
    return _statement("inside", "short", title, f"{text} The records still have a place of their own.", numbers)


def _relearned(evidence: Evidence) -> Statement:
    numbers = found, gold, original = evidence.of("relearned_probability")
    title = "Does it come back?"
    if found.value is None or gold.value is None:
        return _statement("relearned", "unknown", title, "Relearning was not measured for this model and a gold.", numbers)
    bar = forget_bar(gold)
    text = (
        f"After a short training on some of the records, the others reach a probability of {number(found.value)} beside "
        f"{number(gold.value)} in the gold, which learns them for the first time."
    )
    if found.value <= bar:
        return _statement("relearned", "like", title, f"{text} The bar is {number(bar)}.", numbers)
    more = f" That is {times(found.value, gold.value)} the gold's, above the bar of {number(bar)}: part of the knowledge was hidden, not gone."
    return _statement("relearned", "short", title, text + more, numbers)


def _alike(evidence: Evidence) -> Statement:
    numbers = found, _, original = evidence.of("forget_quality_log10")
    title = "Does it judge the records as the gold does?"
    if found.value is None:
        text = "Forget quality needs a gold model, reworded answers and false answers; this run does not have all three."
        return _statement("alike", "unknown", title, text, numbers)
    n = f" on {found.n} records" if found.n else ""
    before = f" before: {number(original.value)};" if original.shown else ""
    text = f"Log10 forget quality is {number(found.value)}{n};{before} the gold compared with itself: 0."
    if found.value < LOG10_P_BAR:
        return _statement("alike", "short", title, f"{text} The test tells the model from the gold (below {number(LOG10_P_BAR)}).", numbers)
    few = " With so few records it would miss large differences as well." if found.n is not None and found.n < 100 else ""
    return _statement("alike", "like", title, f"{text} The test does not tell the two apart.{few}", numbers)


def _not_past_gold(evidence: Evidence) -> Statement:
    numbers = found, gold, _ = evidence.of("forget_perplexity")
    title = "Did it go too far?"
    signs: list[str] = []
    looked = False
    if found.value is not None and gold.value is not None:
        looked = True
        if found.value > PERPLEXITY_TIMES_GOLD * gold.value:
            signs.append(
                f"the forgotten answers surprise the model {times(found.value, gold.value)} as much as they surprise the gold "
                f"(perplexity {number(found.value)} beside {number(gold.value)})"
            )
    privleak = evidence.results.number(evidence.model, "privleak").value
    if privleak is not None:
        looked = True
        if privleak > _privleak_bar(evidence):
            signs.append(f"PrivLeak is {number(privleak)} beside 0 in the gold")
    if any(code in OVER_CODES for code in evidence.finding_codes):
        looked = True
        signs.append("the run found the forgotten answers less likely than those of never-seen records")
    if not looked:
        return _statement("past", "unknown", title, "Over-forgetting shows only beside a gold model or never-seen records.", numbers)
    if signs:
        text = f"Over-forgetting, a failure of its own: {'; '.join(signs)}. Whoever looks can see that something was pushed away."
        return _statement("past", "over", title, text, numbers)
    beside = f" Perplexity of the forgotten answers is {number(found.value)} beside {number(gold.value)} in the gold." if gold.shown else ""
    return _statement("past", "like", title, f"No sign that the model avoids the records more than the gold does.{beside}", numbers)


#: The checks in the order of the page.
CHECKS: tuple[Callable[[Evidence], Statement], ...] = (
    _answers, _kept, _not_past_gold, _membership, _inside, _relearned, _alike,
)  # fmt: skip


def _privleak_bar(evidence: Evidence) -> float:
    return max(PRIVLEAK_BAR, 2 * (evidence.null_spread or 0.0))


def _headline(statements: Sequence[Statement]) -> str:
    kinds = {statement.key: statement.kind for statement in statements}
    if kinds["answers"] == "short":
        first = "The model still gives answers that it was asked to forget"
        link = ", and it lost knowledge that it was asked to keep" if kinds["kept"] == "harm" else ""
        return f"{first}{link}."
    if kinds["answers"] == "unknown":
        first = "Whether the model still gives the answers is not shown"
    else:
        first = "The model no longer gives the answers that it was asked to forget"
    if kinds["kept"] == "harm":
        link = ", but it lost knowledge that it was asked to keep"
    elif kinds["kept"] == "like":
        link = ", and it keeps the rest" if kinds["answers"] == "like" else "; it keeps the rest"
    else:
        link = ""
    traces = [kinds[key] for key in ("membership", "inside", "relearned", "alike")]
    if "over" in kinds.values():
        end = " It went too far: it avoids the records more than a model that never saw them."
        end += " Traces of them remain as well." if "short" in traces else ""
    elif "short" in traces:
        end = " Traces of the records remain."
    elif "unknown" in traces:
        end = " Whether traces remain is shown only in part."
    else:
        end = " No test made here found a trace of the records beyond the gold's."
    return f"{first}{link}.{end}"


def _tally(statements: Sequence[Statement]) -> str:
    words = {
        "like": "{} within the bar",
        "short": "{} short of the gold",
        "over": "{} past the gold (over-forgetting)",
        "harm": "{} with damage to what was to be kept",
        "unknown": "{} not shown",
    }
    counts = [(kind, sum(s.kind == kind for s in statements)) for kind in words]
    return f"{len(statements)} checks: " + ", ".join(words[kind].format(n) for kind, n in counts if n) + "."
