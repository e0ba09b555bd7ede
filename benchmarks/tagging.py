"""What a tagger's step costs, DeepCUT's beside the plain one and that beside the naive one; sentences like WNUT17's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from excise.forward import Batch
from excise.objectives import deepcut
from excise.objectives.forget_distil import NEVER_SAW, distil
from excise.objectives.retain import nll
from excise.objectives.term import Term
from excise.tasks import class_maps
from excise.tasks.token_classification import ClassExample, collate
from setting import LEARNING_RATE, told

KINDS = ("person", "place", "group", "product", "work", "company")
NAMES = ("O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI"))
# Tokens of 32 training sentences of WNUT17, drawn at random once, under MiniLM-L6's tokenizer.
LENGTHS = (
    21, 28, 40, 6, 39, 17, 47, 43, 45, 25, 39, 23, 75, 26, 35, 30, 45, 14, 13, 58, 47, 36, 31, 52, 23, 25, 14, 35, 24,
    22, 37, 48,
)  # fmt: skip
#: Words for each token of theirs, and the share of words inside of entities.
WORDS, ENTITIES = 0.56, 0.06


def model() -> BertForTokenClassification:
    """Six blocks of width 384, fresh weights, dropout as BERT has it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        num_labels=len(NAMES),
    )  # fmt: skip
    return BertForTokenClassification(config)


@dataclass(frozen=True)
class Rows:
    """Random tokens of pinned lengths with random tags; the cost of a step depends on little else."""

    sides: dict[str, list[ClassExample]]

    @staticmethod
    def drawn() -> Rows:
        """Thirty-two sentences of each side."""
        sides = {}
        for number, side in enumerate(("forget", "retain")):
            draw = np.random.default_rng([11, number])
            sides[side] = [_sentence(length, draw) for length in draw.permutation(LENGTHS).tolist()]
        return Rows(sides)

    def collate(self, side: str, indices: Sequence[int]) -> Batch:
        """A right-padded batch."""
        made = collate([self.sides[side][i] for i in indices], pad_id=0)
        return Batch(**made, indices=tuple(indices))


def _sentence(length: int, draw: np.random.Generator) -> ClassExample:
    places = [i for i in range(1, length - 1) if draw.random() < WORDS] or [1]
    tags = [int(draw.integers(1, len(NAMES))) if draw.random() < ENTITIES else 0 for _ in places]
    return ClassExample(tuple(draw.integers(1000, 30000, length).tolist()), tuple(places), tuple(tags))


#: By name in the table.
OBJECTIVES: dict[str, list[Term]] = {
    "DeepCUT + NLL, two views": [deepcut(views=2), nll()],
    "DeepCUT + NLL, one view": [deepcut(views=1), nll()],
    "distil + NLL": [distil(), nll()],
}


def constants(rows: Rows) -> dict[str, Any]:
    """Which classes there are, and what was said of every label of the forget rows."""
    lengths = [row.labels for row in rows.sides["forget"]]
    return {**class_maps(NAMES, "token_classification"), NEVER_SAW: told(lengths, len(NAMES))}


class PaddedStep:
    """Cross-entropy as transformers computes it from labels: padded rows, one pass a side, the same optimizer."""

    def __init__(self, base: nn.Module, batches: Sequence[Mapping[str, Batch]]) -> None:
        self.model, self.batches = copy.deepcopy(base).train(), batches
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def __call__(self, number: int) -> None:
        """One step on batch ``number``."""
        losses = [
            self.model(input_ids=b.input_ids, attention_mask=b.attention_mask, labels=b.classes).loss
            for b in self.batches[number % len(self.batches)].values()
        ]
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
