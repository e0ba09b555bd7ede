"""Forget losses that read more than label log-probabilities: whole logits (hinge, distillation, flattening), states.

Conventions as in `forget`: pure functions in fp32 at least, and factories. Terms on logits are ``per="token"``, so
that the engine may evaluate them in chunks and never holds all logits of a batch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.forward import REFERENCE, constant, hidden, labels, logits, mask, token_index
from excise.objectives.arithmetic import at_least_zero, row_means, upcast
from excise.objectives.term import Term, Weight

# --- forms that read all logits -----------------------------------------------------------------------------------


def ihl_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Inverted hinge, ``[n]`` in [0, 2]: ``max(0, 1 + p_y - max of p over the other tokens)``.

    Moves probability from the label to its runner-up instead of spreading it over the vocabulary.

    Args:
        logits: ``[n, V]``, any real dtype.
        labels: ``[n]`` label tokens.

    Source: Cha et al. 2024 (LoKU), arXiv 2408.06621. Written with the two largest logits, so no one-hot of size
    ``[n, V]`` and no softmax are stored.

    Example:
        >>> ihl_tokens(torch.tensor([[30.0, 0.0]]), torch.tensor([0])).tolist()
        [2.0]
    """
    z = upcast(logits)
    normaliser = z.logsumexp(-1)
    own = z.gather(-1, labels[:, None]).squeeze(-1)
    top = z.topk(2, dim=-1)
    other = torch.where(top.indices[:, 0] == labels, top.values[:, 1], top.values[:, 0])
    return (1 + (own - normaliser).exp() - (other - normaliser).exp()).clamp_min(0.0)


def ihl(weight: Weight = 1.0) -> Term:
    """Inverted hinge loss of LoKU.

    Source: Cha et al. 2024 (LoKU), arXiv 2408.06621.

    Example:
        >>> sorted(ihl().inputs)
        ['labels', 'logits']
    """
    inputs = {"logits": logits("forget"), "labels": labels("forget")}
    return Term("ihl", ihl_tokens, inputs, over="forget", per="token", weight=weight)


def undial_tokens(logits: Tensor, ref_logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Self-distillation with a weakened label, ``[n]``: ``CE(softmax(z_ref - beta onehot(y)), z)``.

    Args:
        logits: ``[n, V]`` of the model.
        ref_logits: ``[n, V]`` of the model before unlearning, at the same positions.
        labels: ``[n]`` label tokens.
        beta: What is taken off the label's reference logit; 0 distils the reference unchanged.

    Source: Dong et al. 2024, arXiv 2402.10052. Only label positions are read; the peer averages over prompt and
    padding too.

    Example:
        >>> z = torch.zeros(1, 4)
        >>> round(float(undial_tokens(z, z, torch.tensor([2]), beta=0.0)), 4)
        1.3863
    """
    taken = torch.full_like(labels, -beta, dtype=upcast(ref_logits).dtype)
    teacher = upcast(ref_logits).detach().scatter_add(-1, labels[:, None], taken[:, None])
    return -(teacher.softmax(-1) * upcast(logits).log_softmax(-1)).sum(-1)


def undial(beta: float = 10.0, weight: Weight = 1.0) -> Term:
    """Self-distillation with a weakened label; ``beta`` 10 as in open-unlearning (the authors give 3, 10, 30).

    Raises:
        UsageError: ``beta`` is negative.

    Source: Dong et al. 2024, arXiv 2402.10052.

    Example:
        >>> undial().inputs["ref_logits"].model
        'reference'
    """
    at_least_zero("undial", "beta", beta)
    inputs = {
        "logits": logits("forget"),
        "ref_logits": logits("forget", REFERENCE),
        "labels": labels("forget"),
    }
    return Term("undial", partial(undial_tokens, beta=beta), inputs, over="forget", per="token", weight=weight)


def pdu_tokens(logits: Tensor) -> Tensor:
    """Logit flattening, ``[n]``: ``(max of z - mean of z)^2``, zero for a uniform prediction.

    Args:
        logits: ``[n, V]``, at the positions that predict a label (the peer's mask is off by one).

    Source: Entesari et al. 2025 (PDU), arXiv 2506.05314.

    Example:
        >>> pdu_tokens(torch.tensor([[3.0, 0.0, 0.0]])).tolist()
        [4.0]
    """
    z = upcast(logits)
    return (z.amax(-1) - z.mean(-1)).square()


def pdu(weight: Weight = 1.0) -> Term:
    """Logit flattening; the method's other half is the retain term `excise.objectives.retain.primal_dual`.

    Source: Entesari et al. 2025 (PDU), arXiv 2506.05314.

    Example:
        >>> pdu().per
        'token'
    """
    return Term("pdu", pdu_tokens, {"logits": logits("forget")}, over="forget", per="token", weight=weight)


def ceu_tokens(logits: Tensor, labels: Tensor, token_index: Tensor, *, skip: int) -> Tensor:
    """Cross-entropy to the model's own prediction without the label, ``[n]``: ``CE(softmax(sg(z), z_y = -inf), z)``.

    Args:
        logits: ``[n, V]`` with ``V >= 2``.
        labels: ``[n]`` label tokens.
        token_index: ``[n]`` place of each token in its answer, from 0.
        skip: First tokens of an answer that are left alone; their value is 0.

    Source: Yang 2025 (CE-U), arXiv 2503.01224. Skipped tokens stay in the engine's count of tokens, so the mean is
    smaller than the paper's by the share of skipped tokens; the weight absorbs it.

    Example:
        >>> z = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
        >>> [round(value, 4) for value in ceu_tokens(z, torch.tensor([0, 0]), torch.tensor([0, 1]), skip=1).tolist()]
        [0.0, 0.6931]
    """
    z = upcast(logits)
    target = z.detach().scatter(-1, labels[:, None], float("-inf")).softmax(-1)
    values = -(target * z.log_softmax(-1)).sum(-1)
    return values * (token_index >= skip).to(values.dtype)


def ceu(skip: int = 1, weight: Weight = 1.0) -> Term:
    """Cross-entropy to the prediction without the label; the first answer token is skipped as in the paper's code.

    Raises:
        UsageError: ``skip`` is negative.

    Source: Yang 2025 (CE-U), arXiv 2503.01224.

    Example:
        >>> ceu().name
        'ceu'
    """
    at_least_zero("ceu", "skip", skip)
    inputs = {"logits": logits("forget"), "labels": labels("forget"), "token_index": token_index("forget")}
    return Term("ceu", partial(ceu_tokens, skip=skip), inputs, over="forget", per="token", weight=weight)


# --- forms that read states ---------------------------------------------------------------------------------------


def rmu_direction(width: int, *, seed: int = 0, signed: bool = False) -> Tensor:
    """``[width]`` fp32 unit vector that `rmu` steers towards; the run's constant ``"rmu_direction"``.

    The official direction is drawn from the uniform distribution on [0, 1): every entry is positive, so two seeds give
    directions with a cosine near 0.75 and not 0. ``signed`` draws from a normal distribution instead (ours).

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218, and its code.

    Example:
        >>> bool((rmu_direction(8) >= 0).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn if signed else torch.rand
    return F.normalize(draw(width, generator=generator), dim=0)


def rmu_rows(states: Tensor, where: Tensor, direction: Tensor, *, steering: float) -> Tensor:
    """Steer the states of forget answers to a random point, ``[B]``: mean over tokens and width of ``(h - c u)^2``.

    Args:
        states: ``[B, T, D]`` hidden states.
        where: ``[B, T]`` bool, the answer positions; others are not read.
        direction: ``[D]`` the unit vector ``u``.
        steering: The length ``c`` of the point that is steered to, in units of the states.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218. The mean is per row, then over rows, as in the official code.

    Example:
        >>> h, u = torch.zeros(1, 2, 4), torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> rmu_rows(h, torch.tensor([[True, False]]), u, steering=2.0).tolist()
        [1.0]
    """
    target = steering * direction.to(states.device)
    return row_means((upcast(states[where]) - target).square().mean(-1), where)


def rmu(layer: int = 8, steering: float = 2.0, weight: Weight = 1.0) -> Term:
    """Representation misdirection; layer 8 is the output of block 7, the paper's choice for a model of 32 blocks.

    ``steering`` 2 as in open-unlearning (the paper takes 6.5 for Zephyr). Set ``layer`` for the depth of your model:
    about a quarter of it. Its retain term is `excise.objectives.retain.rmu_retain` at the same layer.

    Raises:
        UsageError: ``steering`` is negative.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218.

    Example:
        >>> rmu(layer=3).inputs["states"].layer
        3
    """
    at_least_zero("rmu", "steering", steering)
    inputs = {
        "states": hidden("forget", layer),
        "where": mask("forget", "answer"),
        "direction": constant("rmu_direction"),
    }
    return Term("rmu", partial(rmu_rows, steering=steering), inputs, over="forget", weight=weight)
