"""The command line: what each command takes, the hand-over to `excise.run`, and one line for a refusal."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from excise import __version__, terminal
from excise.errors import ExciseError, UsageError

if TYPE_CHECKING:
    from excise.recipe import Recipe

Override = tuple[str, str]
# 128 + the signal's number, as shells report it.
INTERRUPTED, BROKEN_PIPE = 130, 141
# Short flags for the keys that a run without a recipe file needs.
SHORTHAND = {
    "--model": ("model.name", "hub id or folder of the model to change"),
    "--forget": ("data.forget", "rows to forget (JSONL, or hub:owner/name)"),
    "--retain": ("data.retain", "rows to keep"),
    "--never-seen": ("data.never_seen", "rows of the same kind that the model never saw"),
    "--gold": ("evaluate.gold", "a model trained without the rows to forget, where there is one"),
    "--out": ("out", "folder to write"),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a command, in argparse's own words."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """A command: its help, what it takes, and what it calls.

    ``recipe`` commands also take the flags of `SHORTHAND` and any ``--key.sub value`` of a recipe.
    """

    help: str
    call: Callable[[argparse.Namespace, list[Override]], None]
    arguments: tuple[Argument, ...] = ()
    recipe: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Codes: 0 done, 1 something failed, 2 usage, 3 input refused, 4 training stopped, 5 verification failed, 6 a file is
    not what its hash says, 7 not shown, 130 interrupted.

    Example:
        >>> main(["plan", "--model"])
        2
    """
    try:
        code = _command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except ExciseError as error:
        return _complain(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong; keep Python from complaining again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _complain(f"{error.strerror or str(error).splitlines()[0]}{where}", ExciseError.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    return code


def _command(argv: list[str]) -> int:
    parser = _Parser(prog="excise", description="Forget chosen records, keep the rest, and show how far both are true.")
    parser.add_argument("--version", action="version", version=f"excise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        for argument in _arguments(command):
            sub.add_argument(argument.name, **argument.settings)
        if command.recipe:
            sub.epilog = "Any key of a recipe can be set as well: --optimiser.lr 5e-5 --objective.forget.npo.beta 0.1"
    overrides: list[Override] = []
    if argv and argv[0] in COMMANDS and COMMANDS[argv[0]].recipe:
        argv, overrides = _split(argv, COMMANDS[argv[0]])
    try:
        given = parser.parse_args(argv)
    except SystemExit as ended:  # argparse leaves this way: 0 after --help, 2 after a mistake
        return ended.code if isinstance(ended.code, int) else UsageError.exit_code
    if given.command is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    command = COMMANDS[given.command]
    command.call(given, _shorthand(given) + overrides if command.recipe else [])
    return 0


class _Parser(argparse.ArgumentParser):
    """Argparse whose complaints are one line that begins like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"excise: {message} (see: {self.prog} --help)\n")


def _arguments(command: Command) -> list[Argument]:
    short = [Argument(flag, {"metavar": "X", "help": text}) for flag, (_, text) in SHORTHAND.items()]
    text = Argument("--include-text", {"action": "store_true", "help": "keep text of forget rows in folder and report"})
    return [*command.arguments, *(short if command.recipe else []), *([text] if command.recipe else [])]


def _split(argv: list[str], command: Command) -> tuple[list[str], list[Override]]:
    """Take the recipe keys out of the arguments. Argparse would read the value of a flag it does not know as a file."""
    known = {argument.name for argument in _arguments(command)} | {"--help"}
    rest, overrides, tokens = [], [], iter(argv)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if token == "--" or not token.startswith("--") or flag in known:
            rest.append(token)
            continue
        _check_key(flag, known)
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UsageError(f"{flag} needs a value: {flag} VALUE")
        overrides.append((flag.removeprefix("--"), value))
    return rest, overrides


def _check_key(flag: str, known: set[str]) -> None:
    """Refuse a flag that is neither ours nor the beginning of a recipe key; deeper keys are the recipe's to refuse."""
    from excise.recipe import Recipe

    sections = {f"--{field.name}" for field in fields(Recipe)}
    if flag.split(".")[0] not in sections:
        near = difflib.get_close_matches(flag, known | sections, 1)
        hint = f"; did you mean {near[0]}?" if near else " (recipe keys: " + ", ".join(sorted(sections)) + ")"
        raise UsageError(f"unknown option {flag}{hint}")


def _shorthand(given: argparse.Namespace) -> list[Override]:
    pairs = [(key, getattr(given, flag[2:].replace("-", "_"))) for flag, (key, _) in SHORTHAND.items()]
    # Overrides are read as YAML: quoted, a file called `1e5` or `yes` stays a name.
    quoted = [(key, json.dumps(value, ensure_ascii=False)) for key, value in pairs if value is not None]
    return quoted + ([("evaluate.include_text", "true")] if given.include_text else [])


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


def _recipes(given: argparse.Namespace, _: list[Override]) -> None:
    from importlib import resources

    from excise import recipe

    for name in recipe.shipped():
        first = (resources.files("excise") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<28} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


def _complain(line: str, code: int) -> int:
    print(f"excise: {line}", file=sys.stderr)
    return code


def _option(name: str, help: str, **settings: Any) -> Argument:
    return Argument(name, {"help": help, **settings})


_RECIPE = _option("recipe", "a recipe file, or a name that `excise recipes` lists", nargs="?", metavar="RECIPE")
_RESUME = _option("--resume", "go on from the last checkpoint in the folder", action="store_true")
_JSON = _option("--json", "print JSON", action="store_true")

COMMANDS = {
    "demo": Command(
        "train, forget and report on a small synthetic world: no network, no GPU, about a minute",
        _demo,
        (
            _option("--out", "folder to write (default: excise-demo)", type=Path, default=Path("excise-demo")),
            _option("--task", "qa: a language model; ner: a named-entity tagger (default: qa)", default="qa"),
            _option("--quick", "a smaller world, for a first look", action="store_true"),
            _option("--seed", "seed of the world and of the training", type=int, default=0),
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
            _option("--trials", "trials in all, earlier ones of the study included", type=int, required=True),
            _option("--study", "SQLite file of the study (default: beside the output)"),
            _option("--processes", "trials at a time", type=int, default=1),
        ),
        recipe=True,
    ),
    "evaluate": Command(
        "measure a model or a run folder",
        _evaluate,
        (
            _option("model", "hub id, model folder or run folder", metavar="MODEL_OR_RUN"),
            _option("--suite", "which set of metrics", default="tofu"),
            _option(
                "--tasks",
                "multiple-choice questions of suite mcq: JSONL files, or names such as wmdp_bio and mmlu",
                nargs="+",
                default=(),
                metavar="NAME_OR_FILE",
            ),
            _option("--against", "the gold: a model, or the folder of a run"),
            _option("--recipe", "the recipe that says which rows are which"),
            _option("--out", "folder to write", type=Path),
            _JSON,
        ),
    ),
    "score": Command(
        "metrics from saved tables alone: ours, TOFU's or OpenUnlearning's",
        _score,
        (
            _option("log", "folder of tables, eval_log_aggregated.json or TOFU_EVAL.json", metavar="LOG"),
            _option("--against", "the gold's log"),
            _JSON,
        ),
    ),
    "report": Command(
        "rebuild the report of a run folder", _report, (_option("run", "run folder", type=Path, metavar="RUN"),)
    ),
    "export": Command(
        "what a run made, for others to use: an adapter for the untouched base, or a whole model",
        _export,
        (
            _option("run", "run folder", type=Path, metavar="RUN"),
            _option("--to", "adapter or merged", choices=("adapter", "merged"), required=True),
            _option("--out", "folder to write", type=Path, required=True),
            _option("--rank", "cut the adapter's update to this rank; the error is measured", type=int, metavar="R"),
        ),
    ),
    "recipes": Command("the recipes that ship with the package", _recipes),
}
