"""Relearning attacks: how soon forgotten answers come back under training, and how fast all of them are learned again.

After Hu et al. (2406.13356): a model that only hides what it knew finds it again faster than one that never knew it.
Run with the same settings on the unlearned model and on the gold; a curve alone says nothing. A low curve alone can
mislead too: a model may keep what it knew where half of the rows do not reach it, and give it back as soon as all rows
are trained. `savings` measures that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from excise.attacks.answers import Answers, Gauge, Precision, Progress
from excise.attacks.lending import Weights
from excise.attacks.outcome import Outcome
from excise.attacks.training import halves, order, refuse, stepped
from excise.errors import NotShown
from excise.forward import Anatomy
from excise.records import Record
from excise.tasks import causal_lm

STEPS = (0, 1, 2, 4, 8, 16)
SAVINGS_STEPS = (0, 6, 12, 24)
#: Rate where nobody names one.
LR = 5e-4
#: Sides that stand for text of the same kind, the best first.
RELATED = ("related", "untouched", "retain", "never_seen")


def curve(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Sequence[Record],
    encoding: causal_lm.Encoding,
    *,
    steps: Sequence[int] = STEPS,
    lr: float,
    batch_rows: int = 16,
    seed: int = 0,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Mean probability of the answers that the attacker does not have, after so many steps on those that he has.

    AdamW at a constant rate, no decay, on the mean negative log-likelihood per label token, without dropout. What is
    trained: of a PEFT model the parameters that require a gradient (the attacker continues the adapter), of any other
    model, and of one whose adapter is frozen, all of them. Whatever happens, weights, gradients, ``requires_grad`` and
    training mode are afterwards what they were, bit for bit, and the global random state is not touched. Memory: one
    more copy of the trained parameters (on their device), their gradients and AdamW's two moments.

    Args:
        model: The model under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: The forget rows, at least two; `halves` splits them by their groups.
        encoding: How text becomes tokens.
        steps: Steps at which the curve is read, ascending; 0 is before the attack.
        lr: Learning rate.
        batch_rows: Rows in a step.
        seed: Of the split and of the order of rows.
        precision: Makes the context of a pass, autocast for instance; measurements use it too.
        progress: Called with (steps done, all steps).

    Returns:
        For each of ``steps`` the mean over held-out rows of exp(mean log p), end of sequence included; NaN from the
        step on at which the attack diverged.

    Raises:
        ValueError: Fewer than two rows, or steps that do not ascend.
    """
    made = attack(
        model, anatomy, tokenizer, {"forget": records}, encoding, seed=seed, precision=precision, progress=progress,
        lr=lr, steps=steps, batch_rows=batch_rows,
    )  # fmt: skip
    return [float(v) for v in made.values["forget"].mean(axis=1)]


def attack(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Mapping[str, Sequence[Record]],
    encoding: causal_lm.Encoding,
    *,
    seed: int = 0,
    precision: Precision = nullcontext,
    progress: Progress = None,
    original: Weights | None = None,
    lr: float | None = None,
    steps: Sequence[int] = STEPS,
    batch_rows: int = 16,
    kept_rows: int = 64,
) -> Outcome:
    """Half of the forget rows trained again, the other half measured, row by row; see `curve`.

    Args:
        model: The model under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: Rows by side; of "forget" at least two. Kept rows are measured beside them.
        encoding: How text becomes tokens.
        seed: Of the split and of the order of rows.
        precision: Makes the context of a pass.
        progress: Called with (steps done, all steps).
        original: Not read.
        lr: Learning rate; default 5e-4. A run passes that of its relearning curve.
        steps: Steps at which the curve is read.
        batch_rows: Rows in a step.
        kept_rows: Kept rows that are measured: what the attack costs; 0 for none.

    Returns:
        ``values["forget"]``: ``[steps, held rows]``, NaN from where the attack diverged.

    Raises:
        ValueError: Fewer than two rows, or steps that do not ascend.
        NotShown: There are no forget rows.
    """
    forget = records.get("forget", ())
    refuse(len(forget) or 2, steps)
    trained, held = halves([r.group for r in forget], seed)
    gauge = Gauge.of(model, tokenizer, records, encoding, held=held, kept=kept_rows, precision=precision)
    return _trained_on(
        "relearn", model, anatomy, gauge, gauge.sides["forget"], trained,
        steps=steps, lr=lr, batch_rows=batch_rows, seed=seed, progress=progress,
    )  # fmt: skip


def related(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Mapping[str, Sequence[Record]],
    encoding: causal_lm.Encoding,
    *,
    seed: int = 0,
    precision: Precision = nullcontext,
    progress: Progress = None,
    original: Weights | None = None,
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
        model: The model under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: Rows by side.
        encoding: How text becomes tokens.
        seed: Of the split and of the order of rows.
        precision: Makes the context of a pass.
        progress: Called with (steps done, all steps).
        original: Not read.
        lr: Learning rate; default 5e-4. A run passes that of its relearning curve.
        steps: Steps at which the curve is read.
        batch_rows: Rows in a step.
        kept_rows: Kept rows that are measured; 0 for none. The attack may have trained on them.
        rows: The side that is trained on; default the first there is of ``related``, the kept rows, ``never_seen``.

    Raises:
        ValueError: Fewer than two forget rows, or steps that do not ascend.
        NotShown: No such rows.
    """
    forget = records.get("forget", ())
    refuse(len(forget) or 2, steps)
    side = rows or next((s for s in RELATED if records.get(s)), "related")
    if side == "forget" or not records.get(side):
        raise NotShown(f"relearning on related text: there are no {side} rows to train on")
    _, held = halves([r.group for r in forget], seed)
    gauge = Gauge.of(model, tokenizer, records, encoding, held=held, kept=kept_rows, precision=precision)
    theirs = Answers.of(model, tokenizer, records[side], encoding, side)
    return _trained_on(
        "related", model, anatomy, gauge, theirs, range(len(theirs)),
        steps=steps, lr=lr, batch_rows=batch_rows, seed=seed, progress=progress, extra={"trained_side": side},
    )  # fmt: skip


def savings(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Mapping[str, Sequence[Record]],
    encoding: causal_lm.Encoding,
    *,
    seed: int = 0,
    precision: Precision = nullcontext,
    progress: Progress = None,
    original: Weights | None = None,
    lr: float | None = None,
    steps: Sequence[int] = SAVINGS_STEPS,
    batch_rows: int = 16,
    kept_rows: int = 0,
    control: bool = True,
) -> Outcome:
    """All forget rows trained again for a fixed number of steps, and measured themselves: memorisation savings.

    The last point against the gold's is the metric ``memorisation_savings``. Without a gold the control stands in: as
    many never-seen rows, trained and measured in the same way, show how fast this model learns what it never knew.

    Args:
        model: The model under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: Rows by side: "forget", and "never_seen" for the control.
        encoding: How text becomes tokens.
        seed: Of the order of rows.
        precision: Makes the context of a pass.
        progress: Called with (steps done, all steps), the control's included.
        original: Not read.
        lr: Learning rate; default 5e-4. A run passes that of its relearning curve.
        steps: Steps at which the curve is read.
        batch_rows: Rows in a step.
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
    gauge = Gauge.of(model, tokenizer, records, encoding, kept=kept_rows, precision=precision)
    others = list(records.get("never_seen", ()))[: len(gauge.sides["forget"])] if control else []
    runs, done = (2 if others else 1), 0

    def tell(step: int, of: int) -> None:
        if progress is not None:
            progress(done + step, runs * of)

    own: dict[str, Any] = {"steps": steps, "lr": lr, "batch_rows": batch_rows, "seed": seed, "progress": tell}
    made = _trained_on("savings", model, anatomy, gauge, gauge.sides["forget"], gauge.rows["forget"], **own)
    if not others:
        return made
    done = steps[-1]
    theirs = Gauge.of(model, tokenizer, {"forget": others}, encoding, precision=precision)
    beside = _trained_on("savings", model, anatomy, theirs, theirs.sides["forget"], theirs.rows["forget"], **own)
    values = {**made.values, "never_seen": beside.values["forget"]}
    rows = {**made.rows, "never_seen": beside.rows["forget"]}
    return Outcome(
        made.name, made.unit, made.budget, made.budgets, values, rows, made.extra, made.seconds + beside.seconds
    )


def _trained_on(
    name: str,
    model: nn.Module,
    anatomy: Anatomy,
    gauge: Gauge,
    text: Answers,
    rows: Sequence[int],
    *,
    steps: Sequence[int],
    lr: float | None,
    batch_rows: int,
    seed: int,
    progress: Progress,
    extra: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train on rows of ``text`` and read the gauge at each of ``steps``."""
    started, rate = time.perf_counter(), LR if lr is None else lr
    drawn = order(list(rows), batch_rows, seed)

    def measure() -> dict[str, NDArray[np.float64]] | None:
        found = gauge.read(model, anatomy)
        return found if np.isfinite(found["forget"]).all() else None

    found = stepped(
        model, anatomy, lambda: text.batch(next(drawn)), measure, steps,
        lr=rate, precision=gauge.precision, progress=progress,
    )  # fmt: skip
    passes = round(steps[-1] * min(batch_rows, len(rows)) / len(rows), 3)
    settings = {"lr": rate, "batch_rows": batch_rows, "seed": seed, "trained_rows": len(rows), "passes": passes}
    settings |= {"diverged": len(found) < len(steps)} | dict(extra or {})
    return gauge.outcome(name, "steps", [str(s) for s in steps], found, extra=settings, started=started)
