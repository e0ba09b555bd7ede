"""Forget losses that read label log-probabilities: gradient ascent, its weighted forms, preference forms, refusals.

Each loss is a pure function, one value per row or token, and a factory that wires it to what it reads. The functions
compute in fp32 at least and keep fp64. Losses that read whole logits or states are in `forget_wide`. Notation of the
sources: ``p`` the model, ``p_ref`` the model before unlearning, ``y`` the label token, ``z`` logits, ``sg``
stop-gradient. "open-unlearning" is github.com/locuslab/open-unlearning, the origin of several default values.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.forward import REFERENCE, label_count, seq_logp, token_logp
from excise.objectives.arithmetic import above_zero, at_least_zero, upcast
from excise.objectives.term import Term, Weight

# --- gradient ascent and its weighted forms -----------------------------------------------------------------------


def ga_tokens(logp: Tensor) -> Tensor:
    """Gradient ascent, ``[n]``: the log-probability of each label token, to be lowered. Unbounded below.

    Args:
        logp: ``[n]`` log-probabilities in nats.

    Source: Jang et al. 2022, arXiv 2210.01504.

    Example:
        >>> ga_tokens(torch.tensor([-0.5])).tolist()
        [-0.5]
    """
    return upcast(logp)


def ga(weight: Weight = 1.0) -> Term:
    """Gradient ascent; with a retain term this is GradDiff.

    Source: Jang et al. 2022, arXiv 2210.01504; GradDiff: Maini et al. 2024, arXiv 2401.06121.

    Example:
        >>> ga().per
        'token'
    """
    return Term("ga", ga_tokens, {"logp": token_logp("forget")}, over="forget", per="token", weight=weight)


def wga_tokens(logp: Tensor, *, beta: float) -> Tensor:
    """Weighted gradient ascent, ``[n]``: ``sg(p^beta) log p``, so that a token once forgotten is left alone.

    Args:
        logp: ``[n]`` log-probabilities in nats.
        beta: Exponent; 0 is gradient ascent.

    Source: Wang et al. 2025, arXiv 2502.19301.

    Example:
        >>> round(float(wga_tokens(torch.tensor([0.5]).log(), beta=1.0)), 4)
        -0.3466
    """
    logp = upcast(logp)
    return (beta * logp.detach()).exp() * logp


def wga(beta: float = 1.0, weight: Weight = 1.0) -> Term:
    """Weighted gradient ascent; ``beta`` 1 as in open-unlearning.

    Raises:
        UsageError: ``beta`` is negative.

    Source: Wang et al. 2025, arXiv 2502.19301.

    Example:
        >>> wga(beta=0.5).name
        'wga'
    """
    at_least_zero("wga", "beta", beta)
    fn = partial(wga_tokens, beta=beta)
    return Term("wga", fn, {"logp": token_logp("forget")}, over="forget", per="token", weight=weight)


def satimp_tokens(logp: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Saturation-importance ascent, ``[n]``: ``sg(p^beta1 (1 - p)^beta2) log p``.

    Args:
        logp: ``[n]`` log-probabilities in nats.
        beta1: Exponent of ``p``: leaves forgotten tokens alone.
        beta2: Exponent of ``1 - p``: leaves tokens alone that any model gets right.

    Source: Yang et al. 2025, arXiv 2505.11953.

    Example:
        >>> round(float(satimp_tokens(torch.tensor([0.5]).log(), beta1=1.0, beta2=1.0)), 4)
        -0.1733
    """
    logp = upcast(logp)
    held = logp.detach()
    importance = (-torch.expm1(held)).clamp_min(0.0) ** beta2  # rounding may leave log p a hair above 0
    return (beta1 * held).exp() * importance * logp


def satimp(beta1: float = 5.0, beta2: float = 1.0, weight: Weight = 1.0) -> Term:
    """Saturation-importance ascent; exponents 5 and 1 as in open-unlearning, whose preset weighs it 0.1.

    Raises:
        UsageError: An exponent is negative.

    Source: Yang et al. 2025, arXiv 2505.11953.

    Example:
        >>> satimp(weight=0.1).weight
        0.1
    """
    at_least_zero("satimp", "beta1", beta1)
    at_least_zero("satimp", "beta2", beta2)
    fn = partial(satimp_tokens, beta1=beta1, beta2=beta2)
    return Term("satimp", fn, {"logp": token_logp("forget")}, over="forget", per="token", weight=weight)


# --- preference forms ---------------------------------------------------------------------------------------------


def npo_rows(logp: Tensor, ref_logp: Tensor, *, beta: float) -> Tensor:
    """Negative preference optimisation, ``[B]``: push the answer below the reference, gently once it is there.

    ``-(2 / beta) log sigmoid(-beta (logp - ref_logp))``; its gradient tends to that of gradient ascent on the summed
    log-probability as ``beta`` tends to 0.

    Args:
        logp: ``[B]`` summed log-probability of each answer, nats.
        ref_logp: ``[B]`` the same by the model before unlearning.
        beta: Inverse temperature, above 0.

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.

    Example:
        >>> round(float(npo_rows(torch.tensor([-3.0]), torch.tensor([-3.0]), beta=0.1)), 3)
        13.863
    """
    return -(2 / beta) * F.logsigmoid(-beta * (upcast(logp) - upcast(ref_logp)))


def npo(beta: float = 0.1, weight: Weight = 1.0) -> Term:
    """Negative preference optimisation; ``beta`` 0.1 as in the paper.

    Raises:
        UsageError: ``beta`` is not above 0.

    Source: Zhang et al. 2024, arXiv 2404.05868.

    Example:
        >>> sorted(npo().inputs)
        ['logp', 'ref_logp']
    """
    above_zero("npo", "beta", beta)
    inputs = {"logp": seq_logp("forget"), "ref_logp": seq_logp("forget", REFERENCE)}
    return Term("npo", partial(npo_rows, beta=beta), inputs, over="forget", weight=weight)


def simnpo_rows(logp: Tensor, count: Tensor, *, beta: float, delta: float) -> Tensor:
    """Reference-free NPO, ``[B]``: ``-(2 / beta) log sigmoid(beta (nll / count - delta))``.

    The answer's length divides its negative log-likelihood, so long answers are not pushed harder than short ones.

    Args:
        logp: ``[B]`` summed log-probability of each answer, nats.
        count: ``[B]`` label tokens of each answer.
        beta: Inverse temperature, above 0.
        delta: Margin: the mean negative log-likelihood that is aimed past, nats per token.

    Source: Fan et al. 2024, arXiv 2410.07163. The count is that of the tokens that were summed; the peer divides by
    the unshifted count, off by one where position 0 is labelled.

    Example:
        >>> round(float(simnpo_rows(torch.tensor([-4.0]), torch.tensor([4.0]), beta=2.0, delta=1.0)), 4)
        0.6931
    """
    per_token = upcast(logp) / count.clamp_min(1)
    return -(2 / beta) * F.logsigmoid(-beta * (per_token + delta))


def simnpo(beta: float = 4.5, delta: float = 0.0, weight: Weight = 1.0) -> Term:
    """Reference-free NPO; ``beta`` 4.5 and ``delta`` 0 as in open-unlearning, whose preset weighs it 0.125.

    Raises:
        UsageError: ``beta`` is not above 0.

    Source: Fan et al. 2024, arXiv 2410.07163.

    Example:
        >>> simnpo(beta=2.5, weight=0.125).over
        'forget'
    """
    above_zero("simnpo", "beta", beta)
    inputs = {"logp": seq_logp("forget"), "count": label_count("forget")}
    return Term("simnpo", partial(simnpo_rows, beta=beta, delta=delta), inputs, over="forget", weight=weight)


def dpo_rows(winner: Tensor, ref_winner: Tensor, loser: Tensor, ref_loser: Tensor, *, beta: float) -> Tensor:
    """Direct preference for another answer, ``[B]``: ``-(2 / beta) log sigmoid(beta (winner gain - loser gain))``.

    A gain is the summed log-probability minus that of the reference. The factor is NPO's 2 / beta, so that the scales
    of the two agree; the original paper has 1.

    Args:
        winner: ``[B]`` summed log-probability of the answer to be given instead, nats.
        ref_winner: ``[B]`` the same by the model before unlearning.
        loser: ``[B]`` summed log-probability of the answer to be forgotten.
        ref_loser: ``[B]`` the same by the model before unlearning.
        beta: Inverse temperature, above 0.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; the factor as in open-unlearning.

    Example:
        >>> zero = torch.zeros(1)
        >>> round(float(dpo_rows(zero, zero, zero, zero, beta=1.0)), 4)
        1.3863
    """
    gain = (upcast(winner) - upcast(ref_winner)) - (upcast(loser) - upcast(ref_loser))
    return -(2 / beta) * F.logsigmoid(beta * gain)


def _preference(name: str, beta: float, weight: Weight) -> Term:
    above_zero(name, "beta", beta)
    inputs = {
        "winner": seq_logp("forget_alternative"),
        "ref_winner": seq_logp("forget_alternative", REFERENCE),
        "loser": seq_logp("forget"),
        "ref_loser": seq_logp("forget", REFERENCE),
    }
    return Term(name, partial(dpo_rows, beta=beta), inputs, over="forget", weight=weight)


def dpo(beta: float = 0.1, weight: Weight = 1.0) -> Term:
    """Prefer the aligned alternative (a refusal: "IdkDPO") to the forget answer; ``beta`` 0.1.

    Raises:
        UsageError: ``beta`` is not above 0.

    Source: Rafailov et al. 2023, arXiv 2305.18290; on refusals: Maini et al. 2024, arXiv 2401.06121.

    Example:
        >>> dpo().inputs["winner"].side
        'forget_alternative'
    """
    return _preference("dpo", beta, weight)


def altpo(beta: float = 0.05, weight: Weight = 1.0) -> Term:
    """The same preference towards plausible other answers, written beforehand by the model itself.

    The function is `dpo_rows`; what differs is the data: several alternatives per question instead of a refusal. The
    default ``beta`` is the gentlest of the authors' grid 0.05, 0.1, 0.5 (the choice is ours).

    Raises:
        UsageError: ``beta`` is not above 0.

    Source: Mekala et al. 2024, arXiv 2409.13474.

    Example:
        >>> altpo().name
        'altpo'
    """
    return _preference("altpo", beta, weight)


def nll_tokens(logp: Tensor) -> Tensor:
    """Negative log-likelihood of each label token, ``[n]``.

    Args:
        logp: ``[n]`` log-probabilities in nats.

    Source: the usual cross-entropy; on refusals: Maini et al. 2024, arXiv 2401.06121 ("IDK").

    Example:
        >>> nll_tokens(torch.tensor([-0.5])).tolist()
        [0.5]
    """
    return -upcast(logp)


def idk_nll(weight: Weight = 1.0) -> Term:
    """Learn the aligned alternative answer (a refusal) by plain cross-entropy; TOFU's "PO" with a retain term.

    Source: Maini et al. 2024, arXiv 2401.06121.

    Example:
        >>> idk_nll().over
        'forget_alternative'
    """
    side = "forget_alternative"
    return Term("idk_nll", nll_tokens, {"logp": token_logp(side)}, over=side, per="token", weight=weight)
