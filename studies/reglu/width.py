"""Whether ROL helps a wider model: NPO from RILA's start with and without it, in a small world at three widths.

    python studies/reglu/width.py [--out DIR] [--max-minutes M] [--threads N]

Twenty authors, five of them forgotten, one original and one gold for each width; two rates and two seeds each, none
tuned. Rows lie below ``--out`` (default ``studies-out/reglu``) in ``widths``; a row that is there is not run again.
``run.py --page`` shows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from rows import Row
from study import Size, Study, collect

from thinned import tofu_tiny

WIDTHS = (128, 256, 512)
STARTS = ("rila", "rila+rol")
#: Shares of the rate that the study's first look takes.
RATES, SEEDS = (1.0, 0.4), (0, 1)
SPLIT = "forget05"
#: What the page shows of a row; and the object of all rows in the page's twin.
COLUMNS = ("forget_probability", "retain_probability", "relearned_probability", "entanglement")
NAME = "widths"


def studies(out: Path, threads: int = 1) -> Iterator[tuple[int, Study]]:
    """A study for each width, with models of its own."""
    for width in WIDTHS:
        world = dataclasses.replace(tofu_tiny.QUICK, width=width)
        size = Size(world, steps=40, measured=100, generate=0, trials=0)
        yield width, Study(out / "widths" / str(width), size, threads=threads)


def rows(study: Study, seed: int) -> Iterator[Row]:
    """What is run at each width; the untouched rows are so few that all are measured."""
    whole = {
        "data.untouched": str(study.tiny / SPLIT / "untouched.jsonl"),
        "data.utility": {},
        "evaluate.rewordings": False,
    }
    for rate, start in itertools.product(RATES, STARTS):
        yield Row(f"npo-{start}-{rate:g}-s{seed}", "npo", start, SPLIT, seed, "width", whole, rate)


def found(study: Study) -> dict[str, list[dict]]:
    """Width -> its rows, with what is shown of them: those of the twin, and those below the study's folder."""
    out = {width: rows for width, rows in study.shown.get(NAME, {}).items() if width != "name"}
    for width, small in studies(study.out):
        own = out.get(str(width), [])
        for row in collect(small.out).values():
            if row["name"] not in {r["name"] for r in own}:
                brief = {k: row[k] for k in ("name", "group", "start", "lr", "seed", "commit") if k in row}
                own.append({**brief, "metrics": {m: row["metrics"][m] for m in COLUMNS if m in row["metrics"]}})
        if own:
            out[str(width)] = own
    return out


def main() -> None:
    """Run what is missing, within the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "reglu")
    parser.add_argument("--max-minutes", type=float, default=60, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    end = time.monotonic() + 60 * given.max_minutes
    for seed, (width, study) in itertools.product(SEEDS, studies(given.out.resolve(), given.threads)):
        for row in rows(study, seed):
            if not study.done(row) and time.monotonic() < end:
                start = time.monotonic()
                study.run(row)
                print(f"{width} {row.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
