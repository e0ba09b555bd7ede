"""One forward pass over a batch, yielding what is wanted of it: states by layer, what the head reads, second views."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excise.forward.anatomy import Anatomy, Recorder, block_input, recording
from excise.forward.batch import Batch, masked_mean
from excise.forward.packing import Packing, can_pack, pack
from excise.forward.packing import inputs as packed_inputs
from excise.forward.products import Pass, View


def _drop(states: Tensor, batch: Batch, packing: Packing | None, rate: float, seed: int) -> Tensor:
    """Dropout whose mask depends on (seed, row) alone: not on padding, batch-mates, rank or accumulation."""
    if rate <= 0:
        return states
    keep = torch.zeros(*batch.input_ids.shape, states.shape[-1], dtype=states.dtype)
    generator = torch.Generator()
    attended = batch.attention_mask.bool().cpu()
    for row in range(len(keep)):
        index = batch.indices[row] if batch.indices else row
        generator.manual_seed((seed * 1_000_003 + index * 7919 + 17) % (2**63 - 1))
        length = int(attended[row].sum())
        draw = torch.rand(length, states.shape[2], generator=generator) >= rate
        keep[row, attended[row]] = draw.to(states.dtype) / (1 - rate)
    keep = keep.to(states.device)
    return states * (keep if packing is None else packing.lay(keep))


def _run_again(
    anatomy: Anatomy, recorder: Recorder, batch: Batch, packing: Packing | None, view: View, seed: int
) -> dict[int, Tensor]:
    """States of a derived side: blocks from ``view.from_layer`` up, on dropout of what they read in the pass."""
    first = anatomy.block(view.from_layer)
    states = _drop(block_input(recorder.calls[first]), batch, packing, view.dropout, seed)
    out = {first: states}
    for index in range(first, anatomy.depth):
        if index not in recorder.calls:  # the pass was cut above the highest layer read
            break
        states = out[index + 1] = _recomputed(anatomy.blocks[index], states, *recorder.calls[index])
    if anatomy.depth in out:
        out[anatomy.depth] = out[anatomy.depth] if anatomy.norm is None else anatomy.norm(out[anatomy.depth])
    return out


def _recomputed(block: nn.Module, states: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """A block's output for other states; in the backward pass it runs once more instead of keeping what is inside.

    A second view would otherwise cost the memory of its blocks beside those of the pass, to save a forward of them.
    """

    def run(h: Tensor) -> Tensor:
        result = block(h, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": h})
        return result[0] if isinstance(result, tuple) else result

    return cast(Tensor, checkpoint(run, states, use_reentrant=False)) if torch.is_grad_enabled() else run(states)


def _inputs(anatomy: Anatomy, batch: Batch) -> tuple[Packing | None, dict[str, Tensor]]:
    """What the model is called with: rows packed where that pays, and no mask where none is needed."""
    attended, config = batch.attention_mask, anatomy.config
    to_the_right = bool((attended[:, 0] == 1).all())
    if to_the_right and not bool(attended.all()) and anatomy.per_token and can_pack(config):
        packing = pack(attended, width=config.hidden_size)
        if packing is not None:
            dtype = next(anatomy.owner.parameters()).dtype
            return packing, packed_inputs(packing, batch.input_ids, config, dtype)
    if anatomy.classes:  # encoders look both ways
        return None, {"input_ids": batch.input_ids, "attention_mask": attended}
    if not to_the_right:
        return None, {"input_ids": batch.input_ids, "attention_mask": attended, **_places(anatomy, batch)}
    # Causal attention never looks right, so right padding needs no mask; it is cheaper and the states are the same.
    return None, {"input_ids": batch.input_ids}


def rows_seen(anatomy: Anatomy, batch: Batch, where: Tensor) -> Tensor:
    """``[b, W]`` int64: whose row each position of a pass is, laid out as the model sees it (rows may be packed).

    Args:
        anatomy: Of the model.
        batch: What `run_pass` is given; its layout follows from it alone.
        where: ``[B, T]`` bool positions that count; all others, padding and unused places among them, read -1.
    """
    packing, _ = _inputs(anatomy, batch)
    numbers = torch.arange(1, len(where) + 1, device=where.device)[:, None] * where
    return (numbers if packing is None else packing.lay(numbers)) - 1


def _places(anatomy: Anatomy, batch: Batch) -> dict[str, Tensor]:
    """Positions that count from each row's first token: padding on the left must not shift learned positions."""
    if "position_ids" not in inspect.signature(anatomy.owner.forward).parameters:
        return {}
    return {"position_ids": (batch.attention_mask.long().cumsum(1) - 1).clamp_min(0)}


@dataclass
class PassResult:
    """What a pass yields: hidden states by layer, and the states that predict a label where the head is read.

    Attributes:
        by_layer: States as the model made them, packed where the rows were.
        at_labels: ``[n, D]`` states one position to the left of each label, or a classifier's logits ``[n, C]``; None
            where no head is read.
        by_view: The same as ``by_layer`` for each derived side.
        packing: How the rows were packed, if they were.
    """

    by_layer: dict[int, Tensor]
    at_labels: Tensor | None
    by_view: dict[View, dict[int, Tensor]]
    packing: Packing | None = None

    @property
    def layers(self) -> dict[int, Tensor]:
        """``[B, T, D]`` states by layer; what stands at padding means nothing."""
        return {j: self._laid_out(h) for j, h in self.by_layer.items()}

    def states(self, layer: int, view: View | None = None) -> Tensor:
        """``[B, T, D]`` states at one layer, of a derived side where one is named."""
        return self._laid_out(self._raw(layer, view))

    def pooled(self, layer: int, where: Tensor, view: View | None = None) -> Tensor:
        """``[B, D]`` fp32 mean of the states over the positions ``where [B, T]``."""
        raw = self._raw(layer, view)
        if self.packing is None:
            return masked_mean(raw, where)
        rows, places = where.nonzero(as_tuple=True)
        read = self.read(raw, rows, places).float()
        total = torch.zeros(len(where), read.shape[1], device=read.device).index_add(0, rows, read)
        return total / where.sum(1, keepdim=True).clamp_min(1)

    def at(self, layer: int, rows: Tensor, places: Tensor, view: View | None = None) -> Tensor:
        """``[n, D]`` states at one layer, at the positions named."""
        return self.read(self._raw(layer, view), rows, places)

    def read(self, raw: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """``[n, D]`` of states as the model made them, at the positions named."""
        return raw[rows, places] if self.packing is None else raw.flatten(0, 1)[self.packing.index[rows, places]]

    def _raw(self, layer: int, view: View | None) -> Tensor:
        return self.by_layer[layer] if view is None else self.by_view[view][layer]

    def _laid_out(self, raw: Tensor) -> Tensor:
        return raw if self.packing is None else self.packing.back(raw)


def run_pass(model: nn.Module, anatomy: Anatomy, batch: Batch, wanted: Pass, *, seed: int = 0) -> PassResult:
    """One forward pass of ``model`` over ``batch``, yielding what ``wanted`` lists and nothing else.

    The pass goes through the wrapped ``model``, so that distributed wrappers see it and synchronise gradients.
    """
    layers = {anatomy.layer(j) for j in wanted.layers}
    view_layers = {view: {anatomy.layer(j) for j in js} for view, js in wanted.views.items()}
    highest = max(
        [anatomy.depth] if wanted.head else [*layers, *(j for js in view_layers.values() for j in js)],
        default=anatomy.depth,
    )
    stop = highest if highest < anatomy.depth else None
    record = {j for j in layers if j < highest}
    for view in wanted.views:
        record |= set(range(anatomy.block(view.from_layer), highest))
    packing, inputs = _inputs(anatomy, batch)
    with recording(anatomy, record, stop) as recorder:
        out = model(**inputs, **({"use_cache": False} if anatomy.caches else {}))
    states: dict[int, Tensor] = {j: block_input(recorder.calls[j]) for j in layers if j in recorder.calls}
    if highest in layers:
        top = recorder.normed if highest == anatomy.depth else recorder.final
        assert top is not None
        states[highest] = top
    views = {}
    for view, read in view_layers.items():
        again = _run_again(anatomy, recorder, batch, packing, view, seed)
        views[view] = {j: again[j] for j in read}
    result = PassResult(states, None, views, packing)
    if wanted.head:
        rows, places = batch.positions()
        if anatomy.classes:
            result.at_labels = result.read(out.logits, rows, places) if anatomy.per_token else out.logits[rows]
        else:
            assert recorder.normed is not None
            result.at_labels = result.read(recorder.normed, rows, places - anatomy.shift)
    return result
