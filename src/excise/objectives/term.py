"""A term of the objective: a pure function, the tensors that feed it, and a weight that may have state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from excise.errors import UsageError
from excise.forward import Product


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from ``start`` to ``end`` and stays there from ``until`` (a share of the run) on.

    Example:
        >>> Ramp(0.0, 1.0, until=0.5).at(0.25)
        0.5
    """

    start: float
    end: float
    until: float = 1.0

    def at(self, progress: float) -> float:
        """The weight when ``progress`` (0 to 1) of the run is done."""
        share = 1.0 if self.until <= 0 else min(progress / self.until, 1.0)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Dual:
    """A Lagrange multiplier on ``term <= epsilon``, raised by dual ascent (PDU; METHODS of primal-dual unlearning).

    The engine updates it once per optimizer step, from the term's mean over the whole accumulation window and all
    ranks, and saves it with the trainer's state: ``w <- max(0, w + eta * (mean - epsilon))`` after ``warmup`` (a share
    of the run) is over.

    Example:
        >>> Dual(start=1.0, epsilon=0.5, eta=2.0).updated(1.0, value=0.75, progress=0.0)
        1.5
    """

    start: float
    epsilon: float
    eta: float
    warmup: float = 0.0

    def updated(self, weight: float, *, value: float, progress: float) -> float:
        """The multiplier after a step whose term had the mean ``value``."""
        if progress < self.warmup:
            return weight
        return max(0.0, weight + self.eta * (value - self.epsilon))


Weight = float | Ramp | Dual


def divided(term: str, weight: Weight, parts: int) -> float | Ramp:
    """The weight of each of several terms that an option makes; a multiplier found for one of them fits no other.

    Raises:
        UsageError: The weight is dual.

    Example:
        >>> divided("clreg", Ramp(0.0, 1.0), 2)
        Ramp(start=0.0, end=0.5, until=1.0)
    """
    if isinstance(weight, Dual):
        raise UsageError(f"{term}: several terms share this weight: give a number or a Ramp")
    if isinstance(weight, Ramp):
        return replace(weight, start=weight.start / parts, end=weight.end / parts)
    return weight / parts


@dataclass(frozen=True)
class Term:
    """One summand of the objective: ``weight * mean(fn(**inputs))``.

    ``fn`` sees nothing but the tensors that ``inputs`` names, so what a step costs is known before a model loads.
    It returns one value per row or per label token of the side ``over``; the engine takes the mean over the whole
    accumulation window and all ranks, and leaves out rows that only pad a batch. A term ``per="step"`` is a property
    of the weights and reads no side: it returns one number, which counts once in every optimizer step (those that only
    retain included), whatever the accumulation and the number of ranks.

    Attributes:
        name: How logs and the report call it.
        fn: Pure function of the tensors named in ``inputs``.
        inputs: Parameter of ``fn`` -> what feeds it; a tuple of products arrives as a tuple of tensors.
        over: The side whose rows or label tokens the values belong to; None for ``per="step"``.
        per: ``"row"`` (values ``[B]``), ``"token"`` (values ``[n]``) or ``"step"`` (a value without axes).
        weight: A number, a `Ramp`, or a `Dual`.
        batch_coupled: A row's value depends on the other rows of the batch (in-batch contrast).
        gathered: Parameters that are gathered from all ranks, with gradient.
        monitor: Named scalars to log, from the same tensors, without gradient.
        counts: How much each value counts in the mean, ``[B]`` or ``[n]`` and never below 0, from those of the inputs
            that cost no pass; None: each as one. The engine divides by the sum of it.

    Raises:
        ValueError: ``over`` is missing, or is named (or a side is read) by a term ``per="step"``.

    Example:
        >>> from excise.forward import token_logp
        >>> Term("ga", lambda logp: logp, {"logp": token_logp("forget")}, over="forget", per="token").weight
        1.0
    """

    name: str
    fn: Callable[..., Tensor]
    inputs: Mapping[str, Product | tuple[Product, ...]]
    over: str | None = None
    per: Literal["row", "token", "step"] = "row"
    weight: Weight = 1.0
    batch_coupled: bool = False
    gathered: frozenset[str] = frozenset()
    monitor: Callable[..., dict[str, Tensor]] | None = None
    counts: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        sides = {p.side for p in self.needs()} - {None}
        if self.per == "step" and (self.over is not None or sides):
            raise ValueError(f"the term {self.name!r} counts once per step: it has no rows, so it can read no side")
        if self.per != "step" and self.over is None:
            raise ValueError(f"the term {self.name!r} has values per {self.per}: name the side that they are of (over)")

    def needs(self) -> list[Product]:
        """Every product that this term reads, tuples unrolled."""
        return [p for value in self.inputs.values() for p in (value if isinstance(value, tuple) else (value,))]
