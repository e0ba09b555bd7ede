"""What the stopping rule reads while a run goes on: how likely the rows are that were set aside for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excise import files, recipe
from excise.commands import folders, kinds
from excise.commands.kinds import KindsOf
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, WATCH
from excise.errors import IntegrityFailed, UsageError
from excise.forward import Anatomy, Logits, Step, chunked, logits, token_logp, token_rows
from excise.forward import labels as labels_of
from excise.matched import matched_auc, matched_gap
from excise.metrics import entities
from excise.metrics.entities import Scheme
from excise.metrics.measure import evaluating
from excise.stopping import BEGINNING, Check, Stopping, inside
from excise.tasks import class_maps

BATCH = 32
SIDES = ("forget", CALIBRATION, WATCH)


class Said(NamedTuple):
    """What a model says of a row's labels.

    Attributes:
        logp: ``[n]`` log-likelihood of each.
        classes: ``[n, K]`` the classes (of a language model: tokens) that are likeliest there, the first before all;
            K may be 0.
        likely: ``[n, K]`` their log-probabilities; and that of all others together, where there are any, as the last.
        names: Of a classifier, its classes by number.
    """

    logp: NDArray[np.float64]
    classes: NDArray[np.int32] = np.empty((0, 0), np.int32)
    likely: NDArray[np.float32] = np.empty((0, 0), np.float32)
    names: tuple[str, ...] = ()

    @property
    def taken(self) -> NDArray[np.int32]:
        """``[n]`` the class that each label is taken for; empty where none was asked for."""
        return self.classes[:, 0] if self.classes.size else np.empty(0, np.int32)

    @property
    def tags(self) -> tuple[str, ...]:
        """The class that each label is taken for, by name; none of a language model."""
        return tuple(self.names[c] for c in self.taken) if self.names else ()


class Seen(NamedTuple):
    """A side at a look: log-likelihoods of its units, what each is compared within, and its strict F1 where asked."""

    values: NDArray[np.float64]
    kinds: NDArray[np.int64]
    f1: float | None = None


def stopping(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    settings: recipe.Recipe,
    folder: Path,
    autocast: Callable,
    classes: Sequence[str] = (),
    *,
    unseen: Mapping[str, Sequence[Said]] | None = None,
    steps: int | None = None,
) -> Stopping:
    """The rule of a run, ready to be asked after each step; the model is still the original.

    Args:
        model: The model.
        anatomy: Its parts.
        rows: Encoded rows, ``calibration`` and ``watch`` among them.
        settings: The recipe.
        folder: Where it keeps what it saw.
        autocast: The precision of the run.
        classes: Of a classifier, by number: units are then the labels that are none of O.
        unseen: For classifiers, what models that never saw the forgotten rows say of every label, if there is one.
        steps: Of the run.

    Raises:
        UsageError: No type is among the forgotten entities and among those that they would be held against, or F1 of
            entities is asked of what is no tagger.
        IntegrityFailed: A run that is gone on with counted from elsewhere before.
    """
    of = kinds.types(class_maps(classes, rows.task)["class_map/type"].numpy()) if classes else None
    strict = _strict(settings, classes)
    # F1 is of all sentences; what else is looked at are the labels of entities.
    chosen = {
        side: _with_units(rows, side, _sample(rows, side, settings), None if strict and side != WATCH else of)
        for side in SIDES
    }
    if of is not None and not kinds.shared(rows, chosen, of):
        raise UsageError(
            "stop.rule: two_sided has nothing to compare: no entity type of the forgotten rows is among the rows set "
            "aside for it: give data.never_seen or stop.calibration such rows, or set stop.rule: none"
        )
    if of is not None and rows.task == "token_classification":
        of = kinds.familiar(rows, chosen, of)
    easier = {"auc": 0.0, "gap": 0.0, "f1": 0.0}
    if of is not None and unseen:
        easier |= beginning(rows, chosen, of, unseen, strict, classes)
        _hold(folder / BEGINNING, easier if strict else {k: easier[k] for k in ("auc", "gap")})

    def seen(side: str) -> Seen:
        wanted = None if side == WATCH else strict
        read = [_read(model, anatomy, rows, side, p, autocast, 1 if wanted else 0) for p in _parts(chosen[side])]
        labels = [rows.examples[side][i] for i in chosen[side]]
        return _units([(row.logp, row.taken) for part in read for row in part], labels, of, wanted)

    def retained() -> float:
        return float(np.exp(seen(WATCH).values).mean())

    with evaluating(model):
        before = retained()

    def look(step: float) -> Check:
        with evaluating(model):
            mine, others = seen("forget"), seen(CALIBRATION)
            both = (*mine[:2], *others[:2])
            found = Check(step, matched_auc(*both) - easier["auc"], None, matched_gap(*both) - easier["gap"])
            if mine.f1 is not None and others.f1 is not None:
                found = replace(found, f1=mine.f1 - others.f1 - easier["f1"])
            return replace(found, quality=retained() / max(before, 1e-12)) if inside(found, settings.stop) else found

    return Stopping(model, settings.stop, folder, look, steps=steps, writes=folders.main_rank())


def _strict(settings: recipe.Recipe, classes: Sequence[str]) -> Scheme | None:
    """What the classes mean, where the rule goes by strict F1 of entities."""
    if settings.stop.statistic != "f1":
        return None
    found = entities.scheme(classes)
    if found is None:
        raise UsageError("stop.statistic: f1 is that of entities, for taggers: take gap, or auc")
    return found


def _hold(path: Path, counted: dict[str, float]) -> None:
    """Write what the rule counts from; a run that is gone on with has to count from the same.

    Raises:
        IntegrityFailed: Another model lies where ``data.never_saw`` points, or other rows do.
    """
    if path.is_file() and json.loads(path.read_text()) != counted:
        raise IntegrityFailed(f"{path}: begun with another data.never_saw; resume with the same, or begin anew")
    if folders.main_rank():
        files.write_json(path, counted)


def said(model: nn.Module, rows: sides.Rows, side: str, *, kept: int = 0, classes: Sequence[str] = ()) -> list[Said]:
    """What a model, as it is, says of every label of each row of a side, and of the ``kept`` likeliest others there."""
    order, anatomy = _by_length(rows, side, range(rows.counts[side])), Anatomy.of(model)
    found: dict[int, Said] = {}
    with evaluating(model):
        for part in _parts(order):
            read = _read(model, anatomy, rows, side, part, nullcontext, kept)
            found |= {row: own._replace(names=tuple(classes)) for row, own in zip(part, read, strict=True)}
    return [found[row] for row in range(len(order))]


def beginning(
    rows: sides.Rows,
    chosen: Mapping[str, Sequence[int]],
    of: KindsOf,
    unseen: Mapping[str, Sequence[Said]],
    strict: Scheme | None = None,
    classes: Sequence[str] = (),
) -> dict[str, float]:
    """Where the rule of a classifier counts from: by how much who never saw the forgotten rows finds them easier.

    A draw of sixty sentences is easier or harder than two hundred others by some hundredths (docs/log.md), and a model
    that saw neither finds it so, too.

    Args:
        rows: Encoded rows.
        chosen: Which forgotten and calibration rows are compared.
        of: What their labels are compared within.
        unseen: Side -> what is said of every label in the order of the rows, cut at whatever places.
        strict: What the classes mean, where F1 is wanted too.
        classes: Of the model, by number.

    Returns:
        ``auc``, `matched_auc` less a half; ``gap``, `matched_gap`; and ``f1``, that of the forgotten less the others'.

    Source: ours; a control variate.

    Example:
        >>> from excise.tasks.token_classification import ClassExample
        >>> one = ClassExample((5,), (0,), (1,))
        >>> given = sides.Rows({"forget": [one], "calibration": [one]}, 0)
        >>> told = {"forget": [Said(np.log([0.5]))], "calibration": [Said(np.log([0.25]))]}
        >>> beginning(given, {"forget": [0], "calibration": [0]}, kinds.types(np.array([0, 1])), told)
        {'auc': 0.5, 'gap': 0.25}
    """
    number, seen = {name: i for i, name in enumerate(classes)}, {}
    for side in ("forget", CALIBRATION):
        labels = [rows.examples[side][i] for i in chosen[side]]
        ends = np.cumsum([len(e.classes) for e in rows.examples[side]])[:-1]
        logp = np.split(np.concatenate([row.logp for row in unseen[side]]), ends)
        tags = np.array([number.get(t, number.get("O", 0)) for row in unseen[side] for t in row.tags], np.int64)
        taken = np.split(tags, ends) if strict else [tags] * len(logp)
        seen[side] = _units([(logp[i], taken[i]) for i in chosen[side]], labels, of, strict)
    mine, others = seen["forget"], seen[CALIBRATION]
    both = (*mine[:2], *others[:2])
    found = {"auc": matched_auc(*both) - 0.5, "gap": matched_gap(*both)}
    return found if mine.f1 is None or others.f1 is None else {**found, "f1": mine.f1 - others.f1}


def _sample(rows: sides.Rows, side: str, settings: recipe.Recipe) -> list[int]:
    """The rows that are looked at: drawn once, the same at every look, those of like length beside each other."""
    order = np.random.default_rng([settings.seed, 7]).permutation(rows.counts[side])
    return _by_length(rows, side, order[: settings.stop.rows])


def _with_units(rows: sides.Rows, side: str, chosen: list[int], of: KindsOf | None) -> list[int]:
    """Those that have a unit: a sentence without entities is read by nobody (a quarter of WNUT17's are)."""
    return chosen if of is None else [i for i in chosen if any(of(rows.examples[side][i]))]


# --- reading ------------------------------------------------------------------------------------------------------


def _by_length(rows: sides.Rows, side: str, chosen: Iterable[int]) -> list[int]:
    return sorted((int(i) for i in chosen), key=lambda i: (len(rows.examples[side][i].input_ids), i))


def _parts(chosen: list[int]) -> list[list[int]]:
    return [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]


def _units(
    read: Sequence[tuple[NDArray, NDArray]], labels: Sequence[Any], of: KindsOf | None, strict: Scheme | None
) -> Seen:
    """The units of rows: the mean over a row's answer, or each label of an entity; their strict F1 where asked."""
    if of is None:
        return Seen(np.array([logp.mean() for logp, _ in read]), np.zeros(len(read), np.int64))
    logp = np.concatenate([own for own, _ in read]) if read else np.empty(0)
    kind = np.array([k for example in labels for k in of(example)], np.int64)
    f1 = None
    if strict:
        gold = np.array([c for example in labels for c in example.classes], np.int64)
        offsets = np.cumsum([0, *(len(example.classes) for example in labels)])
        taken = np.concatenate([own for _, own in read])
        counted = entities.counts(gold, taken, offsets, np.arange(len(labels)), len(labels), strict)
        f1 = float(entities.f1(*(column.sum() for column in counted)))
    return Seen(logp[kind > 0], kind[kind > 0], f1)


def _read(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    side: str,
    part: list[int],
    autocast: Callable,
    kept: int = 0,
) -> list[Said]:
    """Of each row the log-likelihood of its labels, and the ``kept`` classes that are likeliest there."""
    batch = rows.batch(side, part).to(next(model.parameters()).device)
    needs = [token_logp(side), token_rows(side), *([logits(side), labels_of(side)] if kept else [])]
    with autocast():
        made = Step(model, anatomy, {side: batch}).run(needs)
        best = _likeliest(made[needs[2]], made[needs[3]], kept) if kept else ()
    ends = np.cumsum(np.bincount(made[needs[1]].cpu().numpy(), minlength=len(part)))[:-1]
    columns = (made[needs[0]].double(), *best)
    return [Said(*own) for own in zip(*(np.split(c.cpu().numpy(), ends) for c in columns), strict=True)]


def _likeliest(block: Logits, targets: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """``[n, K]`` the likeliest classes, of several the label among them, be it the last; and `Said.likely`."""

    def part(start: int, stop: int) -> Tensor:
        logp, label = block.rows(start, stop).float().log_softmax(-1), targets[start:stop, None]
        found = logp.topk(min(kept, logp.shape[-1])).indices
        if kept > 1:
            found[:, -1:] = torch.where((found == label).any(-1, keepdim=True), found[:, -1:], label)
        others = logp.scatter(-1, found, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([found.double(), logp.gather(-1, found).double(), others.double()], -1)

    made, kept = chunked(part, len(block), block.vocabulary, grad=False), min(kept, block.vocabulary)
    return made[:, :kept].int(), made[:, kept : 2 * kept + (kept < block.vocabulary)].float()
