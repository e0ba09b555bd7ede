"""What a command of the command line is: its help, what it takes, and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Override = tuple[str, str]
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

    A call returns the exit code, None for 0. ``recipe`` commands also take the flags of `SHORTHAND` and any
    ``--key.sub value`` of a recipe.
    """

    help: str
    call: Callable[[argparse.Namespace, list[Override]], int | None]
    arguments: tuple[Argument, ...] = ()
    recipe: bool = False


def option(name: str, help: str, **settings: Any) -> Argument:
    """One argument, its help first."""
    return Argument(name, {"help": help, **settings})
