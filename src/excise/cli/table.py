"""The commands, one row each, over the functions of `excise` that they call; heavy imports only inside a call."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from excise import terminal
from excise.cli.command import Command, Override, option
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.recipe import Recipe


def _recipe(given: argparse.Namespace, overrides: list[Override]) -> Recipe:
    from excise import recipe

    if given.recipe is None and not any(key.startswith(("model.", "data.")) for key, _ in overrides):
        raise UsageError(f"excise {given.command} needs a recipe, or --model, --forget and --retain")
    return recipe.load(given.recipe, overrides)


def _speaks() -> bool:
    """Whether this process prints results: of several ranks only the first."""
    return os.environ.get("RANK", "0") == "0"


def _demo(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    excise.demo(given.out, task=given.task, quick=given.quick, seed=given.seed)
    terminal.run(given.out)


def _finetune(given: argparse.Namespace, overrides: list[Override]) -> None:
    recipe = _recipe(given, overrides)
    if not recipe.out:
        raise UsageError("say where the model goes: --out DIR")
    import excise

    made = excise.finetune(recipe, resume=given.resume)
    if _speaks():
        print(f"model: {made}")


def _plan(given: argparse.Namespace, overrides: list[Override]) -> None:
    recipe = _recipe(given, overrides)
    import excise

    plan = excise.plan(recipe)
    print(json.dumps(plan, indent=1, ensure_ascii=False)) if given.json else terminal.plan(plan)


def _run(given: argparse.Namespace, overrides: list[Override]) -> None:
    recipe = _recipe(given, overrides)
    if not recipe.out:
        raise UsageError("say where the run folder goes: --out DIR")
    import excise

    out = Path(recipe.out)
    excise.run(recipe, out=out, resume=given.resume)
    if _speaks():
        terminal.run(out)


def _tune(given: argparse.Namespace, overrides: list[Override]) -> None:
    recipe = _recipe(given, overrides)
    import excise

    best = excise.tune(recipe, given.trials, study=given.study, processes=given.processes)
    print(json.dumps(best, indent=1, default=str))


def _evaluate(given: argparse.Namespace, overrides: list[Override]) -> None:
    import excise
    from excise import recipe

    wanted = recipe.load(given.recipe) if given.recipe else None
    found = excise.evaluate(
        given.model, suite=given.suite, against=given.against, tasks=given.tasks, recipe=wanted, out=given.out
    )
    terminal.run(found) if isinstance(found, Path) else terminal.scores(found, as_json=given.json)


def _score(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    terminal.scores(excise.score(given.log, given.against), as_json=given.json)


def _report(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    print(f"report: {excise.report(given.run)}")


def _export(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    print(f"{given.to}: {excise.export(given.run, to=given.to, out=given.out, rank=given.rank)}")


def _canaries(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    print(f"canaries: {excise.canaries(given.out, number=given.number, facts=given.facts)}")


def _audit(given: argparse.Namespace, _: list[Override]) -> None:
    import excise
    from excise import recipe

    wanted = recipe.load(given.recipe) if given.recipe else None
    found = excise.audit(given.model, given.canaries, share=given.share, level=given.level, recipe=wanted)
    print(json.dumps(found, indent=1)) if given.json else terminal.audit(found)


def _recipes(given: argparse.Namespace, _: list[Override]) -> None:
    from importlib import resources

    from excise import recipe

    for name in recipe.shipped():
        first = (resources.files("excise") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<28} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


_RECIPE = option("recipe", "a recipe file, or a name that `excise recipes` lists", nargs="?", metavar="RECIPE")
_RESUME = option("--resume", "go on from the last checkpoint in the folder", action="store_true")
_JSON = option("--json", "print JSON", action="store_true")

COMMANDS = {
    "demo": Command(
        "train, forget and report on a small synthetic world: no network, no GPU, about a minute",
        _demo,
        (
            option("--out", "folder to write (default: excise-demo)", type=Path, default=Path("excise-demo")),
            option("--task", "qa: a language model; ner: a named-entity tagger (default: qa)", default="qa"),
            option("--quick", "a smaller world, for a first look", action="store_true"),
            option("--seed", "seed of the world and of the training", type=int, default=0),
        ),
    ),
    "finetune": Command(
        "train a model on records: makes originals and golds", _finetune, (_RECIPE, _RESUME), recipe=True
    ),
    "plan": Command("what a run will cost, before a weight is loaded", _plan, (_RECIPE, _JSON), recipe=True),
    "run": Command(
        "forget, measure and report",
        _run,
        (_RECIPE, _RESUME),
        recipe=True,
    ),
    "tune": Command(
        "search settings on a validation split",
        _tune,
        (
            _RECIPE,
            option("--trials", "trials in all, earlier ones of the study included", type=int, required=True),
            option("--study", "SQLite file of the study (default: beside the output)"),
            option("--processes", "trials at a time", type=int, default=1),
        ),
        recipe=True,
    ),
    "evaluate": Command(
        "measure a model or a run folder",
        _evaluate,
        (
            option("model", "hub id, model folder or run folder", metavar="MODEL_OR_RUN"),
            option("--suite", "which set of metrics", default="tofu"),
            option(
                "--tasks",
                "multiple-choice questions of suite mcq: JSONL files, or names such as wmdp_bio and mmlu",
                nargs="+",
                default=(),
                metavar="NAME_OR_FILE",
            ),
            option("--against", "the gold: a model, or the folder of a run"),
            option("--recipe", "the recipe that says which rows are which"),
            option("--out", "folder to write", type=Path),
            _JSON,
        ),
    ),
    "score": Command(
        "metrics from saved tables alone: ours, TOFU's or OpenUnlearning's",
        _score,
        (
            option("log", "folder of tables, eval_log_aggregated.json or TOFU_EVAL.json", metavar="LOG"),
            option("--against", "the gold's log"),
            _JSON,
        ),
    ),
    "report": Command(
        "rebuild the report of a run folder", _report, (option("run", "run folder", type=Path, metavar="RUN"),)
    ),
    "export": Command(
        "what a run made, for others to use: an adapter for the untouched base, or a whole model",
        _export,
        (
            option("run", "run folder", type=Path, metavar="RUN"),
            option("--to", "adapter or merged", choices=("adapter", "merged"), required=True),
            option("--out", "folder to write", type=Path, required=True),
            option("--rank", "cut the adapter's update to this rank; the error is measured", type=int, metavar="R"),
        ),
    ),
    "canaries": Command(
        "draw canaries for an audit: fictitious people whom a coin puts into training or keeps out of it",
        _canaries,
        (
            option("--out", "folder to write", type=Path, required=True),
            option("--number", "how many (default: 200)", type=int, default=200),
            option("--facts", "rows of each (default: 1)", type=int, default=1),
        ),
    ),
    "audit": Command(
        "a lower bound on the privacy loss that remains, by canaries that were to be forgotten",
        _audit,
        (
            option("model", "run folder, model folder or hub id", metavar="MODEL_OR_RUN"),
            option("--canaries", "the folder that `excise canaries` wrote", type=Path, required=True),
            option("--share", "share of the canaries that is guessed at (default: 0.5)", type=float, default=0.5),
            option("--level", "confidence of the bounds (default: 0.95)", type=float, default=0.95),
            option("--recipe", "how rows are written, for a model that is no run folder"),
            _JSON,
        ),
    ),
    "recipes": Command("the recipes that ship with the package", _recipes),
}
