"""The JSON twin of a study's page: an object for each row, so that no row is run twice, whatever machine goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> object; empty where there is no twin yet."""
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line for each object, so that a new row is a new line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
