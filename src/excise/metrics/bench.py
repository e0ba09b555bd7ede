"""What all numbers of one model share: its tables, the gold's and the original's, and the draws of rows for intervals.

A number is made of parts, each a value per row of one side. Rows are drawn per side and the same for every part and for
the gold's rows, so what is compared stays paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics.statistics import bootstrap_counts, bootstrap_means, interval
from excise.metrics.table import Table

Floats = NDArray[np.float64]
Entry = dict[str, Any]
Part = tuple[str, Floats]  # side, one value per row
GOLD = "needs the gold: the same model trained without the forget rows, evaluated on them"
ORIGINAL = "needs the original: the model before unlearning, evaluated on the same rows"


@dataclass
class Bench:
    """One model's tables, those of the gold and of the original, and the draws that all numbers of a side share."""

    tables: Mapping[str, Table]
    gold: Mapping[str, Table] | None
    resamples: int
    seed: int
    original: Mapping[str, Table] | None = None
    mean: str = "geometric"
    draws: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def side(self, name: str) -> Table:
        """The table of a side; `NotShown` where nobody evaluated it."""
        if name not in self.tables:
            raise NotShown(f"no {name.replace('_', '-')} rows were evaluated")
        return self.tables[name]

    def kept(self) -> Table:
        """The rows that answer for retained knowledge: those that unlearning never touched, where there are any."""
        return self.side("untouched" if "untouched" in self.tables else "retain")

    def counts(self, side: str, n: int) -> Floats:
        """``[resamples, n]`` how often each row of a side is drawn; the same for every model."""
        # The draws depend on n and the side's place in the seed only, so the gold's rows are drawn together with the
        # model's.
        key = (side, n)
        if key not in self.draws:
            self.draws[key] = bootstrap_counts(n, self.resamples, self.seed + sum(side.encode()))
        return self.draws[key]

    def golds(self) -> Mapping[str, Table]:
        """The gold's tables; `NotShown` without its forget rows."""
        if self.gold is None or "forget" not in self.gold:
            raise NotShown(GOLD)
        return self.gold

    def of(self, tables: Mapping[str, Table]) -> Bench:
        """The same bench with another model's tables, and the same draws."""
        return replace(self, tables=tables)


@dataclass(frozen=True)
class Sample:
    """A number with its values under resampling, before it becomes an interval: numbers are made of such numbers."""

    value: float
    draws: Floats
    n: int

    def entry(self) -> Entry:
        """The number as it is reported."""
        low, high = interval(self.draws)
        return {"value": self.value, "low": low, "high": high, "n": self.n}


def _identity(x: Floats) -> Floats:
    return x[..., 0]


def sample(bench: Bench, parts: Sequence[Part], fn: Callable[[Floats], Floats] = _identity) -> Sample:
    """``fn`` of the parts' means, the rows of each side drawn together; `NotShown` where a part has no value."""
    present = [int(np.sum(~np.isnan(values))) for _, values in parts]
    if not present or min(present) == 0:
        raise NotShown("no row has a value")
    means = np.array([np.nanmean(values) for _, values in parts])
    draws = [bootstrap_means(values, bench.counts(side, len(values))) for side, values in parts]
    with np.errstate(over="ignore"):
        return Sample(float(fn(means)), fn(together(draws)), min(present))


def combined(bench: Bench, parts: Sequence[Part], fn: Callable[[Floats], Floats] = _identity) -> Entry:
    """`sample` as it is reported."""
    return sample(bench, parts, fn).entry()


def together(draws: Sequence[Floats]) -> Floats:
    """``[resamples, parts]``: very large sides have fewer resamples, and what belongs together is cut to the fewest."""
    fewest = min(len(d) for d in draws)
    return np.stack([d[:fewest] for d in draws], axis=-1)


def one(fn: Callable[[Table], Floats], where: str, bench: Bench) -> Entry:
    """The mean of a value per row over one side; ``kept`` stands for the side that answers for retained knowledge."""
    table = bench.kept() if where == "kept" else bench.side(where)
    return combined(bench, [(table.side, fn(table))])
