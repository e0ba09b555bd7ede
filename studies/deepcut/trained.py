"""Models of the DeepCUT study: the encoder with a fresh head, and what is trained from it, each with what it cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine
from excise import models, recipe
from excise.commands.finetuning import finetune
from excise.records import Record
from excise.tasks import TASKS

#: Embeddings and the two lowest layers stay: dense gradients of the embedding table were half the cost.
TRAINED = r"encoder\.layer\.[2-9]|classifier"
RATE, EPOCHS, EPOCHS_SMALL = 2e-4, 8, 30


def base(task: str) -> dict[str, Any]:
    """What every recipe of the study sets."""
    # One precision for all rows: what a probe finds faster may differ from day to day.
    return {
        "model.task": task, "model.precision": "fp32", "model.train_only": TRAINED, "data.long": "split",
        "checkpoint_every": 0,
    }  # fmt: skip


def fresh(folder: Path, encoder: Path, records: list[Record], task: str, seed: int) -> Path:
    """The encoder with a new head for every class that occurs, so that all models of a data set number them alike."""
    if not (folder / "config.json").is_file():
        names = TASKS[task].class_names(records)
        model = models.load(recipe.Model(name=str(encoder), task=task), classes=names, seed=seed)  # type: ignore[arg-type]
        models.save(model, models.load_tokenizer(str(encoder), task=task), folder)
    return folder


def fit(
    folder: Path, start: Path, rows: Path, task: str, *, epochs: float, seed: int, threads: int
) -> tuple[Path, dict[str, float]]:
    """Train on a file of rows unless that is done; the model's folder, and its cost in seconds."""
    if not (folder / "cost.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # half a run would be half a cost
        clock = engine.Clock(quiet=True)
        changes = {
            **base(task), "model.name": str(start), "data.retain": str(rows), "schedule.epochs": epochs,
            "optimiser.lr": RATE, "seed": seed, "out": str(folder), "log_every": 10,
        }  # fmt: skip
        finetune(recipe.changed(recipe.load("ner-train"), changes), progress=clock)
        (folder / "cost.json").write_text(json.dumps({**clock.cost("finetune"), "threads": threads}))
    return folder / "model", json.loads((folder / "cost.json").read_text())


@torch.no_grad()
def vectors(encoder: Path, records: list[Record]) -> np.ndarray:
    """``[rows, D]`` mean of the encoder's last states over each sentence, as it was before any training."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    out = []
    for start in range(0, len(records), 32):
        texts = [r.completion for r in records[start : start + 32]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states, where = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        out.append(((states * where).sum(1) / where.sum(1)).numpy())
    return np.concatenate(out)
