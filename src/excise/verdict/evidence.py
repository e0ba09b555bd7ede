"""What a verdict may look at: saved tables, saved numbers and the outcomes of attacks, of one model and beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from excise import recipe
from excise.artifacts import GOLD, ORIGINAL, Number, Results
from excise.errors import NotShown
from excise.metrics.table import Table
from excise.verdict.equivalence import Rows, rows

Floats = NDArray[np.float64]


class Attack(Protocol):
    """The outcome of one attack on one model, as `excise.attacks.outcome.Outcome` is."""

    @property
    def unit(self) -> str:
        """``probability`` or ``leak``."""

    @property
    def budget(self) -> str:
        """What the budget counts."""

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the points of the curve."""

    @property
    def values(self) -> Mapping[str, Floats]:
        """Side -> ``[budgets, n]``."""

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]]:
        """Side -> ``[n]`` row numbers within the side."""


@dataclass(frozen=True)
class Evidence:
    """All that the tests read.

    Args:
        model: The model that is judged.
        tables: Model -> side -> table.
        results: Saved numbers, for what has no rows (hidden states, multiple choice).
        limits: The thresholds.
        attacks: Model -> name of the attack -> outcome.
    """

    model: str
    tables: Mapping[str, Mapping[str, Table]]
    results: Results
    limits: recipe.Verify
    attacks: Mapping[str, Mapping[str, Attack]] = field(default_factory=dict)

    @property
    def has_gold(self) -> bool:
        """Whether a gold was measured on the forget rows."""
        return "forget" in self.tables.get(GOLD, {}) or (not self.tables and GOLD in self.results.models)

    @property
    def basis(self) -> str:
        """What the model is compared with."""
        if self.has_gold:
            return "gold"
        return "never-seen rows" if "never_seen" in self.tables.get(self.model, {}) else "nothing"

    @property
    def kept(self) -> str:
        """The side that answers for retained knowledge."""
        return "untouched" if "untouched" in self.tables.get(self.model, {}) else "retain"

    def table(self, model: str, side: str) -> Table:
        """A table; raises `NotShown` where there is none."""
        found = self.tables.get(model, {}).get(side)
        if found is None:
            whose = {GOLD: "the gold", ORIGINAL: "the original"}.get(model, "the model")
            raise NotShown(f"{whose} was not measured on {side.replace('_', '-')} rows")
        return found

    def rows(self, model: str, side: str, values: Callable[[Table], Floats | tuple[Floats, Floats]]) -> Rows:
        """What ``values`` reads from a table, one value (or numerator and denominator) per row, with its groups."""
        table = self.table(model, side)
        found = values(table)
        top, bottom = found if isinstance(found, tuple) else (found, None)
        made = rows(top, table.columns.get("group"), bottom)
        if not made.n:
            raise NotShown(f"no {side.replace('_', '-')} row has a value")
        return made

    def pair(
        self, side: str, values: Callable[[Table], Floats | tuple[Floats, Floats]], other: str = GOLD
    ) -> tuple[Rows, Rows]:
        """The same rows by the model and by another; raises `NotShown` where they are not the same rows."""
        own, theirs = self.rows(self.model, side, values), self.rows(other, side, values)
        if len(own.top) != len(theirs.top):
            raise NotShown(f"the {other} was measured on other {side.replace('_', '-')} rows")
        return own, theirs

    def number(self, metric: str, model: str | None = None) -> Number:
        """A saved number with an interval; raises `NotShown` where there is none."""
        found = self.results.number(model or self.model, metric)
        if not found.shown:
            raise NotShown("it was not measured" + (f" in the {model}" if model else ""))
        if found.low is None or found.high is None:
            raise NotShown("it was measured without an interval")
        return found

    def attack(self, name: str, model: str | None = None) -> Attack:
        """The outcome of an attack; raises `NotShown` where it was not made."""
        found = self.attacks.get(model or self.model, {}).get(name)
        if found is None:
            raise NotShown("this attack was not made" + (f" on the {model}" if model else ""))
        return found

    def groups(self, side: str, of: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Groups of rows of a side by number, where its table has them."""
        table = self.tables.get(self.model, {}).get(side)
        column = None if table is None else table.columns.get("group")
        numbers = np.asarray(of, np.int64)
        if column is None or (len(numbers) and numbers.max() >= len(column)):
            return None
        return np.asarray(column[numbers], np.int64)
