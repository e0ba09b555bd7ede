"""Computing products: one pass per side yields each tensor once, logits only at labels, in chunks where large."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excise.forward import vocabulary
from excise.forward.anatomy import Anatomy, Recorder, block_input, recording
from excise.forward.packing import Packing, can_pack, pack
from excise.forward.products import (
    FROM_BATCH,
    POLICY,
    Pass,
    Product,
    View,
    base_side,
    passes,
)

#: Elements of one [chunk, V] block of logits above which the head is evaluated in recomputed chunks.
CHUNK_ELEMENTS = 4_000_000


class Logits:
    """Logits at label positions, not yet computed: states ``[n, D]`` and the head that turns them into ``[n, V]``.

    ``matrix`` is the head as a matrix ``[V, D]``, where it is nothing else. They are made in the precision (autocast or
    not) of the pass that they belong to, whenever that is.
    """

    def __init__(
        self, states: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, matrix: Tensor | None = None
    ) -> None:
        self.states, self.head, self.vocabulary, self.matrix = states, head, vocabulary, matrix
        device = states.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def __len__(self) -> int:
        return self.states.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of the label positions ``start`` to ``stop``."""
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.head(self.states[start:stop])


def chunked(fn: Callable[..., Tensor], n: int, vocabulary: int, *, grad: bool) -> Tensor:
    """Concatenate ``fn(start, stop)`` over chunks of label positions; chunks are recomputed in the backward pass.

    One chunk, without recomputation, where the whole block of logits is small: memory is what chunks save, not time.
    """
    size = max(1, CHUNK_ELEMENTS // max(vocabulary, 1))
    if n <= size:
        return fn(0, n)
    parts = []
    for start in range(0, n, size):
        stop = min(start + size, n)
        parts.append(checkpoint(fn, start, stop, use_reentrant=False) if grad else fn(start, stop))
    return torch.cat(parts)


def label_logp(block: Tensor, targets: Tensor) -> Tensor:
    """``[n]`` fp32 log-probabilities of ``targets`` under logits ``[n, V]``."""
    return -F.cross_entropy(block.float(), targets, reduction="none")


@dataclass(frozen=True)
class Batch:
    """One side's rows as tensors, with what every product needs of them worked out once.

    ``label_mask`` marks the positions that hold a label token; the state that predicts it stands one to the left.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label_mask: Tensor
    indices: tuple[int, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        move = {k: v.to(device) for k, v in self.columns.items()}
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.label_mask.to(device),
            self.indices,
            move,
        )

    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and position of each label token, rows one after the other."""
        rows, places = self.label_mask.nonzero(as_tuple=True)
        return rows, places

    def masks(self, which: str) -> Tensor:
        """``[B, T]`` bool for pooling: attended, answer or last position."""
        attended = self.attention_mask.bool()
        if which == "attended":
            return attended
        if which == "answer":
            return self.label_mask
        if which == "last":
            steps = torch.arange(attended.shape[1], device=attended.device)
            return steps == (attended * steps).amax(1, keepdim=True)
        raise ValueError(f"unknown pooling {which!r}: attended, answer or last")


def masked_mean(states: Tensor, where: Tensor) -> Tensor:
    """``[B, D]`` fp32 mean of ``states [B, T, D]`` over ``where [B, T]``."""
    weight = where.to(torch.float32)
    total = (states.float() * weight[..., None]).sum(1)  # no matrix product: autocast would make it one of bf16
    return total / weight.sum(1, keepdim=True).clamp_min(1.0)


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
        out[anatomy.depth] = anatomy.norm(out[anatomy.depth])
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
    attended = batch.attention_mask
    if not bool((attended[:, 0] == 1).all()):
        return None, {"input_ids": batch.input_ids, "attention_mask": attended, **_places(anatomy, batch)}
    if not bool(attended.all()) and can_pack(getattr(anatomy.owner, "config", None)):
        packing = pack(attended, width=anatomy.width)
        if packing is not None:
            return packing, {"input_ids": packing.lay(batch.input_ids), "position_ids": packing.position_ids}
    # Causal attention never looks right, so right padding needs no mask; it is cheaper and the states are the same.
    return None, {"input_ids": batch.input_ids}


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
        at_labels: ``[n, D]`` states one position to the left of each label; None where no head is read.
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
        read = raw.flatten(0, 1)[self.packing.index[rows, places]].float()
        total = torch.zeros(len(where), read.shape[1], device=read.device).index_add(0, rows, read)
        return total / where.sum(1, keepdim=True).clamp_min(1)

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
        model(**inputs, use_cache=False)
    states: dict[int, Tensor] = {j: block_input(recorder.calls[j]) for j in layers if j in recorder.calls}
    if highest in layers:
        top = recorder.normed if highest == anatomy.depth else recorder.final
        assert top is not None
        states[highest] = top
    at_labels = None
    if wanted.head:
        assert recorder.normed is not None
        rows, places = batch.positions()
        if packing is None:
            at_labels = recorder.normed[rows, places - 1]
        else:
            at_labels = recorder.normed.flatten(0, 1)[packing.index[rows, places - 1]]
    views = {}
    for view, read in view_layers.items():
        again = _run_again(anatomy, recorder, batch, packing, view, seed)
        views[view] = {j: again[j] for j in read}
    return PassResult(states, at_labels, views, packing)


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
        return self._from_pass(p, batch, self._results[side])

    def _layer_and_view(self, p: Product) -> tuple[int, View | None]:
        assert p.layer is not None
        return self.anatomy.layer(p.layer), p.side if isinstance(p.side, View) else None

    def _from_pass(self, p: Product, batch: Batch, result: PassResult) -> Any:
        if p.what == "hidden":
            layer, view = self._layer_and_view(p)
            return result.states(layer, view)
        assert result.at_labels is not None
        block = Logits(result.at_labels, self.anatomy.logits, self.anatomy.vocabulary, self.anatomy.matrix)
        if p.what == "logits":
            return block
        return logp_of(block, batch.input_ids[batch.positions()])


def logp_of(block: Logits, targets: Tensor) -> Tensor:
    """``[n]`` fp32 label log-probabilities, from logits that are made tile by tile or chunk by chunk."""
    grad = torch.is_grad_enabled()
    if block.matrix is not None:
        return vocabulary.label_logp(block.states, block.matrix, targets, grad=grad)
    return chunked(lambda a, b: label_logp(block.rows(a, b), targets[a:b]), len(block), block.vocabulary, grad=grad)


def _from_batch(p: Product, batch: Batch) -> Tensor:
    if p.what == "mask":
        return batch.masks(str(p.detail))
    if p.what == "column":
        return batch.columns[str(p.detail)]
    if p.what == "label_count":
        return batch.label_mask.sum(1).float()
    rows, places = batch.positions()
    if p.what == "labels":
        return batch.input_ids[rows, places]
    if p.what == "token_rows":
        return rows
    counts = batch.label_mask.sum(1)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows]


def lora_factors(model: nn.Module, which: str) -> dict[str, Tensor]:
    """The active adapter's factors, ``{module name: matrix}``, read off the weights."""
    name = f"lora_{which}"
    found = {}
    for path, module in model.named_modules():
        factors = getattr(module, name, None)
        if isinstance(factors, nn.ModuleDict) and "default" in factors:
            found[path] = cast(Tensor, factors["default"].weight)
    return found
