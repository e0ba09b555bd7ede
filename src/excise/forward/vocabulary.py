"""Log-probabilities of labels and of named tokens from states and the head's matrix, tile by tile along the vocabulary.

The logits ``[n, V]`` of a batch are the largest tensor of a step, and most of their cost is moving them through memory.
A tile fits the processor's cache; its exponentials are added up and it is overwritten by the next one. The backward
pass makes the tiles again (one more matrix product), but for as many as a fixed budget of memory holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Elements of a tile: what a core's cache holds, and on accelerators what fills the device.
TILE_ELEMENTS, TILE_ELEMENTS_DEVICE = 2**19, 2**24
#: Elements of a pass's logits (80 MB) whose exponentials are kept for the backward pass; other tiles are made again.
KEEP_ELEMENTS = 20 * 2**20


def label_logp(states: Tensor, matrix: Tensor, targets: Tensor, *, grad: bool = True) -> Tensor:
    """``[n]`` fp32 log-probabilities of labels, without a tensor of ``n x V`` elements where that would be large.

    Args:
        states: ``[n, D]`` states that the head reads.
        matrix: ``[V, D]`` the head.
        targets: ``[n]`` int64 labels.
        grad: Whether a backward pass will follow.

    Example:
        >>> label_logp(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]), grad=False).exp().tolist()
        [0.25]
    """
    return named_logp(states, matrix, targets[:, None], grad=grad)[:, 0]


def named_logp(states: Tensor, matrix: Tensor, names: Tensor, *, grad: bool = True) -> Tensor:
    """``[n, K + 1]`` fp32 log-probabilities of the tokens named for each label, and last of all others together.

    Args:
        states: As in `label_logp`, as ``matrix`` and ``grad``.
        matrix: See ``states``.
        names: ``[n, K]`` int64, each token once in its row.
        grad: See ``states``.

    Products are made in the precision of an autocast context, sums in fp32. Source: online normalisation, Milakov &
    Gimelshein 2018, arXiv 1805.02867; the recomputed tiles follow Wijmans et al. 2024, arXiv 2411.09009; several named
    tokens and the others beside them: ours.

    Example:
        >>> named_logp(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([[3, 0]]), grad=False).exp().tolist()
        [[0.25, 0.25, 0.5]]
    """
    return _NamedLogp.apply(states, matrix, names, KEEP_ELEMENTS if grad else 0)


def tiles(n: int, matrix: Tensor) -> Iterator[tuple[int, int]]:
    """First and last row of each tile of the head's matrix, for ``n`` labels."""
    limit = TILE_ELEMENTS if matrix.device.type == "cpu" else TILE_ELEMENTS_DEVICE
    size = max(64, limit // max(n, 1))
    return ((start, min(start + size, len(matrix))) for start in range(0, len(matrix), size))


class _Named:
    """The named tokens in the order of the vocabulary, so that each tile finds its own in one piece."""

    def __init__(self, names: Tensor, matrix: Tensor) -> None:
        ids, self.order = names.flatten().sort()
        self.rows, self.ids = self.order // names.shape[1], ids
        edges = [start for start, _ in tiles(len(names), matrix)] + [len(matrix)]
        self.edges = torch.searchsorted(ids, torch.tensor(edges, device=ids.device)).tolist()

    def of(self, tile: int, start: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Where a tile's own stand among all that are named, and in the tile."""
        own = slice(self.edges[tile], self.edges[tile + 1])
        return self.order[own], (self.rows[own], self.ids[own] - start)


#: Below any logit; finite, so that a difference to it is a number where no other token has been met.
_LOWEST = -1e30


class _NamedLogp(torch.autograd.Function):
    """Forward: what is named is taken out of its tile; of the others a running maximum and a running sum over tiles.

    Backward: the others' share of the gradient goes to each by its softmax among them, tile by tile.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, matrix: Tensor, names: Tensor, keep: int) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype
        kept: list[tuple[Tensor, Tensor]] = []  # exponentials of a tile, and what was taken off before
        named = _Named(names, matrix)
        with torch.autocast(device, enabled=False):
            h = states.to(dtype)
            top = torch.full((len(h),), _LOWEST, device=h.device)
            total, chosen = torch.zeros_like(top), torch.empty(names.numel(), device=h.device)
            for tile, (start, stop) in enumerate(tiles(len(h), matrix)):
                x = (h @ matrix[start:stop].to(dtype).T).float()
                among, inside = named.of(tile, start)
                chosen[among] = x[inside]
                x[inside] = -torch.inf
                high = torch.maximum(top, x.amax(1))
                x.sub_(high[:, None]).exp_()
                if len(h) * stop <= keep:
                    kept.append((x, high))
                total = total * (top - high).exp() + x.sum(1)
                top = high
        own = chosen.view(names.shape)
        high = torch.maximum(top, own.amax(1))  # taken off first: sums with large logits would be rounded
        every = torch.cat([own - high[:, None], ((top - high) + total.log())[:, None]], 1)
        logp = every - every.logsumexp(1, keepdim=True)
        ctx.save_for_backward(h, matrix, top, total, logp)
        ctx.kept, ctx.named, ctx.states_dtype = kept, named, states.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, matrix, top, total, logp = ctx.saved_tensors
        upstream = grads[0] - logp.exp() * grads[0].sum(1, keepdim=True)
        of_names, named = upstream[:, :-1].flatten(), ctx.named
        share = (upstream[:, -1] / total)[:, None]
        of_states = torch.zeros(h.shape, device=h.device) if ctx.needs_input_grad[0] else None
        of_matrix = torch.empty_like(matrix) if ctx.needs_input_grad[1] else None
        kept, ctx.kept = iter(ctx.kept), []
        with torch.autocast(h.device.type, enabled=False):
            for tile, (start, stop) in enumerate(tiles(len(h), matrix)):
                part = matrix[start:stop].to(h.dtype)
                if (made := next(kept, None)) is None:
                    x = (h @ part.T).float().sub_(top[:, None]).exp_().mul_(share)
                else:
                    x = made[0].mul_((made[1] - top).exp()[:, None] * share)
                among, inside = named.of(tile, start)
                x[inside] = of_names[among]
                x = x.to(h.dtype)
                if of_states is not None:
                    of_states = of_states.addmm_(x, part) if x.dtype == of_states.dtype else of_states.add_(x @ part)
                if of_matrix is not None:
                    of_matrix[start:stop] = x.T @ h
        return None if of_states is None else of_states.to(ctx.states_dtype), of_matrix, None, None
