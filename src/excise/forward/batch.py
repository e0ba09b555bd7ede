"""One side's rows as tensors, and means over chosen positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One side's rows as tensors, with what every product needs of them worked out once.

    ``label_mask`` marks the positions that hold a label. A causal model's labels are the tokens there, and the state
    that predicts one stands to its left; a classifier's are ``classes [B, T]`` (int64, read at labels alone), each
    predicted where it stands.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label_mask: Tensor
    indices: tuple[int, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    classes: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        move = {k: v.to(device) for k, v in self.columns.items()}
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.label_mask.to(device),
            self.indices,
            move,
            None if self.classes is None else self.classes.to(device),
        )

    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and position of each label, rows one after the other."""
        rows, places = self.label_mask.nonzero(as_tuple=True)
        return rows, places

    def targets(self) -> Tensor:
        """``[n]`` int64: the label tokens, or a classifier's classes."""
        return (self.input_ids if self.classes is None else self.classes)[self.positions()]

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
    total = (states.float() * weight[..., None]).sum(1)  # no matrix product: autocast would make it one of bf16
    return total / weight.sum(1, keepdim=True).clamp_min(1.0)
