"""The one place where a start touches a model: factors are set, and the model's function stays what it was.

With ``changed`` the base weight becomes W - s B A, computed in fp32 and then cast. With ``kept`` it stays, and a
second, frozen adapter with (A, -B) is active beside the first: exact, and the only way for a quantised base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from excise.errors import UsageError
from excise.initialise.starts import Base, Factors, Start

#: Name of the frozen adapter that takes a start off again where the base is kept.
FROZEN = "start"
#: Forms of LoRA whose update is not s B A with s = alpha / r.
_OTHER_FORMS = (
    "use_dora", "use_rslora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
#: What PEFT keeps once for all adapters of a model.
_SHARED = ("modules_to_save", "trainable_token_indices")
#: Initialisations of PEFT that change the base, which an adapter saved by itself does not know.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(start: Start, lora: Mapping[str, Any] | None) -> None:
    """Refuse a start that these LoRA settings have no place for; ``lora`` is None for full fine-tuning.

    Raises:
        UsageError: One line.
    """
    own = lora.get("init_lora_weights", True) if lora else True
    if isinstance(own, str) and own.startswith(_CHANGING):
        raise UsageError(
            f"model.lora.init_lora_weights: {own} changes the base, so that the saved adapter would be wrong on it: "
            f"use initialise ({'pissa' if own.startswith('pissa') else 'pissa, rila, fila or vila'})"
        )
    if not start.moves:
        return
    if lora is None:
        raise UsageError(f"initialise.{start.name}: there is no adapter to start: set model.lora")
    for name in _OTHER_FORMS:
        if lora.get(name):
            raise UsageError(
                f"model.lora.{name} and initialise.{start.name}: such an adapter cannot be taken off the base as a "
                "product of two matrices: leave one of them out"
            )
    if own is not True:
        raise UsageError(f"model.lora.init_lora_weights: {own} and initialise.{start.name}: give one of them")
    if start.base == "kept":
        shared = [n for n in _SHARED if lora.get(n)] + (["bias"] if lora.get("bias", "none") != "none" else [])
        if shared:
            raise UsageError(
                f"initialise.{start.name}.base: kept needs a second adapter: leave model.lora.{shared[0]} out"
            )


def layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The adapted linear layers (PEFT's ``LoraLayer``) by module path, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def check_layers(model: nn.Module, start: Start, adapter: str = "default") -> None:
    """Refuse targets that a start has no meaning for, and ranks that a layer cannot have.

    Raises:
        UsageError: Naming the layer.
    """
    if not start.moves:
        return
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    # An adapted module is wrapped: compare what it wraps.
    table, head = (getattr(end, "base_layer", end) for end in ends)
    tied = table is not None and head is not None and table.weight is head.weight
    found = layers(model, adapter)
    if not found:
        raise UsageError(f"initialise.{start.name}: the model has no adapted linear layer named {adapter!r}")
    for name, layer in found.items():
        own = layer.get_base_layer()
        if adapter in layer.lora_embedding_A or own is table:
            raise UsageError(f"initialise.{start.name}: the target {name} is an embedding: start linear layers only")
        if own is head:
            why = "is tied to the embedding, which would change with it" if tied else "has the vocabulary as its output"
            raise UsageError(f"initialise.{start.name}: the target {name} {why}: leave the head out")
        if start.base == "changed" and quantised(layer):
            raise UsageError(f"initialise.{start.name}: {name} is quantised and cannot be changed: set base: kept")
        if quantised(layer) and any(s.kind == "squared_gradient" for s in start.needs.values()):
            raise UsageError(f"initialise.{start.name}: {name} is quantised and has no gradient: use vila or rila")
        rank, least = rank_of(layer, adapter), min(layer.in_features, layer.out_features)
        if rank > least:
            raise UsageError(f"initialise.{start.name}: rank {rank} is above the {least} directions of {name}: lower r")


def rank_of(layer: Any, adapter: str = "default") -> int:
    """The rank r of a layer's adapter."""
    return int(layer.r[adapter])


def scale_of(layer: Any, adapter: str = "default") -> float:
    """The scale s = alpha / r of a layer's adapter."""
    return float(layer.scaling[adapter])


def weight_of(layer: Any) -> Tensor:
    """``[out, in]`` fp32 base weight of an adapted layer, GPT-2's ``Conv1D`` transposed.

    A quantised one is read off what the layer does to the unit vectors: libraries repack weights for their kernels, and
    what they then unpack is not always the weight (bitsandbytes 0.50 on a CPU, after the first forward pass).
    """
    base = layer.get_base_layer()
    if quantised(layer):
        with torch.no_grad():
            out = base(torch.eye(layer.in_features, device=base.weight.device)).float()
        return (out if base.bias is None else out - base.bias.float()).T
    weight = base.weight.detach().float()
    return weight.T if layer.fan_in_fan_out else weight


def quantised(layer: Any) -> bool:
    """Whether the base weight of an adapted layer is stored compressed."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    return not isinstance(weight, Tensor) or not weight.is_floating_point()


@torch.no_grad()
def start(
    model: Any, factors: Mapping[str, Factors], *, base: Base = "changed", adapter: str = "default"
) -> dict[str, Factors]:
    """Start the adapter of a PEFT model at ``factors``; its function stays what it was.

    Args:
        model: A PEFT model whose adapter changes nothing yet (B = 0).
        factors: A and B of every adapted layer.
        base: ``changed`` or ``kept``.
        adapter: Name of the adapter.

    Returns:
        The factors as they stand in the model, fp32 on the CPU: what an exact export subtracts again.

    Raises:
        ValueError: Other layers or shapes than the model's, or entries that are not finite.
    """
    found = layers(model, adapter)
    if found.keys() != factors.keys():
        odd = sorted(found.keys() ^ factors.keys())[0]
        raise ValueError(f"the factors are not those of this model: layer {odd} is in one of them only")
    for name, layer in found.items():
        _set(layer, adapter, factors[name], name)
        if base == "changed":
            own = layer.get_base_layer().weight
            rest = weight_of(layer) - scale_of(layer, adapter) * _product(layer, adapter)
            own.copy_((rest.T if layer.fan_in_fan_out else rest).to(own.dtype))
    applied = {name: _read(layer, adapter, factors[name].positive) for name, layer in found.items()}
    if base == "kept":
        _add_frozen(model, applied, adapter)
    return applied


def _set(layer: Any, adapter: str, factors: Factors, name: str) -> None:
    for which, value in (("lora_A", factors.A), ("lora_B", factors.B)):
        own = getattr(layer, which)[adapter].weight
        if own.shape != value.shape:
            raise ValueError(f"the factors are not those of this model: {name} has {tuple(own.shape)} for {which}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the factors of {name} are not finite")
        own.copy_(value)


def _product(layer: Any, adapter: str) -> Tensor:
    return layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()


def _read(layer: Any, adapter: str, positive: int | None) -> Factors:
    # A copy in any case: `float().cpu()` of an fp32 weight on the CPU would be the weight itself.
    a, b = (getattr(layer, which)[adapter].weight.detach().float().cpu().clone() for which in ("lora_A", "lora_B"))
    return Factors(a, b, positive)


def _add_frozen(model: Any, factors: Mapping[str, Factors], adapter: str) -> None:
    config = copy.deepcopy(model.peft_config[adapter])
    config.lora_dropout = 0.0  # what is taken off must not be dropped at random
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter(FROZEN, config)
    for name, layer in layers(model, FROZEN).items():
        _set(layer, FROZEN, Factors(factors[name].A, -factors[name].B), name)
    activate(model, trained, adapter)


def activate(model: Any, trained: Mapping[str, bool] | None = None, adapter: str = "default") -> None:
    """Make both adapters of a kept base active again without a change of what is trained; PEFT's own call thaws both.

    Args:
        model: A PEFT model.
        trained: Parameter name -> whether it is trained; default as it is now.
        adapter: The adapter that is trained.
    """
    if FROZEN not in model.peft_config:
        return
    before = {name: p.requires_grad for name, p in model.named_parameters()} if trained is None else trained
    model.base_model.set_adapter([adapter, FROZEN])
    for name, p in model.named_parameters():
        p.requires_grad_(before.get(name, False) and f".{FROZEN}." not in name)


def factors_of(model: nn.Module, adapter: str = "default") -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The adapter's own parameters (A, B) by layer."""
    return {
        name: (cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight))
        for name, layer in layers(model, adapter).items()
    }
