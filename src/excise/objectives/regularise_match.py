"""Where forgotten rows lie: their hidden states take the place of never-seen rows' states, in mean, spread and shape.

Pure functions and a factory; conventions as in `forget`. What never-seen rows are like comes from `excise.population`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.forward import hidden, mask, population
from excise.objectives.arithmetic import layer_numbers, one_of, upcast, whole
from excise.objectives.term import Term, Weight
from excise.objectives.value import Wiring

Population = Mapping[str, Tensor]
PARTS = ("mean", "covariance", "energy")


def match_parts(states: Tensor, where: Tensor, target: Population) -> dict[str, Tensor]:
    """How far the states of a batch are from the never-seen ones at one layer, each part a number.

    States are whitened by the never-seen ones (see `excise.population.states`): ``mean`` is the squared length of the
    mean token state, ``covariance`` the squared Frobenius distance of the token covariances per direction, ``energy``
    the energy distance of the rows' means (2 E|x - y| - E|x - x'| - E|y - y'|, pairs of different rows).

    Args:
        states: ``[B, T, D]``.
        where: ``[B, T]`` bool, the positions that are read.
        target: The never-seen rows.

    Source: ours; energy distance: Szekely & Rizzo 2013.

    Example:
        >>> h = torch.tensor([[[2.0], [4.0]]])
        >>> target = {"mean": torch.zeros(1), "whitening": torch.eye(1), "spread": torch.ones(1),
        ...           "rows": torch.zeros(1, 1), "scatter": torch.zeros(())}
        >>> parts = match_parts(h, torch.tensor([[True, True]]), target)
        >>> {name: float(value) for name, value in parts.items()}
        {'mean': 9.0, 'covariance': 0.0, 'energy': 6.0}
    """
    fixed = {name: upcast(value).detach() for name, value in target.items()}
    tokens = (upcast(states[where]) - fixed["mean"]) @ fixed["whitening"]
    total = tokens.new_zeros(len(where), tokens.shape[1]).index_add(0, where.nonzero(as_tuple=True)[0], tokens)
    rows = total / where.sum(1, keepdim=True).clamp_min(1)
    mean = tokens.mean(0)
    apart = tokens - mean
    covariance = apart.T @ apart / len(tokens) - fixed["spread"].diag()
    across = torch.cdist(rows, fixed["rows"], compute_mode="donot_use_mm_for_euclid_dist").mean()
    inside = F.pdist(rows).mean() if len(rows) > 1 else rows.new_zeros(())
    return {
        "mean": mean.square().sum(),
        "covariance": covariance.square().sum() / len(covariance),
        "energy": 2 * across - inside - fixed["scatter"],
    }


def match_rows(
    states: tuple[Tensor, ...],
    where: Tensor,
    target: tuple[Population, ...],
    *,
    parts: Sequence[str],
) -> Tensor:
    """The sum of `match_parts`, mean over layers, as the value of every row of the batch: ``[B]``.

    Source: ours.

    Example:
        >>> h, ones = torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)
        >>> never = {"mean": torch.ones(1), "whitening": torch.eye(1), "spread": torch.ones(1),
        ...          "rows": torch.zeros(2, 1), "scatter": torch.zeros(())}
        >>> match_rows((h,), ones, (never,), parts=("mean", "covariance")).tolist()
        [2.0, 2.0]
    """
    per_layer = []
    for own, aim in zip(states, target, strict=True):
        found = match_parts(own, where, aim)
        per_layer.append(torch.stack([found[part] for part in parts]).sum())
    return torch.stack(per_layer).mean().expand(len(where))


def _match_monitor(states: tuple[Tensor, ...], where: Tensor, target: tuple[Population, ...]) -> dict[str, Tensor]:
    """Each part by itself, mean over layers."""
    found = [match_parts(own, where, aim) for own, aim in zip(states, target, strict=True)]
    return {part: torch.stack([f[part] for f in found]).mean() for part in PARTS}


def latent_match(
    layers: str | int | Sequence[int] = 2,
    parts: Sequence[str] = PARTS,
    refresh: int = 0,
    weight: Weight = 1.0,
) -> Term:
    """Make the hidden states of forgotten rows lie as those of never-seen rows do: mean, covariance, row means.

    A statistic of a micro-batch on one rank: it needs some rows in each (16 do), and more say more.

    Args:
        layers: ``"last"``; ``k`` for the last k; or a list of layer numbers.
        parts: Which of ``mean``, ``covariance`` and ``energy`` are summed.
        refresh: As in `quantile`.
        weight: Weight of the term.

    Raises:
        UsageError: An option is none of the values above.

    Source: ours; covariance: Sun & Saenko 2016 (Deep CORAL), arXiv 1607.01719; energy
    distance: Szekely & Rizzo 2013.

    Example:
        >>> latent_match(layers="last").batch_coupled
        True
    """
    chosen = (parts,) if isinstance(parts, str) else tuple(parts)
    for part in chosen or ("",):
        one_of("latent_match", "parts", part, PARTS)
    every, numbers = whole("latent_match", "refresh", refresh), layer_numbers("latent_match", layers)
    inputs: Wiring = {
        "states": tuple(hidden("forget", number) for number in numbers),
        "where": mask("forget", "attended"),
        "target": tuple(population("states", "never_seen", layer=number, every=every) for number in numbers),
    }
    return Term(
        "latent_match", partial(match_rows, parts=chosen), inputs, over="forget", weight=weight, batch_coupled=True,
        monitor=_match_monitor,
    )  # fmt: skip
