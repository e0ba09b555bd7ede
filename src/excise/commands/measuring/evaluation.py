"""Measuring models with every instrument that a recipe asks for; `writing` judges them and writes what was found."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from excise import models, recipe
from excise.commands.measuring import attacking, cache, classifiers, language_models, muse
from excise.commands.measuring.measured import Measured, Numbers
from excise.commands.measuring.parts import Part, Parts
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.metrics import mcq
from excise.records import Record

#: Task -> the module that measures and judges its models; their functions have the same names.
TASKS: dict[str, ModuleType] = {
    "causal_lm": language_models,
    "token_classification": classifiers,
    "sequence_classification": classifiers,
}

#: Gives a model and its tokenizer; loads them when it is first called.
Lend = Callable[[], tuple[nn.Module, Any]]


def limited(
    records: Mapping[str, Sequence[Record]], settings: recipe.Evaluate, *, task: str = "causal_lm"
) -> dict[str, list[Record]]:
    """The measured rows: the first ``max_rows`` of each side; ``untouched`` may stand in for ``retain``.

    Rows that a stopping rule or a term has read as never-seen ones are not among them. Beside a gold, never-seen rows
    are scored by their answers alone: membership reads no more, and rewordings are most of a sweep.
    """
    measured = {side: rows for side, rows in records.items() if side not in sides.SET_ASIDE}
    kept = {side: list(rows)[: settings.max_rows] for side, rows in measured.items()}
    if any(side in kept for side in TASKS[task].INSTEAD_OF_RETAIN):
        kept.pop("retain", None)
    if not settings.rewordings:
        kept = {side: _plain(rows) for side, rows in kept.items()}
    elif settings.gold and "never_seen" in kept:
        kept["never_seen"] = _plain(kept["never_seen"])
    return kept


def _plain(rows: Sequence[Record]) -> list[Record]:
    """The same rows without rewordings."""
    return [dataclasses.replace(r, paraphrases=(), false_answers=()) for r in rows]


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
    parts: Parts = Parts(),  # noqa: B008 - frozen
) -> Measured:
    """One model's scores, states, relearning curves and, of a language model, generations.

    Args:
        name: For the progress display.
        model: The model, in the precision it is to be measured in; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        records: Rows by side.
        settings: The recipe; its task says how.
        progress: Where progress is shown.
        parts: Where an unfinished evaluation keeps what is measured.
    """
    how = TASKS[settings.model.task].measure
    return how(name, model, tokenizer, records, settings, progress, parts=parts)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked beyond the rows of the sides: multiple choice, MUSE's passages and questions, attacks."""

    tasks: mcq.Tasks | None = None
    muse: muse.Asked | None = None
    attacks: attacking.Attacks | None = None

    @property
    def sources(self) -> dict[str, Any]:
        """What was asked, for the manifest."""
        return (self.tasks.sources if self.tasks else {}) | (self.muse.sources if self.muse else {})


def asked_of(settings: recipe.Recipe) -> Asked:
    """What a recipe asks beyond its rows, read and checked; see `tasks_of`, `muse.read` and `attacking.planned`."""
    attacks = attacking.planned(settings, lambda name: load_for_measuring(name, settings)[0])
    return Asked(tasks_of(settings), muse.read(settings), attacks)


def tasks_of(settings: recipe.Recipe) -> mcq.Tasks | None:
    """The multiple-choice tasks that a recipe names, their questions read; None where it names none.

    Raises:
        UsageError: The extra is not installed, an unknown task, or a model that answers no questions.
        InputRefused: Questions that cannot be read.
    """
    if settings.evaluate.tasks and settings.model.task != "causal_lm":
        raise UsageError("evaluate.tasks: multiple-choice questions are for language models; leave them out")
    return mcq.load(settings.evaluate.tasks) if settings.evaluate.tasks else None


def ask(model: nn.Module, tokenizer: Any, tasks: mcq.Tasks, settings: recipe.Recipe) -> Numbers:
    """One model's accuracy on the multiple-choice tasks, by name of the number."""
    context, size = models.context_length(model), settings.evaluate.batch_tokens
    counts = mcq.measure(model, tokenizer, tasks, context=context, batch_tokens=size)
    return mcq.numbers(counts, tasks.members)


def measure_named(
    role: str,
    place: str,
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    asked: Asked = Asked(),
    *,
    aside: Path | None = None,
    lend: Lend | None = None,
) -> Measured:
    """A model by hub id or folder, measured: with all its instruments, each taken from what is kept where it can be.

    Args:
        role: For the progress display.
        place: Hub id, model folder or run folder.
        records: Rows by side; where there are none only ``asked`` is.
        settings: The recipe; its cache keeps what originals and golds yield, hidden states included.
        progress: Where progress is shown.
        asked: Asked anew, or kept in ``aside``; no cache has it.
        aside: Folder in which an unfinished evaluation keeps its parts.
        lend: Gives the model and its tokenizer where they are loaded already; such a model is not cached.
    """
    options = settings.evaluate
    whole = cache.entry(Path(options.cache), place, records, settings) if options.cache and lend is None else None
    # The role too: a copy of the original is measured by itself, so that each stage's seconds are its own.
    parts = Parts(aside / f"{role}-{cache.identity_of(place, records, settings)}") if aside else Parts()
    found = cache.load(whole) if whole else None
    lend = functools.cache(lend or functools.partial(load_for_measuring, place, settings))
    own = Measured(*found) if found else Measured({})
    if records and not found:
        own = measure_model(role, *lend(), records, settings, progress, parts=parts)
        if whole:
            cache.save(whole, own.tables, own.states, own.curves)
    if asked.tasks is not None:
        own.choices = _asked(role, lend, asked.tasks, settings, progress, parts)
    if asked.muse is not None:
        own.muse = muse.measured(role, lend, asked.muse, settings, progress, parts)
    if asked.attacks is not None and records:
        kept = [Path(options.cache) / "attacks"] if options.cache and whole else []
        kept += [parts.folder] if parts.folder else []
        own.attacks, own.not_attacked = attacking.attacked(
            role, place, lend, asked.attacks, records, settings, progress, folders=kept
        )
    return own


def _asked(
    role: str, lend: Lend, tasks: mcq.Tasks, settings: recipe.Recipe, progress: Progress, parts: Parts
) -> Numbers:
    stage = f"multiple choice {role}"
    named = hashlib.sha256(json.dumps(tasks.sources, sort_keys=True).encode()).hexdigest()[:12]
    with progress.stage(stage):
        return parts.kept(f"choices-{named}", stage, progress, lambda: Part(extra=ask(*lend(), tasks, settings))).extra


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
