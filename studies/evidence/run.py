"""The evidence study: every method beside the gold on seven instruments, under attack, and judged; resumable.

    python studies/evidence/run.py [--out DIR] [--tiny DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--tiny`` is a folder of
tofu-tiny's data and models that another study has trained (default ``OUT/tiny``: trained where they are missing).
``--page`` writes ``docs/results/evidence.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look
at a smaller world; its page lies beside its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from methods import ENDS, METHODS
from rowwise import arguments, collect, run_rows
from study import SIZES, Row, Size, Study


def rows(size: Size) -> Iterator[Row]:
    """Every row, the most telling first."""
    if size is SIZES["quick"]:
        yield from (Row(method, size.split) for method in ("gold2", "simnpo+clreg", "default"))
        return
    first = ("gold2", "default", "strangers", "simnpo+clreg", "simnpo", "ihl+rila", "npo", "clreg+rila", "original")
    yield from (Row(method, size.split) for method in first)
    yield from (Row(method, size.split, attacked=True) for method in ("gold2", "default", "simnpo+clreg", "ihl+rila"))
    for split in ("forget05", "forget01"):
        yield from (Row(method, split) for method in ("default", "gold2", "strangers"))
    for seed in (1, 2):
        yield from (Row(method, size.split, seed) for method in METHODS)
    yield from (Row(method, size.split, attacked=True) for method in (*METHODS, *ENDS))


def main() -> None:
    """Run what is missing, then write the page."""
    given = arguments(__doc__)
    out = given.out or Path("studies-out") / ("evidence" if given.size == "tiny" else "evidence-quick")
    study = Study(out.resolve(), SIZES[given.size], given.tiny)
    if not given.page:
        run_rows(study, rows(study.size), given)
    import page

    found = [row for row in collect(study.out) if not row["label"]]  # pieces left out are the gold study's
    page.write(found, study.out, docs=given.size == "tiny")


if __name__ == "__main__":
    main()
