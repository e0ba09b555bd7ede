"""Rows of a right-padded batch laid end to end in fewer, fuller rows, so that little of a pass is spent on padding.

transformers keeps such rows apart wherever it builds a causal mask itself: positions that start again start a new
sequence. Encoders, which look both ways, are given a mask. Otherwise a third of the positions of a shuffled batch of
questions and answers is padding, and two fifths of a tagger's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Architectures whose states were compared with those of a padded pass (tests/test_packing.py). Others may mix
#: neighbours by other ways than attention, or count positions by themselves.
ARCHITECTURES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "phi", "phi3", "gemma2", "gemma3_text"}
)
#: The same of encoders, which take a mask of their own and positions.
ENCODERS = frozenset({"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert"})
#: Of these, whose positions count from the place after padding's.
OFFSET = frozenset({"roberta", "xlm-roberta", "camembert"})
#: Attention implementations whose masks know packed rows in batches of any size (flash attention: of one row only).
ATTENTION = frozenset({"sdpa", "eager"})
#: Packing has to save this share of the work, since it costs a mask and some copies.
WORTHWHILE = 0.1


@dataclass(frozen=True)
class Packing:
    """Where every position of a batch ``[B, T]`` stands in a packed one ``[b, W]``.

    Attributes:
        index: ``[B, T]`` int64, flat place of each attended position; padding points to the first token of its row.
        attended: ``[B, T]`` bool.
        position_ids: ``[b, W]`` int64, from 0 in each row that was packed.

    Example:
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
        >>> made = pack(mask, width=64)
        >>> made.position_ids.tolist()
        [[0, 1, 2, 3], [0, 1, 0, 1]]
        >>> bool((made.back(made.lay(mask)) == 1).all())
        True
    """

    index: Tensor
    attended: Tensor
    position_ids: Tensor

    def lay(self, rows: Tensor) -> Tensor:
        """``[b, W, ...]`` from ``[B, T, ...]``; places that nothing fills are 0."""
        out = rows.new_zeros(self.position_ids.numel(), *rows.shape[2:])
        out[self.index[self.attended]] = rows[self.attended]
        return out.view(*self.position_ids.shape, *rows.shape[2:])

    def apart(self) -> Tensor:
        """``[b, 1, W, W]`` bool, which positions may look at which: those of the same row at each other."""
        rows = torch.arange(1, len(self.index) + 1, device=self.index.device)
        numbers = self.lay(rows[:, None].expand_as(self.index))
        return (numbers[:, :, None] == numbers[:, None, :])[:, None]

    def back(self, packed: Tensor) -> Tensor:
        """``[B, T, ...]`` from ``[b, W, ...]``; what stands at padding means nothing."""
        return packed.flatten(0, 1)[self.index]


def can_pack(config: Any) -> bool:
    """Whether a model of this config (of transformers) reads packed rows as if they stood alone."""
    kind, attention = getattr(config, "model_type", None), getattr(config, "_attn_implementation", None)
    return kind in ARCHITECTURES | ENCODERS and attention in ATTENTION


def inputs(packing: Packing, input_ids: Tensor, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model is called with, for rows that were packed.

    Args:
        packing: Where they stand.
        input_ids: ``[B, T]``.
        config: The model's.
        dtype: Of its weights.
    """
    made = {"input_ids": packing.lay(input_ids), "position_ids": packing.position_ids}
    if config.model_type not in ENCODERS:
        return made
    if config.model_type in OFFSET:
        made["position_ids"] = packing.position_ids + config.pad_token_id + 1
    mask = packing.apart()
    if config._attn_implementation == "eager":  # adds it to the scores
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {**made, "attention_mask": mask}


def pack(attention_mask: Tensor, *, width: int) -> Packing | None:
    """Lay the rows of a right-padded batch end to end, or say that it is not worthwhile.

    The packed length is the one, from the longest row's to twice that, that costs least: padding is wasted in linear
    layers, length in attention. Rows are placed by first fit, longest first; the same lengths give the same places.

    Args:
        attention_mask: ``[B, T]``, ones up to each row's length.
        width: Hidden size, which decides what attention costs beside linear layers.
    """
    lengths = [int(n) for n in attention_mask.sum(1).tolist()]
    longest, best = max(lengths), (_cost(len(lengths), attention_mask.shape[1], width) * (1 - WORTHWHILE), [[0]], 0)
    for length in sorted({longest + math.ceil(longest * eighth / 8) for eighth in range(9)}):
        bins = _first_fit(lengths, length)
        best = min(best, (_cost(len(bins), length, width), bins, length), key=lambda entry: entry[0])
    return None if best[2] == 0 else _placed(attention_mask, lengths, best[1], best[2])


def _cost(rows: int, length: int, width: int) -> float:
    """Work of a block, up to a factor: 24 D^2 a position in linear layers, 4 L D in attention."""
    return rows * length * (1 + length / (6 * width))


def _first_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((k for k, free in enumerate(room) if free >= lengths[row]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(length)
        bins[place].append(row)
        room[place] -= lengths[row]
    return bins


def _placed(attention_mask: Tensor, lengths: Sequence[int], bins: Sequence[Sequence[int]], length: int) -> Packing:
    starts = [0] * len(lengths)
    position_ids = torch.zeros(len(bins), length, dtype=torch.int64)
    for number, rows in enumerate(bins):
        used = 0
        for row in rows:
            starts[row] = number * length + used
            position_ids[number, used : used + lengths[row]] = torch.arange(lengths[row])
            used += lengths[row]
    attended = attention_mask.bool()
    steps = torch.arange(attended.shape[1], device=attended.device)
    index = torch.tensor(starts, device=attended.device)[:, None] + steps * attended
    return Packing(index, attended, position_ids.to(attended.device))
