"""The rows of a side as batches, and how likely a model finds each answer: what attacks on weights are measured by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excise.attacks.outcome import Outcome
from excise.errors import NotShown
from excise.forward import Anatomy, Batch, Pass, chunked, label_logp, run_pass
from excise.records import Record
from excise.tasks import causal_lm

Precision = Callable[[], AbstractContextManager]
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Answers:
    """Encoded rows of one side on a model's device."""

    examples: Sequence[causal_lm.Example]
    pad_id: int
    device: torch.device

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: Any,
        records: Sequence[Record],
        encoding: causal_lm.Encoding,
        source: str = "forget",
    ) -> Answers:
        """Encode rows.

        Raises:
            InputRefused: A row that does not fit; ``source`` is its side's name in the message.
        """
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        made = causal_lm.encode_records(records, tokenizer, encoding, source=source)
        return Answers(made, pad_id, next(model.parameters()).device)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows by number, as tensors."""
        made = causal_lm.collate([self.examples[i] for i in rows], pad_id=self.pad_id)
        return Batch(made["input_ids"], made["attention_mask"], made["label_mask"], tuple(rows)).to(self.device)

    def batches(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Rows in batches of ``size``, those of like length together."""
        ordered = sorted(rows, key=lambda i: len(self.examples[i].input_ids))
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def probability(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        rows: Sequence[int] | None = None,
        *,
        precision: Precision = nullcontext,
        size: int = 32,
    ) -> NDArray[np.float64]:
        """``[rows]`` exp(mean log p) of each answer, end of sequence included, in the order of ``rows`` (default all).

        Source: TOFU, 2401.06121, section 2.2.1.
        """
        rows = range(len(self)) if rows is None else rows
        found: dict[int, float] = {}
        with torch.no_grad(), precision():
            for part in self.batches(rows, size):
                logp = _row_logp(model, anatomy, self.batch(part))
                found |= zip(part, logp.double().exp().tolist(), strict=True)
        return np.array([found[i] for i in rows], np.float64)


def nll(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    """Mean negative log-likelihood per label of a batch, with a gradient: what an attacker trains."""
    return -_token_logp(model, anatomy, batch).mean()


def _token_logp(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    states = run_pass(model, anatomy, batch, Pass(head=True)).at_labels
    assert states is not None
    targets = batch.targets()

    def part(start: int, stop: int) -> Tensor:
        return label_logp(anatomy.logits(states[start:stop]), targets[start:stop])

    return chunked(part, len(targets), anatomy.vocabulary, grad=torch.is_grad_enabled())


def _row_logp(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    """``[B]`` mean log-probability per label token."""
    logp, (rows, _) = _token_logp(model, anatomy, batch), batch.positions()
    sums = torch.zeros(len(batch.label_mask), dtype=logp.dtype, device=logp.device).index_add_(0, rows, logp)
    return sums / batch.label_mask.sum(1)


def kept_side(records: Mapping[str, Sequence[Record]]) -> str | None:
    """The side that answers for what should stay: ``untouched`` where there is one, else ``retain``, else none."""
    return next((side for side in ("untouched", "retain") if records.get(side)), None)


@dataclass(frozen=True)
class Gauge:
    """What an attack is measured by: the forget rows that it aims at, and the first kept rows, which it may cost."""

    sides: Mapping[str, Answers]
    rows: Mapping[str, Sequence[int]]
    precision: Precision = nullcontext

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: Any,
        records: Mapping[str, Sequence[Record]],
        encoding: causal_lm.Encoding,
        *,
        held: Sequence[int] | None = None,
        kept: int = 64,
        precision: Precision = nullcontext,
    ) -> Gauge:
        """Rows of a measured model.

        Args:
            model: On whose device batches are put.
            tokenizer: Its tokenizer.
            records: Rows by side; "forget" is needed.
            encoding: How text becomes tokens.
            held: Forget rows that are measured, by number; default all.
            kept: Kept rows that are measured, the first ones; 0: none.
            precision: Makes the context of a pass.

        Raises:
            NotShown: There are no forget rows.
        """
        if not records.get("forget"):
            raise NotShown("an attack needs forget rows: there are none")
        sides = {"forget": Answers.of(model, tokenizer, records["forget"], encoding)}
        rows: dict[str, Sequence[int]] = {"forget": range(len(sides["forget"])) if held is None else list(held)}
        side = kept_side(records)
        if side and kept:
            sides["retain"] = Answers.of(model, tokenizer, records[side][:kept], encoding, side)
            rows["retain"] = range(len(sides["retain"]))
        return Gauge(sides, rows, precision)

    def read(self, model: nn.Module, anatomy: Anatomy) -> dict[str, NDArray[np.float64]]:
        """Side -> ``[n]`` probability of each measured row."""
        return {
            side: own.probability(model, anatomy, self.rows[side], precision=self.precision)
            for side, own in self.sides.items()
        }

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
