"""What the stopping rule reads while a run goes on: how likely the rows are that were set aside for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise import recipe
from excise.commands import folders
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, WATCH
from excise.errors import UsageError
from excise.forward import Anatomy, Step, labels, token_logp, token_rows
from excise.metrics.measure import evaluating
from excise.stopping import Stopping, inside, matched_auc

BATCH = 32
SIDES = ("forget", CALIBRATION, WATCH)


def stopping(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    settings: recipe.Recipe,
    folder: Path,
    autocast: Callable,
    kinds: NDArray[np.int64] | None = None,
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

    Raises:
        UsageError: No type is among the forgotten entities and among those that they would be held against.
    """
    chosen = {side: _with_units(rows, side, _sample(rows, side, settings), kinds) for side in SIDES}
    if kinds is not None and not _types(rows, "forget", chosen, kinds) & _types(rows, CALIBRATION, chosen, kinds):
        raise UsageError(
            "stop.rule: two_sided has nothing to compare: no entity type of the forgotten rows is among the rows set "
            "aside for it: give data.never_seen or stop.calibration such rows, or set stop.rule: none"
        )

    def units(side: str) -> tuple[NDArray, NDArray]:
        found = [_units(model, anatomy, rows, side, part, autocast, kinds) for part in _parts(chosen[side])]
        if not found:
            return np.empty(0), np.empty(0, np.int64)
        return np.concatenate([v for v, _ in found]), np.concatenate([k for _, k in found])

    with evaluating(model):
        before = float(np.exp(units(WATCH)[0]).mean())

    def look() -> tuple[float, float | None]:
        with evaluating(model):
            statistic = matched_auc(*units("forget"), *units(CALIBRATION))
            if not inside(statistic, settings.stop):
                return statistic, None
            return statistic, float(np.exp(units(WATCH)[0]).mean()) / max(before, 1e-12)

    return Stopping(model, settings.stop, folder, look, writes=folders.main_rank())


def row_likelihoods(model: nn.Module, rows: sides.Rows, side: str) -> NDArray[np.float64]:
    """``[n]`` mean log-likelihood per token of the answer of each row of a side, by a language model as it is."""
    order, anatomy = _by_length(rows, side, range(rows.counts[side])), Anatomy.of(model)
    found = np.empty(len(order))
    with evaluating(model):
        for part in _parts(order):
            found[part] = _units(model, anatomy, rows, side, part, nullcontext, None)[0]
    return found


def _sample(rows: sides.Rows, side: str, settings: recipe.Recipe) -> list[int]:
    """The rows that are looked at: drawn once, the same at every look, those of like length beside each other."""
    order = np.random.default_rng([settings.seed, 7]).permutation(rows.counts[side])
    return _by_length(rows, side, order[: settings.stop.rows])


def _with_units(rows: sides.Rows, side: str, chosen: list[int], kinds: NDArray[np.int64] | None) -> list[int]:
    """Those that have a unit: a sentence without entities is read by nobody (a quarter of WNUT17's are)."""
    if kinds is None:
        return chosen
    return [i for i in chosen if kinds[list(rows.examples[side][i].classes)].any()]


def _types(rows: sides.Rows, side: str, chosen: Mapping[str, Sequence[int]], kinds: NDArray[np.int64]) -> set[int]:
    return {int(kinds[c]) for i in chosen[side] for c in rows.examples[side][i].classes} - {0}


def _by_length(rows: sides.Rows, side: str, chosen: Iterable[int]) -> list[int]:
    return sorted((int(i) for i in chosen), key=lambda i: (len(rows.examples[side][i].input_ids), i))


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
