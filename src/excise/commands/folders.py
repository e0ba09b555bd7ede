"""The run folder of a command: whether it may be used, what was begun in it, and who writes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excise import artifacts, files, recipe, verdict
from excise.commands.starting import limits
from excise.errors import IntegrityFailed, UsageError


def record(folder: str | None) -> artifacts.Manifest | None:
    """The record of the run that was begun in a folder."""
    if folder is None or not (Path(folder) / "manifest.json").is_file():
        return None
    return artifacts.read_manifest(artifacts.RunFolder(Path(folder)))


@contextmanager
def opened(settings: recipe.Recipe, *, resume: bool) -> Iterator[artifacts.RunFolder]:
    """The run folder, locked: new or empty, or with ``resume`` one that was begun with the same recipe.

    Raises:
        UsageError: No folder is named, or it is not empty and the run is not resumed.
        IntegrityFailed: The folder was begun with another recipe.
    """
    if not main_rank():  # the first rank may have begun to write already
        yield artifacts.RunFolder(Path(settings.out or ""))
        return
    run, _ = standing(settings, resume=resume)
    run.root.mkdir(parents=True, exist_ok=True)
    with files.locked(run.root):
        files.write_text(run.recipe, recipe.dump(settings))
        yield run


def standing(settings: recipe.Recipe, *, resume: bool) -> tuple[artifacts.RunFolder, bool]:
    """The run folder as it is, nothing written, and whether the run in it is done; a done run has all its files.

    Raises:
        UsageError: A number of the recipe is out of range, no folder is named, or it is not empty and the run is not
            resumed.
        IntegrityFailed: The folder was begun with another recipe, or a file of the done run has changed.
    """
    limits.check(settings)
    if not settings.out:
        raise UsageError("name a folder for the run: --out DIR")
    run = artifacts.RunFolder(Path(settings.out))
    if run.root.exists() and not run.root.is_dir():
        raise UsageError(f"{settings.out}: is a file; name a folder")
    used = run.root.is_dir() and any(p.name != files.LOCK for p in run.root.iterdir())
    if used and not resume:
        raise UsageError(f"{settings.out}: the folder is not empty; resume with --resume or name another")
    if used and run.recipe.is_file() and recipe.load(str(run.recipe)) != settings:
        raise IntegrityFailed(f"{settings.out}: begun with another recipe; resume with the same one")
    record = artifacts.read_manifest(run) if used and run.manifest.is_file() else artifacts.Manifest()
    fixed = (record.get("verify") or {}).get("sha256")
    if fixed is not None and fixed != verdict.digest(settings.verify):
        raise IntegrityFailed(f"{settings.out}: begun with other thresholds (verify); resume with the same ones")
    if record.get("status") != "done":
        return run, False
    changed = artifacts.changed_files(run, record.get("files", {}))
    if changed:
        raise IntegrityFailed(f"{settings.out}: file {changed[0]!r} is missing or not what the run wrote")
    return run, True


def stopping_of(folder: str | None) -> Path | None:
    """Where the stopping rule of a run keeps what it saw."""
    return artifacts.RunFolder(Path(folder)).stopping if folder else None


def thresholds(settings: recipe.Recipe, earlier: str | None = None) -> dict[str, str]:
    """The hash of the thresholds, for a record that is written before anything is measured.

    Args:
        settings: The recipe.
        earlier: The run folder that is measured again: the hash that stands in its record counts.
    """
    begun = record(earlier) or artifacts.Manifest()
    return {"sha256": (begun.get("verify") or {}).get("sha256") or verdict.digest(settings.verify)}


def main_rank() -> bool:
    """Whether this process writes."""
    return int(os.environ.get("RANK", "0")) == 0


def command() -> str:
    """The command line, where there was one."""
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.name == "excise" or program.parts[-2:] == ("excise", "__main__.py")
    return shlex.join(["excise", *sys.argv[1:]]) if ours else "python"
