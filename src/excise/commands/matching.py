"""What a model that never saw the forget rows says of them and of never-seen ones, before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
#: Which share of the labels of never-seen rows teachers may find less than who learns from them, on average over rows.
WEAKER = 0.02
#: Never-seen rows of the evaluation.
MEASURED = "never_seen"
#: Tokens of a vocabulary that are told apart in what such a model says; all others count as one.
KEPT = 128
SAME = "to learn from a language model it has to have the same tokenizer, and texts to be cut for it in the same places"


def match(settings: recipe.Recipe, given: sides.Sides, progress: Progress) -> None:
    """Aim at what the models of ``data.never_saw`` find, each read once and let go; without one nothing is done.

    What they say of every label (``Sides.unseen``) is what the terms `distil` and `likelihood` learn. Beside it, for
    language models those never-seen rows are left for training and the stopping rule that are as easy as the forget
    rows (`alike`); what is measured stays whole. For classifiers, whose rows are few and short, none is given up: the
    rule begins to count at what is said.

    Raises:
        UsageError: Nothing reads what the models say.
        InputRefused: A model that cannot be loaded, or rows that do not fit into it.
    """
    if not settings.data.never_saw:
        if settings.stop.rule != "none" and settings.stop.statistic == "f1":
            given.warnings.append(
                "stop.statistic: f1 is compared whatever the entities are, and some sentences are easier than others "
                "by many points: name models that never saw the forget rows as data.never_saw"
            )
        return
    of_classes = settings.model.task != "causal_lm"
    learns = objective.reads_never_saw(objective.terms(settings.objective))
    read = _compared(settings, given)
    chosen = [] if of_classes else [side for side in read if side != MEASURED]
    if not learns and not chosen and not (of_classes and settings.stop.rule != "none"):
        reader = "where the stopping rule of a classifier begins to count" if of_classes else "chooses never-seen rows"
        also = "set stop.rule: two_sided" if of_classes else "give training or stop.rule such rows to read"
        raise UsageError(
            f"data.never_saw is what distil and likelihood learn from, and {reader}: name one in objective.forget, or "
            f"{also}"
        )
    with progress.stage("match: what models say that never saw the rows"):
        found, weights = _unseen(settings, given, read, learns=learns)
    means = {side: [_mean(row) for row in own] for side, own in found.items()}
    for side in read:
        _doubt(given, side, float(auc(means["forget"], means[side])))
    if learns and read:
        _compare(settings, given, read[0], found[read[0]])
    for side in chosen:
        given.records[side] = [given.records[side][i] for i in alike(means["forget"], means[side], seed=settings.seed)]
        # Beside the file's own: a resumed run is held to both, so that another model at that path is noticed.
        own = {"rows": len(given.records[side]), "fingerprint": fingerprint(given.records[side])}
        given.sources[f"{side}-alike"] = own
    if learns or of_classes:
        given.unseen = found
        given.sources["forget-never-saw"] = {"rows": len(given.records["forget"]), "fingerprint": weights}
        if (many := len(settings.data.never_saw)) > 1:
            given.warnings.append(
                f"data.never_saw: a forgotten row is taken for new to one of {many} models; the others may have seen "
                "it and hold it: they are copies, to be deleted, trained again or made to forget it, too (data.part)"
            )


def _compared(settings: recipe.Recipe, given: sides.Sides) -> list[str]:
    """The never-seen rows that the forget rows are held against.

    Where training and the rule read none, those of the evaluation are, for the warning alone.
    """
    wanted = (TRAINING, CALIBRATION) if settings.model.task == "causal_lm" else (CALIBRATION,)
    found = [[s for s in own if len(given.records.get(s, [])) > 1] for own in (wanted, (MEASURED,))]
    return found[0] or found[1]


def _doubt(given: sides.Sides, side: str, share: float) -> None:
    """Ask about models that find a forgotten row likelier than a never-seen one too often."""
    if share > DOUBTED:
        given.warnings.append(
            f"data.never_saw: this model finds the forgotten row the likelier one in {share:.0%} of pairs with "
            f"{side.replace('_', ' ')} rows: make sure that it never saw them"
        )


def _compare(settings: recipe.Recipe, given: sides.Sides, side: str, told: Sequence[Said]) -> None:
    """Warn where teachers know less of rows that nobody saw than who learns from them: that is lost as well."""
    own, _ = _by(settings.model.name, settings, given, [side], learns=True)
    if len(own[side]) != len(told):
        raise InputRefused(f"data.never_saw: {SAME}")
    counted: list[Any] = [slice(None)] * len(told)
    if settings.model.task == "token_classification":
        counted = [np.flatnonzero(np.array(record.tags) != "O") for record in given.records[side]]
    found = [[_right(row)[at] for row, at in zip(every, counted, strict=True)] for every in (told, own[side])]
    theirs, mine = (np.array([row.mean() for row in every if len(row)]) for every in found)
    less: NDArray[np.float64] = mine - theirs
    if len(less) > 1 and less.mean() > max(WEAKER, 2 * less.std(ddof=1) / np.sqrt(len(less))):
        given.warnings.append(
            f"data.never_saw: of {side.replace('_', ' ')} rows these models find {theirs.mean():.0%} of the labels, "
            f"the model itself {mine.mean():.0%}: what learns from them loses as much of the forgotten rows, too"
        )


def _right(row: Said) -> NDArray[np.bool_]:
    """``[n]`` whether each label is what the model finds likeliest of its classes, of which the first is that."""
    return row.logp >= row.likely[:, 0] - 1e-4  # the two are rounded in different ways


def _unseen(
    settings: recipe.Recipe, given: sides.Sides, read: Sequence[str], *, learns: bool
) -> tuple[dict[str, list[Said]], str]:
    """Side -> what is said of each row's labels, by one model each; and a fingerprint of all models' weights.

    Of several, each forget row is new to one at least: the one that finds it least likely is believed. Never-seen rows
    are new to all and are shared out in turn, so that either side is read by one model a row.
    """
    names, digest = ("forget", *read), hashlib.sha256()
    by_model, out = [], {}
    for name in settings.data.never_saw or ():
        found, weights = _by(name, settings, given, names, learns=learns)
        by_model.append(found)
        digest.update(weights.encode())
    for side in names:
        if len({len(found[side]) for found in by_model}) > 1:
            raise InputRefused(f"data.never_saw: {SAME} as the others")
        rows = enumerate(zip(*(found[side] for found in by_model), strict=True))
        out[side] = [min(own, key=_mean) if side == "forget" else own[i % len(own)] for i, own in rows]
    return out, digest.hexdigest()


def _mean(row: Said) -> float:
    return float(row.logp.mean())


def _by(
    name: str, settings: recipe.Recipe, given: sides.Sides, names: Sequence[str], *, learns: bool
) -> tuple[dict[str, list[Said]], str]:
    """What one model says, and the fingerprint of its weights where what it says is kept."""
    model, tokenizer = load_for_measuring(name, settings)
    task, context = settings.model.task, models.context_length(model)
    own, classes = replace(given, records={side: given.records[side] for side in names}, warnings=[]), tuple[str, ...]()
    how = sides.encoding(settings.data, context=context)
    whole = dict(own.records)
    sides.cut(own, tokenizer, how, task=task, long=settings.data.long)
    if task == "causal_lm":  # rows that are chosen by it are left whole
        own.records |= {side: whole[side] for side in names if not learns or side in (TRAINING, CALIBRATION)}
    if task != "causal_lm":
        config: Any = model.config
        classes = tuple(config.id2label[i] for i in range(config.num_labels))
    try:
        rows = sides.encode(
            own, names, tokenizer, settings.data, seed=settings.seed, context=context, task=task, classes=classes
        )
    except InputRefused as error:
        raise InputRefused(f"data.never_saw: {name}: {error}") from None
    if task == "causal_lm":
        found = {side: said(model, rows, side, kept=learns * (KEPT if side == "forget" else 2)) for side in names}
        return found, store.fingerprint(model) if learns else ""  # what it chose is held, see `match`
    found = {side: said(model, rows, side, kept=len(classes), classes=classes) for side in names}
    return {side: _whole(found[side], given.records[side]) for side in names}, store.fingerprint(model)


def _whole(pieces: Sequence[Said], records: Sequence[Record]) -> list[Said]:
    """Rows that were cut for their length, put together again: another tokenizer cuts elsewhere."""
    logp, classes, likely = (np.concatenate(own) for own in zip(*(piece[:3] for piece in pieces), strict=True))
    ends = np.cumsum([0, *(len(r.tags) for r in records)])
    return [Said(logp[a:b], classes[a:b], likely[a:b], pieces[0].names) for a, b in pairwise(ends)]


def taught(
    rows: sides.Rows, told: Sequence[Said], classes: Sequence[str] = (), *, vocabulary: int | None = None
) -> dict[str, Tensor]:
    """What terms read that learn from strangers: what is likely at every label of the forget rows, as they are cut now.

    Args:
        rows: Encoded rows.
        told: What is said of every forget row, cut at whatever places.
        classes: Of a classifier that learns, by number.
        vocabulary: Of a language model that learns, how many tokens it tells apart.

    Returns:
        What `excise.objectives.forget_distil` reads: ``classes``, their ``logp``, which a ``label`` is, ``starts``.

    Raises:
        InputRefused: A model that never saw the rows tells other classes apart, or cuts text into other tokens.
    """
    own, wanted = [_numbered(row, classes) for row in told], rows.labels_of("forget")
    found, logp = (torch.from_numpy(np.concatenate(c)) for c in zip(*(row[1:3] for row in own), strict=True))
    labels = torch.tensor([label for row in wanted for label in row])
    beyond = vocabulary is not None and bool((found >= vocabulary).any())
    if beyond or len(found) != len(labels) or not (is_label := found == labels[:, None]).any(-1).all():
        raise InputRefused(f"data.never_saw: {SAME}")
    starts = torch.tensor([0, *map(len, wanted)]).cumsum(0)[:-1]
    return {"classes": found, "logp": logp, "label": is_label.int().argmax(-1), "starts": starts}


def _numbered(row: Said, classes: Sequence[str]) -> Said:
    """What is said of a row, its classes numbered as those of another model are."""
    if set(row.names) != set(classes):
        apart = ", ".join(sorted(set(row.names) ^ set(classes)))
        raise InputRefused(f"data.never_saw: to learn from a model it has to tell the same classes apart: {apart}")
    if not classes or row.names == tuple(classes):
        return row
    return row._replace(classes=np.array([classes.index(name) for name in row.names], np.int32)[row.classes])
