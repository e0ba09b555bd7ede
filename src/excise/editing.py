"""Edits of the weights before training, without a gradient: embedding rows that only the forget set uses are reset.

A model that never saw the forget rows has nothing in the rows of their own tokens: they look like rows of tokens that
nobody uses. No weight of a later layer can hide what is left there, which a probe of the first layer reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Chosen:
    """Which rows are reset, and from which ones their replacements are drawn.

    Attributes:
        tokens: ``[n]`` int64.
        weights: ``[n]`` fp32, how far each goes: 1 replaces it.
        unused: ``[m]`` int64 tokens that neither the forget rows nor the kept ones use.
    """

    tokens: Tensor
    weights: Tensor
    unused: Tensor


def counts(rows: Iterable[Sequence[int]], size: int) -> Tensor:
    """``[size]`` int64: how often each token stands in the rows.

    Example:
        >>> counts([(0, 2), (2,)], 3).tolist()
        [1, 0, 2]
    """
    seen = torch.zeros(size, dtype=torch.int64)
    for row in rows:
        seen += torch.bincount(torch.as_tensor(row, dtype=torch.int64), minlength=size)
    return seen


def choose(
    forget: Tensor, kept: Tensor, *, share: float = 1.0, special: Collection[int] = (), single: Collection[int] = ()
) -> Chosen:
    """The tokens of the forget rows alone, or nearly.

    Args:
        forget: ``[V]`` counts in the forget rows.
        kept: ``[V]`` counts in rows that are kept.
        share: Least share of a token's uses that are the forget rows'. Below 1 a shared token goes (s - share) /
            (1 - share) of the way, s being its share.
        special: Tokens that are never touched nor drawn from (beginning, end, padding).
        single: Tokens that are not drawn from: bytes and single characters are rare for other reasons.

    Source: ours.

    Example:
        >>> found = choose(torch.tensor([3, 3, 1, 0, 0]), torch.tensor([9, 1, 0, 2, 0]), share=0.5)
        >>> found.tokens.tolist(), found.weights.tolist(), found.unused.tolist()
        ([1, 2], [0.5, 1.0], [4])
    """
    uses = forget.double() / (forget + kept).clamp_min(1)
    ours = (forget > 0) & ((uses > share) | (kept == 0))
    free = (forget == 0) & (kept == 0)
    special_ids = torch.tensor(sorted(special), dtype=torch.int64)
    ours[special_ids], free[special_ids] = False, False
    free[torch.tensor(sorted(single), dtype=torch.int64)] = False
    tokens = ours.nonzero().squeeze(1)
    way = torch.ones(len(tokens)) if share == 1 else ((uses[tokens] - share) / (1 - share)).float()
    return Chosen(tokens, way, free.nonzero().squeeze(1))


@dataclass(frozen=True)
class Draw:
    """Two unused rows for each row that is reset, by place in `Chosen.unused`; the same for every table of a model."""

    first: Tensor
    second: Tensor

    @staticmethod
    def of(chosen: Chosen, seed: int) -> Draw:
        """Two different ones for each, from the seed.

        Raises:
            ValueError: There are fewer than two.
        """
        n, m = len(chosen.tokens), len(chosen.unused)
        if m < 2:
            raise ValueError(f"{m} unused rows: two or more are needed to draw from")
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(m, (n,), generator=generator)
        second = torch.randint(m - 1, (n,), generator=generator)
        return Draw(first, second + (second >= first))


@torch.no_grad()
def replacements(table: Tensor, chosen: Chosen, draw: Draw) -> Tensor:
    """``[n, d]`` fp32 new rows: (1 - w) e + w (mu + ((a - mu) + (b - mu)) / sqrt 2), a and b being unused rows.

    Two rows around the mean mu of all unused ones have their spread, and are none of them.

    Args:
        table: ``[V, d]`` embedding, or the weight of an output layer.
        chosen: Which rows.
        draw: Where from.

    Source: ours.

    Example:
        >>> chosen = Chosen(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1, 2]))
        >>> replacements(torch.tensor([[9.0], [1.0], [3.0]]), chosen, Draw.of(chosen, 0)).tolist()
        [[2.0]]
    """
    device = table.device
    unused = table[chosen.unused.to(device)].float()
    mean = unused.mean(0)
    a, b = unused[draw.first.to(device)], unused[draw.second.to(device)]
    w = chosen.weights.to(device)[:, None]
    return (1 - w) * table[chosen.tokens.to(device)].float() + w * (mean + (a + b - 2 * mean) / math.sqrt(2))


@torch.no_grad()
def reset_rows(model: Any, chosen: Chosen, *, seed: int, output: bool = True) -> int:
    """Reset rows of the input embedding and of the output layer; the number of tables that were changed.

    Args:
        model: Of transformers, without an adapter.
        chosen: Which rows.
        seed: Of the draws.
        output: Output rows of a layer with weights of its own too, its bias as the mean of the unused ones.

    Raises:
        ValueError: Fewer than two unused rows.
    """
    if not len(chosen.tokens):
        return 0
    draw, table = Draw.of(chosen, seed), model.get_input_embeddings().weight
    head: nn.Linear | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = [table]
    if output and head is not None and head.weight is not table:
        tables.append(head.weight)
    for own in tables:
        own[chosen.tokens.to(own.device)] = replacements(own, chosen, draw).to(own.dtype)
    bias = getattr(head, "bias", None)
    if output and bias is not None:
        w, at = chosen.weights.to(bias.device), chosen.tokens.to(bias.device)
        bias[at] = ((1 - w) * bias[at].float() + w * bias[chosen.unused.to(bias.device)].float().mean()).to(bias.dtype)
    return len(tables)
