"""What the stopping rule reads while a run goes on: how likely the rows are that were set aside for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from excise import files, recipe
from excise.commands import folders
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, WATCH
from excise.errors import IntegrityFailed, UsageError
from excise.forward import Anatomy, Step, token_logp, token_rows
from excise.matched import matched_auc, matched_gap
from excise.metrics.measure import evaluating
from excise.stopping import BEGINNING, Check, Stopping, inside
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
    unseen: Mapping[str, Sequence[NDArray]] | None = None,
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
        unseen: For classifiers, what models that never saw the forgotten rows say of every label, if there is one.
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

    easier = (0.0, 0.0)
    if of is not None and unseen:
        easier = beginning(rows, chosen, of, unseen)
        _hold(folder / BEGINNING, dict(zip(("auc", "gap"), easier, strict=True)))

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
            seen = Check(step, matched_auc(*both) - easier[0], None, matched_gap(*both) - easier[1])
            if not inside(seen, settings.stop):
                return seen
            return replace(seen, quality=float(np.exp(units(WATCH)[0]).mean()) / max(before, 1e-12))

    return Stopping(model, settings.stop, folder, look, steps=steps, writes=folders.main_rank())


def _hold(path: Path, counted: dict[str, float]) -> None:
    """Write what the rule counts from; a run that is gone on with has to count from the same.

    Raises:
        IntegrityFailed: Another model lies where ``data.never_saw`` points, or other rows do.
    """
    if path.is_file() and json.loads(path.read_text()) != counted:
        raise IntegrityFailed(f"{path}: begun with another data.never_saw; resume with the same, or begin anew")
    if folders.main_rank():
        files.write_json(path, counted)


def likelihoods(model: nn.Module, rows: sides.Rows, side: str) -> list[NDArray[np.float64]]:
    """Log-likelihood of each label of each row of a side, by a model as it is."""
    order, anatomy = _by_length(rows, side, range(rows.counts[side])), Anatomy.of(model)
    found: dict[int, NDArray[np.float64]] = {}
    with evaluating(model):
        for part in _parts(order):
            logp, owner = _read(model, anatomy, rows, side, part, nullcontext)
            found |= {row: logp[owner == at] for at, row in enumerate(part)}
    return [found[row] for row in range(len(order))]


def beginning(
    rows: sides.Rows, chosen: Mapping[str, Sequence[int]], of: KindsOf, unseen: Mapping[str, Sequence[NDArray]]
) -> tuple[float, float]:
    """Where the rule of a classifier counts from: by how much who never saw the forgotten rows finds them easier.

    A draw of sixty sentences is easier or harder than two hundred others by some hundredths (docs/log.md), and a model
    that saw neither finds it so, too.

    Args:
        rows: Encoded rows.
        chosen: Which forgotten and calibration rows are compared.
        of: What their labels are compared within.
        unseen: Side -> log-likelihoods of every label in the order of the rows, cut at whatever places.

    Returns:
        `matched_auc` less a half, and `matched_gap`.

    Source: ours; a control variate.

    Example:
        >>> one = ClassExample((5,), (0,), (1,))
        >>> given = sides.Rows({"forget": [one], "calibration": [one]}, 0)
        >>> said = {"forget": [np.log([0.5])], "calibration": [np.log([0.25])]}
        >>> beginning(given, {"forget": [0], "calibration": [0]}, types(np.array([0, 1])), said)
        (0.5, 0.25)
    """
    both = []
    for side in ("forget", CALIBRATION):
        ends = np.cumsum([len(e.classes) for e in rows.examples[side]])
        labels = np.split(np.concatenate(unseen[side]), ends[:-1])
        values = np.concatenate([labels[i] for i in chosen[side]])
        kinds = np.concatenate([of(rows.examples[side][i]) for i in chosen[side]])
        both += [values[kinds > 0], kinds[kinds > 0]]
    return matched_auc(*both) - 0.5, matched_gap(*both)


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
    logp, owner = _read(model, anatomy, rows, side, part, autocast)
    if of is None:
        count = np.bincount(owner, minlength=len(part)).clip(1)
        return np.bincount(owner, logp, minlength=len(part)) / count, np.zeros(len(part), np.int64)
    kind = np.array([k for i in part for k in of(rows.examples[side][i])], np.int64)
    return logp[kind > 0], kind[kind > 0]


def _read(
    model: nn.Module, anatomy: Anatomy, rows: sides.Rows, side: str, part: list[int], autocast: Callable
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-likelihood of each label, and the place of its row in ``part``."""
    batch = rows.batch(side, part).to(next(model.parameters()).device)
    needs = [token_logp(side), token_rows(side)]
    with autocast():
        made = Step(model, anatomy, {side: batch}).run(needs)
    return made[needs[0]].double().cpu().numpy(), made[needs[1]].cpu().numpy()
