"""What the ReGLU study runs: losses, starts, what is tuned, and every row in the order in which it is worth having."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Terms = dict[str, Any]

#: Forget terms; beside each stands the cross-entropy of as many retained rows.
LOSSES: dict[str, Terms] = {
    "ihl": {"ihl": {}},
    "npo": {"npo": {"beta": 0.1}},
    "graddiff": {"ga": {}},
    "simnpo": {"simnpo": {"beta": 2.5}},
    "wga": {"wga": {"beta": 1.0}},
}
#: Where the adapter starts, and whether ROL holds it.
STARTS: dict[str, tuple[Terms, bool]] = {
    "plain": ({}, False),
    "rila": ({"rila": {"beta": 0.5}}, False),
    "rila+rol": ({"rila": {"beta": 0.5}}, True),
    "fila": ({"fila": {}}, False),
    "rol": ({}, True),
    "vila": ({"vila": {}}, False),
    "pissa": ({"pissa": {}}, False),
}
#: Ours: a forget loss with an aim, to where rows lie that the model never saw, beside states that stay where they were.
#: Not tuned: rank, steps and rates are those of nine short runs on the authors of the trials (docs/log.md).
AIMED = "quantile"
LOSSES[AIMED] = {"quantile": {"refresh": 6, "refresh_rows": 128, "weight": 2.0}}
AIMED_RATES = {"plain": 7e-3, "rila": 1.5e-3}
_HELD: Terms = {"sides": ["retain", "never_seen"], "layers": 2, "weight": 30.0}
_AIMED: Terms = {
    "objective.retain": {"nll": {"weight": 4.0}, "anchor": _HELD},
    "schedule.steps": 640, "schedule.never_seen_batch": 12,
    "model.lora": {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"},
}  # fmt: skip
MAIN = ("ihl", "npo")
OTHERS = ("graddiff", "simnpo", "wga")
OTHER_STARTS = ("plain", "rila+rol", "fila", "vila")
#: In earlier trials a weight of 0.01 changed nothing and 1 cost retained answers.
ROL: Terms = {"k": 8, "weight": 0.1}
_ROL = "objective.regularise.rol."


@dataclass(frozen=True)
class Row:
    """One run of the study.

    Attributes:
        name: Its folder.
        loss: Key of ``LOSSES``.
        start: Key of ``STARTS``.
        split: Which authors are forgotten.
        seed: Of the unlearning run.
        group: ``main``, or what is varied.
        changes: Recipe keys with their values, beside the tuned ones.
        rate: Share of the tuned learning rate.
    """

    name: str
    loss: str
    start: str
    split: str
    seed: int
    group: str = "main"
    changes: Terms = field(default_factory=dict)
    rate: float = 1.0


#: Four rates a factor of about 2.5 apart: higher where B starts at zero, far lower under VILA's factors, which are so
#: unequal in size that its adapter turns over at the others' rates.
_AT_ZERO = [3e-3, 7e-3, 1.5e-2, 3.5e-2]
_GRIDS = {"plain": _AT_ZERO, "rol": _AT_ZERO, "vila": [3e-5, 7e-5, 1.5e-4, 3.5e-4]}
_GRID = [1.5e-3, 3.5e-3, 8e-3, 2e-2]


def rates(loss: str, start: str) -> list[float]:
    """The four learning rates that are tried."""
    scale = 0.1 if loss == "graddiff" else 1.0
    return [float(f"{scale * rate:g}") for rate in _GRIDS.get(start, _GRID)]


def untried(loss: str, start: str) -> float:
    """The rate that is taken where none is tuned: that of ours, the second of the others' grid."""
    return AIMED_RATES[start] if loss == AIMED else rates(loss, start)[1]


def quick() -> Iterator[Row]:
    """The three rows of a first look."""
    yield from (_main("npo", start, "forget05", 0) for start in ("plain", "rila", "rila+rol"))


def whole(better: str) -> Iterator[Row]:
    """Every row, the most telling first.

    Args:
        better: Which of ``MAIN`` the sweeps are run with.
    """
    yield from (_main(loss, start, "forget10", 0) for start, loss in itertools.product(STARTS, MAIN))
    yield from _sweeps(better, "forget10")
    yield from _longer()
    yield from _aimed()
    yield from (_main(loss, start, "forget10", 0) for loss, start in itertools.product(OTHERS, OTHER_STARTS))
    yield from (_main(loss, start, "forget01", 0) for start, loss in itertools.product(STARTS, MAIN))
    yield from _sweeps(better, "forget01")
    yield from (_main(loss, start, "forget05", 0) for start, loss in itertools.product(STARTS, MAIN))
    splits = ("forget10", "forget01", "forget05")
    every = itertools.product(splits, (1, 2), STARTS, MAIN)
    yield from (_main(loss, start, split, seed) for split, seed, start, loss in every)
    more = itertools.product((1, 2), OTHERS, OTHER_STARTS)
    yield from (_main(loss, start, "forget10", seed) for seed, loss, start in more)


def _longer() -> Iterator[Row]:
    """Four times as long, at the rate of the row and at the next lower one: what a budget of 40 steps hides."""
    steps = {"schedule.steps": 160}
    for share, loss, start in itertools.product((0.4, 1.0), MAIN, ("plain", "rila", "rila+rol", "fila")):
        name = f"{loss}-{start}-forget10-longer" + ("" if share < 1 else "-same-rate")
        group = "longer: 160 steps" + (f" at {share:g} of the rate" if share < 1 else "")
        yield Row(name, loss, start, "forget10", 0, group, steps, share)


def _aimed() -> Iterator[Row]:
    """A loss that ends where rows lie that nobody saw, sixteen times as long and with four times the rank."""
    for split, start in itertools.product(("forget10", "forget05", "forget01"), AIMED_RATES):
        yield Row(f"aimed-{start}-{split}", AIMED, start, split, 0, "aimed", _AIMED)
    longer = {**_AIMED, "schedule.steps": 1280}  # as many passes over the 200 rows as the others make over 100
    yield Row("aimed-rila-forget10-longer", AIMED, "rila", "forget10", 0, "aimed", longer)


def _main(loss: str, start: str, split: str, seed: int) -> Row:
    return Row(f"{loss}-{start}-{split}-s{seed}", loss, start, split, seed)


def _sweeps(loss: str, split: str) -> Iterator[Row]:
    """One thing changed in RILA or in RILA + ROL, with the rate of the row that is changed."""
    limits = (20, 60) if split == "forget10" else (5, 10)  # all is the row that is changed
    varied: list[tuple[str, str, dict[str, Terms]]] = [
        ("beta", "rila", {f"beta {b:g}": {"initialise": {"rila": {"beta": b}}} for b in (0.0, 0.9, 0.7, 0.3)}),
        ("ROL weight", "rila+rol", {f"weight {w:g}": {_ROL + "weight": w} for w in (1.0, 0.01)}),
        ("rows", "rila", {f"{n} rows": {"statistics.rows": n} for n in limits}),
        ("k", "rila+rol", {f"k {k}": {_ROL + "k": k} for k in (32, 4)}),
        ("ROL form", "rila+rol", {
            "layers and rank, weight 20": {_ROL + "normalise": "layers_rank", _ROL + "weight": 20.0},
            "cosine, weight 1": {_ROL + "normalise": "cosine", _ROL + "weight": 1.0},
        }),
        ("ROL layers", "rila+rol", {
            "v_proj, weight 1": {_ROL + "layers": "v_proj", _ROL + "weight": 1.0},
            "down_proj, weight 1": {_ROL + "layers": "down_proj", _ROL + "weight": 1.0},
        }),
        # Ours, and no better tuned than the others: what the adapter adds is held, not B (`net`).
        ("ROL of the net update", "rila", {
            f"weight {w:g}": {"objective.regularise": {"net:rol": {"weight": w}}} for w in (0.1, 1.0, 10.0)
        }),
        ("ROL, plain start", "rol", {f"weight {w:g}": {_ROL + "weight": w} for w in (1.0, 0.01)}),
    ]  # fmt: skip
    for group, start, choices in varied:
        for label, changes in choices.items():
            name = f"{loss}-{start}-{split}-{group}-{label}".replace(" ", "_").replace(",", "")
            yield Row(name, loss, start, split, 0, f"{group}: {label}", changes)
