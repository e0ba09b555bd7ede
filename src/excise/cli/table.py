"""The commands, one row each, over the functions of `excise` that they call; heavy imports only inside a call."""

from __future__ import annotations

import argparse
import json
import os
import sys
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


def _default(given: argparse.Namespace, overrides: list[Override]) -> Recipe:
    """The recipe that was named; where none was, the default for what is given, and a line that says which and why."""
    named = _recipe(given, overrides)
    if given.recipe is not None:
        return named
    import excise

    settings = excise.default_recipe(overrides)
    if settings.chosen and _speaks():
        print(f"excise: {'; '.join(settings.chosen)}", file=sys.stderr)
    return settings


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
    recipe = _default(given, overrides)
    import excise

    plan = excise.plan(recipe)
    print(json.dumps(plan, indent=1, ensure_ascii=False)) if given.json else terminal.plan(plan)


def _run(given: argparse.Namespace, overrides: list[Override]) -> None:
    recipe = _default(given, overrides)
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
        given.model, suite=given.suite, without=given.without, against=given.against, tasks=given.tasks,
        recipe=wanted, out=given.out, resume=given.resume,
    )  # fmt: skip
    terminal.run(found) if isinstance(found, Path) else terminal.scores(found, as_json=given.json)


def _score(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    terminal.scores(excise.score(given.log, given.against), as_json=given.json)


def _report(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    print(f"report: {excise.report(given.run)}")


def _verify(given: argparse.Namespace, _: list[Override]) -> int:
    import excise

    found = excise.verify(given.run, model=given.of)
    plain = found.plain()
    print(json.dumps(plain, indent=1, ensure_ascii=False)) if given.json else terminal.verdict(plain)
    return found.exit_code


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


def _cut(given: argparse.Namespace, _: list[Override]) -> None:
    import excise

    excise.cut(given.run, out=given.out, layer=given.layer, like=given.like, ridge=given.ridge)
    terminal.run(given.out)


def _ledger(given: argparse.Namespace, overrides: list[Override]) -> int:
    import excise
    from excise import recipe

    how, settings = given.action, {"name": given.id, "received": given.received, "accept": given.accept}
    if overrides and how != "request":
        raise UsageError(f"excise ledger DIR {how} takes no recipe keys: leave out --{overrides[0][0]}")
    if given.head and how != "check":
        raise UsageError("--head is for excise ledger DIR check")
    if (how == "add") != bool(given.target) and how != "request":
        needs = "needs a run folder" if how == "add" else "takes no further argument"
        raise UsageError(f"excise ledger DIR {how} {needs}")
    if how == "show":
        found = excise.show_ledger(given.folder)
        print(json.dumps(found, indent=1)) if given.json else terminal.ledger(found)
    elif how == "check":
        print(json.dumps(excise.check_ledger(given.folder, head=given.head), indent=1))
    else:
        if how == "request":
            given.recipe = given.target
            wanted = recipe.load(given.target, overrides)
            made = excise.request(given.folder, wanted, resume=given.resume, suite=given.suite, **settings)
        elif how == "add":
            made = excise.add_run(given.folder, given.target, suite=given.suite, **settings)
        else:
            made = excise.reverify(given.folder, suite=given.suite)
        terminal.ledger(excise.show_ledger(given.folder))
        return terminal.verdicts(made)
    return 0


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
        "train, forget and report on a small synthetic world: no network, no GPU, a minute or two",
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
        "forget, measure and report; without a recipe a default for what is given, and it says which",
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
            option("--without", "parts to leave out, such as attack", nargs="+", default=(), metavar="PART"),
            option("--resume", "go on with an interrupted evaluation in the folder", action="store_true"),
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
    "verify": Command(
        "a finished run against the thresholds fixed before it: passed (0), failed (5) or not shown (7)",
        _verify,
        (
            option("run", "run folder", type=Path, metavar="RUN"),
            option("--of", "which of its models (default: the unlearned one)", metavar="MODEL"),
            _JSON,
        ),
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
    "cut": Command(
        "take what sets forgotten rows apart out of a layer, in closed form, and measure what that did",
        _cut,
        (
            option("run", "run folder", type=Path, metavar="RUN"),
            option("--out", "folder to write", type=Path, required=True),
            option("--layer", "behind which block: from 1, or from the end (default: -1)", type=int, default=-1),
            option("--like", "which rows they are to be like: never_seen or retain (default: never_seen, if any)"),
            option(
                "--ridge",
                "share of variance added where retained rows are few (default: 0.001)",
                type=float,
                default=1e-3,
            ),
        ),
    ),
    "ledger": Command(
        "requests to forget, one after the other: a record that is only added to, and every earlier request again",
        _ledger,
        (
            option("folder", "the ledger's folder", type=Path, metavar="DIR"),
            option(
                "action",
                "add, request, show, check or reverify",
                choices=("add", "request", "show", "check", "reverify"),
            ),
            option("target", "request: a recipe; add: a run folder", nargs="?", metavar="RECIPE_OR_RUN"),
            option("--id", "id of the request: a case number, no name of a person"),
            option("--received", "day on which the request came in, such as 2026-03-31 (default: today)"),
            option(
                "--accept", "take the weights over whatever the verdict is; the record says so", action="store_true"
            ),
            option("--suite", "what earlier requests are measured with, as for evaluate (default: all)", default="all"),
            option("--head", "check: a hash that was noted earlier; the record must still hold it"),
            _RESUME,
            _JSON,
        ),
        recipe=True,
    ),
    "recipes": Command("the recipes that ship with the package", _recipes),
}
