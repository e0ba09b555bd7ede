"""The ReGLU study: where an adapter starts and what holds it, each with its own rate, beside the gold; resumable.

    python studies/reglu/run.py [--out DIR] [--tiny DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--tiny`` is a folder of
tofu-tiny's data and models that another study has trained (default ``OUT/tiny``: trained where they are missing).
``--page`` writes ``docs/results/reglu.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look at
three rows of a smaller world; its page lies beside its rows.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import costs
import rows as listed
from beside import beside_gold
from rows import Row

import engine
import thinned
from excise import artifacts, recipe
from excise.commands.progress import Progress
from excise.commands.running import run as unlearn
from excise.commands.tuning import tune
from thinned import tofu_tiny


@dataclass(frozen=True)
class Size:
    """How large a study is: its world, how long each row unlearns, how much is measured, how many trials it has."""

    world: tofu_tiny.World
    steps: int
    measured: int
    generate: int
    trials: int


SIZES = {
    "tiny": Size(tofu_tiny.TINY, steps=40, measured=200, generate=24, trials=4),
    "quick": Size(tofu_tiny.QUICK, steps=20, measured=40, generate=0, trials=0),
}
#: A trial reads probabilities alone, of the first rows of a side.
IN_A_TRIAL = {"evaluate.max_rows": 100}
#: Rows of each side behind a start: as many as there are to forget at 10 %.
STATISTICS = {"rows": 200}


class Study:
    """Folders and settings that all rows share."""

    def __init__(self, out: Path, size: Size, given: argparse.Namespace) -> None:
        self.out, self.size, self.threads = out, size, given.threads
        self.tiny: Path = given.tiny or out / "tiny"
        self.commit: str = given.commit or engine.commit()

    def recipe(self, loss: str, start: str, split: str) -> dict[str, Any]:
        """A row's recipe as plain values, before tuning."""
        initialise, rol = listed.STARTS[start]
        return {
            "model": {
                "name": str(self.tiny / "models" / "original" / "model"), "precision": "fp32",
                "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            },
            "data": {
                **thinned.sides(self.tiny, split, self.out),
                "utility": thinned.utility(self.tiny, self.out),
            },
            "objective": {
                "forget": listed.LOSSES[loss], "retain": {"nll": {}}, "regularise": {"rol": listed.ROL} if rol else {}
            },
            "initialise": initialise,
            "statistics": {**STATISTICS, "cache": str(self.out / "statistics")},
            "schedule": {"steps": self.size.steps, "forget_batch": 12, "retain_batch": 12},
            "optimiser": {"lr": listed.rates(loss, start)[1], "warmup": 0.1, "decay": "linear"},
            "evaluate": {
                "gold": str(self.tiny / "models" / f"gold-{split}" / "model"), "max_rows": self.size.measured,
                "generate": self.size.generate, "relearn_lr": 5e-4, "relearn_steps": [0, 4, 16], "map": "none",
                "cache": str(self.out / "cache"), "batch_tokens": 8192,
            },
            "checkpoint_every": 0, "log_every": 10,
        }  # fmt: skip

    def tuned(self, loss: str, start: str) -> dict[str, Any]:
        """Best of four rates on authors 86-90 (5 %), carried over to every split; `trials` 0: untuned."""
        space = {"optimiser.lr": listed.rates(loss, start)}
        if not self.size.trials:
            return {"best": {"optimiser.lr": space["optimiser.lr"][1]}, "trials": 0}
        done = self.out / "tuned" / f"{loss}-{start}.json"
        if not done.is_file():
            thinned.models(self.tiny, self.size.world, "original", "gold-tune05")
            folder = self.out / "tuning" / f"{loss}-{start}"
            values = self.recipe(loss, start, "tune05") | {"tune": {"space": space}, "out": str(folder)}
            found = tune(recipe.changed(recipe.build(values), IN_A_TRIAL), self.size.trials)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps({**found, "tried": trials(folder), "commit": self.commit}))
        return json.loads(done.read_text())

    @property
    def both_tuned(self) -> bool:
        """Whether it is known which loss is swept."""
        return all(path.is_file() for path in self._of_rila().values())

    def better(self) -> str:
        """The loss that the sweeps are run with: the one whose RILA came nearer to the gold on authors 86-90."""
        found = {loss: json.loads(p.read_text())["value"] for loss, p in self._of_rila().items() if p.is_file()}
        return min(found, key=lambda loss: found[loss]) if found else listed.MAIN[0]

    def _of_rila(self) -> dict[str, Path]:
        return {loss: self.out / "tuned" / f"{loss}-rila.json" for loss in listed.MAIN}

    def rows(self) -> Iterator[Row]:
        """Every row; which loss is swept is known once both are tuned."""
        return listed.whole(self.better()) if self.size is SIZES["tiny"] else listed.quick()

    def done(self, row: Row) -> bool:
        """Whether a row's results are there."""
        return (self.out / "rows" / row.name / "row.json").is_file()

    def run(self, row: Row) -> None:
        """Tune (once per loss and start), unlearn, measure; leaves a run folder with ``row.json`` as its last file."""
        thinned.models(self.tiny, self.size.world, "original", f"gold-{row.split}")
        found = self.tuned(row.loss, row.start)
        values = self.recipe(row.loss, row.start, row.split)
        settings = recipe.changed(recipe.build(values), {**found["best"], **row.changes, "seed": row.seed})
        folder, begun = self.out / "rows" / row.name, time.process_time()
        unlearn(settings, out=folder, resume=True, progress=Progress(quiet=True))
        run = artifacts.open_run(folder)
        own = {
            **row.__dict__, "lr": settings.optimiser.lr, "trials": found["trials"], **beside_gold(run),
            "monitor": monitored(run), "cpu_seconds": time.process_time() - begun, "commit": self.commit,
        }  # fmt: skip
        (folder / "row.json").write_text(json.dumps(own))

    def costs(self) -> dict[str, Any]:
        """What each start costs at 10 %: one pass over 200 rows of either side; ROL's is its basis."""
        found = {}
        for start in listed.STARTS:
            values = self.recipe("npo", start, next(iter(self.size.world.splits)))
            values["statistics"] = STATISTICS
            # Plain LoRA's training is what the others are compared with: 200 rows of either side, one epoch.
            values["schedule"] = {**values["schedule"], "steps": 17 if start == "plain" else 1}
            values["evaluate"] = {"max_rows": 2, "generate": 0, "latent": False, "rewordings": False,
                                  "relearn_steps": [], "map": "none"}  # fmt: skip
            values["data"] = {**values["data"], "utility": {}}
            found[start] = costs.measure(values, self.out / "costs" / f"{start}.json", self.threads)
        return found


def trials(folder: Path) -> list[dict[str, float]]:
    """Rate and what was reached in each trial, for the page."""
    out = []
    for path in sorted(folder.glob("trial-*/results.json")):
        results = artifacts.read_results(artifacts.open_run(path.parent))
        lr = recipe.load(str(path.parent / "recipe.yaml")).optimiser.lr
        names = {"forget": "forget_probability", "untouched": "retain_probability"}
        out.append({"lr": lr, **{k: results.number("unlearned", v).value or 0.0 for k, v in names.items()}})
    return sorted(out, key=lambda trial: trial["lr"])


def monitored(run: artifacts.RunFolder) -> dict[str, list[float]]:
    """First and last logged value of what the terms were watched by."""
    log = [row["monitor"] for row in artifacts.read_log(run) if row.get("monitor")]
    return {key: [log[0][key], log[-1][key]] for key in (log[0] if log else ()) if key in log[-1]}


def moved(folder: Path) -> dict[str, dict[str, float]]:
    """Mean over layers of each side's variance that the update's directions hold, before and after training."""
    path = artifacts.open_run(folder).geometry
    layers = json.loads(path.read_text())["layers"] if path.is_file() else []
    out = {"chance": {"any": statistics.mean(x["chance"] for x in layers)}} if layers else {}
    for when in ("before", "after"):
        own = [x[when] for x in layers if x.get(when)]
        shares = {
            side: [x[side]["share"] for x in own if x[side]["share"] is not None] for side in ("forget", "retain")
        }
        if all(shares.values()):
            out[when] = {side: statistics.mean(values) for side, values in shares.items()}
    return out


def collect(out: Path) -> list[dict[str, Any]]:
    """One object per finished row, and one for the original and the gold of each split."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "rows").glob("*/row.json")):
        row = json.loads(path.read_text())
        results = artifacts.read_results(artifacts.open_run(path.parent))
        for role in ("original", "gold"):
            own = {k: v.__dict__ for k, v in results.models.get(role, {}).items()}
            found.setdefault(f"{role}-{row['split']}", {"name": role, "split": row["split"], "group": role,
                                                        "metrics": own})  # fmt: skip
        own = {k: v.__dict__ for k, v in results.models["unlearned"].items()}
        found[row["name"]] = {**row, "metrics": own, "seconds": results.seconds, "geometry": moved(path.parent)}
    return list(found.values())


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
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, within the time given."""
    given = arguments()
    import torch

    torch.set_num_threads(given.threads)
    out = given.out or Path("studies-out") / ("reglu" if given.size == "tiny" else "reglu-quick")
    study, end = Study(out.resolve(), SIZES[given.size], given), time.monotonic() + 60 * given.max_minutes
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
        import page

        page.write(collect(study.out), study, docs=given.size == "tiny")


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
