"""Forget losses with strangers for teachers: say of the forget rows what models say that never saw them.

Conventions as in `forget`: pure functions in fp32 at least, and factories.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from excise.forward import constant, named_logp, row_numbers, token_index
from excise.objectives.arithmetic import above_zero, upcast
from excise.objectives.term import Term, Weight

#: The constant that holds what models say of the forget rows that never saw them: ``classes``, ``logp``, ``starts``, as
#: `named_logp` reads them, and which of its classes each ``label`` is.
NEVER_SAW = "never_saw"
_SAID = {
    "logp": named_logp("forget", NEVER_SAW),
    "rows": row_numbers("forget"),
    "places": token_index("forget"),
    "said": constant(NEVER_SAW),
}


def _told(rows: Tensor, places: Tensor, said: Mapping[str, Tensor], what: str) -> Tensor:
    own = said[what][said["starts"][rows] + places]
    return upcast(own) if own.is_floating_point() else own


def distil_tokens(logp: Tensor, rows: Tensor, places: Tensor, said: Mapping[str, Tensor]) -> Tensor:
    """Divergence from what was said of each label by a model that never saw it, ``[n]``: ``KL(said || p)`` in nats.

    It is two-sided: a word that the model takes for an entity where a stranger would not costs as much as the reverse,
    and there is nothing left to push once it says what a stranger says. Of a vocabulary only the stranger's likeliest
    tokens and the label are told apart, all others count as one: the divergence is then a lower bound, which is 0 where
    those are as likely as to the stranger.

    Args:
        logp: Log-probabilities of those classes, ``[n, K]`` or, where there are others, ``[n, K + 1]``: those as well,
            together (`named_logp`).
        rows: ``[n]`` the number of each label's row within its side.
        places: ``[n]`` the label's place in its row.
        said: Of every label of the side, rows one after the other: ``logp [N, K]`` or ``[N, K + 1]``, how likely the
            classes are to who never saw the row; ``starts [rows]``, where each row begins.

    Source: distillation is Hinton et al. 2015, arXiv 1503.02531; from models that never saw the rows, ours.

    Example:
        >>> import torch
        >>> at, even = torch.tensor([0]), torch.tensor([[0.5, 0.5]]).log()
        >>> distil_tokens(even, at, at, {"logp": even, "starts": at}).tolist()
        [0.0]
    """
    teacher, ours = _told(rows, places, said, "logp"), upcast(logp)
    return (teacher.exp() * (teacher - ours)).sum(-1)


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
    return Term("distil", distil_tokens, _SAID, over="forget", per="token", weight=weight)


def likelihood_tokens(
    logp: Tensor, rows: Tensor, places: Tensor, said: Mapping[str, Tensor], *, delta: float
) -> Tensor:
    """Huber distance of each label's log-probability to what a model gave it that never saw it, ``[n]``.

    `distil_tokens` hardly minds a label that is too likely as long as all others together are likely enough: a token at
    .03 where a stranger has .0001 costs it .03 nats, and gives a member away. Here the distance is that of logarithms.

    Args:
        logp: As in `distil_tokens`, as ``rows`` and ``places``.
        rows: See ``logp``.
        places: See ``logp``.
        said: As there, and ``label [N]``, which of its classes each label is.
        delta: Distance in nats where its square turns into its absolute value, above 0.

    Source: ours; the distance is Huber 1964's.

    Example:
        >>> import torch
        >>> at, ours = torch.tensor([0]), torch.tensor([[-3.0, -0.2]])
        >>> said = {"logp": torch.tensor([[-5.0, -0.1]]), "label": at, "starts": at}
        >>> likelihood_tokens(ours, at, at, said, delta=1.0).tolist()
        [1.5]
    """
    label = _told(rows, places, said, "label")[:, None]
    own, target = upcast(logp).gather(-1, label), _told(rows, places, said, "logp").gather(-1, label)
    return F.huber_loss(own, target.to(own), reduction="none", delta=delta)[:, 0]


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
    return Term("likelihood", partial(likelihood_tokens, delta=delta), _SAID, over="forget", per="token", weight=weight)
