"""`excise plan`: what a run costs, worked out before a weight is loaded."""

from __future__ import annotations

import math
import os
from typing import Any

from excise import models, recipe
from excise.commands.measuring import diagnostics
from excise.commands.starting import beginning, editing, gathering, limits, objective, preparing, sides
from excise.forward import REFERENCE, View, base_side, passes
from excise.reference import stored_products
from excise.schedule import Plan


def plan(settings: recipe.Recipe) -> dict[str, Any]:
    """Passes, products, memory and time of a run, from the config and the rows alone.

    Args:
        settings: The recipe.

    Returns:
        ``{"passes": [{"side", "model", "layers"}], "products": [...], "reference": ..., "steps": n, "memory": {...},
        "seconds": s}``. Memory is in bytes; ``seconds`` is an estimate from a short matrix product on this machine and
        good to a factor of two or so.

    Raises:
        InputRefused: Rows or a model config that cannot be used.
        UsageError: A term whose side the recipe does not give.

    Example:
        >>> plan(recipe.load("run.yaml"))["passes"]  # doctest: +SKIP
        [{'side': 'forget', 'model': 'policy', 'layers': [16]}, {'side': 'retain', 'model': 'policy', 'layers': [16]}]
    """
    limits.check(settings)
    given = sides.of(settings)
    terms = objective.terms(settings.objective)
    objective.check_sides(terms, given.records)
    objective.check_task(terms, settings.model.task)
    objective.check_stand_in(terms, settings.data)
    objective.check_never_saw(terms, settings.data)
    wanted = beginning.wanted(settings, terms, pictured=diagnostics.wanted(settings))
    beginning.check_sides(wanted, given.records)
    config = models.read_config(settings.model)
    objective.check_layers(terms, int(config.num_hidden_layers))
    tokenizer, task = preparing.tokenizer_of(settings), settings.model.task
    names = objective.sides_read(terms)
    context, classes = models.context_of(config), preparing.classes_of(settings, given)
    sides.cut(given, tokenizer, sides.encoding(settings.data, context=context), task=task, long=settings.data.long)
    counted = editing.check(settings, given)
    read = list(dict.fromkeys([*names, *objective.populations_read(terms), *wanted.sides, *counted]))
    rows = sides.encode(
        given, read, tokenizer, settings.data, seed=settings.seed, context=context, task=task, classes=classes
    )
    chosen = editing.chosen(settings, counted, rows, tokenizer)
    needs = objective.needs(terms)
    counts = {side: count for side, count in rows.counts.items() if side in names}
    by_class = {"retain": rows.classes_of("retain", classes)} if classes else {}
    size = _Size(config, settings, rows, Plan(counts, settings.schedule, settings.seed, by_class))
    cost = passes(needs)
    stored = stored_products(needs, REFERENCE)
    return {
        "passes": [
            {"side": side, "model": model, "layers": _layers(wanted, size.depth)}
            for (side, model), wanted in cost.items()
            if model != REFERENCE
        ]
        + [
            {"side": _side_name(view), "model": model, "layers": sorted(_layer(j, size.depth) for j in layers)}
            for (_, model), wanted in cost.items()
            for view, layers in wanted.views.items()
        ],
        "products": [_product_name(p) for p in needs],
        "reference": [_product_name(p) for p in stored],
        "reference_kept_as": "stored columns, computed once; no second model is held" if stored else "none needed",
        "edit": editing.counted(settings, counted, chosen) if chosen is not None else None,
        "start": size.start(wanted) if wanted.start.moves or wanted.statistics else None,
        "negatives": settings.schedule.retain_batch if any(t.batch_coupled for t in terms) else None,
        "steps": size.plan.steps,
        "rows": {k: len(v) for k, v in given.records.items()},
        "memory": size.memory(cost, stored, wanted),
        "seconds": size.seconds(cost),
        "warnings": [*settings.chosen[1:], *given.warnings, *objective.cautions(settings.objective)],
    }


def _layer(index: int, depth: int) -> int:
    return index + depth + 1 if index < 0 else index


def _layers(wanted: Any, depth: int) -> list[int]:
    return sorted({_layer(j, depth) for j in wanted.layers} | ({depth} if wanted.head else set()))


def _side_name(side: Any) -> str:
    if isinstance(side, View):
        return f"{side.of} again from block {side.from_layer}, dropout {side.dropout:g}"
    return str(side)


def _product_name(p: Any) -> str:
    where = "" if p.side is None else f"({_side_name(p.side)}"
    layer = "" if p.layer is None else f", layer {p.layer}"
    detail = "" if p.detail is None else f", {p.detail}"
    whose = " of the reference" if p.model == REFERENCE else ""
    return f"{p.what}{where}{layer}{detail}{')' if where else ''}{whose}"


class _Size:
    """Sizes of a model and its batches, from its config."""

    def __init__(self, config: Any, settings: recipe.Recipe, rows: sides.Rows, plan: Plan) -> None:
        self.settings, self.rows, self.plan = settings, rows, plan
        self.depth, self.width = int(config.num_hidden_layers), int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        inner = int(getattr(config, "intermediate_size", None) or 4 * self.width)
        heads = int(getattr(config, "num_attention_heads", 1))
        kv = int(getattr(config, "num_key_value_heads", None) or heads) / heads
        gated = 3 if getattr(config, "model_type", "") not in ("gpt2", "gpt_neox", "phi", "opt") else 2
        self.block = int(self.width**2 * (2 + 2 * kv) + gated * self.width * inner)
        tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
        self.parameters = self.block * self.depth + self.vocabulary * self.width * tables
        self.inner = inner

    def _tokens(self, side: str) -> tuple[float, float]:
        """Mean tokens and label tokens of a row."""
        examples = self.rows.examples[side]
        total = sum(len(e.input_ids) for e in examples)
        labels = sum(e.labels for e in examples)
        return total / len(examples), labels / len(examples)

    def _batch(self, side: str) -> int:
        how = self.settings.schedule
        sizes = {"forget": how.forget_batch, "contrast": how.contrast_batch, "never_seen": how.never_seen_batch}
        return (how.forget_batch if side.startswith("forget") else sizes.get(side)) or how.retain_batch

    def memory(self, cost: Any, stored: list, begun: beginning.Wanted) -> dict[str, int]:
        """Bytes: weights, gradients and optimizer, activations of a step, the stored reference, shapes of updates."""
        from excise.forward.vocabulary import KEEP_ELEMENTS

        bytes_ = 2 if self.settings.model.precision == "bf16" else 4
        lora = self.settings.model.lora
        trained = self.parameters
        if lora is not None:
            rank = int(lora.get("r", 8))
            trained = self.depth * rank * (8 * self.width + 3 * (self.width + self.inner))
        shapes = 0
        if begun.shaper is not None:  # M, a copy of it while it is moved, and P for each input of a block
            trained = self.block * self.depth if self.settings.model.train_only is None else trained
            shapes = 8 * trained + 4 * self.depth * (3 * self.width**2 + self.inner**2)
        activations = 0.0
        for (side, model), wanted in cost.items():
            tokens, labels = self._tokens(side)
            batch = self._batch(side)
            again = sum(self.depth - (v.from_layer % self.depth) for v in wanted.views) / self.depth
            if model != REFERENCE:
                activations += batch * tokens * self.depth * (1 + again) * (14 * self.width + 4 * self.inner) * 4
                if wanted.head:
                    activations += min(batch * labels * self.vocabulary, KEEP_ELEMENTS) * 4
        reference = sum(
            self.rows.counts[str(base_side(p.side))]
            * (self._tokens(str(base_side(p.side)))[1] * (self.width if p.what == "logits" else 1))
            * 4
            for p in stored
        )
        return {
            "weights": self.parameters * bytes_,
            "gradients_and_optimizer": trained * (bytes_ + 8),
            "activations": int(activations),
            "reference": int(reference),
            **({"shapes": shapes} if shapes else {}),
        }

    def start(self, wanted: beginning.Wanted) -> dict[str, Any]:
        """What a start costs before training: its statistics, passes over their rows, and seconds as for the run."""
        at_once, adapted = self.settings.statistics.layers_at_once, 7 * self.depth
        repeats = 1 if at_once is None else math.ceil(adapted / at_once)
        # A moment costs a forward pass and the products of each output with itself; a gradient a backward pass too.
        squares = self.depth * (4 * self.width**2 + 3 * self.inner**2)
        operations = 0.0
        for statistic in wanted.statistics:
            rows = self.rows.examples[statistic.side][: gathering.row_limit(self.settings.statistics)]
            tokens, moments = sum(len(e.input_ids) for e in rows), statistic.kind.endswith("_moments")
            operations += 2 * tokens * repeats * self.block * self.depth * (1 if moments else 3)
            operations += 2 * tokens * squares * moments
        return {
            "name": (wanted.shaper or wanted.start).name,
            "base": "changed" if wanted.shaper else wanted.start.base if wanted.start.moves else "kept",
            "statistics": [f"{s.kind}({s.side})" for s in wanted.statistics],
            "passes_each": repeats,
            "seconds": self._seconds(operations),
        }

    def seconds(self, cost: Any) -> float:
        """An estimate of the training's time."""
        operations = 0.0
        for (side, model), wanted in cost.items():
            tokens, labels = self._tokens(side)
            share = 1 + sum((self.depth - (v.from_layer % self.depth)) / self.depth for v in wanted.views)
            blocks = self.block * self.depth * tokens * share + self.width * self.vocabulary * labels * wanted.head
            if model == REFERENCE:
                operations += 2 * self.rows.counts[side] * blocks
            else:
                operations += 6 * self._batch(side) * blocks * self.plan.micro_steps
        return self._seconds(operations)

    def _seconds(self, operations: float) -> float:
        """Floating-point operations over the rate of a short matrix product here."""
        import time

        import torch

        a = torch.randn(512, 512)
        a @ a
        start = time.perf_counter()
        for _ in range(8):
            a @ a
        rate = 8 * 2 * 512**3 / max(time.perf_counter() - start, 1e-9)
        # Small matrices do not reach the rate of a large product; the factor is what the demo's model shows.
        return float(f"{operations / rate * (3 if self.width < 1024 else 1.3):.2g}") if math.isfinite(rate) else 0.0


def world_size() -> int:
    """Ranks of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))
