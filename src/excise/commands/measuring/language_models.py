"""How a language model is measured and judged: scores of answers, generations, hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from excise import models, recipe
from excise.commands.measuring.measured import Measured, Numbers
from excise.commands.measuring.parts import Part, Parts, of_tables, tables_of
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import NotShown
from excise.forward import Anatomy
from excise.metrics import apart, fluency, gaps, generate, gradients, rows, single_rows, states
from excise.metrics.measure import sweep
from excise.metrics.scores import score as score_tables
from excise.metrics.statistics import privleak_null_spread
from excise.records import Record
from excise.tasks import causal_lm

#: Sides beside which ``retain`` is not measured: what is kept is read from rows that unlearning did not train on.
INSTEAD_OF_RETAIN = ("untouched",)
#: Sides whose inner layers and writing are looked at, and those that membership attacks tell apart.
_READ = ("forget", "untouched", "retain", "never_seen")
_MEMBERSHIP = ("forget", "never_seen")


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
    """One model's scores, states and generations; attacks are made by `attacking`.

    Args:
        name: For the progress display.
        model: The model, in the precision it is to be measured in; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        records: Rows by side.
        settings: The recipe.
        progress: Where progress is shown.
        parts: Where an unfinished evaluation keeps what is measured.
    """
    how = sides.encoding(settings.data, context=models.context_length(model))
    options, anatomy = settings.evaluate, Anatomy.of(model)
    lent = _Lent(model, anatomy, tokenizer, records, how, settings, _fluency(records) if options.generate else None)
    layers = list(range(1, anatomy.depth + 1)) if options.latent else []
    model.eval()
    with progress.stage(f"measure {name}", 100) as advance:
        out = _swept(name, lent, layers, progress, advance, parts)
    if options.generate:
        with progress.stage(f"generate {name}", len(records)) as advance:
            for done, side in enumerate(_asked_to_write(records, options)):
                part = parts.kept(f"generate-{side}", f"generate {name}", progress, partial(_written, side, lent, out))
                _add_columns(out, side, part.arrays)
                out.texts[side] = part.extra or []
                advance(done + 1)
    if options.gradient_norms:
        with progress.stage(f"gradients {name}", 2) as advance:
            for done, side in enumerate(s for s in _MEMBERSHIP if records.get(s)):
                make = partial(_gradients, side, lent)
                _add_columns(out, side, parts.kept(f"gradients-{side}", f"gradients {name}", progress, make).arrays)
                advance(done + 1)
    return out


@dataclasses.dataclass(frozen=True)
class _Lent:
    """What every instrument works with."""

    model: nn.Module
    anatomy: Anatomy
    tokenizer: Any
    records: Mapping[str, list[Record]]
    how: causal_lm.Encoding
    settings: recipe.Recipe
    fluency: fluency.Fluency | None


def _fluency(records: Mapping[str, list[Record]]) -> fluency.Fluency | None:
    """What a real answer reads like, from the true answers of these rows."""
    answers = {side: [r.completion for r in rows] for side, rows in records.items()}
    kept = answers.get("untouched") or answers.get("retain", [])
    return fluency.of_answers(kept, answers.get("forget", []) + answers.get("never_seen", []))


def _swept(
    name: str, lent: _Lent, layers: list[int], progress: Progress, advance: Callable[[float], None], parts: Parts
) -> Measured:
    """Scores and states of all sides; where states are read every time, since no part holds them."""
    states_of: dict[str, Any] = {}

    def make() -> Part:
        swept = sweep(
            lent.model, lent.anatomy, lent.tokenizer, lent.records, lent.how, layers=layers,
            batch_tokens=lent.settings.evaluate.batch_tokens, lens=_READ if layers else (),
            progress=lambda done, total: advance(100 * done / max(total, 1)),
        )  # fmt: skip
        states_of.update(swept.states)
        return of_tables(swept.tables)

    part = make() if layers else parts.kept("sweep", f"measure {name}", progress, make)
    return Measured(tables_of(part), states_of)


def _asked_to_write(records: Mapping[str, list[Record]], options: recipe.Evaluate) -> list[str]:
    """Sides whose answers are generated: beside a gold nothing is read of those to never-seen questions."""
    return [side for side in records if not (side == "never_seen" and options.gold)]


def _written(side: str, lent: _Lent, out: Measured) -> Part:
    """Columns of what the model writes for the rows of a side; the texts themselves only where they are asked for."""
    table, texts = generate.with_generations(
        out.tables[side], lent.model, lent.tokenizer, lent.records[side], lent.how,
        max_new_tokens=lent.settings.evaluate.generate, fluency=lent.fluency if side in _READ else None,
    )  # fmt: skip
    new = {name: v for name, v in table.columns.items() if name not in out.tables[side].columns}
    return Part(new, texts if lent.settings.evaluate.include_text else None)


def _add_columns(out: Measured, side: str, columns: Mapping[str, Any]) -> None:
    table = out.tables[side]
    out.tables[side] = dataclasses.replace(table, columns={**table.columns, **columns})


def _gradients(side: str, lent: _Lent) -> Part:
    """Gradient norm of each row, a backward pass for every one."""
    values = gradients.gradient_norms(
        lent.model, lent.anatomy, lent.tokenizer, lent.records[side], lent.how, source=side
    )  # fmt: skip
    return Part({"attack_gradient_norm": values})


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
    layers: dict[str, _Layers] = {}
    for name, own in measured.items():
        numbers[name] = dict(own.choices)
        found = score_tables(
            own.tables, gold.tables if gold else None, original=original.tables if original else None
        )  # fmt: skip
        numbers[name] |= {k: dict(v) for k, v in found.values.items()}
        not_shown |= found.not_shown
        if own.states:
            latent = states.latent(own.states, groups, reference_states=original.states if original else None)
            aside = apart.apart(own.states, groups, seed=settings.seed)
            numbers[name] |= latent.values | aside.values
            not_shown |= latent.not_shown | aside.not_shown
            layers[name] = _Layers(latent, aside)
    pictures: dict[str, Any] = {"not_shown": not_shown, "not_tested": not_tested(records, gold is not None, settings)}
    tables = {name: own.tables for name, own in measured.items()}
    lines = {side: [r.line for r in rows] for side, rows in records.items()}
    pictures |= gaps.picture(tables) | single_rows.membership(tables) | single_rows.worst(tables, lines)
    pictures |= _layer_pictures(layers) | _lens_picture(measured)
    if settings.evaluate.map != "none" and original and original.states:
        last_layer = {name: {s: v[max(v)] for s, v in m.states.items()} for name, m in measured.items() if m.states}
        pictures["map"] = states.state_map(last_layer, fit_on="original", method=settings.evaluate.map)
    if "never_seen" in records:
        spread = privleak_null_spread(len(records["forget"]), len(records["never_seen"]))
        pictures["privleak_null_spread"] = spread
    return numbers, pictures


@dataclasses.dataclass(frozen=True)
class _Layers:
    """What one model's hidden states say layer by layer."""

    latent: states.Latent
    apart: apart.Apart


def _layer_pictures(models: Mapping[str, _Layers]) -> dict[str, Any]:
    """Entanglement at every layer; membership and neighbours at every layer, or at evenly spread ones."""
    if not models:
        return {}
    depth = max(len(own.latent.entanglement_by_layer) for own in models.values())
    entangled = {name: own.latent.entanglement_by_layer for name, own in models.items()}
    first = next(iter(models.values())).apart
    kinds = sorted({kind for own in models.values() for kind in own.apart.by_layer})
    lines = {k: {n: own.apart.by_layer[k] for n, own in models.items() if k in own.apart.by_layer} for k in kinds}
    return {
        "entanglement_by_layer": {"layers": list(range(1, depth + 1)), "models": entangled},
        "latent_by_layer": {"layers": first.layers, "metrics": lines},
    }


def _lens_picture(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Mean probability of answers as read from each inner layer and, last, by the model itself."""
    sides_of: dict[str, dict[str, list[float]]] = {}
    layers: list[int] = []
    for name, own in measured.items():
        for side in _READ:
            try:
                found = rows.lens(own.tables[side])
            except (KeyError, NotShown):
                continue
            layers = [*found, max(found) + 1]
            means = [float(np.nanmean(v)) for v in (*found.values(), rows.probability(own.tables[side]))]
            sides_of.setdefault(side, {})[name] = means
    return {"lens_by_layer": {"layers": layers, "sides": sides_of}} if sides_of else {}


def not_tested(records: Mapping[str, list[Record]], gold: bool, settings: recipe.Recipe) -> list[str]:
    """What a reader might take for granted and nobody looked at."""
    attacks = settings.evaluate.attacks
    asked = {
        ("sample", "prompts"): "Adversarially searched or multi-turn prompts.",
        ("sample",): "Paraphrased, prefixed, few-shot, adversarial or multi-turn prompts.",
        ("prompts",): "Sampled answers, adversarially searched or multi-turn prompts.",
        (): "Sampled, adversarial or multi-turn prompts: only given questions and paraphrases were asked, greedily.",
    }
    out = [
        asked[tuple(name for name in ("sample", "prompts") if name in attacks)],
        "Pruned copies of the model." if "quantise" in attacks else "Quantised or pruned copies of the model.",
        "Other copies that hold the data: the original weights, checkpoints, caches and the training files themselves.",
        "Records about the same subject that are not among the rows to forget.",
    ]
    if not gold:
        out.insert(0, "A model trained without the rows (gold): none was given, so no number has its target beside it.")
    if "never_seen" not in records:
        out.insert(0, "Membership inference: no never-seen rows were given.")
    if not settings.evaluate.relearn_steps and "relearn" not in attacks:
        out.append("Relearning.")
    elif len(records.get("forget", ())) < 2:
        out.append("Relearning: it needs two forget rows or more, one to train on and one to measure.")
    return out
