"""What the stopping rule reads while a run goes on: how likely the rows are that were set aside for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise import recipe
from excise.commands import folders
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, WATCH
from excise.errors import UsageError
from excise.forward import Anatomy, Step, token_logp, token_rows
from excise.matched import matched_auc, matched_gap
from excise.metrics.measure import evaluating
from excise.stopping import Check, Stopping, inside
from excise.tasks.token_classification import ClassExample

BATCH = 32
SIDES = ("forget", CALIBRATION, WATCH)
#: Never-seen tokens that each part of a type must have, for the type to be taken apart.
LEAST = 5
#: What the units of a row are compared within, 0 for labels that are none (O).
KindsOf = Callable[[Any], list[int]]


def stopping(
    model: nn.Module,
    anatomy: Anatomy,
    rows: sides.Rows,
    settings: recipe.Recipe,
    folder: Path,
    autocast: Callable,
    kinds: NDArray[np.int64] | None = None,
    *,
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
        kinds: For classifiers, the type of each class, 0 for none (O): units are then the tokens of the others.
        steps: Of the run.

    Raises:
        UsageError: No type is among the forgotten entities and among those that they would be held against.
    """
    of = None if kinds is None else types(kinds)
    chosen = {side: _with_units(rows, side, _sample(rows, side, settings), of) for side in SIDES}
    if of is not None and not _shared(rows, chosen, of):
        raise UsageError(
            "stop.rule: two_sided has nothing to compare: no entity type of the forgotten rows is among the rows set "
            "aside for it: give data.never_seen or stop.calibration such rows, or set stop.rule: none"
        )
    if of is not None and rows.task == "token_classification":
        of = familiar(rows, chosen, of)

    def units(side: str) -> tuple[NDArray, NDArray]:
        found = [_units(model, anatomy, rows, side, part, autocast, of) for part in _parts(chosen[side])]
        if not found:
            return np.empty(0), np.empty(0, np.int64)
        return np.concatenate([v for v, _ in found]), np.concatenate([k for _, k in found])

    with evaluating(model):
        before = float(np.exp(units(WATCH)[0]).mean())

    def look(step: float) -> Check:
        with evaluating(model):
            both = (*units("forget"), *units(CALIBRATION))
            seen = Check(step, matched_auc(*both), None, matched_gap(*both))
            if not inside(seen, settings.stop):
                return seen
            return replace(seen, quality=float(np.exp(units(WATCH)[0]).mean()) / max(before, 1e-12))

    return Stopping(model, settings.stop, folder, look, steps=steps, writes=folders.main_rank())


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


def _with_units(rows: sides.Rows, side: str, chosen: list[int], of: KindsOf | None) -> list[int]:
    """Those that have a unit: a sentence without entities is read by nobody (a quarter of WNUT17's are)."""
    return chosen if of is None else [i for i in chosen if any(of(rows.examples[side][i]))]


# --- what a tagger's units are compared within --------------------------------------------------------------------


def types(kinds: NDArray[np.int64]) -> KindsOf:
    """Each label by the type of its class, ``kinds [C]``; 0 for none (O).

    Example:
        >>> types(np.array([0, 1, 1]))(ClassExample((5, 6), (0, 1), (0, 2)))
        [0, 1]
    """
    return lambda example: [int(kinds[c]) for c in example.classes]


def _counts(rows: sides.Rows, side: str, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> Counter[int]:
    """How many units of each kind a side has."""
    return Counter(k for i in chosen[side] for k in of(rows.examples[side][i]) if k)


def _shared(rows: sides.Rows, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> set[int]:
    return set(_counts(rows, "forget", chosen, of)) & set(_counts(rows, CALIBRATION, chosen, of))


def familiar(rows: sides.Rows, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> KindsOf:
    """Types, each taken apart by what the retained rows say of the word: it is one of this type, another, or not there.

    A model that never saw the forgotten rows still knows the words that the retained ones hold: never-seen words are
    fair company only for forgotten ones of the same standing. A type that has too few never-seen words of a standing
    stays whole.

    Args:
        rows: Encoded rows, those of ``retain`` among them.
        chosen: Which forgotten and calibration rows are compared.
        of: The types, as `types` gives them.

    Source: ours; poststratification.

    Example:
        >>> known, new = ClassExample((5,), (0,), (1,)), ClassExample((6,), (0,), (1,))
        >>> given = sides.Rows({"retain": [known], "forget": [known, new], "calibration": [known, new] * LEAST}, 0)
        >>> apart = familiar(given, {"forget": [0, 1], "calibration": range(2 * LEAST)}, types(np.array([0, 1])))
        >>> apart(known), apart(new)
        ([3], [5])
    """
    known: dict[tuple[int, ...], set[int]] = {}
    for example in rows.examples["retain"]:
        for word, kind in zip(_words(example), of(example), strict=True):
            known.setdefault(word, set()).add(kind)

    def apart(example: ClassExample) -> list[int]:
        return [kind and 3 * kind + _standing(kind, known.get(word))
                for word, kind in zip(_words(example), of(example), strict=True)]  # fmt: skip

    own, others = (_counts(rows, side, chosen, apart) for side in ("forget", CALIBRATION))
    whole = {part // 3 for part in own if others[part] < LEAST}
    return lambda example: [3 * (k // 3) if k // 3 in whole else k for k in apart(example)]


def _standing(kind: int, known: set[int] | None) -> int:
    return 2 if known is None else 0 if kind in known else 1


def _words(example: ClassExample) -> list[tuple[int, ...]]:
    """The tokens of each word with a label: up to the next, the last without the special token at the end."""
    ends = (*example.places[1:], max(len(example.input_ids) - 1, example.places[-1] + 1)) if example.places else ()
    return [example.input_ids[a:b] for a, b in zip(example.places, ends, strict=True)]


# --- reading ------------------------------------------------------------------------------------------------------


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
    of: KindsOf | None,
) -> tuple[NDArray, NDArray]:
    """Log-likelihood and kind of each unit: the mean over a row's answer, or each token of an entity."""
    batch = rows.batch(side, part).to(next(model.parameters()).device)
    needs = [token_logp(side), token_rows(side)]
    with autocast():
        made = Step(model, anatomy, {side: batch}).run(needs)
    logp, owner = made[needs[0]].float().cpu(), made[needs[1]].cpu()
    if of is None:
        total = torch.zeros(len(part)).index_add(0, owner, logp)
        mean = total / torch.bincount(owner, minlength=len(part)).clamp_min(1)
        return mean.double().numpy(), np.zeros(len(part), np.int64)
    kind = np.array([k for i in part for k in of(rows.examples[side][i])], np.int64)
    return logp.double().numpy()[kind > 0], kind[kind > 0]
