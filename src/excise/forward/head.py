"""Logits that are not made until they are read: at label positions only, in chunks or tiles where large."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from excise.forward import vocabulary

#: Elements of one [chunk, V] block of logits above which the head is evaluated in recomputed chunks.
CHUNK_ELEMENTS = 4_000_000


class Logits:
    """Logits at label positions, not yet computed: states ``[n, D]`` and the head that turns them into ``[n, V]``.

    ``matrix`` is the head as a matrix ``[V, D]``, where it is nothing else. They are made in the precision (autocast or
    not) of the pass that they belong to, whenever that is.
    """

    def __init__(
        self, states: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, matrix: Tensor | None = None
    ) -> None:
        self.states, self.head, self.vocabulary, self.matrix = states, head, vocabulary, matrix
        device = states.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def __len__(self) -> int:
        return self.states.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of the label positions ``start`` to ``stop``."""
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
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
    return -F.cross_entropy(block.float(), targets, reduction="none")


def logp_of(block: Logits, targets: Tensor) -> Tensor:
    """``[n]`` fp32 label log-probabilities, from logits that are made tile by tile or chunk by chunk."""
    grad = torch.is_grad_enabled()
    if block.matrix is not None:
        return vocabulary.label_logp(block.states, block.matrix, targets, grad=grad)
    return chunked(lambda a, b: label_logp(block.rows(a, b), targets[a:b]), len(block), block.vocabulary, grad=grad)


def named_logp_of(block: Logits, names: Tensor) -> Tensor:
    """``[n, K]`` fp32 log-probabilities of the classes named for each label, or ``[n, K + 1]`` with all others as one.

    ``names`` is ``[n, K]`` int64, each class once in its row; there are others where a label has more than K classes.
    """
    grad, others = torch.is_grad_enabled(), names.shape[1] < block.vocabulary
    if block.matrix is not None:
        found = vocabulary.named_logp(block.states, block.matrix, names, grad=grad)
        return found if others else found[:, :-1]

    def part(start: int, stop: int) -> Tensor:
        z, own = block.rows(start, stop).float(), names[start:stop]
        chosen = z.gather(-1, own)
        if others:
            chosen = torch.cat([chosen, z.scatter(-1, own, -torch.inf).logsumexp(-1, keepdim=True)], -1)
        return chosen - z.logsumexp(-1, keepdim=True)

    return chunked(part, len(block), block.vocabulary, grad=grad)
