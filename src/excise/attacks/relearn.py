"""Relearning attacks: how soon forgotten answers come back under training, and how fast all of them are learned again.

After Hu et al. (2406.13356): a model that only hides what it knew finds it again faster than one that never knew it.
Run with the same settings on the unlearned model and on the gold; a curve alone says nothing. A low curve alone can
mislead too: a model may keep what it knew where half of the rows do not reach it, and give it back as soon as all rows
are trained. `savings` measures that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.attacks.answers import Answers, Gauge
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.attacks.training import order, refuse, split, stepped
from excise.errors import NotShown
from excise.records import Record

STEPS = (0, 1, 2, 4, 8, 16)
SAVINGS_STEPS = (0, 6, 12, 24)
#: Rate where nobody names one.
LR = 5e-4
#: Sides that stand for text of the same kind, the best first.
RELATED = ("related", "untouched", "retain", "never_seen")


def attack(
    target: Target,
    *,
    lr: float | None = None,
    steps: Sequence[int] = STEPS,
    batch_rows: int = 16,
    kept_rows: int = 64,
) -> Outcome:
    """Half of the forget rows trained again, the other half measured, row by row.

    AdamW at a constant rate, no decay, on the mean negative log-likelihood per label token, without dropout. What is
    trained: of a PEFT model the parameters that require a gradient (the attacker continues the adapter), of any other
    model, and of one whose adapter is frozen, all of them. Whatever happens, weights, gradients, ``requires_grad`` and
    training mode are afterwards what they were, bit for bit, and the global random state is not touched. Memory: one
    more copy of the trained parameters (on their device), their gradients and AdamW's two moments.

    The seed draws the split, by groups, and the order of rows; progress counts steps.

    Args:
        target: What is attacked, with two forget rows or more.
        lr: Learning rate; default 5e-4. A run passes that of its relearning curve.
        steps: Steps at which the curve is read, ascending; 0 is before the attack.
        batch_rows: Rows in a step.
        kept_rows: Kept rows that are measured: what the attack costs; 0 for none.

    Returns:
        ``values["forget"]``: ``[steps, held rows]``, NaN from where the attack diverged.

    Raises:
        ValueError: One forget row, or steps that do not ascend.
        NotShown: There are no forget rows.
    """
    had, held = split(target, steps)
    gauge = Gauge.of(target, held=held, kept=kept_rows)
    return _trained_on("relearn", gauge, gauge.sides["forget"], had, steps=steps, lr=lr, batch_rows=batch_rows)


def related(
    target: Target,
    *,
    lr: float | None = None,
    steps: Sequence[int] = STEPS,
    batch_rows: int = 16,
    kept_rows: int = 64,
    rows: str | None = None,
) -> Outcome:
    """Text of the same kind trained, no forget row among it; the forget rows of `attack`'s other half measured.

    Both attacks measure the same rows, so their curves can be held against each other. Source: Hu et al. 2406.13356
    (benign text); Lucki et al. 2409.18025 for text that has nothing to do with what was forgotten.

    Args:
        target: What is attacked, with two forget rows or more.
        lr: As in `attack`.
        steps: As in `attack`.
        batch_rows: As in `attack`.
        kept_rows: Kept rows that are measured; 0 for none. The attack may have trained on them.
        rows: The side that is trained on; default the first there is of ``related``, the kept rows, ``never_seen``.

    Raises:
        ValueError: One forget row, or steps that do not ascend.
        NotShown: No such rows.
    """
    _, held = split(target, steps)
    side = rows or next((s for s in RELATED if target.records.get(s)), "related")
    if side == "forget" or not target.records.get(side):
        raise NotShown(f"relearning on related text: there are no {side} rows to train on")
    gauge, text = Gauge.of(target, held=held, kept=kept_rows), Answers.of(target, side)
    made = _trained_on("related", gauge, text, range(len(text)), steps=steps, lr=lr, batch_rows=batch_rows)
    return replace(made, extra={**made.extra, "trained_side": side})


def savings(
    target: Target,
    *,
    lr: float | None = None,
    steps: Sequence[int] = SAVINGS_STEPS,
    batch_rows: int = 16,
    kept_rows: int = 0,
    control: bool = True,
) -> Outcome:
    """All forget rows trained again for a fixed number of steps, and measured themselves: memorisation savings.

    The last point against the gold's is the metric ``memorisation_savings``. Without a gold the control stands in: as
    many never-seen rows, trained and measured in the same way, show how fast this model learns what it never knew. The
    seed draws the order of rows; progress counts steps, the control's included.

    Args:
        target: What is attacked.
        lr: As in `attack`.
        steps: As in `attack`.
        batch_rows: As in `attack`.
        kept_rows: Kept rows that are measured; 0 for none.
        control: Whether to train never-seen rows too, where there are any.

    Returns:
        ``values["forget"]``, and with the control ``values["never_seen"]``: ``[steps, rows]``. ``extra["passes"]``:
        how often a row was trained, on average.

    Raises:
        ValueError: Steps that do not ascend.
        NotShown: There are no forget rows.

    Source:
        Ours; that what was learned once is learned faster is Ebbinghaus 1885.
    """
    refuse(2, steps)
    others = list(target.records.get("never_seen", ()))[: len(target.forget)] if control else []
    runs = 2 if others else 1

    def run(number: int, records: Mapping[str, Sequence[Record]]) -> Outcome:
        def tell(step: int, of: int) -> None:
            target.tell(number * of + step, runs * of)

        gauge = Gauge.of(replace(target, records=records, progress=tell), kept=kept_rows)
        text, rows = gauge.sides["forget"], gauge.rows["forget"]
        return _trained_on("savings", gauge, text, rows, steps=steps, lr=lr, batch_rows=batch_rows)

    made = run(0, target.records)
    if not others:
        return made
    beside = run(1, {"forget": others})
    return replace(
        made,
        values={**made.values, "never_seen": beside.values["forget"]},
        rows={**made.rows, "never_seen": beside.rows["forget"]},
        seconds=made.seconds + beside.seconds,
    )


def _trained_on(
    name: str,
    gauge: Gauge,
    text: Answers,
    rows: Sequence[int],
    *,
    steps: Sequence[int],
    lr: float | None,
    batch_rows: int,
) -> Outcome:
    """Train on rows of ``text`` and read the gauge at each of ``steps``."""
    started, rate, seed = time.perf_counter(), LR if lr is None else lr, text.target.seed
    drawn = order(list(rows), batch_rows, seed)

    def measure() -> dict[str, NDArray[np.float64]] | None:
        found = gauge.read()
        return found if np.isfinite(found["forget"]).all() else None

    found = stepped(text.target, lambda: text.batch(next(drawn)), measure, steps, lr=rate)
    passes = round(steps[-1] * min(batch_rows, len(rows)) / len(rows), 3)
    settings: dict[str, Any] = {
        "lr": rate, "batch_rows": batch_rows, "seed": seed, "trained_rows": len(rows), "passes": passes,
        "diverged": len(found) < len(steps),
    }  # fmt: skip
    return gauge.outcome(name, "steps", [str(s) for s in steps], found, extra=settings, started=started)
