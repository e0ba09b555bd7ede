"""`excise finetune`: train on records; makes originals, and golds that never see the rows to forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise import artifacts, models, recipe
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.starting import objective, preparing, sides
from excise.records import Record, fingerprint, in_part
from excise.tasks import TASKS


def finetune(settings: recipe.Recipe, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Train a model on records: makes originals, and golds that never see the forget rows.

    Trains on ``data.retain``, ``data.forget`` (where given) and every source of ``data.train``, or on the part of their
    rows that ``data.part`` names, with the answer tokens' mean log-likelihood. From ``model.name``, or from scratch
    with ``model.config`` and, for a tokenizer of its own, ``model.tokenizer_size``.

    Args:
        settings: The recipe; ``out`` names the run folder.
        resume: Continue an interrupted run.
        progress: Where progress is shown.

    Returns:
        The folder of the trained model, ``out/model``.

    Example:
        >>> finetune(recipe.build({"out": "runs/original"}))  # doctest: +SKIP
        PosixPath('runs/original/model')
    """
    progress = progress or Progress()
    run, done = folders.standing(settings, resume=resume)
    if done:
        return run.model
    task = settings.model.task
    given = sides.read(settings.data, seed=settings.seed, need_forget=False, task=task)
    parts = [(settings.data.forget, given.records.pop("forget", [])), (settings.data.retain, given.records["retain"])]
    for number, source in enumerate(settings.data.train, 1):
        more = TASKS[task].read(source, limit=settings.data.limit, tag_names=settings.data.tag_names)
        if settings.data.without:
            more = sides.leave_out(given, f"train-{number}", more, settings.data.without)
        parts.append((source, more))
        given.sources[f"train-{number}"] = {"rows": len(parts[-1][1]), "fingerprint": fingerprint(parts[-1][1])}
    given.records["retain"] = [r for _, records in parts for r in records]
    if settings.data.part:
        _take_part(given, settings.data.part, task)
    terms = objective.terms(recipe.Objective({}, settings.objective.retain, {}))
    tokenizer = _tokenizer(settings, given)
    _refuse_unfit(parts, tokenizer, settings, preparing.classes_of(settings, given, new=True))
    prepared = preparing.prepare(settings, given, terms, tokenizer, begun=settings.out if resume else None, new=True)
    with folders.opened(settings, resume=resume) as run:
        training.train_into(prepared, run, progress, stage="finetune", resume=resume)
        artifacts.write_results(run, artifacts.Results({}, progress.seconds))
        artifacts.write_manifest(run, training.manifest(prepared, "done", {"files": artifacts.hash_files(run)}))
        return run.model


def _take_part(given: sides.Sides, part: str, task: str) -> None:
    """Leave a part of the rows to train on. The rest of a classifier's only say which classes there are."""
    whole = given.records["retain"]
    own = given.records["retain"] = in_part(whole, part)
    if task != "causal_lm":
        mine = {id(r) for r in own}
        given.records["other parts"] = [r for r in whole if id(r) not in mine]
    given.sources[f"part {part}"] = {"rows": len(own), "fingerprint": fingerprint(own)}


def _refuse_unfit(
    parts: Sequence[tuple[str, Sequence[Record]]], tokenizer: Any, settings: recipe.Recipe, classes: Sequence[str]
) -> None:
    """Refuse rows file by file: once they are joined, a line says nothing."""
    task, how = settings.model.task, sides.encoding(settings.data, context=preparing.context(settings))
    for source, records in parts:
        fitting = sides.cut_records(records, tokenizer, how, task=task, long=settings.data.long, source=source)
        sides.refuse_unfit({source: fitting}, tokenizer, settings.data, how, task=task, classes=classes)


def _tokenizer(settings: recipe.Recipe, given: sides.Sides) -> Any:
    if settings.model.tokenizer_size:
        texts = []
        for records in given.records.values():
            for r in records:
                texts += [r.prompt or "", r.completion, *(a for _, a in r.paraphrases), *r.false_answers]
        return models.new_tokenizer(texts, settings.model.tokenizer_size)
    return preparing.tokenizer_of(settings)
