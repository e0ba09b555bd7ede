"""Requests one after the other: does what was forgotten come back, with and without CLReg and ReGLU; resumable.

    python studies/requests/run.py [--out DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Ten requests, each for two people of the embedded world, go through `excise ledger`; after every second one the model is
trained on new people. Each arm is a ledger of its own, beside two that forget nothing and get the same other training:
the original, and a gold that never saw any of the people. What is there is not made again. ``--page`` writes
``docs/results/requests.md`` and its JSON twin from whatever there is; ``--quick`` is a first look at three requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from study import ARMS, BESIDE, SIZES, Study, write_json

import engine
import page


def main() -> None:
    """Run what is missing, within the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of ledgers (default studies-out/requests[-quick])")
    parser.add_argument("--quick", action="store_true", help="three requests of a small world")
    parser.add_argument("--only", help="only arms whose name this regular expression finds")
    parser.add_argument("--max-minutes", type=float, default=60, help="begin no new step after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    out = given.out or Path("studies-out") / ("requests-quick" if given.quick else "requests")
    study, begun = Study(out.resolve(), SIZES["quick" if given.quick else "whole"]), time.monotonic()
    if not given.page:
        write_json(study.out / "study.json", {"commit": engine.commit(), **dataclasses.asdict(study.size)})
        study.prepare()
    for arm in () if given.page else (*BESIDE, *ARMS):
        used = time.process_time()
        while not given.only or re.search(given.only, arm):
            if time.monotonic() - begun > 60 * given.max_minutes:
                print("out of time; run again to go on", file=sys.stderr)
                break
            if not study.step(arm):
                break
        print(f"{arm}: {time.process_time() - used:.0f} CPU s", flush=True)
    page.write(study, docs=not given.quick)


if __name__ == "__main__":
    main()
