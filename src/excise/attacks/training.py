"""How an attacker trains: the split of rows, their order, and steps of AdamW on a model that is put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from excise.attacks.answers import nll
from excise.attacks.lending import lent, trained_by_an_attacker
from excise.attacks.target import Target
from excise.forward import Batch

Found = TypeVar("Found")


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


def split(target: Target, steps: Sequence[int] = (0,)) -> tuple[list[int], list[int]]:
    """The `halves` of a target's forget rows; of none at all two empty ones, which a gauge then refuses.

    Raises:
        ValueError: One forget row, or steps that do not ascend.
    """
    refuse(len(target.forget) or 2, steps)
    return halves([r.group for r in target.forget], target.seed)


def order(rows: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end: the rows in a new order each time round, every batch full where there are rows enough."""
    rng = np.random.default_rng([seed, 1])
    waiting: list[int] = []
    size = min(size, len(rows))
    while True:
        while len(waiting) < size:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:size]
        waiting = waiting[size:]


def refuse(rows: int, steps: Sequence[int]) -> None:
    """Refuse fewer than two rows, and steps that do not ascend.

    Raises:
        ValueError: Saying so.
    """
    if rows < 2:
        raise ValueError("relearning needs at least two rows: one to train on, one to measure")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError("steps must ascend from 0 or above")


def stepped(
    target: Target,
    draw: Callable[[], Batch],
    measure: Callable[[], Found | None],
    steps: Sequence[int],
    *,
    lr: float,
) -> list[Found]:
    """What ``measure`` gives at each of ``steps`` while the target's model is trained on what ``draw`` draws.

    AdamW at a constant rate, no decay, without dropout. The model is put back (`lending.lent`); the global random
    state is not touched. Memory: one more copy of the trained parameters, their gradients and AdamW's two moments.

    Returns:
        One entry for each step, fewer where the attack diverged: ``measure`` gave None, or the loss was not finite.
    """
    found: list[Found] = []
    chosen = trained_by_an_attacker(target.model)
    with lent(target.model, chosen), torch.enable_grad():
        for p in chosen:
            p.requires_grad_(True)
        attacker = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
        for step in range(steps[-1] + 1):
            if step in steps:
                value = measure()
                if value is None:
                    break
                found.append(value)
            if step == steps[-1]:
                break
            attacker.zero_grad(set_to_none=True)
            with target.precision():
                loss = nll(target, draw())
            if not torch.isfinite(loss.detach()):
                break
            loss.backward()
            attacker.step()
            target.tell(step + 1, steps[-1])
    return found
