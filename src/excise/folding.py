"""Where a block writes last: found by watching it, shown to be exact by trying, and changed in the weights.

A pre-norm block gives ``x + attention + mlp``. What enters along the residual stream has no weights, so a projection of
the whole stream after a block cannot be folded into a checkpoint of the same shape: the norm after it divides by a
length that the projection changes, and everything before it reads the stream. What the block's last output projection
adds has weights: there a change is exact, whatever the block's nonlinearities are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from excise.erasure import Change, Moments
from excise.errors import InputRefused
from excise.forward import Anatomy, Batch
from excise.forward.anatomy import recording

#: How far the stream may be off what was added to the last output, as a share of it: rounding.
_EXACT = 1e-3


@dataclass(frozen=True)
class Writer:
    """The last output projection of a block.

    Attributes:
        name: Its name in the block.
        module: A ``nn.Linear``, or the ``Conv1D`` of GPT-2 (whose weight lies the other way round).
        layer: The layer behind the block, from 1.
    """

    name: str
    module: nn.Module
    layer: int

    @property
    def turned(self) -> bool:
        """Whether the weight is ``[M, D]``."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def biased(self) -> bool:
        """Whether the map has a bias."""
        return getattr(self.module, "bias", None) is not None

    @torch.no_grad()
    def fold(self, change: Change) -> None:
        """Add a change to the weights, in their own precision."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        weight.add_((change.weight.T if self.turned else change.weight).to(weight))
        if change.bias is not None:
            bias: Tensor = self.module.bias  # type: ignore[assignment]
            bias.add_(change.bias.to(bias))


def _kind(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


@torch.no_grad()
def writer(model: nn.Module, anatomy: Anatomy, layer: int, batch: Batch) -> Writer:
    """The map whose output is the last thing that block ``layer`` adds to the stream.

    It is the last one to run in the block, and it is tried: something added to its output has to come out behind the
    block as it is. So no list of architectures is needed, and none is wrong.

    Args:
        model: The model, adapters merged.
        anatomy: Where its parts are.
        layer: From 1 to the depth; negative from the end.
        batch: A few rows to try it with.

    Raises:
        InputRefused: No such layer, or the block does not write that way (a norm behind the output, experts, quantised
            or shared weights): nothing there can be folded exactly.
    """
    number = anatomy.layer(layer)
    if not 1 <= number <= anatomy.depth:
        raise InputRefused(f"--layer {layer}: the model has blocks 1 to {anatomy.depth} (or -1 to -{anatomy.depth})")
    block = anatomy.blocks[number - 1]
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.append(name))
        for name, module in block.named_modules()
        if not list(module.children()) and hasattr(module, "weight") and getattr(module.weight, "dim", int)() == 2
    ]
    try:
        before = states_after(model, anatomy, number, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = Writer(ran[-1], block.get_submodule(ran[-1]), number) if ran else None
    if found is None or not _kind(found.module) or _shared(model, found.module) or not _exact(
        model, anatomy, found, batch, before
    ):  # fmt: skip
        raise InputRefused(
            f"block {number} does not end in a plain output projection that is added to the stream as it is: nothing "
            "there can be folded into the weights exactly; choose another layer or model"
        )
    return found


def _shared(model: nn.Module, module: nn.Module) -> bool:
    """Whether another module has the same weight."""
    weight = module.weight
    return sum(any(p is weight for p in m.parameters(recurse=False)) for m in model.modules()) > 1


def _exact(model: nn.Module, anatomy: Anatomy, found: Writer, batch: Batch, before: Tensor) -> bool:
    """Whether what is added to the output stands in the stream behind the block."""
    draw = torch.Generator().manual_seed(0)
    added = torch.randn(before.shape[-1], generator=draw).to(before) * before.std()

    def hook(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out + added.to(out) if out.shape[-1] == len(added) else out

    handle = found.module.register_forward_hook(hook)
    try:
        moved = states_after(model, anatomy, found.layer, batch) - before
    finally:
        handle.remove()
    where = batch.attention_mask.bool()
    return float((moved - added)[where].abs().max()) <= _EXACT * float(added.abs().max())


@torch.no_grad()
def states_after(model: nn.Module, anatomy: Anatomy, layer: int, batch: Batch) -> Tensor:
    """``[B, T, D]`` fp32: the stream behind a block, before any norm; later blocks do not run."""
    with recording(anatomy, set(), layer) as seen:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    assert seen.final is not None
    return seen.final.float()


@contextlib.contextmanager
def _read(found: Writer) -> Iterator[list[Tensor]]:
    """What the writer is given, pass by pass."""
    seen: list[Tensor] = []
    handle = found.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().float()))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class Seen:
    """Rows at a writer: means over attended positions, and moments over all of them.

    Attributes:
        states: ``[rows, D]`` float64: the stream behind the block.
        inputs: ``[rows, M]`` float64: what the writer reads.
        moments: Of what the writer reads, every attended position one observation; None where not asked for.
        size: Mean squared length of the stream, over attended positions.
    """

    states: Tensor
    inputs: Tensor
    moments: Moments | None
    size: float


@torch.no_grad()
def watch(
    model: nn.Module, anatomy: Anatomy, found: Writer, batches: Iterator[Batch], *, moments: bool = False
) -> Seen:
    """Run rows up to the writer's block and keep what it reads and what stands behind it."""
    states, inputs, every, size, count = [], [], None, 0.0, 0
    for batch in batches:
        with _read(found) as read:
            after = states_after(model, anatomy, found.layer, batch).double().cpu()
        z, where = read[0].double().cpu(), batch.attention_mask.bool().cpu()
        share = where.double() / where.sum(1, keepdim=True)
        states.append(torch.einsum("btd,bt->bd", after, share))
        inputs.append(torch.einsum("btm,bt->bm", z, share))
        size, count = size + float(after[where].square().sum()), count + int(where.sum())
        if moments:
            own = Moments.of(z[where])
            every = own if every is None else every.joined(own)
    return Seen(torch.cat(states), torch.cat(inputs), every, size / max(count, 1))
