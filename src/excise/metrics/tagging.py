"""One sweep of a classifier: every row of every side goes through it once and yields all that metrics read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise.forward import Anatomy, Batch, Pass, run_pass
from excise.metrics.class_states import chosen
from excise.metrics.measure import Sweep, evaluating, group_ids, token_columns
from excise.metrics.table import ANSWER, Table, check
from excise.records import Record
from excise.tasks import TASKS, causal_lm


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The classes of a model by number, from its config."""
    config: Any = model.config
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def sweep(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    sides: Mapping[str, Sequence[Record]],
    encoding: causal_lm.Encoding,
    *,
    task: str,
    batch_tokens: int = 4096,
    layers: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Score every label of every side in one forward pass each, all sides together, sorted by length.

    Numbers do not depend on the order of rows, the batch size or padding beyond rounding. Weights, gradients and
    training mode are left as they are; scores are computed in fp32.

    Args:
        model: A token or sequence classifier, PEFT or wrapped included.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        sides: Rows by side.
        encoding: Of which the length counts.
        task: ``token_classification`` or ``sequence_classification``.
        batch_tokens: Most tokens of a batch, its padding included.
        layers: Layers whose states are kept, at the labels that `class_states.chosen` names.
        progress: Called with (rows done, all rows).

    Returns:
        Tables by side, and states by side and layer, ``[k, D]`` fp32 in the order of `class_states.chosen`.

    Raises:
        InputRefused: A row that does not fit or a class that the model lacks (file and line are named), or scores that
            are not finite.
    """
    names = class_names(model)
    examples = [
        (side, example)
        for side, records in sides.items()
        for example in TASKS[task].encode_records(records, tokenizer, encoding, names=names, source=side)
    ]
    offsets = np.concatenate(([0], np.cumsum([len(e.classes) for _, e in examples]))).astype(np.int64)
    gold = np.array([c for _, e in examples for c in e.classes], np.int64)
    slots, places = _slots(examples, gold, offsets, names, list(sides))
    scores, predicted = np.empty((len(gold), 4), np.float32), np.empty(len(gold), np.int16)
    kept: dict[int, NDArray[np.float32]] = {}
    device = next(model.parameters()).device
    done, wanted = 0, Pass(layers=set(layers), head=True)
    with evaluating(model):
        for indices in causal_lm.length_batches([len(e.input_ids) for _, e in examples], batch_tokens, batch_tokens):
            made = TASKS[task].collate([examples[i][1] for i in indices], pad_id=tokenizer.pad_token_id)
            batch = Batch(**made).to(device)
            result = run_pass(model, anatomy, batch, wanted)
            assert result.at_labels is not None
            at = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices])
            predicted[at] = result.at_labels.argmax(-1).cpu().numpy()  # before `token_columns`, which works in place
            scores[at] = token_columns(result.at_labels, batch.targets(), anatomy).cpu().numpy()
            rows, positions = batch.positions()
            held = torch.from_numpy(slots[at] >= 0).to(device)
            for layer in layers:
                states = result.at(anatomy.layer(layer), rows[held], positions[held]).float().cpu().numpy()
                store = kept.setdefault(layer, np.empty((int((slots >= 0).sum()), states.shape[1]), np.float32))
                store[slots[at][slots[at] >= 0]] = states
            done += len(indices)
            if progress is not None:
                progress(done, len(examples))
    tables = _tables([side for side, _ in examples], offsets, scores, gold, predicted, sides, names)
    return Sweep(tables, {side: {layer: own[where] for layer, own in kept.items()} for side, where in places.items()})


def _slots(
    examples: Sequence[tuple[str, Any]], gold: NDArray, offsets: NDArray, names: Sequence[str], sides: Sequence[str]
) -> tuple[NDArray[np.int64], dict[str, slice]]:
    """Where the state of each label is stored, -1 for nowhere; and which stored ones are whose, in order."""
    slots, places, used = np.full(len(gold), -1, np.int64), {}, 0
    owner = np.repeat(np.array([sides.index(side) for side, _ in examples], np.int64), np.diff(offsets))
    for number, side in enumerate(sides):
        own = np.flatnonzero(owner == number)
        mine = own[chosen(gold[own], names)]
        slots[mine] = used + np.arange(len(mine))
        places[side] = slice(used, used + len(mine))
        used += len(mine)
    return slots, places


def _tables(
    owners: Sequence[str],
    offsets: NDArray[np.int64],
    scores: NDArray[np.float32],
    gold: NDArray,
    predicted: NDArray,
    sides: Mapping[str, Sequence[Record]],
    names: tuple[str, ...],
) -> dict[str, Table]:
    groups, out = group_ids(sides), {}
    for side, records in sides.items():
        own = [i for i, name in enumerate(owners) if name == side]  # a side's rows follow each other
        first, last = (own[0], own[-1] + 1) if own else (0, 0)
        block = slice(int(offsets[first]), int(offsets[last]))
        columns: dict[str, NDArray] = {
            "row": np.arange(len(own), dtype=np.int32),
            "kind": np.full(len(own), ANSWER, np.int8),
            "eos": np.zeros(len(own), bool),
            "offsets": offsets[first : last + 1] - offsets[first],
            "logp": scores[block, 0].copy(),
            "hit": predicted[block] == gold[block],
            "mu": scores[block, 2].copy(),
            "sigma": scores[block, 3].copy(),
            "gold_class": gold[block].astype(np.int16),
            "predicted_class": predicted[block].copy(),
        }
        if side in groups:
            columns["group"] = groups[side]
        out[side] = check(Table(side, len(records), columns, names))
    return out
