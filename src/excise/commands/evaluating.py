"""`excise evaluate`: measure any model beside the original and the gold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise import __version__, artifacts, files, models, recipe, reporting
from excise.commands.measuring import evaluation
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import UsageError

#: What each suite measures beyond the scores of answers: generations, hidden states, the relearning attack,
#: multiple-choice tasks (``mcq`` asks these alone and needs no rows). Classifiers write nothing; ``ner`` is their all.
SUITES = {
    "tofu": ("generate",),
    "memorisation": (),
    "latent": ("latent",),
    "relearn": ("relearn",),
    "mcq": ("choices",),
    "ner": ("latent", "relearn"),
    "all": ("generate", "latent", "relearn", "choices"),
}


def evaluate(
    model: str | Path,
    *,
    suite: str = "tofu",
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    recipe: recipe.Recipe | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Path | dict[str, Any]:
    """Measure a model, or the model of a run folder, beside the original and a gold.

    Args:
        model: Hub id, model folder, or run folder (whose own recipe says which rows are which).
        suite: ``tofu``, ``memorisation``, ``latent``, ``relearn``, ``mcq``, ``ner`` (classifiers) or ``all``.
        against: The gold: hub id, model folder or run folder; default the recipe's.
        tasks: Multiple-choice tasks of suite ``mcq`` (or ``all``): files of questions, or names such as ``wmdp_bio``;
            default the recipe's.
        recipe: Says which rows are which; needed unless ``model`` is a run folder or the suite is ``mcq``.
        out: Folder to write tables, numbers and a report to.
        progress: Where progress is shown.

    Returns:
        The folder, or without ``out`` the numbers as in ``results.json``.

    Raises:
        UsageError: An unknown suite or task, no recipe, or an extra that is not installed.
        InputRefused: A model or rows that cannot be used.

    Example:
        >>> evaluate("runs/first", suite="latent", against="runs/gold")  # doctest: +SKIP
        {'format': 1, 'models': {...}}
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    parts = SUITES[suite]
    settings = _settings(Path(model), recipe, needed=suite != "mcq")
    if suite == "ner" and settings.model.task == "causal_lm":
        raise UsageError("suite ner is for classifiers: set model.task in the recipe, or choose another suite")
    tasks = _tasks(suite, tasks, settings)
    options = dataclasses.replace(
        settings.evaluate,
        generate=settings.evaluate.generate if "generate" in parts else 0,
        latent="latent" in parts,
        relearn_steps=settings.evaluate.relearn_steps if "relearn" in parts else (),
        gold=str(against) if against else settings.evaluate.gold,
        tasks=tuple(tasks),
    )
    settings = dataclasses.replace(settings, evaluate=options)
    progress = progress or Progress()
    run = artifacts.RunFolder(Path(out)) if out is not None else None
    if run is not None and run.root.is_dir() and any(run.root.iterdir()):
        raise UsageError(f"{out}: the folder is not empty; name another")
    asked = evaluation.tasks_of(settings)
    given = sides.Sides({}) if suite == "mcq" else _rows(settings, str(model))
    records = evaluation.limited(given.records, options, task=settings.model.task)
    names = {"original": settings.model.name, "gold": options.gold, "unlearned": str(model)}
    measured = {}
    for name, place in names.items():
        if place and not (name == "original" and place == str(model)):
            measured[name] = evaluation.measure_named(name, place, records, settings, progress, asked)
    if run is None:
        numbers, _ = evaluation.judge(measured, records, settings)
        head = {"format": artifacts.FORMAT, "task": settings.model.task}
        return artifacts.finite({**head, "models": numbers, "seconds": progress.seconds})
    evaluation.write(run, measured, records, settings, progress)
    files.write_text(run.recipe, _dump(settings))
    record = {
        "status": "done",
        "command": "excise evaluate",
        "seed": settings.seed,
        "versions": {"excise": __version__, **artifacts.environment()},
        "model": {"name": str(model)},
        "data": given.sources | (asked.sources if asked else {}),
        "terms": [],
        "warnings": given.warnings,
        "files": artifacts.hash_files(run),
    }
    artifacts.write_manifest(run, record)
    reporting.build(run.root)
    return run.root


def _rows(settings: recipe.Recipe, model: str) -> sides.Sides:
    """The rows of a recipe, checked against the model's context."""
    task = settings.model.task
    given = sides.of(settings)
    own = settings.model.tokenizer or settings.model.name
    revision = settings.model.revision if own else None
    tokenizer = models.load_tokenizer(own or evaluation.weights(model), revision, task=task)
    evaluation.refuse_unfit(given, tokenizer, settings)
    return given


def _tasks(suite: str, tasks: Sequence[str], settings: recipe.Recipe) -> tuple[str, ...]:
    """The multiple-choice tasks that were named here, else the recipe's; none for suites that ask no questions."""
    if "choices" not in SUITES[suite]:
        if tasks:
            raise UsageError(f"suite {suite} asks no multiple-choice tasks: use --suite mcq or all")
        return ()
    wanted = tuple(tasks) or settings.evaluate.tasks
    if suite == "mcq" and not wanted:
        raise UsageError("say which questions to ask: --tasks FILE.jsonl, or names such as wmdp_bio wmdp_cyber mmlu")
    return wanted


def _dump(settings: recipe.Recipe) -> str:
    return recipe.dump(settings)


def _settings(model: Path, given: recipe.Recipe | None, *, needed: bool) -> recipe.Recipe:
    """The recipe that was passed, or the run folder's own; an empty one where nothing of it is needed."""
    if given is not None:
        return given
    if (model / "recipe.yaml").is_file():
        return recipe.load(str(model / "recipe.yaml"))
    if not needed:
        return recipe.Recipe()
    raise UsageError("say which rows are which: --recipe FILE (a run folder brings its own)")
