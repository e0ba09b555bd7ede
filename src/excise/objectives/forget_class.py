"""Forget losses of classifiers that name another target: other labels, or a teacher that knows nothing.

Conventions as in `forget`: pure functions in fp32 at least, and factories. What is random is a function of the seed,
the row and the label's place in it, so a row has the same target in every epoch, batch split and on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.forward import REFERENCE, Product, at_labels, constant, logits, row_numbers, token_index
from excise.forward import labels as labels_of
from excise.objectives.arithmetic import at_least_zero, one_of, upcast
from excise.objectives.class_contrast import OUTSIDE, classes_of
from excise.objectives.term import Term, Weight

# --- other labels -------------------------------------------------------------------------------------------------


def counted(labels: Tensor, class_map: Tensor | None, **_: Any) -> Tensor:
    """``[n]`` 1 for labels that are relabelled, 0 for others: those of entities, or without a ``class_map`` all.

    Args:
        labels: ``[n]`` classes; those below 0 do not count.
        class_map: ``[C]`` contrast class of each class; 0 is "outside".
        **_: Whatever else a term reads.

    Source: ours.

    Example:
        >>> counted(torch.tensor([0, 2, -100]), torch.tensor([0, 1, 1])).tolist()
        [0.0, 1.0, 0.0]
    """
    chosen = labels >= 0 if class_map is None else classes_of(labels, class_map) > OUTSIDE
    return chosen.float()


def _cross_entropy(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    z = upcast(logits)
    values = z.logsumexp(-1) - z.gather(-1, target[:, None]).squeeze(-1)
    return values * counts.to(values.dtype)


def outside_tokens(logits: Tensor, labels: Tensor, class_map: Tensor, *, only_entities: bool) -> Tensor:
    """Cross-entropy to O, ``[n]``; 0 where a label is not relabelled.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` classes.
        class_map: ``[C]`` contrast class of each class; O is the one with 0.
        only_entities: Leave labels that are O already alone.

    Raises:
        UsageError: No class is O, as in text classification.

    Source: ours; the plainest of relabellings (Graves et al. 2021, arXiv 2010.10981, draw the label instead).

    Example:
        >>> z, y = torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1, 0])
        >>> outside_tokens(z, y, torch.tensor([0, 1]), only_entities=True).tolist()
        [0.6931471824645996, 0.0]
    """
    outside = (class_map == OUTSIDE).nonzero()
    if not len(outside):
        raise UsageError("relabel: no class is O: use to: random")
    target = torch.full_like(labels, int(outside[0]))
    return _cross_entropy(logits, target, counted(labels, class_map if only_entities else None))


def random_tokens(
    logits: Tensor, labels: Tensor, rows: Tensor, places: Tensor, seed: Tensor, class_map: Tensor | None
) -> Tensor:
    """Cross-entropy to a class drawn among the others, ``[n]``; 0 where a label is not relabelled.

    Args:
        logits: ``[n, C]`` with ``C >= 2``.
        labels: ``[n]`` classes.
        rows: ``[n]`` the number of each label's row within its side.
        places: ``[n]`` the label's place in its row.
        seed: The run's, without axes.
        class_map: ``[C]``, to leave alone what is O; None relabels everything.

    Source: Graves et al. 2021 (amnesiac unlearning), arXiv 2010.10981.

    Example:
        >>> z, y, at = torch.zeros(2, 4), torch.tensor([1, 2]), torch.tensor([0, 1])
        >>> [round(v, 4) for v in random_tokens(z, y, at, at, torch.tensor(0), None).tolist()]
        [1.3863, 1.3863]
    """
    return _cross_entropy(logits, drawn(labels, rows, places, seed, logits.shape[1]), counted(labels, class_map))


def drawn(labels: Tensor, rows: Tensor, places: Tensor, seed: Tensor, classes: int) -> Tensor:
    """``[n]`` another class for each label, uniform over the others: a function of (seed, row, place) alone (ours).

    Example:
        >>> one = torch.tensor([1])
        >>> bool(drawn(one, one, one, torch.tensor(3), 2) == 0)
        True
    """
    mixed = seed.to(labels.device).expand_as(rows)
    for part in (rows, places):
        mixed = _mixed(mixed + (part + 1) * _STEP)
    return (labels.clamp_min(0) + 1 + (mixed & (2**63 - 1)) % (classes - 1)) % classes


_STEP = 0x9E3779B97F4A7C15 - 2**64


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014); int64 products wrap as unsigned ones do."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def relabel(
    to: Literal["outside", "random"] = "outside",
    labels: Literal["entity", "all"] = "entity",
    weight: Weight = 1.0,
) -> Term:
    """Learn other labels for the forget rows by plain cross-entropy, mean over what is relabelled.

    Args:
        to: ``"outside"``: the label O. ``"random"``: another class, drawn by (seed, row, place).
        labels: Relabel those of an ``"entity"``, or ``"all"`` (for text classifiers the same).
        weight: Weight of the term.

    Raises:
        UsageError: An option is none of the values above.

    Source: Graves et al. 2021 (amnesiac unlearning), arXiv 2010.10981; O as the target is ours.

    Example:
        >>> sorted(relabel().inputs)
        ['class_map', 'labels', 'logits']
    """
    one_of("relabel", "to", to, ("outside", "random"))
    one_of("relabel", "labels", labels, ("entity", "all"))
    inputs: dict[str, Product | tuple[Product, ...]] = {"logits": logits("forget"), "labels": labels_of("forget")}
    entity = labels == "entity"
    if entity or to == "outside":
        inputs["class_map"] = constant("class_map/type")
    fn: Callable[..., Tensor] = partial(outside_tokens, only_entities=entity)
    if to == "random":
        inputs |= {"rows": row_numbers("forget"), "places": token_index("forget"), "seed": constant("seed")}
        fn = random_tokens if entity else partial(random_tokens, class_map=None)
    counts = counted if entity else None
    return Term("relabel", fn, inputs, over="forget", per="token", weight=weight, counts=counts)


# --- a teacher that knows nothing ---------------------------------------------------------------------------------


def bad_teacher_tokens(logits: Tensor, states: Tensor, seed: Tensor, *, spread: float) -> Tensor:
    """Divergence from an incompetent teacher, ``[n]``: ``KL(teacher || p)`` in nats.

    The teacher is a fresh head on the states of the model before unlearning, ``z = spread * W h`` with ``W`` standard
    normal and drawn from the seed: what a classifier with an untrained head would say, without a second model.

    Args:
        logits: ``[n, C]`` of the model.
        states: ``[n, D]`` of the model before unlearning, at the labels; receives no gradient.
        seed: The run's, without axes.
        spread: Standard deviation of the teacher's weights; 0 is the uniform teacher.

    Source: Chundawat et al. 2023, arXiv 2205.08096, whose teacher is a whole untrained model.

    Example:
        >>> bad_teacher_tokens(torch.zeros(1, 3), torch.ones(1, 2), torch.tensor(0), spread=0.0).tolist()
        [0.0]
    """
    generator = torch.Generator().manual_seed(int(seed))
    states = upcast(states).detach()
    head = torch.randn(logits.shape[1], states.shape[1], generator=generator, dtype=torch.float64)
    return _divergence((spread * states @ head.to(states).T).log_softmax(-1), logits)


def _divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """``KL(teacher || p)``, ``[n]``, of log-probabilities and logits ``[n, C]``."""
    return (teacher.exp() * (teacher - upcast(logits).log_softmax(-1))).sum(-1)


def bad_teacher(spread: float = 0.02, weight: Weight = 1.0) -> Term:
    """The forgetting half of the bad teacher; its other half is `excise.objectives.retain.kl` on the retained rows.

    Args:
        spread: As in `bad_teacher_tokens`; 0.02 as fresh heads of transformers are drawn.
        weight: Weight of the term.

    Raises:
        UsageError: ``spread`` is negative.

    Source: Chundawat et al. 2023, arXiv 2205.08096; the head in place of a whole teacher is ours.

    Example:
        >>> bad_teacher().inputs["states"].model
        'reference'
    """
    at_least_zero("bad_teacher", "spread", spread)
    inputs = {"logits": logits("forget"), "states": at_labels("forget", -1, REFERENCE), "seed": constant("seed")}
    fn = partial(bad_teacher_tokens, spread=spread)
    return Term("bad_teacher", fn, inputs, over="forget", per="token", weight=weight)
