"""What the ReGLU study runs: a row's recipe, its own rate, its run beside the gold, and all rows that are there."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import costs
import rows as listed
from beside import beside_gold
from rows import Row

import engine
import thinned
from excise import artifacts, recipe
from excise.artifacts import Number
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
    """Folders and settings that all rows share.

    ``shown`` are the objects of the page's twin: rows, tunings and costs that are there without a folder.
    """

    def __init__(
        self,
        out: Path,
        size: Size,
        tiny: Path | None = None,
        threads: int = 1,
        commit: str = "",
        shown: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.out, self.size, self.threads, self.shown = out, size, threads, shown or {}
        self.tiny = tiny or out / "tiny"
        self.commit = commit or engine.commit()

    def recipe(self, loss: str, start: str, split: str) -> dict[str, Any]:
        """A row's recipe as plain values, before tuning."""
        initialise, rol = listed.STARTS[start]
        strangers = tofu_tiny.strangers(self.tiny, self.size.world)["strangers"]
        return {
            "model": {
                "name": str(self.tiny / "models" / "original" / "model"), "precision": "fp32",
                "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            },
            "data": {
                **thinned.sides(self.tiny, split, self.out),
                "utility": thinned.utility(self.tiny, self.out),
                **({"never_seen_training": strangers} if loss == listed.AIMED else {}),
            },
            "objective": {
                "forget": listed.LOSSES[loss], "retain": {"nll": {}}, "regularise": {"rol": listed.ROL} if rol else {}
            },
            "initialise": initialise,
            "statistics": {**STATISTICS, "cache": str(self.out / "statistics")},
            "schedule": {"steps": self.size.steps, "forget_batch": 12, "retain_batch": 12},
            "optimiser": {"lr": listed.untried(loss, start), "warmup": 0.1, "decay": "linear"},
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
        if not self.size.trials or loss == listed.AIMED:
            return {"best": {"optimiser.lr": listed.untried(loss, start)}, "trials": 0}
        name = f"{loss}-{start}"
        if name not in self.trials():
            thinned.models(self.tiny, self.size.world, "original", "gold-tune05")
            folder, done = self.out / "tuning" / name, self.out / "tuned" / f"{name}.json"
            values = self.recipe(loss, start, "tune05") | {"tune": {"space": space}, "out": str(folder)}
            found = tune(recipe.changed(recipe.build(values), IN_A_TRIAL), self.size.trials)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps({**found, "tried": trials(folder), "commit": self.commit}))
        return self.trials()[name]

    def trials(self) -> dict[str, dict[str, Any]]:
        """What every tuning so far tried and chose, by loss and start."""
        return self._kept("tuning", "tuned")

    def _kept(self, name: str, folder: str) -> dict[str, dict[str, Any]]:
        """An object of the twin, without its name, and the files that this folder has of it."""
        own = {path.stem: json.loads(path.read_text()) for path in (self.out / folder).glob("*.json")}
        return dict(sorted({**{k: v for k, v in self.shown.get(name, {}).items() if k != "name"}, **own}.items()))

    @property
    def both_tuned(self) -> bool:
        """Whether it is known which loss is swept."""
        return all(f"{loss}-rila" in self.trials() for loss in listed.MAIN)

    def better(self) -> str:
        """The loss that the sweeps are run with: the one whose RILA came nearer to the gold on authors 86-90."""
        found = {loss: own["value"] for loss in listed.MAIN if (own := self.trials().get(f"{loss}-rila"))}
        return min(found, key=lambda loss: found[loss]) if found else listed.MAIN[0]

    def rows(self) -> Iterator[Row]:
        """Every row; which loss is swept is known once both are tuned."""
        return listed.whole(self.better()) if self.size is SIZES["tiny"] else listed.quick()

    def done(self, row: Row) -> bool:
        """Whether a row's results are there."""
        return row.name in self.shown or (self.out / "rows" / row.name / "row.json").is_file()

    def run(self, row: Row) -> None:
        """Tune (once per loss and start), unlearn, measure; leaves a run folder with ``row.json`` as its last file."""
        thinned.models(self.tiny, self.size.world, "original", f"gold-{row.split}")
        found = self.tuned(row.loss, row.start)
        values = self.recipe(row.loss, row.start, row.split)
        best = {**found["best"], "optimiser.lr": row.rate * found["best"]["optimiser.lr"]}
        settings = recipe.changed(recipe.build(values), {**best, **row.changes, "seed": row.seed})
        folder, begun = self.out / "rows" / row.name, time.process_time()
        unlearn(settings, out=folder, resume=True, progress=Progress(quiet=True))
        run = artifacts.open_run(folder)
        beside = beside_gold(run) if settings.evaluate.rewordings else {}
        own = {
            **row.__dict__, "lr": settings.optimiser.lr, "trials": found["trials"], **beside,
            "monitor": monitored(run), "cpu_seconds": time.process_time() - begun, "commit": self.commit,
        }  # fmt: skip
        (folder / "row.json").write_text(json.dumps(own))

    def found(self) -> dict[str, dict[str, Any]]:
        """Name -> every finished row: those that were shown before, and those of this folder."""
        every = {**collect(self.out), **self.shown}
        return {name: row for name, row in sorted(every.items()) if "metrics" in row}

    def costs_so_far(self) -> dict[str, dict[str, Any]]:
        """What `costs` has measured, by start."""
        return self._kept("costs", "costs")

    def costs(self) -> dict[str, Any]:
        """What each start costs at 10 %: one pass over 200 rows of either side; ROL's is its basis."""
        found = self.costs_so_far()
        for start in listed.STARTS.keys() - found.keys():
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


def collect(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> every finished row below a folder; the original and the gold of each split among them."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "rows").glob("*/row.json")):
        row = json.loads(path.read_text())
        models = artifacts.read_results(artifacts.open_run(path.parent)).models
        for role in (role for role in ("original", "gold") if role in models):
            name = f"{role}-{row['split']}"
            found.setdefault(
                name, {"name": name, "split": row["split"], "group": role, "metrics": _shown(models[role])}
            )
        found[row["name"]] = {**row, "metrics": _shown(models["unlearned"]), "geometry": moved(path.parent)}
    return found


def _shown(numbers: dict[str, Number]) -> dict[str, dict[str, Any]]:
    return {m: {k: v for k, v in n.__dict__.items() if v is not None} for m, n in numbers.items()}
