"""Retain terms: what keeps the model as it was on the rows that it is to remember.

Pure functions, one value per row or token, and factories; conventions as in `forget`. Every factory takes ``side``, so
that a second set (general knowledge, for instance) can be held by a second term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.forward import REFERENCE, hidden, logits, mask, token_logp
from excise.objectives.arithmetic import at_least_zero, layer_numbers, row_means, upcast
from excise.objectives.forget import nll_tokens
from excise.objectives.term import Dual, Term, Weight
from excise.objectives.value import Wiring


def nll(side: str = "retain", weight: Weight = 1.0) -> Term:
    """Cross-entropy on the label tokens, mean over tokens; with gradient ascent this is GradDiff.

    Source: the usual cross-entropy; as retain term: Maini et al. 2024, arXiv 2401.06121.

    Example:
        >>> nll().over
        'retain'
    """
    return Term("nll", nll_tokens, {"logp": token_logp(side)}, over=side, per="token", weight=weight)


def kl_tokens(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Divergence from the model before unlearning, ``[n]``: ``KL(p_ref || p)`` in nats.

    Args:
        logits: ``[n, V]`` of the model.
        ref_logits: ``[n, V]`` of the model before unlearning, at the same positions; receives no gradient.

    Source: Maini et al. 2024, arXiv 2401.06121. Over label positions; the peer averages over prompt and padding too.

    Example:
        >>> import torch
        >>> kl_tokens(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])).tolist()
        [0.0]
    """
    ref = upcast(ref_logits).detach().log_softmax(-1)
    return (ref.exp() * (ref - upcast(logits).log_softmax(-1))).sum(-1)


def kl(side: str = "retain", weight: Weight = 1.0) -> Term:
    """Divergence of the whole next-token distribution from the reference, mean over label tokens.

    Source: Maini et al. 2024, arXiv 2401.06121.

    Example:
        >>> kl().inputs["ref_logits"].model
        'reference'
    """
    inputs = {"logits": logits(side), "ref_logits": logits(side, REFERENCE)}
    return Term("kl", kl_tokens, inputs, over=side, per="token", weight=weight)


def hold_rows(states: Tensor, ref_states: Tensor, where: Tensor) -> Tensor:
    """Squared distance of the states from those before unlearning, ``[B]``: mean over tokens and width.

    Args:
        states: ``[B, T, D]`` hidden states.
        ref_states: ``[B, T, D]`` the same by the model before unlearning; receives no gradient.
        where: ``[B, T]`` bool, the positions that are held; others are not read.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218.

    Example:
        >>> import torch
        >>> hold_rows(torch.ones(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[True, False]])).tolist()
        [1.0]
    """
    apart = upcast(states[where]) - upcast(ref_states[where]).detach()
    return row_means(apart.square().mean(-1), where)


def rmu_retain(layer: int = 8, side: str = "retain", weight: Weight = 1.0) -> Term:
    """Hold the states of retained answers at ``layer``, the layer that `excise.objectives.forget_wide.rmu` steers.

    Weight 1 as in open-unlearning; the paper takes 1200 for Zephyr. Layer 8 is the output of block 7.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218.

    Example:
        >>> rmu_retain(layer=3, weight=1200.0).weight
        1200.0
    """
    inputs = {
        "states": hidden(side, layer),
        "ref_states": hidden(side, layer, REFERENCE),
        "where": mask(side, "answer"),
    }
    return Term("rmu_retain", hold_rows, inputs, over=side, weight=weight)


def primal_dual(
    epsilon: float = 0.3, eta: float = 5.0, warmup: float = 0.5, side: str = "retain", weight: Weight = 100.0
) -> Term:
    """Cross-entropy under the constraint ``mean <= epsilon``: its weight is a multiplier found by dual ascent (PDU).

    Defaults as in the paper's TOFU runs: start 100, step 5, fixed during 5 of 10 epochs. ``epsilon`` depends on the
    model: take ``(1 + a)`` times the retain loss before unlearning. Updated once per optimizer step (the peer: once
    per micro-batch).

    Args:
        epsilon: What the mean retain loss may be, nats per token.
        eta: Step of the dual ascent.
        warmup: Share of the run during which the multiplier stays at its start.
        side: The rows that are held.
        weight: Start of the multiplier, a number; or a whole `Dual`, which then overrides the other options.

    Raises:
        UsageError: An option is negative, or ``weight`` is a `Ramp`.

    Source: Entesari et al. 2025 (PDU), arXiv 2506.05314.

    Example:
        >>> primal_dual(epsilon=0.4).weight
        Dual(start=100.0, epsilon=0.4, eta=5.0, warmup=0.5)
    """
    if not isinstance(weight, Dual):
        if not isinstance(weight, int | float):
            raise UsageError("primal_dual: option 'weight' must be the multiplier's start: give a number or a Dual")
        for option, value in (("epsilon", epsilon), ("eta", eta), ("warmup", warmup), ("weight", weight)):
            at_least_zero("primal_dual", option, value)
        weight = Dual(start=float(weight), epsilon=epsilon, eta=eta, warmup=warmup)
    return Term("primal_dual", nll_tokens, {"logp": token_logp(side)}, over=side, per="token", weight=weight)


def anchor_rows(states: tuple[Tensor, ...], ref_states: tuple[Tensor, ...], where: Tensor) -> Tensor:
    """How far states have moved, relative to their length, ``[B]``: mean over layers and a row's tokens.

    ``||h - h0||^2 / ||h0||^2`` at each position, so that the few positions whose states are very long (the first token
    of many models) count no more than others.

    Args:
        states: Per layer ``[B, T, D]``.
        ref_states: The same of the model before unlearning; receives no gradient.
        where: ``[B, T]`` bool, the positions that are held; others are not read.

    Source: ours.

    Example:
        >>> one = torch.ones(1, 2, 4)
        >>> anchor_rows((1.5 * one,), (one,), torch.tensor([[True, True]])).tolist()
        [0.25]
    """
    per_layer = []
    for own, before in zip(states, ref_states, strict=True):
        start = upcast(before[where]).detach()
        moved = (upcast(own[where]) - start).square().sum(-1)
        per_layer.append(row_means(moved / start.square().sum(-1).clamp_min(1e-12), where))
    return torch.stack(per_layer).mean(0)


def anchor(
    sides: Sequence[str] = ("retain", "never_seen"),
    layers: str | int | Sequence[int] = 2,
    weight: Weight = 1.0,
) -> tuple[Term, ...]:
    """Hold the hidden states of retained and never-seen rows where they were before unlearning.

    The states of all tokens are computed once and kept, above 512 MB in a file.

    Args:
        sides: Whose rows are held, each by a term of this weight.
        layers: ``"last"``; ``k`` for the last k; or a list of layer numbers.
        weight: Weight of each of the terms.

    Raises:
        UsageError: No side, one twice, or layers that are none.

    Source: ours; holding states at one layer: Li et al. 2024 (RMU), arXiv 2403.03218.

    Example:
        >>> [term.name for term in anchor()]
        ['anchor', 'anchor_never_seen']
    """
    named = (sides,) if isinstance(sides, str) else tuple(sides)
    if not named or len(set(named)) < len(named):
        raise UsageError("anchor: option 'sides' names no side, or one twice: use [retain, never_seen]")
    numbers = layer_numbers("anchor", layers)

    def held(side: str) -> Term:
        inputs: Wiring = {
            "states": tuple(hidden(side, number) for number in numbers),
            "ref_states": tuple(hidden(side, number, REFERENCE) for number in numbers),
            "where": mask(side, "attended"),
        }
        return Term("anchor" if side == "retain" else f"anchor_{side}", anchor_rows, inputs, over=side, weight=weight)

    return tuple(held(side) for side in named)
