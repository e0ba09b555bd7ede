"""DeepCUT: labels of the forget rows away from their own class and towards the others, for classifiers.

Source: He et al. 2025, arXiv 2503.14900. The mean is over the anchors of a step, which are known from the labels alone:
`deepcut_counts` says before the pass how much each label counts, and the engine divides by the sum of that over the
whole accumulation window and all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.forward import Product, Side, View, at_labels, constant, token_rows
from excise.forward import labels as labels_of
from excise.objectives.arithmetic import above_zero, one_of
from excise.objectives.class_contrast import Reading, Rows, classes_of, contrast_values, paired
from excise.objectives.term import Term, Weight

#: Sides of each choice of contrast rows; ``contrast`` are retained rows that the schedule draws for this alone.
CONTRAST: Mapping[str, tuple[str, ...]] = {
    "retain": ("retain",),
    "drawn": ("contrast",),
    "both": ("retain", "contrast"),
}


def deepcut_tokens(
    anchor: Tensor,
    labels: Tensor,
    contrast: tuple[Tensor, ...],
    contrast_labels: tuple[Tensor, ...],
    class_map: Tensor,
    own_view: Tensor | None,
    *,
    how: Reading,
) -> Tensor:
    """DeepCUT of each label of the forget rows, ``[n]``; 0 where it is no anchor, or one that lacks its contrast.

    Args:
        anchor: ``[n, D]`` states at the labels.
        labels: ``[n]`` classes there; those below 0 do not count.
        contrast: ``[m, D]`` states at the labels of retained rows, one tensor for each side and view.
        contrast_labels: ``[m]`` classes there, one tensor for each of ``contrast``.
        class_map: ``[C]`` contrast class of each class; 0 is "outside".
        own_view: ``[n, D]`` second view of the anchors, or None.
        how: The reading.

    Source: He et al. 2025, arXiv 2503.14900.

    Example:
        >>> z, y = torch.eye(2), torch.tensor([1, 0])
        >>> deepcut_tokens(z, y, (z,), (y,), torch.tensor([0, 1]), None, how=Reading(temperature=0.5)).tolist()
        [2.0, 0.0]
    """
    own, against = classes_of(labels, class_map), classes_of(torch.cat(contrast_labels), class_map)
    return contrast_values(anchor, own, contrast, against, own_view, how)


def deepcut_rows(
    anchor: Tensor,
    labels: Tensor,
    rows: Tensor,
    contrast: tuple[Tensor, ...],
    contrast_labels: tuple[Tensor, ...],
    contrast_rows: tuple[Tensor, ...],
    class_map: Tensor,
    own_view: Tensor | None,
    *,
    how: Reading,
) -> Tensor:
    """The same with one vector per row, the mean over its labels: ``[n]``, each label with the value of its row.

    Args:
        anchor: As in `deepcut_tokens`.
        labels: As in `deepcut_tokens`.
        rows: ``[n]`` the row of each label.
        contrast: As in `deepcut_tokens`.
        contrast_labels: As in `deepcut_tokens`.
        contrast_rows: ``[m]`` the row of each label, one tensor for each of ``contrast``.
        class_map: As in `deepcut_tokens`; a row has the entity class that most of its labels have.
        own_view: As in `deepcut_tokens`.
        how: The reading.

    Source: ours, a variant to compare with; He et al. 2025, arXiv 2503.14900 contrast tokens.

    Example:
        >>> z, y, row = torch.eye(2), torch.tensor([1, 2]), torch.tensor([0, 1])
        >>> how = Reading(anchors="pooled", temperature=0.5)
        >>> deepcut_rows(z, y, row, (z,), (y,), (row,), torch.tensor([0, 1, 2]), None, how=how).tolist()
        [2.0, 2.0]
    """
    own = Rows.of(labels, rows, class_map)
    others = [Rows.of(*given, class_map) for given in zip(contrast_labels, contrast_rows, strict=True)]
    states = tuple(other.means(own_states) for other, own_states in zip(others, contrast, strict=True))
    against = torch.cat([other.classes for other in others])
    view = None if own_view is None else own.means(own_view)
    return contrast_values(own.means(anchor), own.classes, states, against, view, how)[own.where]


def deepcut_counts(
    labels: Tensor,
    contrast_labels: tuple[Tensor, ...],
    class_map: Tensor,
    rows: Tensor | None = None,
    contrast_rows: tuple[Tensor, ...] = (),
    *,
    how: Reading,
) -> Tensor:
    """How much each label counts in the mean, ``[n]``: 1 for an anchor that has its contrast, 0 for anything else.

    Args:
        labels: As in `deepcut_tokens`.
        contrast_labels: As in `deepcut_tokens`.
        class_map: As in `deepcut_tokens`.
        rows: As in `deepcut_rows`: the labels of a row that is an anchor share a 1. None: labels are the anchors.
        contrast_rows: As in `deepcut_rows`.
        how: The reading.

    Source: ours; the paper does not say whether it sums or averages.

    Example:
        >>> y = torch.tensor([1, 0])
        >>> deepcut_counts(y, (y,), torch.tensor([0, 1]), how=Reading()).tolist()
        [1.0, 0.0]
    """
    own, against, where = _classes(labels, contrast_labels, class_map, rows, contrast_rows)
    usable = paired(own, against, how).usable.float()
    return usable if where is None else (usable / where.bincount(minlength=len(own)))[where]


def deepcut_monitor(
    labels: Tensor,
    contrast_labels: tuple[Tensor, ...],
    class_map: Tensor,
    rows: Tensor | None = None,
    contrast_rows: tuple[Tensor, ...] = (),
    *,
    how: Reading,
    **_: Any,
) -> dict[str, Tensor]:
    """What to watch while DeepCUT trains: how many anchors there are, and how many of them lack their contrast.

    Args:
        labels: As in `deepcut_tokens`.
        contrast_labels: As in `deepcut_tokens`.
        class_map: As in `deepcut_tokens`.
        rows: As in `deepcut_counts`.
        contrast_rows: As in `deepcut_rows`.
        how: The reading.
        **_: States, which are not read.

    Returns:
        ``anchors`` (their number), and of them ``skipped`` (the number without what the loss needs); ``without_same``
        and ``without_other`` (shares of the anchors without a retained label of the same class, and of another; absent
        where there is no anchor).

    Source: ours.

    Example:
        >>> y = torch.tensor([1, 1, 0])
        >>> found = deepcut_monitor(y, (y[2:],), torch.tensor([0, 1]), how=Reading())
        >>> {name: float(value) for name, value in found.items()}
        {'anchors': 2.0, 'skipped': 2.0, 'without_same': 1.0, 'without_other': 0.0}
    """
    own, against, _where = _classes(labels, contrast_labels, class_map, rows, contrast_rows)
    pairs = paired(own, against, how)
    number = pairs.anchors.sum().float()
    out = {"anchors": number, "skipped": number - pairs.usable.sum()}
    if bool(number > 0):
        for name, there in (("without_same", pairs.same), ("without_other", pairs.other)):
            out[name] = 1 - there.any(1)[pairs.anchors].float().mean()
    return out


def _classes(
    labels: Tensor,
    contrast_labels: tuple[Tensor, ...],
    class_map: Tensor,
    rows: Tensor | None,
    contrast_rows: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contrast classes of what is compared, labels or rows, and then the place of each label's row."""
    if rows is None:
        return classes_of(labels, class_map), classes_of(torch.cat(contrast_labels), class_map), None
    own = Rows.of(labels, rows, class_map)
    given = zip(contrast_labels, contrast_rows, strict=True)
    return own.classes, torch.cat([Rows.of(*pair, class_map).classes for pair in given]), own.where


# --- wiring -------------------------------------------------------------------------------------------------------


def deepcut_cautions(settings: Mapping[str, Any]) -> list[str]:
    """What a reader of a run should know of its DeepCUT settings, one sentence each.

    Example:
        >>> deepcut_cautions({"anchors": "pooled"})
        ['deepcut: pooled anchors did not forget in our trials: use anchors: entity']
        >>> deepcut_cautions({})
        []
    """
    found = {
        "all": "deepcut: with all tokens as anchors the retained rows were lost in our trials: use anchors: entity",
        "pooled": "deepcut: pooled anchors did not forget in our trials: use anchors: entity",
    }
    out = [text for anchors, text in found.items() if settings.get("anchors") == anchors]
    if settings.get("outside") is False:
        out.append("deepcut: without O among the other classes retained quality fell in our trials: use outside: true")
    return out


def _first_block(layer: int) -> int:
    """The block that computes a layer: layer ``-k`` is the output of block ``-k``."""
    return layer if layer < 0 else layer - 1


def deepcut(
    form: Literal["ratio", "full"] = "ratio",
    anchors: Literal["entity", "all", "pooled"] = "entity",
    classes: Literal["type", "prefixed"] = "type",
    outside: bool = True,
    views: Literal[1, 2] = 2,
    contrast: Literal["retain", "drawn", "both"] = "retain",
    temperature: float = 0.1,
    detach_retain: bool = False,
    layer: int = -1,
    from_layer: int | None = None,
    dropout: float = 0.1,
    weight: Weight = 0.3,
) -> Term:
    """DeepCUT: labels of the forget rows away from retained labels of their class, towards those of other classes.

    For token classifiers, and for sequence classifiers, whose rows have one label each. Only forget rows are anchors;
    cross-entropy on the retained rows has to stand beside it (`nll`). The mean is over the anchors of a step, so
    ``weight`` (the paper's gamma) means the same for every batch size. What decides the outcome is how many
    retain-only steps follow a step that forgets (``schedule.retain_steps``, 7 in our recipe) and when it stops, more
    than ``weight`` or ``temperature``; run to the end it pushes forgotten labels further than never-seen ones are.

    Args:
        form: Reading of the paper's Eq. 5: ``"ratio"`` (bounded below by ``-2 / tau`` plus a constant; came nearest to
            the retrained model in our trials) or ``"full"`` (never below 0, stalls earlier).
        anchors: ``"entity"``: labels whose contrast class is not 0; ``"all"`` labels; ``"pooled"``: one mean vector per
            row. Beware: in our trials ``"all"`` lost the retained rows and ``"pooled"`` did not forget.
        classes: What counts as a class of tags: the entity ``"type"``, or with its B- or I-, ``"prefixed"``.
        outside: Whether O is among the other classes. Without it retained quality fell in our trials; with a single
            entity type there is no other class.
        views: 2: retained labels count in a second, dropped-out view too, and the anchor's own second view stands in
            where the batch has no retained label of its class. 1: such anchors are skipped (``"ratio"``) and no block
            runs twice; no difference in our trials.
        contrast: Retained rows to contrast with: those of the batch (``"retain"``), rows that the schedule draws for
            contrast alone (``"drawn"``, needs ``schedule.contrast_batch``), or ``"both"``.
        temperature: ``tau``, above 0.
        detach_retain: No gradient into retained states.
        layer: Layer whose states are compared; -1 is what the classifier reads.
        from_layer: First block of the second view if not the one that computes ``layer``; 0 is SimCSE's whole pass.
        dropout: Rate of the second view, from 0 to below 1; the model's own dropout comes on top.
        weight: Weight of the term.

    Raises:
        UsageError: An option is none of the values above.

    Source: He et al. 2025, arXiv 2503.14900 (two views, ``temperature`` 0.1, ``weight`` 0.3). Anchors, views as a
    stand-in, contrast rows and the mean are ours.

    Example:
        >>> term = deepcut(views=1)
        >>> term.per, sorted(term.inputs)
        ('token', ['anchor', 'class_map', 'contrast', 'contrast_labels', 'labels'])
    """
    one_of("deepcut", "form", form, ("ratio", "full"))
    one_of("deepcut", "anchors", anchors, ("entity", "all", "pooled"))
    one_of("deepcut", "classes", classes, ("type", "prefixed"))
    one_of("deepcut", "contrast", contrast, tuple(CONTRAST))
    above_zero("deepcut", "temperature", temperature)
    if isinstance(views, bool) or views not in (1, 2):
        raise UsageError(f"deepcut: option 'views' is {views!r}: use 1 or 2")
    if layer == 0:
        raise UsageError("deepcut: option 'layer' is 0, the embeddings, which no block computes: use 1 or more, or -1")
    if not 0 <= dropout < 1:
        raise UsageError(f"deepcut: option 'dropout' is {dropout}: give a number from 0 to below 1")
    block = _first_block(layer) if from_layer is None else from_layer

    def again(side: str) -> View:
        return View(side, from_layer=block, dropout=dropout)

    sides: list[Side] = []
    for side in CONTRAST[contrast]:
        sides += [side, again(side)] if views == 2 else [side]
    inputs: dict[str, Product | tuple[Product, ...]] = {
        "anchor": at_labels("forget", layer),
        "labels": labels_of("forget"),
        "contrast": tuple(at_labels(side, layer) for side in sides),
        "contrast_labels": tuple(labels_of(side) for side in sides),
        "class_map": constant(f"class_map/{classes}"),
    }
    if views == 2:
        inputs["own_view"] = at_labels(again("forget"), layer)
    gathered = {"contrast", "contrast_labels"}
    pooled = anchors == "pooled"
    if pooled:
        inputs |= {"rows": token_rows("forget"), "contrast_rows": tuple(token_rows(side) for side in sides)}
        gathered.add("contrast_rows")
    how = Reading(form, anchors, outside, views == 2, temperature, detach_retain)
    fn = partial(deepcut_rows if pooled else deepcut_tokens, how=how)
    return Term(
        "deepcut",
        fn if views == 2 else partial(fn, own_view=None),
        inputs,
        over="forget",
        per="token",
        weight=weight,
        batch_coupled=True,
        gathered=frozenset(gathered),
        monitor=partial(deepcut_monitor, how=how),
        counts=partial(deepcut_counts, how=how),
    )
