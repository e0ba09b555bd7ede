"""Streams of vectors that become moments: products as they come, sums in fp64, the same on one rank and on several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from excise import ranks
from excise.errors import InputRefused
from excise.initialise.moments import Moments


class Accumulator:
    """Takes vectors as they come and makes `Moments` of them.

    Products are made in the precision of the vectors (fp32 at least), of vectors centred by the mean of their own
    update, and summed in fp64: a large common mean costs no digits, and sums do not depend on which rank made which
    update.

    Example:
        >>> stream = Accumulator(1)
        >>> stream.update(torch.tensor([[1.0], [2.0]]))
        >>> stream.update(torch.tensor([[6.0]]), torch.tensor([2.0]))
        >>> stream.finish().mean.tolist()
        [3.75]
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self.width, self.seen, self.count = width, 0, 0.0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.second: Tensor | None = None
        self._held: list[tuple[Tensor, Tensor | None]] = []

    def update(self, vectors: Tensor, weights: Tensor | None = None) -> None:
        """Add ``[n, d]`` vectors; a weight of 2 counts like the vector twice."""
        x = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
        w = None if weights is None else weights.detach().to(x.device, torch.float64)
        if not len(x):
            return
        count = float(len(x)) if w is None else float(w.sum())
        total = x.double().sum(0) if w is None else w @ x.double()
        self.seen, self.count, self.total = self.seen + len(x), self.count + count, self.total + total
        if self.second is not None:
            self._add(x, w, count, total)
            return
        self._held.append((x.clone(), w))
        if self.seen >= self.width:
            self.condense()

    def condense(self) -> None:
        """Go over to sums of products, for good."""
        if self.second is None:
            self.second = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.total.device)
            for x, w in self._held:
                self._add(
                    x, w, *((float(len(x)), x.double().sum(0)) if w is None else (float(w.sum()), w @ x.double()))
                )
            self._held = []

    def _add(self, x: Tensor, w: Tensor | None, count: float, total: Tensor) -> None:
        assert self.second is not None
        if count > 0:
            mean = total / count
            centred = (x - mean).to(x.dtype) if w is None else ((x - mean) * w.sqrt()[:, None]).to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                self.second += centred.T @ centred
            self.second.addr_(mean, mean, alpha=count)

    def finish(self) -> Moments:
        """What was seen so far.

        Raises:
            InputRefused: Nothing was seen, or NaN or inf.
        """
        if self.count <= 0:
            raise InputRefused("no position to take statistics from: no row has a token where they are read")
        diagonal = self.total if self.second is None else self.total + self.second.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise InputRefused("NaN or inf among the layer's values: check the model and its precision")
        if self.second is not None:
            return Moments(self.count, self.total, self.second, None)
        rows = torch.cat([x for x, _ in self._held])
        plain = all(w is None for _, w in self._held)
        ones = (torch.ones(len(x), dtype=torch.float64, device=x.device) if w is None else w for x, w in self._held)
        return Moments(self.count, self.total, None, rows, None if plain else torch.cat(list(ones)))


def all_reduce(streams: Mapping[str, Accumulator]) -> None:
    """Make every rank's accumulators hold what all ranks saw; nothing happens outside a distributed run.

    All ranks must hold the same names in the same order. Where the ranks together saw fewer vectors than the width,
    the vectors are gathered, rank after rank; otherwise sums are added.
    """
    if not ranks.joined() or not streams:
        return
    device = next(iter(streams.values())).total.device
    counts = torch.tensor([[s.count, s.seen] for s in streams.values()], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    for stream, (count, seen) in zip(streams.values(), counts.tolist(), strict=True):
        stream.count, stream.seen = count, int(seen)
        dist.all_reduce(stream.total)
        if stream.seen >= stream.width:
            stream.condense()
            assert stream.second is not None
            dist.all_reduce(stream.second)
        else:
            gathered: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, [(x.cpu(), None if w is None else w.cpu()) for x, w in stream._held])
            stream._held = [(x.to(device), None if w is None else w.to(device)) for part in gathered for x, w in part]
