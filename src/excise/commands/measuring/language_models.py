"""How a language model is measured and judged: scores of answers, generations, hidden states, relearning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from excise import models, recipe
from excise.attacks import relearn
from excise.commands.measuring.measured import Measured, Numbers, relearned, relearning_picture
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.forward import Anatomy
from excise.metrics import generate, states
from excise.metrics.measure import sweep
from excise.metrics.scores import score as score_tables
from excise.metrics.statistics import privleak_null_spread
from excise.records import Record

#: Sides beside which ``retain`` is not measured: what is kept is read from rows that unlearning did not train on.
INSTEAD_OF_RETAIN = ("untouched",)


def measure(
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
        swept = sweep(
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
            curve = relearn.curve(
                model, anatomy, tokenizer, records["forget"], how,
                steps=options.relearn_steps, lr=options.relearn_lr or settings.optimiser.lr, seed=settings.seed,
            )  # fmt: skip
        out.curves = {"probability": curve}
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
        numbers[name] = dict(own.choices)
        found = score_tables(own.tables, gold.tables if gold else None)
        numbers[name] |= {k: dict(v) for k, v in found.values.items()}
        not_shown |= found.not_shown
        if own.states:
            latent = states.latent(own.states, groups, reference_states=original.states if original else None)
            numbers[name] |= latent.values
            not_shown |= latent.not_shown
            by_layer[name] = latent.entanglement_by_layer
        numbers[name] |= relearned(own, len(records.get("forget", ())))
    pictures: dict[str, Any] = {"not_shown": not_shown, "not_tested": not_tested(records, gold is not None, settings)}
    pictures |= relearning_picture(dict(measured), settings.evaluate.relearn_steps)
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
    elif len(records.get("forget", ())) < 2:
        out.append("Relearning: it needs two forget rows or more, one to train on and one to measure.")
    return out
