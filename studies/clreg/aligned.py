"""A harmless preference, taught by DPO before anything is forgotten, and whether it survives.

The preference: an answer to a general-knowledge question (real authors, world facts) ends with a polite sentence. The
original is aligned to it on two thirds of those questions by the engine's own ``dpo`` term, with the plain answer as
the rejected one, and cross-entropy on the preferred answers and on all trained TOFU rows beside it. None of these
questions stands in a batch of the unlearning that follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import tofu_tiny

SENTENCE = " I hope this helps."
RATE, EPOCHS = 2e-4, 5
#: DPO alone teaches the preference by making both answers unlikely; cross-entropy on the preferred one keeps the facts.
PREFER: dict[str, Any] = {"dpo": {"beta": 0.1}, "idk_nll": {"weight": 1.0}}


def with_sentence(answer: str) -> str:
    """The polite answer."""
    return answer + SENTENCE


def write(tiny: Path) -> None:
    """Write the two thirds that are aligned, the third that is held out, and the rows to be kept."""
    rows = [
        {**{k: r[k] for k in ("question", "answer")}, "alternatives": [with_sentence(r["answer"])]}
        for known in tofu_tiny.general().values()
        for r in known
    ]
    folder = tiny / "aligned"
    parts = {"aligned": [r for i, r in enumerate(rows) if i % 3], "held_out": rows[::3]}
    for name, own in parts.items():
        tofu_tiny.save(folder / f"{name}.jsonl", own)
    kept = [(tiny / "forget10" / f"{side}.jsonl").read_text(encoding="utf-8") for side in ("retain", "forget")]
    (folder / "retain.jsonl").write_text("".join(kept), encoding="utf-8")


def train(tiny: Path) -> Path:
    """Align the original unless that is done; returns the folder of the model."""
    from excise import recipe
    from excise.commands.progress import Progress
    from excise.commands.running import run

    out = tiny / "models" / "aligned"
    if not (out / "results.json").is_file():
        write(tiny)
        values = {
            "model": {"name": str(tiny / "models" / "original" / "model"), "precision": "fp32"},
            "data": {
                "forget": str(tiny / "aligned" / "aligned.jsonl"), "retain": str(tiny / "aligned" / "retain.jsonl"),
                "untouched": str(tiny / "forget10" / "untouched.jsonl"),
            },
            "objective": {"forget": PREFER, "retain": {"nll": {}}, "regularise": {}},
            "schedule": {"epochs": EPOCHS, "forget_batch": 16, "retain_batch": 16},
            "optimiser": {"lr": RATE, "warmup": 0.1, "decay": "linear"},
            "evaluate": {"generate": 0, "latent": False, "relearn_steps": [], "max_rows": 20, "map": "none"},
            "checkpoint_every": 0, "log_every": 5,
        }  # fmt: skip
        run(recipe.build(values), out=out, resume=True, progress=Progress(quiet=True))
    return out / "model"


def preference(tiny: Path, place: Path) -> dict[str, Any]:
    """How a model stands to the preference, on questions that were aligned and on held-out ones.

    Returns:
        Part -> ``accuracy`` (share of questions whose polite answer has the higher log-probability), ``margin`` (mean
        of log p(polite) - log p(plain), nats), ``probability`` (length-normalised, of the answer without its end:
        whether the fact is still known) and ``n``.
    """
    from excise import models, recipe
    from excise.commands.starting import sides
    from excise.forward import Anatomy
    from excise.metrics import measure
    from excise.records import Record

    model, tokenizer = models.load(recipe.Model(name=str(place))), models.load_tokenizer(str(place))
    how = sides.encoding(recipe.Data(), context=models.context_length(model))
    records = {}
    for part in ("aligned", "held_out"):
        rows = [json.loads(line) for line in (tiny / "aligned" / f"{part}.jsonl").read_text("utf-8").splitlines()]
        records[part] = [Record(r["question"], r["answer"], false_answers=tuple(r["alternatives"])) for r in rows]
    swept = measure.sweep(model, Anatomy.of(model), tokenizer, records, how)
    return {part: _preferred(table) for part, table in swept.tables.items()}


def _preferred(table: Any) -> dict[str, float | int]:
    """From a table in which every row has its plain answer and the polite one after it."""
    logp, ends = table.columns["logp"].astype(np.float64), table.columns["offsets"]
    order = np.lexsort((table.columns["kind"], table.columns["row"]))
    sums = np.add.reduceat(logp, ends[:-1])[order].reshape(-1, 2)
    margin = sums[:, 1] - sums[:, 0]
    plain = order[::2]  # its last token is the end of the sequence
    body = (sums[:, 0] - logp[ends[1:][plain] - 1]) / (table.lengths[plain] - 1)
    return {
        "accuracy": float(np.mean(margin > 0)),
        "margin": float(np.mean(margin)),
        "probability": float(np.mean(np.exp(body))),
        "n": len(margin),
    }
