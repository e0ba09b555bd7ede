"""Hooks that read a layer's vectors off a pass: each output, or each input once for all layers that share it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from excise.errors import InputRefused, UsageError
from excise.initialise.moments import Moments
from excise.initialise.streaming import Accumulator, all_reduce


def adapted_linears(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers that an adapter changes, ``{module path: layer without its adapter}``.

    Args:
        model: With a LoRA adapter named "default", or any model where ``names`` are given.
        names: Module paths instead, of layers with or without an adapter.

    Raises:
        UsageError: A name that is no linear layer (`nn.Linear`, GPT-2's `Conv1D` or a quantised one).

    Example:
        >>> list(adapted_linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), ["0"]))
        ['0']
    """
    modules = dict(model.named_modules())
    if names is None:
        names = [path for path, m in modules.items() if "default" in (getattr(m, "lora_A", None) or {})]
    found = {}
    for name in names:
        module = modules.get(name)
        base = getattr(module, "base_layer", module)
        if base is None or not (hasattr(base, "out_features") or hasattr(base, "nf")):
            raise UsageError(f"{name}: not a linear layer of this model")
        found[name] = cast(nn.Module, base)
    return found


def widths(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    module = cast(Any, linear)
    return (module.nf, module.nx) if hasattr(module, "nf") else (module.out_features, module.in_features)


def matrix_of(linear: nn.Module) -> Tensor:
    """``[out, in]`` the weight of a linear layer as it is stored, GPT-2's `Conv1D` transposed (a view)."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if hasattr(linear, "nf") else weight


@dataclass(frozen=True)
class Reading:
    """How the vectors of one batch are read off a layer's values."""

    rows: Tensor
    count: int
    pooling: str
    wide: bool = False

    def vectors(self, values: Tensor, name: str) -> Tensor:
        """``[n, d]`` of a layer's ``[b, W, d]``."""
        flat = values.detach().reshape(-1, values.shape[-1])
        if len(flat) != self.rows.numel():
            raise InputRefused(f"{name}: sees {len(flat)} of {self.rows.numel()} positions; only layers that see all")
        owner = self.rows.reshape(-1)
        where = (owner >= 0).nonzero().squeeze(1)
        kept, owner = flat[where], owner[where]
        if self.pooling == "token":
            return kept.float()
        total = torch.zeros(self.count, kept.shape[1], dtype=torch.float64, device=kept.device)
        total.index_add_(0, owner, kept.double())
        sizes = torch.bincount(owner, minlength=self.count)
        total, sizes = total[sizes > 0], sizes[sizes > 0]
        total = total / sizes[:, None] if self.pooling == "row" else total
        return total if self.wide else total.float()


def _finished(streams: Mapping[str, Accumulator]) -> dict[str, Moments]:
    all_reduce(streams)
    out = {}
    for name, stream in streams.items():
        try:
            out[name] = stream.finish()
        except InputRefused as error:
            raise InputRefused(f"{name}: {error}") from None
    return out


class Outputs:
    """Takes the moments of each layer's output."""

    reading: Reading

    def __init__(self, linears: Mapping[str, nn.Module], device: torch.device) -> None:
        self.linears = linears
        self.streams = {name: Accumulator(widths(m)[0], device=device) for name, m in linears.items()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks, for as long as this lasts."""
        handles = [m.register_forward_hook(self._hook(name)) for name, m in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            self.streams[name].update(self.reading.vectors(out, name))

        return hook

    def finish(self) -> dict[str, Moments]:
        """Moments of all ranks."""
        return _finished(self.streams)


class Entering:
    """Takes the moments of each layer's input."""

    reading: Reading

    def __init__(self, linears: Mapping[str, nn.Module], device: torch.device) -> None:
        self.linears = linears
        self.streams = {name: Accumulator(widths(m)[1], device=device) for name, m in linears.items()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks, for as long as this lasts."""
        with _hooked(self.linears, lambda name, x: self.streams[name].update(self.reading.vectors(x, name))):
            yield

    def finish(self) -> dict[str, Moments]:
        """Moments of all ranks."""
        return _finished(self.streams)


class Inputs:
    """Takes the moments of each group's input once, a constant 1 beside it, and derives those of the outputs."""

    reading: Reading

    def __init__(self, linears: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], device: torch.device) -> None:
        self.linears, self.groups = linears, groups
        for name in (name for group in groups for name in group):
            if tuple(matrix_of(linears[name]).shape) != widths(linears[name]):
                raise UsageError(f"{name}: its weight is stored compressed: take statistics of the output side")
        self.streams = {g[0]: Accumulator(widths(linears[g[0]])[1] + 1, device=device) for g in groups}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks, for as long as this lasts."""
        with _hooked({name: self.linears[name] for name in self.streams}, self._take):
            yield

    def _take(self, name: str, x: Tensor) -> None:
        self.streams[name].update(self.reading.vectors(torch.cat((x, torch.ones_like(x[..., :1])), -1), name))

    def finish(self) -> dict[str, Moments]:
        """Moments of all ranks."""
        seen = _finished(self.streams)
        return {name: seen[group[0]].through(_affine(self.linears[name])) for group in self.groups for name in group}


@contextlib.contextmanager
def _hooked(linears: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every layer's input to ``take(name, input)``."""

    def hook(name: str) -> Callable:
        return lambda _module, args: take(name, args[0])

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing(linears: Mapping[str, nn.Module], probe: Callable[[], object]) -> list[list[str]]:
    """Groups of layers that are handed the very same tensor in a pass, as ``probe()`` makes one; each in order."""
    groups: dict[str, list[str]] = {}
    seen: dict[str, weakref.ref[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        leader = next((other for other, held in seen.items() if held() is x), name)
        seen.setdefault(name, weakref.ref(x))
        groups.setdefault(leader, []).append(name)

    with _hooked(linears, note):
        probe()
    reached = {name for group in groups.values() for name in group}
    return [*groups.values(), *([name] for name in linears if name not in reached)]


def _affine(linear: nn.Module) -> Tensor:
    """``[out, in + 1]`` fp64: the weight, and the bias as a last column."""
    matrix = matrix_of(linear).double()
    bias = cast(Tensor | None, getattr(linear, "bias", None))
    last = matrix.new_zeros(len(matrix)) if bias is None else bias.detach().double()
    return torch.cat((matrix, last[:, None]), 1)
