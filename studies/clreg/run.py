"""The CLReg study: every base objective with and without the regulariser, beside the gold; row by row, resumable.

    python studies/clreg/run.py [--out DIR] [--quick | --full] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--page`` writes
``docs/results/clreg.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look in five minutes on two
cores; ``--full`` is the overnight one: all 4,000 questions of TOFU, a Llama of 6 blocks and width 512, SimNPO with and
without CLReg, three seeds (about seven hours of one core; ``--limit 8`` tries out that it runs). Both write their page
beside their rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import aligned
import hardness
import rows as listed
from rows import Row

import engine
import tofu_tiny
from excise import artifacts, recipe
from excise.commands.progress import Progress
from excise.commands.running import run as unlearn
from excise.commands.tuning import tune
from excise.errors import UsageError


@dataclass(frozen=True)
class Size:
    """How large a study is: its world, its rows, how long each unlearns and how many rows of a side are measured."""

    world: tofu_tiny.World
    rows: Callable[[], Iterator[Row]]
    epochs: int = 10
    measured: int = 100
    generate: int = 48
    trials: int = 4


SIZES = {
    "tiny": Size(tofu_tiny.TINY, listed.whole),
    "quick": Size(tofu_tiny.QUICK, listed.quick, epochs=5, measured=40, generate=0, trials=0),
    "full": Size(tofu_tiny.FULL, listed.full, measured=400, trials=0),
}
#: Without trials: what tofu-tiny's trials chose for SimNPO.
UNTUNED = {"optimiser.lr": 1e-3, "objective.regularise.clreg.weight": 1.0}


class Study:
    """Folders and settings that all rows share."""

    def __init__(self, out: Path, size: Size, *, limit: int | None = None) -> None:
        self.out, self.size, self.limit = out, size, limit
        self.tiny = out / "tiny"

    def models(self, *names: str) -> None:
        """Train the models that are missing; another worker may be at it."""
        for name in names:
            while True:
                try:
                    tofu_tiny.train(self.tiny, name, self.size.world, limit=self.limit)
                    break
                except UsageError:  # the folder is locked
                    time.sleep(5)

    def recipe(self, base: str, split: str, *, clreg: bool) -> dict[str, Any]:
        """A row's recipe as plain values, before tuning."""
        forget, retain = listed.BASES[base]
        sides = self.tiny / split
        given = [s for s in ("forget", "retain", "untouched", "never_seen") if (sides / f"{s}.jsonl").is_file()]
        return {
            # One precision for all rows: what a probe finds faster may differ from day to day.
            "model": {"name": str(self.tiny / "models" / "original" / "model"), "precision": "fp32"},
            "data": {
                **{side: str(sides / f"{side}.jsonl") for side in given},
                "utility": {n: str(self.tiny / f"{n}.jsonl") for n in ("real_authors", "world_facts")},
                "limit": self.limit,
            },
            "objective": {"forget": forget, "retain": retain, "regularise": {"clreg": listed.CLREG} if clreg else {}},
            "schedule": {"epochs": self.size.epochs, "forget_batch": 16, "retain_batch": 16},
            "optimiser": {"lr": 5e-4, "warmup": 0.1, "decay": "linear"},
            "evaluate": {
                "gold": str(self.tiny / "models" / f"gold-{split}" / "model"), "max_rows": self.size.measured,
                "generate": self.size.generate, "relearn_lr": 5e-4, "map": "none",
                "cache": str(self.out / "cache"), "batch_tokens": 8192,
            },
            "checkpoint_every": 0, "log_every": 5,
        }  # fmt: skip

    def tuned(self, base: str, *, clreg: bool) -> dict[str, Any]:
        """Best of four trials on authors 86-90 (5 %), carried over to every reported split."""
        if not self.size.trials:
            return {k: v for k, v in UNTUNED.items() if clreg or "clreg" not in k}
        name = f"{base}{'+clreg' if clreg else ''}"
        done = self.out / "tuned" / f"{name}.json"
        if not done.is_file():
            self.models("original", "gold-tune05")
            values = self.recipe(base, "tune05", clreg=clreg)
            values |= {"tune": {"space": listed.space(base, clreg=clreg)}, "out": str(self.out / "tuning" / name)}
            found = {**tune(recipe.build(values), self.size.trials), "commit": engine.commit()}
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(found))
        return json.loads(done.read_text())["best"]

    def settings(self, row: Row) -> recipe.Recipe:
        """A row's recipe: the base, what was tuned, what it changes."""
        values = self.recipe(row.base, row.split, clreg=row.clreg)
        values["model"]["name"] = str(self.tiny / "models" / row.start / "model")
        changes = {**self.tuned(row.base, clreg=row.clreg), **row.changes, "seed": row.seed}
        return recipe.changed(recipe.build(values), changes)

    def run(self, row: Row) -> None:
        """Tune (once per base), unlearn, measure; leaves a run folder with ``row.json`` as its last file."""
        folder = self.out / "rows" / row.name
        if (folder / "row.json").is_file():
            return
        self.models("original", f"gold-{row.split}")
        if row.start == "aligned":
            aligned.train(self.tiny)
        settings = self.settings(row)
        unlearn(settings, out=folder, resume=True, progress=Progress(quiet=True))
        weight = settings.objective.regularise.get("clreg", {}).get("weight")
        own = {**row.__dict__, "lr": settings.optimiser.lr, "clreg_weight": weight, "commit": engine.commit()}
        if row.start == "aligned":
            places = {name: self.tiny / "models" / name / "model" for name in ("original", "aligned")}
            found = {name: aligned.preference(self.tiny, place) for name, place in places.items()}
            own["preference"] = {**found, "after": aligned.preference(self.tiny, folder / "model")}
        (folder / "row.json").write_text(json.dumps(own))


def collect(out: Path) -> list[dict[str, Any]]:
    """One object per finished row, and one for the original, the aligned model and the gold of each split."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "rows").glob("*/row.json")):
        row = json.loads(path.read_text())
        run = artifacts.open_run(path.parent)
        results, log = artifacts.read_results(run), artifacts.read_log(run)
        for role, name in (("original", row["start"]), ("gold", "gold")):
            own = {k: v.__dict__ for k, v in results.models.get(role, {}).items()}
            group = "aligned start" if name == "aligned" else name
            found[f"{name}-{row['split']}"] = {"name": name, "split": row["split"], "group": group, "metrics": own}
        own = {k: v.__dict__ for k, v in results.models["unlearned"].items()}
        monitor = log[-1].get("monitor", {}) if log else {}
        found[row["name"]] = {**row, "metrics": own, "seconds": results.seconds, "monitor": monitor}
    return list(found.values())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of rows and models (default studies-out/clreg[-SIZE])")
    sizes = parser.add_mutually_exclusive_group()
    for name in ("quick", "full"):
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, default="tiny")
    parser.add_argument("--max-minutes", type=float, default=100, help="begin no new row after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, of --workers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="regular expression: run only the rows whose name it is found in")
    parser.add_argument("--limit", type=int, help="at most so many rows of each side: a smoke test")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, within the time given."""
    given = arguments()
    import torch

    torch.set_num_threads(given.threads)
    size, tiny = SIZES[given.size], given.size == "tiny"
    out = given.out or Path("studies-out") / ("clreg" if tiny else f"clreg-{given.size}")
    study, end = Study(out, size, limit=given.limit), time.monotonic() + 60 * given.max_minutes
    for i, row in enumerate(() if given.page else size.rows()):
        own = i // 2 % given.workers == given.worker  # a base and its regularised twin go to one worker
        if not own or not re.search(given.only, row.name):
            continue
        if time.monotonic() > end:
            print("out of time; run again to go on", file=sys.stderr)
            break
        start = time.monotonic()
        study.run(row)
        if tiny and row.group == "aligned" and row.seed == 0:
            hardness.measure(out, rows=size.measured)
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
    if given.page or given.worker == 0:
        import page

        page.write(collect(out), out, docs=tiny and not given.limit, missing=_missing(study))


def _missing(study: Study) -> list[Row]:
    return [row for row in study.size.rows() if not (study.out / "rows" / row.name / "row.json").is_file()]


if __name__ == "__main__":
    main()
