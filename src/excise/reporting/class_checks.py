"""The checks behind the verdict on a classifier: F1 (or accuracy) beside the gold's, what is kept, what shows through.

As in `checks`, the limits are fixed here, and going past the gold is a failure like falling short of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from excise.artifacts import Number
from excise.reporting.checks import FEW_RECORDS, OVER_CODES, Check, Evidence, Outcome, inside, membership
from excise.reporting.words import interval, number, percent

GAP_LIMIT = 0.03  # F1 or accuracy: distance from the gold's
KEEP_SHARE = 0.98  # kept rows: at least this share of the original's
RELEARNED_LIMIT = 0.05  # probability after relearning: distance from the gold's
SHAPE_LIMIT = 0.10  # share of neighbours of the same class: distance from the gold's


@dataclass(frozen=True)
class _Words:
    """What a task calls its score and what it asks."""

    score: str
    named: str
    gone: str
    units: str


_TAGS = _Words("f1", "F1", "Are the tags gone?", "entities")
_TEXTS = _Words("accuracy", "accuracy", "Are the classes gone?", "texts")


def _between(found: Number) -> str:
    between = interval(found.low, found.high)
    return f", between {between.replace(' to ', ' and ')} at 90 %" if between else ""


def _gone(words: _Words, evidence: Evidence, found: Number, gold: Number, original: Number) -> Outcome:
    gap, _, _ = evidence.of(f"forget_{words.score}_gap")
    if found.value is None:
        return "unknown", "The rows to be forgotten were not measured."
    before = f", before it was {number(original.value)}" if original.shown else ""
    if gap.value is None:
        text = f"The {words.named} on the rows to be forgotten is {number(found.value)}{before}."
        return "unknown", f"{text} Only a gold says what it would be had they never been there."
    text = (
        f"The {words.named} on the rows to be forgotten is {number(found.value)} beside {number(gold.value)} in the "
        f"gold{before}. The gap is {number(gap.value)}{_between(gap)}; the limit is {GAP_LIMIT:g} either way."
    )
    if abs(gap.value) <= GAP_LIMIT:
        return "like", text
    if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
        few = f" With {gap.n} rows a gap of this size can be chance." if (gap.n or FEW_RECORDS) < FEW_RECORDS else ""
        return "like", f"{text} The two are not told apart.{few}"
    if gap.value > 0:
        return "short", f"{text} The model still knows the rows better than one that never saw them."
    return "over", f"{text} The model does worse on them than one that never saw them, which gives them away as well."


def _kept(words: _Words, evidence: Evidence, *_: Number) -> Outcome:
    shares, parts = [], []
    for side, called in (("retain", "rows to be kept"), ("untouched", "kept rows that unlearning did not touch")):
        found, gold, original = evidence.of(f"{side}_{words.score}")
        if found.value is not None and original.value:
            shares.append(found.value / original.value)
            beside = f"the gold's is {number(gold.value)}" if gold.shown else "there is no gold"
            parts.append(
                f"{number(found.value)} on {called}, {percent(shares[-1])} of the original's ({beside})"
            )  # fmt: skip
    if not shares:
        return "unknown", "The rows that were to be kept were not measured in both models."
    text = f"The {words.named} is {'; '.join(parts)}. The limit is {percent(KEEP_SHARE)} of the original's."
    return ("like" if min(shares) >= KEEP_SHARE else "harm"), text


def _general(words: _Words, evidence: Evidence, found: Number, gold: Number, _: Number) -> Outcome:
    gap, _gold, _original = evidence.of(f"test_{words.score}_gap")
    if found.value is None or gap.value is None:
        return "unknown", "New rows were not measured beside a gold: name a set as data.utility.test."
    text = (
        f"On the set test the {words.named} is {number(found.value)} beside {number(gold.value)} in the gold. The gap "
        f"is {number(gap.value)}{_between(gap)}; the limit is {GAP_LIMIT:g} below the gold."
    )
    return ("harm" if gap.value < -GAP_LIMIT else "like"), text


def _past(words: _Words, evidence: Evidence, found: Number, gold: Number, _: Number) -> Outcome:
    gap, _gold, _original = evidence.of(f"forget_{words.score}_gap")
    leak, leak_gold, _original = evidence.of("privleak")
    signs: list[str] = []
    if gap.value is not None and gap.value < -GAP_LIMIT and (gap.high is None or gap.high < 0):
        signs.append(f"the {words.named} on them is {number(-gap.value)} below the gold's")
    if leak.value is not None and leak.value > evidence.privleak_limit:
        signs.append(f"PrivLeak is {number(leak.value)} beside {number(leak_gold.value)} in the gold")
    if any(code in OVER_CODES for code in evidence.finding_codes):
        signs.append(f"the {words.units} of forgotten rows are less likely than those of never-seen ones")
    if signs:
        text = f"Over-forgetting, a failure of its own: {'; '.join(signs)}."
        return "over", f"{text} Whoever looks can see that something was pushed away."
    if gap.value is None and leak.value is None:
        return "unknown", "Over-forgetting shows only beside a gold model."
    beside = f" The membership attack has an AUC of {number(found.value)} beside {number(gold.value)} in the gold."
    text = "No sign that the model avoids the rows more than the gold does."
    return "like", text + (beside if found.shown and gold.shown else "")


def _outside(_: Evidence, found: Number, gold: Number, _original: Number) -> Outcome:
    if found.value is None or gold.value is None:
        return "unknown", "Words outside of entities were not measured for both this model and a gold."
    text = (
        f"Of the words of forgotten rows that are outside of entities, {percent(1 - found.value)} are taken for one, "
        f"beside {percent(1 - gold.value)} by the gold."
    )
    if found.low is None or found.high is None or gold.low is None or gold.high is None:
        return "unknown", f"{text} Without intervals the two cannot be compared."
    if found.low > gold.high:
        return "short", f"{text} It is right about them too often for one that never saw them: they were not forgotten."
    if found.high < gold.low:
        return "over", f"{text} It is wrong about them more often than one that never saw them."
    return "like", f"{text} The intervals overlap."


def _relearned(_: Evidence, found: Number, gold: Number, _original: Number) -> Outcome:
    if found.value is None or gold.value is None:
        return "unknown", "Relearning was not measured for both this model and a gold."
    text = (
        "After a short training on some of the forgotten rows, the right classes of the others have a probability of "
        f"{number(found.value)} beside {number(gold.value)} in the gold. The limit is {RELEARNED_LIMIT:g} either way."
    )
    if abs(found.value - gold.value) <= RELEARNED_LIMIT:
        return "like", text
    if found.value > gold.value:
        return "short", f"{text} Part of what was learned was hidden, not gone."
    return "over", f"{text} They come back more slowly than they are learned for the first time."


def _shape(_: Evidence, found: Number, gold: Number, _original: Number) -> Outcome:
    if found.value is None or gold.value is None:
        return "unknown", "Where the classes lie inside was not measured for both this model and a gold."
    text = (
        f"Of the nearest kept vectors inside the model, {percent(found.value)} have the class of the forgotten one, "
        f"beside {percent(gold.value)} in the gold. The limit is {SHAPE_LIMIT:g} either way."
    )
    if abs(found.value - gold.value) <= SHAPE_LIMIT:
        return "like", text
    if found.value > gold.value:
        return "short", f"{text} Forgotten rows still lie among their class more than unknown ones do."
    return "over", f"{text} Forgotten rows were moved out of their class further than unknown ones lie."


def _checks(words: _Words, attack: str, *more: Check) -> tuple[Check, ...]:
    return (
        Check("answers", words.gone, f"forget_{words.score}", partial(_gone, words)),
        Check("kept", "Is the rest kept?", f"retain_{words.score}", partial(_kept, words)),
        Check("general", "Does it work on new rows?", f"test_{words.score}", partial(_general, words)),
        Check("past", "Did it go too far?", attack, partial(_past, words)),
        Check("membership", "Can an outsider tell?", "privleak", membership),
        *more,
        Check("inside", "Do traces remain inside?", "latent_membership_auc", inside),
        Check("relearned", "Does it come back?", "relearned_probability", _relearned),
        Check("alike", "Does it lie where the gold has it?", "same_class_neighbours", _shape),
    )


_STRANGER = Check("outside", "Does it err as a stranger would?", "forget_outside_accuracy", _outside)
#: Task -> the checks in the order of the page.
CLASS_CHECKS = {
    "token_classification": _checks(_TAGS, "entity_membership_auc", _STRANGER),
    "sequence_classification": _checks(_TEXTS, "membership_auc"),
}
