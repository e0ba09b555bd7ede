"""What a run did to whole weights as an adapter: the difference to the base, cut to a rank by singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from excise.errors import UsageError
from excise.initialise.delivery import Smaller
from excise.initialise.starts import top_singular
from excise.initialise.taking import matrix_of


def changed(base: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """Linear layer -> ``[out, in]`` fp32 difference of its weight, where there is any.

    Raises:
        UsageError: Another weight differs too, which no adapter of linear layers holds.

    Example:
        >>> one, two = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
        >>> _ = two.load_state_dict({**one.state_dict(), "0.weight": one[0].weight.detach() + 1})
        >>> {name: round(x.item(), 4) for name, x in changed(one, two).items()}
        {'0': 1.0}
    """
    ends = [getattr(base, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    linears = {
        name: m for name, m in base.named_modules() if (isinstance(m, nn.Linear) or hasattr(m, "nf")) and m not in ends
    }
    others, found = dict(trained.named_modules()), {}
    for name, layer in linears.items():
        difference = matrix_of(others[name]).float().cpu() - matrix_of(layer).float().cpu()
        if bool(difference.any()):
            found[name] = difference
    held = {f"{name}.weight" for name in linears}
    own = dict(trained.named_parameters())
    for name, value in base.named_parameters():
        if name not in held and not torch.equal(value.detach().cpu(), own[name].detach().cpu().to(value.dtype)):
            raise UsageError(f"{name} was changed too, which no adapter of linear layers holds: use --to merged")
    return found


def factored(differences: Mapping[str, Tensor], rank: int) -> Smaller:
    """The best adapter of ``rank`` (with alpha = rank, so that s = 1) and its measured error, by layer and over all.

    Raises:
        UsageError: A rank above a layer's directions, or nothing differs.

    Example:
        >>> factored({"m": torch.diag(torch.tensor([4.0, 3.0]))}, 1).error
        0.6
    """
    if not differences:
        raise UsageError("the weights are those of the base: there is nothing to export")
    tensors, errors, lost, whole = {}, {}, 0.0, 0.0
    for name, difference in differences.items():
        if rank > min(difference.shape):
            raise UsageError(f"--rank {rank} is above the {min(difference.shape)} directions of {name}: give less")
        u, s, vh = top_singular(difference, rank)
        root = s.sqrt()
        a, b = root[:, None] * vh, u * root
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.contiguous(), b.contiguous()
        missing, total = float((difference - b @ a).double().square().sum()), float(difference.double().square().sum())
        errors[key] = round(math.sqrt(missing / total), 9)
        lost, whole = lost + missing, whole + total
    return Smaller(tensors, errors, round(math.sqrt(lost / whole), 9))


def config(model: nn.Module, names: list[str], rank: int, task: str) -> Any:
    """PEFT's settings of such an adapter."""
    from peft import LoraConfig

    modules = dict(model.named_modules())
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0, bias="none", inference_mode=True,
        task_type=task, fan_in_fan_out=any(hasattr(modules[name], "nf") for name in names),
        base_model_name_or_path=getattr(model.config, "name_or_path", None),
    )  # fmt: skip
