"""The relearning attack: how soon forgotten answers come back when a few of the others are trained again.

After Hu et al. (2406.13356): a model that only hides what it knew finds it again faster than one that never knew it.
Run with the same settings on the unlearned model and on the gold; a curve alone says nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from excise.errors import InputRefused
from excise.forward import Anatomy, Batch, Pass, chunked, label_logp, run_pass
from excise.metrics import tagging
from excise.metrics.class_scores import score
from excise.records import Record
from excise.tasks import TASKS, causal_lm

STEPS = (0, 1, 2, 4, 8, 16)


def halves(groups: Sequence[str | int | None], seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows that the attacker has, and rows on which the attack is measured: half of each group, drawn by the seed.

    Groups are cut through on purpose: the attacker holds some facts of a person and wants the others. Rows without a
    group are one group. An odd row goes to the side that is smaller so far.

    Example:
        >>> halves(["a", "a", "b", "b"])
        ([0, 2], [1, 3])
    """
    rng = np.random.default_rng(seed)
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    trained: list[int] = []
    held: list[int] = []
    for rows in members.values():
        order = [rows[i] for i in rng.permutation(len(rows))]
        cut = len(order) // 2 + (len(order) % 2 and len(trained) < len(held))
        trained += order[:cut]
        held += order[cut:]
    return sorted(trained), sorted(held)


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
    _refuse(records, steps)
    examples = causal_lm.encode_records(records, tokenizer, encoding, source="forget")
    trained, held = halves([r.group for r in records], seed)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device

    def batch(rows: Sequence[int]) -> Batch:
        made = causal_lm.collate([examples[i] for i in rows], pad_id=pad_id)
        return Batch(made["input_ids"], made["attention_mask"], made["label_mask"], tuple(rows)).to(device)

    def probability() -> tuple[float]:
        parts = _by_length(held, [len(e.input_ids) for e in examples], 2 * batch_rows)
        with torch.no_grad(), precision():
            values = torch.cat([_row_logp(model, anatomy, batch(part)) for part in parts])
        return (float(values.double().exp().mean()),)

    order = _order(trained, batch_rows, seed)
    found = _attack(model, anatomy, lambda: batch(next(order)), probability, steps, lr, precision, progress)
    return [value for (value,) in found] + [math.nan] * (len(steps) - len(found))


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
    """The attack of `curve` on a classifier: half of the forgotten rows trained again, the other half measured.

    Trained is the mean negative log-likelihood of every label, as the model once was; measured are the labels of
    entities (all labels of a text classifier).

    Args:
        model: A token or sequence classifier under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: The forget rows, at least two.
        encoding: Of which the length counts.
        task: ``token_classification`` or ``sequence_classification``.
        steps: As in `curve`.
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
    _refuse(records, steps)
    names = tagging.class_names(model)
    examples = TASKS[task].encode_records(records, tokenizer, encoding, names=names, source="forget")
    trained, held = halves([r.group for r in records], seed)
    device = next(model.parameters()).device

    def batch(rows: Sequence[int]) -> Batch:
        made = TASKS[task].collate([examples[i] for i in rows], pad_id=tokenizer.pad_token_id)
        return Batch(**made, indices=tuple(rows)).to(device)

    rest = {"forget": [records[i] for i in held]}
    main = "forget_f1" if task == "token_classification" else "forget_accuracy"

    def measured() -> tuple[float, float]:
        with precision():
            try:
                swept = tagging.sweep(model, anatomy, tokenizer, rest, encoding, task=task, batch_tokens=batch_tokens)
            except InputRefused:  # scores that are not finite: the attack diverged
                return math.nan, math.nan
        values = score(swept.tables, resamples=1).values
        found = [values[name]["value"] if name in values else math.nan for name in ("forget_probability", main)]
        return found[0], found[1]

    order = _order(trained, batch_rows, seed)
    found = _attack(model, anatomy, lambda: batch(next(order)), measured, steps, lr, precision, progress)
    found += [(math.nan, math.nan)] * (len(steps) - len(found))
    return ClassCurve([value for value, _ in found], [value for _, value in found])


def _refuse(records: Sequence[Record], steps: Sequence[int]) -> None:
    if len(records) < 2:
        raise ValueError("relearning needs at least two rows: one to train on, one to measure")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError("steps must ascend from 0 or above")


def _by_length(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    ordered = sorted(rows, key=lambda i: lengths[i])
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _attack(
    model: nn.Module,
    anatomy: Anatomy,
    draw: Callable[[], Batch],
    measure: Callable[[], tuple[float, ...]],
    steps: Sequence[int],
    lr: float,
    precision: Callable[[], AbstractContextManager],
    progress: Callable[[int, int], None] | None,
) -> list[Any]:
    """What ``measure`` gives at each of ``steps``; shorter where the attack diverged. The model is put back."""
    found: list[Any] = []
    with _lent(model) as parameters, torch.enable_grad():
        attacker = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        for step in range(steps[-1] + 1):
            if step in steps:
                found.append(measure())
                if not math.isfinite(found[-1][0]):
                    break
            if step == steps[-1]:
                break
            attacker.zero_grad(set_to_none=True)
            with precision():
                loss = _nll(model, anatomy, draw())
            if not torch.isfinite(loss.detach()):
                break
            loss.backward()
            attacker.step()
            if progress is not None:
                progress(step + 1, steps[-1])
    return found


def _order(rows: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end: the rows in a new order each time round, every batch full where there are rows enough."""
    rng = np.random.default_rng([seed, 1])
    waiting: list[int] = []
    size = min(size, len(rows))
    while True:
        while len(waiting) < size:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:size]
        waiting = waiting[size:]


def _token_logp(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    states = run_pass(model, anatomy, batch, Pass(head=True)).at_labels
    assert states is not None
    targets = batch.targets()

    def part(start: int, stop: int) -> Tensor:
        return label_logp(anatomy.logits(states[start:stop]), targets[start:stop])

    return chunked(part, len(targets), anatomy.vocabulary, grad=torch.is_grad_enabled())


def _nll(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    return -_token_logp(model, anatomy, batch).mean()


def _row_logp(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    """``[B]`` mean log-probability per label token."""
    logp, (rows, _) = _token_logp(model, anatomy, batch), batch.positions()
    sums = torch.zeros(len(batch.label_mask), dtype=logp.dtype, device=logp.device).index_add_(0, rows, logp)
    return sums / batch.label_mask.sum(1)


@contextlib.contextmanager
def _lent(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that the attacker trains; put back bit for bit afterwards, also after an error."""
    everything = list(model.parameters())
    adapter = hasattr(model, "peft_config") and any(p.requires_grad for p in everything)
    chosen = [p for p in everything if p.is_floating_point() and (p.requires_grad or not adapter)]
    needs, gradients = [p.requires_grad for p in everything], [p.grad for p in everything]
    modes = [(module, module.training) for module in model.modules()]
    before = [p.detach().clone() for p in chosen]
    model.eval()
    for p in everything:
        p.grad = None
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield chosen
    finally:
        with torch.no_grad():
            for p, own in zip(chosen, before, strict=True):
                p.copy_(own)
        for p, need, gradient in zip(everything, needs, gradients, strict=True):
            p.requires_grad_(need)
            p.grad = gradient
        for module, training in modes:
            module.training = training
