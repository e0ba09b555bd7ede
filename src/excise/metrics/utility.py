"""The parts of model utility: what a model should still know, on the retained side and on every utility set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.fluency import FEWEST, ODD
from excise.metrics.table import ANSWER, PARAPHRASE, Table

Floats = NDArray[np.float64]
ROW_SETS = frozenset({"forget", "retain", "untouched", "never_seen", "forget_alternative", "forget_paraphrase"})
TOFU_SETS = frozenset({"real_authors", "world_facts"})


def stored(column: str, table: Table) -> Floats:
    """A column that was measured on generations, ``[rows]``; `NotShown` when none were scored."""
    if not table.has(column):
        raise NotShown(f"no generations were scored for the {table.side} rows")
    return table.columns[column].astype(np.float64)


def fluent(table: Table) -> Floats:
    """``[rows]`` 1 where what the model wrote reads like a real answer, 0 where it does not (`metrics.fluency`)."""
    if table.has("rouge_l_recall") and not table.has("fluency"):
        raise NotShown(f"fluency was not measured: it needs {FEWEST} other real answers to compare with")
    values = stored("fluency", table)
    return np.where(np.isnan(values), np.nan, values >= np.float32(ODD))


def utility_parts(tables: Mapping[str, Table], *, mean: str = "geometric") -> dict[tuple[str, str], Floats]:
    """Parts of model utility that the tables can give: (side, "probability" | "rouge" | "truth_ratio") -> ``[rows]``.

    The retained side is ``untouched`` where there is one, else ``retain``: plain probability, truth ratio from
    paraphrases. Utility sets (every other side name): probability normalised over the false answers where there are
    any, truth ratio from the plain answer, because these sets have no paraphrases (TOFU). ROUGE-L recall on all.

    Example:
        >>> import numpy as np
        >>> t = Table("facts", 1, {"row": np.array([0]), "kind": np.array([0]), "mean_nll": np.array([0.0])})
        >>> list(utility_parts({"facts": t}))
        [('facts', 'probability')]
    """
    parts: dict[tuple[str, str], Floats] = {}
    kept = "untouched" if "untouched" in tables else "retain"
    for side in [kept, *sorted(set(tables) - ROW_SETS)]:
        if side not in tables or side.startswith("muse_"):  # MUSE has a number of its own
            continue
        table, own = tables[side], side == kept
        wanted: dict[str, Callable[[], Floats]] = {
            "probability": partial(per_row.probability if own else _options_or_plain, table),
            "rouge": partial(stored, "rouge_l_recall", table),
            "truth_ratio": partial(_truthful, table, PARAPHRASE if own else ANSWER, mean),
        }
        for name, value in wanted.items():
            try:
                parts[side, name] = value()
            except NotShown:
                continue
    return parts


def _options_or_plain(table: Table) -> Floats:
    try:
        return per_row.normalised_probability(table)
    except NotShown:
        return per_row.probability(table)


def _truthful(table: Table, correct: int, mean: str) -> Floats:
    return per_row.truthfulness(per_row.log_truth_ratio(table, correct, mean))
