"""Where the parts of a causal model are, and how to watch a pass through them without paying for its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

_BLOCK_LISTS = ("layers", "h", "blocks")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Anatomy:
    """Where the blocks, the final norm and the head of a causal model are.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> Anatomy.of(LlamaForCausalLM(config)).depth
        2
    """

    owner: nn.Module
    blocks_name: str
    norm: nn.Module
    head: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, states: Tensor) -> Tensor:
        """``[..., V]`` logits of normed states, with the model's soft cap (Gemma 2) and scale (Cohere, Granite)."""
        out = self.head(states)
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    @property
    def matrix(self) -> Tensor | None:
        """``[V, D]`` the head as one matrix, where it is nothing else: no bias, adapter, hook, shard or cap."""
        head = self.head
        if type(head) is not nn.Linear or head.bias is not None or type(head.weight) is not nn.Parameter:
            return None
        changed = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
        return None if changed or self.softcap is not None or self.scale != 1.0 else head.weight

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(cast(Tensor, self.head.weight).shape[1])

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(cast(Tensor, self.head.weight).shape[0])

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of transformer blocks."""
        return getattr(self.owner, self.blocks_name)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @staticmethod
    def of(model: nn.Module) -> Anatomy:
        """Find the parts, through PEFT and distributed wrappers.

        Raises:
            ValueError: The model has no list of blocks, no final norm or no language-model head.
        """
        head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        config = getattr(model, "config", None)
        cap = getattr(config, "final_logit_softcapping", None)
        times, over = (float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling"))
        for owner in model.modules():
            for name in _BLOCK_LISTS:
                blocks = getattr(owner, name, None)
                norm = next((getattr(owner, n) for n in _NORMS if isinstance(getattr(owner, n, None), nn.Module)), None)
                if isinstance(blocks, nn.ModuleList) and norm is not None and head is not None:
                    return Anatomy(owner, name, norm, head, cap, times / over)
        raise ValueError(f"{type(model).__name__}: no transformer blocks, final norm or language-model head found")

    def layer(self, index: int) -> int:
        """A layer number from 0 to ``depth``, from one that may be negative."""
        return index + self.depth + 1 if index < 0 else index

    def block(self, index: int) -> int:
        """A block number from 0 to ``depth - 1``, from one that may be negative."""
        return index + self.depth if index < 0 else index


@dataclass
class Recorder:
    """What a pass leaves behind: the arguments of the blocks and the input of the head."""

    calls: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    final: Tensor | None = None
    normed: Tensor | None = None
    open: bool = True


def block_input(call: tuple[tuple, dict]) -> Tensor:
    """The hidden states that a recorded call of a block was given."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def recording(anatomy: Anatomy, record_blocks: set[int], stop: int | None) -> Iterator[Recorder]:
    """Watch a pass; with ``stop`` the blocks from there on are left out.

    The head is kept from running: the states it would read are what we want, and the caller evaluates the head where
    labels are. Its stand-in returns one column, so that whatever the model does with "logits" costs nothing.
    """
    recorder, handles, blocks = Recorder(), [], anatomy.blocks

    def on_block(index: int) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if recorder.open and index not in recorder.calls:  # gradient checkpointing calls again in the backward
                recorder.calls[index] = (args, dict(kwargs))

        return hook

    def before_norm(_module: nn.Module, args: tuple) -> None:
        if recorder.open:
            recorder.final = args[0]

    def stand_in(states: Tensor) -> Tensor:
        if recorder.open:
            recorder.normed = states
        return states[..., :1]

    for index in sorted(record_blocks):
        handles.append(blocks[index].register_forward_pre_hook(on_block(index), with_kwargs=True))
    handles.append(anatomy.norm.register_forward_pre_hook(before_norm))
    if stop is not None:
        setattr(anatomy.owner, anatomy.blocks_name, blocks[:stop])
    own_forward = anatomy.head.__dict__.get("forward")
    anatomy.head.forward = stand_in
    try:
        yield recorder
    finally:
        recorder.open = False
        if own_forward is None:
            del anatomy.head.forward
        else:
            anatomy.head.forward = own_forward
        if stop is not None:
            setattr(anatomy.owner, anatomy.blocks_name, blocks)
        for handle in handles:
            handle.remove()
