"""Contrast by class: which retained labels stand against which forget labels, and DeepCUT's loss of each anchor.

Source: He et al. 2025, arXiv 2503.14900, whose Eq. 5 is not reachable in full: both readings of it are here. What the
paper leaves open (which labels are anchors, when the second view counts, mean over anchors) is our choice and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.objectives.arithmetic import unit_rows, upcast

#: Contrast class of what is outside of every entity. Labels that do not count have the class -1.
OUTSIDE = 0


@dataclass(frozen=True)
class Reading:
    """How DeepCUT's loss is read; `deepcut` says what the values mean.

    ``fallback`` says that an anchor without retained labels of its class has a second view to stand in for them.
    """

    form: str = "ratio"
    anchors: str = "entity"
    outside: bool = True
    fallback: bool = False
    temperature: float = 0.1
    detach_retain: bool = False


@dataclass(frozen=True)
class Pairs:
    """``same`` and ``other`` ``[n, m]`` bool: retained labels of an anchor's class, and those that it is pulled to.

    ``anchors [n]`` are the labels to move, ``usable [n]`` those of them that have what the loss needs.
    """

    anchors: Tensor
    usable: Tensor
    same: Tensor
    other: Tensor


def classes_of(labels: Tensor, class_map: Tensor) -> Tensor:
    """``[n]`` contrast classes of labels ``[n]``; -1 where a label is below 0 and must not count (ours).

    Example:
        >>> classes_of(torch.tensor([2, -100, 0]), torch.tensor([0, 1, 1])).tolist()
        [1, -1, 0]
    """
    found = class_map.to(labels.device)[labels.clamp_min(0)]
    return torch.where(labels >= 0, found, torch.full_like(found, -1))


def paired(own: Tensor, against: Tensor, how: Reading) -> Pairs:
    """Who stands against whom, from contrast classes of forget labels ``[n]`` and of retained labels ``[m]`` alone.

    The form ``"ratio"`` needs labels of the same class (or the fallback), both need some of another.

    Source: after He et al. 2025, arXiv 2503.14900; what is an anchor, and what is skipped, is ours.

    Example:
        >>> found = paired(torch.tensor([1, 0]), torch.tensor([1, 2]), Reading())
        >>> found.usable.tolist(), found.other[0].tolist()
        ([True, False], [False, True])
    """
    chosen = own >= OUTSIDE if how.anchors == "all" else own > OUTSIDE
    same = chosen[:, None] & (own[:, None] == against)
    other = chosen[:, None] & (own[:, None] != against) & (against >= (OUTSIDE if how.outside else OUTSIDE + 1))
    usable = chosen & other.any(1)
    if how.form == "ratio" and not how.fallback:
        usable &= same.any(1)
    return Pairs(chosen, usable, same, other)


def contrast_anchors(
    anchor: Tensor, contrast: Tensor, same: Tensor, other: Tensor, own_view: Tensor | None, how: Reading
) -> Tensor:
    """DeepCUT's loss of each anchor, ``[a]``: towards retained labels of other classes, away from those of its own.

    With ``s`` the cosines over ``tau``, ``P`` the same-class and ``N`` the other-class labels: the mean over ``N`` of
    ``-(s_a - log sum_P exp(s_p))`` (``"ratio"``) or of ``-(s_a - log sum_(P, N) exp(s_k))`` (``"full"``).

    Args:
        anchor: ``[a, D]`` states of the anchors.
        contrast: ``[m, D]`` states of the retained labels.
        same: ``[a, m]`` bool, ``P`` of each anchor.
        other: ``[a, m]`` bool, ``N`` of each anchor, none of them empty.
        own_view: ``[a, D]`` second view of the anchors, which is ``P`` where that is empty; or None.
        how: Form and temperature.

    Source: He et al. 2025, arXiv 2503.14900, Eq. 5 in two readings; ``"ratio"`` is the loss of Lee et al. 2024,
    arXiv 2401.10458, on cosines. The second view as a stand-in for ``P`` is ours.

    Example:
        >>> z, same = torch.eye(2), torch.tensor([[True, False]])
        >>> contrast_anchors(z[:1], z, same, ~same, None, Reading(temperature=0.5)).tolist()
        [2.0]
    """
    own = unit_rows(anchor)
    cosines = own @ unit_rows(contrast).T / how.temperature
    pull = (cosines * other).sum(1) / other.sum(1).clamp_min(1)
    push = [cosines.masked_fill(~(same if how.form == "ratio" else same | other), -torch.inf)]
    if own_view is not None:
        stand_in = (own * unit_rows(own_view)).sum(1) / how.temperature
        push.append(stand_in.masked_fill(same.any(1), -torch.inf)[:, None])
    return torch.cat(push, dim=1).logsumexp(1) - pull


def contrast_values(
    anchor: Tensor, own: Tensor, contrast: tuple[Tensor, ...], against: Tensor, own_view: Tensor | None, how: Reading
) -> Tensor:
    """``[n]`` values of `contrast_anchors` from states and contrast classes; 0 for what is not `Pairs.usable`.

    Args:
        anchor: ``[n, D]`` states of the forget labels.
        own: ``[n]`` their contrast classes.
        contrast: States of retained labels, ``m`` in all tensors together.
        against: ``[m]`` their contrast classes.
        own_view: ``[n, D]`` second view of the forget labels, or None.
        how: The reading.

    Source: He et al. 2025, arXiv 2503.14900.

    Example:
        >>> z, c = torch.eye(2), torch.tensor([1, 0])
        >>> contrast_values(z, c, (z,), c, None, Reading(temperature=0.5)).tolist()
        [2.0, 0.0]
    """
    pairs = paired(own, against, how)
    used = pairs.usable.nonzero()[:, 0]
    retained = torch.cat([upcast(states) for states in contrast])
    if how.detach_retain:
        retained = retained.detach()
    view = None if own_view is None else own_view[used]
    # Never skipped, also without anchors: every rank has to take part in gathering gradients.
    found = contrast_anchors(anchor[used], retained, pairs.same[used], pairs.other[used], view, how)
    return found.new_zeros(len(own)).index_put((used,), found)


@dataclass(frozen=True)
class Rows:
    """Labels put together by row: each row's class ``[B]``, the place of each label's row ``[n]``, what counts ``[n]``.

    Example:
        >>> made = Rows.of(torch.tensor([1, 2, 2, 0]), torch.tensor([3, 3, 3, 7]), torch.tensor([0, 1, 2]))
        >>> made.classes.tolist(), made.where.tolist()
        ([2, 0], [0, 0, 0, 1])
    """

    classes: Tensor
    where: Tensor
    known: Tensor

    @staticmethod
    def of(labels: Tensor, rows: Tensor, class_map: Tensor) -> Rows:
        """A row has the entity class that most of its labels have, 0 without an entity, -1 where no label counts."""
        numbers, where = rows.unique(return_inverse=True)
        classes = classes_of(labels, class_map)
        votes = torch.zeros(len(numbers), max(int(class_map.max()), 1) + 2, dtype=torch.int64, device=labels.device)
        votes.index_put_((where, classes + 1), torch.ones_like(classes), accumulate=True)
        most, entity = votes[:, 2:].max(1)
        without = torch.where(votes[:, 1] > 0, OUTSIDE, -1)
        return Rows(torch.where(most > 0, entity + 1, without), where, classes >= 0)

    def means(self, states: Tensor) -> Tensor:
        """``[B, D]`` mean of states ``[n, D]`` over the labels of a row that count."""
        states = upcast(states)
        weight = self.known.to(states.dtype)
        total = states.new_zeros(len(self.classes), states.shape[1]).index_add(0, self.where, states * weight[:, None])
        return total / self.sums(weight).clamp_min(1)[:, None]

    def sums(self, values: Tensor) -> Tensor:
        """``[B]`` sums of ``values [n]`` over the labels of a row."""
        return values.new_zeros(len(self.classes)).index_add(0, self.where, values)
