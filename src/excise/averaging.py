"""The mean of a model's weights over its last few steps: lent to whoever looks, then taken back bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Where a checkpoint keeps the weights of the window.
FILE = "window.safetensors"


class Window:
    """The trained weights at the steps that were looked at, as far back as ``steps`` steps; held on the CPU.

    With ``steps`` 1 nothing is held and nothing is lent. A window of n holds up to n - 1 copies beside the model.

    Args:
        model: Whose trained parameters are averaged.
        steps: Length of the window, the present step included.

    Source: ours, as weight averaging: Polyak and Juditsky 1992; over checkpoints: Izmailov et al. 2018,
    arXiv 1803.05407.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> window, seen = Window(model, 2), []
        >>> for step in (1, 2, 5):
        ...     _ = nn.init.constant_(model.weight, step)
        ...     with window.mean(step):
        ...         seen.append(model.weight.item())
        >>> seen, model.weight.item()
        ([1.0, 1.5, 5.0], 5.0)
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        self.held: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def mean(self, step: int) -> Iterator[None]:
        """Take the present weights in as those after ``step``, and lend the model the mean while this lasts."""
        if self.steps == 1:
            yield
            return
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.held = {s: weights for s, weights in self.held.items() if step - self.steps < s < step}
        self.held[step] = {name: p.detach().cpu().clone() for name, p in own.items()}
        try:
            if len(self.held) > 1:
                self._give({name: self._mean(name) for name in own})
            yield
        finally:
            self._give(self.held[step])

    def _mean(self, name: str) -> Tensor:
        # In the order of steps and in fp64: the same on every rank, whatever was loaded and what was taken.
        values = [self.held[s][name] for s in sorted(self.held)]
        return (torch.stack(values).double().sum(0) / len(values)).to(values[0].dtype)

    @torch.no_grad()
    def _give(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if name in weights:
                p.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the window into a checkpoint; nothing where it is empty."""
        if self.held:
            save_file(
                {
                    f"{step}/{name}": x.contiguous()
                    for step, weights in self.held.items()
                    for name, x in weights.items()
                },
                folder / FILE,
            )

    def load(self, folder: Path) -> None:
        """Hold what a checkpoint held."""
        self.held = {}
        if (folder / FILE).is_file():
            for key, value in load_file(folder / FILE).items():
                step, name = key.split("/", 1)
                self.held.setdefault(int(step), {})[name] = value
