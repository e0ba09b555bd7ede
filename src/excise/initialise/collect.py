"""One pass over the rows of a side, without gradients, that takes the moments of every adapted linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from excise import ranks
from excise.errors import UsageError
from excise.forward import Anatomy, Batch, Pass, rows_seen, run_pass
from excise.forward.anatomy import recording
from excise.initialise.moments import Moments
from excise.initialise.taking import Entering, Inputs, Outputs, Reading, adapted_linears, sharing, widths

POOLINGS = ("token", "row", "sum")
POSITIONS = ("attended", "answer")
SIDES = ("output", "input", "cheaper", "entering")
#: Rows that the public code of ReGLU reads of each side.
OFFICIAL_ROWS = 256


def shares_input(vectors: int, width: int, outputs: Sequence[int] | None = None) -> bool:
    """Whether moments of layers that read one input are cheaper taken there once and derived than taken of each output.

    With n vectors, input width d and output widths o: each output costs n o^2 multiplications; the input costs n d^2
    once, and d^2 o + d o^2 for each output that is derived (W C W'), which counts twice because it is done in fp64.
    For three outputs as wide as the input that is n > 6 d. Memory is another reason: one accumulator instead of
    ``len(outputs)``.

    Args:
        vectors: Tokens, or rows where they are pooled.
        width: d.
        outputs: Widths of the outputs; three as wide as the input where none are given (query, key, value).

    Source:
        ours, from counts; by trial the derivation costs what an output costs of about d tokens (d = 4096).

    Example:
        >>> shares_input(10_000, 4096), shares_input(100_000, 4096), shares_input(20_000, 4096, [11008, 11008])
        (False, True, True)
    """
    out = [width] * 3 if outputs is None else list(outputs)
    derived = sum(2 * (width**2 * o + width * o**2) for o in out)
    return vectors * width**2 + derived < vectors * sum(o**2 for o in out)


@torch.no_grad()
def collect(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    *,
    pooling: str = "token",
    positions: str = "attended",
    rows: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    side: str = "output",
    preset: str | None = None,
    layers: Sequence[str] | None = None,
    vectors: int = 0,
) -> dict[str, Moments]:
    """Moments of the outputs of every adapted linear layer over the rows of one side, in one pass without the head.

    Masked by position, so that padding, packing and batch size do not matter. In a distributed run each rank passes
    every ``world``-th batch and all ranks return the same moments of all; give the model without its wrapper.

    Args:
        model: With its adapter attached; the layers below the adapters are read. Left in the mode it was in.
        anatomy: Of the model.
        batches: Rows in order. The same on all ranks.
        pooling: "token" (each position a vector), "row" (mean over a row's positions) or "sum" (their sum).
        positions: "attended" or "answer".
        rows: Read only so many of the first rows.
        autocast: The precision of the pass; moments are taken outside of it.
        side: "output"; "input" to take moments of the layers' inputs, once where layers read the same, and to derive
            those of the outputs: the same numbers; "cheaper" for the one or the other, as `shares_input` says for
            each group of layers and ``vectors``; "entering" for moments of the inputs themselves.
        preset: "official" for what the public code takes: the sum over all T positions of a right-padded batch,
            padding included, in fp64, of the first 256 rows. It depends on which rows share a batch, as there.
            ``pooling`` and ``positions`` are then not read; the moments are to be used without centring.
        layers: Module paths to read, instead of all adapted layers: groups bound the memory.
        vectors: About how many vectors there will be, for "cheaper".

    Returns:
        ``{module path: Moments}`` on the model's device.

    Raises:
        UsageError: An unknown option, no adapted layer.
        InputRefused: No position to read, NaN or inf.

    Source:
        ReGLU, Xiao et al. 2026, arXiv 2604.17396, and its public code for the preset.
    """
    _check(pooling, positions, side, preset)
    linears = adapted_linears(model, layers)
    if not linears:
        raise UsageError("no layer has a LoRA adapter: give model.lora with targets that match layers")
    device = cast(Tensor, next(model.parameters())).device
    rows = OFFICIAL_ROWS if preset and rows is None else rows
    training = model.training
    model.eval()
    try:
        with autocast():
            outputs = side in ("output", "entering")
            groups = [] if outputs else sharing(linears, lambda: _probe(model, anatomy, device))
        if side == "cheaper":
            groups = [g for g in groups if _pays([linears[name] for name in g], vectors)]
        derived = {name for group in groups for name in group}
        own = {name: linear for name, linear in linears.items() if name not in derived}
        first = Entering(own, device) if side == "entering" else Outputs(own, device)
        takers = (first, Inputs(linears, groups, device))
        with takers[0].watching(), takers[1].watching():
            for batch in _share(_first(batches, rows)):
                with autocast():
                    _pass(model, anatomy, batch.to(device), takers, pooling, positions, preset)
    finally:
        model.train(training)
    found = {**takers[0].finish(), **takers[1].finish()}
    return {name: found[name] for name in linears}


@torch.no_grad()
def shared_inputs(
    model: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[str],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[list[str]]:
    """Groups of layers (module paths) that read the same input, as query, key and value do; one small pass."""
    linears, training = adapted_linears(model, layers), model.training
    model.eval()
    try:
        with autocast():
            return sharing(linears, lambda: _probe(model, anatomy, cast(Tensor, next(model.parameters())).device))
    finally:
        model.train(training)


def _pass(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    takers: Sequence[Outputs | Entering | Inputs],
    pooling: str,
    positions: str,
    preset: str | None,
) -> None:
    """One batch through the model, with its hooks told whose each position is."""
    count, device = len(batch.input_ids), batch.input_ids.device
    if preset:
        everywhere = torch.arange(count, device=device)[:, None].expand_as(batch.input_ids)
        reading = Reading(everywhere, count, "sum", wide=True)
    else:
        reading = Reading(rows_seen(anatomy, batch, batch.masks(positions)), count, pooling)
    for taker in takers:
        taker.reading = reading
    if preset:
        with recording(anatomy, set(), None):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **_uncached(anatomy))
    else:
        run_pass(model, anatomy, batch, Pass())


def _probe(model: nn.Module, anatomy: Anatomy, device: torch.device) -> None:
    """The smallest pass that reaches every layer."""
    with recording(anatomy, set(), None):
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), **_uncached(anatomy))


def _uncached(anatomy: Anatomy) -> dict[str, bool]:
    return {"use_cache": False} if anatomy.caches else {}


def _pays(linears: Sequence[nn.Module], vectors: int) -> bool:
    return shares_input(vectors, widths(linears[0])[1], [widths(linear)[0] for linear in linears])


def _check(pooling: str, positions: str, side: str, preset: str | None) -> None:
    for name, value, known in (
        ("pooling", pooling, POOLINGS),
        ("positions", positions, POSITIONS),
        ("side", side, SIDES),
        ("preset", preset, (None, "official")),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r}: must be one of {', '.join(str(k) for k in known)}")


def _first(batches: Iterable[Batch], rows: int | None) -> Iterator[Batch]:
    """Batches up to a number of rows; the last one is cut."""
    left = rows
    for batch in batches:
        if left is not None and left <= 0:
            return
        size = len(batch.input_ids)
        if left is not None and size > left:
            batch = Batch(
                batch.input_ids[:left],
                batch.attention_mask[:left],
                batch.label_mask[:left],
                batch.indices[:left],
                {name: column[:left] for name, column in batch.columns.items()},
            )
        left = None if left is None else left - size
        yield batch


def _share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This rank's batches: whole ones, so that every update is the same as on a single rank."""
    rank, world = ranks.place()
    return (batch for number, batch in enumerate(batches) if number % world == rank)
