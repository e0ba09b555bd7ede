"""The questions that are asked of a language model, in the order of a page, each with the rule that answers it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from excise.artifacts import GOLD, ORIGINAL
from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.table import PARAPHRASE, Table
from excise.metrics.utility import ROW_SETS, fluent, stored, utility_parts
from excise.verdict import equivalence, shares
from excise.verdict.evidence import Evidence
from excise.verdict.question import Answer, Question

Values = Callable[[Table], NDArray[np.float64]]
_NO_CONTROL = "needs a gold, or never-seen rows of the same kind"


def versus(evidence: Evidence, values: Callable, least: float | None, most: float | None, measure: str) -> Answer:
    """A mean over forget rows beside the gold's on the same rows, or where there is none beside never-seen rows."""
    level = evidence.limits.level
    if evidence.has_gold:
        found = equivalence.difference(*evidence.pair("forget", values), paired=True, level=level)
        return Answer(found, least, most, f"{measure}, model minus gold", "gold")
    if evidence.basis != "never-seen rows":
        raise NotShown(_NO_CONTROL)
    own, control = (evidence.rows(evidence.model, side, values) for side in ("forget", "never_seen"))
    found = equivalence.difference(own, control, paired=False, level=level)
    return Answer(found, least, most, f"{measure}, forgotten minus never-seen rows", "never-seen rows")


def _mean(values: Callable, key: str, measure: str, evidence: Evidence) -> Answer:
    margin = getattr(evidence.limits, key)
    return versus(evidence, values, -margin, margin, measure)


def _came_back(evidence: Evidence) -> Answer:
    limits = evidence.limits
    own = evidence.rows(evidence.model, "forget", per_row.probability)
    seen = own.seen
    if evidence.has_gold:
        own, other = evidence.pair("forget", per_row.probability)
        seen = seen & other.seen
        control, against = other.top, "gold"
    elif evidence.basis == "never-seen rows":
        control = np.full(len(own.top), evidence.rows(evidence.model, "never_seen", per_row.probability).value)
        against = "never-seen rows"
    else:
        raise NotShown(_NO_CONTROL)
    back = int(np.sum((own.top - control)[seen] >= limits.recalled))
    found = shares.share(back, int(seen.sum()), level=limits.level)
    measure = f"share of forgotten rows whose answer is more likely by {limits.recalled:g} or more"
    return Answer(found, None, limits.came_back, measure, against, f"{back} of {found.n} rows")


def _truth(evidence: Evidence) -> Answer:
    limits = evidence.limits
    bounds = 0.5 - limits.truth, 0.5 + limits.truth
    what = "chance that the model finds false answers more likely, beside true ones, than"
    if evidence.has_gold:
        found = equivalence.auc(*evidence.pair("forget", per_row.log_truth_ratio), same=True, level=limits.level)
        return Answer(found, *bounds, f"{what} the gold does", "gold")
    if evidence.basis != "never-seen rows":
        raise NotShown(_NO_CONTROL)
    own, other = (evidence.rows(evidence.model, s, per_row.log_truth_ratio) for s in ("forget", "never_seen"))
    return Answer(
        equivalence.auc(own, other, level=limits.level),
        *bounds,
        f"{what} it does on never-seen rows",
        "never-seen rows",
    )


def auc_beside(evidence: Evidence, values: Callable, least: float | None, most: float | None, what: str) -> Answer:
    """AUC of forgotten against never-seen rows, beside the gold's on the same rows, or beside 0.5."""
    level = evidence.limits.level
    own, other = (evidence.rows(evidence.model, side, values) for side in ("forget", "never_seen"))
    if evidence.has_gold and "never_seen" in evidence.tables[GOLD]:
        (own, gold), (other, their) = evidence.pair("forget", values), evidence.pair("never_seen", values)
        found = equivalence.auc_difference(own, other, gold, their, level=level)
        return Answer(found, least, most, f"AUC of {what}, model minus gold", "gold")
    found = equivalence.auc(own, other, level=level)
    lowest, highest = (None if bound is None else 0.5 + bound for bound in (least, most))
    return Answer(found, lowest, highest, f"AUC of {what}", "never-seen rows")


def _membership(attack: str, evidence: Evidence) -> Answer:
    margin = evidence.limits.membership
    what = {"loss": "forgotten against never-seen rows by likelihood", "min_k": "the same by the least likely words"}
    return auc_beside(evidence, partial(per_row.attack_score, attack=attack), -margin, margin, what[attack])


def _below(evidence: Evidence) -> Answer:
    values = partial(per_row.attack_score, attack="loss")
    return auc_beside(evidence, values, -evidence.limits.below, None, "forgotten against never-seen rows by likelihood")


def _past(evidence: Evidence) -> Answer:
    if not evidence.has_gold:
        raise NotShown("needs a gold")
    most = math.log(evidence.limits.perplexity)
    return versus(
        evidence, lambda t: -per_row.attack_score(t, "loss"), None, most, "nats per token of forgotten answers"
    )


def _babble(values: Values, what: str, more: bool, evidence: Evidence) -> Answer:
    margin = evidence.limits.babble
    least, most = (None, margin) if more else (-margin, None)
    if evidence.has_gold or evidence.basis != "never-seen rows":
        return versus(evidence, values, least, most, what)
    whose = ORIGINAL if "never_seen" in evidence.tables.get(ORIGINAL, {}) else evidence.model
    # Of the original where there is one: what it writes when it does not know is how this model babbles by nature.
    own, other = evidence.rows(evidence.model, "forget", values), evidence.rows(whose, "never_seen", values)
    found = equivalence.difference(own, other, paired=False, level=evidence.limits.level)
    return Answer(found, least, most, f"{what}, minus that of never-seen questions", "never-seen rows")


def latent(metric: str, what: str, evidence: Evidence) -> Answer:
    """A saved AUC on hidden states beside the gold's, or beside 0.5."""
    own, level, most = evidence.number(metric), evidence.limits.level, evidence.limits.inside
    if evidence.has_gold:
        found = shares.of_numbers(own, evidence.number(metric, GOLD), level=level)
        return Answer(found, None, most, f"AUC of {what}, model minus gold", "gold")
    return Answer(shares.of_numbers(own, 0.5, level=level), None, most, f"AUC of {what}, minus 0.5", "guessing")


def _savings(evidence: Evidence) -> Answer:
    from excise.verdict.attacked import curve

    return curve("savings", evidence.limits.savings, evidence, final=True)  # where it began is asked elsewhere


def _kept(values: Callable, what: str, evidence: Evidence) -> Answer:
    own, before = evidence.pair(evidence.kept, values, ORIGINAL)
    found = equivalence.ratio(own, before, level=evidence.limits.level)
    return Answer(found, evidence.limits.kept, None, f"{what} of retained rows, share of the original's", "original")


def _general(evidence: Evidence) -> Answer:
    if not set(evidence.tables.get(evidence.model, {})) - ROW_SETS:
        raise NotShown("no utility set was measured")
    found = [utility_parts(evidence.tables.get(model, {})) for model in (evidence.model, ORIGINAL)]
    names = [name for name in found[0] if name in found[1] and name[0] != evidence.kept]
    if not names:
        raise NotShown("the original was not measured on the utility sets")
    own, before = ({"/".join(name): equivalence.rows(parts[name]) for name in names} for parts in found)
    sides = {"/".join(name): name[0] for name in names}
    estimate = equivalence.harmonic_ratio(own, before, sides, level=evidence.limits.level)
    sets = ", ".join(sorted({side for side, _ in names}))
    return Answer(estimate, evidence.limits.kept, None, f"utility on {sets}, share of the original's", "original")


def choices(evidence: Evidence) -> Answer:
    """The multiple-choice task that is furthest from the gold's accuracy."""
    level, margin = evidence.limits.level, evidence.limits.choices
    own = evidence.results.models.get(evidence.model, {})
    gold = evidence.results.models.get(GOLD, {})
    names = [k for k in own if k.count("/") == 1 and k.startswith("mcq_accuracy/") and own[k].shown]
    if not names:
        raise NotShown("no multiple-choice questions were asked")
    names = [k for k in names if k in gold and gold[k].shown]
    if not names:
        raise NotShown("needs a gold that was asked the same questions")
    made = {}
    for name in names:
        (p, n), (q, m) = ((float(x.value or 0.0), int(x.n or 0)) for x in (own[name], gold[name]))
        made[name] = shares.share_difference(round(p * n), n, round(q * m), m, level=level)
    worst = max(made, key=lambda name: max(abs(made[name].low), abs(made[name].high)))
    measure = "accuracy on multiple-choice questions, model minus gold"
    return Answer(made[worst], -margin, margin, measure, "gold", worst.partition("/")[2])


_LONGER = "More steps, a higher rate, or a heavier forget term; then look whether the rest is still kept."
_SHORTER = "Fewer steps, a lower rate, or a lighter forget term; or let `stop.rule: two_sided` choose the step."
_DEEPER = (
    "Reset rows of tokens that only the forget set uses (`edit.reset_rows`), match hidden states, or train more layers."
)
_WHOLE = _SHORTER + " Objectives that match never-seen rows keep sentences whole."
_KEEP = "A heavier retain term, a lower rate, an anchor on hidden states, or `stop.rule: two_sided`."
_AVOIDS = (
    "Forgotten answers are avoided, beyond what a model without them does: over-forgetting, which gives them away."
)

QUESTIONS = (
    Question(
        "answers", "forgotten", "Probability of forgotten answers",
        "Does the model find the forgotten answers about as likely as a model that never saw them?",
        partial(_mean, per_row.probability, "answers", "probability of forgotten answers"),
        "On average the forgotten answers are as likely as without them, within the margin.",
        ("The forgotten answers are still likelier than without having seen them.", _LONGER), (_AVOIDS, _SHORTER)),
    Question(
        "came_back", "forgotten", "Single rows that are still known",
        "Is there any row whose answer the model still knows, hidden behind a good average?",
        _came_back, "At most the stated share of rows is still known.",
        ("Some rows are still known, whatever the average says.",
         "Look up these rows by number in the table of the forget side; train them longer."), signs=("short", "over")),
    Question(
        "reworded", "forgotten", "Forgotten facts in other words",
        "Are the same facts in other words as unlikely as for a model that never saw them?",
        partial(_mean, partial(per_row.probability, kind=PARAPHRASE), "answers", "probability of reworded answers"),
        "Reworded answers are as likely as without them, within the margin.",
        ("A wording was forgotten, the fact was not.", "Add paraphrases to the forget rows, then " + _LONGER.lower()),
        (_AVOIDS, _SHORTER)),
    Question(
        "written", "forgotten", "What it writes when asked",
        "Does the model write as much of the forgotten answers as a model that never saw them?",
        partial(_mean, partial(stored, "rouge_l_recall"), "written", "ROUGE-L recall of forgotten answers"),
        "What it writes overlaps with the forgotten answers as much as without them, within the margin.",
        ("It still writes parts of the forgotten answers.", _LONGER),
        ("It writes less of the answers than a model that never saw them: over-forgetting, by avoiding or stammering.",
         _SHORTER)),
    Question(
        "truth", "forgotten", "Judgement between true and false answers",
        "Does the model weigh false against true answers as a model that never saw them does?",
        _truth, "Its judgements are spread like the other's, within the margin.",
        ("It prefers false answers more than a model that never saw them: over-forgetting.", _SHORTER),
        ("It still prefers the true answers.", _LONGER), signs=("over", "short")),
    Question(
        "membership", "traces", "Membership by likelihood",
        "Can an outsider tell forgotten rows from rows that were never there, better than with a model without them?",
        partial(_membership, "loss"), "No better than with a model that never saw them, within the margin.",
        ("Their likelihood still gives the rows away as training data.", _LONGER), (_AVOIDS, _SHORTER)),
    Question(
        "membership_min_k", "traces", "Membership by the least likely words",
        "The same question, looking only at the words of a row that surprise the model most.",
        partial(_membership, "min_k"), "No better than with a model that never saw them, within the margin.",
        ("The least likely words still give the rows away as training data.", _LONGER), (_AVOIDS, _SHORTER)),
    Question(
        "inside", "traces", "Membership by hidden states",
        "Can somebody who looks inside tell the forgotten rows from rows that were never there?",
        partial(latent, "latent_membership_auc", "a classifier on hidden states"),
        "No better than in a model that never saw them, within the margin.",
        ("The rows still have a place of their own inside the model.", _DEEPER), signs=("short", "")),
    Question(
        "apart", "over", "Do forgotten rows stand apart inside?",
        "Did unlearning push the forgotten rows into a corner of their own, where an observer finds them?",
        partial(latent, "latent_projection_auc", "the direction from retained to forgotten rows"),
        "They do not stand apart more than in a model that never saw them, within the margin.",
        ("Forgotten rows stand apart in the latent space: over-forgetting, or what is left of knowing them.",
         "A lighter regulariser that separates (clreg), or one that matches never-seen rows. " + _DEEPER),
        signs=("over", "")),
    Question(
        "below_never_seen", "over", "Less likely than a stranger's?",
        "Are forgotten answers less likely than answers that the model never saw?",
        _below, "They are not clearly below the level of never-seen answers.",
        below=("Forgotten answers are less likely than a stranger's: over-forgetting. A ranking shows it.",
               _SHORTER), signs=("", "over")),
    Question(
        "past_gold", "over", "Pushed past the gold?",
        "Do the forgotten answers surprise the model much more than a model that never saw them?",
        _past, "They do not surprise it much more than the gold.",
        ("Forgotten answers were made implausible, beyond the gold: over-forgetting.", _SHORTER), signs=("over", "")),
    Question(
        "repetition", "over", "Does it stammer?",
        "When asked about what was forgotten, does the model repeat itself?",
        partial(_babble, partial(stored, "repetition"), "share of repeated four-word runs in what it writes", True),
        "It does not repeat itself more than a model that never saw the rows, within the margin.",
        ("Answers to forgotten questions are degenerate: over-forgetting, visible to every reader.", _WHOLE),
        signs=("over", "")),
    Question(
        "fluency", "over", "Does it still write sentences?",
        "When asked about what was forgotten, does it write what reads like a real answer, right or wrong?",
        partial(_babble, fluent, "share of answers that read like real ones", False),
        "As many of its answers read like real ones as from a model that never saw the rows, within the margin.",
        below=("Answers to forgotten questions are gibberish: over-forgetting, visible to every reader.", _WHOLE),
        signs=("", "over")),
    Question(
        "savings", "traces", "Memorisation savings",
        "Trained again on all forgotten rows, does it learn them faster than a model that never saw them?",
        _savings, "They are learned no faster than without having seen them, within the margin.",
        ("They are learned faster: a residue of the answers is left, even if nothing else shows it.", _DEEPER),
        signs=("short", "")),
    Question(
        "choices", "kept", "Multiple-choice questions",
        "Does it answer multiple-choice questions as a model that never saw the rows does?",
        choices, "Accuracy is that of the gold, within the margin, on every task.",
        ("It answers more of them than the gold.", _LONGER), ("It answers fewer of them than the gold.", _KEEP),
        signs=("short", "harm")),
    Question(
        "kept", "kept", "Retained answers",
        "Does the model still find the answers that it should keep as likely as before?",
        partial(_kept, per_row.probability, "probability"), "Enough of it is left.",
        below=("Knowledge was lost that should have stayed.", _KEEP), signs=("", "harm")),
    Question(
        "kept_written", "kept", "Retained answers, written out",
        "Does the model still write the answers that it should keep?",
        partial(_kept, partial(stored, "rouge_l_recall"), "ROUGE-L recall"), "Enough of it is left.",
        below=("It writes less of what it should keep.", _KEEP), signs=("", "harm")),
    Question(
        "general", "kept", "Everything else it should know",
        "Is the model as good on the sets of general knowledge as before?",
        _general, "Enough of it is left.", below=("General knowledge was lost.", _KEEP), signs=("", "harm")),
)  # fmt: skip
