"""What the requests study runs: its arms, the world's files, and the next step of an arm's ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import excise
from excise import ledger, models, recipe, world
from excise.commands.progress import Progress

QUIET = Progress(quiet=True)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
CLREG = {"clreg": {"temperature": 0.5, "weight": 0.03, "dropout": 0.1}}
#: Arm -> what it changes in SimNPO as the demo has it. An adapter has four times the rate: tuned for none of them.
ARMS: dict[str, dict[str, Any]] = {
    "simnpo": {"objective.regularise": {}},
    "simnpo+clreg": {"objective.regularise": CLREG},
    "lora": {"objective.regularise": {}, "model.lora": LORA, "optimiser.lr": 2e-3},
    "lora+reglu": {
        "objective.regularise": {"rol": {"k": 8, "weight": 0.01}}, "model.lora": LORA, "initialise": {"rila": {}},
        "optimiser.lr": 2e-3,
    },
    "lora+reglu+clreg": {
        "objective.regularise": {"rol": {"k": 8, "weight": 0.01}, **CLREG}, "model.lora": LORA,
        "initialise": {"rila": {}}, "optimiser.lr": 2e-3,
    },
    "gold-like": {},
}  # fmt: skip
#: The arm that is another recipe than SimNPO's.
RECIPES = {"gold-like": "demo"}
BESIDE = ("nothing forgotten", "never trained")
#: Every second request is followed by other training.
EVERY = 2


@dataclass(frozen=True)
class Size:
    """How large a study is: requests, people in each side, how long each training is."""

    requests: int
    people: int
    new: int
    retain: int
    kept: int
    never_seen: int
    width: int
    epochs: int
    unlearn: int
    more: int


SIZES = {
    "whole": Size(10, 2, 3, retain=30, kept=8, never_seen=12, width=256, epochs=12, unlearn=14, more=6),
    "quick": Size(3, 1, 1, retain=4, kept=2, never_seen=4, width=64, epochs=10, unlearn=3, more=2),
}


class Study:
    """The world's files, the trained models, and an arm's next step."""

    def __init__(self, out: Path, size: Size) -> None:
        self.out, self.size = out, size
        self.data = out / "data"

    @property
    def fine_tunings(self) -> int:
        """How often there is other training."""
        return self.size.requests // EVERY

    def prepare(self) -> None:
        """Rows, tokenizer, the original, and the gold that never saw the people of any request."""
        s = self.size
        if not (self.data / "done").is_file():
            made = world.world(0, forget=s.requests * s.people, retain=s.retain, untouched=s.kept,
                               never_seen=s.never_seen, stopping=self.fine_tunings * s.new)  # fmt: skip
            world.write(made, self.data)
            for name, rows, people in (("forget", made.forget, s.people), ("new", made.stopping, s.new)):
                for number, part in enumerate(_parts(rows, people), 1):
                    _write(self.data / f"{name}-{number}.jsonl", part)
            models.new_tokenizer(world.corpus(made), 2048).save_pretrained(self.data / "tokenizer")
            (self.data / "done").touch()
        for name, forget in (("nothing forgotten", str(self.data / "forget.jsonl")), ("never trained", "")):
            excise.finetune(
                recipe.changed(recipe.load("demo-train"), {
                    "model.tokenizer": str(self.data / "tokenizer"), "model.config.hidden_size": s.width,
                    "model.config.intermediate_size": 3 * s.width, "schedule.epochs": s.epochs,
                    "data": {"forget": forget, "retain": str(self.data / "retain.jsonl"), "untouched": 0.0,
                             "train": [str(self.data / "untouched.jsonl")]},
                    "out": str(self.out / "models" / name),
                }),
                resume=True, progress=QUIET,
            )  # fmt: skip

    def events(self) -> Iterator[tuple[str, int]]:
        """Requests and other training in order: ("request", 1), ("request", 2), ("people", 1), ..."""
        for number in range(1, self.size.requests + 1):
            yield "request", number
            if number % EVERY == 0:
                yield "people", number // EVERY

    def request(self, arm: str, number: int) -> recipe.Recipe:
        """The recipe of one request: the rows of its people, and all that is kept by then."""
        kept = [json.loads(x) for x in (self.data / "retain.jsonl").read_text().splitlines()]
        for earlier in range(1, (number - 1) // EVERY + 1):
            kept += [json.loads(x) for x in (self.data / f"new-{earlier}.jsonl").read_text().splitlines()]
        file = self.out / "kept" / f"{(number - 1) // EVERY}.jsonl"
        _write(file, kept)
        model = self.out / "models" / "nothing forgotten" / "model"
        return recipe.changed(recipe.load(RECIPES.get(arm, "demo-simnpo-clreg")), {
            "model.name": str(model), "data.forget": str(self.data / f"forget-{number}.jsonl"),
            "data.retain": str(file), "data.untouched": str(self.data / "untouched.jsonl"),
            "data.never_seen": str(self.data / "never_seen.jsonl"), "schedule.epochs": self.size.unlearn,
            "evaluate": {"generate": 0, "latent": False, "relearn_steps": [], "map": "none", "max_rows": 100,
                         "rewordings": False, "cache": str(self.out / "cache")},
            "log_every": 10, **ARMS[arm],
        })  # fmt: skip

    def new_people(self, model: str, number: int, out: Path, without: str | None = None) -> recipe.Recipe:
        """Other training: new people among all that were kept so far."""
        earlier = [str(self.data / f"new-{k}.jsonl") for k in range(1, number)]
        more = [str(self.data / f"{side}.jsonl") for side in ("retain", "untouched")] + earlier
        return recipe.build({
            "model": {"name": model},
            "data": {"retain": str(self.data / f"new-{number}.jsonl"), "train": more, "untouched": 0.0,
                     "without": without},
            "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
            "schedule": {"epochs": self.size.more, "retain_batch": 32}, "optimiser": {"lr": 1e-3, "decay": "cosine"},
            "out": str(out),
        })  # fmt: skip

    # --- an arm ---------------------------------------------------------------------------------------------------

    def step(self, arm: str) -> bool:
        """Do the next event of an arm; False where all are done."""
        folder = self.out / "arms" / arm
        return self._beside(arm, folder) if arm in BESIDE else self._ledger(arm, folder)

    def _ledger(self, arm: str, folder: Path) -> bool:
        now = ledger.State() if not (folder / ledger.NAME).is_file() else ledger.state(ledger.read(folder))
        updates = {e["update"] for e in ledger.read(folder) if e["event"] == "update"} if now.requests else set()
        for kind, number in self.events():
            name = f"{kind}-{number}"
            if kind == "request" and (name not in now.requests or not now.requests[name].taken):
                excise.request(folder, self.request(arm, number), name=name, accept=True, suite="memorisation",
                               resume=name in now.requests, progress=QUIET)  # fmt: skip
                return True
            if kind == "people" and name not in updates:
                out = folder / "people" / str(number)
                excise.finetune(self.new_people(excise.show_ledger(folder)["model"], number, out, str(folder)),
                                resume=True, progress=QUIET)  # fmt: skip
                excise.add_run(folder, out, name=name, suite="memorisation", progress=QUIET)
                return True
        if now.requests:
            excise.reverify(folder, suite="memorisation", progress=QUIET)
        return self._end(folder, excise.show_ledger(folder)["model"])

    def _beside(self, arm: str, folder: Path) -> bool:
        """A model that forgets nothing, through the same other training; measured on every request's rows."""
        model = str(self.out / "models" / arm / "model")
        for number in range(self.fine_tunings + 1):
            out = folder / "people" / str(number)
            if number:
                model = str(out / "model")
            if not (folder / f"{number}.json").is_file():
                if number:
                    before = self.out / "models" / arm if number == 1 else folder / "people" / str(number - 1)
                    excise.finetune(self.new_people(str(before / "model"), number, out), resume=True, progress=QUIET)
                found = {}
                for k in range(1, self.size.requests + 1):
                    settings = recipe.changed(self.request("simnpo", k), {"model.name": model})
                    found[f"request-{k}"] = _numbers(excise.evaluate(model, suite="memorisation", recipe=settings,
                                                                     progress=QUIET), "unlearned")  # fmt: skip
                write_json(folder / f"{number}.json", found)
                return True
        return self._end(folder, model)

    def _end(self, folder: Path, model: str) -> bool:
        """At the end, every forgotten row is attacked: relearned from half of them, measured on the other half."""
        if (folder / "end.json").is_file():
            return False
        evaluation = {"generate": 0, "latent": False, "relearn_steps": [0, 2, 4, 8, 16], "relearn_lr": 5e-4,
                      "max_rows": 400, "map": "none", "rewordings": False}  # fmt: skip
        own = recipe.changed(self.request("simnpo", self.size.requests), {
            "data.forget": str(self.data / "forget.jsonl"), "evaluate": evaluation, "model.name": model,
        })  # fmt: skip
        write_json(folder / "end.json", excise.evaluate(model, suite="relearn", recipe=own, progress=QUIET)["models"])
        return True


def _parts(rows: list[dict[str, Any]], people: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of so many people at a time."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for start in range(0, len(groups), people):
        chosen = set(groups[start : start + people])
        yield [row for row in rows if row["group"] in chosen]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _numbers(results: dict[str, Any], model: str) -> dict[str, Any]:
    """The numbers that the curves are drawn from; an evaluated model stands as the original where it is that one."""
    own = results["models"].get(model) or results["models"]["original"]
    return {k: own[k]["value"] for k in ("forget_probability", "retain_probability", "privleak") if own.get(k)}
