"""One row of the evidence: a method made to forget, measured beside the gold, judged and attacked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods import ENDS, METHODS, Method

import engine
import excise
import thinned
import tofu_tiny
from excise import artifacts, recipe
from excise.commands.progress import Progress
from excise.commands.tuning import objective

Changes = dict[str, Any]
STRANGER = "stranger"


@dataclass(frozen=True)
class Size:
    """How large a study is: its world, how much is measured, how many trials each method has."""

    world: tofu_tiny.World
    split: str = "forget10"
    epochs: float = 10
    measured: int = 200
    generate: int = 32
    trials: int = 4


SIZES = {
    "tiny": Size(tofu_tiny.TINY),
    "quick": Size(tofu_tiny.QUICK, "forget05", epochs=3, measured=40, generate=16, trials=0),
}


@dataclass(frozen=True)
class Row:
    """One model that is judged.

    Attributes:
        method: Key of ``METHODS``, or one of ``ENDS``.
        split: Whom it forgets.
        seed: Of unlearning.
        attacked: Whether the attack suite is run on it.
        label: What is changed in the method; empty for the method itself.
        changes: Recipe keys with their values; `STRANGER` stands for the split's small model that never saw the rows.
    """

    method: str
    split: str
    seed: int = 0
    attacked: bool = False
    label: str = ""
    changes: Changes = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join(p for p in (self.method, self.label, self.split, f"s{self.seed}") if p).replace(" ", "_")


class Study:
    """Folders and settings that all rows share."""

    def __init__(self, out: Path, size: Size, tiny: Path | None = None) -> None:
        self.out, self.size, self.tiny = out, size, tiny or out / "tiny"

    def model(self, name: str) -> str:
        """A trained original or gold."""
        thinned.models(self.tiny, self.size.world, name)
        return str(self.tiny / "models" / name / "model")

    def recipe(self, method: Method, split: str) -> recipe.Recipe:
        """A method's recipe before tuning: what it ships with, the study's rows, how it is measured."""
        further = tofu_tiny.strangers(self.tiny, self.size.world)
        base = recipe.read_yaml(method.recipe) if method.recipe else {}
        own: dict[str, Any] = {
            "model": {"name": self.model("original"), "precision": "fp32"},
            "data": {
                **thinned.sides(self.tiny, split, self.out, whole=("retain",)),
                "utility": thinned.utility(self.tiny, self.out), "never_seen_training": further["strangers"],
            },
            "stop": {"calibration": further["stopping"]},
            "evaluate": {
                "gold": self.model(f"gold-{split}"), "max_rows": self.size.measured, "generate": self.size.generate,
                "relearn_lr": 5e-4, "map": "none", "cache": str(self.out / "cache"), "batch_tokens": 8192,
                "attacks": {"relearn": {}, "savings": {}},
            },
            "checkpoint_every": 0, "log_every": 10,
        }  # fmt: skip
        if method.taught:
            own["data"]["never_saw"] = [self.model(name) for name in tofu_tiny.WITHOUT]
        if not method.recipe:
            base = {
                "schedule": {"epochs": self.size.epochs, "forget_batch": 16, "retain_batch": 16},
                "optimiser": {"lr": 1e-3, "warmup": 0.1, "decay": "linear"},
            }
        return recipe.build(_over(_over(base, method.values), own))

    def tuned(self, name: str) -> Changes:
        """The best of a method's trials on authors 86-90, carried over to every split."""
        method = METHODS[name]
        if not self.size.trials or not method.trials:
            return dict(method.trials[0]) if method.trials else {}
        done = self.out / "tuned" / f"{name}.json"
        if not done.is_file():
            found = [self._trial(name, number, changes) for number, changes in enumerate(method.trials)]
            done.parent.mkdir(parents=True, exist_ok=True)
            best = min(found, key=lambda trial: trial["distance"])
            done.write_text(json.dumps({"best": best["changes"], "tried": found, "commit": engine.commit()}))
        return dict(json.loads(done.read_text())["best"])

    def _trial(self, name: str, number: int, changes: Changes) -> dict[str, Any]:
        """One setting on the tuning split: how far it ends from that split's gold."""
        folder = self.out / "tuning" / f"{name}-{number}"
        quick = {"evaluate.max_rows": 100, "evaluate.generate": 0, "evaluate.latent": False,
                 "evaluate.relearn_steps": [], "evaluate.savings_steps": 0, "evaluate.attacks": {},
                 "data.utility": {}}  # fmt: skip
        if not (folder / "trial.json").is_file():
            settings = recipe.changed(self.recipe(METHODS[name], "tune05"), {**changes, **quick})
            engine.unlearn(settings, folder)
            results = artifacts.read_results(artifacts.open_run(folder))
            reached = {n: results.number("unlearned", n).value for n in ("forget_probability", "retain_probability")}
            found = {"changes": changes, "distance": objective(results, "distance"), **reached}
            (folder / "trial.json").write_text(json.dumps(found))
        return dict(json.loads((folder / "trial.json").read_text()))

    def done(self, row: Row) -> bool:
        """Whether everything that a row asks for is there."""
        folder = self.out / "rows" / row.name
        return (folder / "row.json").is_file() and (not row.attacked or (folder / "attacked.json").is_file())

    def run(self, row: Row) -> None:
        """Make a row's model, measure and judge it, attack it where the row says so; each part once."""
        folder = self.out / "rows" / row.name
        if not (folder / "row.json").is_file():
            self._judged(row, folder)
        if row.attacked and not (folder / "attacked.json").is_file():
            self._attacked(row, folder)

    def settings(self, row: Row) -> recipe.Recipe:
        """A row's whole recipe."""
        if row.method in ENDS:
            return self.recipe(Method(), row.split)
        own = {k: self.model(f"{STRANGER}-{row.split}") if v == STRANGER else v for k, v in row.changes.items()}
        changes = {**self.tuned(row.method), **own, "seed": row.seed}
        return recipe.changed(self.recipe(METHODS[row.method], row.split), changes)

    def _judged(self, row: Row, folder: Path) -> None:
        settings = self.settings(row)
        begun, spent = time.process_time(), None
        if row.method in ENDS:
            place = self.model("original" if row.method == "original" else f"{row.method}-{row.split}")
            excise.evaluate(place, suite="all", recipe=settings, out=folder, resume=True, progress=Progress(quiet=True))
        else:
            spent = engine.unlearn(settings, folder)
        verdict = excise.verify(folder)
        own = {**row.__dict__, "cpu_seconds": time.process_time() - begun, "unlearn_cpu_seconds": spent,
               "outcome": verdict.outcome, "lr": settings.optimiser.lr, "commit": engine.commit()}  # fmt: skip
        (folder / "row.json").write_text(json.dumps(own))

    def _attacked(self, row: Row, folder: Path) -> None:
        place = folder
        if row.method in ENDS:
            place = Path(self.model("original" if row.method == "original" else f"{row.method}-{row.split}"))
        begun = time.process_time()
        every = recipe.changed(self.settings(row), {"evaluate.attacks": {}})
        excise.evaluate(place, suite="attack", recipe=every, out=folder / "attacked", progress=Progress(quiet=True))
        (folder / "attacked.json").write_text(json.dumps({"cpu_seconds": time.process_time() - begun}))


def _over(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them."""
    out = dict(values)
    for key, value in others.items():
        out[key] = _over(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
