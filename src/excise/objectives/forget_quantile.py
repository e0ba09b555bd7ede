"""Forget by matching: forgotten answers become as likely as never-seen ones, no less and no more.

Pure functions and a factory; conventions as in `forget`. What never-seen rows are like comes from `excise.population`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.errors import UsageError
from excise.forward import among, constant, label_count, labels, population, seq_logp, token_logp
from excise.objectives.arithmetic import above_zero, one_of, upcast, whole
from excise.objectives.term import Term, Weight
from excise.objectives.value import Wiring

Population = Mapping[str, Tensor]


def to_quantiles(values: Tensor, others: Tensor, target: Tensor, *, delta: float) -> Tensor:
    """Huber distance of each value to the quantile of ``target`` at its own level among ``others``, ``[n]``.

    With ``others`` the values themselves and a small ``delta`` the mean is ``delta`` times the Wasserstein-1 distance
    of the two sets. The level is the mid-rank, ``(values below + half of those equal) / number``; quantiles are linear
    between the midpoints ``(i + 1/2) / m``, so a set has the distance 0 from itself.

    Args:
        values: ``[n]``.
        others: ``[k]`` where a value's level is read; receives no gradient.
        target: ``[m]`` ascending; receives no gradient.
        delta: Where the square of the distance turns into its absolute value, above 0.

    Source: ours; the matching of sorted values is Wasserstein-1 on a line, Huber 1964 the distance.

    Example:
        >>> own = torch.tensor([0.0, -4.0])
        >>> to_quantiles(own, own, torch.tensor([-2.0, -1.0]), delta=1.0).tolist()
        [0.5, 1.5]
    """
    own, ladder = upcast(values), upcast(others).detach().sort().values
    key = own.detach().contiguous()
    below = torch.searchsorted(ladder, key) + torch.searchsorted(ladder, key, right=True)
    goals = upcast(target).detach().to(own.dtype)
    place = (below.to(own.dtype) / (2 * max(1, len(ladder))) * len(goals) - 0.5).clamp(0, len(goals) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(goals) - 1)
    goal = goals[low] + (place - low) * (goals[high] - goals[low])
    return F.huber_loss(own, goal, reduction="none", delta=delta)


def quantile_tokens(logp: Tensor, among: Tensor, target: Population, *, delta: float) -> Tensor:
    """`to_quantiles` of label tokens, ``[n]``: log-probabilities of the batch to those of all never-seen tokens.

    Source: ours.

    Example:
        >>> own = torch.tensor([0.0, -4.0])
        >>> quantile_tokens(own, own, {"tokens": torch.tensor([-2.0, -1.0])}, delta=1.0).tolist()
        [0.5, 1.5]
    """
    return to_quantiles(logp, among, target["tokens"], delta=delta)


def quantile_rows(
    logp: Tensor, count: Tensor, among: Tensor, among_count: Tensor, target: Population, *, delta: float
) -> Tensor:
    """`to_quantiles` of rows, ``[B]``: their mean log-probability per label token.

    Source: ours.

    Example:
        >>> own, two = torch.tensor([0.0, -8.0]), torch.tensor([2.0, 2.0])
        >>> quantile_rows(own, two, own, two, {"rows": torch.tensor([-2.0, -1.0])}, delta=1.0).tolist()
        [0.5, 1.5]
    """
    own = upcast(logp) / upcast(count).clamp_min(1)
    return to_quantiles(own, upcast(among) / upcast(among_count).clamp_min(1), target["rows"], delta=delta)


def quantile_types(
    logp: Tensor,
    classes: Tensor,
    among: Tensor,
    among_classes: Tensor,
    kinds: Tensor,
    target: Population,
    *,
    delta: float,
    outside: bool = False,
) -> Tensor:
    """`to_quantiles` of a tagger's label tokens among those of their type, ``[n]``; 0 for what does not count.

    Args:
        logp: ``[n]`` log-probabilities of the labels.
        classes: ``[n]`` the labels.
        among: ``[k]`` log-probabilities of the whole batch.
        among_classes: ``[k]`` its labels.
        kinds: ``[C]`` the type of each class, 0 for none (O).
        target: ``tokens [m]`` ascending and ``labels [m]``.
        delta: As in `to_quantiles`.
        outside: What counts is what is of no type, all of it together, and nothing else.

    Source: ours.

    Example:
        >>> one, kinds = torch.tensor([1]), torch.tensor([0, 1])
        >>> logp, target = torch.tensor([-3.0]), {"tokens": torch.tensor([-1.0]), "labels": one}
        >>> quantile_types(logp, one, logp, one, kinds, target, delta=1.0).tolist()
        [1.5]
    """
    values, kinds = torch.zeros_like(upcast(logp)), _kinds(kinds, outside=outside)
    counted = kinds[classes] * type_counts(classes, kinds, target).long()
    for kind in counted.unique().tolist():
        if kind:
            own, rest, aim = counted == kind, kinds[among_classes] == kind, kinds[target["labels"]] == kind
            matched = to_quantiles(logp[own], among[rest], target["tokens"][aim], delta=delta)
            values = values.index_put((own.nonzero(as_tuple=True)[0],), matched)
    return values


def type_counts(classes: Tensor, kinds: Tensor, target: Population) -> Tensor:
    """``[n]``: 1 for a label of a type that never-seen rows have too, 0 for the others and for none (O); ours.

    Example:
        >>> type_counts(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), {"labels": torch.tensor([0, 2])}).tolist()
        [0.0, 0.0, 1.0]
    """
    own = kinds[classes]
    return ((own > 0) & torch.isin(own, kinds[target["labels"]])).float()


def _kinds(types: Tensor, *, outside: bool) -> Tensor:
    """``[C]`` what the label of each class is matched within, 0 for none: its type, or all of O together."""
    return (types == 0).long() if outside else types


def _counted(
    classes: Tensor, among_classes: Tensor, kinds: Tensor, target: Population, *, outside: bool = False
) -> Tensor:
    return type_counts(classes, _kinds(kinds, outside=outside), target)


def _likelihoods(logp: Tensor, target: Population, **_: Tensor) -> dict[str, Tensor]:
    """What the log shows: mean negative log-likelihood per token of the batch and of the never-seen rows."""
    return {"nll": -upcast(logp).mean(), "never_seen_nll": -target["tokens"].mean()}


def quantile(
    level: Literal["both", "token", "row"] = "both",
    within: Literal["all", "type", "outside", "class"] = "all",
    delta: float = 1.0,
    refresh: int = 0,
    refresh_rows: int = 0,
    weight: Weight = 1.0,
) -> Term | tuple[Term, ...]:
    """Make forgotten answers as likely as never-seen ones, token by token and row by row; two terms of this weight.

    Two-sided: an answer that is less likely than its place among the forgotten says is pulled up again. Values are
    placed within a micro-batch (of all ranks): the more forget rows it has, the better.

    Args:
        level: Match label ``"token"`` by token, the means of each ``"row"``, or ``"both"``.
        within: ``"all"`` tokens together; or for taggers, where rows are not matched, each entity ``"type"`` by itself,
            the words ``"outside"`` of entities, or both (``"class"``: two terms). A tagger that never saw a sentence
            takes some of its words for entities; one that was made to forget its entities alone never does, which
            tells that it has seen it.
        delta: Distance in nats up to which the loss is quadratic; beyond it every token pulls alike.
        refresh: Look at the never-seen rows again after every so many steps; 0 keeps what they were at the start.
            Unlearning makes them less likely too, and the aim with them.
        refresh_rows: How many never-seen rows are looked at again, taking turns; 0 for all. Looking at some hundreds
            every few steps can cost as much as the steps.
        weight: Weight of each of the terms.

    Raises:
        UsageError: An option is none of the values above.

    Source: ours; on a line Wasserstein-1 is the matching of quantiles, with Huber's loss as in Dabney et al. 2017,
    arXiv 1710.10044.

    Example:
        >>> [term.name for term in quantile()]
        ['quantile', 'quantile_rows']
    """
    one_of("quantile", "level", level, ("both", "token", "row"))
    one_of("quantile", "within", within, ("all", "type", "outside", "class"))
    above_zero("quantile", "delta", delta)
    every = whole("quantile", "refresh", refresh)
    few = whole("quantile", "refresh_rows", refresh_rows, "rows, or 0 for all")
    if within != "all" and level == "row":
        raise UsageError(f"quantile: option 'within' is '{within}', which has no rows to match: use level token")
    target = population("likelihood", "never_seen", every=every, rows=few)
    tokens = {"logp": token_logp("forget"), "among": among(token_logp("forget")), "target": target}
    if within != "all":
        own = partial(_of_tags, tokens, delta=delta, weight=weight)
        if within == "class":
            return own("quantile", outside=False), own("quantile_outside", outside=True)
        return own("quantile", outside=within == "outside")
    by_token = Term(
        "quantile", partial(quantile_tokens, delta=delta), tokens, over="forget", per="token", weight=weight,
        batch_coupled=True, gathered=frozenset({"among"}), monitor=_likelihoods,
    )  # fmt: skip
    rows = {
        "logp": seq_logp("forget"),
        "count": label_count("forget"),
        "among": among(seq_logp("forget")),
        "among_count": among(label_count("forget")),
        "target": target,
    }
    by_row = Term(
        "quantile_rows", partial(quantile_rows, delta=delta), rows, over="forget", weight=weight,
        batch_coupled=True, gathered=frozenset({"among", "among_count"}),
    )  # fmt: skip
    if level == "both":
        return by_token, by_row
    return by_token if level == "token" else by_row


def _of_tags(tokens: Wiring, name: str, *, outside: bool, delta: float, weight: Weight) -> Term:
    """The term of a tagger: tokens of each type by themselves, or those outside of entities."""
    more = {"classes": labels("forget"), "among_classes": among(labels("forget")), "kinds": constant("class_map/type")}
    return Term(
        name, partial(quantile_types, delta=delta, outside=outside), {**tokens, **more}, over="forget", per="token",
        weight=weight, batch_coupled=True, gathered=frozenset({"among", "among_classes"}), monitor=_likelihoods,
        counts=partial(_counted, outside=outside),
    )  # fmt: skip
