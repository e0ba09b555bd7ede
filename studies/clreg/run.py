"""The CLReg study: every base objective with and without the regulariser, beside the gold; row by row, resumable.

    python studies/clreg/run.py --out studies-out/clreg [--quick] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--page`` writes
``docs/results/clreg.md`` and its JSON twin from whatever rows exist.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tofu_tiny

from excise import artifacts, recipe
from excise.commands.progress import Progress
from excise.commands.running import run as unlearn
from excise.commands.tuning import tune
from excise.errors import UsageError

Terms = dict[str, Any]

#: Forget and retain terms of each base; what the papers fix is fixed, the rate is tuned.
BASES: dict[str, tuple[Terms, Terms]] = {
    "graddiff": ({"ga": {}}, {"nll": {}}),
    "npo": ({"npo": {"beta": 0.1}}, {"nll": {}}),
    "simnpo": ({"simnpo": {"beta": 2.5}}, {"nll": {}}),
    # UNDIAL's code averages over all positions, which anchors the rest; masked as it should be it needs a retain term.
    "undial": ({"undial": {"beta": 10.0}}, {"nll": {}}),
    # epsilon about twice the original's own loss; the multiplier starts low because no warm-up fits so short a run.
    "pdu": ({"pdu": {}}, {"primal_dual": {"epsilon": 0.2, "eta": 5.0, "weight": 10.0, "warmup": 0.0}}),
}
#: Four tuning trials for each side of the comparison: rates for the base; rates x weights with the regulariser.
RATES = {"graddiff": [1e-5, 5e-5, 1e-4, 2e-4]}
RATES_DEFAULT = [2e-4, 5e-4, 1e-3, 2e-3]
WEIGHTS = {"npo": [1.0, 5.0]}
WEIGHTS_DEFAULT = [0.1, 1.0]
CLREG: Terms = {"temperature": 0.5, "weight": 0.1, "dropout": 0.1}


@dataclass(frozen=True)
class Row:
    """One run of the study: what it changes, on which split, with which seed."""

    name: str
    base: str
    split: str
    seed: int
    changes: dict[str, Any]
    group: str = "main"


class Study:
    """Folders and settings that all rows share."""

    def __init__(self, out: Path, *, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.tiny = out / "tiny"
        self.epochs = 2 if quick else 11
        self.progress = Progress()

    def models(self, split: str) -> None:
        """Train the original and the gold of a split where they are missing; another worker may be at it."""
        for name in ("original", f"gold-{split}"):
            while True:
                try:
                    tofu_tiny.train(self.tiny, name, epochs=self.epochs)
                    break
                except UsageError:  # the folder is locked
                    time.sleep(5)

    def recipe(self, base: str, split: str, *, clreg: Terms | None) -> dict[str, Any]:
        """A row's recipe as plain values, before tuning."""
        forget, retain = BASES[base]
        sides = self.tiny / split
        return {
            "model": {"name": str(self.tiny / "models" / "original" / "model")},
            "data": {
                **{side: str(sides / f"{side}.jsonl") for side in ("forget", "retain", "untouched", "never_seen")},
                "utility": {n: str(self.tiny / f"{n}.jsonl") for n in ("real_authors", "world_facts")},
            },
            "objective": {"forget": forget, "retain": retain, "regularise": {"clreg": clreg} if clreg else {}},
            "schedule": {"epochs": 2 if self.quick else 10, "forget_batch": 16, "retain_batch": 16},
            "optimiser": {"lr": 5e-4, "warmup": 0.1, "decay": "linear"},
            "evaluate": {
                "gold": str(self.tiny / "models" / f"gold-{split}" / "model"), "max_rows": 40 if self.quick else 100,
                "generate": 0 if self.quick else 48, "relearn_lr": 5e-4, "map": "none",
                "cache": str(self.out / "cache"), "batch_tokens": 8192,
            },
            "checkpoint_every": 0, "log_every": 5,
        }  # fmt: skip

    def tuned(self, base: str, *, clreg: bool) -> dict[str, Any]:
        """Best of four trials on authors 86-90 (5 %), carried over to every reported split."""
        name = f"{base}{'+clreg' if clreg else ''}"
        done = self.out / "tuned" / f"{name}.json"
        if not done.is_file():
            self.models("tune05")
            values = self.recipe(base, "tune05", clreg=CLREG if clreg else None)
            rates = RATES.get(base, RATES_DEFAULT)
            space: dict[str, Any] = {"optimiser.lr": rates}
            if clreg:
                space = {
                    "optimiser.lr": rates[1:3],
                    "objective.regularise.clreg.weight": WEIGHTS.get(base, WEIGHTS_DEFAULT),
                }
            if self.quick:
                space = {k: v[:1] for k, v in space.items()}
            values |= {"tune": {"space": space}, "out": str(self.out / "tuning" / name)}
            found = tune(recipe.build(values), 1 if self.quick else 4)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(found))
        return json.loads(done.read_text())["best"]

    def rows(self) -> Iterator[Row]:
        """Every row, the most telling first."""
        seeds = [0] if self.quick else [0, 1, 2]
        bases = ["simnpo"] if self.quick else ["simnpo", "npo", "graddiff", "undial", "pdu"]
        for seed, base, clreg in itertools.product(seeds[:1], bases, (False, True)):
            yield self._main(base, "forget10", seed, clreg=clreg)
        if self.quick:
            return
        yield from self._ablations()
        for seed, base, clreg in itertools.product(seeds[1:], bases, (False, True)):
            yield self._main(base, "forget10", seed, clreg=clreg)
        for split, base, clreg in itertools.product(("forget05", "forget01"), bases, (False, True)):
            yield self._main(base, split, 0, clreg=clreg)
        for split, seed, base, clreg in itertools.product(("forget05", "forget01"), seeds[1:], bases, (False, True)):
            yield self._main(base, split, seed, clreg=clreg)

    def _main(self, base: str, split: str, seed: int, *, clreg: bool) -> Row:
        return Row(f"{base}{'+clreg' if clreg else ''}-{split}-s{seed}", base, split, seed, {"clreg": clreg})

    def _ablations(self) -> Iterator[Row]:
        for layers in (2, 4):
            yield Row(f"last{layers}", "simnpo", "forget10", 0, {"clreg": True, "layers": layers}, "layers")
        for tau in (0.1, 0.3, 0.7, 0.9):
            yield Row(f"tau{tau}", "simnpo", "forget10", 0, {"clreg": True, "temperature": tau}, "temperature")
        for views in ("paraphrase", "both"):
            yield Row(f"views-{views}", "simnpo", "forget10", 0, {"clreg": True, "views": views}, "views")
        yield Row("detached", "simnpo", "forget10", 0, {"clreg": True, "detach_negative": True}, "stop-gradient")

    def run(self, row: Row) -> None:
        """Tune (once per base), unlearn, measure; leaves a run folder."""
        folder = self.out / "rows" / row.name
        if (folder / "row.json").is_file():
            return
        extra = {k: v for k, v in row.changes.items() if k != "clreg"}
        clreg = row.changes["clreg"]
        best = self.tuned(row.base, clreg=clreg)
        self.models(row.split)
        values = self.recipe(row.base, row.split, clreg=CLREG if clreg else None)
        settings = recipe.changed(recipe.build(values), {**best, "seed": row.seed})
        settings = recipe.changed(settings, {f"objective.regularise.clreg.{k}": v for k, v in extra.items()})
        unlearn(settings, out=folder, resume=True, progress=Progress(quiet=True))
        (folder / "row.json").write_text(json.dumps({**row.__dict__, "lr": settings.optimiser.lr, **_weight(settings)}))


def _weight(settings: recipe.Recipe) -> dict[str, Any]:
    return {"clreg_weight": settings.objective.regularise.get("clreg", {}).get("weight")}


def collect(out: Path) -> list[dict[str, Any]]:
    """One object per finished row, and one for the original and the gold of each split."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "rows").glob("*/row.json")):
        row = json.loads(path.read_text())
        results = artifacts.read_results(artifacts.open_run(path.parent))
        log = artifacts.read_log(artifacts.open_run(path.parent))
        for role in ("original", "gold"):
            own = {k: v.__dict__ for k, v in results.models.get(role, {}).items()}
            found[f"{role}-{row['split']}"] = {"name": role, "split": row["split"], "group": role, "metrics": own}
        own = {k: v.__dict__ for k, v in results.models["unlearned"].items()}
        monitor = log[-1].get("monitor", {}) if log else {}
        found[row["name"]] = {**row, "metrics": own, "seconds": results.seconds, "monitor": monitor}
    return list(found.values())


def main() -> None:
    """Run what is missing, within the time given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("studies-out/clreg"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--max-minutes", type=float, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, of --workers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    study, end = Study(given.out, quick=given.quick), time.monotonic() + 60 * given.max_minutes
    if not given.page:
        for i, row in enumerate(study.rows()):
            if i // 2 % given.workers != given.worker:  # a base and its regularised twin go to one worker
                continue
            if time.monotonic() > end:
                print("out of time; run again to go on", file=sys.stderr)
                break
            start = time.monotonic()
            study.run(row)
            print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
    if given.page or given.worker == 0:
        import page

        page.write(collect(given.out), given.out, quick=given.quick)


if __name__ == "__main__":
    main()
