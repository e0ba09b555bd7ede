"""Quantisation: what a model says after its weights were rounded, which can bring forgotten answers back.

After Zhang et al. (2410.16454): unlearning that moves weights by less than half a step of the grid is rounded away.
Rounding to nearest by groups is done here; NF4 and 8-bit integers as bitsandbytes (an extra) does them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excise.attacks.answers import Gauge
from excise.attacks.lending import Weights, has_adapter, lent, plain_name
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.errors import UsageError
from excise.forward import Anatomy

BITS = ("8", "4", "3")
#: What bitsandbytes makes; its blocks are 64 weights, its integers have one scale per output.
BNB = ("nf4", "int8")
_BLOCK = 64


def rounded(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """``[out, in]`` weights rounded to nearest on a grid of 2^bits points for each group of ``group`` inputs.

    The grid runs from the smallest to the largest weight of the group, 0 always among its points; the last group of
    an output is shorter where ``group`` does not divide the inputs.

    Args:
        weight: fp32, ``[out, in]``.
        bits: 2 to 8.
        group: Neighbouring weights of an output that share a grid.

    Source: asymmetric round-to-nearest as in Frantar et al. 2210.17323 (its baseline), section 4.

    Example:
        >>> rounded(torch.tensor([[0.0, 0.1, 0.9, 3.0]]), 2, group=4)
        tensor([[0., 0., 1., 3.]])
    """
    if not 2 <= bits <= 8:
        raise ValueError("bits: 2 to 8")
    out, width = weight.shape
    group = min(group, width)
    short = -width % group  # zeros fill the last group up: they are on every grid and move no bound
    grouped = torch.nn.functional.pad(weight, (0, short)).reshape(out, -1, group)
    low = grouped.amin(-1, keepdim=True).clamp_max(0)
    high = grouped.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = torch.round(-low / step)
    code = torch.clamp(torch.round(grouped / step) + zero, 0, 2**bits - 1)
    return ((code - zero) * step).view(out, -1)[:, :width]


def attack(target: Target, *, bits: Sequence[str | float] = BITS, group: int = 128, kept_rows: int = 64) -> Outcome:
    """Forget rows before and after the weights of all linear layers in the blocks are rounded.

    Embeddings, norms, biases and the head keep their precision, as in GPTQ, AWQ and bitsandbytes. An adapter is merged
    for the attack, since that is what is quantised and shipped. Rounded weights are held in the model's own precision.
    Progress counts forms; nothing is drawn.

    Args:
        target: What is attacked. Its original, where given, is rounded too.
        bits: Forms of the weights: 2 to 8 bits, ``nf4`` or ``int8`` (bitsandbytes).
        group: Inputs that share a grid; for the forms in bits.
        kept_rows: Kept rows that are measured: what quantisation costs; 0 for none.

    Returns:
        Budgets "none" (as delivered) and ``bits``. ``extra["weight_error"]``: for each form the relative error
        |Q(W) - W| / |W| over all rounded weights. ``extra["same_as_original"]``, where the original is given: for each
        form the share of the changed weights that rounding makes equal to the original's.

    Raises:
        UsageError: An unknown form, or bitsandbytes is not installed.
        NotShown: There are no forget rows.
    """
    forms = [b if isinstance(b, str) else f"{b:g}" for b in bits]  # a recipe reads "8" as 8.0
    _refuse(forms)
    started, model = time.perf_counter(), target.model
    gauge = Gauge.of(target, kept=kept_rows)
    found, errors, same = [gauge.read()], [], []
    layers = dict(_linear(model, target.anatomy))
    # Merging an adapter may touch more than these layers, and unmerging is not exact.
    everything = [p for p in model.parameters() if p.is_floating_point()]
    changed = everything if has_adapter(model) else [layer.weight for layer in layers.values()]
    with torch.no_grad(), lent(model, changed):
        merged = _merge(model)
        try:
            whole = [layer.weight.detach().clone() for layer in layers.values()]
            for done, form in enumerate(forms):
                error, unchanged = _round_all(layers, whole, form, group, target.original)
                errors.append(error)
                same += [] if unchanged is None else [unchanged]
                found.append(gauge.read())
                target.tell(done + 1, len(forms))
        finally:
            if merged:
                model.unmerge_adapter()  # type: ignore[operator]  # `lent` then puts the very bits back
    extra: dict[str, Any] = {"group": group, "layers": len(layers), "weight_error": errors}
    extra |= {"same_as_original": same} if same else {}
    return gauge.outcome("quantise", "bits", ["none", *forms], found, extra=extra, started=started)


def _refuse(forms: Sequence[str]) -> None:
    known = [*map(str, range(2, 9)), *BNB]
    wrong = [form for form in forms if form not in known]
    if wrong or not forms or len(set(forms)) < len(forms):
        raise UsageError(f"attack quantise: bits {wrong or list(forms)}: give each once, of 2 to 8, nf4, int8")
    if set(forms) & set(BNB) and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("attack quantise: nf4 and int8 need bitsandbytes: pip install 'excise[bnb]', or give bits")


def _linear(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, Any]]:
    """Linear layers within the blocks by their plain names, GPT-2's transposed ones included; no adapter's matrices."""
    inside = {id(module) for block in anatomy.blocks for module in block.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        plain = isinstance(module, nn.Linear) or kind == "Conv1D"
        if plain and id(module) in inside and "lora_" not in name:
            yield plain_name(f"{name}.weight"), module


def _merge(model: nn.Module) -> bool:
    if has_adapter(model):
        model.merge_adapter()  # type: ignore[operator]
        return True
    return False


def _round_all(
    layers: Mapping[str, Any], whole: Sequence[Tensor], form: str, group: int, original: Weights | None
) -> tuple[float, float | None]:
    """Round every layer in place; the relative error, and the share of changed weights that equal the original's."""
    error = total = changed = same = 0.0
    for (name, layer), own in zip(layers.items(), whole, strict=True):
        transposed = type(layer).__name__ == "Conv1D"
        q = _formed(own, form, group, transposed)
        layer.weight.copy_(q)
        error += float((q - own.float()).square().sum())
        total += float(own.float().square().sum())
        if original is not None and name in original:
            before = original[name].to(own.device, own.dtype)
            moved = before != own
            theirs = _formed(before, form, group, transposed)
            # Grids that differ a little (a group's largest weight moved) still count as one where values nearly agree.
            near = (q - theirs).abs() <= 0.1 * (own.float() - before.float()).abs()
            changed += float(moved.sum())
            same += float((moved & near).sum())
    share = None if original is None or not changed else round(same / changed, 6)
    return round((error / total) ** 0.5 if total else 0.0, 6), share


def _formed(weight: Tensor, form: str, group: int, transposed: bool) -> Tensor:
    """fp32 weights as a form holds them, in the layout that they came in."""
    w = weight.detach().float()
    w = w.T.contiguous() if transposed else w
    q = _by_bitsandbytes(w, form) if form in BNB else rounded(w, int(form), group)
    return q.T if transposed else q


def _by_bitsandbytes(w: Tensor, form: str) -> Tensor:
    """What bitsandbytes stores, and reads back."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    if form == "int8":
        code, scale, _ = functional.int8_vectorwise_quant(w.half())
        return functional.int8_vectorwise_dequant(code, scale).float()
    # Blocks run over the flattened weights. Given as rows of one block: on a CPU it misreads other widths (0.50).
    flat = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % _BLOCK)).view(-1, _BLOCK)
    code, state = functional.quantize_4bit(flat, blocksize=_BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(code, state).float().flatten()[: w.numel()].view_as(w)
