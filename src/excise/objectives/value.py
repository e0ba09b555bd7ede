"""The value of a term from the tensors that it asked for: chunked where logits are read, gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from excise import ranks
from excise.forward import PER_TOKEN, Batch, Logits, Product, base_side, chunked, passes
from excise.objectives.term import Term

Wiring = Mapping[str, Product | tuple[Product, ...]]


def value_of(term: Term, made: Mapping[Product, Any]) -> Tensor:
    """The values of a term, per row or token; a term that reads logits is evaluated in recomputed chunks."""
    block = next((made[p] for p in term.needs() if isinstance(made[p], Logits)), None)
    if block is None:
        return term.fn(**arguments(term.inputs, lambda p: made[p]))

    def part(start: int, stop: int) -> Tensor:
        return term.fn(**arguments(term.inputs, lambda p: _slice(p, made[p], start, stop)))

    return chunked(part, len(block), block.vocabulary, grad=torch.is_grad_enabled())


def weights_of(term: Term, made: Mapping[Product, Any], batch: Batch) -> Tensor:
    """How much each of a term's values counts in its mean: nothing where the row only evens the ranks out."""
    weight = batch.columns["row_weight"]
    if term.per == "token":
        weight = weight[batch.positions()[0]]
    if term.counts is None:
        return weight
    known = {k: v for k, v in term.inputs.items() if not passes(v if isinstance(v, tuple) else (v,))}
    return weight * term.counts(**arguments(known, lambda p: made[p]))


def free(term: Term) -> list[Product]:
    """What a term reads that costs no pass."""
    return [p for p in term.needs() if not passes([p])]


def arguments(inputs: Wiring, value: Callable[[Product], Any]) -> dict[str, Any]:
    """The parameters of a term's function; those that name several products get a tuple."""
    return {k: tuple(map(value, v)) if isinstance(v, tuple) else value(v) for k, v in inputs.items()}


def _slice(product: Product, value: Any, start: int, stop: int) -> Any:
    """The label positions of a chunk, of what has one entry per label token; all of anything else."""
    if isinstance(value, Logits):
        return value.rows(start, stop)
    return value[start:stop] if product.what in PER_TOKEN else value


def gather(term: Term, made: dict[Product, Any], sides: dict[str, Batch]) -> dict[Product, Any]:
    """The products named in ``term.gathered`` with the rows of all ranks, gradient included, fillers left out."""
    out = dict(made)
    for name in sorted(term.gathered):  # in the same order on every rank, which that of a set is not
        value = term.inputs[name]
        for product in [p for p in (value if isinstance(value, tuple) else (value,)) if p in made]:
            batch, own = sides[str(base_side(product.side))], made[product]
            weight = batch.columns["row_weight"]
            if product.what in PER_TOKEN:
                weight = weight[batch.positions()[0]]
            if product.what == "token_rows":  # each rank counts its own rows from 0
                own = own + ranks.place()[0] * len(batch.input_ids)
            out[product] = ranks.all_rows(own)[ranks.all_rows(weight) > 0]
    return out
