"""The reference: what terms read of the model as it was before the run, computed once instead of held as a model.

A number per row or token is stored as it is. Where logits are read, the states at label positions are stored and the
frozen head is applied to them again: exact, and D numbers a token instead of V.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from excise.forward import (
    Anatomy,
    Batch,
    Logits,
    Product,
    Step,
    at_labels,
    base_side,
    hidden,
    logits,
    logp_of,
    pooled,
    token_logp,
)

#: Bytes above which a stored tensor lives in a memory-mapped temporary file that has no name.
IN_MEMORY = 512 * 2**20


@dataclass
class _Ragged:
    """Rows of different length, one after the other."""

    values: Tensor
    offsets: Tensor

    def rows(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.values[self.offsets[i] : self.offsets[i + 1]] for i in indices]


@dataclass
class Reference:
    """Stored products of the original model, looked up by row.

    Example:
        >>> Reference({}, None).stored
        {}
    """

    stored: dict[Product, _Ragged]
    head: Callable[[Tensor], Tensor] | None
    vocabulary: int = 0
    _files: list = field(default_factory=list)

    def __call__(self, product: Product, batch: Batch) -> Tensor | Logits:
        """The product for the rows of ``batch``; called by the engine."""
        device = batch.input_ids.device
        if product.what in ("logits", "token_logp", "at_labels"):
            block = torch.cat(self._stored(product).rows(batch.indices)).to(device)
            if product.what != "logits":
                return block
            assert self.head is not None
            return Logits(block, self.head, self.vocabulary)
        rows = self._stored(product).rows(batch.indices)
        if product.what == "pooled":
            return torch.cat(rows).to(device)
        out = torch.zeros(*batch.input_ids.shape, rows[0].shape[-1], dtype=rows[0].dtype)
        attended = batch.attention_mask.bool().cpu()
        for i, row in enumerate(rows):
            out[i, attended[i]] = row
        return out.to(device)

    def _stored(self, product: Product) -> _Ragged:
        return self.stored[_key(product)]


def _key(p: Product) -> Product:
    """One stored tensor serves every product that can be read from it."""
    side, layer = base_side(p.side), p.layer
    assert side is not None
    if p.what in ("seq_logp", "token_logp"):
        return token_logp(side, p.model)
    if p.what == "logits":
        return logits(side, p.model)
    assert layer is not None
    if p.what == "at_labels":
        return at_labels(side, layer, p.model)
    return pooled(side, layer, str(p.detail), p.model) if p.what == "pooled" else hidden(side, layer, p.model)


def stored_products(needs: Sequence[Product], model: str) -> list[Product]:
    """What has to be stored so that ``needs`` of ``model`` can be looked up."""
    from_pass = {"token_logp", "seq_logp", "logits", "hidden", "pooled", "at_labels"}
    return list(dict.fromkeys(_key(p) for p in needs if p.model == model and p.what in from_pass))


@torch.no_grad()
def store(
    model: nn.Module,
    anatomy: Anatomy,
    needs: Sequence[Product],
    rows: dict[str, int],
    collate: Callable[[str, Sequence[int]], Batch],
    *,
    autocast: Callable[[], AbstractContextManager],
    only: Mapping[str, Sequence[int]] | None = None,
    batch_rows: int = 16,
    device: torch.device | str = "cpu",
) -> Reference:
    """Compute what ``needs`` reads of the reference, in one pass per side over the rows that a run will read.

    Args:
        model: The model before the run, in evaluation mode afterwards as before.
        anatomy: Its parts.
        needs: Products with ``model=REFERENCE``.
        rows: Rows of each side.
        collate: Makes the batch of some rows of a side.
        only: The rows of each side that will be looked up; None, or a side that is not named: all.
        autocast: The precision of the run, so that reference and policy agree at the first step.
        batch_rows: Rows in a batch.
        device: Where the model is.

    Returns:
        A `Reference` that the engine calls.
    """
    keys = stored_products(needs, "reference")
    if not keys:
        return Reference({}, None)
    training = model.training
    model.eval()
    parts: dict[Product, list[list[Tensor]]] = {p: [] for p in keys}
    for side in dict.fromkeys(base_side(p.side) for p in keys):
        assert side is not None
        own, chosen = [p for p in keys if p.side == side], (only or {}).get(side, range(rows[side]))
        for start in range(0, len(chosen), batch_rows):
            batch = collate(side, chosen[start : start + batch_rows]).to(device)
            with autocast():
                policy = {p: Product(p.what, p.side, "policy", p.layer, p.detail) for p in own}
                made = Step(model, anatomy, {side: batch}).run(list(policy.values()))
            for p in own:
                parts[p].append(_split(p, made[policy[p]], batch))
    model.train(training)
    reference = Reference({}, None)
    for p, batches in parts.items():
        side, found = str(p.side), [row for rows_ in batches for row in rows_]
        if only is not None and side in only:
            found = _in_place(found, only[side], rows[side])
        reference.stored[p] = _ragged(found, reference._files)
    if any(p.what == "logits" for p in keys):
        reference.head, reference.vocabulary = _frozen_head(anatomy), anatomy.vocabulary
    return reference


def _split(p: Product, value: Tensor | Logits, batch: Batch) -> list[Tensor]:
    """The rows of a product of one batch."""
    if p.what in ("token_logp", "logits", "at_labels"):
        flat = value.states if isinstance(value, Logits) else value
        return list(flat.cpu().split(batch.label_mask.sum(1).tolist()))
    assert isinstance(value, Tensor)
    if p.what == "pooled":
        return list(value.cpu().split(1))
    attended = batch.attention_mask.bool()
    return [value[i, attended[i]].cpu() for i in range(len(value))]


def _in_place(found: list[Tensor], chosen: Sequence[int], rows: int) -> list[Tensor]:
    """A row for every number, empty where it was left out."""
    out = [found[0][:0]] * rows
    for number, row in zip(chosen, found, strict=True):
        out[number] = row
    return out


def _ragged(rows: list[Tensor], files: list) -> _Ragged:
    offsets = torch.tensor([0, *[len(r) for r in rows]]).cumsum(0)
    shape = (int(offsets[-1]), *rows[0].shape[1:])
    if np.prod(shape, dtype=np.int64) * rows[0].element_size() <= IN_MEMORY:
        return _Ragged(torch.cat(rows), offsets)
    file = tempfile.NamedTemporaryFile(prefix="excise-reference-", delete=False)  # noqa: SIM115 - lives as the store does
    files.append(file)
    try:
        values = torch.from_file(file.name, shared=True, size=int(np.prod(shape)), dtype=rows[0].dtype).view(shape)
    finally:
        os.unlink(file.name)  # what is mapped stays; under a name states would outlive a process that is killed
    for row, start in zip(rows, offsets.tolist(), strict=False):
        values[start : start + len(row)] = row
    return _Ragged(values, offsets)


def _frozen_head(anatomy: Anatomy) -> Callable[[Tensor], Tensor]:
    """A copy of the head as it is now; the policy's own moves on."""
    import copy
    from dataclasses import replace

    frozen = replace(anatomy, head=copy.deepcopy(anatomy.head).requires_grad_(False))
    return frozen.logits


__all__ = ["Reference", "logp_of", "store", "stored_products"]
