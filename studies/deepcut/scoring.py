"""Logits of a classifier at every label of some rows, the tables that metrics are made from, a run's folder of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import engine
from excise import artifacts, models, recipe
from excise.artifacts import Number, Results, RunFolder
from excise.commands import matching
from excise.commands.starting import sides
from excise.forward import Anatomy, Batch, Step, logits
from excise.metrics import class_scores
from excise.metrics.measure import evaluating, group_ids
from excise.metrics.table import ANSWER, Table, check, save
from excise.records import Record
from excise.tasks import TASKS
from excise.tasks.causal_lm import Encoding

BATCH = 32


@torch.no_grad()
def logits_of(place: Path, records: Sequence[Record], task: str, how: Encoding) -> list[Tensor]:
    """``[n_i, C]`` fp32 logits of each row's labels, by a model folder in evaluation mode."""
    model = models.load(recipe.Model(name=str(place), task=task))  # type: ignore[arg-type]
    tokenizer = models.load_tokenizer(str(place), task=task)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))  # type: ignore[union-attr]
    examples = TASKS[task].encode_records(records, tokenizer, how, names=names)
    anatomy, out = Anatomy.of(model), []
    with evaluating(model):
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            batch = Batch(**TASKS[task].collate(part, pad_id=tokenizer.pad_token_id))
            found = Step(model, anatomy, {"rows": batch}).run([logits("rows")])[logits("rows")]
            out += list(found.rows(0, len(found)).float().split([len(e.classes) for e in part]))
    return out


def tables(
    said: Mapping[str, Sequence[Tensor]], records: Mapping[str, Sequence[Record]], names: Sequence[str]
) -> dict[str, Table]:
    """What metrics read, side by side, from logits (of an ensemble, for instance) instead of from a model."""
    number, groups = {name: i for i, name in enumerate(names)}, group_ids(records)
    out = {}
    for side, rows in records.items():
        logp = torch.cat(list(said[side])).log_softmax(-1)
        gold = torch.tensor([number[tag] for r in rows for tag in r.tags])
        predicted, p = logp.argmax(-1), logp.exp()
        mean = (p * logp).sum(-1)
        columns = {
            "row": np.arange(len(rows), dtype=np.int32),
            "kind": np.full(len(rows), ANSWER, np.int8),
            "eos": np.zeros(len(rows), bool),
            "offsets": np.concatenate(([0], np.cumsum([len(r.tags) for r in rows]))).astype(np.int64),
            "logp": logp.gather(-1, gold[:, None])[:, 0].numpy(),
            "hit": (predicted == gold).numpy(),
            "mu": mean.numpy(),
            "sigma": (p * (logp - mean[:, None]).square()).sum(-1).sqrt().numpy(),
            "gold_class": gold.numpy().astype(np.int16),
            "predicted_class": predicted.numpy().astype(np.int16),
        }
        if side in groups:
            columns["group"] = groups[side]
        out[side] = check(Table(side, len(rows), columns, tuple(names)))
    return out


def strangers(settings: recipe.Recipe) -> float:
    """Strict F1 of the forget rows by whoever never saw them (``data.never_saw``)."""
    given = sides.of(settings)
    matching.match(settings, given, engine.Clock(quiet=True))
    told, names = given.unseen["forget"], given.unseen["forget"][0].names
    logp = [torch.from_numpy(np.take_along_axis(row.likely, row.classes.argsort(-1), -1)) for row in told]
    made = tables({"forget": logp}, {"forget": given.records["forget"]}, names)
    return float(Number.of(class_scores.score(made).values["forget_f1"]).value or 0.0)


def write(run: RunFolder, tables: Mapping[str, Mapping[str, Table]], seconds: Mapping[str, float]) -> None:
    """Leave a run folder as `excise run` would, of models by role (``gold`` among them) measured elsewhere."""
    for (role, own), side in ((item, side) for item in tables.items() for side in item[1]):
        run.table(role, side).parent.mkdir(parents=True, exist_ok=True)
        save(own[side], run.table(role, side))
    found = {role: class_scores.score(own, tables["gold"]).values for role, own in tables.items()}
    shown = {role: {k: Number.of(v) for k, v in own.items()} for role, own in found.items()}
    artifacts.write_results(run, Results(shown, dict(seconds)))


def numbers(run: RunFolder) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> metric -> value, bounds and rows of a measured run."""
    return {
        role: {m: {k: v for k, v in n.__dict__.items() if v is not None and k != "extra"} for m, n in own.items()}
        for role, own in artifacts.read_results(run).models.items()
    }
