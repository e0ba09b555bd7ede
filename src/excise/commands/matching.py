"""What a model that never saw the forget rows says of them and of never-seen ones, before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise import models, recipe
from excise.alike import alike
from excise.commands.measuring.evaluation import load_for_measuring
from excise.commands.progress import Progress
from excise.commands.starting import objective, sides
from excise.commands.starting.sides import CALIBRATION, TRAINING
from excise.commands.watching import Said, said
from excise.errors import InputRefused, UsageError
from excise.initialise import store
from excise.metrics.statistics import auc
from excise.records import Record, fingerprint

#: A model that is said never to have seen the forget rows and finds them likelier this often has to be asked about.
DOUBTED = 0.8


def match(settings: recipe.Recipe, given: sides.Sides, progress: Progress) -> None:
    """Aim at what the models of ``data.never_saw`` find, each read once and let go; without one nothing is done.

    For language models those never-seen rows are left for training and the stopping rule that are as easy as the forget
    rows (`alike`); what is measured stays whole. For classifiers, whose rows are few and short, none is given up: what
    such a model says of every label (``Sides.unseen``) is what the term `distil` learns, and where the rule begins to
    count.

    Raises:
        UsageError: Neither training nor the rule reads never-seen rows, or of a classifier neither reads such models.
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
    read = [s for s in _compared(settings) if len(given.records.get(s, [])) > 1]
    if chooses and not read:
        raise UsageError("data.never_saw chooses among never-seen rows, and neither training nor stop.rule reads any")
    learns = objective.reads_never_saw(objective.terms(settings.objective))
    if not chooses and settings.stop.rule == "none" and not learns:
        raise UsageError(
            "data.never_saw is what the term distil learns from, and where the stopping rule of a classifier begins to "
            "count: name objective.forget.distil, or set stop.rule: two_sided"
        )
    with progress.stage("match: what models say that never saw the rows"):
        found, weights = _unseen(settings, given, read)
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
        if (many := len(settings.data.never_saw)) > 1:
            given.warnings.append(
                f"data.never_saw: a forgotten row is taken for new to one of {many} models; the others may have seen "
                "it and hold it: they are copies, to be trained again without it or deleted"
            )
        given.sources["forget-never-saw"] = {"rows": len(given.records["forget"]), "fingerprint": weights}


def _compared(settings: recipe.Recipe) -> tuple[str, ...]:
    """The never-seen rows that the forget rows are held against.

    Where no rule of a classifier reads any, those of the evaluation are read for the warning alone.
    """
    if settings.model.task == "causal_lm":
        return TRAINING, CALIBRATION
    return ("never_seen",) if settings.stop.rule == "none" else (CALIBRATION,)


def _unseen(settings: recipe.Recipe, given: sides.Sides, read: Sequence[str]) -> tuple[dict[str, list[Said]], str]:
    """Side -> what is said of each row's labels, by one model each; and a fingerprint of all models' weights.

    Of several, each forget row is new to one at least: the one that finds it least likely is believed. Never-seen rows
    are new to all and are shared out in turn, so that either side is read by one model a row.
    """
    names, digest = ("forget", *read), hashlib.sha256()
    by_model, out = [], {}
    for name in settings.data.never_saw or ():
        found, weights = _by(name, settings, given, names)
        by_model.append(found)
        digest.update(weights.encode())
    for side in names:
        rows = enumerate(zip(*(found[side] for found in by_model), strict=True))
        out[side] = [min(own, key=_mean) if side == "forget" else own[i % len(own)] for i, own in rows]
    return out, digest.hexdigest()


def _mean(row: Said) -> float:
    return float(row.logp.mean())


def _by(
    name: str, settings: recipe.Recipe, given: sides.Sides, names: Sequence[str]
) -> tuple[dict[str, list[Said]], str]:
    """What one model says, and of a classifier the fingerprint of its weights."""
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
    if task == "causal_lm":  # what it chose is held, see `match`
        return found, ""
    return {side: _whole(found[side], given.records[side]) for side in names}, store.fingerprint(model)


def _whole(pieces: Sequence[Said], records: Sequence[Record]) -> list[Said]:
    """Rows that were cut for their length, put together again: another tokenizer cuts elsewhere."""
    logp, every = (np.concatenate([getattr(piece, part) for piece in pieces]) for part in ("logp", "every"))
    ends = np.cumsum([0, *(len(r.tags) for r in records)])
    return [Said(logp[a:b], every[a:b], pieces[0].names) for a, b in pairwise(ends)]


def taught(rows: sides.Rows, told: Sequence[Said], classes: Sequence[str]) -> dict[str, Tensor]:
    """What `excise.objectives.distil` reads: log-probabilities of every label of the forget rows, as they are cut now.

    Args:
        rows: Encoded rows.
        told: What is said of every forget row, cut at whatever places.
        classes: Of the model that learns, by number.

    Returns:
        ``logp [N, C]`` and ``starts [rows]``.

    Raises:
        InputRefused: A model that never saw the rows tells other classes apart.
    """
    for names in {row.names for row in told}:
        if set(names) != set(classes):
            apart = ", ".join(sorted(set(names) ^ set(classes)))
            raise InputRefused(f"data.never_saw: to learn from a model it has to tell the same classes apart: {apart}")
    every = np.concatenate([row.every[:, [row.names.index(name) for name in classes]] for row in told])
    starts = np.cumsum([0, *(len(e.classes) for e in rows.examples["forget"])])[:-1]
    return {"logp": torch.from_numpy(every), "starts": torch.from_numpy(starts)}
