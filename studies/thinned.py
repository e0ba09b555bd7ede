"""tofu-tiny with its sides thinned out to what a study needs.

All forgotten and never-seen questions are measured, which PrivLeak needs; what costs most is scoring the rewordings of
each, so that they are left out where no number reads them or where fewer will do.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import tofu_tiny
from excise.errors import UsageError

REWORDED = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")
#: One row in so many is kept: of the retained ones (a run draws 480), of those that nobody touches (3 of each of 20
#: authors, the rest repeats what these show), and of general knowledge.
ONE_IN = {"forget": 1, "retain": 3, "untouched": 7, "never_seen": 1, "real_authors": 2, "world_facts": 2}
#: Forgotten rows that keep their rewordings: forget quality's n.
RATIOS = 100


def models(folder: Path, world: tofu_tiny.World, *names: str) -> None:
    """Train the models that are missing; another worker may be at it."""
    for name in names:
        while True:
            try:
                tofu_tiny.train(folder, name, world)
                break
            except UsageError:  # the folder is locked
                time.sleep(5)


def sides(folder: Path, split: str, out: Path, *, whole: tuple[str, ...] = ()) -> dict[str, str]:
    """Paths of the sides of a split, thinned out and written below ``out``; those named ``whole`` are left alone."""
    given = {side: folder / split / f"{side}.jsonl" for side in ("forget", "retain", "untouched", "never_seen")}
    return {s: str(p if s in whole else _thinned(p, out / "sides" / split)) for s, p in given.items()}


def utility(folder: Path, out: Path) -> dict[str, str]:
    """Paths of the sets of general knowledge."""
    return {name: str(_thinned(folder / f"{name}.jsonl", out / "sides")) for name in ("real_authors", "world_facts")}


def _thinned(path: Path, folder: Path) -> Path:
    place = folder / path.name
    if not place.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()][:: ONE_IN[path.stem]]
        every = {"forget": -(-len(rows) // RATIOS), "never_seen": 0}.get(path.stem, 1)
        tofu_tiny.save(place, [row if every and i % every == 0 else _bare(row) for i, row in enumerate(rows)])
    return place


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in REWORDED}
