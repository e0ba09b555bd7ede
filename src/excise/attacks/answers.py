"""The rows of a side as batches, and how likely a model finds each answer: what attacks on weights are measured by."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.errors import NotShown
from excise.forward import Batch, Pass, chunked, label_logp, run_pass
from excise.tasks import causal_lm


@dataclass(frozen=True)
class Answers:
    """Rows of one side, encoded for the model that is asked."""

    target: Target
    examples: Sequence[causal_lm.Example]

    @staticmethod
    def of(target: Target, side: str = "forget", most: int | None = None) -> Answers:
        """Encode the rows of a side, or the first ``most`` of them.

        Raises:
            InputRefused: A row that does not fit; the message names its side.
        """
        rows = target.records[side][:most]
        return Answers(target, causal_lm.encode_records(rows, target.tokenizer, target.encoding, source=side))

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows by number, as tensors on the model's device."""
        made = causal_lm.collate([self.examples[i] for i in rows], pad_id=self.target.pad_id)
        return Batch(made["input_ids"], made["attention_mask"], made["label_mask"], tuple(rows)).to(self.target.device)

    def batches(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Rows in batches of ``size``, those of like length together."""
        ordered = sorted(rows, key=lambda i: len(self.examples[i].input_ids))
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def probability(self, rows: Sequence[int], size: int = 32) -> NDArray[np.float64]:
        """``[rows]`` exp(mean log p) of each answer, end of sequence included, in the order of ``rows``.

        Source: TOFU, 2401.06121, section 2.2.1.
        """
        found: dict[int, float] = {}
        with torch.no_grad(), self.target.precision():
            for part in self.batches(rows, size):
                logp = _row_logp(self.target, self.batch(part))
                found |= zip(part, logp.double().exp().tolist(), strict=True)
        return np.array([found[i] for i in rows], np.float64)


def nll(target: Target, batch: Batch) -> Tensor:
    """Mean negative log-likelihood per label of a batch, with a gradient: what an attacker trains."""
    return -_token_logp(target, batch).mean()


def _token_logp(target: Target, batch: Batch) -> Tensor:
    anatomy, labels = target.anatomy, batch.targets()
    states = run_pass(target.model, anatomy, batch, Pass(head=True)).at_labels
    assert states is not None

    def part(start: int, stop: int) -> Tensor:
        return label_logp(anatomy.logits(states[start:stop]), labels[start:stop])

    return chunked(part, len(labels), anatomy.vocabulary, grad=torch.is_grad_enabled())


def _row_logp(target: Target, batch: Batch) -> Tensor:
    """``[B]`` mean log-probability per label token."""
    logp, (rows, _) = _token_logp(target, batch), batch.positions()
    sums = torch.zeros(len(batch.label_mask), dtype=logp.dtype, device=logp.device).index_add_(0, rows, logp)
    return sums / batch.label_mask.sum(1)


@dataclass(frozen=True)
class Gauge:
    """What an attack is measured by: the forget rows that it aims at, and the first kept rows, which it may cost."""

    sides: Mapping[str, Answers]
    rows: Mapping[str, Sequence[int]]

    @staticmethod
    def of(target: Target, *, held: Sequence[int] | None = None, kept: int = 64) -> Gauge:
        """Rows of a target.

        Args:
            target: Its "forget" is needed.
            held: Forget rows that are measured, by number; default all.
            kept: Kept rows that are measured, the first ones; 0: none.

        Raises:
            NotShown: There are no forget rows.
        """
        if not target.forget:
            raise NotShown("an attack needs forget rows: there are none")
        sides = {"forget": Answers.of(target)}
        rows: dict[str, Sequence[int]] = {"forget": range(len(sides["forget"])) if held is None else list(held)}
        side = target.kept_side
        if side and kept:
            sides["retain"] = Answers.of(target, side, kept)
            rows["retain"] = range(len(sides["retain"]))
        return Gauge(sides, rows)

    def read(self) -> dict[str, NDArray[np.float64]]:
        """Side -> ``[n]`` probability of each measured row, by the model as it is now."""
        return {side: own.probability(self.rows[side]) for side, own in self.sides.items()}

    def outcome(
        self,
        name: str,
        budget: str,
        budgets: Sequence[str],
        found: Sequence[Mapping[str, NDArray[np.float64]]],
        *,
        extra: Mapping[str, Any],
        started: float,
    ) -> Outcome:
        """What was read at each budget as an `Outcome`; NaN where the curve broke off. ``started``: `perf_counter`."""
        values = {side: np.full((len(budgets), len(numbers)), np.nan) for side, numbers in self.rows.items()}
        for place, own in enumerate(found):
            for side, block in values.items():
                block[place] = own[side]
        rows = {side: np.array(numbers, np.int64) for side, numbers in self.rows.items()}
        seconds = time.perf_counter() - started
        return Outcome(name, "probability", budget, tuple(budgets), values, rows, extra, seconds)
