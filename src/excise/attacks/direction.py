"""Ablating a direction: whether forgotten answers come back once one direction is taken out of the hidden states.

Unlearning that adds "when you meet these rows, look away" shows as one direction, and without it the model speaks
again (Arditi et al. 2406.11717 did so with refusals). Two ways of finding it: how the states of forget rows moved away
from the original's ("moved"), and how they differ from those of kept rows ("apart").
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excise.attacks.answers import Answers, Gauge
from excise.attacks.lending import Difference, has_adapter, lent
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.attacks.training import split
from excise.errors import NotShown, UsageError
from excise.forward import Anatomy, Pass, run_pass

#: Most layers whose direction is tried, spread over the depth.
LAYERS = 8
_SMALL = 1e-8


def attack(target: Target, *, layers: Sequence[int] | None = None, kept_rows: int = 64) -> Outcome:
    """Half of the forget rows give the directions, the other half is measured while one of them is ablated.

    A direction is a difference of mean states after a block, over the positions that predict an answer. Ablated, it is
    projected out of what every block gives, at every position: h - v (v . h). The seed draws the split and the random
    direction; progress counts directions.

    Args:
        target: What is attacked, with two forget rows or more. "moved" needs the original's weights (a model with an
            adapter is held against its base without them), "apart" needs kept rows.
        layers: Blocks whose direction is tried, from 1; default 8 spread over the depth.
        kept_rows: Kept rows that give "apart" and that are measured: what the ablation costs.

    Returns:
        Budgets "none", "moved-K" and "apart-K" for block K, "moved-each" and "apart-each" (every tried block loses its
        own direction) and "random" (a random direction out of every block: the control). The attacker picks the best,
        so the largest value is what the attack reaches.

    Raises:
        ValueError: Fewer than two forget rows.
        UsageError: Layers that the model does not have.
        NotShown: No forget rows, or neither an original nor kept rows.

    Source:
        Arditi et al. 2406.11717, section 2.4, equations 1 and 4; directions of unlearning: ours.
    """
    started, anatomy = time.perf_counter(), target.anatomy
    had, held = split(target)
    gauge = Gauge.of(target, held=held, kept=kept_rows)
    tried = _tried(layers, anatomy.depth)
    found_in = _directions(target, gauge, had, tried)
    if not found_in:
        side = target.kept_side or "kept"
        raise NotShown(f"attack direction: needs the original's weights or {side} rows to find a direction")
    plans = _plans(found_in, tried, anatomy, target.seed)
    found = []
    with torch.no_grad(), lent(target.model, []):
        for done, plan in enumerate(plans.values()):
            with ablated(anatomy, plan):
                found.append(gauge.read())
            target.tell(done + 1, len(plans))
    shifts = {name: [round(float(v.norm()), 6) for v in own.values()] for name, own in found_in.items()}
    extra: dict[str, Any] = {"layers": tried, "attacker_rows": len(had), "seed": target.seed}
    extra |= {f"length_{name}": lengths for name, lengths in shifts.items()}
    return gauge.outcome("direction", "layer", list(plans), found, extra=extra, started=started)


def _tried(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        count = min(LAYERS, depth)
        return sorted({round(1 + i * (depth - 1) / max(count - 1, 1)) for i in range(count)})
    if not layers or any(not 1 <= layer <= depth for layer in layers):
        raise UsageError(f"attack direction: layers {list(layers)}: give blocks from 1 to {depth}")
    return sorted(set(layers))


def _directions(
    target: Target, gauge: Gauge, had: Sequence[int], layers: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """``moved`` and ``apart``: for each layer ``[D]``, a difference of mean states; what cannot be had is left out."""
    forget = gauge.sides["forget"]
    own = mean_states(forget, had, layers)
    out: dict[str, dict[int, Tensor]] = {}
    if target.original is not None or has_adapter(target.model):
        difference = Difference(target.model, target.original)
        with torch.no_grad(), lent(target.model, difference.changed) as before:
            difference.at(0, before)
            theirs = mean_states(forget, had, layers)
        out["moved"] = {layer: own[layer] - theirs[layer] for layer in layers}
    if "retain" in gauge.sides:
        kept = mean_states(gauge.sides["retain"], gauge.rows["retain"], layers)
        out["apart"] = {layer: own[layer] - kept[layer] for layer in layers}
    return out


def _plans(
    directions: Mapping[str, Mapping[int, Tensor]], tried: Sequence[int], anatomy: Anatomy, seed: int
) -> dict[str, dict[int, Tensor]]:
    """What is taken out after each block, by name of the budget."""
    every = range(1, anatomy.depth + 1)
    plans: dict[str, dict[int, Tensor]] = {"none": {}}
    for name, by_layer in directions.items():
        for layer in tried:
            plans[f"{name}-{layer}"] = dict.fromkeys(every, by_layer[layer])
        plans[f"{name}-each"] = dict(by_layer)
    like = next(iter(directions.values()))[tried[0]]
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    return plans | {"random": dict.fromkeys(every, drawn)}


def mean_states(answers: Answers, rows: Sequence[int], layers: Sequence[int], size: int = 32) -> dict[int, Tensor]:
    """Layer -> ``[D]`` fp32 mean over rows of the mean state after a block, at the positions that predict the answer.

    The last block's is taken before the final norm.
    """
    sums: dict[int, Tensor] = {}
    target, anatomy = answers.target, answers.target.anatomy
    with torch.no_grad(), lent(target.model, []):
        for part in answers.batches(rows, size):
            batch = answers.batch(part)
            with target.precision(), _kept(anatomy, layers) as states:
                result = run_pass(target.model, anatomy, batch, Pass(head=True))
            owners, places = batch.positions()
            counts = batch.label_mask.sum(1, keepdim=True)
            for layer, raw in states.items():
                read = result.read(raw, owners, places - anatomy.shift).float()
                total = torch.zeros(len(part), read.shape[1], device=read.device).index_add_(0, owners, read)
                sums[layer] = sums.get(layer, torch.zeros_like(total[0])) + (total / counts).sum(0)
    return {layer: total / len(rows) for layer, total in sums.items()}


@contextlib.contextmanager
def _kept(anatomy: Anatomy, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what blocks give during a pass."""
    states: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, out: Any) -> None:
            states[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [anatomy.blocks[layer - 1].register_forward_hook(keeper(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def ablated(anatomy: Anatomy, directions: Mapping[int, Tensor]) -> Iterator[None]:
    """Project a direction out of what blocks give: layer (from 1) -> ``[D]``, of any length; 0 changes nothing."""

    def remover(direction: Tensor) -> Any:
        unit = direction / direction.norm().clamp_min(_SMALL)

        def without(states: Tensor) -> Tensor:
            v = unit.to(states.dtype)
            return states - (states * v).sum(-1, keepdim=True) * v

        def hook(_module: nn.Module, _args: tuple, out: Any) -> Any:
            return (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)

        return hook

    handles = [anatomy.blocks[layer - 1].register_forward_hook(remover(d)) for layer, d in directions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
