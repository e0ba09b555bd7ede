"""The relearning attack on a classifier: half of the forgotten rows trained again, the other half measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from excise.attacks.target import Target
from excise.attacks.training import order, refuse, split, stepped
from excise.errors import InputRefused
from excise.forward import Batch
from excise.metrics import tagging
from excise.metrics.class_scores import score
from excise.tasks import TASKS

STEPS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ClassCurve:
    """A relearning curve of a classifier: at each step the probability of the right classes, and F1 (or accuracy)."""

    probability: list[float]
    f1: list[float]


def class_curve(
    target: Target,
    *,
    task: str,
    steps: Sequence[int] = STEPS,
    lr: float,
    batch_rows: int = 16,
    batch_tokens: int = 4096,
) -> ClassCurve:
    """`relearn.attack` on a classifier: half of the forgotten rows trained again, the other half measured.

    Trained is the mean negative log-likelihood of every label, as the model once was; measured are the labels of
    entities (all labels of a text classifier).

    Args:
        target: A token or sequence classifier, with two forget rows or more. Of its encoding the length counts.
        task: ``token_classification`` or ``sequence_classification``.
        steps: As in `relearn.attack`.
        lr: Learning rate.
        batch_rows: Rows in a step.
        batch_tokens: Most tokens of a batch that is measured.

    Returns:
        For each of ``steps`` the mean probability of the held-out labels, and the strict F1 of their entities (their
        accuracy where the classes are no tags); NaN from the step on at which the attack diverged.

    Raises:
        ValueError: Fewer than two rows, or steps that do not ascend.
    """
    model, tokenizer, encoding, records = target.model, target.tokenizer, target.encoding, target.forget
    refuse(len(records), steps)
    names = tagging.class_names(model)
    examples = TASKS[task].encode_records(records, tokenizer, encoding, names=names, source="forget")
    trained, held = split(target)

    def batch(rows: Sequence[int]) -> Batch:
        made = TASKS[task].collate([examples[i] for i in rows], pad_id=target.pad_id)
        return Batch(**made, indices=tuple(rows)).to(target.device)

    rest = {"forget": [records[i] for i in held]}
    main = "forget_f1" if task == "token_classification" else "forget_accuracy"

    def measured() -> tuple[float, float] | None:
        with target.precision():
            try:
                swept = tagging.sweep(
                    model, target.anatomy, tokenizer, rest, encoding, task=task, batch_tokens=batch_tokens
                )
            except InputRefused:  # scores that are not finite: the attack diverged
                return None
        values = score(swept.tables, resamples=1).values
        found = [values[name]["value"] if name in values else math.nan for name in ("forget_probability", main)]
        return (found[0], found[1]) if math.isfinite(found[0]) else None

    drawn = order(trained, batch_rows, target.seed)
    found = stepped(target, lambda: batch(next(drawn)), measured, steps, lr=lr)
    found += [(math.nan, math.nan)] * (len(steps) - len(found))
    return ClassCurve([value for value, _ in found], [value for _, value in found])
