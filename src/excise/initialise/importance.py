"""Which weights a side needs, by gradients: squared gradients of the weights (FILA), variances of the adapter's (VILA).

What they cost, for n batches of tokens over P adapted parameters:

- squared gradients: forward and backward passes through the whole model and n x P squares; one fp32 number for each
  adapted weight and side is held, and one layer's gradient at a time (it is squared and freed as soon as it is whole).
- variances: the same passes, but only gradients of the adapter are formed and held: r (in + out) numbers a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from excise import ranks
from excise.forward import Anatomy, Batch, Step, token_logp
from excise.initialise.starts import Variances

#: The mean negative log-likelihood of a batch's label tokens, and how many there are.
Loss = Callable[[Batch], tuple[Tensor, int]]


def label_loss(model: nn.Module, anatomy: Anatomy) -> Loss:
    """The loss whose gradients are read: a batch's mean over its label tokens; prompt and padding do not count."""

    def loss(batch: Batch) -> tuple[Tensor, int]:
        asked = token_logp("rows")
        logp = Step(model, anatomy, {"rows": batch}).run([asked])[asked]
        return -logp.mean(), len(logp)

    return loss


def squared_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """I[W] = sum over batches of n_tok (dL/dW)^2, over the sum of n_tok; on several ranks, over all their batches.

    Args:
        model: Left as it was: weights, what is trained, and mode.
        weights: Name -> parameter; a few at a time where memory is short.
        batches: The same on all ranks; each takes its share of them.
        loss: Mean loss and number of label tokens of a batch.

    Returns:
        Name -> fp32, of the parameter's own shape.

    Source: LoKU, Cha et al. 2025, ICLR, equation of I_D; its token weights as in the public code.
    """
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    tokens, count = 0, [0]

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[name].addcmul_(weight.grad.float(), weight.grad.float(), value=float(count[0]))
            weight.grad = None

        return hook

    with _only(model, weights.values()):
        handles = [w.register_post_accumulate_grad_hook(keep(name)) for name, w in weights.items()]
        try:
            for batch in _share(batches):
                value, count[0] = loss(batch)
                value.backward()
                tokens += count[0]
        finally:
            for handle in handles:
                handle.remove()
    total = ranks.total(torch.tensor(float(tokens), dtype=torch.float64))
    return {name: ranks.total(value) / float(total) for name, value in sums.items()}


def adapter_variances(
    model: nn.Module,
    factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    deviation: float = 0.05,
    seed: int = 0,
) -> dict[str, Variances]:
    """Variance over batches, weighted by tokens, of the gradients of A and B at A, B ~ N(0, deviation^2).

    Args:
        model: Left as it was, its adapter included.
        factors: Layer -> the parameters (A, B) of its adapter.
        batches: The same on all ranks.
        loss: As in `squared_gradients`.
        deviation: Of the entries of A and B.
        seed: Of those entries; they are drawn layer by layer in order of name, on the CPU.

    Returns:
        Layer -> variances, fp32: E[g^2] - E[g]^2, not below 0.

    Source: VILA, Kim et al. 2025, arXiv 2508.21300.
    """
    names = sorted(factors)
    flat = [p for name in names for p in factors[name]]
    before = [p.detach().clone() for p in flat]
    first = [torch.zeros_like(p, dtype=torch.float64) for p in flat]
    second = [torch.zeros_like(p, dtype=torch.float64) for p in flat]
    tokens, generator = 0, torch.Generator().manual_seed(seed)
    with _only(model, flat):
        try:
            with torch.no_grad():
                for p in flat:
                    p.copy_(torch.randn(p.shape, generator=generator) * deviation)
            for batch in _share(batches):
                value, count = loss(batch)
                gradients = torch.autograd.grad(value, flat, materialize_grads=True)
                for one, two, g in zip(first, second, gradients, strict=True):
                    one.add_(g.double(), alpha=count)
                    two.addcmul_(g.double(), g.double(), value=count)
                tokens += count
        finally:
            with torch.no_grad():
                for p, value_before in zip(flat, before, strict=True):
                    p.copy_(value_before)
    total = float(ranks.total(torch.tensor(float(tokens), dtype=torch.float64)))
    means = [ranks.total(one) / total for one in first]
    found = [(ranks.total(two) / total - mean**2).clamp_min(0).float() for two, mean in zip(second, means, strict=True)]
    return {name: Variances(found[2 * i], found[2 * i + 1]) for i, name in enumerate(names)}


@contextmanager
def _only(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these parameters have gradients, in evaluation mode; afterwards everything is as before, without any."""
    trained = {p: p.requires_grad for p in model.parameters()}
    training, chosen = model.training, list(wanted)
    model.eval()
    try:
        for p in trained:
            p.requires_grad_(False)
            p.grad = None
        for p in chosen:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, before in trained.items():
            p.grad = None
            p.requires_grad_(before)
        model.train(training)


def _share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This rank's batches, whole: gradients of a batch's mean are the same on any number of ranks."""
    rank, world = ranks.place()
    return (batch for number, batch in enumerate(batches) if number % world == rank)
