"""ROL of the net update: what an adapter adds to the model that it started on, kept off the retained directions; ours.

ROL as published holds B. With a start like RILA's, B carries a part of the model itself, which the base lacks from then
on: holding B off the retained directions takes that part of the original function away. Held here is P' (B A - B0 A0),
which is zero at the start. A term for this study: it remembers the factors of the first step, so that a run cannot be
resumed with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from excise.forward import constant, lora
from excise.objectives import Term

Factors = Mapping[str, Tensor]


class Net:
    """``sum over layers ||P' (B A - B0 A0)||_F^2``, with the factors of the first call as A0 and B0.

    Example:
        >>> held, eye = Net(), {"q": torch.eye(2)}
        >>> float(held(eye, eye, eye)), float(held(eye, {"q": 2 * torch.eye(2)}, eye))
        (0.0, 2.0)
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def __call__(self, a: Factors, b: Factors, basis: Factors) -> Tensor:
        """A number; every layer has a basis."""
        if not self.start:
            self.start = {n: (basis[n].to(b[n]).T @ b[n].detach()) @ a[n].detach() for n in b}
        return torch.stack([((basis[n].to(b[n]).T @ b[n]) @ a[n] - self.start[n]).square().sum() for n in b]).sum()


def rol(k: int = 8, weight: float = 1.0) -> Term:
    """The term.

    Args:
        k: Directions of the retain basis.
        weight: Weight of the term.

    Source: ours; ROL as published: Xiao, Mo et al. 2026, arXiv 2604.17396.
    """
    inputs = {"a": lora("A"), "b": lora("B"), "basis": constant(f"retain_basis/{k}")}
    return Term("net_rol", Net(), inputs, per="step", weight=weight)
