"""The page of the Alice study: one table, the settings, and what they say; written from rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(target: Path, done: Mapping[str, Row], methods: Sequence[str], *, quick: bool, missing: int) -> None:
    """placeholder"""
    target.mkdir(parents=True, exist_ok=True)
    (target / "alice.json").write_text(json.dumps(list(done.values()), indent=1) + "\n")
