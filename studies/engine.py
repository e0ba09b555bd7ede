"""The engine as the studies use it: which one ran a row, what that cost, and runs whose stopping rule found nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Clock(Progress):
    """Wall and CPU seconds of each stage."""

    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Any]:
        """A stage that is also timed on the CPU, all threads together."""
        start = time.process_time()
        try:
            with super().stage(name, total) as advance:
                yield advance
        finally:
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - start

    def cost(self, *stages: str) -> dict[str, float]:
        """Seconds of the stages whose names begin so."""
        return {
            kind: sum(v for k, v in taken.items() if k.startswith(stages))
            for kind, taken in (("cpu", self.cpu), ("wall", self.seconds))
        }


def unlearn(settings: Recipe, folder: Path) -> float | None:
    """Run, or go on; where no step was admissible, the row is the model of the last one, as the run's record says.

    Returns:
        Processor seconds of the unlearning alone; None where it had been begun before, so that they are not known.

    Raises:
        NotShown: Nothing was measured.
    """
    clock, begun = Clock(quiet=True), (folder / "manifest.json").is_file()
    try:
        excise.run(settings, out=folder, resume=True, progress=clock)
    except NotShown:
        if not (folder / "results.json").is_file():
            raise
    return None if begun else clock.cost("unlearn")["cpu"]
