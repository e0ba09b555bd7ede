"""Arithmetic that several terms share, and the one-line refusal of options that they cannot work with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.errors import UsageError


def upcast(values: Tensor) -> Tensor:
    """The same numbers in at least single precision: halves become fp32, fp32 and fp64 stay (ours).

    Example:
        >>> upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def unit_rows(vectors: Tensor) -> Tensor:
    """The same directions with length 1, in at least single precision (ours).

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]])).norm().item()
        1.0
    """
    return F.normalize(upcast(vectors), dim=-1, eps=1e-8)


def row_means(values: Tensor, where: Tensor) -> Tensor:
    """``[B]`` means of ``values [n]``, one value per true entry of ``where [B, T]``, rows one after the other.

    A row without a true entry has the mean 0. Source: ours.

    Example:
        >>> row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[True, True], [False, True]])).tolist()
        [2.0, 5.0]
    """
    rows = where.nonzero(as_tuple=True)[0]
    total = values.new_zeros(where.shape[0]).index_add(0, rows, values)
    return total / where.sum(1).clamp_min(1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def above_zero(term: str, option: str, value: float) -> None:
    """Refuse an option that must be a finite number above zero.

    Raises:
        UsageError: ``value`` is zero, negative, infinite or not a number.

    Example:
        >>> above_zero("npo", "beta", 0.1)
    """
    if not (_is_number(value) and value > 0):
        raise UsageError(f"{term}: option '{option}' is {value!r}: give a finite number above 0")


def at_least_zero(term: str, option: str, value: float) -> None:
    """Refuse an option that must be a finite number of at least zero.

    Raises:
        UsageError: ``value`` is negative, infinite or not a number.

    Example:
        >>> at_least_zero("wga", "beta", 0.0)
    """
    if not (_is_number(value) and value >= 0):
        raise UsageError(f"{term}: option '{option}' is {value!r}: give a finite number of at least 0")


def one_of(term: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is none of the words it may be.

    Raises:
        UsageError: ``value`` is not in ``allowed``.

    Example:
        >>> one_of("clreg", "loss", "dpo", ("dpo", "infonce"))
    """
    if value not in allowed:
        raise UsageError(f"{term}: option '{option}' is {value!r}: use {' or '.join(allowed)}")
