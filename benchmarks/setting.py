"""What is timed: a small Llama, rows as long as TOFU's, and one optimizer step of the engine on pinned batches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from excise import recipe, reference, train
from excise.forward import REFERENCE, Anatomy, Batch
from excise.objectives import clreg
from excise.objectives.forget import npo, simnpo
from excise.objectives.retain import nll
from excise.objectives.term import Term
from excise.schedule import Plan
from excise.tasks import causal_lm

ROWS, BATCH, LAYERS, WIDTH, HEADS = 32, 16, 4, 256, 4
LEARNING_RATE = 1e-4


def model(vocabulary: int, *, width: int = WIDTH, layers: int = LAYERS, attention: str = "sdpa") -> LlamaForCausalLM:
    """A Llama with fresh weights; the cost of a step does not depend on what it has learned."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=688 * width // 256, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Rows:
    """Rows of both sides as token sequences; their lengths follow those of TOFU's 4,000 questions under 4,096 tokens.

    Measured there: 17.0 (standard deviation 5.8) tokens before the answer, 39.6 (15.6) in it.
    """

    sides: dict[str, list[causal_lm.Example]]

    @staticmethod
    def drawn(vocabulary: int, rows: int = ROWS) -> Rows:
        """The same lengths for every vocabulary."""
        sides = {}
        for number, side in enumerate(("forget", "retain")):
            draw = np.random.default_rng([7, number])
            asked = draw.normal(17.0, 5.8, rows).round().clip(7, 68).astype(int)
            told = draw.normal(39.6, 15.6, rows).round().clip(6, 137).astype(int)
            sides[side] = [
                causal_lm.Example(tuple(draw.integers(3, vocabulary, q + a).tolist()), int(q))
                for q, a in zip(asked, told, strict=True)
            ]
        return Rows(sides)

    def collate(self, side: str, indices: Sequence[int]) -> Batch:
        """A right-padded batch."""
        made = causal_lm.collate([self.sides[side][i] for i in indices], pad_id=0)
        return Batch(made["input_ids"], made["attention_mask"], made["label_mask"], tuple(indices))


def plain() -> list[Term]:
    """The plain step: cross-entropy on the same forget and retain rows."""
    return [replace(nll("forget"), name="nll_forget"), nll()]


OBJECTIVES: dict[str, list[Term]] = {
    "plain": plain(),
    "npo": [npo(), nll()],
    "simnpo": [simnpo(), nll()],
    "simnpo+clreg": [simnpo(), nll(), clreg()],
    "npo+clreg": [npo(), nll(), clreg()],
}


class EngineStep:
    """One optimizer step of `excise.train.UnlearnTrainer`, called by number instead of by its loop.

    Everything that the loop does in a step is in it: terms, monitors, the checks for finite losses and gradients,
    clipping, the optimizer. Batches are made beforehand, for the engine as for what it is compared with.
    """

    def __init__(self, base: nn.Module, rows: Rows, objective: str, *, precision: str = "fp32") -> None:
        self.model = copy.deepcopy(base)
        terms, counts = OBJECTIVES[objective], {side: len(own) for side, own in rows.sides.items()}
        settings = recipe.build(
            {
                "schedule": {"steps": ROWS // BATCH, "forget_batch": BATCH, "retain_batch": BATCH},
                "optimiser": {"lr": LEARNING_RATE, "warmup": 0.0},
            }
        )
        anatomy = Anatomy.of(self.model)
        needs = [p for term in terms for p in term.needs() if p.model == REFERENCE]
        context: partial[AbstractContextManager] = partial(train.autocast, precision)
        stored = reference.store(self.model, anatomy, needs, counts, rows.collate, autocast=context)
        folder = Path(tempfile.gettempdir()) / "excise-bench"
        plan = Plan(counts, settings.schedule, seed=0)
        self.trainer = train.UnlearnTrainer(
            self.model, terms, plan, rows.collate, settings, folder, reference=stored, precision=precision
        )
        self.optimizer = self.trainer.create_optimizer()
        wrapped, self.optimizer = self.trainer.accelerator.prepare(self.model, self.optimizer)
        self.wrapped: nn.Module = wrapped
        self.trainer.optimizer = self.optimizer
        self.windows: list[Any] = []
        loader = iter(self.trainer.get_train_dataloader())
        for _ in range(plan.micro_steps):
            self.windows += self.trainer.get_batch_samples(loader, 1, torch.device("cpu"))[0]

    def gradient(self, number: int) -> float:
        """Forward and backward pass over batch ``number``; the loss."""
        window = self.windows[number % len(self.windows)]
        return float(self.trainer.training_step(self.wrapped, window))

    def __call__(self, number: int) -> float:
        """A whole step on batch ``number``."""
        loss = self.gradient(number)
        norm = self.trainer._clip_grad_norm(self.wrapped)
        self.trainer._get_grad_norm(self.wrapped, grad_norm=norm)
        self.optimizer.step()
        self.wrapped.zero_grad()
        self.trainer._window, self.trainer._monitor = {}, {}
        return loss
