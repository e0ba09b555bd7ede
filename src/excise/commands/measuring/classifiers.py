"""How classifiers (taggers of words, classifiers of texts) are measured and judged: F1, membership, geometry."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from excise import models, recipe
from excise.attacks import relearn_classes
from excise.attacks.target import Target
from excise.commands.measuring.measured import Measured, Numbers, relearned, relearning_picture
from excise.commands.measuring.parts import Part, Parts
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.forward import Anatomy
from excise.metrics import class_scores, class_states, states, tagging
from excise.metrics.statistics import privleak_null_spread
from excise.metrics.table import Table
from excise.records import Record

#: Every side is measured: F1 on the rows that unlearning trained on is what papers report as "retain".
INSTEAD_OF_RETAIN: tuple[str, ...] = ()
#: Layer whose states are read: the one that the classifier reads.
LAYER = -1
#: Nats per entity; logarithmic, since most known entities have almost none.
_LOSS_EDGES = np.geomspace(1e-3, 10.0, 17)


def measure(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    parts: Parts = Parts(),  # noqa: B008 - frozen
) -> Measured:
    """One classifier's scores, states and relearning curves; see `evaluation.measure_model`."""
    how = sides.encoding(settings.data, context=models.context_length(model))
    options, anatomy, task = settings.evaluate, Anatomy.of(model), settings.model.task
    model.eval()
    with progress.stage(f"measure {name}", 100) as advance:
        swept = tagging.sweep(
            model, anatomy, tokenizer, records, how, task=task, batch_tokens=options.batch_tokens,
            layers=[LAYER] if options.latent else [],
            progress=lambda done, total: advance(100 * done / max(total, 1)),
        )  # fmt: skip
    out = Measured(dict(swept.tables), dict(swept.states))
    if options.include_text and "forget" in out.tables:
        out.texts["forget"] = _given(out.tables["forget"])
    if options.relearn_steps and len(records.get("forget", ())) > 1:

        def attacked() -> Part:
            curves = relearn_classes.class_curve(
                Target(model, anatomy, tokenizer, records, how, seed=settings.seed), task=task,
                batch_tokens=options.batch_tokens, steps=options.relearn_steps,
                lr=options.relearn_lr or settings.optimiser.lr,
            )  # fmt: skip
            more = {"f1": curves.f1} if task == "token_classification" else {}
            return Part(extra={"probability": curves.probability, **more})

        with progress.stage(f"relearn {name}"):
            out.curves = parts.kept("relearn", f"relearn {name}", progress, attacked).extra
    return out


def _given(table: Table) -> list[str]:
    """What a model answers to each row: its tags, or its class."""
    names, offsets = table.classes, table.columns["offsets"]
    given = [names[c] for c in table.columns["predicted_class"]]
    return [" ".join(given[a:b]) for a, b in pairwise(offsets)]


def judge(
    measured: Mapping[str, Measured], records: Mapping[str, list[Record]], settings: recipe.Recipe
) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Numbers of every classifier and what the pictures are drawn from; see `writing.judge`."""
    gold = measured.get("gold")
    groups = {side: [r.group for r in rows] for side, rows in records.items()}
    numbers: dict[str, Numbers] = {}
    not_shown: dict[str, str] = {}
    scatter: dict[str, Any] = {}
    for name, own in measured.items():
        found = class_scores.score(own.tables, gold.tables if gold else None)
        numbers[name] = {k: dict(v) for k, v in found.values.items()}
        not_shown |= found.not_shown
        if own.states:
            latent = class_states.latent(own.tables, _top(own), groups)
            numbers[name] |= latent.values
            not_shown |= latent.not_shown
            scatter[name] = latent.scatter
        numbers[name] |= relearned(own, len(records.get("forget", ())))
    tested = not_tested(records, gold is not None, settings)
    pictures: dict[str, Any] = {"not_shown": not_shown, "not_tested": tested}
    pictures |= relearning_picture(dict(measured), settings.evaluate.relearn_steps)
    if any(points for sides_ in scatter.values() for points in sides_.values()):
        pictures["classes"] = {"models": scatter}
    pictures |= _losses(measured)
    original = measured.get("original")
    if settings.evaluate.map != "none" and original and original.states:
        clouds = {name: _clouds(m) for name, m in measured.items() if m.states}
        pictures["map"] = states.state_map(clouds, fit_on="original", method=settings.evaluate.map)
    return numbers, pictures


def _top(own: Measured) -> dict[str, np.ndarray]:
    return {side: by_layer[max(by_layer)] for side, by_layer in own.states.items() if by_layer}


def _clouds(own: Measured) -> dict[str, np.ndarray]:
    """States by what they are: entities of each side, and kept words outside entities as a cloud of their own."""
    out: dict[str, np.ndarray] = {}
    kept = "untouched" if "untouched" in own.states else "retain"
    for side, values in _top(own).items():
        labels = class_states.labels_of(own.tables[side], values)
        inside = labels.type != class_states.OUTSIDE
        out[side] = labels.states[inside]
        if side == kept and not inside.all():
            out["outside"] = labels.states[~inside]
    return out


def _losses(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The picture of the membership attack: rows by loss on their entities, forgotten and never seen."""
    shown = {name: m.tables for name, m in measured.items() if {"forget", "never_seen"} <= m.tables.keys()}
    if not shown:
        return {}
    counts = {
        name: {side: class_scores.loss_histogram(tables[side], _LOSS_EDGES) for side in ("forget", "never_seen")}
        for name, tables in shown.items()
    }
    first = next(iter(counts.values()))
    spread = privleak_null_spread(*(sum(first[side]) for side in ("forget", "never_seen")))
    return {"membership": {"edges": _LOSS_EDGES.tolist(), "models": counts}, "privleak_null_spread": spread}


def not_tested(records: Mapping[str, list[Record]], gold: bool, settings: recipe.Recipe) -> list[str]:
    """What a reader might take for granted and nobody looked at."""
    what = "sentences" if settings.model.task == "token_classification" else "texts"
    out = [
        f"Other {what} about the same persons or things, and the same ones reworded or in other contexts.",
        "Attacks with reference models of their own (LiRA and its kind); the attack here looks at the loss alone.",
        "Layers below the one that the classifier reads.",
        "Quantised or pruned copies of the model.",
        "Other copies that hold the data: the original weights, checkpoints, caches and the training files themselves.",
    ]
    if not gold:
        out.insert(0, "A model trained without the rows (gold): none was given, so no number has its target beside it.")
    if "never_seen" not in records:
        out.insert(0, "Membership inference: no never-seen rows were given.")
    if "test" not in records:
        out.append("Unseen rows of the kind that the model works on: name a set as data.utility.test.")
    if not settings.evaluate.relearn_steps:
        out.append("Relearning.")
    elif len(records.get("forget", ())) < 2:
        out.append("Relearning: it needs two forget rows or more, one to train on and one to measure.")
    return out
