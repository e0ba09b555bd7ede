"""`excise run`: read, refuse, train, measure, report."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

from excise import artifacts, recipe, reporting
from excise.commands import folders, matching, training
from excise.commands.measuring import evaluation, writing
from excise.commands.progress import Progress
from excise.commands.starting import objective, preparing, sides
from excise.errors import NotShown


def run(
    settings: recipe.Recipe, *, out: str | Path | None = None, resume: bool = False, progress: Progress | None = None
) -> Path:
    """Forget records, keep the rest, and write a run folder that shows how far both are true.

    Args:
        settings: The recipe.
        out: The run folder, if not the recipe's own.
        resume: Continue an interrupted run: to the same weights, bit by bit, on the same machine.
        progress: Where progress is shown.

    Returns:
        The path of the report.

    Raises:
        InputRefused: Data or a model that cannot be used; nothing was written.
        UsageError: A recipe that asks for something unknown.
        TrainingStopped: A loss or gradient is not finite; the weights are those before that step.
        NotShown: The stopping rule found no weights to keep; everything was written, and the report says so.
        IntegrityFailed: A file of an interrupted run is not what its hash says.

    Example:
        >>> run(recipe.load("run.yaml"), out="runs/a")  # doctest: +SKIP
        PosixPath('runs/a/report.html')
    """
    if out is not None:
        settings = dataclasses.replace(settings, out=str(out))
    progress = progress or Progress()
    folder, done = folders.standing(settings, resume=resume)
    if done:
        report = folder.report if folder.report.is_file() else reporting.build(folder.root)
        refuse_inadmissible(folder)
        return report
    given = sides.of(settings)
    matching.match(settings, given, progress)
    asked = evaluation.asked_of(settings)
    objective.check_sides(objective.terms(settings.objective), given.records)
    prepared = preparing.prepare_unlearning(settings, given, resume=resume)
    if objective.reads_never_saw(prepared.terms):
        tokens = int(prepared.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        prepared.said = matching.taught(prepared.rows, given.unseen["forget"], prepared.classes, vocabulary=tokens)
    evaluation.refuse_unfit(given, prepared.tokenizer, settings)
    with folders.opened(settings, resume=resume) as folder:
        model = training.train_into(prepared, folder, progress, stage="unlearn", resume=resume)
        if not folders.main_rank():
            return folder.report
        records = evaluation.limited(given.records, settings.evaluate, task=settings.model.task)
        measure = functools.partial(
            evaluation.measure_named, records=records, settings=settings, progress=progress, asked=asked,
            aside=folder.parts,
        )  # fmt: skip
        named = {"original": settings.model.name, "gold": settings.evaluate.gold}
        measured = {role: measure(role, place) for role, place in named.items() if place}
        lend = functools.partial(tuple, (model, prepared.tokenizer))
        measured["unlearned"] = measure("unlearned", str(folder.model), lend=lend)
        geometry = json.loads(folder.geometry.read_text()) if folder.geometry.is_file() else None
        writing.write(folder, measured, records, settings, progress, log=artifacts.read_log(folder), geometry=geometry)
        shutil.rmtree(folder.parts, ignore_errors=True)
        extra = {"files": artifacts.hash_files(folder)}
        artifacts.write_manifest(folder, training.manifest(prepared, "done", extra))
        with progress.stage("report"):
            report = reporting.build(folder.root)
    refuse_inadmissible(folder)
    return report


def refuse_inadmissible(folder: artifacts.RunFolder) -> None:
    """Do not call a run done whose stopping rule found nothing to keep; its folder and report say what was seen."""
    seen = artifacts.read_manifest(folder).get("stopping")
    if seen is not None and seen["kept"] is None:
        raise NotShown(
            f"{folder.root}: after no step did the forgotten rows look like never-seen ones while the retained were "
            "good enough; the weights are those of the last step: see the report, then try another rate or weight"
        )
