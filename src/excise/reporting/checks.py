"""The checks behind the verdict: each looks at one number beside the gold's and says in words what was seen.

The limits are ours and are fixed here, not chosen after looking at a run. Going past the gold counts as a failure like
falling short of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.reporting.words import number, percent, times

Kind = Literal["like", "short", "over", "harm", "unknown"]
Outcome = tuple[Kind, str]

FORGET_TIMES_GOLD = 5.0  # forgotten answers: at most this many times the gold's probability ...
FORGET_FLOOR = 0.05  # ... or this, whichever is larger
KEEP_SHARE = 0.95  # kept answers: at least this share of the original's probability
PRIVLEAK_LIMIT = 10.0  # points; twice the spread under the null hypothesis where that was measured and is larger
LATENT_LIMIT = 0.10  # distance of the latent membership AUC from the gold's
LOG10_P_LIMIT = math.log10(0.05)  # forget quality below this: told apart from the gold
FEW_RECORDS = 100  # below this a test that sees nothing says little (KS at 40 rows misses shifts of 0.4 to 1.0 SD)
PERPLEXITY_TIMES_GOLD = 3.0  # forgotten answers more surprising than this many times the gold's: over-forgetting
OVER_CODES = ("over_unlearned", "over_unlearning")


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at: the numbers of one unlearned model, of the gold and of the original."""

    results: Results
    model: str
    null_spread: float | None = None
    finding_codes: tuple[str, ...] = ()

    def of(self, metric: str) -> tuple[Number, Number, Number]:
        """The metric of the unlearned model, the gold, the original."""
        found, gold, original = (self.results.number(name, metric) for name in (self.model, GOLD, ORIGINAL))
        if metric in ("privleak", "forget_quality_log10") and not gold.shown and GOLD in self.results.models:
            gold = Number(0.0)  # both compare with the gold: it is 0 from itself
        return found, gold, original

    @property
    def privleak_limit(self) -> float:
        """How far PrivLeak may lie from 0, in points."""
        return max(PRIVLEAK_LIMIT, 2 * (self.null_spread or 0.0))


@dataclass(frozen=True)
class Check:
    """A question, the number that answers it, and the rule."""

    key: str
    title: str
    metric: str
    rule: Callable[[Evidence, Number, Number, Number], Outcome]


def forget_limit(gold: Number) -> float:
    """The largest probability of a forgotten answer that passes.

    Example:
        >>> forget_limit(Number(0.02)), forget_limit(Number(None))
        (0.1, 0.05)
    """
    return FORGET_FLOOR if gold.value is None else max(FORGET_TIMES_GOLD * gold.value, FORGET_FLOOR)


def _answers(_: Evidence, found: Number, gold: Number, original: Number) -> Outcome:
    if found.value is None:
        return "unknown", "The probability of the answers to be forgotten was not measured."
    limit = forget_limit(gold)
    before = f" Before, it was {number(original.value)}." if original.shown else ""
    beside = f", beside {number(gold.value)} in the gold" if gold.shown else "; there is no gold to compare with"
    text = f"The model gives the answers to be forgotten a probability of {number(found.value)}{beside}.{before}"
    if found.value <= limit:
        return "like", f"{text} The limit is {number(limit)}."
    ratio = f"{times(found.value, gold.value)} the gold's, " if gold.value is not None else ""
    return "short", f"{text} That is {ratio}above the limit of {number(limit)}."


def _kept(_: Evidence, found: Number, gold: Number, original: Number) -> Outcome:
    if found.value is None or original.value is None:
        return "unknown", "The answers that were to be kept were not measured in both models."
    share = found.value / original.value if original.value else 0.0
    text = (
        f"Answers that were to be kept have a probability of {number(found.value)}: {percent(share)} of the original's "
        f"{number(original.value)}. The gold's is {number(gold.value)}. "
        f"The limit is {percent(KEEP_SHARE)} of the original's."
    )
    return ("like" if share >= KEEP_SHARE else "harm"), text


def _past(evidence: Evidence, found: Number, gold: Number, _: Number) -> Outcome:
    privleak, leak_gold, _original = evidence.of("privleak")
    limit = evidence.privleak_limit
    signs: list[str] = []
    if found.value is not None and gold.value is not None and found.value > PERPLEXITY_TIMES_GOLD * gold.value:
        signs.append(
            f"the forgotten answers surprise the model {times(found.value, gold.value)} as much as they surprise the "
            f"gold (perplexity {number(found.value)} beside {number(gold.value)})"
        )
    if privleak.value is not None and privleak.value > limit:
        signs.append(f"PrivLeak is {number(privleak.value)} beside {number(leak_gold.value)} in the gold")
    if any(code in OVER_CODES for code in evidence.finding_codes):
        signs.append("the forgotten answers are less likely than those of never-seen records")
    if signs:
        text = f"Over-forgetting, a failure of its own: {'; '.join(signs)}."
        return "over", f"{text} Whoever looks can see that something was pushed away."
    if privleak.value is None and (found.value is None or gold.value is None):
        return "unknown", "Over-forgetting shows only beside a gold model or never-seen records."
    text = "No sign that the model avoids the records more than the gold does."
    if found.value is None or gold.value is None:
        return "like", text
    beside = f" Perplexity of the forgotten answers is {number(found.value)} beside {number(gold.value)} in the gold."
    return "like", f"{text}{beside} The limit is {PERPLEXITY_TIMES_GOLD:g} times the gold's."


def membership(evidence: Evidence, found: Number, gold: Number, _: Number) -> Outcome:
    """PrivLeak within its limit, either way."""
    if found.value is None:
        return "unknown", "PrivLeak needs a gold model and records that were never seen; this run does not have both."
    limit = evidence.privleak_limit
    text = f"PrivLeak is {number(found.value)} points beside {number(gold.value)} in the gold. "
    text += f"The limit is {number(limit)} either way."
    if found.value < -limit:
        return "short", f"{text} A membership test still recognises the records as ones that the model was trained on."
    if found.value > limit:
        more = "The records stand out because the model avoids them: over-forgetting, which gives them away as well."
        return "over", f"{text} {more}"
    return "like", f"{text} This test does not tell the records from never-seen ones."


def inside(_: Evidence, found: Number, gold: Number, _original: Number) -> Outcome:
    """Membership by inner states as in the gold."""
    if found.value is None or gold.value is None:
        return "unknown", "Telling the records by inner states needs a gold model and never-seen records."
    text = (
        "Read from its inner states, the records can be told from never-seen ones with an AUC of "
        f"{number(found.value)} beside {number(gold.value)} in the gold (0.5 is guessing, 1 is certain). "
        f"The limit is {LATENT_LIMIT:g} from the gold."
    )
    if abs(found.value - gold.value) <= LATENT_LIMIT:
        return "like", text
    return "short", f"{text} The records still have a place of their own."


def _relearned(_: Evidence, found: Number, gold: Number, _original: Number) -> Outcome:
    if found.value is None or gold.value is None:
        return "unknown", "Relearning was not measured for both this model and a gold."
    limit = forget_limit(gold)
    text = (
        "After a short training on some of the records, the others reach a probability of "
        f"{number(found.value)} beside {number(gold.value)} in the gold, which learns them for the first time."
    )
    if found.value <= limit:
        return "like", f"{text} The limit is {number(limit)}."
    more = f"That is {times(found.value, gold.value)} the gold's, above the limit of {number(limit)}"
    return "short", f"{text} {more}: part of the knowledge was hidden, not gone."


def _alike(_: Evidence, found: Number, gold: Number, original: Number) -> Outcome:
    if found.value is None:
        return "unknown", "Forget quality needs a gold model, reworded answers and false answers; one is missing."
    n = f" on {found.n} records" if found.n else ""
    before = f" before, it was {number(original.value)};" if original.shown else ""
    text = f"Log10 forget quality is {number(found.value)}{n};{before} the gold beside itself has {number(gold.value)}."
    if found.value < LOG10_P_LIMIT:
        return "short", f"{text} Below {number(LOG10_P_LIMIT)} the test tells the model from the gold."
    few = found.n is not None and found.n < FEW_RECORDS
    more = " With so few records it would miss large differences as well." if few else ""
    return "like", f"{text} The test does not tell the two apart.{more}"


#: The checks in the order of the page.
CHECKS = (
    Check("answers", "Are the answers gone?", "forget_probability", _answers),
    Check("kept", "Is the rest kept?", "retain_probability", _kept),
    Check("past", "Did it go too far?", "forget_perplexity", _past),
    Check("membership", "Can an outsider tell?", "privleak", membership),
    Check("inside", "Do traces remain inside?", "latent_membership_auc", inside),
    Check("relearned", "Does it come back?", "relearned_probability", _relearned),
    Check("alike", "Does it judge the records as the gold does?", "forget_quality_log10", _alike),
)
