"""`excise cut`: the difference between forgotten and never-seen rows out of a layer, in closed form, in the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excise import __version__, artifacts, erasure, files, folding, models, recipe, reporting
from excise.commands import folders
from excise.commands.measuring import evaluation, writing
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import NotShown, UsageError
from excise.forward import Anatomy
from excise.metrics.latent import assign_folds, probe_auc
from excise.metrics.measure import group_ids

LIKE = ("never_seen", "retain")
CUT, BEFORE = "cut.json", "before_cut"
#: Says what the cut's record means, for readers of cut.json.
SAYS = (
    "One rank-one change of the block's last output projection: behind the block the mean states of the rows to forget "
    "and of the rows they are to be like agree, so no linear probe on these rows does better than a constant guess. "
    "Curved boundaries, other layers and other rows are not covered: 'held_out' is what a probe finds on people whom "
    "the change was not made from."
)


def cut(
    run: str | Path,
    *,
    out: str | Path,
    layer: int = -1,
    like: str | None = None,
    ridge: float = 1e-3,
    progress: Progress | None = None,
) -> Path:
    """Make forgotten rows linearly like never-seen ones behind a block of a run's model, moving retained rows least.

    What can be folded into a checkpoint of the same shape exactly is a change of what the block writes last, so that is
    what is changed (see `folding`): a projection of the whole stream cannot be, and is not approximated. The result is
    a run folder with whole weights, measured beside the model before the cut.

    Args:
        run: Folder of a run that is done.
        out: Folder to write; new or empty.
        layer: Behind which block, from 1, or negative from the end.
        like: What the rows are to be like: ``never_seen``, or ``retain``; default never-seen rows where there are any.
        ridge: Share of the mean variance added to the second moment of the retained rows.
        progress: Where progress is shown.

    Returns:
        The report of the new folder.

    Raises:
        UsageError: A run that is not done, a side that it does not have, or a folder that is not empty.
        InputRefused: A block that no exact change can be folded into.
        NotShown: What the block reads does not tell the rows apart.

    Example:
        >>> cut("runs/a", out="runs/a-cut", layer=-1)  # doctest: +SKIP
        PosixPath('runs/a-cut/report.html')
    """
    source, progress = artifacts.open_run(run), progress or Progress()
    settings, given, like = _checked(source, Path(out), like, ridge)
    model, tokenizer = evaluation.load_for_measuring(str(source.root), settings)
    model, anatomy = model.eval(), Anatomy.of(model)
    rows = _encoded(given, like, tokenizer, settings, model)
    with progress.stage("cut"):
        found = folding.writer(model, anatomy, layer, next(_batches(rows, like, settings, model, first=True)))
        seen = {side: _watched(model, anatomy, found, rows, side, settings) for side in ("forget", like, "retain")}
        change = _change(seen["forget"], seen[like], seen["retain"], found, ridge)
        groups = group_ids({side: given.records[side] for side in ("forget", like)})
        record = _record(found, like, seen, change, groups, ridge, settings.seed)
        found.fold(change)
        after = {side: _watched(model, anatomy, found, rows, side, settings) for side in ("forget", like)}
        record["gap_left"] = _gap(after["forget"], after[like]) / max(record["gap"], 1e-30)
    return _delivered(source, Path(out), settings, given, (model, tokenizer), record, progress)


def _checked(
    source: artifacts.RunFolder, out: Path, like: str | None, ridge: float
) -> tuple[recipe.Recipe, sides.Sides, str]:
    """Refuse before a weight is loaded; the recipe of the new folder, its rows, and what they are to be like."""
    if artifacts.read_manifest(source).get("status") != "done" or not source.model.is_dir():
        raise UsageError(f"{source.root}: the run is not done or holds no model: finish it, or give another folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out}: {'is a file' if out.is_file() else 'the folder is not empty'}; name another")
    if not 0 < ridge < 1:
        raise UsageError(f"--ridge {ridge:g}: give a share between 0 and 1")
    settings = dataclasses.replace(recipe.load(str(source.recipe)), out=str(out))
    if settings.model.task != "causal_lm":
        raise UsageError(f"{source.root}: excise cut is for language models")
    files.verify(source.model)
    given = sides.of(settings)
    if like is not None and like not in LIKE:
        raise UsageError(f"--like {like}: give {' or '.join(LIKE)}")
    like = like or ("never_seen" if "never_seen" in given.records else "retain")
    if like not in given.records:
        raise UsageError(f"--like {like}: the run has no such rows: give --like retain, or name data.{like}")
    return settings, given, like


# --- what is watched ------------------------------------------------------------------------------------------------


def _encoded(
    given: sides.Sides, like: str, tokenizer: Any, settings: recipe.Recipe, model: nn.Module
) -> sides.Rows:  # fmt: skip
    context = models.context_length(model)
    sides.cut(given, tokenizer, sides.encoding(settings.data, context=context), long=settings.data.long)
    names = dict.fromkeys(("forget", like, "retain"))
    return sides.encode(given, list(names), tokenizer, settings.data, seed=settings.seed, context=context)


def _batches(
    rows: sides.Rows, side: str, settings: recipe.Recipe, model: nn.Module, *, first: bool = False
) -> Iterator[Any]:
    """The rows of a side in order, a batch at a time; ``first``: a few rows to try something with."""
    lengths = [len(example.input_ids) for example in rows.examples[side]]
    size = 4 if first else max(1, settings.evaluate.batch_tokens // max(lengths))
    for start in range(0, len(lengths), size):
        yield rows.batch(side, range(start, min(start + size, len(lengths)))).to(next(model.parameters()).device)


def _watched(
    model: nn.Module, anatomy: Anatomy, found: folding.Writer, rows: sides.Rows, side: str, settings: recipe.Recipe
) -> folding.Seen:
    return folding.watch(model, anatomy, found, _batches(rows, side, settings, model), moments=side == "retain")


# --- what is changed ------------------------------------------------------------------------------------------------


def _change(
    forget: folding.Seen, other: folding.Seen, retain: folding.Seen, found: folding.Writer, ridge: float
) -> erasure.Change:
    assert retain.moments is not None
    states, inputs = forget.states.mean(0) - other.states.mean(0), forget.inputs.mean(0) - other.inputs.mean(0)
    try:
        return erasure.least_change(states, inputs, retain.moments, biased=found.biased, ridge=ridge)
    except ValueError as error:
        raise NotShown(f"block {found.layer}: {error}") from None


def _gap(one: folding.Seen, other: folding.Seen) -> float:
    return float((one.states.mean(0) - other.states.mean(0)).norm())


def _record(
    found: folding.Writer, like: str, seen: Mapping[str, folding.Seen], change: erasure.Change,
    groups: Mapping[str, NDArray[np.int32]], ridge: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What the cut changes, and what a probe finds before and after on rows that it was not made from."""
    retain = seen["retain"]
    assert retain.moments is not None
    weight: Tensor = found.module.weight.detach().double().cpu()  # type: ignore[operator]
    return {
        "format": 1, "says": SAYS, "layer": found.layer, "writes": found.name, "like": like, "ridge": ridge,
        "rows": {side: len(own.states) for side, own in seen.items()}, "gap": _gap(seen["forget"], seen[like]),
        "retained_moved": (change.cost(retain.moments) / retain.size) ** 0.5,
        "weight_moved": float(change.weight.norm() / weight.norm()),
        "held_out": _held_out(seen["forget"], seen[like], retain, found, groups, like, ridge, seed),
    }  # fmt: skip


def _held_out(
    forget: folding.Seen, other: folding.Seen, retain: folding.Seen, found: folding.Writer,
    groups: Mapping[str, NDArray[np.int32]], like: str, ridge: float, seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """AUC of a probe on one half of the people, before and after a cut made from the other half; the mean of both."""
    both = (forget, other)
    ids = [groups.get("forget"), groups.get(like)]
    if min(len(own.states) for own in both) < 4:
        return None
    dealt, by = assign_folds([len(own.states) for own in both], ids, folds=2, seed=seed)
    before, after = [], []
    for half in (0, 1):
        made_from = [_part(own, fold == half) for own, fold in zip(both, dealt, strict=True)]
        held = [_part(own, fold != half) for own, fold in zip(both, dealt, strict=True)]
        if min(len(own.states) for own in (*made_from, *held)) < 2:
            return None
        change = _change(made_from[0], made_from[1], retain, found, ridge)
        a, b = (None if g is None else g[f != half] for g, f in zip(ids, dealt, strict=True))
        before.append(probe_auc(held[0].states, held[1].states, a, b, seed=seed))
        moved = [erasure.applied(change, own.states, own.inputs) for own in held]
        after.append(probe_auc(moved[0], moved[1], a, b, seed=seed))
    return {"before": float(np.mean(before)), "after": float(np.mean(after)), "split_by": by}


def _part(seen: folding.Seen, where: NDArray[np.bool_]) -> folding.Seen:
    chosen = torch.from_numpy(np.asarray(where))
    return folding.Seen(seen.states[chosen], seen.inputs[chosen], None, seen.size)


# --- what is written ------------------------------------------------------------------------------------------------


def _delivered(
    source: artifacts.RunFolder, out: Path, settings: recipe.Recipe, given: sides.Sides, lent: Sequence[Any],
    record: dict[str, Any], progress: Progress,
) -> Path:  # fmt: skip
    """The new run folder: weights, numbers of every model, the record of the cut; the thresholds of the run hold."""
    asked = evaluation.asked_of(settings)
    earlier: dict[str, Any] = dict(artifacts.read_manifest(source))
    with folders.opened(settings, resume=False) as run:
        head = {
            "command": "excise cut", "seed": settings.seed,
            "versions": {"excise": __version__, **artifacts.environment()}, "model": {"name": settings.model.name},
            "data": given.sources, "terms": earlier.get("terms", []),
            "verify": folders.thresholds(settings, str(source.root)), "cut_from": files.sha256(source.manifest),
            "warnings": [*earlier.get("warnings", []), _warning(record)],
        }  # fmt: skip
        artifacts.write_manifest(run, {"status": "running", **head})
        with files.staged(run.model) as folder:
            models.save(lent[0], lent[1], folder)
        files.write_json(run.root / CUT, artifacts.finite(record))
        records = evaluation.limited(given.records, settings.evaluate)
        places = {
            artifacts.ORIGINAL: settings.model.name, artifacts.GOLD: settings.evaluate.gold,
            artifacts.UNLEARNED: str(run.model), BEFORE: str(source.root),
        }  # fmt: skip
        measured = {
            role: evaluation.measure_named(role, place, records, settings, progress, asked)
            for role, place in places.items() if place
        }  # fmt: skip
        writing.write(run, measured, records, settings, progress)
        artifacts.write_manifest(run, {"status": "done", **head, "files": artifacts.hash_files(run)})
        with progress.stage("report"):
            return reporting.build(run.root)


def _warning(record: Mapping[str, Any]) -> str:
    """What a reader of the numbers has to know."""
    held = record["held_out"]
    shown = (
        f"on people whom the change was not made from, a probe behind the block gave {held['before']:.2f} before and "
        f"{held['after']:.2f} after" if held else "too few rows to hold some out"
    )  # fmt: skip
    return (
        f"cut behind block {record['layer']}: made from the same rows that are measured, so a linear probe there reads "
        f"0.5 or below by construction; {shown}; retained states moved by {record['retained_moved']:.1%} of their size"
    )
