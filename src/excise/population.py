"""What all rows of a side are like together: how likely their answers are, and where their states lie.

Terms that match the forgotten rows to never-seen ones read these as constants. They are taken when training begins,
and again every so many steps where a term asks for that: what unlearning does to never-seen rows moves the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from excise import draws
from excise.forward import (
    Anatomy,
    Batch,
    Product,
    Step,
    hidden,
    label_count,
    labels,
    mask,
    pooled,
    seq_logp,
    token_logp,
)

Collate = Callable[[str, Sequence[int]], Batch]
#: What of the mean eigenvalue is added to every one before states are whitened.
FLOOR = 0.05
#: Most directions in which states are compared: what few rows say of more of them is noise.
DIRECTIONS = 256


@dataclass(frozen=True)
class Named:
    """What a population's name says: whose, what, at which layer, taken again after how many steps (0: never).

    ``rows`` is how many of the side's are looked at then (0: all).
    """

    side: str
    kind: str
    layer: int | None
    every: int
    rows: int


def named(product: Product) -> Named:
    """The parts of a population's name.

    Example:
        >>> from excise.forward import population
        >>> named(population("states", "never_seen", layer=2))
        Named(side='never_seen', kind='states', layer=2, every=0, rows=0)
    """
    _, side, kind, layer, every, rows = str(product.detail).split("/")
    return Named(side, kind, int(layer) if layer else None, int(every), int(rows))


def wanted(needs: Iterable[Product], *, step: int | None = None) -> list[Product]:
    """The populations among the products that terms read, each once; those that are due after ``step`` if one is given.

    Example:
        >>> from excise.forward import population, token_logp
        >>> needs = [token_logp("forget"), population("likelihood", "never_seen", every=6)]
        >>> [len(wanted(needs)), len(wanted(needs, step=5)), len(wanted(needs, step=12))]
        [1, 0, 1]
    """
    found = dict.fromkeys(p for p in needs if p.what == "constant" and str(p.detail).startswith("population/"))
    return [p for p in found if step is None or ((every := named(p).every) and step % every == 0)]


@torch.no_grad()
def take(
    model: nn.Module,
    anatomy: Anatomy,
    populations: Sequence[Product],
    rows: Mapping[str, int],
    collate: Collate,
    *,
    autocast: Callable[[], AbstractContextManager],
    step: int | None = None,
    batch_rows: int = 32,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Tensor]]:
    """One pass over each side, in evaluation mode; the model is left as it was.

    Args:
        model: The model as it is now.
        anatomy: Its parts.
        populations: From `wanted`.
        rows: Rows of each side.
        collate: Makes the batch of some rows of a side.
        autocast: The precision of the run.
        step: After which step they are taken again, see `looked_at`; None for the start.
        batch_rows: Rows in a batch.
        device: Where the model is.

    Returns:
        By constant's name. Of the kind ``likelihood``: ``tokens [m]`` ascending log-probabilities of all label tokens,
        ``labels [m]`` what stands there, ``rows [r]`` ascending means over each row's labels. Of the kind ``states``:
        ``mean [D]``, ``whitening [D, K]``, ``spread [K]`` (variance that is left along each whitened direction),
        ``rows [r, K]`` whitened means over each row, ``scatter []`` their mean distance from each other; K is at most
        `DIRECTIONS`, the leading ones of the covariance.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    out = {}
    try:
        for product in populations:
            asked = named(product)
            chosen = looked_at(asked, rows[asked.side], step)
            parts = [chosen[i : i + batch_rows] for i in range(0, len(chosen), batch_rows)]
            needs = _needs(asked)
            made = (_run(model, anatomy, asked.side, collate(asked.side, p).to(device), needs, autocast) for p in parts)
            out[str(product.detail)] = (likelihood if asked.kind == "likelihood" else states)(made)
    finally:
        for module, training in modes:
            module.training = training
    return out


def looked_at(asked: Named, count: int, step: int | None) -> Sequence[int]:
    """The rows of which a population is taken: all at the start, after a step the next few that have their turn.

    A pass over all of them costs as much as the steps between two looks; the few move with the model, and since they
    take turns no row's own likelihood is aimed at for long.

    Example:
        >>> asked = Named("never_seen", "likelihood", None, every=6, rows=2)
        >>> len(looked_at(asked, 5, None)), sorted([*looked_at(asked, 4, 6), *looked_at(asked, 4, 12)])
        (5, [0, 1, 2, 3])
    """
    if step is None or not asked.rows or asked.rows >= count:
        return range(count)
    start = (step // asked.every - 1) * asked.rows
    return list(islice(draws.stream(count, 0, f"population/{asked.side}", start), asked.rows))


def _needs(asked: Named) -> list[Product]:
    side = asked.side
    if asked.kind == "likelihood":
        return [token_logp(side), labels(side), seq_logp(side), label_count(side)]
    assert asked.layer is not None
    return [hidden(side, asked.layer), mask(side, "attended"), pooled(side, asked.layer)]


def _run(
    model: nn.Module,
    anatomy: Anatomy,
    side: str,
    batch: Batch,
    needs: list[Product],
    autocast: Callable[[], AbstractContextManager],
) -> list[Tensor]:
    with autocast():
        made = Step(model, anatomy, {side: batch}).run(needs)
    return [made[p] for p in needs]


def likelihood(batches: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The population of log-probabilities, from ``(token_logp, labels, seq_logp, label_count)`` of each batch.

    Example:
        >>> batch = [torch.tensor([-1.0, -3.0]), torch.tensor([4, 5]), torch.tensor([-4.0]), torch.tensor([2.0])]
        >>> {name: value.tolist() for name, value in likelihood([batch]).items()}
        {'tokens': [-3.0, -1.0], 'labels': [5, 4], 'rows': [-2.0]}
    """
    logp, classes, total, count = (torch.cat(parts) for parts in zip(*batches, strict=True))
    tokens, order = logp.float().sort()
    return {"tokens": tokens, "labels": classes[order], "rows": (total.float() / count.clamp_min(1)).sort().values}


def states(batches: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The population of states, from ``(hidden, attended, pooled)`` of each batch, see `take`.

    Whitened by the leading directions of ``covariance + FLOOR * mean eigenvalue``, so that a direction in which
    never-seen states hardly vary does not outweigh all others.

    Source: ours.

    Example:
        >>> h = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
        >>> made = states([(h, torch.ones(2, 5, dtype=torch.bool), h.mean(1))])
        >>> made["whitening"].shape, made["rows"].shape
        (torch.Size([3, 3]), torch.Size([2, 3]))
    """
    count, total, square, means = 0, torch.zeros(()), torch.zeros(()), []
    for raw, where, row_means in batches:
        each = raw[where].double()
        count, total, square = count + len(each), total + each.sum(0), square + each.T @ each
        means.append(row_means.double())
    mean = total / count
    values, directions = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    floor = FLOOR * values.mean().clamp_min(1e-12)
    values, directions = values.clamp_min(0).flip(0)[:DIRECTIONS], directions.flip(1)[:, :DIRECTIONS]
    floored = values + floor
    whitening = directions / floored.sqrt()
    rows = (torch.cat(means) - mean) @ whitening
    made = {
        "mean": mean, "whitening": whitening, "spread": values / floored, "rows": rows, "scatter": apart(rows),
    }  # fmt: skip
    return {name: value.float() for name, value in made.items()}


def apart(rows: Tensor) -> Tensor:
    """Mean distance between two different rows ``[n, K]``; 0 where there is one.

    Example:
        >>> float(apart(torch.tensor([[0.0], [2.0], [5.0], [5.0]])))
        3.0
    """
    if len(rows) < 2:
        return rows.new_zeros(())
    return torch.nn.functional.pdist(rows).mean()
