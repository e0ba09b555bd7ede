"""`excise finetune` and the training half of `excise run`: a recipe in, weights in a run folder out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from excise import __version__, artifacts, files, models, recipe, reference, train
from excise.commands import folders, objective, sides
from excise.commands.progress import Progress
from excise.errors import IntegrityFailed, TrainingStopped
from excise.forward import REFERENCE, Anatomy, Step
from excise.objectives.term import Term
from excise.records import Record, fingerprint, read_records
from excise.schedule import Plan
from excise.tasks import causal_lm


class _Log(TrainerCallback):
    """Writes each logged step to ``log.jsonl`` and moves the progress bar."""

    def __init__(self, run: artifacts.RunFolder, advance: Callable[[float], None]) -> None:
        self.run, self.advance = run, advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the step's numbers, grouped."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"step": state.global_step}
        for name, value in logs.items():
            head, _slash, rest = name.partition("/")
            if rest:
                row.setdefault(head, {}).update({rest: value})
            elif name != "epoch":
                row.update({name: value})
        artifacts.append_log(self.run, row)


@dataclass
class Prepared:
    """Everything that is known before weights move."""

    settings: recipe.Recipe
    given: sides.Sides
    terms: list[Term]
    rows: sides.Rows
    tokenizer: Any
    model: nn.Module
    precision: str
    plan: Plan


def prepare(
    settings: recipe.Recipe, given: sides.Sides, terms: list[Term], tokenizer: Any, *, begun: str | None = None
) -> Prepared:
    """Encode the sides that the terms read, load the model, choose the precision and attach the adapter.

    A run that was begun in the folder ``begun`` keeps its precision: a probe might decide otherwise this time.
    """
    objective.check_sides(terms, given.records)
    _same_rows(begun, given)
    names = objective.sides_read(terms)
    sides.cut(given, tokenizer, sides.encoding(settings.data, context=context(settings)))
    rows = sides.encode(given, names, tokenizer, settings.data, seed=settings.seed, context=context(settings))
    model = models.load(settings.model, tokenizer=tokenizer, seed=settings.seed)
    objective.check_layers(terms, Anatomy.of(model).depth)
    precision: str = settings.model.precision
    if precision == "auto":
        precision, attention = _kept(begun) or _probe(settings, model, rows, names)
        if attention:
            model.set_attn_implementation(attention)  # type: ignore[operator]
    plan = Plan({k: v for k, v in rows.counts.items()}, settings.schedule, settings.seed)
    torch.manual_seed(settings.seed)  # an adapter's factors are drawn here
    model = models.prepare(model, settings.model)
    return Prepared(settings, given, terms, rows, tokenizer, model, precision, plan)


def _kept(folder: str | None) -> tuple[str, str | None] | None:
    """Precision and attention that a run was begun with."""
    record = folders.record(folder)
    attention: Any = record.get("attention") if record else None
    return (record["precision"], attention) if record else None


def _same_rows(folder: str | None, given: sides.Sides) -> None:
    """Refuse to go on with other rows than those that a run was begun with."""
    record = folders.record(folder)
    for side, source in (record["data"] if record else {}).items():
        if given.sources.get(side) != source:
            raise IntegrityFailed(f"{folder}: begun with other {side} rows; resume with the same, or begin anew")


def context(settings: recipe.Recipe) -> int | None:
    """Longest input of the model, read from its config alone, so that bad rows are refused before weights load."""
    return getattr(models.read_config(settings.model), "max_position_embeddings", None)


def _probe(settings: recipe.Recipe, model: nn.Module, rows: sides.Rows, names: Sequence[str]) -> tuple[str, str | None]:
    """Time one pass of a real batch in each precision that makes sense on this machine."""
    side = "forget" if "forget" in names else names[0]
    count = min(settings.schedule.forget_batch, rows.counts[side])
    batch = rows.batch(side, range(count))
    anatomy = Anatomy.of(model)
    from excise.forward import token_logp

    def sample() -> torch.Tensor:
        return -Step(model, anatomy, {side: batch}).run([token_logp(side)])[token_logp(side)].mean()

    return models.precision(settings.model, model, sample)


def fit(
    prepared: Prepared, run: artifacts.RunFolder, progress: Progress, *, stage: str, resume: bool = False
) -> train.UnlearnTrainer:
    """Store the reference, then train; resumes from the newest whole checkpoint.

    Raises:
        TrainingStopped: A term or a gradient is not finite; the weights were not changed by that step.
    """
    p, settings = prepared, prepared.settings
    anatomy = Anatomy.of(p.model)
    needs = objective.needs(p.terms)
    of_reference = [n for n in needs if n.model == REFERENCE]
    stored = reference.Reference({}, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    p.model.to(device)
    if of_reference:
        with progress.stage(f"{stage}: reference"):
            stored = reference.store(
                p.model, anatomy, of_reference, p.rows.counts, p.rows.batch,
                autocast=lambda: train.autocast(p.precision, device.type), device=device,
            )  # fmt: skip
    width = int(p.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    with progress.stage(stage, p.plan.steps) as advance:
        trainer = train.UnlearnTrainer(
            p.model, p.terms, p.plan, p.rows.batch, settings, run.checkpoints,
            reference=stored, constants=objective.constants(p.terms, width, settings.seed), precision=p.precision,
            callbacks=[_Log(run, advance)],
        )  # fmt: skip
        whole = _checkpoints(run) if resume else []
        artifacts.cut_log(run, int(whole[-1].name.rsplit("-", 1)[1]) if whole else 0)
        if whole:
            trainer.resume(whole[-1])
        else:
            trainer.train()
    return trainer


def _checkpoints(run: artifacts.RunFolder) -> list[Path]:
    """Whole checkpoints, oldest first.

    Raises:
        IntegrityFailed: The newest is damaged. A kill cannot do that; an older one may be half removed by it.
    """
    found = sorted(run.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    if found:
        files.verify(found[-1])
    return train.checkpoints(run.checkpoints)


def manifest(
    prepared: Prepared, status: str, progress: Progress, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The record of a run."""
    p = prepared
    return {
        "status": status,
        "command": folders.command(),
        "seed": p.settings.seed,
        "versions": {"excise": __version__, **artifacts.environment()},
        "precision": p.precision,
        "attention": getattr(p.model.config, "_attn_implementation", None),
        "model": {"name": p.settings.model.name or "from scratch", "parameters": models.parameter_count(p.model)},
        "data": p.given.sources,
        "terms": objective.cited(p.settings.objective, p.terms),
        "warnings": p.given.warnings,
        **(extra or {}),
    }


def train_into(
    prepared: Prepared, run: artifacts.RunFolder, progress: Progress, *, stage: str, resume: bool
) -> nn.Module:
    """Train and save the weights whole, or load them where that is done; adapters come back merged."""
    if resume and (run.model / "COMPLETE.json").is_file():
        files.verify(run.model)
        model = models.load_result(run.model, prepared.settings.model)
        model.set_attn_implementation(getattr(prepared.model.config, "_attn_implementation", "eager"))  # type: ignore[operator]
        return model
    artifacts.write_manifest(run, manifest(prepared, "running", progress))
    try:
        trainer = fit(prepared, run, progress, stage=stage, resume=resume)
    except TrainingStopped:
        artifacts.write_manifest(run, manifest(prepared, "stopped", progress))
        raise
    if trainer.args.should_save:
        with files.staged(run.model) as folder:
            models.save(prepared.model, prepared.tokenizer, folder)
    model = prepared.model
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]


def finetune(settings: recipe.Recipe, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Train a model on records: makes originals, and golds that never see the forget rows.

    Trains on ``data.retain``, ``data.forget`` (where given) and every source of ``data.train``, with the answer tokens'
    mean log-likelihood. From ``model.name``, or from scratch with ``model.config`` and, for a tokenizer of its own,
    ``model.tokenizer_size``.

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
    given = sides.read(settings.data, seed=settings.seed, need_forget=False)
    parts = [(settings.data.forget, given.records.pop("forget", [])), (settings.data.retain, given.records["retain"])]
    for number, source in enumerate(settings.data.train, 1):
        parts.append((source, read_records(source, limit=settings.data.limit)))
        given.sources[f"train-{number}"] = {"rows": len(parts[-1][1]), "fingerprint": fingerprint(parts[-1][1])}
    given.records["retain"] = [r for _, records in parts for r in records]
    terms = objective.terms(recipe.Objective({}, settings.objective.retain, {}))
    tokenizer = _tokenizer(settings, given)
    _refuse_unfit(parts, tokenizer, settings)
    prepared = prepare(settings, given, terms, tokenizer, begun=settings.out if resume else None)
    with folders.opened(settings, resume=resume) as run:
        train_into(prepared, run, progress, stage="finetune", resume=resume)
        artifacts.write_results(run, artifacts.Results({}, progress.seconds))
        artifacts.write_manifest(run, manifest(prepared, "done", progress, {"files": artifacts.hash_files(run)}))
        return run.model


def _refuse_unfit(parts: Sequence[tuple[str, Sequence[Record]]], tokenizer: Any, settings: recipe.Recipe) -> None:
    """Refuse rows file by file: once they are joined, a line says nothing."""
    how = sides.encoding(settings.data, context=context(settings))
    for source, records in parts:
        causal_lm.encode_records(sides.cut_records(records, tokenizer, how), tokenizer, how, source=source)


def _tokenizer(settings: recipe.Recipe, given: sides.Sides) -> Any:
    if settings.model.tokenizer_size:
        texts = []
        for records in given.records.values():
            for r in records:
                texts += [r.prompt or "", r.completion, *(a for _, a in r.paraphrases), *r.false_answers]
        return models.new_tokenizer(texts, settings.model.tokenizer_size)
    return models.load_tokenizer(settings.model.tokenizer or settings.model.name, settings.model.revision)


def prepare_unlearning(settings: recipe.Recipe, given: sides.Sides, *, resume: bool) -> Prepared:
    """Everything of ``excise run`` that can refuse its input, before anything is written."""
    terms = objective.terms(settings.objective)
    tokenizer = models.load_tokenizer(settings.model.tokenizer or settings.model.name, settings.model.revision)
    return prepare(settings, given, terms, tokenizer, begun=settings.out if resume else None)
