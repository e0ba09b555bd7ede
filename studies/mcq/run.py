"""The multiple-choice study: a small model learns exam questions by heart and is made to forget one subject.

    python studies/mcq/run.py [--out studies-out/mcq] [--quick] [--max-minutes M] [--page]

Questions are the test rows of ``mmlu_subset`` (``EXCISE_SHARED``, default ``../shared``). Each row (a model that is
trained, then asked) leaves a JSON file below ``--out`` and is not done again. About three minutes of one core. A whole
study writes ``docs/results/mcq.md`` and its JSON twin; a quick or unfinished one writes them beside its rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import page

Values = dict[str, Any]

FORGET = "world_religions"
KEPT = ("astronomy", "marketing")
NEVER_ASKED = "sociology"
#: One question in five of the kept subjects is learned, and then stays out of unlearning.
UNTOUCHED = 5
#: Method -> what it changes of the recipe mcq-forget; rates and lengths by a few trials each.
METHODS: dict[str, Values] = {
    "SimNPO (the recipe)": {},
    "SimNPO, a third more steps": {"schedule.steps": 80},
    "NPO": {"objective.forget": {"npo": {"beta": 0.1}}, "optimiser.lr": 1e-3, "schedule.steps": 80},
}
SIDES = ("forget", "retain", "untouched", "never_asked")


@dataclass(frozen=True)
class Study:
    """Folders, and the rows that are there."""

    out: Path
    quick: bool

    def side(self, name: str) -> str:
        """File of a side."""
        return str(self.out / "data" / f"{name}.jsonl")

    def row(self, name: str) -> Path:
        """The file of a row."""
        return self.out / "rows" / f"{name}.json"

    def model(self, name: str) -> Path:
        """Folder of a run."""
        return self.out / "models" / name


def write_questions(study: Study) -> None:
    """The questions of each side, from the test rows of the shared data."""
    shared = Path(os.environ.get("EXCISE_SHARED", "../shared")) / "data" / "mmlu_subset" / "test.jsonl"
    if not shared.is_file():
        sys.exit(f"{shared}: not there; set EXCISE_SHARED to the folder that holds data/mmlu_subset")
    rows = [json.loads(line) for line in shared.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["subject"] in KEPT]
    sides = {
        "forget": [row for row in rows if row["subject"] == FORGET],
        "retain": [row for i, row in enumerate(kept) if i % UNTOUCHED],
        "untouched": [row for i, row in enumerate(kept) if not i % UNTOUCHED],
        "never_asked": [row for row in rows if row["subject"] == NEVER_ASKED],
    }
    for name, own in sides.items():
        own = own[:40] if study.quick else own
        Path(study.side(name)).parent.mkdir(parents=True, exist_ok=True)
        Path(study.side(name)).write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")


def rows(study: Study) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Every row by name, in an order in which each finds what it needs."""
    yield "original", lambda: teach(study, "original", ["retain", "untouched", "forget"])
    yield "gold", lambda: teach(study, "gold", ["retain", "untouched"])
    for method in list(METHODS)[:1] if study.quick else METHODS:
        yield _slug(method), functools.partial(forget, study, method)


def teach(study: Study, name: str, sides: list[str]) -> Values:
    """Train from scratch on some sides; the gold never sees the forgotten subject."""
    from excise import recipe
    from excise.commands.finetuning import finetune
    from excise.commands.progress import Progress

    folder = study.model(name)
    shutil.rmtree(folder, ignore_errors=True)
    first, *others = (study.side(side) for side in sides)
    changes: Values = {"data.retain": first, "data.train": others, "out": str(folder)}
    if name != "original":  # the same tokenizer: models that read other tokens are not comparable
        changes |= {"model.tokenizer": str(study.model("original") / "model"), "model.tokenizer_size": None}
    if study.quick:
        changes["schedule.epochs"] = 15
    finetune(recipe.changed(recipe.load("mcq-train"), changes), progress=Progress(quiet=True))
    return ask(study, name)


def forget(study: Study, method: str) -> Values:
    """One unlearning run, from the original, and the questions after it."""
    from excise import recipe
    from excise.commands import training
    from excise.commands.progress import Progress
    from excise.commands.starting import preparing, sides

    name = _slug(method)
    shutil.rmtree(study.model(name), ignore_errors=True)
    files = {f"data.{side}": study.side(side) for side in ("forget", "retain", "untouched")}
    here = {
        "model.name": str(study.model("original") / "model"),
        "model.precision": "fp32",
        "out": str(study.model(name)),
    }
    settings = recipe.changed(recipe.load("mcq-forget"), {**METHODS[method], **files, **here})
    prepared = preparing.prepare_unlearning(settings, sides.read(settings.data, seed=settings.seed), resume=False)
    with training.folders.opened(settings, resume=False) as run:
        training.train_into(prepared, run, Progress(quiet=True), stage="unlearn", resume=False)
    return {"method": method, **ask(study, name)}


def ask(study: Study, name: str) -> Values:
    """Accuracy on every side, by the command of the package."""
    import excise
    from excise.commands.progress import Progress

    files = [study.side(side) for side in SIDES]
    found = excise.evaluate(study.model(name) / "model", suite="mcq", tasks=files, progress=Progress(quiet=True))
    assert isinstance(found, dict)
    return {"measured": found["models"]["unlearned"]}


def _slug(method: str) -> str:
    return re.sub(r"[^a-z]+", "-", method.lower()).strip("-")


def main() -> None:
    """Do what is missing, within the time given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of rows and models (default studies-out/mcq)")
    parser.add_argument("--quick", action="store_true", help="forty questions a side, one method")
    parser.add_argument("--max-minutes", type=float, default=30, help="begin no new row after so long")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    import torch

    from excise import files

    torch.set_num_threads(1)
    study = Study(given.out or Path("studies-out") / ("mcq-quick" if given.quick else "mcq"), given.quick)
    end, missing = time.monotonic() + 60 * given.max_minutes, 0
    write_questions(study)
    for name, do in rows(study):
        if study.row(name).is_file():
            continue
        if given.page or time.monotonic() > end:
            missing += 1
            continue
        start = time.process_time()
        row = {"row": name, **do(), "cpu_seconds": round(time.process_time() - start, 1)}
        files.write_text(study.row(name), json.dumps(row, indent=1) + "\n")
        print(f"{name}: {row['cpu_seconds']:.0f} s", file=sys.stderr, flush=True)
    if missing:
        print(f"out of time: {missing} rows are missing; run again to go on", file=sys.stderr)
    done = [json.loads(study.row(name).read_text()) for name, _ in rows(study) if study.row(name).is_file()]
    whole = not (given.quick or missing)
    target = Path(__file__).resolve().parents[2] / "docs" / "results" if whole else study.out
    page.write(target, done, whole=whole)
    print(target / "mcq.md")


if __name__ == "__main__":
    main()
