"""RILA for any PEFT model, in the shape of PEFT's own EVA functions: batches in, a started adapter out; no recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.errors import UsageError
from excise.forward import Anatomy, Batch
from excise.initialise import apply, delivery
from excise.initialise.collect import collect
from excise.initialise.moments import Moments, contrast_directions
from excise.initialise.starts import Base, Factors, from_directions, rila

Loader = Iterable[Mapping[str, Tensor]]


def get_rila_state_dict(
    peft_model: Any,
    forget_dataloader: Loader,
    retain_dataloader: Loader,
    *,
    beta: float = 0.5,
    trace_normalised: bool = False,
    pooling: str = "token",
    positions: str = "attended",
    center: bool = True,
) -> dict[str, Tensor]:
    """The directions that RILA starts the adapter "default" at, by layer: to be kept and given again.

    Args:
        peft_model: A PEFT model of a causal language model, without a distributed wrapper. Its adapter must not change
            anything yet (B = 0), as PEFT leaves it.
        forget_dataloader: Batches with ``input_ids`` and ``attention_mask`` ``[B, T]``, and optionally ``labels`` (-100
            where there is none). In a distributed run the same on all ranks.
        retain_dataloader: The same of the retained rows.
        beta: Weight of the retained rows, 0 to 1.
        trace_normalised: Divide both covariances by their trace first.
        pooling: What is one observation: each ``token``, the mean over a ``row``, or its ``sum``.
        positions: ``attended``, or ``answer``: where ``labels`` stand.
        center: Covariances; second moments where false.

    Returns:
        Layer -> ``[out, r]`` fp32 on the CPU, orthonormal; plain tensors that ``safetensors.torch.save_file`` takes.

    Raises:
        UsageError: An adapter, target or rank that RILA has no meaning for, or an unknown option.

    Example:
        >>> get_rila_state_dict(peft_model, forget_batches, retain_batches, beta=0.5)  # doctest: +SKIP
        {'base_model.model.model.layers.0.self_attn.q_proj': tensor([[...

    Source: ReGLU (RILA), Xiao, Mo et al. 2026, arXiv 2604.17396.
    """
    start = _start(beta, trace_normalised, "kept", peft_model)
    loaders, anatomy = {"forget": forget_dataloader, "retain": retain_dataloader}, Anatomy.of(peft_model)
    _refuse_trained(peft_model)
    seen: dict[str, dict[str, Moments]] = {
        side: collect(peft_model, anatomy, _batches(loader), pooling=pooling, positions=positions)
        for side, loader in loaders.items()
    }
    out = {}
    for name, layer in apply.layers(peft_model).items():
        rank = apply.rank_of(layer)
        found = contrast_directions(
            seen["forget"][name], seen["retain"][name], beta, rank, center=center, trace_normalised=trace_normalised
        )
        if found.vectors.shape[1] < rank:
            raise UsageError(
                f"initialise.{start.name}: {name}: rank {rank} is above the {found.vectors.shape[1]} directions that "
                "the rows span: lower r or give more rows"
            )
        out[name] = found.vectors.float().cpu()
    return out


def initialize_lora_rila_weights(
    peft_model: Any,
    forget_dataloader: Loader | None = None,
    retain_dataloader: Loader | None = None,
    *,
    beta: float = 0.5,
    rila_state_dict: Mapping[str, Tensor] | None = None,
    base: Base = "changed",
    trace_normalised: bool = False,
    pooling: str = "token",
    positions: str = "attended",
    center: bool = True,
) -> dict[str, Factors]:
    """Start the adapter "default" of a PEFT model in the subspace that tells forget rows from retained ones.

    The model's function stays what it was: with ``base="changed"`` the base weights are changed by as much, with
    ``"kept"`` (quantised bases) a frozen second adapter takes the start off. Keep what is returned: after training,
    ``excise.save_lora_adapter(peft_model, factors, folder)`` saves an adapter that is true on the *untouched* base,
    which ``peft_model.save_pretrained`` does not.

    Args:
        peft_model: See `get_rila_state_dict`, as for all but the next two.
        forget_dataloader: Not needed with ``rila_state_dict``.
        retain_dataloader: Not needed with ``rila_state_dict``.
        beta: Weight of the retained rows, 0 to 1.
        rila_state_dict: What `get_rila_state_dict` returned for this model.
        base: ``changed`` or ``kept``.
        trace_normalised: See there.
        pooling: See there.
        positions: See there.
        center: See there.

    Returns:
        Layer -> the factors that the adapter starts at, fp32 on the CPU.

    Raises:
        UsageError: As there; or neither rows nor a state, or a state of another model.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, num_key_value_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(small), LoraConfig(r=2, target_modules=["q_proj"]))
        >>> rows = [{"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}]
        >>> started = initialize_lora_rila_weights(model, rows, rows[::-1], beta=0.3)
        >>> [tuple(f.B.shape) for f in started.values()]
        [(16, 2)]
    """
    _start(beta, trace_normalised, base, peft_model)
    if rila_state_dict is None:
        if forget_dataloader is None or retain_dataloader is None:
            raise UsageError("give forget_dataloader and retain_dataloader, or a rila_state_dict")
        rila_state_dict = get_rila_state_dict(
            peft_model, forget_dataloader, retain_dataloader, beta=beta, trace_normalised=trace_normalised,
            pooling=pooling, positions=positions, center=center,
        )  # fmt: skip
    _refuse_trained(peft_model)
    layers = apply.layers(peft_model)
    if layers.keys() != rila_state_dict.keys() or any(
        tuple(rila_state_dict[n].shape) != (x.out_features, apply.rank_of(x)) for n, x in layers.items()
    ):
        raise UsageError("rila_state_dict is of another model, other targets or another rank: make it for this one")
    factors = {
        name: from_directions(apply.weight_of(layer), rila_state_dict[name], apply.scale_of(layer))
        for name, layer in layers.items()
    }
    return apply.start(peft_model, factors, base=base)


def save_lora_adapter(peft_model: Any, factors: Mapping[str, Factors], folder: str | Path) -> None:
    """Save an adapter that was started at ``factors`` as one of the untouched base: of twice the rank, for stock PEFT.

    Args:
        peft_model: After training.
        factors: What `initialize_lora_rila_weights` returned.
        folder: New or existing; the two files of an adapter are written into it.

    Example:
        >>> save_lora_adapter(peft_model, factors, "adapter")  # doctest: +SKIP
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    delivery.save(peft_model, factors, Path(folder))


def _start(beta: float, trace_normalised: bool, base: Base, peft_model: Any) -> Any:
    """The start, after everything was checked that can be without rows."""
    if not hasattr(peft_model, "peft_config") or "default" not in peft_model.peft_config:
        raise UsageError("RILA starts a PEFT model with an adapter named 'default': make one with get_peft_model")
    try:
        start = rila(beta, trace_normalised, base)
    except ValueError as error:
        raise UsageError(f"rila: {error}") from None
    apply.check_config(start, vars(peft_model.peft_config["default"]))
    apply.check_layers(peft_model, start)
    return start


def _refuse_trained(peft_model: Any) -> None:
    if any(bool(b.detach().any()) for _, b in apply.factors_of(peft_model).values()):
        raise UsageError("the adapter changes the model already: start a fresh one (init_lora_weights=True)")


def _batches(loader: Loader) -> Iterator[Batch]:
    for given in loader:
        ids = given["input_ids"]
        attended = given.get("attention_mask")
        attended = torch.ones_like(ids) if attended is None else attended
        labels = given.get("labels")
        yield Batch(ids, attended, attended.bool() if labels is None else labels != -100)
