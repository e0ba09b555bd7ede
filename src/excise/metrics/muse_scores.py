"""MUSE's numbers from saved tables: passages, knowledge, PrivLeak, utility, and their course over requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from excise.errors import UsageError
from excise.metrics.rows import attack_score
from excise.metrics.statistics import auc, bootstrap_auc, bootstrap_counts, bootstrap_means, interval, privleak
from excise.metrics.table import Table

Entry = dict[str, Any]
Tables = Mapping[str, Table]
#: Metric -> the table whose rows it is the mean of.
MEANS = {
    "muse_verbatim": "muse_passages",
    "muse_knowledge_forget": "muse_forget_questions",
    "muse_knowledge_retain": "muse_retain_questions",
}
MEMBERS, NON_MEMBERS = "muse_members", "muse_non_members"
#: The retrained models' AUC of forget against holdout texts, as MUSE's released evaluation has it (its direction).
REFERENCE_AUC = {"news": 0.4772, "books": 0.5393}


def numbers(
    tables: Tables, gold: Tables | None = None, *, reference_auc: float | None = None
) -> tuple[dict[str, Entry], dict[str, str]]:
    """MUSE's four numbers of one model, and why any is not shown.

    Args:
        tables: The model's tables, MUSE's among them. PrivLeak reads ``muse_members`` and ``muse_non_members``, or
            ``forget`` and ``never_seen`` where texts were not named for it.
        gold: The same of the gold.
        reference_auc: Stands in for the gold's AUC where there is none; in MUSE's direction, `REFERENCE_AUC`.

    Returns:
        Metric -> {"value", "low", "high", "n"} (95 % percentile bootstrap over rows; "shortened": how many prompts were
        cut to the model's context), and metric -> reason. PrivLeak is in per cent, the rest from 0 to 1.

    Source:
        MUSE, 2407.06460, section 3.1; PrivLeak with Min-40 %.

    Example:
        >>> empty = {name: np.zeros(0) for name in ("row", "kind", "mean_nll")}
        >>> table = Table("muse_passages", 2, {**empty, "rouge_l_f1_unstemmed": np.array([0.5, 1.0])})
        >>> numbers({"muse_passages": table})[0]["muse_verbatim"]["value"]
        0.75
    """
    values: dict[str, Entry] = {}
    not_shown: dict[str, str] = {}
    for metric, side in MEANS.items():
        entry = _mean(tables[side]) if side in tables else None
        if entry is None:
            not_shown[metric] = "no such passages or questions were asked (evaluate.muse)"
        else:
            values[metric] = entry
    found = _privleak(tables, gold, reference_auc)
    if isinstance(found, str):
        not_shown["muse_privleak"] = found
    else:
        values["muse_privleak"] = found
    return values, not_shown


def _mean(table: Table) -> Entry | None:
    scores = table.columns["rouge_l_f1_unstemmed"].astype(np.float64)
    n = int(np.sum(~np.isnan(scores)))
    if not n:
        return None
    low, high = interval(bootstrap_means(scores, bootstrap_counts(len(scores))))
    shortened = int(np.sum(table.columns["shortened"])) if table.has("shortened") else 0
    return {"value": float(np.nanmean(scores)), "low": low, "high": high, "n": n, "shortened": shortened}


def _privleak(tables: Tables, gold: Tables | None, reference_auc: float | None) -> Entry | str:
    mine = _scores(tables)
    if mine is None:
        return "needs texts that were forgotten and texts that no model was trained on"
    theirs = _scores(gold) if gold else None
    if theirs is None and reference_auc is None:
        return "needs the gold, or evaluate.muse.reference_auc in its place"
    counts = [bootstrap_counts(len(scores), seed=seed) for seed, scores in enumerate(mine)]
    own = bootstrap_auc(*mine, *counts)
    if theirs is not None:
        value, samples = float(privleak(auc(*mine), auc(*theirs))), privleak(own, bootstrap_auc(*theirs, *counts))
    else:  # MUSE counts from the other end: how often the text that nobody saw looks more like a member
        target = 1 - float(reference_auc or 0)
        value, samples = float(privleak(auc(*mine), target)), privleak(own, target)
    if not np.isfinite(value):
        return "the gold ranks every forget text as a member, so its AUC cannot be a reference"
    low, high = interval(samples)
    return {"value": value, "low": low, "high": high, "n": len(mine[0]), "n_never_seen": len(mine[1])}


def _scores(tables: Tables) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Min-40 % of members and non-members, higher: more like a member."""
    sides = (MEMBERS, NON_MEMBERS) if MEMBERS in tables else ("forget", "never_seen")
    if any(side not in tables for side in sides):
        return None
    member, other = (attack_score(tables[side], "min_k") for side in sides)
    return member, other


# --- successive requests ------------------------------------------------------------------------------------------


def folds(rows: int, count: int, kind: Literal["scalability", "sustainability"]) -> list[list[int]]:
    """The rows of each of ``count`` requests, as MUSE's ``scal`` and ``sust`` subsets give them for its news.

    Args:
        rows: How many rows are to be forgotten.
        count: Requests, at least one and at most ``rows``.
        kind: ``scalability``: each request holds the one before it and more, all made of the original model.
            ``sustainability``: requests share no row, and each is made of the model that the one before left.

    Raises:
        UsageError: More requests than rows.

    Example:
        >>> folds(5, 2, "scalability"), folds(5, 2, "sustainability")
        ([[0, 1], [0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]])
    """
    if not 1 <= count <= rows:
        raise UsageError(f"{rows} rows cannot be divided into {count} requests")
    ends = [rows * (i + 1) // count for i in range(count)]
    starts = [0] * count if kind == "scalability" else [0, *ends[:-1]]
    return [list(range(a, b)) for a, b in zip(starts, ends, strict=True)]


def course(steps: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, list[float | None]]:
    """Each of MUSE's numbers over successive requests: ``steps`` are the numbers of one model after each.

    Example:
        >>> course([{"muse_verbatim": {"value": 0.5}}, {}])["muse_verbatim"]
        [0.5, None]
    """
    names = (*MEANS, "muse_privleak")
    return {name: [step.get(name, {}).get("value") for step in steps] for name in names}
