"""`excise finetune` and the training half of `excise run`: a recipe in, weights in a run folder out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from excise import __version__, artifacts, files, models, recipe, reference, stopping, train
from excise.commands import beginning, diagnostics, folders, gathering, objective, sides, watching
from excise.commands.progress import Progress
from excise.errors import IntegrityFailed, TrainingStopped
from excise.forward import REFERENCE, Anatomy, Step
from excise.initialise import apply, delivery, store
from excise.objectives.term import Term
from excise.records import Record, fingerprint
from excise.schedule import Plan
from excise.tasks import TASKS, class_maps


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


class _Active(TrainerCallback):
    """Keeps the frozen adapter of a kept base active: loading a checkpoint leaves only the trained one so."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.trained = model, {name: p.requires_grad for name, p in model.named_parameters()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Both active, the same parameters trained."""
        apply.activate(self.model, self.trained)


@dataclass
class Prepared:
    """Everything that is known before weights move; ``base`` is the fingerprint of the weights below an adapter."""

    settings: recipe.Recipe
    given: sides.Sides
    terms: list[Term]
    rows: sides.Rows
    tokenizer: Any
    model: nn.Module
    precision: str
    plan: Plan
    wanted: beginning.Wanted
    base: str | None = None
    classes: tuple[str, ...] = ()
    begun: beginning.Begun = field(default_factory=beginning.Begun)


def prepare(
    settings: recipe.Recipe,
    given: sides.Sides,
    terms: list[Term],
    tokenizer: Any,
    *,
    begun: str | None = None,
    pictured: bool = False,
) -> Prepared:
    """Encode the sides that the terms read, load the model, choose the precision and attach the adapter.

    A run that was begun in the folder ``begun`` keeps its precision: a probe might decide otherwise this time.
    ``pictured`` also takes what the report shows of an adapter's update.
    """
    objective.check_sides(terms, given.records)
    wanted = beginning.wanted(settings, terms, pictured=pictured)
    beginning.check_sides(wanted, given.records)
    _same_rows(begun, given)
    names, watched = objective.sides_read(terms), [s for s in (sides.CALIBRATION, sides.WATCH) if s in given.records]
    task, how = settings.model.task, sides.encoding(settings.data, context=context(settings))
    classes = classes_of(settings, given)
    sides.cut(given, tokenizer, how, task=task, long=settings.data.long)
    rows = sides.encode(
        given, list(dict.fromkeys([*names, *wanted.sides, *watched])), tokenizer, settings.data,
        seed=settings.seed, context=context(settings), task=task, classes=classes,
    )  # fmt: skip
    model = models.load(settings.model, tokenizer=tokenizer, classes=classes, seed=settings.seed)
    objective.check_layers(terms, Anatomy.of(model).depth)
    precision: str = settings.model.precision
    if precision == "auto":
        precision, attention = _kept(begun) or _probe(settings, model, rows, names)
        if attention:
            model.set_attn_implementation(attention)  # type: ignore[operator]
    plan = Plan(
        {k: v for k, v in rows.counts.items() if k in names}, settings.schedule, settings.seed,
        classes={"retain": rows.classes_of("retain", classes)} if classes else {},
    )  # fmt: skip
    torch.manual_seed(settings.seed)  # an adapter's factors are drawn here
    model = models.prepare(model, settings.model)
    beginning.check(wanted, model, rows, settings.statistics)
    base = store.fingerprint(model) if settings.model.lora is not None else None
    _same_base(begun, base)
    return Prepared(settings, given, terms, rows, tokenizer, model, precision, plan, wanted, base, classes)


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


def _same_base(folder: str | None, base: str | None) -> None:
    """Refuse to train an adapter on with another model below it."""
    record = folders.record(folder)
    was = (record or {}).get("model", {}).get("sha256")
    if was is not None and base is not None and was != base:
        raise IntegrityFailed(f"{folder}: begun with another model; resume with the same, or begin anew")


def context(settings: recipe.Recipe) -> int | None:
    """Longest input of the model, read from its config alone, so that bad rows are refused before weights load."""
    return models.context_of(models.read_config(settings.model, headless=True))


def classes_of(settings: recipe.Recipe, given: sides.Sides) -> tuple[str, ...]:
    """The classes of a classifier, by number: the model's own, or for a new head those that the rows hold."""
    task = settings.model.task
    if task == "causal_lm":
        return ()
    config = models.read_config(settings.model, headless=True)
    if settings.model.config is None and models.has_head(config, task):
        return tuple(config.id2label[i] for i in range(config.num_labels))
    return TASKS[task].class_names([r for records in given.records.values() for r in records])


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
    """Store the reference, apply the start, then train; resumes from the newest whole checkpoint.

    The reference comes first, so that it is the original whatever the start does to the base.

    Raises:
        TrainingStopped: A term or a gradient is not finite; the weights were not changed by that step.
    """
    p, settings = prepared, prepared.settings
    anatomy = Anatomy.of(p.model)
    needs = objective.needs(p.terms)
    of_reference = [n for n in needs if n.model == REFERENCE]
    stored = reference.Reference({}, None)
    gathering.join_ranks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    p.model.to(device)
    if of_reference:
        with progress.stage(f"{stage}: reference"):
            stored = reference.store(
                p.model, anatomy, of_reference, p.rows.counts, p.rows.batch,
                autocast=lambda: train.autocast(p.precision, device.type), device=device,
            )  # fmt: skip
    if p.wanted.statistics or p.wanted.start.moves:
        taker = gathering.Taker(
            p.model, p.rows, settings.statistics, p.precision,
            lambda: train.autocast(p.precision, device.type), p.base or "",
        )  # fmt: skip
        with progress.stage(f"{stage}: statistics"):
            p.begun = beginning.begin(p.wanted, taker, run, resume=resume)
        p.given.warnings += p.begun.warnings
    width = int(p.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    fixed = {**p.begun.constants, **class_maps(p.classes, settings.model.task)}
    stop = _rule(p, run, anatomy, device)
    with progress.stage(stage, p.plan.steps) as advance:
        trainer = train.UnlearnTrainer(
            p.model, p.terms, p.plan, p.rows.batch, settings, run.checkpoints,
            reference=stored, precision=p.precision,
            constants=objective.constants(p.terms, width, settings.seed, fixed), should_stop=stop,
            callbacks=[_Log(run, advance), *([_Active(p.model)] if p.wanted.start.base == "kept" else [])],
        )  # fmt: skip
        whole = _checkpoints(run) if resume else []
        step = int(whole[-1].name.rsplit("-", 1)[1]) if whole else 0
        artifacts.cut_log(run, step)
        if stop:
            stop.begin(step)
        if whole:
            trainer.resume(whole[-1])
        else:
            trainer.train()
    if stop:
        stop.roll_back()
    return trainer


def _rule(
    p: Prepared, run: artifacts.RunFolder, anatomy: Anatomy, device: torch.device
) -> stopping.Stopping | None:
    """The stopping rule of the recipe, where it has one and forgets anything."""
    if p.settings.stop.rule == "none" or "forget" not in p.rows.counts:
        return None
    kinds = None
    if p.classes:
        kinds = class_maps(p.classes, p.settings.model.task)["class_map/type"].numpy()
    return watching.stopping(
        p.model, anatomy, p.rows, p.settings, run.stopping,
        lambda: train.autocast(p.precision, device.type), kinds,
    )  # fmt: skip


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
        "model": {
            "name": p.settings.model.name or "from scratch",
            "parameters": models.parameter_count(p.model),
            **({"sha256": p.base} if p.base else {}),
        },
        **({"start": beginning.cited(p.wanted)} if p.wanted.start.moves else {}),
        "data": p.given.sources,
        **stopping.record(p.settings.stop, folders.stopping_of(p.settings.out)),
        "terms": objective.cited(p.settings.objective, p.terms),
        "warnings": [*p.given.warnings, *objective.cautions(p.settings.objective)],
        **(extra or {}),
    }


def train_into(
    prepared: Prepared, run: artifacts.RunFolder, progress: Progress, *, stage: str, resume: bool
) -> nn.Module:
    """Train and save the weights whole, or load them where that is done; adapters come back merged."""
    if resume and (run.model / "COMPLETE.json").is_file():
        files.verify(run.model)
        prepared.given.warnings += beginning.warnings(run)
        return _delivered(prepared, run)
    artifacts.write_manifest(run, manifest(prepared, "running", progress))
    try:
        trainer = fit(prepared, run, progress, stage=stage, resume=resume)
    except TrainingStopped:
        artifacts.write_manifest(run, manifest(prepared, "stopped", progress))
        raise
    if trainer.args.should_save:
        _picture(prepared, run)
        with files.staged(run.model) as folder:
            if prepared.begun.factors:
                delivery.save(prepared.model, prepared.begun.factors, folder)
                prepared.tokenizer.save_pretrained(folder)
            else:
                models.save(prepared.model, prepared.tokenizer, folder)
        stopping.clear(run.stopping)
    model = prepared.model
    if prepared.begun.factors and trainer.args.should_save:  # what is measured is what was saved
        return _delivered(prepared, run)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]


def _delivered(prepared: Prepared, run: artifacts.RunFolder) -> nn.Module:
    """The saved weights, whole, as training left them: attention and device too."""
    attention = getattr(prepared.model.config, "_attn_implementation", "eager")
    device = next(prepared.model.parameters()).device
    prepared.model = models.load_result(run.model, prepared.settings.model)
    prepared.model.set_attn_implementation(attention)  # type: ignore[operator]
    return prepared.model.to(device)


def _picture(prepared: Prepared, run: artifacts.RunFolder) -> None:
    """Write what the report shows of an adapter's update; before the weights, so that whole weights have it."""
    begun = prepared.begun
    if not begun.moments:
        return
    options = prepared.wanted.start.options
    files.write_json(
        run.geometry,
        artifacts.finite(
            diagnostics.geometry(
                begun.moments, diagnostics.factors(prepared.model), begun.factors or None,
                beta=float(options.get("beta", 0.5)), center=gathering.centred(prepared.settings.statistics),
                taken_for="start" if prepared.wanted.needed else "picture",
            )
        ),
    )  # fmt: skip


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
    task = settings.model.task
    given = sides.read(settings.data, seed=settings.seed, need_forget=False, task=task)
    parts = [(settings.data.forget, given.records.pop("forget", [])), (settings.data.retain, given.records["retain"])]
    for number, source in enumerate(settings.data.train, 1):
        more = TASKS[task].read(source, limit=settings.data.limit, tag_names=settings.data.tag_names)
        parts.append((source, more))
        given.sources[f"train-{number}"] = {"rows": len(parts[-1][1]), "fingerprint": fingerprint(parts[-1][1])}
    given.records["retain"] = [r for _, records in parts for r in records]
    terms = objective.terms(recipe.Objective({}, settings.objective.retain, {}))
    tokenizer = _tokenizer(settings, given)
    _refuse_unfit(parts, tokenizer, settings, classes_of(settings, given))
    prepared = prepare(settings, given, terms, tokenizer, begun=settings.out if resume else None)
    with folders.opened(settings, resume=resume) as run:
        train_into(prepared, run, progress, stage="finetune", resume=resume)
        artifacts.write_results(run, artifacts.Results({}, progress.seconds))
        artifacts.write_manifest(run, manifest(prepared, "done", progress, {"files": artifacts.hash_files(run)}))
        return run.model


def _refuse_unfit(
    parts: Sequence[tuple[str, Sequence[Record]]], tokenizer: Any, settings: recipe.Recipe, classes: Sequence[str]
) -> None:
    """Refuse rows file by file: once they are joined, a line says nothing."""
    task, how = settings.model.task, sides.encoding(settings.data, context=context(settings))
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
    return tokenizer_of(settings)


def tokenizer_of(settings: recipe.Recipe) -> Any:
    """The tokenizer that a recipe names, or its model's own."""
    name, task = settings.model.tokenizer or settings.model.name, settings.model.task
    return models.load_tokenizer(name, settings.model.revision, task=task)


def prepare_unlearning(settings: recipe.Recipe, given: sides.Sides, *, resume: bool) -> Prepared:
    """Everything of ``excise run`` that can refuse its input, before anything is written."""
    terms = objective.terms(settings.objective)
    tokenizer = tokenizer_of(settings)
    return prepare(
        settings, given, terms, tokenizer, begun=settings.out if resume else None, pictured=diagnostics.wanted(settings)
    )
