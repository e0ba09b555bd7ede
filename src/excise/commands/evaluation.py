"""Measuring models and writing what was found: the second half of `excise run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from excise import artifacts, models, recipe
from excise.attacks import relearn
from excise.commands import cache, findings, sides
from excise.commands.progress import Progress
from excise.forward import Anatomy
from excise.metrics import generate, measure, states
from excise.metrics.scores import score as score_tables
from excise.metrics.statistics import privleak_null_spread
from excise.metrics.table import Table
from excise.metrics.table import save as save_table
from excise.records import Record

Numbers = dict[str, dict[str, Any]]


@dataclass
class Measured:
    """What one model yields: scores by side, hidden states by side and layer, a relearning curve, generated text."""

    tables: dict[str, Table]
    states: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)


def limited(records: Mapping[str, Sequence[Record]], settings: recipe.Evaluate) -> dict[str, list[Record]]:
    """The measured rows: the first ``max_rows`` of each side; of the kept ones, ``untouched`` where it is given."""
    kept = {side: list(rows)[: settings.max_rows] for side, rows in records.items()}
    if "untouched" in kept:  # every number about what is kept is read from rows that unlearning did not train on
        kept.pop("retain", None)
    if not settings.rewordings:
        kept = {s: [dataclasses.replace(r, paraphrases=(), false_answers=()) for r in rows] for s, rows in kept.items()}
    return kept


def refuse_unfit(given: sides.Sides, tokenizer: Any, settings: recipe.Recipe) -> None:
    """Cut long texts, and refuse what measuring would stumble over before anything is written: rows, or a gold.

    Raises:
        InputRefused: Naming file and line, or the gold.
    """
    how = sides.encoding(
        settings.data, context=getattr(models.read_config(settings.model), "max_position_embeddings", None)
    )
    sides.cut(given, tokenizer, how)
    sides.refuse_unfit(limited(given.records, settings.evaluate), tokenizer, settings.data, how)
    if settings.evaluate.gold:
        folder = weights(settings.evaluate.gold)
        if not (Path(folder) / "adapter_config.json").is_file():
            models.read_config(recipe.Model(name=folder))


def measure_model(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    relearning: bool = True,
) -> Measured:
    """One model's scores, states, generations and relearning curve.

    Args:
        name: For the progress display.
        model: The model, in the precision it is to be measured in; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        records: Rows by side.
        settings: The recipe.
        progress: Where progress is shown.
        relearning: Whether to run the relearning attack.
    """
    how = sides.encoding(settings.data, context=models.context_length(model))
    options, anatomy = settings.evaluate, Anatomy.of(model)
    layers = list(range(1, anatomy.depth + 1)) if options.latent else []
    model.eval()
    with progress.stage(f"measure {name}", 100) as advance:
        swept = measure.sweep(
            model, anatomy, tokenizer, records, how, batch_tokens=options.batch_tokens, layers=layers,
            progress=lambda done, total: advance(100 * done / max(total, 1)),
        )  # fmt: skip
    out = Measured(dict(swept.tables), {k: v for k, v in swept.states.items()})
    if options.generate:
        with progress.stage(f"generate {name}", len(records)) as advance:
            for done, side in enumerate(records):
                out.tables[side], texts = generate.with_generations(
                    out.tables[side], model, tokenizer, records[side], how, max_new_tokens=options.generate
                )
                out.texts[side] = texts
                advance(done + 1)
    if relearning and options.relearn_steps and len(records["forget"]) > 1:
        with progress.stage(f"relearn {name}"):
            out.curve = relearn.curve(
                model, anatomy, tokenizer, records["forget"], how,
                steps=options.relearn_steps, lr=options.relearn_lr or settings.optimiser.lr, seed=settings.seed,
            )  # fmt: skip
    return out


def judge(
    measured: Mapping[str, Measured], records: Mapping[str, list[Record]], settings: recipe.Recipe
) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Numbers of every model and what the pictures are drawn from; the gold and the original stand beside each.

    Returns:
        ``results.json``'s ``models``, and ``pictures.json`` without its findings.
    """
    gold, original = measured.get("gold"), measured.get("original")
    groups = {side: [r.group for r in rows] for side, rows in records.items()}
    numbers: dict[str, Numbers] = {}
    not_shown: dict[str, str] = {}
    by_layer: dict[str, list[float]] = {}
    for name, own in measured.items():
        found = score_tables(own.tables, gold.tables if gold else None)
        numbers[name] = {k: dict(v) for k, v in found.values.items()}
        not_shown |= found.not_shown
        if own.states:
            latent = states.latent(own.states, groups, reference_states=original.states if original else None)
            numbers[name] |= latent.values
            not_shown |= latent.not_shown
            by_layer[name] = latent.entanglement_by_layer
        if own.curve:
            last = len(own.curve) - 1
            numbers[name]["relearned_probability"] = {
                "value": own.curve[last], "low": None, "high": None, "n": len(records["forget"]) // 2,
            }  # fmt: skip
    pictures: dict[str, Any] = {"not_shown": not_shown, "not_tested": not_tested(records, gold is not None, settings)}
    if any(m.curve for m in measured.values()):
        curves = {name: m.curve for name, m in measured.items() if m.curve}
        pictures["relearning"] = {"steps": list(settings.evaluate.relearn_steps), "models": curves}
    if by_layer:
        depth = max(len(v) for v in by_layer.values())
        pictures["entanglement_by_layer"] = {"layers": list(range(1, depth + 1)), "models": by_layer}
    if settings.evaluate.map != "none" and original and original.states:
        last_layer = {name: {s: v[max(v)] for s, v in m.states.items()} for name, m in measured.items() if m.states}
        pictures["map"] = states.state_map(last_layer, fit_on="original", method=settings.evaluate.map)
    if "never_seen" in records:
        spread = privleak_null_spread(len(records["forget"]), len(records["never_seen"]))
        pictures["privleak_null_spread"] = spread
    return numbers, pictures


def not_tested(records: Mapping[str, list[Record]], gold: bool, settings: recipe.Recipe) -> list[str]:
    """What a reader might take for granted and nobody looked at."""
    out = [
        "Sampled, adversarial or multi-turn prompts: only the given questions and paraphrases were asked, greedily.",
        "Quantised or pruned copies of the model.",
        "Other copies that hold the data: the original weights, checkpoints, caches and the training files themselves.",
        "Records about the same subject that are not among the rows to forget.",
    ]
    if not gold:
        out.insert(0, "A model trained without the rows (gold): none was given, so no number has its target beside it.")
    if "never_seen" not in records:
        out.insert(0, "Membership inference: no never-seen rows were given.")
    if not settings.evaluate.relearn_steps:
        out.append("Relearning.")
    elif len(records["forget"]) < 2:
        out.append("Relearning: it needs two forget rows or more, one to train on and one to measure.")
    return out


def write(
    run: artifacts.RunFolder,
    measured: Mapping[str, Measured],
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    log: Sequence[Mapping[str, Any]] = (),
) -> artifacts.Results:
    """Judge the models and write tables, numbers and pictures into a run folder."""
    with progress.stage("judge"):
        numbers, pictures = judge(measured, records, settings)
        names = [n for n in measured if n not in (artifacts.ORIGINAL, artifacts.GOLD)]
        logs = {name: log if name == artifacts.UNLEARNED else () for name in names}
        pictures["findings"] = [
            {**found, "model": name} for name in names for found in findings.findings(numbers, logs[name], name=name)
        ]
        for name, own in measured.items():
            for side, table in own.tables.items():
                path = run.table(name, side)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_table(table, path)
        if settings.evaluate.include_text:
            artifacts.write_examples(run, _examples(measured, records))
        shown = {model: {k: artifacts.Number.of(v) for k, v in own.items()} for model, own in numbers.items()}
    results = artifacts.Results(shown, progress.seconds)
    artifacts.write_pictures(run, pictures)
    artifacts.write_results(run, results)
    return results


def _examples(measured: Mapping[str, Measured], records: Mapping[str, list[Record]]) -> list[dict[str, Any]]:
    rows = records["forget"][:20]
    return [
        {
            "side": "forget", "question": r.prompt or "", "answer": r.completion,
            "generated": {name: m.texts["forget"][i] for name, m in measured.items() if "forget" in m.texts},
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip


def measure_named(
    role: str, place: str, records: Mapping[str, list[Record]], settings: recipe.Recipe, progress: Progress
) -> Measured:
    """An original or a gold, by hub id or folder: measured, or taken from the recipe's cache."""
    folder = settings.evaluate.cache and cache.entry(Path(settings.evaluate.cache), place, records, settings)
    found = cache.load(folder) if folder else None
    if found is not None:
        return Measured(*found)
    model, tokenizer = load_for_measuring(place, settings)
    own = measure_model(role, model, tokenizer, records, settings, progress)
    if folder:
        cache.save(folder, own.tables, own.states, own.curve)
    return own


def load_for_measuring(name: str, settings: recipe.Recipe) -> tuple[nn.Module, Any]:
    """A model to be measured, in its own precision, and its tokenizer; a run folder stands for its model."""
    place, base = weights(name), settings.model
    revision = base.revision if name == base.name else None
    if (Path(place) / "adapter_config.json").is_file():
        model = models.load_result(Path(place), base)
    else:  # `lora` only says that weights keep their own precision; no adapter is attached here
        model = models.load(dataclasses.replace(base, name=place, revision=revision, config=None))
    if torch.cuda.is_available():
        model = model.to("cuda")
    own = base.tokenizer if base.tokenizer and name == base.name else place
    return model, models.load_tokenizer(own, revision)


def weights(name: str) -> str:
    """Where the weights of a hub id, a model folder or a run folder lie."""
    folder = Path(name)
    return str(folder / "model") if (folder / "manifest.json").is_file() else name
