"""The evidence study: every method beside the gold on seven instruments, under attack, and judged; resumable.

    python studies/evidence/run.py [--out DIR] [--tiny DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--tiny`` is a folder of
tofu-tiny's data and models that another study has trained (default ``OUT/tiny``: trained where they are missing).
``--page`` writes ``docs/results/evidence.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look
at a smaller world; its page lies beside its rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from methods import ENDS, METHODS
from study import SIZES, Row, Size, Study

from excise import artifacts
from excise.artifacts import RunFolder


def rows(size: Size) -> Iterator[Row]:
    """Every row, the most telling first."""
    if size is SIZES["quick"]:
        yield from (Row(method, size.split) for method in ("gold2", "simnpo+clreg", "default"))
        return
    first = ("gold2", "default", "simnpo+clreg", "simnpo", "ihl+rila", "npo", "clreg+rila", "original")
    yield from (Row(method, size.split) for method in first)
    yield from (Row(method, size.split, attacked=True) for method in ("gold2", "default", "simnpo+clreg", "ihl+rila"))
    for split in ("forget05", "forget01"):
        yield from (Row(method, split) for method in ("default", "gold2"))
    for seed in (1, 2):
        yield from (Row(method, size.split, seed) for method in METHODS)
    yield from (Row(method, size.split, attacked=True) for method in (*METHODS, *ENDS))


def collect(out: Path) -> list[dict[str, Any]]:
    """One object per finished row: its settings, every model's numbers, the verdict, and the attacks if it has any."""
    found = []
    for path in sorted((out / "rows").glob("*/row.json")):
        results = artifacts.read_results(RunFolder(path.parent))
        numbers = {role: {k: v.__dict__ for k, v in own.items()} for role, own in results.models.items()}
        verdict = path.parent / "verdict.json"
        attacked = path.parent / "attacked" / "results.json"
        found.append({
            **json.loads(path.read_text()), "name": path.parent.name, "metrics": numbers, "seconds": results.seconds,
            "verdict": json.loads(verdict.read_text()) if verdict.is_file() else None,
            "attacks": json.loads(attacked.read_text())["models"] if attacked.is_file() else None,
        })  # fmt: skip
    return found


def arguments(doc: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of rows (default below studies-out)")
    parser.add_argument("--tiny", type=Path, help="folder of tofu-tiny's data and models (default OUT/tiny)")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="tiny")
    parser.add_argument("--max-minutes", type=float, default=150, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only rows whose name this regular expression finds")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


def run_rows(study: Study, wanted: Iterator[Row], given: argparse.Namespace) -> None:
    """Run what is missing, within the time given."""
    import torch

    torch.set_num_threads(given.threads)
    end = time.monotonic() + 60 * given.max_minutes
    for row in wanted:
        if study.done(row) or not re.search(given.only, row.name):
            continue
        if time.monotonic() > end:
            print("out of time; run again to go on", file=sys.stderr)
            return
        start = time.monotonic()
        study.run(row)
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Run what is missing, then write the page."""
    given = arguments(__doc__)
    out = given.out or Path("studies-out") / ("evidence" if given.size == "tiny" else "evidence-quick")
    study = Study(out.resolve(), SIZES[given.size], given.tiny)
    if not given.page:
        run_rows(study, rows(study.size), given)
    import page

    page.write(collect(study.out), study.out, docs=given.size == "tiny")


if __name__ == "__main__":
    main()
