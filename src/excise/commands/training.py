"""The training half of a run: reference, start, steps, stopping; weights out, and the record of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from excise import __version__, artifacts, files, models, population, ranks, reference, stopping, train
from excise.commands import folders, watching
from excise.commands.measuring import diagnostics
from excise.commands.progress import Progress
from excise.commands.starting import beginning, editing, gathering, objective
from excise.commands.starting.preparing import Prepared
from excise.errors import TrainingStopped
from excise.forward import REFERENCE, Anatomy
from excise.initialise import apply, delivery, store
from excise.objectives import NEVER_SAW
from excise.tasks import class_maps


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
    ranks.join()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    p.model.to(device)
    if of_reference:
        with progress.stage(f"{stage}: reference"):
            stored = reference.store(
                p.model, anatomy, of_reference, p.rows.counts, p.rows.batch, only=p.plan.visited(),
                autocast=lambda: train.autocast(p.precision, device.type), device=device,
            )  # fmt: skip
    stop = _rule(p, run, anatomy, device)  # it holds the retained rows against the original too
    _begin(p, run, progress, stage, device, resume=resume)
    width = int(p.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    of_classes = class_maps(p.classes, settings.model.task) if p.classes else {}
    fixed = {**p.begun.constants, **of_classes, **({NEVER_SAW: p.said} if p.said else {})}
    retake = _populations(p, anatomy, device)
    if retake:
        with progress.stage(f"{stage}: never-seen rows"):
            fixed |= retake(None)
    with progress.stage(stage, p.plan.steps) as advance:
        trainer = train.UnlearnTrainer(
            p.model, p.terms, p.plan, p.rows.batch, settings, run.checkpoints,
            reference=stored, precision=p.precision,
            constants=objective.constants(p.terms, width, settings.seed, fixed), shapes=p.begun.shapes,
            should_stop=_late(stop, settings.stop.after * p.plan.steps) if stop else None,
            beside=stop.save if stop else None, retake=retake,
            callbacks=[_Log(run, advance), *([_Active(p.model)] if p.wanted.start.base == "kept" else [])],
        )  # fmt: skip
        whole = _checkpoints(run) if resume else []
        step = int(whole[-1].name.rsplit("-", 1)[1]) if whole else 0
        artifacts.cut_log(run, step)
        if stop:
            stop.begin(step, whole[-1] if whole else None)
        if stop and stop.decided:  # killed between its last look and its weights
            pass
        elif whole:
            trainer.resume(whole[-1])
        else:
            trainer.train()
    if stop:
        stop.roll_back()
    return trainer


def _begin(
    p: Prepared, run: artifacts.RunFolder, progress: Progress, stage: str, device: torch.device, *, resume: bool
) -> None:
    """Edit the weights, then take statistics of what they are now, and apply the start or make the shapes."""
    weights = p.base or ""
    if p.chosen is not None:
        editing.apply(p.settings, p.counted, p.chosen, p.model, run)
        p.given.warnings += editing.warnings(run)
    if not (p.wanted.statistics or p.wanted.start.moves):
        return
    if p.chosen is not None:
        weights = store.fingerprint(p.model)
    taker = gathering.Taker(
        p.model, p.rows, p.settings.statistics, p.precision, lambda: train.autocast(p.precision, device.type), weights
    )
    with progress.stage(f"{stage}: statistics"):
        p.begun = beginning.begin(p.wanted, taker, run, resume=resume)
    p.given.warnings += p.begun.warnings


def _late(stop: stopping.Stopping, after: float) -> Callable[[int], bool]:
    """The rule, which does not look before a step."""
    return lambda step: step > after and stop(step)


def _populations(
    p: Prepared, anatomy: Anatomy, device: torch.device
) -> Callable[[int | None], dict[str, dict[str, torch.Tensor]]] | None:
    """What terms read of all rows of a side: taken at the start (``None``), or what is due after a step."""
    needs = population.wanted(objective.needs(p.terms))

    def take(step: int | None) -> dict[str, dict[str, torch.Tensor]]:
        return population.take(
            p.model, anatomy, population.wanted(needs, step=step), p.rows.counts, p.rows.batch, step=step,
            autocast=lambda: train.autocast(p.precision, device.type), device=device,
        )  # fmt: skip

    return take if needs else None


def _rule(p: Prepared, run: artifacts.RunFolder, anatomy: Anatomy, device: torch.device) -> stopping.Stopping | None:
    """The stopping rule of the recipe, where it has one and forgets anything."""
    if p.settings.stop.rule == "none" or "forget" not in p.rows.counts:
        return None
    return watching.stopping(
        p.model, anatomy, p.rows, p.settings, run.stopping,
        lambda: train.autocast(p.precision, device.type), p.classes, unseen=p.given.unseen, steps=p.plan.steps,
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


def manifest(prepared: Prepared, status: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
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
        **({"start": beginning.cited(p.wanted)} if p.wanted.start.moves or p.wanted.shaper else {}),
        **editing.record(p.settings.out),
        "data": p.given.sources,
        "verify": folders.thresholds(p.settings),
        **stopping.record(p.settings.stop, folders.stopping_of(p.settings.out)),
        "terms": objective.cited(p.settings.objective, p.terms),
        "warnings": [*p.settings.chosen[1:], *p.given.warnings, *objective.cautions(p.settings.objective)],
        **(extra or {}),
    }


def train_into(
    prepared: Prepared, run: artifacts.RunFolder, progress: Progress, *, stage: str, resume: bool
) -> nn.Module:
    """Train and save the weights whole, or load them where that is done; adapters come back merged."""
    if resume and (run.model / "COMPLETE.json").is_file():
        files.verify(run.model)
        prepared.given.warnings += [*beginning.warnings(run), *editing.warnings(run)]
        return _delivered(prepared, run)
    artifacts.write_manifest(run, manifest(prepared, "running"))
    try:
        trainer = fit(prepared, run, progress, stage=stage, resume=resume)
    except TrainingStopped:
        artifacts.write_manifest(run, manifest(prepared, "stopped"))
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
