"""The least change that makes the mean states of two kinds of rows agree, in closed form: plain linear algebra.

A linear probe can do no better than a constant guess exactly when the class-conditional means agree (Belrose et al.
2306.03819, theorem 3.1). Their closed form moves all rows least; here the retained rows are moved least, and what may
be changed is a linear map that a checkpoint can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What is added to an affine map: ``z -> weight z + bias``.

    Attributes:
        weight: ``[D, M]`` float64, of rank k at most.
        bias: ``[D]`` float64, or None where the map has none.
    """

    weight: Tensor
    bias: Tensor | None = None

    def of(self, inputs: Tensor) -> Tensor:
        """``[..., D]`` what is added for ``inputs [..., M]``."""
        added = inputs.double() @ self.weight.T
        return added if self.bias is None else added + self.bias

    def cost(self, moments: Moments) -> float:
        """Mean squared length of what is added, over the rows of ``moments``."""
        total = torch.einsum("dm,mn,dn->", self.weight, moments.second, self.weight)
        if self.bias is not None:
            total = total + 2 * self.bias @ self.weight @ moments.mean + self.bias @ self.bias
        return float(total)


@dataclass(frozen=True)
class Moments:
    """Mean and second moment of inputs over observations.

    Attributes:
        mean: ``[M]`` float64.
        second: ``[M, M]`` float64, the mean of ``z zᵀ``, not centred.
        count: Observations.

    Example:
        >>> Moments.of(torch.eye(2)).mean.tolist()
        [0.5, 0.5]
    """

    mean: Tensor
    second: Tensor
    count: int

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Of ``inputs [n, M]``, n >= 1."""
        z = inputs.double()
        return cls(z.mean(0), z.T @ z / len(z), len(z))

    def joined(self, other: Moments) -> Moments:
        """Of both sets of observations together."""
        n = self.count + other.count
        a, b = self.count / n, other.count / n
        return Moments(a * self.mean + b * other.mean, a * self.second + b * other.second, n)

    @property
    def covariance(self) -> Tensor:
        """``[M, M]`` centred."""
        return self.second - torch.outer(self.mean, self.mean)


def least_change(states: Tensor, inputs: Tensor, kept: Moments, *, biased: bool = False, ridge: float = 0.0) -> Change:
    """The change of an affine map that takes a difference of means out of the states, and moves kept rows least.

    The states are ``x = rest + map(z)``. Of all changes that turn the difference ``states`` between class means into
    zero, it is the one with the least mean squared move of the kept rows: ``-X (Zᵀ S⁻¹ Z)⁻¹ Zᵀ S⁻¹`` with X the
    differences of the states, Z those of the inputs, S the kept rows' second moment (their covariance where a bias may
    undo the mean move). With ``inputs`` = ``states`` it is a projection of the states themselves.

    Args:
        states: ``[D]`` or ``[k, D]``: class mean minus that of the class to be like.
        inputs: ``[M]`` or ``[k, M]``: the same difference of what the map reads.
        kept: Of what the map reads in rows that are to move least.
        biased: Whether the map has a bias that may be changed too.
        ridge: Share of the mean variance added to the diagonal of S: with few kept observations S is not known well.

    Raises:
        ValueError: The inputs do not differ where the states do, or S has no inverse (give a ridge).

    Source:
        Ours, after LEACE (Belrose et al. 2306.03819, theorem 4.3), whose solution it is for k = 1, ``inputs`` =
        ``states``, ``biased`` and the moments of all rows.

    Example:
        >>> kept = Moments.of(torch.eye(2))
        >>> least_change(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), kept).weight.tolist()
        [[-1.0, -0.0], [0.0, 0.0]]
    """
    x = torch.atleast_2d(states.double()).T
    z = torch.atleast_2d(inputs.double()).T
    metric = kept.covariance if biased else kept.second
    metric = metric + ridge * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
    factor, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed):
        raise ValueError("the kept rows do not span what the map reads: give a ridge above 0")
    whitened = torch.linalg.solve_triangular(factor, z, upper=False)  # L⁻¹ Z, so that ZᵀS⁻¹Z is its square
    reading = torch.linalg.solve_triangular(factor.T, whitened, upper=True)  # S⁻¹ Z
    weight = -x @ torch.linalg.pinv(whitened.T @ whitened, hermitian=True) @ reading.T
    if float((weight @ z + x).norm()) > 1e-6 * float(x.norm()):
        raise ValueError("what the map reads does not differ where the states do: nothing it can do makes them agree")
    return Change(weight, -weight @ kept.mean if biased else None)


def applied(change: Change, states: Tensor, inputs: Tensor) -> Tensor:
    """``[n, D]`` float64 states after a change of the map that reads ``inputs``.

    Example:
        >>> applied(Change(torch.zeros(1, 1, dtype=torch.float64)), torch.ones(2, 1), torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
    """
    return states.double() + change.of(inputs)
