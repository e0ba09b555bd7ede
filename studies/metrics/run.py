"""Which metric tells models that have the knowledge from models that never had it, before and after an attack?

    python studies/metrics/run.py [--out DIR] [--quick] [--max-minutes M] [--workers N --worker I] [--page]

Twelve small models of the demo's world are trained with the people to be forgotten and twelve without, over seeds and
lengths of training. A metric is *faithful* when it ranks every model of the first kind above every one of the second
(AUC 1). It is *robust* when it still does after the weights were rounded to 4 bits, and after a few steps of training
on half of the forgotten rows (on the rest), which bring back what was there and cannot bring back what was not.
Rows are folders below ``--out`` and are not run again; ``--page`` writes ``docs/results/metrics.md`` and its JSON twin.

Source: the protocol of OpenUnlearning's meta-evaluation, arXiv:2506.12618, section 4, at a small size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import engine
import excise
from excise import models, recipe, world
from excise.attacks.quantise import rounded
from excise.commands.progress import Progress
from excise.errors import UsageError
from excise.metrics.statistics import auc

DOCS = Path(__file__).parents[2] / "docs" / "results"
STATES = ("as trained", "4 bits", "relearned")
BITS, GROUP, STEPS = 4, 128, 4


@dataclass(frozen=True)
class Size:
    """The world's people, and the lengths and seeds of training."""

    people: Mapping[str, int]
    epochs: Sequence[float]
    seeds: Sequence[int]


SIZES = {
    "whole": Size({"forget": 6, "retain": 24, "untouched": 6, "never_seen": 6, "stopping": 0}, (6, 8, 12), range(4)),
    "quick": Size({"forget": 3, "retain": 9, "untouched": 3, "never_seen": 3, "stopping": 0}, (8, 12), range(1)),
}


@dataclass(frozen=True)
class Row:
    """One trained model: whether it knows, how long it trained, with which seed."""

    knows: bool
    epochs: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{'knows' if self.knows else 'never'}-{self.epochs:g}-s{self.seed}"


class Study:
    """Folders and settings that all rows share."""

    def __init__(self, out: Path, size: Size) -> None:
        self.out, self.size = out, size

    def prepare(self) -> None:
        """The world and its tokenizer, once."""
        if not (self.out / "tokenizer").is_dir():
            made = world.world(0, **self.size.people)
            world.write(made, self.out / "data")
            models.new_tokenizer(world.corpus(made), 2048).save_pretrained(self.out / "tokenizer")
        half = self.out / "data" / "half.jsonl"
        if not half.is_file():
            lines = (self.out / "data" / "forget.jsonl").read_text().splitlines()
            half.write_text("\n".join(lines[::2]) + "\n")
            (self.out / "data" / "rest.jsonl").write_text("\n".join(lines[1::2]) + "\n")

    def rows(self) -> Iterator[Row]:
        """Every model, those that know and those that do not in turn."""
        for seed, epochs, knows in itertools.product(self.size.seeds, self.size.epochs, (True, False)):
            yield Row(knows, epochs, seed)

    def training(self, row: Row) -> recipe.Recipe:
        """How a model is trained: the demo's recipe, with or without the people to be forgotten."""
        data = self.out / "data"
        changes = {
            "model.tokenizer": str(self.out / "tokenizer"), "model.precision": "fp32", "data.untouched": 0.0,
            "data.retain": str(data / "retain.jsonl"), "data.train": [str(data / "untouched.jsonl")],
            "schedule.epochs": row.epochs, "seed": row.seed, "out": str(self.out / "models" / row.name),
        }  # fmt: skip
        if row.knows:
            changes["data.forget"] = str(data / "forget.jsonl")
        return recipe.changed(recipe.load("demo-train"), changes)

    def measuring(self, place: str) -> recipe.Recipe:
        """How a model is measured: on the half of the forgotten rows that no attacker holds; no gold beside it."""
        data = self.out / "data"
        return recipe.build({
            "model": {"name": place, "precision": "fp32"},
            "data": {"forget": str(data / "rest.jsonl"), "retain": str(data / "retain.jsonl"),
                     "untouched": str(data / "untouched.jsonl"), "never_seen": str(data / "never_seen.jsonl")},
            "evaluate": {"generate": 24, "max_rows": 60, "map": "none", "relearn_steps": [0, 4], "relearn_lr": 5e-4,
                         "batch_tokens": 8192},
        })  # fmt: skip

    def run(self, row: Row) -> None:
        """Train a model, and measure it as it is, rounded, and trained again on half of the forgotten rows."""
        folder = self.out / "rows" / row.name
        if (folder / "row.json").is_file():
            return
        model = excise.finetune(self.training(row), resume=True)
        places = {"as trained": model, "4 bits": self._rounded(model), "relearned": self._relearned(row, model)}
        found = {}
        for state, place in places.items():
            got = excise.evaluate(place, suite="all", recipe=self.measuring(str(place)), progress=Progress(quiet=True))
            found[state] = {k: v["value"] for k, v in got["models"]["unlearned"].items() if "/" not in k}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "row.json").write_text(json.dumps({**row.__dict__, "found": found, "commit": engine.commit()}))

    def _rounded(self, model: Path) -> Path:
        place = model.parent / "rounded"
        if not (place / "config.json").is_file():
            settings = recipe.Model(name=str(model), precision="fp32")
            loaded, tokenizer = models.load(settings), models.load_tokenizer(str(model))
            for name, weight in loaded.named_parameters():
                if "_proj" in name:
                    weight.data.copy_(rounded(weight.data, BITS, GROUP))
            models.save(loaded, tokenizer, place)
        return place

    def _relearned(self, row: Row, model: Path) -> Path:
        changes = {
            "model": {"name": str(model), "precision": "fp32"}, "data.retain": str(self.out / "data" / "half.jsonl"),
            "data.forget": "", "data.train": [], "schedule.steps": STEPS, "schedule.retain_batch": 16,
            "optimiser": {"name": "adamw", "lr": 5e-4, "warmup": 0.0, "decay": "constant"},
            "out": str(self.out / "models" / f"{row.name}-relearned"),
        }  # fmt: skip
        return excise.finetune(recipe.changed(self.training(row), changes), resume=True)


def faithful(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How well each metric tells the two kinds apart in each state: |AUC - 0.5| x 2, signed by its order as trained.

    1: every model that knows on one side of every one that does not; 0: chance; below 0: the order has turned.
    """
    names = list(dict.fromkeys(k for r in rows for state in STATES for k in r["found"][state]))
    out = []
    for name in names:
        values = {}
        for state in STATES:
            kinds = [[r["found"][state].get(name) for r in rows if r["knows"] is knows] for knows in (True, False)]
            known = [[v for v in kind if v is not None] for kind in kinds]
            values[state] = 2 * auc(*known) - 1 if all(known) else None
        first = values["as trained"]
        if first is not None:
            sign = -1 if first < 0 else 1
            signed = {state: None if v is None else sign * v for state, v in values.items()}
            out.append({"metric": name, "rises": first > 0, **signed})
    return sorted(out, key=lambda m: -min(m[s] if m[s] is not None else -1 for s in STATES))


def page(rows: Sequence[Mapping[str, Any]], out: Path, *, docs: bool) -> None:
    """The page and its JSON twin."""
    folder = DOCS if docs else out
    folder.mkdir(parents=True, exist_ok=True)
    found = faithful(rows)
    (folder / "metrics.json").write_text(json.dumps({"rows": list(rows), "metrics": found}, indent=1) + "\n")
    head = "| metric | knows: | " + " | ".join(STATES) + " |\n|---|---|" + "---|" * len(STATES)
    body = "\n".join(
        f"| {m['metric']} | {'higher' if m['rises'] else 'lower'} | "
        + " | ".join("" if m[s] is None else f"{m[s]:.2f}" for s in STATES) + " |"
        for m in found
    )  # fmt: skip
    text = (Path(__file__).parent / "page.md.txt").read_text(encoding="utf-8")
    kinds = [sum(r["knows"] is knows for r in rows) for knows in (True, False)]
    parts = {"TABLE": f"{head}\n{body}", "KNOW": str(kinds[0]), "NEVER": str(kinds[1]), "STEPS": str(STEPS),
             "COMMITS": ", ".join(sorted({r["commit"] for r in rows}))}  # fmt: skip
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (folder / "metrics.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Run what is missing, within the time given, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="whole")
    parser.add_argument("--max-minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    out = (given.out or Path("studies-out") / ("metrics" if given.size == "whole" else "metrics-quick")).resolve()
    study, end = Study(out, SIZES[given.size]), time.monotonic() + 60 * given.max_minutes
    study.prepare()
    for number, row in enumerate(study.rows()):
        if given.page or number % given.workers != given.worker or time.monotonic() > end:
            continue
        try:
            start = time.monotonic()
            study.run(row)
            print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
        except UsageError as busy:  # another worker holds the folder
            print(busy, file=sys.stderr)
    rows = [json.loads(p.read_text()) for p in sorted((out / "rows").glob("*/row.json"))]
    page(rows, out, docs=given.size == "whole")


if __name__ == "__main__":
    main()
