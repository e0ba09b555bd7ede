"""What the CLReg study runs: objectives, what is tuned, and every row in the order in which it is worth having."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Terms = dict[str, Any]

#: Forget and retain terms of each base; what the papers fix is fixed, the rate is tuned.
BASES: dict[str, tuple[Terms, Terms]] = {
    "graddiff": ({"ga": {}}, {"nll": {}}),
    "npo": ({"npo": {"beta": 0.1}}, {"nll": {}}),
    "simnpo": ({"simnpo": {"beta": 2.5}}, {"nll": {}}),
    # UNDIAL's code averages over all positions, which anchors the rest; masked as it should be it needs a retain term.
    "undial": ({"undial": {"beta": 10.0}}, {"nll": {}}),
    # epsilon about twice the original's own loss; the multiplier starts low because no warm-up fits so short a run.
    "pdu": ({"pdu": {}}, {"primal_dual": {"epsilon": 0.2, "eta": 5.0, "weight": 10.0, "warmup": 0.0}}),
}
#: Four tuning trials for each side of the comparison: rates for the base; rates x weights with the regulariser.
RATES = {"graddiff": [1e-5, 5e-5, 1e-4, 2e-4]}
RATES_DEFAULT = [2e-4, 5e-4, 1e-3, 2e-3]
#: An earlier round found that 0.1 and 1 change nothing for GradDiff, UNDIAL and PDU.
WEIGHTS = {"npo": [1.0, 5.0], "graddiff": [1.0, 10.0], "undial": [1.0, 10.0], "pdu": [1.0, 10.0]}
WEIGHTS_DEFAULT = [0.1, 1.0]
CLREG: Terms = {"temperature": 0.5, "weight": 0.1, "dropout": 0.1}
_CLREG = "objective.regularise.clreg."
#: The control of the aligned rows: as many steps as 10 epochs of 200 forget rows take, on retain rows alone.
RETAIN_ONLY: Terms = {"objective.forget": {}, "schedule.steps": 130}


@dataclass(frozen=True)
class Row:
    """One run of the study.

    Attributes:
        name: Its folder.
        base: Key of ``BASES``.
        split: Which authors are forgotten.
        seed: Of the unlearning run.
        clreg: Whether CLReg is added.
        group: ``main``, or what is varied.
        changes: Recipe keys with their values, beside the tuned ones.
        start: Which model is made to forget: ``original`` or ``aligned``.
    """

    name: str
    base: str
    split: str
    seed: int
    clreg: bool
    group: str = "main"
    changes: Terms = field(default_factory=dict)
    start: str = "original"


def space(base: str, *, clreg: bool) -> Terms:
    """What the four trials of a row try."""
    rates = RATES.get(base, RATES_DEFAULT)
    if not clreg:
        return {"optimiser.lr": rates}
    return {"optimiser.lr": rates[1:3], _CLREG + "weight": WEIGHTS.get(base, WEIGHTS_DEFAULT)}


def quick() -> Iterator[Row]:
    """The two rows of a first look."""
    yield from (_main("simnpo", "forget05", 0, flag) for flag in (False, True))


def full() -> Iterator[Row]:
    """SimNPO with and without CLReg on all of TOFU."""
    yield from (_main("simnpo", "forget10", seed, flag) for seed, flag in itertools.product(range(3), (False, True)))


def whole() -> Iterator[Row]:
    """Every row, the most telling first."""
    small, both = ("forget05", "forget01"), (False, True)
    yield from (_main(base, "forget10", 0, flag) for base, flag in itertools.product(_ORDER, both))
    yield from _one_change()
    yield from _aligned(0)
    yield from (_main(base, split, 0, flag) for split, base, flag in itertools.product(small, _ORDER, both))
    yield from (_main(base, "forget10", seed, flag) for seed, base, flag in itertools.product((1, 2), _ORDER, both))
    yield from itertools.chain(_aligned(1), _aligned(2))
    every = itertools.product(small, (1, 2), _ORDER, both)
    yield from (_main(base, split, seed, flag) for split, seed, base, flag in every)


_ORDER = ("simnpo", "npo", "graddiff", "undial", "pdu")


def _main(base: str, split: str, seed: int, clreg: bool) -> Row:
    return Row(f"{base}{'+clreg' if clreg else ''}-{split}-s{seed}", base, split, seed, clreg)


def _one_change() -> Iterator[Row]:
    """SimNPO + CLReg at 10 % with one thing changed."""
    varied: dict[str, tuple[str, dict[str, Any]]] = {
        "layers": ("layers", {f"last{k}": k for k in (2, 4)}),
        "temperature": ("temperature", {f"tau{t}": t for t in (0.1, 0.3, 0.7, 0.9)}),
        "views": ("views", {f"views-{v}": v for v in ("paraphrase", "both")}),
        "stop-gradient": ("detach_negative", {"detached": True}),
    }
    for group, (key, choices) in varied.items():
        for name, value in choices.items():
            yield Row(name, "simnpo", "forget10", 0, True, group, {_CLREG + key: value})


def _aligned(seed: int) -> Iterator[Row]:
    """Forgetting 10 % from a model that was first aligned to a preference, and training on retain rows alone."""
    for name, clreg, changes in (
        ("simnpo", False, {}),
        ("simnpo+clreg", True, {}),
        ("retain-only", False, RETAIN_ONLY),
    ):
        yield Row(f"aligned-{name}-s{seed}", "simnpo", "forget10", seed, clreg, "aligned", changes, "aligned")
