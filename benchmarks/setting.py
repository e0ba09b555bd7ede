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
from excise.forward.vocabulary import tiles
from excise.objectives import clreg
from excise.objectives.forget import npo, simnpo
from excise.objectives.forget_distil import NEVER_SAW, distil, likelihood
from excise.objectives.retain import nll
from excise.objectives.term import Term
from excise.schedule import Plan
from excise.tasks import causal_lm

BATCH, LAYERS, WIDTH, HEADS = 16, 4, 256, 4
LEARNING_RATE = 1e-4

# Tokens before the answer and in it (end of sequence included) of rows of TOFU, drawn at random from its 4,000 under a
# byte-level BPE of 4,096 tokens trained on them. The first half is the forget side.
LENGTHS = (
    (23, 51), (14, 42), (18, 39), (21, 57), (16, 46), (23, 37), (32, 55), (10, 23), (17, 36), (17, 33), (16, 65),
    (8, 13), (10, 27), (17, 20), (15, 32), (21, 67), (32, 30), (12, 50), (24, 43), (17, 22), (13, 37), (12, 59),
    (15, 65), (24, 73), (16, 26), (18, 36), (15, 22), (17, 36), (19, 53), (13, 39), (12, 45), (25, 49), (22, 41),
    (12, 17), (11, 32), (25, 58), (15, 35), (13, 32), (16, 24), (18, 40), (28, 70), (18, 42), (23, 53), (13, 17),
    (19, 32), (14, 30), (13, 43), (12, 44), (17, 46), (20, 56), (15, 30), (10, 10), (40, 50), (23, 61), (14, 50),
    (14, 39), (15, 58), (12, 20), (22, 46), (15, 46), (21, 42), (14, 32), (11, 25), (17, 40),
)  # fmt: skip
ROWS = len(LENGTHS) // 2


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
    """Rows of both sides as random tokens of pinned `LENGTHS`: the cost of a step depends on nothing else."""

    sides: dict[str, list[causal_lm.Example]]

    @staticmethod
    def drawn(vocabulary: int, times: int = 1) -> Rows:
        """The same lengths for every vocabulary, ``times`` over with other tokens."""
        sides = {}
        for number, side in enumerate(("forget", "retain")):
            draw = np.random.default_rng([7, number])
            own = LENGTHS[number * ROWS : (number + 1) * ROWS] * times
            sides[side] = [causal_lm.Example(tuple(draw.integers(3, vocabulary, q + a).tolist()), q) for q, a in own]
        return Rows(sides)

    def collate(self, side: str, indices: Sequence[int]) -> Batch:
        """A right-padded batch."""
        made = causal_lm.collate([self.sides[side][i] for i in indices], pad_id=0)
        return Batch(made["input_ids"], made["attention_mask"], made["label_mask"], tuple(indices))

    def told(self, vocabulary: int) -> dict[str, Any]:
        """What strangers say of the forget rows."""
        return {NEVER_SAW: told([row.labels for row in self.sides["forget"]], vocabulary)}


def plain() -> list[Term]:
    """The plain step: cross-entropy on the same forget and retain rows."""
    return [replace(nll("forget"), name="nll_forget"), nll()]


OBJECTIVES: dict[str, list[Term]] = {
    "plain": plain(),
    "npo": [npo(), nll()],
    "simnpo": [simnpo(), nll()],
    "simnpo+clreg": [simnpo(), nll(), clreg()],
    "npo+clreg": [npo(), nll(), clreg()],
    "strangers": [distil(), likelihood(), nll()],
}
#: Tokens that are told apart in what a stranger says, as `excise.commands.matching` keeps them.
KEPT = 128


def told(lengths: Sequence[int], classes: int) -> dict[str, torch.Tensor]:
    """What was said of every label of rows with so many labels: of all classes, or of `KEPT` and of the others."""
    draw, total, kept = np.random.default_rng(13), sum(lengths), min(KEPT, classes)
    first = torch.from_numpy(draw.integers(0, classes, (total, 1)))
    found = torch.from_numpy(draw.normal(size=(total, kept + (kept < classes)))).float()
    return {
        "classes": ((first + (classes // kept) * torch.arange(kept)) % classes).int(),
        "logp": found.log_softmax(-1),
        "label": torch.zeros(total, dtype=torch.int64),
        "starts": torch.tensor([0, *lengths]).cumsum(0)[:-1],
    }


class EngineStep:
    """One optimizer step of `excise.train.UnlearnTrainer`, called by number instead of by its loop.

    Everything that the loop does in a step is in it: terms, monitors, the checks for finite losses and gradients,
    clipping, the optimizer. Batches are made beforehand, for the engine as for what it is compared with.
    """

    def __init__(
        self,
        base: nn.Module,
        rows: Any,
        objective: str | list[Term],
        *,
        precision: str = "fp32",
        constants: dict[str, Any] | None = None,
    ) -> None:
        self.model = copy.deepcopy(base)
        terms = OBJECTIVES[objective] if isinstance(objective, str) else objective
        counts = {side: len(own) for side, own in rows.sides.items()}
        settings = recipe.build(
            {
                "schedule": {"steps": counts["forget"] // BATCH, "forget_batch": BATCH, "retain_batch": BATCH},
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
            self.model,
            terms,
            plan,
            rows.collate,
            settings,
            folder,
            reference=stored,
            precision=precision,
            constants=constants,
        )
        self.optimizer = self.trainer.create_optimizer()
        wrapped, self.optimizer = self.trainer.accelerator.prepare(self.model, self.optimizer)
        self.wrapped: nn.Module = wrapped
        self.trainer.optimizer = self.optimizer
        self.windows: list[Any] = []
        loader = iter(self.trainer.get_train_dataloader())
        for _ in range(plan.micro_steps):
            self.windows += self.trainer.get_batch_samples(loader, 1, torch.device("cpu"))[0]

    @property
    def batches(self) -> list[dict[str, Batch]]:
        """The pinned batches, for what the engine is compared with."""
        return [window["sides"] for window in self.windows]

    @property
    def vocabulary_axes(self) -> set[int]:
        """Lengths of the vocabulary and of the tiles that this step cuts it into."""
        matrix = self.model.get_output_embeddings().weight  # type: ignore[operator]
        counts = [int(batch.label_mask.sum()) for window in self.batches for batch in window.values()]
        return {len(matrix)} | {stop - start for n in counts for start, stop in tiles(n, matrix)}

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
