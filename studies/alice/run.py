"""The Alice study: a pretrained story model learns a few passages by heart and is made to forget them.

    python studies/alice/run.py [--out studies-out/alice] [--quick] [--max-minutes M] [--page]

Each row (a model that is trained, a tuning trial, an unlearned model) leaves a JSON file below ``--out`` and is not
done again. The whole study takes about seven minutes of one core, ``--quick`` less than two. A whole study writes
``docs/results/alice.md`` and its JSON twin; a quick or unfinished one writes them beside its rows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import passages

import engine
import page

Values = dict[str, Any]

#: How often a passage of Alice stands in the training data for each time that another passage does.
COPIES = 10
#: The original, the gold and the tuning original: AdamW, the rate found by trial on the quick study's passages.
TEACH = {"name": "adamw", "lr": 2e-3, "warmup": 0.05, "decay": "cosine", "floor": 0.05}
EPOCHS = 5
RATES = [3e-4, 1e-3, 2e-3]
#: Method -> (objective, the second setting that is tuned beside the rate, its two values): six trials each. The values
#: were moved once, for all but NPO, after a pilot of six trials each (CLReg five) on the tuning passages.
METHODS: dict[str, tuple[Values, str, list[float]]] = {
    "GradDiff": ({"forget": {"ga": {}}, "retain": {"nll": {}}}, "objective.forget.ga.weight", [0.1, 0.2]),
    "NPO": ({"forget": {"npo": {}}, "retain": {"nll": {}}}, "objective.forget.npo.beta", [0.02, 0.1]),
    "SimNPO": ({"forget": {"simnpo": {}}, "retain": {"nll": {}}}, "objective.forget.simnpo.beta", [1.2, 2.5]),
    "SimNPO + CLReg": (
        {"forget": {"simnpo": {"beta": 2.5}}, "retain": {"nll": {}}, "regularise": {"clreg": {"temperature": 0.9}}},
        "objective.regularise.clreg.weight", [0.03, 0.1],
    ),
}  # fmt: skip
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """Folders, sizes and the rows that are there."""

    out: Path
    quick: bool

    @property
    def data(self) -> Path:
        """The passages."""
        return self.out / "data"

    @property
    def base(self) -> str:
        """The pretrained model."""
        return str(passages.shared() / "models" / "stories260K")

    def row(self, name: str) -> Path:
        """The file of a row."""
        return self.out / "rows" / f"{name}.json"

    def model(self, name: str) -> str:
        """Folder of a model by row name."""
        return self.base if name == "base" else str(self.out / "models" / name / "model")

    def read(self, name: str) -> Values:
        """A finished row."""
        return json.loads(self.row(name).read_text())

    def side(self, name: str) -> str:
        """File of a side."""
        return str(self.data / f"{name}.jsonl")

    def trials(self, method: str) -> list[Values]:
        """The settings that are tried for a method."""
        _, key, choices = METHODS[method]
        grid = [{"optimiser.lr": lr, key: value} for lr, value in itertools.product(RATES, choices)]
        return grid[2:4] if self.quick else grid


def rows(study: Study) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Every row by name, in an order in which each finds what it needs."""
    yield "base", lambda: {"measured": measure(study, "base", "forget")}
    for name, side in (("gold", None), ("original", "forget"), ("tuning-original", "tune")):
        yield name, functools.partial(teach, study, name, side)
    yield "tuning-gold", lambda: {"measured": measure(study, "gold", "tune")}
    for method in METHODS:
        for number, changes in enumerate(study.trials(method)):
            yield f"trial-{_slug(method)}-{number}", functools.partial(trial, study, method, number, changes)
    for method in METHODS:
        for seed in SEEDS[:1] if study.quick else SEEDS:
            yield f"{_slug(method)}-{seed}", functools.partial(report, study, method, seed)


def teach(study: Study, name: str, side: str | None) -> Values:
    """Fine-tune the story model on other text and, but for the gold, on many copies of the passages of a side."""
    from excise import recipe
    from excise.commands.finetuning import finetune
    from excise.commands.progress import Progress

    folder = study.out / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = recipe.build({
        "model": {"name": study.base, "precision": "fp32"},
        "data": {"retain": study.side("other"), "train": [study.side(side)] * COPIES if side else []},
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": EPOCHS, "retain_batch": 16},
        "optimiser": TEACH, "checkpoint_every": 0, "log_every": 50, "out": str(folder),
    })  # fmt: skip
    finetune(settings, progress=Progress(quiet=True))
    return {"measured": measure(study, name, side or "forget", whole=side != "tune")}


def unlearn(study: Study, name: str, start: str, side: str, method: str, changes: Values, seed: int) -> None:
    """One unlearning run, without the evaluation of ``excise run``: this study measures what its question needs."""
    from excise import recipe
    from excise.commands import folders, training
    from excise.commands.progress import Progress
    from excise.commands.starting import preparing, sides

    folder = study.out / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    values = {
        "model": {"name": study.model(start), "precision": "fp32"},
        "data": {
            "forget": study.side(side), "retain": study.side("other"), "untouched": study.side("stories_held_out"),
            "never_seen": study.side("never_seen"),
        },
        "objective": {"regularise": {}} | METHODS[method][0],
        "schedule": {"epochs": 10, "forget_batch": 8, "retain_batch": 8},
        "optimiser": {"warmup": 0.1, "decay": "cosine", "floor": 0.1},
        "checkpoint_every": 0, "log_every": 10, "seed": seed, "out": str(folder),
    }  # fmt: skip
    settings = recipe.changed(recipe.build(values), changes)
    given = sides.read(settings.data, seed=seed)
    prepared = preparing.prepare_unlearning(settings, given, resume=False)
    with folders.opened(settings, resume=False) as run:
        training.train_into(prepared, run, Progress(quiet=True), stage="unlearn", resume=False)


def trial(study: Study, method: str, number: int, changes: Values) -> Values:
    """A tuning trial, on passages that are not reported and with a model that never saw the reported ones."""
    name = f"trial-{_slug(method)}-{number}"
    unlearn(study, name, "tuning-original", "tune", method, changes, seed=0)
    found = measure(study, name, "tune", whole=False)
    shutil.rmtree(study.out / "models" / name)
    own, gold, start = found, study.read("tuning-gold")["measured"], study.read("tuning-original")["measured"]
    return {"method": method, "changes": changes, "measured": found, "distance": distance(own, gold, start)}


def distance(own: Values, gold: Values, start: Values) -> float:
    """What `excise tune` minimises: distance to the gold's forget probability, plus ten times the skill lost."""
    from excise.artifacts import Number, Results
    from excise.commands.tuning import objective

    named = {"unlearned": own, "gold": gold, "original": start}
    return objective(Results({n: {k: Number(m[k]) for k in _TUNED} for n, m in named.items()}), "distance")


_TUNED = ("forget_probability", "retain_probability")


def report(study: Study, method: str, seed: int) -> Values:
    """An unlearned model with the best settings of its trials."""
    tried = [study.read(f"trial-{_slug(method)}-{i}") for i in range(len(study.trials(method)))]
    best = min(tried, key=lambda t: t["distance"])
    name = f"{_slug(method)}-{seed}"
    unlearn(study, name, "original", "forget", method, best["changes"], seed)
    return {"method": method, "seed": seed, "changes": best["changes"], "measured": measure(study, name, "forget")}


def measure(study: Study, name: str, side: str, *, whole: bool = True) -> Values:
    """What a model says of the passages, of Alice passages and another book that it never saw, and of stories.

    Args:
        study: Folders.
        name: The row's name.
        side: ``forget`` or ``tune``: the passages that it is to have forgotten.
        whole: Also what it writes, and the relearning attack.
    """
    import numpy as np
    import torch

    from excise import models, recipe
    from excise.attacks import relearn
    from excise.attacks.target import Target
    from excise.commands.starting import sides
    from excise.forward import Anatomy
    from excise.geometry import entanglement
    from excise.metrics import generate
    from excise.metrics import measure as measuring
    from excise.metrics import rows as per_row
    from excise.metrics.scores import score
    from excise.records import read_records

    names = {"forget": side, "untouched": "stories_held_out", "never_seen": "never_seen", "other_alice": "other_alice"}
    records = {role: read_records(study.side(file)) for role, file in names.items()}
    model, tokenizer = models.load(recipe.Model(name=study.model(name))), models.load_tokenizer(study.base)
    how, anatomy = sides.encoding(recipe.Data(), context=models.context_length(model)), Anatomy.of(model)
    swept = measuring.sweep(model, anatomy, tokenizer, records, how, layers=[-1])
    tables, states = dict(swept.tables), {role: torch.from_numpy(own[-1]) for role, own in swept.states.items()}
    found: Values = {"entanglement": entanglement(states["forget"], states["untouched"])}
    if whole:
        tables["forget"], _ = generate.with_generations(
            tables["forget"], model, tokenizer, records["forget"], how, max_new_tokens=passages.PIECE // 2
        )
        found["forget_rouge_f1"] = float(np.mean(tables["forget"].columns["rouge_l_f1"]))
        target = Target(model, anatomy, tokenizer, records, how)
        found["relearned_probability"] = float(relearn.attack(target, steps=(0, 4), lr=5e-4, kept_rows=0).mean()[-1])
    for role, table in tables.items():
        found[f"{role}_loss"] = float(np.mean(per_row.sequence_nll(table)))
    scores = score(tables).values
    found |= {k: v["value"] for k, v in scores.items() if v["value"] is not None}
    found["intervals"] = {k: [v["low"], v["high"]] for k, v in scores.items() if v.get("low") is not None}
    found["rows"] = {role: table.rows for role, table in tables.items()}
    return found


def _slug(method: str) -> str:
    return method.lower().replace(" + ", "-")


def main() -> None:
    """Do what is missing, within the time given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of rows and models (default studies-out/alice)")
    parser.add_argument("--quick", action="store_true", help="half the passages, two trials, one seed")
    parser.add_argument("--max-minutes", type=float, default=60, help="begin no new row after so long")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    import torch

    from excise import files, models

    torch.set_num_threads(1)
    out = given.out or Path("studies-out") / ("alice-quick" if given.quick else "alice")
    study, end = Study(out, given.quick), time.monotonic() + 60 * given.max_minutes
    sizes = passages.QUICK if given.quick else passages.Sizes()
    passages.write(study.data, sizes, models.load_tokenizer(study.base))
    missing = []
    for name, do in rows(study):
        if study.row(name).is_file():
            continue
        if given.page or time.monotonic() > end:
            missing.append(name)
            continue
        start = time.process_time()
        found = do()
        row = {"row": name, **found, "commit": engine.commit(), "cpu_seconds": round(time.process_time() - start, 1)}
        files.write_text(study.row(name), json.dumps(row, indent=1) + "\n")
        print(f"{name}: {row['cpu_seconds']:.0f} s", file=sys.stderr, flush=True)
    if missing:
        print(f"out of time: {len(missing)} rows are missing; run again to go on", file=sys.stderr)
    done = {name: study.read(name) for name, _ in rows(study) if study.row(name).is_file()}
    target = out if given.quick or missing else Path(__file__).resolve().parents[2] / "docs" / "results"
    page.write(target, done, list(METHODS), quick=given.quick, missing=len(missing))
    print(target / "alice.md")


if __name__ == "__main__":
    main()
