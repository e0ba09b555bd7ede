"""What the stopping rule reads while a run goes on: how likely the rows are that were set aside for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise import models, recipe
from excise.commands import folders
from excise.commands.measuring import evaluation
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, WATCH
from excise.forward import Anatomy, Step, labels, token_logp, token_rows
from excise.metrics.measure import evaluating
from excise.stopping import Stopping, matched_auc, moved
from excise.tasks import class_maps

BATCH = 32


Units = Callable[[str], tuple[NDArray, NDArray]]
#: A model that is said never to have seen the forget rows and puts them first this often has to be asked about.
DOUBTED = 0.8


def stopping(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    settings: recipe.Recipe,
    folder: Path,
    autocast: Callable,
    kinds: NDArray[np.int64] | None = None,
    like: float | None = None,
) -> Stopping:
    """The rule of a run, ready to be asked after each step; the model is still the original.

    Args:
        model: The model.
        anatomy: Its parts.
        rows: Encoded rows, ``calibration`` and ``watch`` among them.
        settings: The recipe.
        folder: Where it keeps what it saw.
        autocast: The precision of the run.
        kinds: For classifiers, the type of each class, 0 for none (O): units are then the tokens of the others.
        like: From `never_saw`.
    """
    units = _reader(model, anatomy, rows, settings, autocast, kinds)
    with evaluating(model):
        before = float(np.exp(units(WATCH)[0]).mean())

    def look() -> tuple[float, float]:
        with evaluating(model):
            statistic = matched_auc(*units("forget"), *units(CALIBRATION))
            return statistic, float(np.exp(units(WATCH)[0]).mean()) / max(before, 1e-12)

    return Stopping(model, moved(settings.stop, like), folder, look, writes=folders.main_rank())


def never_saw(settings: recipe.Recipe, given: sides.Sides) -> float | None:
    """The rule's statistic by the model of ``stop.never_saw``, on the rows that the rule reads; None without one.

    It is read once and let go, before training begins.
    """
    if settings.stop.rule == "none" or not settings.stop.never_saw:
        return None
    model, tokenizer = evaluation.load_for_measuring(settings.stop.never_saw, settings)
    task, classes = settings.model.task, evaluation.classes_of(model.config, settings.model.task)
    rows = sides.encode(
        given, ("forget", CALIBRATION), tokenizer, settings.data, seed=settings.seed,
        context=models.context_length(model), task=task, classes=classes,
    )  # fmt: skip
    units = _reader(model, Anatomy.of(model), rows, settings, nullcontext, kinds_of(classes, task))
    with evaluating(model):
        like = matched_auc(*units("forget"), *units(CALIBRATION))
    if like > DOUBTED:
        given.warnings.append(
            f"stop.never_saw: this model finds the forgotten row the likelier one in {like:.0%} of pairs: make sure "
            "that it never saw them"
        )
    return like


def kinds_of(classes: Sequence[str], task: str) -> NDArray[np.int64] | None:
    """The type of each class, 0 for none (O); None for a language model."""
    return class_maps(classes, task)["class_map/type"].numpy() if classes else None


def _reader(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    settings: recipe.Recipe,
    autocast: Callable,
    kinds: NDArray[np.int64] | None,
) -> Units:
    """Reads the likelihoods and kinds of a side's units, always of the same rows."""
    chosen = {side: _sample(rows, side, settings) for side in ("forget", CALIBRATION, WATCH) if side in rows.counts}

    def units(side: str) -> tuple[NDArray, NDArray]:
        found = [_units(model, anatomy, rows, side, part, autocast, kinds) for part in _parts(chosen[side])]
        return np.concatenate([v for v, _ in found]), np.concatenate([k for _, k in found])

    return units


def _sample(rows: sides.Rows, side: str, settings: recipe.Recipe) -> list[int]:
    """The rows that are looked at: drawn once, the same at every look, those of like length beside each other."""
    order = np.random.default_rng([settings.seed, 7]).permutation(rows.counts[side])
    examples = rows.examples[side]
    return sorted((int(i) for i in order[: settings.stop.rows]), key=lambda i: (len(examples[i].input_ids), i))


def _parts(chosen: list[int]) -> list[list[int]]:
    return [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]


def _units(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    side: str,
    part: list[int],
    autocast: Callable,
    kinds: NDArray[np.int64] | None,
) -> tuple[NDArray, NDArray]:
    """Log-likelihood and kind of each unit: the mean over a row's answer, or each token of an entity."""
    batch = rows.batch(side, part).to(next(model.parameters()).device)
    needs = [token_logp(side), token_rows(side), labels(side)]
    with autocast():
        made = Step(model, anatomy, {side: batch}).run(needs)
    logp, owner, classes = (made[p].float().cpu() if p is needs[0] else made[p].cpu() for p in needs)
    if kinds is None:
        total = torch.zeros(len(part)).index_add(0, owner, logp)
        mean = total / torch.bincount(owner, minlength=len(part)).clamp_min(1)
        return mean.double().numpy(), np.zeros(len(part), np.int64)
    kind = kinds[classes.numpy()]
    return logp.double().numpy()[kind > 0], kind[kind > 0]
