"""One sweep per model: every sequence of every side goes through it once and yields all that metrics read of it.

Answers, paraphrases and false answers of all sides are pooled and sorted by length, so that batches carry little
padding. Logits exist only where a label is, in chunks; hidden states ride along. Generation is `metrics.generate`, what
hidden states say is `metrics.states`; both are named here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import compress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excise.forward import Anatomy, Batch, Pass, chunked, masked_mean, run_pass
from excise.metrics.generate import generate, generation_columns, with_generations
from excise.metrics.lens import layer_logp
from excise.metrics.states import Latent, latent, state_map
from excise.metrics.table import ANSWER, FALSE_ANSWER, LENS, PARAPHRASE, Table, check
from excise.records import Record
from excise.tasks import causal_lm

__all__ = [
    "Latent", "Sweep", "evaluating", "generate", "generation_columns", "latent", "state_map", "sweep", "token_columns",
    "with_generations",
]  # fmt: skip

States = dict[str, dict[int, NDArray[np.float32]]]


@dataclass
class Sweep:
    """What a sweep yields of one model.

    Attributes:
        tables: Side -> scores of every sequence, in the order of the records.
        states: Side -> layer (as it was asked for) -> ``[rows, D]`` fp32, the pooled states of the answers.
        paraphrase_states: The same of the paraphrases, ``[paraphrases, D]``, in the order of the table's sequences of
            that kind; only sides that have any.
    """

    tables: dict[str, Table]
    states: States = field(default_factory=dict)
    paraphrase_states: States = field(default_factory=dict)


@dataclass(frozen=True)
class _Sequence:
    """One sequence of the sweep: where it belongs, and its tokens."""

    side: str
    row: int
    kind: int
    example: causal_lm.Example

    @property
    def labels(self) -> int:
        return self.example.labels


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was (parts may differ from the whole)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def token_columns(states: Tensor, targets: Tensor, anatomy: Anatomy) -> Tensor:
    """Scores of label tokens from the states that predict them, in chunks that bound the memory of the vocabulary axis.

    Args:
        states: ``[n, D]`` normed states, one position to the left of each label.
        targets: ``[n]`` int64 label tokens.
        anatomy: Whose head turns states into logits.

    Returns:
        ``[n, 4]`` fp32 in nats: log p of the label; 1 where it is the first choice; mean and standard deviation of
        log p over the vocabulary under p, as Min-K %++ (Zhang et al., 2404.02936) needs them.
    """

    def part(start: int, stop: int) -> Tensor:
        x, wanted = anatomy.logits(states[start:stop]).float(), targets[start:stop]
        top, choice = x.max(dim=-1, keepdim=True)
        x.sub_(top)  # the head's output is nobody else's
        label = x.gather(-1, wanted[:, None])
        p = x.exp()
        total = p.sum(-1, keepdim=True)
        p /= total
        # Mean and spread are taken of the shifted logits: the logarithm of the sum moves the mean alone.
        mean = (p * x).sum(-1, keepdim=True)
        spread = x.sub_(mean).square_().mul_(p).sum(-1, keepdim=True).sqrt_()
        log_total = total.log()
        return torch.cat((label - log_total, (choice == wanted[:, None]).float(), mean - log_total, spread), dim=1)

    return chunked(part, len(states), anatomy.vocabulary, grad=False)


def sweep(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    sides: Mapping[str, Sequence[Record]],
    encoding: causal_lm.Encoding,
    *,
    batch_tokens: int = 4096,
    layers: Sequence[int] = (),
    pooling: str = "attended",
    lens: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Score every sequence of every side in one forward pass each.

    Numbers do not depend on the order of rows, the batch size or padding beyond rounding. Weights, gradients, training
    mode and the global random state are left as they are. An autocast context of the caller is respected; log
    probabilities are computed in fp32 in any case.

    Args:
        model: A causal language model, PEFT or wrapped included.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        sides: Rows by side.
        encoding: How text becomes tokens.
        batch_tokens: Most tokens of a batch, its padding included.
        layers: Layers whose pooled states are kept, numbered as in `forward`; none: no states.
        pooling: ``attended``, ``answer`` or ``last``.
        lens: Sides whose answers are read from every inner layer too (`lens.layer_logp`).
        progress: Called with (sequences done, all sequences).

    Returns:
        Tables and states by side.

    Raises:
        InputRefused: A row that does not fit (file and line are named), or scores that are not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> class Bytes:
        ...     eos_token_id, pad_token_id, chat_template = 0, 0, None
        ...     def __call__(self, text, **_): return {"input_ids": list(text.encode())}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> rows = {"forget": [Record("Who?", "Ada", false_answers=("Bob", "Eve"))]}
        >>> swept = sweep(model, Anatomy.of(model), Bytes(), rows, causal_lm.Encoding(), layers=[-1])
        >>> swept.tables["forget"].lengths.tolist(), swept.states["forget"][-1].shape
        ([4, 4, 4], (1, 16))
    """
    items = [
        _Sequence(side, row, kind, example)
        for side, records in sides.items()
        for row, kind, example in causal_lm.sequences(records, tokenizer, encoding, source=side)
    ]
    offsets = np.concatenate(([0], np.cumsum([s.labels for s in items]))).astype(np.int64)
    scores = np.empty((int(offsets[-1]), 4), np.float32)
    kept = {i: place for place, i in enumerate(i for i, s in enumerate(items) if s.kind != FALSE_ANSWER)}
    pooled: dict[int, NDArray[np.float32]] = {}
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inner = list(range(1, anatomy.depth)) if lens else []
    read = np.full((len(items), len(inner)), np.nan, np.float32)
    done, wanted = 0, Pass(layers={*layers, *inner}, head=True)
    with evaluating(model):
        for indices in causal_lm.length_batches([len(s.example.input_ids) for s in items], batch_tokens, batch_tokens):
            made = causal_lm.collate([items[i].example for i in indices], pad_id=pad_id)
            batch = Batch(made["input_ids"], made["attention_mask"], made["label_mask"]).to(device)
            result = run_pass(model, anatomy, batch, wanted)
            assert result.at_labels is not None
            columns = token_columns(result.at_labels, batch.input_ids[batch.label_mask], anatomy)
            scores[np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices])] = columns.cpu().numpy()
            own = [k for k, i in enumerate(indices) if items[i].kind == ANSWER and items[i].side in lens]
            if inner and own:
                read[[indices[k] for k in own]] = layer_logp(result, batch, anatomy, own, inner).cpu().numpy()
            laid_out = result.layers  # once: rows may be packed
            taken = {layer: laid_out[anatomy.layer(layer)] for layer in layers}
            _keep_states(taken, batch.masks(pooling), [kept.get(i) for i in indices], pooled, len(kept))
            done += len(indices)
            if progress is not None:
                progress(done, len(items))
    tables = _tables(items, offsets, scores, sides, tokenizer.eos_token_id)
    for side in [s for s in tables if s in lens and inner]:
        answers = [i for i, s in enumerate(items) if s.side == side and s.kind == ANSWER]
        tables[side].columns.update({f"{LENS}{layer}": read[answers, k] for k, layer in enumerate(inner)})
    return Sweep(tables, _split(items, kept, pooled, ANSWER), _split(items, kept, pooled, PARAPHRASE))


def _keep_states(
    states: Mapping[int, Tensor],
    where: Tensor,
    places: Sequence[int | None],
    pooled: dict[int, NDArray[np.float32]],
    total: int,
) -> None:
    """Write the pooled states of a batch to their places; false answers have none."""
    rows = [i for i, place in enumerate(places) if place is not None]
    if not rows:
        return
    target = np.array([place for place in places if place is not None])
    for layer, own in states.items():
        values = masked_mean(own[rows], where[rows]).cpu().numpy()
        if layer not in pooled:
            pooled[layer] = np.empty((total, values.shape[1]), np.float32)
        pooled[layer][target] = values


def _split(
    items: Sequence[_Sequence], kept: Mapping[int, int], pooled: Mapping[int, NDArray[np.float32]], kind: int
) -> States:
    """States by side and layer of the sequences of one kind."""
    places: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if item.kind == kind:
            places.setdefault(item.side, []).append(kept[i])
    return {side: {layer: values[p] for layer, values in pooled.items()} for side, p in places.items() if pooled}


def _tables(
    items: Sequence[_Sequence],
    offsets: NDArray[np.int64],
    scores: NDArray[np.float32],
    sides: Mapping[str, Sequence[Record]],
    eos: int,
) -> dict[str, Table]:
    groups = group_ids(sides)
    owners: dict[str, list[int]] = {side: [] for side in sides}
    for i, item in enumerate(items):
        owners[item.side].append(i)
    tables = {}
    for side, own in owners.items():
        mine, records = [items[i] for i in own], sides[side]
        # Sequences of a side follow each other, so its tokens are one slice.
        first, last = (int(offsets[own[0]]), int(offsets[own[-1] + 1])) if own else (0, 0)
        block = scores[first:last]
        columns: dict[str, NDArray] = {
            "row": np.array([s.row for s in mine], np.int32),
            "kind": np.array([s.kind for s in mine], np.int8),
            "zlib": np.array(_compressed_sizes(mine, records), np.int32),
            "eos": np.array([s.example.input_ids[-1] == eos for s in mine], bool),
            "offsets": np.concatenate(([0], np.cumsum([s.labels for s in mine]))).astype(np.int64),
            "logp": block[:, 0].copy(),
            "hit": block[:, 1] > 0.5,
            "mu": block[:, 2].copy(),
            "sigma": block[:, 3].copy(),
        }
        if side in groups:
            columns["group"] = groups[side]
        tables[side] = check(Table(side, len(records), columns))
    return tables


def _compressed_sizes(mine: Sequence[_Sequence], records: Sequence[Record]) -> list[int]:
    """Bytes of each answer's text after zlib; the sequences of a row follow the order of `causal_lm.sequences`."""
    answers: dict[int, Iterator[str]] = {}
    for row, r in enumerate(records):
        answers[row] = iter((r.completion, *(answer for _, answer in r.paraphrases), *r.false_answers))
    return [len(compress(next(answers[s.row]).encode("utf-8", "replace"))) for s in mine]


def group_ids(sides: Mapping[str, Sequence[Record]]) -> dict[str, NDArray[np.int32]]:
    """Numbers for groups, the same over all sides, for the sides that have any; names do not enter tables."""
    names = sorted({r.group for records in sides.values() for r in records if r.group is not None})
    number = {name: i for i, name in enumerate(names)}
    return {
        side: np.array([-1 if r.group is None else number[r.group] for r in records], np.int32)
        for side, records in sides.items()
        if any(r.group is not None for r in records)
    }
