"""An optimizer whose updates have a shape: W = W0 + Q M P, where AdamW moves M and decay pulls it back to zero.

The model keeps plain weights W throughout: checkpoints, averages and exports need not know that M exists. The gradient
of M is Q' (dL/dW) P, and W follows M by Q dM P, once per optimizer step: the cost does not grow with tokens or
micro-batches, and gradients of several ranks are those of W, which their wrapper already adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What an update of a weight looks like: Q M P.

    Attributes:
        inputs: ``[in, in]`` P, symmetric; layers that read the same input may share the tensor.
        outputs: ``[out, r]`` Q with orthonormal columns, or None for all outputs.
        transposed: The weight is stored as ``[in, out]`` (GPT-2's `Conv1D`).

    Example:
        >>> shape = Shape(2 * torch.eye(2), torch.tensor([[1.0], [0.0]]))
        >>> shape.size(nn.Parameter(torch.zeros(2, 2))), shape.outward(torch.ones(1, 2)).tolist()
        ((1, 2), [[2.0, 2.0], [0.0, 0.0]])
    """

    inputs: Tensor
    outputs: Tensor | None = None
    transposed: bool = False

    def size(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of M."""
        rows = weight.shape[1 if self.transposed else 0] if self.outputs is None else self.outputs.shape[1]
        return int(rows), len(self.inputs)

    def narrow(self, gradient: Tensor) -> Tensor:
        """``Q' G``: rows of M from rows of the weight."""
        own = gradient.T if self.transposed else gradient
        return own if self.outputs is None else self.outputs.T @ own

    def shaped(self, gradient: Tensor) -> Tensor:
        """``Q Q' G P`` as the weight is stored: its norm is that of the gradient of M."""
        return self.outward(self.narrow(gradient))

    def outward(self, change: Tensor) -> Tensor:
        """``Q dM P`` as the weight is stored."""
        out = change @ self.inputs
        out = out if self.outputs is None else self.outputs @ out
        return out.T if self.transposed else out


class Shaped(torch.optim.Optimizer):
    """AdamW on M for weights that have a `Shape`, and on the others themselves.

    Decoupled decay acts on M alone, so that it pulls shaped weights back to where they started; other weights do not
    decay. Its state holds M, so that a resumed run goes on exactly.

    Args:
        weights: The parameters whose updates are shaped, fp32.
        shapes: Their shapes.
        others: Parameters that are moved as they are.
        lr: Learning rate.
        betas: AdamW's.
        weight_decay: Of M.

    Source: ours; the preconditioner is that of natural-gradient methods on one side (K-FAC, Martens and Grosse 2015).

    Example:
        >>> weight = nn.Parameter(torch.zeros(1, 2))
        >>> moved = Shaped([weight], [Shape(torch.diag(torch.tensor([1.0, 0.0])))], [], lr=0.1)
        >>> weight.grad = torch.ones(1, 2)
        >>> moved.step()
        >>> [[round(w, 4) for w in row] for row in weight.tolist()]
        [[-0.1, 0.0]]
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        shapes: Sequence[Shape],
        others: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.weights, self.shapes = list(weights), _on_device(weights, shapes)
        self.moved = [nn.Parameter(w.new_zeros(s.size(w))) for w, s in zip(weights, self.shapes, strict=True)]
        groups = [{"params": self.moved, "weight_decay": weight_decay}, {"params": list(others), "weight_decay": 0.0}]
        self.inner = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        self._turned = False
        super().__init__(self.inner.param_groups, {})

    @torch.no_grad()
    def shape(self) -> None:
        """Turn the gradients of shaped weights into those of M, once per step: before they are clipped."""
        if not self._turned:
            for weight, shape in zip(self.weights, self.shapes, strict=True):
                if weight.grad is not None:
                    weight.grad.copy_(shape.shaped(weight.grad))
            self._turned = True

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Move M, let the weights follow, and move the others."""
        self.shape()
        before = []
        for weight, moved, shape in zip(self.weights, self.moved, self.shapes, strict=True):
            moved.grad = None if weight.grad is None else _own(shape, weight.grad)
            before.append(None if weight.grad is None else moved.detach().clone())
        self.inner.step()
        for weight, moved, shape, was in zip(self.weights, self.moved, self.shapes, before, strict=True):
            if was is not None:
                weight.add_(shape.outward(moved - was))
                moved.grad = None
        self._turned = False

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and M."""
        return {"inner": self.inner.state_dict(), "moved": [m.detach() for m in self.moved]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load both and share the groups again."""
        self.inner.load_state_dict(state["inner"])
        for own, saved in zip(self.moved, state["moved"], strict=True):
            own.copy_(saved)
        self.param_groups = self.inner.param_groups


def _own(shape: Shape, gradient: Tensor) -> Tensor:
    """The gradient of M from the shaped gradient of its weight."""
    return shape.narrow(gradient).contiguous()


def _on_device(weights: Sequence[nn.Parameter], shapes: Sequence[Shape]) -> list[Shape]:
    """Shapes where their weights are; a tensor that several share is moved once."""
    held: dict[tuple[int, torch.device], Tensor] = {}

    def place(x: Tensor, device: torch.device) -> Tensor:
        return held.setdefault((id(x), device), x.to(device))

    return [
        Shape(place(s.inputs, w.device), None if s.outputs is None else place(s.outputs, w.device), s.transposed)
        for w, s in zip(weights, shapes, strict=True)
    ]
