"""The engine as the studies use it: which one ran a row, and runs whose stopping rule found nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import excise
from excise.commands.progress import Progress
from excise.errors import NotShown
from excise.recipe import Recipe


def commit() -> str:
    """Commit of the engine, marked where its files were changed since; its version where it is no clone."""
    home = Path(excise.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", home, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {excise.__version__}"


def unlearn(settings: Recipe, folder: Path) -> None:
    """Run, or go on; where no step was admissible, the row is the model of the last one, as the run's record says.

    Raises:
        NotShown: Nothing was measured.
    """
    try:
        excise.run(settings, out=folder, resume=True, progress=Progress(quiet=True))
    except NotShown:
        if not (folder / "results.json").is_file():
            raise
