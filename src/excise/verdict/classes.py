"""The questions that are asked of a classifier: of words (entities, strict F1) or of texts (accuracy)."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from excise.artifacts import ORIGINAL
from excise.errors import NotShown
from excise.metrics import entities
from excise.metrics.class_scores import outside_words, row_logp
from excise.metrics.table import Table
from excise.verdict import equivalence
from excise.verdict.evidence import Evidence
from excise.verdict.language import auc_beside, latent, versus
from excise.verdict.question import Answer, Question

Floats = NDArray[np.float64]


def score(table: Table) -> tuple[Floats, Floats]:
    """Numerator and denominator of each row: of strict F1, or of accuracy where the classes are no tags."""
    c, of = table.columns, entities.scheme(table.classes)
    if of is None:
        owner = np.repeat(c["row"], table.lengths)
        right = np.bincount(owner, weights=c["hit"].astype(np.float64), minlength=table.rows)
        return right.astype(np.float64), np.bincount(owner, minlength=table.rows).astype(np.float64)
    own = entities.counts(c["gold_class"], c["predicted_class"], c["offsets"], c["row"], table.rows, of)
    return 2 * own.right, own.found + own.there


def _answers(evidence: Evidence) -> Answer:
    margin, what = evidence.limits.classes, "F1 (or accuracy) on forgotten rows"
    return versus(evidence, score, -margin, margin, what)


def _outside(evidence: Evidence) -> Answer:
    margin, what = evidence.limits.outside, "share of the words outside of entities that are taken for none"
    return versus(evidence, outside_words, -margin, margin, what)


def _kept(side: str, evidence: Evidence) -> Answer:
    name = evidence.kept if side == "kept" else side
    own, before = evidence.pair(name, score, ORIGINAL)
    found = equivalence.ratio(own, before, level=evidence.limits.level)
    what = "retained rows" if side == "kept" else "unseen rows"
    return Answer(found, evidence.limits.kept, None, f"F1 (or accuracy) on {what}, share of the original's", "original")


def _logp(table: Table) -> Floats:
    return row_logp(table, entity_only=True)


def _membership(evidence: Evidence) -> Answer:
    margin = evidence.limits.membership
    return auc_beside(
        evidence, _logp, -margin, margin, "forgotten against never-seen rows by likelihood of their classes"
    )


def _below(evidence: Evidence) -> Answer:
    what = "forgotten against never-seen rows by likelihood of their classes"
    return auc_beside(evidence, _logp, -evidence.limits.below, None, what)


def _past(evidence: Evidence) -> Answer:
    if not evidence.has_gold:
        raise NotShown("needs a gold")
    most = math.log(evidence.limits.perplexity)
    return versus(evidence, lambda t: -_logp(t), None, most, "nats per label of forgotten rows")


_LONGER = "More steps, a higher rate, or a heavier forget term; then look whether the rest is still kept."
_SHORTER = "Fewer steps, a lower rate, more retain steps; or let `stop.rule: two_sided` choose the step."
_KEEP = "More retain steps for each step that forgets, a lower rate, or `stop.rule: two_sided`."
_AVOIDS = "Its classes are avoided, beyond what a model without the rows does: over-forgetting, which gives them away."

QUESTIONS = (
    Question(
        "answers", "forgotten", "Classes of forgotten rows",
        "Is the model as good on the forgotten rows as a model that never saw them, and no worse?",
        _answers, "As good as without them, within the margin.",
        ("It still knows their classes better than without having seen them.", _LONGER), (_AVOIDS, _SHORTER)),
    Question(
        "outside", "traces", "Errs as a stranger does",
        "A model that never saw a sentence takes some of its other words for entities: does this one, as often?",
        _outside, "As often as without them, within the margin.",
        ("It still knows which words of the forgotten rows are no entities.",
         "Forget those words too: `quantile` with `within: outside`, or a term on every label (`ga`)."),
        ("It takes more of their words for entities than a model that never saw them.", _SHORTER)),
    Question(
        "membership", "traces", "Membership by likelihood",
        "Can an outsider tell forgotten rows from rows that were never there, better than with a model without them?",
        _membership, "No better than with a model that never saw them, within the margin.",
        ("The likelihood of their classes still gives the rows away.", _LONGER), (_AVOIDS, _SHORTER)),
    Question(
        "inside", "traces", "Membership by hidden states",
        "Can somebody who looks inside tell the forgotten rows from rows that were never there?",
        partial(latent, "latent_membership_auc", "a classifier on hidden states"),
        "No better than in a model that never saw them, within the margin.",
        ("The rows still have a place of their own inside the model, or stand apart there.", _LONGER),
        signs=("short", "")),
    Question(
        "below_never_seen", "over", "Less likely than a stranger's?",
        "Are the classes of forgotten rows less likely than those of rows that the model never saw?",
        _below, "They are not clearly below the level of never-seen rows.",
        below=("Their classes are less likely than a stranger's: over-forgetting.", _SHORTER), signs=("", "over")),
    Question(
        "past_gold", "over", "Pushed past the gold?",
        "Do the right classes surprise the model much more than a model that never saw the rows?",
        _past, "They do not surprise it much more than the gold.",
        ("The right classes were made implausible, beyond the gold: over-forgetting.", _SHORTER), signs=("over", "")),
    Question(
        "kept", "kept", "Retained rows", "Is the model as good on the rows that it should keep as before?",
        partial(_kept, "kept"), "Enough of it is left.",
        below=("It lost what it should have kept.", _KEEP), signs=("", "harm")),
    Question(
        "general", "kept", "Unseen rows", "Is the model as good on rows that nobody trained on as before?",
        partial(_kept, "test"), "Enough of it is left.",
        below=("It became worse at its work.", _KEEP), signs=("", "harm")),
)  # fmt: skip
#: Of texts: nothing is outside of their classes.
OF_TEXTS = tuple(question for question in QUESTIONS if question.key != "outside")
