"""A model lent to an attacker: whatever is done to it, afterwards it is what it was, bit for bit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from excise.errors import InputRefused, UsageError

#: The original's parameters by their names in a checkpoint; read where needed, so a lazy mapping will do.
Weights = Mapping[str, Tensor]

_SCALED = ("lora_B.", "lora_embedding_B.")
_LEFT = ("lora_A.", "lora_embedding_A.")


@contextlib.contextmanager
def lent(model: nn.Module, changed: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Lend a model whose parameters ``changed`` may be overwritten; everything is put back, also after an error.

    Inside the block the model is in evaluation mode and has no gradients. Put back are the values of ``changed``, and
    of every parameter its gradient and ``requires_grad``, of every module its mode. Hooks are the borrower's own care.
    Memory: one more copy of ``changed``, on their device.

    Yields:
        The values of ``changed`` as they were.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.clone()
        >>> with torch.no_grad(), lent(layer, [layer.weight]):
        ...     _ = layer.weight.zero_()
        >>> torch.equal(layer.weight, before)
        True
    """
    everything = list(model.parameters())
    needs, gradients = [p.requires_grad for p in everything], [p.grad for p in everything]
    modes = [(module, module.training) for module in model.modules()]
    before = [p.detach().clone() for p in changed]
    model.eval()
    for p in everything:
        p.grad = None
    try:
        yield before
    finally:
        with torch.no_grad():
            for p, own in zip(changed, before, strict=True):
                p.copy_(own)
        for p, need, gradient in zip(everything, needs, gradients, strict=True):
            p.requires_grad_(need)
            p.grad = gradient
        for module, training in modes:
            module.training = training


def trained_by_an_attacker(model: nn.Module) -> list[nn.Parameter]:
    """Of a PEFT model what requires a gradient (the attacker continues the adapter); of any other all that floats.

    A model whose adapter is frozen counts as any other.
    """
    everything = list(model.parameters())
    adapter = hasattr(model, "peft_config") and any(p.requires_grad for p in everything)
    return [p for p in everything if p.is_floating_point() and (p.requires_grad or not adapter)]


# --- what unlearning changed ----------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter is attached, not merged."""
    return any(part in name for name, _ in model.named_parameters() for part in _SCALED)


def plain_name(name: str) -> str:
    """A parameter's name as in a checkpoint without an adapter.

    Example:
        >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return re.sub(r"\.base_layer\.", ".", name.removeprefix("base_model.model."))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters on the CPU, by their plain names: what attacks take as ``original``.

    Raises:
        UsageError: An adapter is attached: merge it first, or its part of the weights would be missing.
    """
    if has_adapter(model):
        raise UsageError("the original has an adapter attached: merge it first")
    return {plain_name(name): p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


class Difference:
    """What unlearning did to a model, as something that can be taken out, scaled and turned round.

    Of a whole model that is W - W0. Of an adapter it is B A (its matrix B is scaled) and, where the original is at
    hand, what a start took out of the base beneath it. Use inside `lent`; ``changed`` are the parameters it touches.

    Source:
        Task vectors: Ilharco et al. 2212.04089; on unlearned models: ours.

    Raises:
        UsageError: A whole model without its original, or an adapter of a kind that does not scale linearly.
        InputRefused: The original lacks a weight, or has it in another shape.
    """

    def __init__(self, model: nn.Module, original: Weights | None = None) -> None:
        self.adapter = has_adapter(model)
        if original is None and not self.adapter:
            raise UsageError("a whole model needs its original beside it: give the recipe's model.name")
        self._parts = [
            (p, name) for name, p in model.named_parameters() if p.is_floating_point() and _changes(name, p, original)
        ]
        self._original = original
        self.changed = [p for p, _ in self._parts]

    def at(self, scale: float, before: Sequence[Tensor]) -> None:
        """Set the model to origin + scale (model - origin), in fp32; 1 is the model and 0 the origin, exactly.

        Args:
            scale: How much of the difference is left.
            before: What `lent` yields for ``changed``.
        """
        with torch.no_grad():
            for (p, name), now in zip(self._parts, before, strict=True):
                if scale == 1:
                    p.copy_(now)
                elif any(part in name for part in _SCALED):
                    p.copy_(now.float() * scale)
                else:
                    origin = cast(Weights, self._original)[plain_name(name)].to(p.device, torch.float32)
                    p.copy_(origin + scale * (now.float() - origin))


def _changes(name: str, parameter: nn.Parameter, original: Weights | None) -> bool:
    """Whether a parameter is part of what unlearning changed."""
    if any(part in name for part in _SCALED):
        return True
    if any(part in name for part in _LEFT):
        return False
    if ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
        raise UsageError("this kind of adapter cannot be scaled: merge it (excise export --to merged) and attack that")
    if original is None:
        return False
    plain, give = plain_name(name), "give the model that was unlearned"
    if plain not in original:
        raise InputRefused(f"the original has no weight {plain!r}: {give}")
    origin = original[plain]
    if origin.shape != parameter.shape:
        raise InputRefused(f"the original's {plain!r} has another shape: {give}")
    return not torch.equal(origin.to(parameter.device, parameter.dtype), parameter)
