"""Arithmetic that several terms share, and the one-line refusal of options that they cannot work with."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def whole(term: str, option: str, value: int, of: str = "steps, or 0 for never") -> int:
    """Refuse an option that must be a whole number, 0 included.

    Args:
        term: Whose option it is.
        option: Its name.
        value: What was given.
        of: What is counted, for the refusal.

    Raises:
        UsageError: ``value`` is no such number.

    Example:
        >>> whole("quantile", "refresh", 6)
        6
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{term}: option '{option}' is {value!r}: give a whole number of {of}")
    return value


def layer_numbers(term: str, layers: str | int | Sequence[int]) -> tuple[int, ...]:
    """The layers that an option names: the ``"last"`` one, the last ``k``, or those listed (ours).

    Raises:
        UsageError: No layer, one twice, or the embeddings, which no block computes.

    Example:
        >>> layer_numbers("clreg", "last"), layer_numbers("clreg", 2), layer_numbers("clreg", [1, 3])
        ((-1,), (-1, -2), (1, 3))
    """
    if isinstance(layers, str):
        one_of(term, "layers", layers, ("last", "a number k for the last k", "a list of layers"))
        return (-1,)
    chosen = tuple(-1 - i for i in range(layers)) if isinstance(layers, int) else tuple(int(j) for j in layers)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"{term}: option 'layers' names no layer, or one twice: use 'last', a number or a list")
    if 0 in chosen:
        raise UsageError(f"{term}: option 'layers' has 0, the embeddings, which no block computes: use 1 or more")
    return chosen


def one_of(term: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is none of the words it may be.

    Raises:
        UsageError: ``value`` is not in ``allowed``.

    Example:
        >>> one_of("clreg", "loss", "dpo", ("dpo", "infonce"))
    """
    if value not in allowed:
        raise UsageError(f"{term}: option '{option}' is {value!r}: use {' or '.join(allowed)}")
