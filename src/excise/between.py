"""The weights between two moments of a run: any mix of them lent to whoever looks, then taken back bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Where a checkpoint keeps the weights that a stretch begins with.
FILE = "between.safetensors"


class Stretch:
    """From the trained weights as they were when it was begun to the present ones; one copy is held on the CPU.

    A few steps of training are short beside what they change: along the straight line between their ends a statistic
    moves from one end's value to the other's, and a mix of both is as good a model as they are (it is looked at before
    it is believed).

    Args:
        model: Whose trained parameters are mixed.

    Source: ours, as a search along a line; that such lines cross no barrier: Frankle et al. 2020, arXiv 1912.05671.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> stretch, _ = Stretch(model), nn.init.constant_(model.weight, 1.0)
        >>> stretch.begin()
        >>> _ = nn.init.constant_(model.weight, 5.0)
        >>> with stretch.walked() as go:
        ...     go(0.25)
        ...     print(model.weight.item())
        2.0
        >>> model.weight.item()
        5.0
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Hold the present weights as its start."""
        self.start = self._present()

    @contextmanager
    def walked(self) -> Iterator[Callable[[float], None]]:
        """A function that gives the model the mix at a share of the way; when this ends, the present weights again."""
        end = self._present()
        try:
            yield lambda share: self._give({name: self._mixed(x, end[name], share) for name, x in self.start.items()})
        finally:
            self._give(end)

    @staticmethod
    def _mixed(start: Tensor, end: Tensor, share: float) -> Tensor:
        return start.double().lerp(end.double(), share).to(end.dtype)  # in fp64: the same on every rank

    def _present(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _give(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if name in weights:
                p.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write its start into a checkpoint; nothing where it was not begun."""
        if self.start:
            save_file({name: x.contiguous() for name, x in self.start.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Begin where a checkpoint's stretch began."""
        self.start = load_file(folder / FILE) if (folder / FILE).is_file() else {}
