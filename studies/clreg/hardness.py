"""Easy and hard facts: what was learned early against what was learned late, and what CLReg does to each by layer.

A question is easy if a short original (``half``: 4 epochs instead of 11, the recipe otherwise the same) already gives
its answer a higher probability than it gives to the median question. The rest is read from saved tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import tofu_tiny

EPOCHS = 4
#: What is compared: name in the table -> row of the study.
SETTINGS = {
    "without CLReg": "simnpo-forget10-s0",
    "Last-1": "simnpo+clreg-forget10-s0",
    "Last-2": "last2",
    "Last-4": "last4",
}


def measure(out: Path, *, rows: int) -> None:
    """Train the short original where it is missing and keep the probability of each forget answer in it."""
    done = out / "hardness.json"
    if done.is_file():
        return
    from excise import models, recipe
    from excise.commands.starting import sides
    from excise.forward import Anatomy
    from excise.metrics import measure as measuring
    from excise.metrics.rows import probability
    from excise.records import read_records

    place = str(tofu_tiny.train(out / "tiny", "half", epochs=EPOCHS))
    model, tokenizer = models.load(recipe.Model(name=place)), models.load_tokenizer(place)
    records = read_records(str(out / "tiny" / "forget10" / "forget.jsonl"))[:rows]
    how = sides.encoding(recipe.Data(), context=models.context_length(model))
    table = measuring.sweep(model, Anatomy.of(model), tokenizer, {"forget": records}, how).tables["forget"]
    done.write_text(json.dumps([round(float(p), 6) for p in probability(table)]) + "\n")


def answers(out: Path, row: str, model: str = "unlearned") -> np.ndarray:
    """``[rows]`` probability of each forget answer in a model of a finished row."""
    from excise.artifacts import open_run
    from excise.metrics import table
    from excise.metrics.rows import probability

    return probability(table.load(open_run(out / "rows" / row).table(model, "forget")))


def split(out: Path) -> dict[str, Any] | None:
    """What was found, by setting; None before the short original and the first two rows are there.

    Returns:
        ``early`` (mean probability in the short original) and ``n`` for easy and hard, and per setting, for easy, hard
        and their difference, the mean log10 probability of the answers with a bootstrap interval over questions, the
        ``change`` against the run without CLReg, and that of deeper settings against Last-1 (``beside``), question by
        question.
    """
    if not (out / "hardness.json").is_file():
        return None
    there = {name: row for name, row in SETTINGS.items() if (out / "rows" / row / "row.json").is_file()}
    if not {"without CLReg", "Last-1"} <= set(there):
        return None
    early = np.array(json.loads((out / "hardness.json").read_text()))
    easy = np.argsort(np.argsort(-early)) < len(early) / 2
    plain, last = (np.log10(answers(out, SETTINGS[name])) for name in ("without CLReg", "Last-1"))
    gold = np.log10(answers(out, SETTINGS["without CLReg"], "gold"))
    found: dict[str, Any] = {"n": [int(easy.sum()), int((~easy).sum())]}
    found["early"] = [float(early[easy].mean()), float(early[~easy].mean())]
    found["settings"] = {"gold": {"level": _intervals(gold, easy)}}
    for name, row in there.items():
        own = np.log10(answers(out, row))
        found["settings"][name] = {"level": _intervals(own, easy), "change": _intervals(own - plain, easy)}
        if name in ("Last-2", "Last-4"):
            found["settings"][name]["beside"] = _intervals(own - last, easy)
    return found


def _intervals(values: np.ndarray, easy: np.ndarray) -> dict[str, list[float]]:
    """Mean and 95 % bootstrap interval over questions of the easy, the hard, and easy minus hard."""
    rng = np.random.default_rng(0)
    draws = {
        name: rng.choice(own, (2000, len(own))).mean(axis=1)
        for name, own in (("easy", values[easy]), ("hard", values[~easy]))
    }
    draws["difference"] = draws["easy"] - draws["hard"]
    mean = {"easy": values[easy].mean(), "hard": values[~easy].mean()}
    mean["difference"] = mean["easy"] - mean["hard"]
    return {k: [float(mean[k]), *(float(q) for q in np.quantile(v, (0.025, 0.975)))] for k, v in draws.items()}
