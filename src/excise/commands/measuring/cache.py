"""What was measured of a model, kept for the next run that asks the same: many runs share an original and a gold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from excise import files, recipe
from excise.errors import IntegrityFailed
from excise.metrics.table import Table
from excise.metrics.table import load as load_table
from excise.metrics.table import save as save_table
from excise.records import Record, fingerprint

States = dict[str, dict[int, np.ndarray]]
Curves = dict[str, list[float]]
#: Keys of a recipe's ``evaluate`` that do not decide what is kept here.
_ELSEWHERE = ("gold", "cache", "include_text", "map", "batch_tokens", "tasks", "muse", "attacks")


def entry(root: Path, model: str, records: Mapping[str, list[Record]], settings: recipe.Recipe) -> Path | None:
    """Where the measurements of a local model lie: named by its files, the rows, and how they are measured.

    None for a model on the hub: its files are not at hand to be hashed.
    """
    weights = hashes(model)
    return root / identity(weights, records, settings) if weights else None


def identity_of(model: str, records: Mapping[str, list[Record]], settings: recipe.Recipe) -> str:
    """`identity` of a local model or, by name and revision alone, of one on the hub."""
    return identity(hashes(model) or [model, settings.model.revision], records, settings)


def hashes(model: str) -> list[Any]:
    """The hashes of a local model's files of weights; none of a model on the hub."""
    folder = Path(model) / "model" if (Path(model) / "manifest.json").is_file() else Path(model)
    return [files.sha256(path) for path in sorted(folder.glob("*.safetensors"))]


def identity(weights: list[Any], records: Mapping[str, list[Record]], settings: recipe.Recipe) -> str:
    """A name for everything that decides what is measured: weights, rows, and how they are measured."""
    options = recipe.plain(settings.evaluate)
    asked = {k: v for k, v in options.items() if k not in _ELSEWHERE}
    data = recipe.plain(settings.data)
    # The attack's rate is the run's own where the recipe gives none; nothing else of a run's training counts here.
    attack = (settings.evaluate.relearn_lr or settings.optimiser.lr) if settings.evaluate.relearn_steps else None
    key = json.dumps([
        weights,
        {side: fingerprint(rows) for side, rows in records.items()},
        {k: v for k, v in asked.items()}, attack, settings.seed,
        {k: data[k] for k in ("template", "chat", "max_length", "truncate")}, settings.model.task,
    ], sort_keys=True)  # fmt: skip
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def load(folder: Path) -> tuple[dict[str, Table], States, Curves] | None:
    """Measurements that `save` wrote, or None where there are none or they are not whole."""
    from safetensors.numpy import load_file

    try:
        files.verify(folder)
    except IntegrityFailed:
        return None
    tables = {p.stem: load_table(p) for p in sorted((folder / "tables").glob("*.safetensors"))}
    states: States = {}
    if (folder / "states.safetensors").is_file():
        for name, values in load_file(folder / "states.safetensors").items():
            side, layer = name.rsplit("/", 1)
            states.setdefault(side, {})[int(layer)] = values
    return tables, states, json.loads((folder / "curves.json").read_text())


def save(folder: Path, tables: Mapping[str, Table], states: States, curves: Curves) -> None:
    """Write measurements whole."""
    from safetensors.numpy import save_file

    with files.staged(folder) as aside:
        (aside / "tables").mkdir()
        for side, table in tables.items():
            save_table(table, aside / "tables" / f"{side}.safetensors")
        flat = {f"{s}/{layer}": np.ascontiguousarray(v) for s, own in states.items() for layer, v in own.items()}
        if flat:
            save_file(flat, aside / "states.safetensors")
        (aside / "curves.json").write_text(json.dumps(curves))
