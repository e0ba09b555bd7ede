"""How weights move: AdamW, Muon for hidden matrices with AdamW for the rest, and the learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from excise import recipe
from excise.shaped import Shape, Shaped


class Pair(torch.optim.Optimizer):
    """Several optimizers as one, for training loops that know a single optimizer and one learning-rate schedule.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> pair = Pair(torch.optim.SGD([layer.weight], lr=1.0), torch.optim.SGD([layer.bias], lr=0.1))
        >>> [group["lr"] for group in pair.param_groups]
        [1.0, 0.1]
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One step of every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the parts' states and share their groups again."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def optimizer(
    model: nn.Module, settings: recipe.Optimiser, shapes: Mapping[str, Shape] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a run over the parameters that require a gradient.

    Weight decay touches matrices only, and with ``shapes`` (parameter's name -> shape of its update) only those that
    have one, which it pulls back to their start. Muon (Jordan et al. 2024) takes the hidden matrices; embeddings, head
    and vectors go to AdamW at ``adamw_lr`` (default: the same rate).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if shapes:
        ours = [(p, shapes[name]) for name, p in named if name in shapes]
        rest = [p for name, p in named if name not in shapes]
        return Shaped(
            [p for p, _ in ours], [s for _, s in ours], rest,
            lr=settings.lr, betas=_betas(settings), weight_decay=settings.weight_decay,
        )  # fmt: skip
    if settings.name == "adamw":
        return _adamw([p for _, p in named], settings.lr, settings)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    matrices = [p for _, p in named if p.ndim == 2 and id(p) not in tables]
    rest = [p for _, p in named if p.ndim != 2 or id(p) in tables]
    parts: list[torch.optim.Optimizer] = []  # an adapter has matrices only, and no optimizer takes nothing
    if matrices:
        _orthogonalise_fast()
        parts.append(torch.optim.Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay))
    if rest:
        parts.append(_adamw(rest, settings.adamw_lr or settings.lr, settings))
    return Pair(*parts)


def shape(made: torch.optim.Optimizer) -> None:
    """Turn gradients of shaped weights into those of what is moved, before they are clipped; nothing for others."""
    inner = getattr(made, "optimizer", made)  # accelerate wraps it
    if isinstance(inner, Shaped):
        inner.shape()


def _betas(settings: recipe.Optimiser) -> tuple[float, float]:
    first, second = settings.betas
    return first, second


def _adamw(parameters: list[nn.Parameter], lr: float, settings: recipe.Optimiser) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=_betas(settings), fused=True)


def rate(step: int, steps: int, settings: recipe.Optimiser) -> float:
    """Share of the full learning rate at ``step`` of ``steps``.

    Example:
        >>> settings = recipe.Optimiser(warmup=0.1, decay="linear")
        >>> [round(rate(s, 100, settings), 2) for s in (0, 10, 55)]
        [0.1, 1.0, 0.5]
        >>> [round(rate(s, 100, recipe.Optimiser(warmup=0, floor=0.1, tail=0.2)), 3) for s in (40, 79, 80, 99)]
        [0.55, 0.111, 0.1, 0.1]
    """
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, round((1 - settings.tail) * steps) - warm))
    if settings.decay == "constant":
        return 1.0
    shape = 1 - done if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.floor + (1 - settings.floor) * max(0.0, shape)


def _orthogonalise_fast() -> None:
    """Let Muon orthogonalise in fp32 where a CPU has no bf16 of its own: emulated it is tens of times slower."""
    flags = torch.backends.cpu.get_cpu_capability(), torch.cuda.is_available()
    if flags[0] == "AVX2" and not flags[1]:
        setattr(torch.optim._muon, "_zeropower_via_newtonschulz", _orthogonal)  # noqa: B010 - private to torch


def _orthogonal(grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Newton-Schulz iterations towards the orthogonal factor (Jordan et al. 2024), in the gradient's precision."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x
