"""The command line: arguments read, one command called, and one line for a refusal."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from excise import __version__
from excise.cli.command import SHORTHAND, Argument, Command, Override
from excise.cli.table import COMMANDS
from excise.errors import ExciseError, UsageError

# 128 + the signal's number, as shells report it.
INTERRUPTED, BROKEN_PIPE = 130, 141


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
    return command.call(given, _shorthand(given) + overrides if command.recipe else []) or 0


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


def _complain(line: str, code: int) -> int:
    print(f"excise: {line}", file=sys.stderr)
    return code
