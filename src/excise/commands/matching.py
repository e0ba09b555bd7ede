"""What a model that never saw the forget rows says of them and of never-seen ones, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from excise import models, recipe
from excise.alike import alike
from excise.commands.measuring.evaluation import load_for_measuring
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, TRAINING
from excise.commands.watching import Said, said
from excise.errors import InputRefused, UsageError
from excise.metrics.statistics import auc
from excise.records import Record, fingerprint

#: A model that is said never to have seen the forget rows and finds them likelier this often has to be asked about.
DOUBTED = 0.8


def match(settings: recipe.Recipe, given: sides.Sides, progress: Progress) -> None:
    """Aim at what the models of ``data.never_saw`` find, each read once and let go; without one nothing is done.

    For language models those never-seen rows are left for training and the stopping rule that are as easy as the forget
    rows (`alike`); what is measured stays whole. For classifiers, whose rows are few and short, none is given up: the
    rule is told how likely every label is to a model that never saw it (``Sides.unseen``), and counts from there.

    Raises:
        UsageError: Neither training nor the rule reads never-seen rows, or of a classifier the rule does not.
        InputRefused: A model that cannot be loaded, or rows that do not fit into it.
    """
    if not settings.data.never_saw:
        if settings.stop.rule != "none" and settings.stop.statistic == "f1":
            given.warnings.append(
                "stop.statistic: f1 is compared whatever the entities are, and some sentences are easier than others "
                "by many points: name models that never saw the forget rows as data.never_saw"
            )
        return
    chooses = settings.model.task == "causal_lm"
    read = [s for s in ((TRAINING, CALIBRATION) if chooses else (CALIBRATION,)) if len(given.records.get(s, [])) > 1]
    if not read:
        raise UsageError(
            "data.never_saw chooses among never-seen rows, and neither training nor stop.rule reads any" if chooses else
            "data.never_saw says where the stopping rule of a classifier begins to count: set stop.rule: two_sided"
        )  # fmt: skip
    with progress.stage("match: never-seen rows"):
        found = _unseen(settings, given, read)
    for side in read:
        mine, others = ([_mean(row) for row in found[name]] for name in ("forget", side))
        if (share := float(auc(mine, others))) > DOUBTED:
            given.warnings.append(
                f"data.never_saw: this model finds the forgotten row the likelier one in {share:.0%} of pairs with "
                f"{side.replace('_', ' ')} rows: make sure that it never saw them"
            )
        if chooses:
            given.records[side] = [given.records[side][i] for i in alike(mine, others, seed=settings.seed)]
            # Beside the file's own: a resumed run is held to both, so that another model at that path is noticed.
            chosen = {"rows": len(given.records[side]), "fingerprint": fingerprint(given.records[side])}
            given.sources[f"{side}-alike"] = chosen
    if not chooses:
        given.unseen = found


def _unseen(settings: recipe.Recipe, given: sides.Sides, read: Sequence[str]) -> dict[str, list[Said]]:
    """Side -> what is said of each row's labels, by one model each.

    Of several, each forget row is new to one at least: the one that finds it least likely is believed. Never-seen rows
    are new to all and are shared out in turn, so that either side is read by one model a row.
    """
    names = ("forget", *read)
    by_model = [_by(model, settings, given, names) for model in settings.data.never_saw or ()]
    out = {}
    for side in names:
        rows = enumerate(zip(*(found[side] for found in by_model), strict=True))
        out[side] = [min(own, key=_mean) if side == "forget" else own[i % len(own)] for i, own in rows]
    return out


def _mean(row: Said) -> float:
    return float(row.logp.mean())


def _by(name: str, settings: recipe.Recipe, given: sides.Sides, names: Sequence[str]) -> dict[str, list[Said]]:
    model, tokenizer = load_for_measuring(name, settings)
    task, context = settings.model.task, models.context_length(model)
    own, classes = replace(given, records={side: given.records[side] for side in names}, warnings=[]), tuple[str, ...]()
    if task != "causal_lm":
        sides.cut(own, tokenizer, sides.encoding(settings.data, context=context), task=task, long=settings.data.long)
        config: Any = model.config
        classes = tuple(config.id2label[i] for i in range(config.num_labels))
    try:
        rows = sides.encode(
            own, names, tokenizer, settings.data, seed=settings.seed, context=context, task=task, classes=classes
        )
    except InputRefused as error:
        raise InputRefused(f"data.never_saw: {name}: {error}") from None
    found = {side: said(model, rows, side, classes) for side in names}
    return found if task == "causal_lm" else {side: _whole(found[side], given.records[side]) for side in names}


def _whole(pieces: Sequence[Said], records: Sequence[Record]) -> list[Said]:
    """Rows that were cut for their length, put together again: another tokenizer cuts elsewhere."""
    logp, tags = np.concatenate([piece.logp for piece in pieces]), [t for piece in pieces for t in piece.tags]
    ends = np.cumsum([0, *(len(r.tags) for r in records)])
    return [Said(logp[a:b], tuple(tags[a:b])) for a, b in pairwise(ends)]
