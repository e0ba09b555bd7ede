"""What the starts of an adapter cost: the decomposition for one layer, and a start of a model beside an epoch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from excise import recipe
from excise.commands.starting.gathering import Taker
from excise.forward import Batch
from excise.initialise import apply
from excise.initialise.starts import STARTS, Factors, from_directions
from excise.subspace import top_directions
from setting import BATCH, EngineStep, Rows, model

RANK, SCALE, TOKENS, PLANTED = 16, 2.0, 5000, 8


def contrast(width: int) -> Tensor:
    """``[width, width]`` fp32 Cov_D of made-up outputs: variances fall as 1/i, eight directions are of one side."""
    generator = torch.Generator().manual_seed(width)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mirror = torch.nn.functional.normalize(drawn(width), dim=0)
    planted = torch.nn.functional.normalize(drawn(PLANTED, width), dim=1)
    covariances = []
    for strength in (0.5, 0.0):
        rows = drawn(TOKENS, width) * torch.arange(1, width + 1).float().rsqrt()
        rows = rows - 2 * (rows @ mirror)[:, None] * mirror + strength * drawn(TOKENS, PLANTED) @ planted
        covariances.append(rows.T @ rows / TOKENS)
    return (covariances[0] - covariances[1]) / 2


class Layer:
    """One layer of a width, its contrast given: factors by either decomposition."""

    def __init__(self, width: int) -> None:
        self.contrast, self.width = contrast(width), width
        self.weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5

    def krylov(self, _: int = 0) -> Factors:
        """The leading directions alone."""
        return from_directions(self.weight, top_directions(self.contrast, self.width, RANK).vectors, SCALE)

    def eigh(self, _: int = 0) -> Factors:
        """The whole decomposition, of which the last columns are kept."""
        return from_directions(self.weight, torch.linalg.eigh(self.contrast).eigenvectors[:, -RANK:], SCALE)

    def trace(self, made: Factors) -> float:
        """What the directions capture of the contrast: tr(Q' C Q)."""
        q = made.B.double()
        return float((q * (self.contrast.double() @ q)).sum())


class Beginning:
    """A small Llama with an adapter on all linear layers, its rows, and what a run may do with them."""

    def __init__(self, times: int) -> None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model(4096), settings)
        self.drawn = Rows.drawn(4096, times)
        self.examples = self.drawn.sides
        self.layers = apply.layers(self.model)

    def batch(self, side: str, indices: Sequence[int]) -> Batch:
        """A batch of a side, as a run's rows give it."""
        return self.drawn.collate(side, list(indices))

    def epoch(self) -> Any:
        """Training on every row once: forget and retain, forward and backward passes and optimizer steps."""
        engine = EngineStep(copy.deepcopy(self.model), self.drawn, "plain")
        return lambda _: [engine(number) for number in range(len(self.examples["forget"]) // BATCH)]

    def start(self, name: str, **statistics: Any) -> Any:
        """A start as a run makes it: statistics of both sides and the factors of every layer; nothing is cached."""
        made = STARTS[name]()
        settings = recipe.build({"statistics": statistics}).statistics
        taker = Taker(self.model, self, settings, "fp32", nullcontext, "")  # type: ignore[arg-type]

        def go(_: int) -> dict[str, Factors]:
            taken = {key: taker.take(wanted, list(self.layers)) for key, wanted in made.needs.items()}
            return {
                name: made.fn(  # type: ignore[misc]
                    apply.weight_of(layer), RANK, SCALE, **{key: values[name] for key, values in taken.items()}
                )
                for name, layer in self.layers.items()
            }

        return go
