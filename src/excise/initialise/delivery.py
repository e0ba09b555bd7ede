"""Adapters that are true on the untouched base: the start taken off again, and the whole update at a smaller rank.

A trained adapter (A, B) that began at (A0, B0) on a base changed to W - s B0 A0 stands for W + s (B A - B0 A0). That is
an ordinary adapter of twice the rank, ``[A; A0]`` and ``[B | -B0]`` with alpha doubled too, which stock PEFT loads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.initialise.starts import Factors

WEIGHTS = "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def save(model: Any, factors: Mapping[str, Factors], folder: Path, adapter: str = "default") -> None:
    """Save the adapter of a PEFT model that was started at ``factors``, as one of the untouched base.

    Args:
        model: The PEFT model.
        factors: What `apply.start` returned.
        folder: An existing folder; ``adapter_config.json`` and ``adapter_model.safetensors`` are written into it.
        adapter: Name of the adapter.

    Raises:
        ValueError: The factors are not those of this adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in doubled(state, factors).items()},
        folder / WEIGHTS, metadata={"format": "pt"},
    )  # fmt: skip
    config = doubled_config(model.peft_config[adapter])
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model.config, "name_or_path", None)
    config.save_pretrained(str(folder))


def doubled(state: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """An adapter's tensors with its start beside them: ``[A; A0]`` and ``[B | -B0]``; other tensors as they are."""
    prefixes = {key.removesuffix(_A) for key in state if key.endswith(_A)}
    if prefixes != set(factors):
        raise ValueError("the factors are not those of this adapter")
    out = dict(state)
    for name, start in factors.items():
        a, b = state[name + _A], state[name + _B]
        out[name + _A] = torch.cat((a, start.A.to(a)), 0)
        out[name + _B] = torch.cat((b, -start.B.to(b)), 1)
    return out


def doubled_config(config: Any) -> Any:
    """The LoRA settings of such an adapter: r and alpha doubled, patterns too, so that s = alpha / r stays."""
    out = copy.deepcopy(config)
    out.r, out.lora_alpha, out.init_lora_weights, out.inference_mode = 2 * out.r, 2 * out.lora_alpha, True, True
    out.rank_pattern = {key: 2 * value for key, value in (out.rank_pattern or {}).items()}
    out.alpha_pattern = {key: 2 * value for key, value in (out.alpha_pattern or {}).items()}
    return out


# --- a smaller rank -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Smaller:
    """An adapter at another rank: its tensors, and how far its update is from the whole one.

    ``errors`` has ``||D - D_R||_F / ||D||_F`` by layer, and ``error`` the same over all layers together.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    error: float


def highest_rank(state: Mapping[str, Tensor]) -> int:
    """The largest rank among an adapter's layers: what a server has to allow."""
    return max(len(value) for key, value in state.items() if key.endswith(_A))


def recompress(state: Mapping[str, Tensor], scales: Mapping[str, float], rank: int) -> Smaller:
    """Each layer's update s B A at ``rank``, by its singular values; the result has scale 1.

    The decomposition is exact and costs little: the update has the rank of the adapter, so it is done on the factors.

    Args:
        state: Tensors of an adapter, as PEFT saves them.
        scales: s of each layer, by the name that stands before ``.lora_A.weight``.
        rank: Rank of every layer; where a layer has less, zeros fill it up.

    Source: Eckart and Young 1936.

    Example:
        >>> state = {"m.lora_A.weight": torch.eye(2), "m.lora_B.weight": torch.diag(torch.tensor([4.0, 3.0]))}
        >>> recompress(state, {"m": 1.0}, 1).error
        0.6
    """
    out, errors, lost, whole = dict(state), {}, 0.0, 0.0
    for name, scale in scales.items():
        a, b = state[name + _A].double(), state[name + _B].double() * scale
        qb, rb = torch.linalg.qr(b)
        qa, ra = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        kept, root = min(rank, len(s)), s[:rank].sqrt()
        new_a = torch.zeros(rank, a.shape[1], dtype=torch.float64)
        new_b = torch.zeros(b.shape[0], rank, dtype=torch.float64)
        new_a[:kept], new_b[:, :kept] = root[:, None] * (vh[:kept] @ qa.T), (qb @ u[:, :kept]) * root
        out[name + _A], out[name + _B] = new_a.float().contiguous(), new_b.float().contiguous()
        missing, total = float((s[kept:] ** 2).sum()), float((s**2).sum())
        errors[name] = math.sqrt(missing / total) if total > 0 else 0.0
        lost, whole = lost + missing, whole + total
    return Smaller(out, errors, math.sqrt(lost / whole) if whole > 0 else 0.0)


def scales(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """The scale of each layer of a saved adapter, from its ``adapter_config.json``.

    Raises:
        UsageError: The adapter is not a plain product of two matrices.
    """
    from peft.utils.other import get_pattern_key

    for form in ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters"):
        if config.get(form):
            raise UsageError(f"an adapter with {form} has no smaller rank that stands for it: leave --rank out")
    alphas = config.get("alpha_pattern") or {}
    out = {}
    for key, value in state.items():
        if key.endswith(_A):
            name = key.removesuffix(_A)
            alpha = float(
                alphas.get(get_pattern_key(alphas, name.removeprefix("base_model.model.")), config["lora_alpha"])
            )
            out[name] = alpha / (math.sqrt(len(value)) if config.get("use_rslora") else len(value))
    return out


def smaller_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The settings of a recompressed adapter: alpha equal to r, no patterns."""
    return {
        **config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    }  # fmt: skip
