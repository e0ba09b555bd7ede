"""`excise evaluate`: measure any model beside the original and the gold."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise import __version__, artifacts, models, recipe, reporting
from excise.commands import folders
from excise.commands.measuring import attacking, evaluation, writing
from excise.commands.measuring.measured import Measured
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import IntegrityFailed, UsageError
from excise.records import Record


@dataclass(frozen=True)
class Suite:
    """What a suite measures beyond the scores of answers, and whether it needs rows to forget and to keep.

    ``parts``: ``generate`` (answers as the model writes them), ``muse`` (MUSE's passages and questions), ``latent``
    (hidden states), ``relearn`` (the relearning curve), ``choices`` (multiple-choice tasks), ``attack`` (every attack).
    """

    parts: tuple[str, ...] = ()
    rows: bool = True
    task: str | None = None  # what a model must do to be measured: text, or anything but text


SUITES = {
    "tofu": Suite(("generate",)),
    "muse": Suite(("muse",), task="text"),
    "memorisation": Suite(),
    "latent": Suite(("latent",)),
    "relearn": Suite(("relearn",)),
    "attack": Suite(("attack",), task="text"),
    "mcq": Suite(("choices",), rows=False, task="text"),
    "ner": Suite(("latent", "relearn"), task="classes"),
    "all": Suite(("generate", "muse", "latent", "relearn", "choices", "attack")),
}
PARTS = SUITES["all"].parts


def evaluate(
    model: str | Path,
    *,
    suite: str = "tofu",
    without: Sequence[str] = (),
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    recipe: recipe.Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path | dict[str, Any]:
    """Measure a model, or the model of a run folder, beside the original and a gold.

    Args:
        model: Hub id, model folder, or run folder (whose own recipe says which rows are which).
        suite: ``tofu``, ``muse``, ``memorisation``, ``latent``, ``relearn``, ``attack``, ``mcq``, ``ner`` (classifiers)
            or ``all``.
        without: Parts of the suite to leave out: ``attack`` takes most of the time of ``all``.
        against: The gold: hub id, model folder or run folder; default the recipe's.
        tasks: Multiple-choice tasks of suite ``mcq`` (or ``all``): files of questions, or names such as ``wmdp_bio``;
            default the recipe's.
        recipe: Says which rows are which; needed unless ``model`` is a run folder or the suite is ``mcq``.
        out: Folder to write tables, numbers and a report to.
        resume: Go on with an evaluation that was interrupted in ``out``: to the same numbers.
        progress: Where progress is shown.

    Returns:
        The folder, or without ``out`` the numbers as in ``results.json``.

    Raises:
        UsageError: An unknown suite or task, no recipe, or an extra that is not installed.
        InputRefused: A model or rows that cannot be used.
        IntegrityFailed: ``out`` was begun with other settings, another model or another suite.

    Example:
        >>> evaluate("runs/first", suite="latent", against="runs/gold")  # doctest: +SKIP
        {'format': 1, 'models': {...}}
    """
    settings, parts = _asked(str(model), suite, without, against, tasks, recipe)
    settings = dataclasses.replace(settings, out=None if out is None else str(out))
    progress = progress or Progress()
    if resume and out is None:
        raise UsageError("say which evaluation to go on with: --out DIR")
    if out is not None and folders.standing(settings, resume=resume)[1]:
        return _done(artifacts.RunFolder(Path(out)), str(model), suite)
    asked = evaluation.asked_of(settings)
    if suite == "muse" and asked.muse is None:
        raise UsageError("say what to ask: evaluate.muse of the recipe names passages, questions or texts")
    given = _rows(settings, str(model)) if SUITES[suite].rows else sides.Sides({})
    records = evaluation.limited(given.records, settings.evaluate, task=settings.model.task)
    job = _Job(str(model), suite, settings, given, records, asked, parts)
    if out is None:
        numbers, _ = writing.judge(_measured(job, progress), records, settings)
        head = {"format": artifacts.FORMAT, "task": settings.model.task}
        shares = artifacts.shares_of_time(progress.seconds, numbers)
        return artifacts.finite({**head, "models": numbers, "seconds": progress.seconds, "shares": shares})
    with folders.opened(settings, resume=resume) as run:
        _begin(run, job)
        measured = _measured(job, progress, run)
        writing.write(run, measured, records, settings, progress)
        shutil.rmtree(run.parts, ignore_errors=True)
        artifacts.write_manifest(run, _manifest(job) | {"status": "done", "files": artifacts.hash_files(run)})
        reporting.build(run.root)
    return run.root


@dataclass(frozen=True)
class _Job:
    """What is measured: the model, with which settings, on which rows."""

    model: str
    suite: str
    settings: recipe.Recipe
    given: sides.Sides
    records: dict[str, list[Record]]
    asked: evaluation.Asked
    parts: tuple[str, ...]


def _asked(
    model: str,
    suite: str,
    without: Sequence[str],
    against: str | Path | None,
    tasks: Sequence[str],
    given: recipe.Recipe | None,
) -> tuple[recipe.Recipe, tuple[str, ...]]:
    """The recipe with the suite's switches set, and the parts that are measured."""
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    unknown = [part for part in without if part not in SUITES[suite].parts]
    if unknown:
        named = ", ".join(SUITES[suite].parts) or "nothing that can be left out"
        raise UsageError(f"suite {suite} has no part {unknown[0]!r}; it has {named}")
    parts = tuple(part for part in SUITES[suite].parts if part not in without)
    settings = _settings(Path(model), given, needed=SUITES[suite].rows)
    text = settings.model.task == "causal_lm"
    if SUITES[suite].task == "classes" and text:
        raise UsageError(f"suite {suite} is for classifiers: set model.task in the recipe, or choose another suite")
    if SUITES[suite].task == "text" and not text:
        raise UsageError(f"suite {suite} is for language models: choose another, such as ner")
    own = settings.evaluate
    options = dataclasses.replace(
        own,
        generate=own.generate if "generate" in parts else 0,
        latent="latent" in parts,
        relearn_steps=own.relearn_steps if "relearn" in parts else (),
        gold=str(against) if against else own.gold,
        tasks=_tasks(suite, parts, tasks, settings),
        muse=own.muse if "muse" in parts and text else recipe.Muse(),
        attacks=attacking.settled(settings) if "attack" in parts and text else {},
    )
    return dataclasses.replace(settings, evaluate=options), parts


def _measured(job: _Job, progress: Progress, run: artifacts.RunFolder | None = None) -> dict[str, Measured]:
    """Every model by role; what an interrupted evaluation left in the folder is not measured again."""
    names = {"original": job.settings.model.name, "gold": job.settings.evaluate.gold, "unlearned": job.model}
    wanted = {k: v for k, v in names.items() if v and not (k == "original" and v == job.model)}
    aside = run.parts if run else None
    return {
        role: evaluation.measure_named(role, place, job.records, job.settings, progress, job.asked, aside=aside)
        for role, place in wanted.items()
    }


def _begin(run: artifacts.RunFolder, job: _Job) -> None:
    """Write down what is measured, or refuse to go on where that was something else."""
    record = _manifest(job) | {"status": "running"}
    if run.manifest.is_file():
        _refuse_other(run, job.model, job.suite)
        if artifacts.read_manifest(run).get("data") != artifacts.finite(record["data"]):
            raise IntegrityFailed(f"{run.root}: begun with other rows; resume with the same, or begin anew")
        if artifacts.read_manifest(run).get("verify", record["verify"]) != record["verify"]:
            raise IntegrityFailed(f"{run.root}: begun with other thresholds (verify); resume with the same ones")
    artifacts.write_manifest(run, record)


def _refuse_other(run: artifacts.RunFolder, model: str, suite: str) -> None:
    begun: Any = artifacts.read_manifest(run)
    if (begun.get("model", {}).get("name"), begun.get("suite")) != (model, suite):
        raise IntegrityFailed(f"{run.root}: begun with another model or suite; resume with the same, or name another")


def _done(run: artifacts.RunFolder, model: str, suite: str) -> Path:
    """The folder of an evaluation that needs nothing more."""
    _refuse_other(run, model, suite)
    if not run.report.is_file():
        reporting.build(run.root)
    return run.root


def _manifest(job: _Job) -> dict[str, Any]:
    return {
        "command": "excise evaluate",
        "suite": job.suite,
        "seed": job.settings.seed,
        "versions": {"excise": __version__, **artifacts.environment()},
        "model": {"name": job.model},
        "data": job.given.sources | job.asked.sources,
        "verify": folders.thresholds(job.settings, job.model),
        "terms": [],
        "warnings": job.given.warnings,
    }


def _rows(settings: recipe.Recipe, model: str) -> sides.Sides:
    """The rows of a recipe, checked against the model's context."""
    task = settings.model.task
    given = sides.of(settings)
    own = settings.model.tokenizer or settings.model.name
    revision = settings.model.revision if own else None
    tokenizer = models.load_tokenizer(own or evaluation.weights(model), revision, task=task)
    evaluation.refuse_unfit(given, tokenizer, settings)
    return given


def _tasks(suite: str, parts: Sequence[str], tasks: Sequence[str], settings: recipe.Recipe) -> tuple[str, ...]:
    """The multiple-choice tasks that were named here, else the recipe's; none for suites that ask no questions."""
    if "choices" not in parts:
        if tasks:
            raise UsageError(f"suite {suite} asks no multiple-choice tasks: use --suite mcq or all")
        return ()
    wanted = tuple(tasks) or settings.evaluate.tasks
    if suite == "mcq" and not wanted:
        raise UsageError("say which questions to ask: --tasks FILE.jsonl, or names such as wmdp_bio wmdp_cyber mmlu")
    return wanted


def _settings(model: Path, given: recipe.Recipe | None, *, needed: bool) -> recipe.Recipe:
    """The recipe that was passed, or the run folder's own; an empty one where nothing of it is needed."""
    if given is not None:
        return given
    if (model / "recipe.yaml").is_file():
        return recipe.load(str(model / "recipe.yaml"))
    if not needed:
        return recipe.Recipe()
    raise UsageError("say which rows are which: --recipe FILE (a run folder brings its own)")
