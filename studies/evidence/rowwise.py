"""What a study that goes row by row needs around its rows: the command line, the loop, and what was found."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import Row, Study

from excise import artifacts
from excise.artifacts import RunFolder


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
