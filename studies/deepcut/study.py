"""What rows of the DeepCUT study share, and how each is run: data, models, tuning, KGA's and SISA's procedures."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kga
import numpy as np
import rows as listed
import scoring
import sisa
import splits
import trained
from rows import METHODS, OTHERS, PARTS, Parts, Row

import engine
from excise import artifacts, recipe
from excise.artifacts import RunFolder
from excise.commands.evaluating import evaluate
from excise.commands.measuring import evaluation
from excise.commands.running import run as unlearn
from excise.commands.starting import sides
from excise.errors import NotShown, TrainingStopped
from excise.records import Record


@dataclass(frozen=True)
class Size:
    """How large a study is; without ``trials`` the first setting of each method is taken."""

    rows: Callable[[], Iterator[Row]]
    limits: splits.Limits = field(default_factory=splits.Limits)
    epochs: float = trained.EPOCHS
    trials: int = 4


#: Folder of a model, and the seconds that it cost.
Trained = tuple[Path, dict[str, float]]
#: Steps that forget, at least: of a dozen sentences ten epochs are ten.
FORGET_STEPS = 40
#: Passages are three times as long as tweets: models of them see them half as often.
TEXTS_TAKE = 2
#: Name of the object of all tunings among the rows of a twin.
TUNING = "tuning"
#: A trial that found no weights to keep is worse than any that did.
NOTHING = 1.0


class Study:
    """A folder with data, models and rows, each made when it is first asked for.

    ``shown`` are the objects of the page's twin: rows and tunings that are there without a folder.
    """

    def __init__(
        self, out: Path, encoder: Path, size: Size, *, threads: int = 1, shown: dict[str, dict[str, Any]] | None = None
    ) -> None:
        self.out, self.encoder, self.size, self.threads, self.shown = out, encoder, size, threads, shown or {}
        self._sides: dict[str, dict[str, list[Record]]] = {}

    # --- data and models ------------------------------------------------------------------------------------------

    def sides(self, data: str) -> dict[str, list[Record]]:
        """All rows of a data set, written to files; of ``DATA@K`` those for training that one of its models saw."""
        if data not in self._sides:
            whole, number = listed.other(data)
            found = splits.sides(whole, self.size.limits)
            if number is not None:
                held = set(PARTS[OTHERS].of(len(found["train"]))[number].tolist())
                found["train"] = [r for i, r in enumerate(found["train"]) if i not in held]
            self._sides[data] = found
            with self._alone(f"data-{data}"):
                for side, records in self._sides[data].items():
                    splits.write(self.file(data, "", side), records)
        return self._sides[data]

    def file(self, data: str, split: str, side: str) -> Path:
        """Where a side lies."""
        return self.out / "data" / data / split / f"{side}{splits.suffix(data)}"

    def forgotten(self, data: str, split: str) -> list[int]:
        """The rows of a split, written to files."""
        train = self.sides(data)["train"]
        chosen = splits.chosen(train, split, lambda: trained.vectors(self.encoder, train))
        gone = set(chosen)
        parts = {"forget": [train[i] for i in chosen], "retain": [r for i, r in enumerate(train) if i not in gone]}
        with self._alone(f"data-{data}"):
            for side, records in parts.items():
                splits.write(self.file(data, split, side), records)
        return chosen

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Several processes make what they share one after the other."""
        (self.out / "locks").mkdir(parents=True, exist_ok=True)
        with (self.out / "locks" / what).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def claimed(self, row: Row) -> Iterator[bool]:
        """Whether no other process runs the row; while this lasts none begins to."""
        (self.out / "locks").mkdir(parents=True, exist_ok=True)
        with (self.out / "locks" / f"row-{row.name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def model(
        self, data: str, name: str, rows: Path, *, seed: int = 0, epochs: float = 0, start: Path | None = None
    ) -> Trained:
        """A model that is trained on a file, and its cost."""
        folder, task = self.out / "models" / data, splits.task(data)
        records = [r for side in self.sides(data).values() for r in side]
        epochs = epochs or self.size.epochs / (TEXTS_TAKE if data == splits.TEXTS else 1)
        with self._alone(f"{data}-fresh-s{seed}"):
            head = trained.fresh(folder / f"fresh-s{seed}", self.encoder, records, task, seed)
        with self._alone(f"{data}-{name}"):
            return trained.fit(folder / name, start or head, rows, task, epochs=epochs, seed=seed, threads=self.threads)

    def original(self, data: str) -> Trained:
        """What is made to forget: trained on all rows, once for all splits and seeds."""
        whole, number = listed.other(data)
        if number is not None:
            return self.strangers(whole, PARTS[OTHERS])[number]
        return self.model(data, "original", self.file(data, "", "train"))

    def gold(self, data: str, split: str, seed: int) -> Trained:
        """Trained without the forgotten rows, from a head and with an order of its own for each seed."""
        self.forgotten(data, split)
        return self.model(data, f"gold-{split}-s{seed}", self.file(data, split, "retain"), seed=seed)

    def strangers(self, data: str, parts: Parts) -> list[Trained]:
        """A model for each part, trained on all others: whatever is forgotten, it is news to one of them."""
        train, found, many = self.sides(data)["train"], [], parts.many
        epochs = self.size.epochs * (many / (many - 1) if parts.as_long else 1)
        for number, held in enumerate(parts.of(len(train))):
            name = f"half-{number}" if many == 2 else f"without-{number}-of-{many}"
            name += f"-again-{parts.again}" * bool(parts.again) + "-longer" * parts.as_long
            rows, own = self.file(data, "", name), {int(i) for i in held}
            with self._alone(f"data-{data}"):  # the half of that number is what the other goes without
                splits.write(rows, [r for i, r in enumerate(train) if (i in own) == (many == 2)])
            found.append(self.model(data, name, rows, seed=parts.again, epochs=epochs if parts.as_long else 0))
        return found

    def _strangers_of(self, data: str, split: str, kind: str) -> list[Trained]:
        """The models that a value of ``data.never_saw`` stands for; one of them that forgets learns from the others."""
        if kind == "grouped":
            return [self.without_all(data, split)]
        whole, number = listed.other(data)
        return [place for i, place in enumerate(self.strangers(whole, PARTS[kind])) if i != number]

    def without_all(self, data: str, split: str) -> Trained:
        """A model of all but a quarter that has every forgotten row in it, as parts have that keep groups whole."""
        train, gone = self.sides(data)["train"], set(self.forgotten(data, split))
        others = [int(i) for i in np.random.default_rng(23).permutation(len(train)) if int(i) not in gone]
        gone |= set(others[: len(train) // PARTS["grouped"].many - len(gone)])
        rows = self.file(data, split, "without-all")
        with self._alone(f"data-{data}"):
            splits.write(rows, [r for i, r in enumerate(train) if i not in gone])
        return self.model(data, f"without-all-{split}", rows)

    # --- recipes --------------------------------------------------------------------------------------------------

    def recipe(self, data: str, split: str, method: str, changes: dict[str, Any], *, seed: int) -> recipe.Recipe:
        """A method's shipped recipe on a split, with what the study sets and what is changed."""
        many = len(self.forgotten(data, split))
        own = recipe.load(METHODS[method].recipe)
        steps = -(-many // own.schedule.forget_batch)
        kept = {f"data.{side}": str(self.file(data, split, side)) for side in ("forget", "retain")}
        whole = {
            **trained.base(splits.task(data)), **kept, "model.name": str(self.original(data)[0]), "data.untouched": 0,
            "data.never_seen": str(self.file(data, "", "never_seen")),
            "data.utility": {"test": str(self.file(data, "", "test"))},
            "stop.calibration": str(self.file(data, "", "calibration")),
            "evaluate.max_rows": 2000, "evaluate.relearn_steps": [], "evaluate.map": "none", "evaluate.generate": 0,
            "evaluate.cache": str(self.out / "cache"), "seed": seed, "log_every": 1,
        }  # fmt: skip
        if own.objective.forget or own.objective.regularise:  # otherwise epochs are those of the retained rows
            whole["schedule.epochs"] = max(own.schedule.epochs, FORGET_STEPS / steps)
        if method in listed.AIMED:
            whole["data.never_seen_training"] = str(self.file(data, "", "aimed_at"))
            whole["stop.calibration"] = str(self.file(data, "", "judged_by"))
        if method in listed.SHARED:
            whole["data.never_seen_training"] = whole["stop.calibration"]
        if method == "kga":
            whole["objective.forget"] = {"kga:kga": self.gaps(data, split)[0]}
        whole |= {**METHODS[method].changes, **changes}
        if whole.get("data.never_saw") in PARTS:
            models = self._strangers_of(data, split, whole["data.never_saw"])
            whole["data.never_saw"] = [str(place) for place, _ in models]
        return recipe.changed(own, whole)

    def gaps(self, data: str, split: str) -> tuple[dict[str, Any], dict[str, float]]:
        """KGA's two further models, on the forgotten and on as many unseen rows; the term's settings, and the cost."""
        forget = [self.sides(data)["train"][i] for i in self.forgotten(data, split)]
        unseen = self.sides(data)["calibration"][: len(forget)]
        splits.write(self.file(data, split, "unseen"), unseen)
        task, how, cost = splits.task(data), sides.encoding(recipe.Data()), {"cpu": 0.0, "wall": 0.0}
        places = {}
        for side in ("forget", "unseen"):
            epochs = min(trained.EPOCHS_SMALL, 4 * self.size.epochs)
            name = f"kga-{split}-{side}"
            places[side], own = self.model(data, name, self.file(data, split, side), epochs=epochs)
            cost = {kind: cost[kind] + own[kind] for kind in cost}
        file = self.out / "models" / data / f"kga-{split}.safetensors"
        kga.store(file, scoring.logits_of(places["forget"], forget, task, how))
        pair = [scoring.logits_of(place, unseen, task, how) for place in (self.original(data)[0], places["unseen"])]
        return {"teacher": str(file), "target": kga.gap(*pair), "sigma": 0.1}, cost

    def tuned(self, method: str) -> dict[str, Any]:
        """The best of four settings on a forget set that is not reported, without a gold.

        The distance: |forget F1 - never-seen F1|, plus what the retained F1 lost, plus `NOTHING` where the stopping
        rule found no weights to keep. Of what learns from models that never saw the rows: |forget F1 - theirs|, plus
        what the F1 of retained and of dev sentences lost. Tuned on WNUT17 and carried over to the other data sets.
        """
        method = METHODS[method].tuned_as or method
        trials = METHODS[method].trials[: self.size.trials]
        if not trials:
            return dict(METHODS[method].trials[0])
        data, name = "wnut17", f"wnut17-{method}"
        with self._alone(f"tuned-{name}"):
            if name not in self.trials():
                self._tune(data, method, trials, self.out / "tuned" / f"{name}.json")
        return dict(self.trials()[name]["best"])

    def _tune(self, data: str, method: str, trials: Sequence[dict[str, Any]], done: Path) -> None:
        found = []
        for number, changes in enumerate(trials):
            folder = self.out / "tuning" / f"{data}-{method}-{number}"
            measured = {"dev": str(self.file(data, "", "dev"))} if method in listed.TAUGHT else {}
            quick = {"evaluate.latent": False, "data.utility": measured}
            settings = self.recipe(data, splits.TUNE, method, {**changes, **quick}, seed=0)
            found.append({"changes": dict(changes), "distance": self._distance(folder, settings)})
        best = min(found, key=lambda trial: trial["distance"])
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps({"best": best["changes"], "trials": found, "commit": engine.commit()}))

    def _distance(self, folder: Path, settings: recipe.Recipe) -> float:
        nothing = 0.0
        try:
            unlearn(settings, out=folder, resume=True, progress=engine.Clock(quiet=True))
        except NotShown:
            nothing = NOTHING
        except TrainingStopped:
            return 10 * NOTHING
        results = artifacts.read_results(RunFolder(folder))
        score = "f1" if settings.model.task == "token_classification" else "accuracy"

        def value(model: str, side: str) -> float:
            return results.number(model, f"{side}_{score}").value or 0.0

        def lost(side: str) -> float:
            return max(0.0, value("original", side) - value("unlearned", side))

        if settings.data.never_saw:
            return abs(value("unlearned", "forget") - scoring.strangers(settings)) + lost("retain") + lost("dev")
        return abs(value("unlearned", "forget") - value("unlearned", "never_seen")) + lost("retain") + nothing

    # --- rows -----------------------------------------------------------------------------------------------------

    def run(self, row: Row) -> None:
        """Tune (once per method), unlearn, measure; leaves a folder with ``row.json`` as its last file."""
        folder = self.out / "rows" / row.name
        gold, gold_cost = self.gold(row.data, row.split, row.seed)
        if row.method in listed.PROCEDURES:
            shutil.rmtree(folder, ignore_errors=True)  # `evaluate` wants an empty folder
            cost = {"retrain": self._retrained, "sisa": self._sharded}[row.method](row, folder)
            own: dict[str, Any] = {"kept": None}
        else:
            tuned = {} if row.group == "shipped" else self.tuned(row.method)
            changes = {**tuned, **row.changes, "evaluate.gold": str(gold)}
            cost, own = self._unlearned(row, folder, changes)
        own |= {"cost": cost, "gold_cost": gold_cost, "original_cost": self.original(row.data)[1]}
        if row.method in METHODS and (kind := METHODS[row.method].changes.get("data.never_saw")):
            own |= {"halves_cost": [cost for _, cost in self._strangers_of(row.data, row.split, kind)]}
        own |= {"forgotten": len(self.forgotten(row.data, row.split)), "threads": self.threads}
        own |= {"commit": engine.commit(), "metrics": scoring.numbers(RunFolder(folder))}
        (folder / "row.json").write_text(json.dumps({"name": row.name, **row.__dict__, **own}))

    def found(self) -> dict[str, dict[str, Any]]:
        """Name -> every finished row: those that were shown before, and those of this folder."""
        own = [json.loads(path.read_text()) for path in (self.out / "rows").glob("*/row.json")]
        every = {row["name"]: row for row in (*self.shown.values(), *own) if row["name"] != TUNING}
        return dict(sorted(every.items()))

    def trials(self) -> dict[str, dict[str, Any]]:
        """What every tuning so far tried and chose, by data set and method."""
        own = {path.stem: json.loads(path.read_text()) for path in (self.out / "tuned").glob("*.json")}
        before = {name: found for name, found in self.shown.get(TUNING, {}).items() if name != "name"}
        return dict(sorted({**before, **own}.items()))

    def _unlearned(self, row: Row, folder: Path, changes: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        shutil.rmtree(folder, ignore_errors=True)  # half a run would be half a cost
        clock, admissible = engine.Clock(quiet=True), True
        settings = self.recipe(row.data, row.split, row.method, changes, seed=row.seed)
        try:
            unlearn(settings, out=folder, progress=clock)
        except NotShown:
            admissible = False
        cost = clock.cost("unlearn")
        if row.method == "kga":
            more = self.gaps(row.data, row.split)[1]
            cost = {kind: cost[kind] + more[kind] for kind in cost}
        seen = artifacts.read_manifest(RunFolder(folder)).get("stopping") or {}
        log = artifacts.read_log(RunFolder(folder))
        own = {"kept": seen.get("kept"), "checks": len(seen.get("checks", ())), "admissible": admissible}
        apart = ("evaluate.gold", "objective.forget") if row.method == "kga" else ("evaluate.gold",)  # paths of files
        own["settings"] = {key: value for key, value in changes.items() if key not in apart}
        return cost, {**own, "steps": log[-1]["step"] if log else None, "monitor": _mean(log)}

    def _measured(self, row: Row) -> recipe.Recipe:
        """The recipe that says which rows are measured; the same for every method."""
        gold = str(self.gold(row.data, row.split, row.seed)[0])
        return self.recipe(row.data, row.split, "deepcut", {"evaluate.gold": gold}, seed=row.seed)

    def _retrained(self, row: Row, folder: Path) -> dict[str, float]:
        """A second gold: how far two models are apart that both never saw the forgotten rows."""
        second, cost = self.gold(row.data, row.split, row.seed + 100)
        evaluate(second, suite="latent", recipe=self._measured(row), out=folder, progress=engine.Clock(quiet=True))
        return dict(cost)

    def _sharded(self, row: Row, folder: Path) -> dict[str, float]:
        """SISA's shards without the forgotten rows, and the numbers of their averaged logits."""
        train, data = self.sides(row.data)["train"], row.data
        plan = sisa.stages(len(train), set(self.forgotten(data, row.split)), seed=row.seed)
        cost, places = {"cpu": 0.0, "wall": 0.0}, {}
        for stage in plan:
            name = f"sisa-{row.split}-{stage.shard}-{stage.slice}"
            rows = self.file(data, row.split, name)
            splits.write(rows, [train[i] for i in stage.rows])
            start = places.get(stage.shard) if stage.slice else None
            epochs = sisa.epochs(self.size.epochs)
            places[stage.shard], own = self.model(data, name, rows, seed=row.seed, epochs=epochs, start=start)
            cost = {kind: cost[kind] + own[kind] * stage.again for kind in cost}
        settings, task = self._measured(row), splits.task(data)
        records = evaluation.limited(sides.of(settings).records, settings.evaluate, task=task)
        named = {"original": settings.model.name, "gold": str(settings.evaluate.gold)}
        clock = engine.Clock(quiet=True)
        measured = {k: evaluation.measure_named(k, v, records, settings, clock).tables for k, v in named.items()}
        how = sides.encoding(settings.data)
        said = {
            side: sisa.averaged([scoring.logits_of(place, own_rows, task, how) for place in places.values()])
            for side, own_rows in records.items()
        }
        names = next(iter(measured["gold"].values())).classes
        scoring.write(RunFolder(folder), {**measured, "unlearned": scoring.tables(said, records, names)}, clock.seconds)
        return cost


def _mean(log: list[dict[str, Any]]) -> dict[str, float]:
    """Means of what DeepCUT says of its batches, over the steps that forget."""
    found: dict[str, list[float]] = {}
    for entry in log:
        for key, value in (entry.get("monitor") or {}).items():
            found.setdefault(key, []).append(float(value))
    return {key: sum(values) / len(values) for key, values in found.items()}
