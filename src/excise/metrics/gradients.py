"""The gradient norm of each row: what the gradient-norm membership attack reads, at a backward pass for every row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise.forward import Anatomy, Batch, Pass, chunked, label_logp, run_pass
from excise.records import Record
from excise.tasks import causal_lm


def gradient_norms(
    model: nn.Module,
    anatomy: Anatomy,
    tokenizer: Any,
    records: Sequence[Record],
    encoding: causal_lm.Encoding,
    *,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """``[rows]`` mean over parameter tensors of the L2 norm of the gradient of the row's mean negative log-likelihood.

    Every floating-point parameter counts, trained or not, an adapter's as well as those beneath it. Without dropout
    (OpenUnlearning measures in training mode; models without dropout give the same number). Rows that were trained on
    have small gradients. Weights, gradients, ``requires_grad`` and modes are left as they are. Memory: one gradient.

    Args:
        model: A causal language model.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: Rows of one side.
        encoding: How text becomes tokens.
        source: The side, for messages.
        progress: Called with (rows done, all rows).

    Source:
        Wang et al., 2402.17012; as measured by OpenUnlearning.
    """
    examples = causal_lm.encode_records(records, tokenizer, encoding, source=source)
    device = next(model.parameters()).device
    norms = np.empty(len(examples))
    with _differentiable(model) as parameters:
        for row, example in enumerate(examples):
            made = causal_lm.collate([example], pad_id=0)
            batch = Batch(made["input_ids"], made["attention_mask"], made["label_mask"]).to(device)
            gradients = torch.autograd.grad(_loss(model, anatomy, batch), parameters, allow_unused=True)
            sizes = [float(torch.linalg.vector_norm(g.float())) for g in gradients if g is not None]
            norms[row] = float(np.mean(sizes))
            if progress is not None:
                progress(row + 1, len(examples))
    return norms


def _loss(model: nn.Module, anatomy: Anatomy, batch: Batch) -> torch.Tensor:
    states = run_pass(model, anatomy, batch, Pass(head=True)).at_labels
    assert states is not None
    targets = batch.targets()

    def part(start: int, stop: int) -> torch.Tensor:
        return label_logp(anatomy.logits(states[start:stop]), targets[start:stop])

    return -chunked(part, len(targets), anatomy.vocabulary, grad=True).mean()


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All floating-point parameters with gradients on, in evaluation mode; afterwards everything is as it was."""
    everything = list(model.parameters())
    needs = [p.requires_grad for p in everything]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parameters = [p for p in everything if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield parameters
    finally:
        for p, need in zip(everything, needs, strict=True):
            p.requires_grad_(need)
        for module, training in modes:
            module.training = training
