"""Measuring models and writing what was found: the second half of `excise run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from excise import artifacts, models, recipe
from excise.commands.measuring import cache, classifiers, findings, language_models
from excise.commands.measuring.measured import Measured, Numbers
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.metrics import mcq
from excise.metrics.table import save as save_table
from excise.records import Record

#: Task -> the module that measures and judges its models; their functions have the same names.
_TASKS: dict[str, ModuleType] = {
    "causal_lm": language_models,
    "token_classification": classifiers,
    "sequence_classification": classifiers,
}


def limited(
    records: Mapping[str, Sequence[Record]], settings: recipe.Evaluate, *, task: str = "causal_lm"
) -> dict[str, list[Record]]:
    """The measured rows: the first ``max_rows`` of each side; ``untouched`` may stand in for ``retain``.

    Rows that a stopping rule has read are not among them.
    """
    measured = {side: rows for side, rows in records.items() if side not in (sides.CALIBRATION, sides.WATCH)}
    kept = {side: list(rows)[: settings.max_rows] for side, rows in measured.items()}
    if any(side in kept for side in _TASKS[task].INSTEAD_OF_RETAIN):
        kept.pop("retain", None)
    if not settings.rewordings:
        kept = {s: [dataclasses.replace(r, paraphrases=(), false_answers=()) for r in rows] for s, rows in kept.items()}
    return kept


def refuse_unfit(given: sides.Sides, tokenizer: Any, settings: recipe.Recipe) -> None:
    """Cut long texts, and refuse what measuring would stumble over before anything is written: rows, or a gold.

    Raises:
        InputRefused: Naming file and line, or the gold.
    """
    task, config = settings.model.task, models.read_config(settings.model)
    how = sides.encoding(settings.data, context=models.context_of(config))
    sides.cut(given, tokenizer, how, task=task, long=settings.data.long)
    measured = limited(given.records, settings.evaluate, task=task)
    classes = _classes(config, task)
    sides.refuse_unfit(measured, tokenizer, settings.data, how, task=task, classes=classes)
    gold = settings.evaluate.gold
    if gold and not (Path(weights(gold)) / "adapter_config.json").is_file():
        theirs = _classes(models.read_config(recipe.Model(name=weights(gold), task=task)), task)
        lacking = len(set(classes) - set(theirs))
        if lacking:
            raise InputRefused(f"{gold}: lacks {lacking} of the model's classes: train it with the same ones")


def _classes(config: Any, task: str) -> tuple[str, ...]:
    """The classes of a model by number; none for a language model."""
    return () if task == "causal_lm" else tuple(str(config.id2label[i]) for i in range(config.num_labels))


def measure_model(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    relearning: bool = True,
) -> Measured:
    """One model's scores, states, relearning curves and, of a language model, generations.

    Args:
        name: For the progress display.
        model: The model, in the precision it is to be measured in; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        records: Rows by side.
        settings: The recipe; its task says how.
        progress: Where progress is shown.
        relearning: Whether to run the relearning attack.
    """
    how = _TASKS[settings.model.task].measure
    return how(name, model, tokenizer, records, settings, progress, relearning=relearning)


def tasks_of(settings: recipe.Recipe) -> mcq.Tasks | None:
    """The multiple-choice tasks that a recipe names, their questions read; None where it names none.

    Raises:
        UsageError: The extra is not installed, an unknown task, or a model that answers no questions.
        InputRefused: Questions that cannot be read.
    """
    if settings.evaluate.tasks and settings.model.task != "causal_lm":
        raise UsageError("evaluate.tasks: multiple-choice questions are for language models; leave them out")
    return mcq.load(settings.evaluate.tasks) if settings.evaluate.tasks else None


def ask(
    name: str, model: nn.Module, tokenizer: Any, tasks: mcq.Tasks | None, settings: recipe.Recipe, progress: Progress
) -> Numbers:
    """One model's accuracy on the multiple-choice tasks, by name of the number; empty without tasks."""
    if tasks is None:
        return {}
    context, size = models.context_length(model), settings.evaluate.batch_tokens
    with progress.stage(f"multiple choice {name}"):
        counts = mcq.measure(model, tokenizer, tasks, context=context, batch_tokens=size)
    return mcq.numbers(counts, tasks.members)


def judge(
    measured: Mapping[str, Measured], records: Mapping[str, list[Record]], settings: recipe.Recipe
) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Numbers of every model and what the pictures are drawn from; the gold and the original stand beside each.

    Returns:
        ``results.json``'s ``models``, and ``pictures.json`` without its findings.
    """
    return _TASKS[settings.model.task].judge(measured, records, settings)


def write(
    run: artifacts.RunFolder,
    measured: Mapping[str, Measured],
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    log: Sequence[Mapping[str, Any]] = (),
    geometry: Mapping[str, Any] | None = None,
) -> artifacts.Results:
    """Judge the models and write tables, numbers and pictures into a run folder."""
    with progress.stage("judge"):
        numbers, pictures = judge(measured, records, settings)
        pictures |= {} if geometry is None else {"geometry": geometry}
        names = [n for n in measured if n not in (artifacts.ORIGINAL, artifacts.GOLD)]
        logs = {name: log if name == artifacts.UNLEARNED else () for name in names}
        pictures["findings"] = [
            {**found, "model": name} for name in names for found in findings.findings(numbers, logs[name], name=name)
        ]
        for name, own in measured.items():
            for side, table in own.tables.items():
                path = run.table(name, side)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_table(table, path)
        if settings.evaluate.include_text and records:
            artifacts.write_examples(run, _examples(measured, records))
        shown = {model: {k: artifacts.Number.of(v) for k, v in own.items()} for model, own in numbers.items()}
    results = artifacts.Results(shown, progress.seconds, settings.model.task)
    artifacts.write_pictures(run, pictures)
    artifacts.write_results(run, results)
    return results


def _examples(measured: Mapping[str, Measured], records: Mapping[str, list[Record]]) -> list[dict[str, Any]]:
    rows = records["forget"][:20]
    return [
        {
            "side": "forget", "question": r.prompt or "", "answer": r.completion,
            "generated": {name: m.texts["forget"][i] for name, m in measured.items() if "forget" in m.texts},
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip


def measure_named(
    role: str,
    place: str,
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    tasks: mcq.Tasks | None = None,
) -> Measured:
    """An original or a gold, by hub id or folder: measured, or taken from the recipe's cache; tasks are asked anew."""
    folder = settings.evaluate.cache and cache.entry(Path(settings.evaluate.cache), place, records, settings)
    found = cache.load(folder) if folder else None
    if found is not None and tasks is None:
        return Measured(*found)
    model, tokenizer = load_for_measuring(place, settings)
    if found is not None:
        own = Measured(*found)
    else:  # without rows only the tasks are asked
        own = measure_model(role, model, tokenizer, records, settings, progress) if records else Measured({})
    if folder and found is None:
        cache.save(folder, own.tables, own.states, own.curves)
    own.choices = ask(role, model, tokenizer, tasks, settings, progress)
    return own


def load_for_measuring(name: str, settings: recipe.Recipe) -> tuple[nn.Module, Any]:
    """A model to be measured, in its own precision, and its tokenizer; a run folder stands for its model."""
    place, base = weights(name), settings.model
    revision = base.revision if name == base.name else None
    if (Path(place) / "adapter_config.json").is_file():
        model = models.load_result(Path(place), base)
    else:  # `lora` only says that weights keep their own precision; no adapter is attached here
        model = models.load(dataclasses.replace(base, name=place, revision=revision, config=None))
    if torch.cuda.is_available():
        model = model.to("cuda")
    own = base.tokenizer if base.tokenizer and name == base.name else place
    return model, models.load_tokenizer(own, revision, task=base.task)


def weights(name: str) -> str:
    """Where the weights of a hub id, a model folder or a run folder lie."""
    folder = Path(name)
    return str(folder / "model") if (folder / "manifest.json").is_file() else name
