"""Computing products: a step runs one pass per side and makes each tensor once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from excise.forward.anatomy import Anatomy
from excise.forward.batch import Batch
from excise.forward.head import Logits, logp_of, named_logp_of
from excise.forward.products import AMONG, FROM_BATCH, POLICY, Product, View, base_side, passes
from excise.forward.running import PassResult, run_pass


class Step:
    """The products of one micro-batch, each computed once.

    Args:
        model: The (possibly wrapped) model.
        anatomy: Where its parts are.
        batches: One `Batch` per side.
        reference: Looks up a stored product of the reference for a batch: ``reference(product, batch)``.
        constants: Tensors fixed for the run, by name.
        seed: Decides the dropout of views, together with the row.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Mapping[str, Batch],
        *,
        reference: Callable[[Product, Batch], Any] | None = None,
        constants: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.reference, self.constants, self.seed = reference, constants or {}, seed
        self._results: dict[str, PassResult] = {}
        self._made: dict[Product, Any] = {}

    def run(self, needs: Sequence[Product]) -> dict[Product, Any]:
        """Run the passes that ``needs`` costs and return every product (logits as `Logits`)."""
        for (side, model), wanted in passes(needs).items():
            if model == POLICY and side in self.batches:
                self._results[side] = run_pass(self.model, self.anatomy, self.batches[side], wanted, seed=self.seed)
        return {p: self._make(p) for p in needs}

    def _make(self, p: Product) -> Any:
        if p not in self._made:
            self._made[p] = self._compute(p)
        return self._made[p]

    def _compute(self, p: Product) -> Any:
        if p.what == "constant":
            return self.constants[str(p.detail)]
        if p.what == "lora":
            return lora_factors(self.model, str(p.detail))
        if p.detail == AMONG:
            return self._make(replace(p, detail=None)).detach()
        side = base_side(p.side)
        assert side is not None
        batch = self.batches[side]
        if p.what in FROM_BATCH:
            return _from_batch(p, batch)
        if p.what == "seq_logp":
            logp = self._make(Product("token_logp", p.side, p.model))
            rows, _ = batch.positions()
            return torch.zeros(len(batch.input_ids), device=logp.device).index_add(0, rows, logp)
        if p.what == "pooled" and p.model == POLICY:  # of the reference, the means themselves are stored
            layer, view = self._layer_and_view(p)
            return self._results[side].pooled(layer, batch.masks(str(p.detail)), view)
        if p.model != POLICY:
            if self.reference is None:
                raise ValueError(f"{p.what} of the {p.model} was not stored")
            return self.reference(p, batch)
        return self._from_pass(p, side, self._results[side])

    def _layer_and_view(self, p: Product) -> tuple[int, View | None]:
        assert p.layer is not None
        return self.anatomy.layer(p.layer), p.side if isinstance(p.side, View) else None

    def _from_pass(self, p: Product, side: str, result: PassResult) -> Any:
        batch = self.batches[side]
        if p.what in ("hidden", "at_labels"):
            layer, view = self._layer_and_view(p)
            if p.what == "hidden":
                return result.states(layer, view)
            rows, places = batch.positions()
            return result.at(layer, rows, places - self.anatomy.shift, view)
        assert result.at_labels is not None
        block = Logits(result.at_labels, self.anatomy.logits, self.anatomy.vocabulary, self.anatomy.matrix)
        if p.what == "logits":
            return block
        if p.what == "named_logp":
            return named_logp_of(block, self._named(str(p.detail), side))
        return logp_of(block, batch.targets())

    def _named(self, said: str, side: str) -> Tensor:
        """The classes that a constant names for each label of a batch."""
        told: Mapping[str, Tensor] = self.constants[said]  # type: ignore[assignment]
        rows, places = (self._make(Product(what, side)) for what in ("row_numbers", "token_index"))
        return told["classes"][told["starts"][rows] + places].long()


def _from_batch(p: Product, batch: Batch) -> Tensor:
    if p.what == "mask":
        return batch.masks(str(p.detail))
    if p.what == "column":
        return batch.columns[str(p.detail)]
    if p.what == "label_count":
        return batch.label_mask.sum(1).float()
    rows, _ = batch.positions()
    if p.what == "labels":
        return batch.targets()
    if p.what == "token_rows":
        return rows
    if p.what == "row_numbers":
        return torch.tensor(batch.indices, dtype=torch.int64, device=rows.device)[rows]
    counts = batch.label_mask.sum(1)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows]


def lora_factors(model: nn.Module, which: str) -> dict[str, Tensor]:
    """The active adapter's factors, ``{module name: matrix}``, read off the weights; names as without a wrapper."""
    name = f"lora_{which}"
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    found = {}
    for path, module in model.named_modules():
        factors = getattr(module, name, None)
        if isinstance(factors, nn.ModuleDict) and "default" in factors:
            found[path] = cast(Tensor, factors["default"].weight)
    return found
