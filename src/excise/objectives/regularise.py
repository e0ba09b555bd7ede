"""CLReg: the contrastive regulariser that separates forget from retain representations, on top of any objective.

Source: Tang & Khanna 2026, arXiv 2601.22028. The anchor is a forget row, the positive another view of the same row,
the negatives are retain rows. What the paper leaves open (weight, dropout rate, pooling, several negatives) is our
choice and says so. Lower entanglement is no aim in itself: it belongs beside that of a retrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.errors import UsageError
from excise.forward import Product, View, pooled
from excise.objectives.arithmetic import above_zero, layer_numbers, one_of, unit_rows, upcast
from excise.objectives.term import Term, Weight, divided

#: A pair counts as saturated when its gradient factor 2 sigmoid(-delta / tau) is below this share of its maximum 2.
SATURATED = 0.01


def contrast_rows(
    positive_cosine: Tensor,
    negative_cosine: Tensor,
    *,
    loss: str,
    temperature: float,
    reduce: str,
    scale_infonce: bool,
) -> Tensor:
    """CLReg's loss of each anchor from its cosines, ``[B]``.

    With ``delta = s+ - s-``, ``loss="dpo"`` is ``-2 tau log sigmoid(delta / tau)``: its slope at ``delta = 0`` is -1
    for every ``tau``, which sets the curvature and not the strength. ``"infonce"`` is the softmax form,
    ``-log(e^(s+/tau) / (e^(s+/tau) + sum_j e^(s_j/tau)))``; with one negative and the factor ``2 tau`` of
    ``scale_infonce`` the two are equal.

    Args:
        positive_cosine: ``[B, P]`` anchor to each of its views.
        negative_cosine: ``[B, R]`` anchor to each negative.
        loss: ``"dpo"`` or ``"infonce"``.
        temperature: ``tau``, above 0.
        reduce: ``"all"`` negatives (mean over pairs; InfoNCE: their sum), ``"mean_sim"`` (their mean cosine as one
            negative; for the DPO form a lower bound of ``"all"`` by Jensen), ``"hardest"`` (the nearest one).
        scale_infonce: Multiply InfoNCE by ``2 tau``.

    Source: Tang & Khanna 2026, arXiv 2601.22028 (DPO form and InfoNCE variant); InfoNCE: van den Oord et al. 2018,
    arXiv 1807.03748. The reductions are ours.

    Example:
        >>> one = torch.tensor([[0.2]])
        >>> round(float(contrast_rows(one, one, loss="dpo", temperature=0.5, reduce="all", scale_infonce=True)), 4)
        0.6931
    """
    s_pos = upcast(positive_cosine)[:, :, None]
    s_neg = upcast(negative_cosine)[:, None, :]
    if reduce == "mean_sim":
        s_neg = s_neg.mean(-1, keepdim=True)
    elif reduce == "hardest":
        s_neg = s_neg.amax(-1, keepdim=True)
    gap = (s_neg - s_pos) / temperature  # [B, P, K]
    if loss == "dpo":
        return (2 * temperature * F.softplus(gap)).mean((1, 2))
    values = F.softplus(gap.logsumexp(-1)).mean(1)  # log(1 + sum_j e^gap_j)
    return values * (2 * temperature) if scale_infonce else values


def _cosines(
    anchor: Tensor, views: Sequence[Tensor], negative: Tensor, others: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, P]`` anchor to its views and then to each of the ``others``, ``[B, R]`` anchor to the negatives."""
    own = unit_rows(anchor)
    to_views = [(own * unit_rows(view)).sum(-1, keepdim=True) for view in views]
    to_others = [] if others is None else [own @ unit_rows(others).T]
    return torch.cat([*to_views, *to_others], dim=1), own @ unit_rows(negative).T


def _views_of(position: int, views: Sequence[Tensor], layers: int) -> list[Tensor]:
    """The views at one layer; the tuple holds all layers of the first view, then all of the second."""
    return [views[start + position] for start in range(0, len(views), layers)]


def clreg_rows(
    anchor: tuple[Tensor, ...],
    positive: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
    never_seen: tuple[Tensor, ...] = (),
    *,
    loss: str,
    temperature: float,
    reduce: str,
    scale_infonce: bool,
    detach_positive: bool,
    detach_negative: bool,
) -> Tensor:
    """Contrast each anchor's views with the negatives, ``[B]``: the mean over layers of `contrast_rows`.

    Args:
        anchor: Per layer ``[B, D]`` pooled states of the anchors.
        positive: Per view and layer (all layers of a view together) ``[B, D]``, row by row views of the anchors.
        negative: Per layer ``[R, D]`` pooled states of the other side, gathered from all ranks.
        never_seen: Per layer ``[M, D]`` pooled states of never-seen rows, each a positive of every anchor, or none.
        loss: ``"dpo"`` or ``"infonce"``.
        temperature: ``tau``, above 0.
        reduce: ``"all"``, ``"mean_sim"`` or ``"hardest"``.
        scale_infonce: Multiply InfoNCE by ``2 tau``.
        detach_positive: No gradient into the positives.
        detach_negative: No gradient into the negatives.

    Source: Tang & Khanna 2026, arXiv 2601.22028; never-seen positives and the mean over layers for "Last-k" are ours.

    Example:
        >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> rows = clreg_rows((a,), (a,), (n,), loss="dpo", temperature=0.5, reduce="all", scale_infonce=True,
        ...                   detach_positive=False, detach_negative=False)
        >>> round(float(rows), 4)
        0.1269
    """
    per_layer = []
    for position, (own, other) in enumerate(zip(anchor, negative, strict=True)):
        at_layer, others = _views_of(position, positive, len(anchor)), never_seen[position] if never_seen else None
        if detach_positive:
            at_layer, others = [view.detach() for view in at_layer], None if others is None else others.detach()
        s_pos, s_neg = _cosines(own, at_layer, other.detach() if detach_negative else other, others)
        per_layer.append(
            contrast_rows(s_pos, s_neg, loss=loss, temperature=temperature, reduce=reduce, scale_infonce=scale_infonce)
        )
    return torch.stack(per_layer).mean(0)


def _mean_pairwise(vectors: Tensor) -> Tensor:
    """Mean cosine over the pairs of distinct rows, from the length of the rows' sum."""
    units = unit_rows(vectors)
    n = len(units)
    return (units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1))


def clreg_monitor(
    anchor: tuple[Tensor, ...],
    positive: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
    never_seen: tuple[Tensor, ...] = (),
    *,
    temperature: float,
) -> dict[str, Tensor]:
    """What to watch while CLReg trains: scalars, means over the layers.

    Args:
        anchor: As in `clreg_rows`.
        positive: As in `clreg_rows`.
        negative: As in `clreg_rows`.
        never_seen: As in `clreg_rows`.
        temperature: ``tau``.

    Returns:
        ``positive_cosine`` and ``negative_cosine`` (means); ``saturated_share`` (share of the anchor-view-negative
        triples whose gradient factor ``2 sigmoid(-delta / tau)`` is under 1 % of its maximum: with most of them
        saturated the term has no effect, raise ``tau``); ``anchor_collapse`` and ``negative_collapse`` (mean cosine
        between distinct rows of one side: towards 1 a side falls onto one point). The last two are absent where a
        side has a single row.

    Source: ours.

    Example:
        >>> a, n = torch.eye(2), -torch.eye(2)
        >>> sorted(clreg_monitor((a,), (a,), (n,), temperature=0.1))
        ['anchor_collapse', 'negative_collapse', 'negative_cosine', 'positive_cosine', 'saturated_share']
    """
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for position, (own, other) in enumerate(zip(anchor, negative, strict=True)):
            others = never_seen[position] if never_seen else None
            s_pos, s_neg = _cosines(own, _views_of(position, positive, len(anchor)), other, others)
            factor = torch.sigmoid((s_neg[:, None, :] - s_pos[:, :, None]) / temperature)
            found.setdefault("positive_cosine", []).append(s_pos.mean())
            found.setdefault("negative_cosine", []).append(s_neg.mean())
            found.setdefault("saturated_share", []).append((factor < SATURATED).to(s_pos.dtype).mean())
            for name, side in (("anchor_collapse", own), ("negative_collapse", other)):
                if len(side) > 1:
                    found.setdefault(name, []).append(_mean_pairwise(side))
    return {name: torch.stack(values).mean() for name, values in found.items()}


# --- wiring -------------------------------------------------------------------------------------------------------


def _first_block(layers: tuple[int, ...]) -> int:
    """The block that computes the lowest contrast layer: layer ``-k`` is the output of block ``-k``."""
    if min(layers) < 0 < max(layers):
        raise UsageError("clreg: option 'layers' mixes counts from both ends: use one, or give 'from_layer'")
    lowest = min(layers)
    return lowest if lowest < 0 else lowest - 1


def clreg(
    loss: Literal["dpo", "infonce"] = "dpo",
    temperature: float = 0.5,
    views: Literal["dropout", "paraphrase", "both", "never_seen"] = "dropout",
    dropout: float = 0.1,
    layers: str | int | Sequence[int] = "last",
    pooling: Literal["attended", "answer", "last"] = "attended",
    reduce: Literal["all", "mean_sim", "hardest"] = "all",
    symmetric: bool = False,
    scale_infonce: bool = True,
    detach_positive: bool = False,
    detach_negative: bool = False,
    from_layer: int | None = None,
    weight: Weight = 1.0,
) -> Term | tuple[Term, ...]:
    """Contrastive regulariser: forget rows towards their own views, away from retain rows.

    The paper's best setting is ``temperature=0.9`` on the last layer without stop-gradients. Our default of 0.5 was
    the easiest to control in our own trials; at 0.1 the sigmoid saturates and nothing happens. The weight has to be
    tuned for each forget loss and number of steps: about 1 beside `simnpo`, 5 to 8 beside `npo`. With
    ``detach_negative`` retained representations are left where they are, at the cost of less separation.

    Args:
        loss: ``"dpo"`` (the paper's) or ``"infonce"`` (its variant).
        temperature: ``tau``, above 0.
        views: Where positives come from: ``"dropout"`` (the blocks from the lowest contrast layer's run again on
            dropout of their input), ``"paraphrase"`` (side ``forget_paraphrase``), ``"both"``; or ``"never_seen"``:
            the never-seen rows of the batch, so that forgotten rows are drawn to where strangers lie (ours).
        dropout: Rate of the dropout view, from 0 to below 1; above 0.2 is not advised by the paper.
        layers: ``"last"``; ``k`` for the last k; or a list of layer numbers.
        pooling: Positions whose mean is the representation.
        reduce: How several negatives count, see `contrast_rows`.
        symmetric: Add the swapped form, retain rows as anchors with their own dropout view and forget rows as
            negatives; two terms of half the weight. ``detach_*`` then go by role, not by side.
        scale_infonce: Multiply InfoNCE by ``2 tau``, so that the weight means the same for both losses.
        detach_positive: No gradient into the positives.
        detach_negative: No gradient into the negatives.
        from_layer: First block of the dropout view if not the lowest contrast layer's; 0 is SimCSE's whole pass.
        weight: Weight of the term.

    Raises:
        UsageError: An option is none of the values above.

    Source: Tang & Khanna 2026, arXiv 2601.22028; dropout views: Gao et al. 2021 (SimCSE), arXiv 2104.08821. Dropout
    rate, pooling, reductions, "Last-k" as a mean, and the default temperature and weight are ours.

    Example:
        >>> term = clreg(temperature=0.9)
        >>> term.batch_coupled, sorted(term.inputs)
        (True, ['anchor', 'negative', 'positive'])
    """
    one_of("clreg", "loss", loss, ("dpo", "infonce"))
    one_of("clreg", "views", views, ("dropout", "paraphrase", "both", "never_seen"))
    one_of("clreg", "pooling", pooling, ("attended", "answer", "last"))
    one_of("clreg", "reduce", reduce, ("all", "mean_sim", "hardest"))
    above_zero("clreg", "temperature", temperature)
    if not 0 <= dropout < 1:
        raise UsageError(f"clreg: option 'dropout' is {dropout}: give a number from 0 to below 1")
    numbers = layer_numbers("clreg", layers)
    block = _first_block(numbers) if from_layer is None else from_layer

    def pooled_at(side: str | View) -> tuple[Product, ...]:
        return tuple(pooled(side, number, pooling) for number in numbers)

    def term(name: str, anchor: str, positives: Sequence[str | View], negative: str, share: Weight) -> Term:
        fn = partial(
            clreg_rows,
            loss=loss,
            temperature=temperature,
            reduce=reduce,
            scale_infonce=scale_infonce,
            detach_positive=detach_positive,
            detach_negative=detach_negative,
        )
        inputs = {
            "anchor": pooled_at(anchor),
            "positive": tuple(product for side in positives for product in pooled_at(side)),
            "negative": pooled_at(negative),
            **({} if positives else {"never_seen": pooled_at("never_seen")}),
        }
        return Term(
            name,
            fn,
            inputs,
            over=anchor,
            weight=share,
            batch_coupled=True,
            gathered=frozenset({"negative"} if positives else {"negative", "never_seen"}),
            monitor=partial(clreg_monitor, temperature=temperature),
        )

    positives: list[str | View] = []
    if views in ("dropout", "both"):
        positives.append(View("forget", from_layer=block, dropout=dropout))
    if views in ("paraphrase", "both"):
        positives.append("forget_paraphrase")
    share = divided("clreg", weight, 2) if symmetric else weight
    forward = term("clreg", "forget", positives, "retain", share)
    if not symmetric:
        return forward
    back = View("retain", from_layer=block, dropout=dropout)
    return forward, term("clreg_retain", "retain", [back], "forget", share)
