"""KGA: the gap between what two models know, equal for forgotten and for never-seen rows; a term for recipes.

Source: Wang et al. 2023 (KGA), ACL 2023. With ``A`` the original, ``A_f`` trained on the forgotten rows and ``A_n`` on
as many unseen ones: ``| KL(A* || A_f) on D_f  -  KL(A || A_n) on D_n |``, beside the divergence from ``A`` on the
retained rows. ``A`` and ``A_n`` give one number; of ``A_f`` its predictions are stored: no second model is held.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.forward import logits, row_numbers, token_index
from excise.objectives import Term


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """``KL(ours || theirs)`` in nats, mean over the labels of all rows.

    Example:
        >>> z = [torch.zeros(2, 3)]
        >>> gap(z, z)
        0.0
    """
    p, q = (torch.cat(z).double().log_softmax(-1) for z in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


def store(path: Path, said: list[Tensor]) -> None:
    """Keep the predictions of ``A_f``, rows one after the other."""
    starts = torch.tensor([0, *[len(z) for z in said]]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logp": torch.cat(said).log_softmax(-1).contiguous(), "starts": starts}, path)


def kga_tokens(
    logits: Tensor, rows: Tensor, places: Tensor, *, logp: Tensor, starts: Tensor, target: float, sigma: float
) -> Tensor:
    """``[n]`` all alike: how much further than ``sigma * target`` the mean divergence of the batch is from the target.

    Below that the gaps count as aligned and nothing is pushed any more (KGA stops there). The mean is that of a batch:
    as many labels of a classifier as a batch has are never cut into chunks.

    Example:
        >>> z, at = torch.zeros(2, 2), torch.arange(2)
        >>> kga_tokens(z, at, at * 0, logp=z.log_softmax(-1), starts=at, target=1.0, sigma=0.1).tolist()
        [0.8999999761581421, 0.8999999761581421]
    """
    theirs = logp.to(logits)[starts.to(rows.device)[rows] + places]
    ours = logits.log_softmax(-1)
    mean = (ours.exp() * (ours - theirs)).sum(-1).mean()
    return ((mean - target).abs() - sigma * target).clamp_min(0.0).expand(len(logits))


def kga(teacher: str, target: float, sigma: float = 0.1, weight: float = 1.0) -> Term:
    """The forgetting half of KGA; the other half is ``kl`` on the retained rows.

    Args:
        teacher: File that `store` wrote.
        target: The gap of the original on never-seen rows.
        sigma: Share of the target at which the gaps count as equal.
        weight: Weight of the term.

    Source: Wang et al. 2023 (KGA), ACL 2023.
    """
    inputs = {"logits": logits("forget"), "rows": row_numbers("forget"), "places": token_index("forget")}
    fn = partial(kga_tokens, **load_file(teacher), target=target, sigma=sigma)
    return Term("kga", fn, inputs, over="forget", per="token", weight=weight, batch_coupled=True)
