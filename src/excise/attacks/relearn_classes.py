"""The relearning attack on a classifier: half of the forgotten rows trained again, the other half measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from excise.attacks.training import halves, order, refuse, stepped
from excise.errors import InputRefused
from excise.forward import Anatomy, Batch
from excise.metrics import tagging
from excise.metrics.class_scores import score
from excise.records import Record
from excise.tasks import TASKS, causal_lm

STEPS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ClassCurve:
    """A relearning curve of a classifier: at each step the probability of the right classes, and F1 (or accuracy)."""

    probability: list[float]
    f1: list[float]


def class_curve(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Sequence[Record],
    encoding: causal_lm.Encoding,
    *,
    task: str,
    steps: Sequence[int] = STEPS,
    lr: float,
    batch_rows: int = 16,
    batch_tokens: int = 4096,
    seed: int = 0,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> ClassCurve:
    """The attack of `relearn.curve` on a classifier: half of the forgotten rows trained again, the other half measured.

    Trained is the mean negative log-likelihood of every label, as the model once was; measured are the labels of
    entities (all labels of a text classifier).

    Args:
        model: A token or sequence classifier under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: The forget rows, at least two.
        encoding: Of which the length counts.
        task: ``token_classification`` or ``sequence_classification``.
        steps: As in `relearn.curve`.
        lr: Learning rate.
        batch_rows: Rows in a step.
        batch_tokens: Most tokens of a batch that is measured.
        seed: Of the split and of the order of rows.
        precision: Makes the context of a pass; measurements use it too.
        progress: Called with (steps done, all steps).

    Returns:
        For each of ``steps`` the mean probability of the held-out labels, and the strict F1 of their entities (their
        accuracy where the classes are no tags); NaN from the step on at which the attack diverged.

    Raises:
        ValueError: Fewer than two rows, or steps that do not ascend.
    """
    refuse(len(records), steps)
    names = tagging.class_names(model)
    examples = TASKS[task].encode_records(records, tokenizer, encoding, names=names, source="forget")
    trained, held = halves([r.group for r in records], seed)
    device = next(model.parameters()).device

    def batch(rows: Sequence[int]) -> Batch:
        made = TASKS[task].collate([examples[i] for i in rows], pad_id=tokenizer.pad_token_id)
        return Batch(**made, indices=tuple(rows)).to(device)

    rest = {"forget": [records[i] for i in held]}
    main = "forget_f1" if task == "token_classification" else "forget_accuracy"

    def measured() -> tuple[float, float] | None:
        with precision():
            try:
                swept = tagging.sweep(model, anatomy, tokenizer, rest, encoding, task=task, batch_tokens=batch_tokens)
            except InputRefused:  # scores that are not finite: the attack diverged
                return None
        values = score(swept.tables, resamples=1).values
        found = [values[name]["value"] if name in values else math.nan for name in ("forget_probability", main)]
        return (found[0], found[1]) if math.isfinite(found[0]) else None

    drawn = order(trained, batch_rows, seed)
    found = stepped(
        model, anatomy, lambda: batch(next(drawn)), measured, steps, lr=lr, precision=precision, progress=progress
    )
    found += [(math.nan, math.nan)] * (len(steps) - len(found))
    return ClassCurve([value for value, _ in found], [value for _, value in found])
