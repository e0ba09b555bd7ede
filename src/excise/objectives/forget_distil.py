"""Forget losses with strangers for teachers: say of the forget rows what models say that never saw them.

Conventions as in `forget`: pure functions in fp32 at least, and factories.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.forward import constant, logits, row_numbers, token_index, token_logp
from excise.objectives.arithmetic import above_zero, upcast
from excise.objectives.term import Term, Weight

#: The constant that holds what models say of the forget rows that never saw them.
NEVER_SAW = "never_saw"
_SAID = {"rows": row_numbers("forget"), "places": token_index("forget"), "said": constant(NEVER_SAW)}


def distil_tokens(logits: Tensor, rows: Tensor, places: Tensor, said: Mapping[str, Tensor]) -> Tensor:
    """Divergence from what was said of each label by a model that never saw it, ``[n]``: ``KL(said || p)`` in nats.

    It is two-sided: a word that the model takes for an entity where a stranger would not costs as much as the reverse,
    and there is nothing left to push once it says what a stranger says. Of a vocabulary only the stranger's likeliest
    tokens and the label are told apart, all others count as one: the divergence is then a lower bound, which is 0 where
    those are as likely as to the stranger.

    Args:
        logits: ``[n, C]``.
        rows: ``[n]`` the number of each label's row within its side.
        places: ``[n]`` the label's place in its row.
        said: Of every label of the side, rows one after the other: ``classes [N, K]``, those that are told apart, each
            once, and ``logp``, how likely they are, ``[N, K]`` or, where there are others, ``[N, K + 1]``: those as
            well, together; ``starts [rows]``, where each row begins.

    Source: distillation is Hinton et al. 2015, arXiv 1503.02531; from models that never saw the rows, ours.

    Example:
        >>> said = {"classes": torch.tensor([[2]]), "logp": torch.tensor([[0.5, 0.5]]).log()}
        >>> at, said["starts"] = torch.tensor([0]), torch.tensor([0])
        >>> distil_tokens(torch.tensor([[1.0, 1.0, 2.0]]).log(), at, at, said).tolist()
        [0.0]
    """
    label = said["starts"][rows] + places
    z, classes = upcast(logits), said["classes"][label].long()
    teacher, ours = said["logp"][label].to(z), z.gather(-1, classes)
    if classes.shape[1] < z.shape[1]:
        ours = torch.cat([ours, z.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    return (teacher.exp() * (teacher - ours + z.logsumexp(-1, keepdim=True))).sum(-1)


def distil(weight: Weight = 1.0) -> Term:
    """Learn to say of the forget rows what models say that never saw them (``data.never_saw``), mean over all labels.

    The models are read once, before training. Of a tagger words outside of entities count as all others: a stranger
    takes some of them for entities.

    Args:
        weight: Weight of the term.

    Source: distillation is Hinton et al. 2015, arXiv 1503.02531; from models that never saw the rows, ours.

    Example:
        >>> distil().inputs["said"].detail
        'never_saw'
    """
    inputs = {"logits": logits("forget"), **_SAID}
    return Term("distil", distil_tokens, inputs, over="forget", per="token", weight=weight)


def likelihood_tokens(
    logp: Tensor, rows: Tensor, places: Tensor, said: Mapping[str, Tensor], *, delta: float
) -> Tensor:
    """Huber distance of each label's log-probability to what a model gave it that never saw it, ``[n]``.

    `distil_tokens` hardly minds a label that is too likely as long as all others together are likely enough: a token at
    .03 where a stranger has .0001 costs it .03 nats, and gives a member away. Here the distance is that of logarithms.

    Args:
        logp: ``[n]`` log-probabilities of the labels.
        rows: As in `distil_tokens`, as ``places``.
        places: See ``rows``.
        said: ``labels [N]``, log-probabilities of every label of the side, rows one after the other; ``starts [rows]``.
        delta: Distance in nats where its square turns into its absolute value, above 0.

    Source: ours; the distance is Huber 1964's.

    Example:
        >>> at, said = torch.tensor([0]), {"labels": torch.tensor([-5.0]), "starts": torch.tensor([0])}
        >>> likelihood_tokens(torch.tensor([-3.0]), at, at, said, delta=1.0).tolist()
        [1.5]
    """
    own = upcast(logp)
    return F.huber_loss(own, said["labels"][said["starts"][rows] + places].to(own), reduction="none", delta=delta)


def likelihood(delta: float = 1.0, weight: Weight = 1.0) -> Term:
    """Make every label of the forget rows as likely as it is to models that never saw them, no less and no more.

    What `quantile` aims at with never-seen rows, label by label: who never saw an easy row still finds it easy.

    Args:
        delta: Distance in nats up to which the loss is quadratic; beyond it every label pulls alike.
        weight: Weight of the term.

    Raises:
        UsageError: ``delta`` is not above 0.

    Source: ours; Huber's distance as in Dabney et al. 2017, arXiv 1710.10044.

    Example:
        >>> likelihood().inputs["said"].detail
        'never_saw'
    """
    above_zero("likelihood", "delta", delta)
    fn, inputs = partial(likelihood_tokens, delta=delta), {"logp": token_logp("forget"), **_SAID}
    return Term("likelihood", fn, inputs, over="forget", per="token", weight=weight)
