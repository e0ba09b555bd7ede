"""What can be asked of a forward pass, what that costs, and one pass per side that computes each tensor once.

A `Product` names a tensor. `passes` says which forward passes a set of products costs, before anything loads;
`compute` runs them: no logits where no label is, none at all when only states are read, no block above the highest
layer read, and the reference from a store instead of a second model.

Layers are numbered as in ``hidden_states`` of transformers: ``j < L`` is the input of block ``j``, ``L`` the normed
state that the head reads. Negative numbers count from the end (``-1`` is ``L``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

POLICY = "policy"
REFERENCE = "reference"

#: Elements of one [chunk, V] block of logits above which the head is evaluated in recomputed chunks.
CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class View:
    """A second view of a side: the blocks from ``from_layer`` up run again on ``dropout`` of their input (ours).

    ``from_layer`` is a block index and may be negative (``-1`` is the last block); 0 is SimCSE's whole second pass.

    Example:
        >>> View("forget", from_layer=-1, dropout=0.1).of
        'forget'
    """

    of: str
    from_layer: int
    dropout: float = 0.1


Side = str | View


@dataclass(frozen=True)
class Product:
    """A tensor that can be asked for: what it is, on which side, by which model, at which layer.

    Example:
        >>> seq_logp("forget").what
        'seq_logp'
    """

    what: str
    side: Side | None = None
    model: str = POLICY
    layer: int | None = None
    detail: str | None = None


def token_logp(side: Side, model: str = POLICY) -> Product:
    """``[n]`` fp32: log-probability of each label token, rows one after the other."""
    return Product("token_logp", side, model)


def seq_logp(side: Side, model: str = POLICY) -> Product:
    """``[B]`` fp32: sum of the label log-probabilities of each row."""
    return Product("seq_logp", side, model)


def logits(side: Side, model: str = POLICY) -> Product:
    """``[n, V]`` logits at label positions; only for terms ``per="token"``, which the engine may chunk over ``n``."""
    return Product("logits", side, model)


def label_count(side: Side) -> Product:
    """``[B]`` fp32: label tokens of each row."""
    return Product("label_count", side)


def token_rows(side: Side) -> Product:
    """``[n]`` int64: the row of each label token."""
    return Product("token_rows", side)


def token_index(side: Side) -> Product:
    """``[n]`` int64: the place of each label token in its answer, from 0."""
    return Product("token_index", side)


def labels(side: Side) -> Product:
    """``[n]`` int64: the label tokens."""
    return Product("labels", side)


def hidden(side: Side, layer: int, model: str = POLICY) -> Product:
    """``[B, T, D]`` hidden states at ``layer``."""
    return Product("hidden", side, model, layer)


def pooled(side: Side, layer: int, pooling: str = "attended", model: str = POLICY) -> Product:
    """``[B, D]`` fp32: mean of the states over ``"attended"``, ``"answer"`` or ``"last"`` positions."""
    return Product("pooled", side, model, layer, pooling)


def mask(side: Side, which: str) -> Product:
    """``[B, T]`` bool: ``"attended"``, ``"answer"`` (positions that hold a label token) or ``"last"`` positions."""
    return Product("mask", side, detail=which)


def column(side: Side, name: str) -> Product:
    """``[B]``: a column of the batch."""
    return Product("column", side, detail=name)


def constant(name: str) -> Product:
    """A tensor that is fixed for the run: RMU's direction, a basis."""
    return Product("constant", detail=name)


def lora(which: str) -> Product:
    """``{module name: matrix}``: the adapter factors ``"A"`` or ``"B"``, read off the weights without a pass."""
    return Product("lora", detail=which)


_FROM_HEAD = {"token_logp", "seq_logp", "logits"}
_FROM_STATES = {"hidden", "pooled"}
_FROM_BATCH = {"label_count", "token_rows", "token_index", "labels", "mask", "column"}
#: Products with one entry per label token, rows one after the other.
PER_TOKEN = frozenset({"token_logp", "logits", "token_rows", "token_index", "labels"})


def base_side(side: Side | None) -> str | None:
    """The side whose rows a derived side repeats."""
    return side.of if isinstance(side, View) else side


@dataclass
class Pass:
    """What one forward pass has to yield: layers read, whether the head is, and views that run again."""

    layers: set[int] = field(default_factory=set)
    head: bool = False
    views: dict[View, set[int]] = field(default_factory=dict)


def passes(needs: Iterable[Product]) -> dict[tuple[str, str], Pass]:
    """The forward passes that a set of products costs: ``{(side, model): Pass}``.

    Args:
        needs: Products of all terms or columns of a step.

    Returns:
        One entry per (side, model), whatever the number of products that share it.

    Example:
        >>> sorted(passes([seq_logp("forget"), pooled("forget", -1), token_logp("retain")]))
        [('forget', 'policy'), ('retain', 'policy')]
    """
    plan: dict[tuple[str, str], Pass] = {}
    for p in needs:
        if p.what not in _FROM_HEAD | _FROM_STATES:
            continue
        side = base_side(p.side)
        assert side is not None
        entry = plan.setdefault((side, p.model), Pass())
        if isinstance(p.side, View):
            layers = entry.views.setdefault(p.side, set())
            layers.add(-1 if p.layer is None else p.layer)
        elif p.what in _FROM_HEAD:
            entry.head = True
        elif p.layer is not None:
            entry.layers.add(p.layer)
    return plan


# --- the parts of a model -----------------------------------------------------------------------------------------


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
class _Recorder:
    """What a pass leaves behind: the arguments of the blocks and the input of the head."""

    calls: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    final: Tensor | None = None
    normed: Tensor | None = None
    open: bool = True


def _block_input(call: tuple[tuple, dict]) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def _recording(anatomy: Anatomy, record_blocks: set[int], stop: int | None) -> Iterator[_Recorder]:
    """Watch a pass; with ``stop`` the blocks from there on are left out.

    The head is kept from running: the states it would read are what we want, and the caller evaluates the head where
    labels are. Its stand-in returns one column, so that whatever the model does with "logits" costs nothing.
    """
    recorder, handles, blocks = _Recorder(), [], anatomy.blocks

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


# --- logits, only where they are read -----------------------------------------------------------------------------


class Logits:
    """Logits at label positions, not yet computed: states ``[n, D]`` and the head that turns them into ``[n, V]``."""

    def __init__(self, states: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> None:
        self.states, self.head, self.vocabulary = states, head, vocabulary

    def __len__(self) -> int:
        return self.states.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of the label positions ``start`` to ``stop``."""
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
    block = block.float()
    return block.gather(-1, targets[:, None]).squeeze(-1) - block.logsumexp(-1)


# --- computing ----------------------------------------------------------------------------------------------------


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
    total = torch.einsum("btd,bt->bd", states.float(), weight)
    return total / weight.sum(1, keepdim=True).clamp_min(1.0)


def _drop(states: Tensor, batch: Batch, rate: float, seed: int) -> Tensor:
    """Dropout whose mask depends on (seed, row) alone: not on padding, batch-mates, rank or accumulation."""
    if rate <= 0:
        return states
    keep = torch.zeros(states.shape[:2] + states.shape[2:], dtype=states.dtype)
    generator = torch.Generator()
    attended = batch.attention_mask.bool().cpu()
    for row in range(states.shape[0]):
        index = batch.indices[row] if batch.indices else row
        generator.manual_seed((seed * 1_000_003 + index * 7919 + 17) % (2**63 - 1))
        length = int(attended[row].sum())
        draw = torch.rand(length, states.shape[2], generator=generator) >= rate
        keep[row, attended[row]] = draw.to(states.dtype) / (1 - rate)
    return states * keep.to(states.device)


def _run_again(anatomy: Anatomy, recorder: _Recorder, batch: Batch, view: View, seed: int) -> dict[int, Tensor]:
    """States of a derived side: blocks from ``view.from_layer`` up, on dropout of what they read in the pass."""
    first = anatomy.block(view.from_layer)
    states = _drop(_block_input(recorder.calls[first]), batch, view.dropout, seed)
    out = {first: states}
    for index in range(first, anatomy.depth):
        if index not in recorder.calls:  # the pass was cut above the highest layer read
            break
        args, kwargs = recorder.calls[index]
        if args:
            result = anatomy.blocks[index](states, *args[1:], **kwargs)
        else:
            result = anatomy.blocks[index](**{**kwargs, "hidden_states": states})
        states = result[0] if isinstance(result, tuple) else result
        out[index + 1] = states
    if anatomy.depth in out:
        out[anatomy.depth] = anatomy.norm(out[anatomy.depth])
    return out


def _places(anatomy: Anatomy, batch: Batch) -> dict[str, Tensor]:
    """Positions that count from each row's first token: padding on the left must not shift learned positions."""
    if "position_ids" not in inspect.signature(anatomy.owner.forward).parameters:
        return {}
    return {"position_ids": (batch.attention_mask.long().cumsum(1) - 1).clamp_min(0)}


@dataclass
class PassResult:
    """Hidden states by layer and, where the head is read, the states at the positions that predict a label."""

    layers: dict[int, Tensor]
    at_labels: Tensor | None
    views: dict[View, dict[int, Tensor]]


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
    padded = not bool(batch.attention_mask.all())
    right = bool((batch.attention_mask[:, 0] == 1).all())
    # Causal attention never looks right, so right padding needs no mask; it is cheaper and the states are the same.
    masked = {} if right or not padded else {"attention_mask": batch.attention_mask, **_places(anatomy, batch)}
    with _recording(anatomy, record, stop) as recorder:
        model(input_ids=batch.input_ids, use_cache=False, **masked)
    states: dict[int, Tensor] = {j: _block_input(recorder.calls[j]) for j in layers if j in recorder.calls}
    if highest in layers:
        top = recorder.normed if highest == anatomy.depth else recorder.final
        assert top is not None
        states[highest] = top
    at_labels = None
    if wanted.head:
        assert recorder.normed is not None
        rows, places = batch.positions()
        at_labels = recorder.normed[rows, places - 1]
    views = {view: _run_again(anatomy, recorder, batch, view, seed) for view in wanted.views}
    return PassResult(states, at_labels, views)


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
        if p.what in _FROM_BATCH:
            return _from_batch(p, batch)
        if p.what == "seq_logp":
            logp = self._make(Product("token_logp", p.side, p.model))
            rows, _ = batch.positions()
            return torch.zeros(len(batch.input_ids), device=logp.device).index_add(0, rows, logp)
        if p.what == "pooled" and p.model == POLICY:  # of the reference, the means themselves are stored
            states = self._make(Product("hidden", p.side, p.model, p.layer))
            return masked_mean(states, batch.masks(str(p.detail)))
        if p.model != POLICY:
            if self.reference is None:
                raise ValueError(f"{p.what} of the {p.model} was not stored")
            return self.reference(p, batch)
        return self._from_pass(p, batch, self._results[side])

    def _from_pass(self, p: Product, batch: Batch, result: PassResult) -> Any:
        if p.what == "hidden":
            assert p.layer is not None
            states = result.views[p.side] if isinstance(p.side, View) else result.layers
            return states[self.anatomy.layer(p.layer)]
        assert result.at_labels is not None
        block = Logits(result.at_labels, self.anatomy.logits, self.anatomy.vocabulary)
        if p.what == "logits":
            return block
        return logp_of(block, batch.input_ids[batch.positions()])


def logp_of(block: Logits, targets: Tensor) -> Tensor:
    """``[n]`` fp32 label log-probabilities, from logits that are made chunk by chunk."""
    grad = torch.is_grad_enabled()
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
