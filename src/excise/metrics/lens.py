"""The logit lens: what the model's head would say of the answers, read from the layers below the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excise.forward import Anatomy, Batch, PassResult, chunked, label_logp


def layer_logp(
    result: PassResult, batch: Batch, anatomy: Anatomy, rows: Sequence[int], layers: Sequence[int]
) -> Tensor:
    """``[rows, layers]`` fp32 mean log p of each row's labels, in nats, end of sequence included; NaN without a label.

    States of a layer go through the model's final norm and head, as the last layer's do.

    Args:
        result: A pass that recorded the states of ``layers``.
        batch: What the pass was over.
        anatomy: Of the model.
        rows: Rows of the batch that are read.
        layers: Numbers from 1 to one below the depth.

    Source:
        nostalgebraist 2020 (the logit lens).
    """
    found, places = batch.positions()
    chosen = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=found.device)
    chosen[list(rows)] = True
    taken = chosen[found]
    found, places, targets = found[taken], places[taken], batch.targets()[taken]
    counts = torch.bincount(found, minlength=len(chosen)).float()
    columns = []
    for layer in layers:
        states = result.at(layer, found, places - anatomy.shift)
        logp = _read(states, targets, anatomy)
        columns.append(torch.zeros(len(chosen), device=logp.device).index_add(0, found, logp) / counts)
    return torch.stack(columns, dim=1)[list(rows)]


def _read(states: Tensor, targets: Tensor, anatomy: Anatomy) -> Tensor:
    def part(start: int, stop: int) -> Tensor:
        block = states[start:stop]
        normed = block if anatomy.norm is None else anatomy.norm(block)
        return label_logp(anatomy.logits(normed), targets[start:stop])

    return chunked(part, len(states), anatomy.vocabulary, grad=False)
