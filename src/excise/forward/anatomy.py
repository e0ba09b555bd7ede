"""Where the parts of a causal model are, and how to watch a pass through them without paying for its head."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

_BLOCK_LISTS = ("layers", "h", "blocks", "layer")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
PER_TOKEN = "ForTokenClassification"
_CLASSIFIERS = (PER_TOKEN, "ForSequenceClassification")


@dataclass(frozen=True)
class Anatomy:
    """Where the blocks, the final norm and the head of a model are.

    A causal model has a language-model head, which is left out of a pass and evaluated where labels are. A classifier
    (``classes`` says how many) runs its own head, which costs next to nothing; ``head`` then holds everything around
    the encoder, and encoders that norm inside their blocks have no final ``norm``. ``per_token`` says that every token
    has logits, not the row as a whole.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> Anatomy.of(LlamaForCausalLM(config)).depth
        2
    """

    owner: nn.Module
    blocks_name: str
    norm: nn.Module | None
    head: nn.Module
    softcap: float | None = None
    scale: float = 1.0
    classes: int | None = None
    per_token: bool = True
    caches: bool = True
    config: Any = None

    @property
    def shift(self) -> int:
        """How far to the left of a label the state stands that predicts it."""
        return 0 if self.classes else 1

    def logits(self, states: Tensor) -> Tensor:
        """``[..., V]`` logits of normed states, with the model's soft cap (Gemma 2) and scale (Cohere, Granite).

        A classifier's are made in the pass: here they are returned as they are.
        """
        if self.classes:
            return states
        out = self.head(states)
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    @property
    def matrix(self) -> Tensor | None:
        """``[V, D]`` the head as one matrix, where it is nothing else: no bias, adapter, hook, shard or cap."""
        head = self.head
        if self.classes or type(head) is not nn.Linear:
            return None
        if head.bias is not None or type(head.weight) is not nn.Parameter:
            return None
        changed = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
        return None if changed or self.softcap is not None or self.scale != 1.0 else head.weight

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.classes or int(cast(Tensor, self.head.weight).shape[0])

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
            ValueError: The model has no list of blocks, or no head that is known: a language model's (with a final
                norm before it), or that of token or sequence classification.
        """
        for inner in model.modules():
            if type(inner).__name__.endswith(_CLASSIFIERS):
                return _of_classifier(inner)
        head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        config = getattr(model, "config", None)
        cap = getattr(config, "final_logit_softcapping", None)
        times, over = (float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling"))
        for owner, name, norm in _block_lists(model):
            if norm is not None and head is not None:
                return Anatomy(owner, name, norm, head, cap, times / over, config=getattr(owner, "config", None))
        raise ValueError(f"{type(model).__name__}: no transformer blocks, final norm or language-model head found")

    def layer(self, index: int) -> int:
        """A layer number from 0 to ``depth``, from one that may be negative."""
        return index + self.depth + 1 if index < 0 else index

    def block(self, index: int) -> int:
        """A block number from 0 to ``depth - 1``, from one that may be negative."""
        return index + self.depth if index < 0 else index


def _block_lists(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
    """Every list of blocks: the module that owns it, its name there, and the norm beside it."""
    for owner in model.modules():
        for name in _BLOCK_LISTS:
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                norms = (getattr(owner, n, None) for n in _NORMS)
                yield owner, name, next((norm for norm in norms if isinstance(norm, nn.Module)), None)


def _of_classifier(model: nn.Module) -> Anatomy:
    """The parts of transformers' token or sequence classifiers."""
    encoder = getattr(model, cast(str, model.base_model_prefix), None)
    found = next(_block_lists(encoder), None) if isinstance(encoder, nn.Module) else None
    if found is None:
        raise ValueError(f"{type(model).__name__}: no transformer blocks found")
    around = nn.ModuleList([part for part in model.children() if part is not encoder])
    caches = "use_cache" in inspect.signature(model.forward).parameters  # decoders, which keep keys and values if let
    config = cast(Any, model).config
    return Anatomy(
        *found, head=around, classes=int(config.num_labels), per_token=type(model).__name__.endswith(PER_TOKEN),
        caches=caches, config=config,
    )  # fmt: skip


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

    A language-model head is kept from running: the states it would read are what we want, and the caller evaluates the
    head where labels are. Its stand-in returns one column, so that whatever the model does with "logits" costs nothing.
    """
    recorder, blocks = Recorder(), anatomy.blocks

    def on_block(index: int) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if recorder.open and index not in recorder.calls:  # gradient checkpointing calls again in the backward
                recorder.calls[index] = (args, dict(kwargs))

        return hook

    handles = [
        blocks[index].register_forward_pre_hook(on_block(index), with_kwargs=True) for index in sorted(record_blocks)
    ]
    handles += _watch_end(anatomy, recorder, blocks[(len(blocks) if stop is None else stop) - 1])
    if stop is not None:
        setattr(anatomy.owner, anatomy.blocks_name, blocks[:stop])
    try:
        with contextlib.nullcontext() if anatomy.classes else _without_head(anatomy.head, recorder):
            yield recorder
    finally:
        recorder.open = False
        if stop is not None:
            setattr(anatomy.owner, anatomy.blocks_name, blocks)
        for handle in handles:
            handle.remove()


def _watch_end(anatomy: Anatomy, recorder: Recorder, last: nn.Module) -> list[Any]:
    """Hooks that keep what comes out of the last block that runs, before and after the final norm."""

    def before_norm(_module: nn.Module, args: tuple) -> None:
        if recorder.open:
            recorder.final = args[0]

    def after_norm(_module: nn.Module, _args: tuple, out: Tensor) -> None:
        if recorder.open:
            recorder.normed = out

    def after_block(_module: nn.Module, _args: tuple, out: Any) -> None:
        if recorder.open:
            recorder.final = recorder.normed = out[0] if isinstance(out, tuple) else out

    if anatomy.norm is None:
        return [last.register_forward_hook(after_block)]
    handles = [anatomy.norm.register_forward_pre_hook(before_norm)]
    return handles + ([anatomy.norm.register_forward_hook(after_norm)] if anatomy.classes else [])


@contextlib.contextmanager
def _without_head(head: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep what a language-model head is given, and do not run it."""

    def stand_in(states: Tensor) -> Tensor:
        if recorder.open:
            recorder.normed = states
        return states[..., :1]

    own_forward = head.__dict__.get("forward")
    head.forward = stand_in
    try:
        yield
    finally:
        if own_forward is None:
            del head.forward
        else:
            head.forward = own_forward
