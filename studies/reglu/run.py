"""The ReGLU study: where an adapter starts and what holds it, each with its own rate, beside the gold; resumable.

    python studies/reglu/run.py [--out DIR] [--tiny DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there, or in the page's JSON twin, is not run again
(``--anew``: the twin is not asked). ``--tiny`` is a folder of
tofu-tiny's data and models that another study has trained (default ``OUT/tiny``: trained where they are missing).
``--page`` writes ``docs/results/reglu.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look at
three rows of a smaller world; its page lies beside its rows.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import rows as listed
from rows import Row
from study import SIZES, Study

import page
import twin


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of rows (default studies-out/reglu[-quick])")
    parser.add_argument("--tiny", type=Path, help="folder of tofu-tiny's data and models (default OUT/tiny)")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="tiny")
    parser.add_argument("--max-minutes", type=float, default=90, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, of --workers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", help="only rows whose name this regular expression finds")
    parser.add_argument("--commit", help="how rows name the engine, where the code is no clone")
    parser.add_argument("--anew", action="store_true", help="run rows again that the page's twin has")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, within the time given."""
    given = arguments()
    import torch

    torch.set_num_threads(given.threads)
    out = given.out or Path("studies-out") / ("reglu" if given.size == "tiny" else "reglu-quick")
    shown = {} if given.anew or given.size != "tiny" else twin.read(page.TWIN)
    study = Study(out.resolve(), SIZES[given.size], given.tiny, given.threads, given.commit or "", shown)
    end = time.monotonic() + 60 * given.max_minutes
    while not given.page and (row := _next(study, given)):
        if time.monotonic() > end:
            print("out of time; run again to go on", file=sys.stderr)
            break
        start = time.monotonic()
        if given.size == "tiny" and given.worker == 0 and (row.group, row.split) != ("main", "forget10"):
            study.costs()
        study.run(row)
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
    if given.page or given.worker == 0:
        page.write(study, docs=given.size == "tiny")


def _next(study: Study, given: argparse.Namespace) -> Row | None:
    """The first missing row of a worker; all rows of a loss and start go to one, which tunes them."""
    pairs = [(loss, start) for start in listed.STARTS for loss in listed.LOSSES]
    for row in study.rows():
        mine = pairs.index((row.loss, row.start)) % given.workers == given.worker
        wanted = not given.only or re.search(given.only, row.name)
        if mine and wanted and not study.done(row) and (row.group == "main" or study.both_tuned):
            return row
    return None


if __name__ == "__main__":
    main()
