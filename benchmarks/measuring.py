"""How it is measured: paired CPU times, the allocator's peak, and the bytes of tensors with a vocabulary axis."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Paired:
    """Times of two ways of doing the same, taken in turns.

    Attributes:
        first: CPU seconds of each call of the first.
        second: CPU seconds of each call of the second, aligned.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """First over second, pair by pair."""
        return [a / b for a, b in zip(self.first, self.second, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the paired ratios."""
        return median(self.ratios)


def seconds(step: Step, number: int) -> float:
    """CPU seconds of this process in one call; another process on the machine does not enter them."""
    start = time.process_time()
    step(number)
    return time.process_time() - start


def paired(first: Step, second: Step, pairs: int, *, warm: int = 2) -> Paired:
    """Time two steps in turns, the order within a pair alternating, after ``warm`` unmeasured pairs."""
    for number in range(warm):
        first(number), second(number)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        order = ((0, first), (1, second)) if number % 2 == 0 else ((1, second), (0, first))
        for which, step in order:
            times[which].append(seconds(step, number))
    return Paired(tuple(times[0]), tuple(times[1]))


def allocated(step: Step, number: int = 0) -> int:
    """Peak bytes that torch's CPU allocator hands out during a call, above what it held before.

    Every allocation is seen, those inside kernels and of saved tensors included; freeing what is older than the call
    does not count, so gradients must be gone beforehand.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(number)
    result = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]"]
    level = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        level += size
        peak = max(peak, level)
    return peak


def held(model: nn.Module, optimizer: torch.optim.Optimizer, others: Sequence[nn.Module] = ()) -> int:
    """Bytes that stay between steps: weights, optimizer state, further models."""
    tensors = [*model.parameters(), *(p for other in others for p in other.parameters())]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class VocabularyBytes(TorchDispatchMode):
    """Peak bytes of live tensors along the vocabulary: those with an axis of its length, or of a tile's length.

    Weights and tensors of a weight's shape (gradients, whoever computes them) are left out, since both sides of a
    comparison have them. A storage counts once, whatever views there are of it.

    Args:
        axes: Lengths that count as a vocabulary axis: the vocabulary, and the tiles that it may be cut into.
        model: Whose weights are left out.
    """

    def __init__(self, axes: set[int], model: nn.Module) -> None:
        super().__init__()
        self.axes, self.live, self.peak = axes, 0, 0
        wide = [p for p in model.parameters() if p.ndim == 2]
        self.shapes = {tuple(p.shape) for p in wide} | {tuple(reversed(p.shape)) for p in wide}
        self.known: dict[int, weakref.ref] = {}
        for p in wide:
            self._watch(p.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and self.axes & set(leaf.shape):
                storage = leaf.untyped_storage()
                self._watch(storage, 0 if tuple(leaf.shape) in self.shapes else storage.nbytes())
        return out

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known and self.known[key]() is not None:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
