"""What an unfinished evaluation has measured so far: a file for each model and instrument, kept until all is done.

An evaluation that was killed goes on from them. They hold scores and numbers only: never hidden states, which a sweep
gives again, and texts only where the recipe asked to keep texts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from excise import files
from excise.commands.progress import Progress
from excise.metrics.table import Table


@dataclass(frozen=True)
class Part:
    """What one instrument gave: arrays by name, and whatever else JSON can hold."""

    arrays: Mapping[str, NDArray] = field(default_factory=dict)
    extra: Any = None


def of_tables(tables: Mapping[str, Table]) -> Part:
    """Tables by side as one part; `tables_of` reads them."""
    arrays = {f"{side}/{name}": v for side, table in tables.items() for name, v in table.columns.items()}
    return Part(arrays, {side: [table.rows, list(table.classes)] for side, table in tables.items()})


def tables_of(part: Part) -> dict[str, Table]:
    """The tables that a part holds."""
    columns: dict[str, dict[str, NDArray]] = {side: {} for side in part.extra}
    for name, values in part.arrays.items():
        side, column = name.split("/", 1)
        columns[side][column] = values
    return {side: Table(side, rows, columns[side], tuple(classes)) for side, (rows, classes) in part.extra.items()}


@dataclass(frozen=True)
class Parts:
    """The parts of one model.

    Args:
        folder: Where they lie, named by all that decides the numbers (`cache.identity`); None: nothing is kept.

    Example:
        >>> Parts().kept("answer", "ask somebody", Progress(quiet=True), lambda: Part(extra=42)).extra
        42
    """

    folder: Path | None = None

    def kept(self, name: str, stage: str, progress: Progress, make: Callable[[], Part]) -> Part:
        """The part ``name`` as it was saved, else made now and saved; to be called within ``stage`` of ``progress``.

        The seconds that a saved part once took are added to the stage's. A file that cannot be read is made anew.
        """
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        found = _load(path) if path is not None else None
        if found is not None:
            part, seconds = found
            progress.seconds[stage] = progress.seconds.get(stage, 0.0) + seconds
            return part
        start = time.perf_counter()
        part = make()
        if path is not None:
            _save(path, part, time.perf_counter() - start)
        return part


def _save(path: Path, part: Part, seconds: float) -> None:
    from safetensors.numpy import save

    header = json.dumps({"extra": part.extra, "seconds": seconds})
    files.write_bytes(path, save({k: v.copy() for k, v in part.arrays.items()}, metadata={"part": header}))


def _load(path: Path) -> tuple[Part, float] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            header = json.loads((f.metadata() or {})["part"])
            arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
            return Part(arrays, header["extra"]), float(header["seconds"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
