"""tofu-tiny as this study reads it: the models and splits of `studies/clreg`, two of the measured sides cut down.

Rewordings of never-seen rows are read by no number here, and of the untouched rows every fourth is measured (five
questions of each of the 20 authors), so that all 200 forgotten and all 200 never-seen questions can be.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "clreg"))

import tofu_tiny

from excise.errors import UsageError

EVERY = 4


def models(folder: Path, world: tofu_tiny.World, *names: str) -> None:
    """Train the models that are missing; another worker may be at it."""
    for name in names:
        while True:
            try:
                tofu_tiny.train(folder, name, world)
                break
            except UsageError:  # the folder is locked
                time.sleep(5)


def sides(folder: Path, split: str, out: Path) -> dict[str, str]:
    """Paths of the sides of a split, those that are cut down written below ``out``."""
    given = {side: folder / split / f"{side}.jsonl" for side in ("forget", "retain")}
    for side, step in (("untouched", EVERY), ("never_seen", 1)):
        given[side] = out / "sides" / split / f"{side}.jsonl"
        if not given[side].is_file():
            rows = [json.loads(line) for line in (folder / split / f"{side}.jsonl").read_text().splitlines()][::step]
            if side == "never_seen":
                rows = [{k: row[k] for k in ("question", "answer", "group")} for row in rows]
            tofu_tiny.save(given[side], rows)
    return {side: str(path) for side, path in given.items()}
