"""The default on a small pretrained model that has a general tokenizer and stories of its own; resumable.

    python studies/pretrained/run.py [--out DIR] [--page]

stories260K (a Llama of five blocks with 512 tokens, which tells children's stories) learns people of the embedded world
beside stories; four of the people are then forgotten, by the default and by SimNPO with CLReg, with a gold and a second
gold beside them. Each method has four trials of its rate on four other people. ``--page`` writes
``docs/results/pretrained.md`` and its JSON twin from whatever there is. About twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np

import engine
import excise
import seven
import tofu_tiny
from excise import artifacts, recipe, world
from excise.commands.progress import Progress
from excise.commands.tuning import objective
from excise.metrics import rows, table

QUIET = Progress(quiet=True)
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "results"
#: People of each side; "forget" holds those to forget and, after them, those that rates are tried on.
PEOPLE = {"forget": 8, "retain": 16, "untouched": 6, "never_seen": 12, "stopping": 6}
FORGOTTEN = 4
STORIES = 80  # trained and kept; as many others are held out
EPOCHS, TRAINED_LR = 30, 0.02
#: Method -> recipe and the rates that are tried.
METHODS = {
    "default": ("gold-like", (1e-3, 3e-3, 7e-3, 1.5e-2)),
    "simnpo+clreg": ("demo-simnpo-clreg", (5e-4, 1e-3, 2e-3, 4e-3)),
}
#: Split -> whom it forgets; models: gold, second gold.
GOLDS = {"gold-report": ("report", 0), "gold2-report": ("report", 1), "gold-tune": ("tune", 0)}


class Study:
    """Rows, trained models, methods' models."""

    def __init__(self, out: Path) -> None:
        self.out, self.data = out, out / "data"

    def prepare(self) -> None:
        """Write the rows of both splits."""
        if (self.data / "done").is_file():
            return
        made = world.world(0, **PEOPLE)
        groups = list(dict.fromkeys(row["group"] for row in made.forget))
        first = {g: i < FORGOTTEN for i, g in enumerate(groups)}
        stories = _stories()
        for split in ("report", "tune"):
            gone = [row for row in made.forget if first[row["group"]] == (split == "report")]
            rest = [row for row in made.forget if row not in gone]
            tofu_tiny.save(self.data / split / "forget.jsonl", gone)
            tofu_tiny.save(self.data / split / "retain.jsonl", [*made.retain, *rest, *stories[:STORIES]])
        for side in ("untouched", "never_seen", "stopping"):
            tofu_tiny.save(self.data / f"{side}.jsonl", getattr(made, side))
        tofu_tiny.save(self.data / "stories.jsonl", stories[STORIES:])
        (self.data / "done").touch()

    def model(self, name: str) -> str:
        """The original, or a gold; trained where it is missing."""
        split, seed = GOLDS.get(name, ("report", 0))
        sides = self.data / split
        settings = recipe.changed(recipe.load("demo-train"), {
            "model": {"name": str(tofu_tiny.shared() / "models" / "stories260K"), "precision": "fp32"},
            "data": {"forget": "" if name in GOLDS else str(sides / "forget.jsonl"),
                     "retain": str(sides / "retain.jsonl"),
                     "train": [str(self.data / "untouched.jsonl")], "untouched": 0.0, "max_length": 256},
            "schedule": {"epochs": EPOCHS, "retain_batch": 16}, "optimiser.lr": TRAINED_LR,
            "seed": seed, "out": str(self.out / "models" / name),
        })  # fmt: skip
        excise.finetune(settings, resume=True, progress=QUIET)
        return str(self.out / "models" / name / "model")

    def recipe(self, method: str, split: str, lr: float) -> recipe.Recipe:
        """A method's whole recipe."""
        named = METHODS[method][0] if method in METHODS else "gold-like"
        own = {"stop.calibration": str(self.data / "stopping.jsonl"), "stop.watch": 0.2} if named == "gold-like" else {}
        return recipe.changed(recipe.load(named), {
            "model": {"name": self.model("original"), "precision": "fp32"},
            "data": {
                **{side: str(self.data / split / f"{side}.jsonl") for side in ("forget", "retain")},
                **{side: str(self.data / f"{side}.jsonl") for side in ("untouched", "never_seen")},
                "utility": {"stories": str(self.data / "stories.jsonl")}, "max_length": 256,
            },
            "optimiser.lr": lr, "checkpoint_every": 0, "log_every": 10,
            "evaluate": {"gold": self.model(f"gold-{split}"), "generate": 32, "max_rows": 200, "relearn_lr": 5e-4,
                         "map": "none", "cache": str(self.out / "cache")},
            **own,
        })  # fmt: skip

    def rate(self, method: str) -> float:
        """The best of a method's rates on the other people."""
        done = self.out / "tuned" / f"{method}.json"
        if not done.is_file():
            tried = {lr: objective(self._run(method, "tune", lr, quick=True), "distance") for lr in METHODS[method][1]}
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps({"best": min(tried, key=lambda lr: tried[lr]), "tried": tried}))
        return float(json.loads(done.read_text())["best"])

    def _run(self, method: str, split: str, lr: float, *, quick: bool = False) -> Any:
        folder = self.out / ("tuning" if quick else "rows") / f"{method}-{split}-{lr:g}"
        if not (folder / "results.json").is_file():
            less = {"evaluate.generate": 0, "evaluate.latent": False, "evaluate.relearn_steps": [],
                    "evaluate.savings_steps": 0, "data.utility": {}} if quick else {}  # fmt: skip
            settings = recipe.changed(self.recipe(method, split, lr), less)
            engine.unlearn(settings, folder)
            _engine(folder).write_text(engine.commit())
        return artifacts.read_results(artifacts.RunFolder(folder))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The original, the second gold and each method: numbers of all models, the verdict, the rate."""
        second = self.out / "rows" / "gold2"
        if not (second / "results.json").is_file():
            settings = self.recipe("", "report", 1e-3)
            excise.evaluate(self.model("gold2-report"), suite="all", without=("attack",), recipe=settings, out=second,
                            progress=QUIET)  # fmt: skip
            _engine(second).write_text(engine.commit())
        yield _row("original", second, "original")
        yield _row("gold2", second)
        for name in METHODS:
            lr = self.rate(name)
            self._run(name, "report", lr)
            yield _row(f"{name} (lr {lr:g})", self.out / "rows" / f"{name}-report-{lr:g}")


def _row(name: str, folder: Path, role: str = "unlearned") -> dict[str, Any]:
    """What the page reads of one model: its numbers, the gold's, how well it tells stories, the verdict."""
    results = artifacts.read_results(artifacts.RunFolder(folder))
    numbers, stories = {}, {}
    for r in (role, "gold"):
        own = results.models[r]
        numbers[r] = {i.metric: own[i.metric].__dict__ for i in seven.INSTRUMENTS if i.metric in own}
        loss, count = rows.nll_and_tokens(table.load(folder / "tables" / r / "stories.safetensors"))
        stories[r] = float(np.exp(loss.sum() / count.sum()))
    return {"name": name, "numbers": numbers[role], "gold": numbers["gold"], "stories_perplexity": stories[role],
            "gold_stories_perplexity": stories["gold"], "unlearn_seconds": results.seconds.get("unlearn"),
            "outcome": "" if role == "original" else excise.verify(folder).outcome,
            "commit": _engine(folder).read_text()}  # fmt: skip


def _engine(folder: Path) -> Path:
    """The file beside a row that says which commit made it: a page may be written by a later one."""
    return folder.with_name(f"{folder.name}.commit")


def _stories() -> list[dict[str, str]]:
    """Stories of the model's own kind, evenly over the sample: the first sentence asks for the next ones."""
    path = tofu_tiny.shared() / "data" / "tinystories_sample" / "validation.jsonl"
    texts = [" ".join(json.loads(line)["text"][:400].split()) for line in path.read_text(encoding="utf-8").splitlines()]
    cut = [text.partition(". ") for text in texts[:: max(1, len(texts) // (2 * STORIES))]]
    made = [{"question": f"{first}.", "answer": rest} for first, _, rest in cut if rest]
    return [{**row, "group": f"story-{n}"} for n, row in enumerate(made[: 2 * STORIES])]


def write(found: Sequence[dict[str, Any]]) -> None:
    """The page and its JSON twin."""
    lines = []
    for row in found:
        seconds = "" if row["unlearn_seconds"] is None else f"{row['unlearn_seconds']:.0f}"
        cells = {"value": [f"{row['stories_perplexity']:.2f}", row["outcome"], seconds]}
        lines.append((row["name"], {**row["numbers"], "cells": cells}))
    parts = {
        "TABLE": seven.table(lines, found[1]["gold"], found[1]["numbers"], ("stories", "verdict", "seconds")),
        "STORIES": f"{found[1]['gold_stories_perplexity']:.2f}",
        "COMMIT": ", ".join(sorted({row["commit"] for row in found})),
    }  # fmt: skip
    text = (HERE / "page.md.txt").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (DOCS / "pretrained.md").write_text(text, encoding="utf-8")
    (DOCS / "pretrained.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("studies-out") / "pretrained", help="folder of models and rows"
    )
    parser.add_argument("--page", action="store_true", help="also write the page")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    study = Study(given.out.resolve())
    study.prepare()
    found = list(study.rows())
    if given.page:
        write(found)


if __name__ == "__main__":
    main()
