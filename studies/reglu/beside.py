"""What the study reads off a run's saved tables beyond its results: the KS statistic and equivalence to the gold."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from excise import artifacts
from excise.metrics import rows
from excise.metrics.statistics import bootstrap_auc, bootstrap_counts, interval, privleak
from excise.metrics.table import Table
from excise.metrics.table import load as load_table

#: Points of PrivLeak within which a model counts as equivalent to the gold.
MARGIN = 10.0


def beside_gold(run: artifacts.RunFolder) -> dict[str, Any]:
    """KS statistic of forget quality, and PrivLeak's equivalence to the gold's (which is 0)."""
    own, gold = ({s: load_table(run.table(m, s)) for s in ("forget", "never_seen")} for m in ("unlearned", "gold"))
    ratios = [rows.log_truth_ratio(t["forget"]) for t in (own, gold)]
    known = [r[~np.isnan(r)] for r in ratios]
    return {"ks": float(stats.ks_2samp(*known).statistic), "privleak_90": equivalence(own, gold)}


def equivalence(own: dict[str, Table], gold: dict[str, Table]) -> dict[str, Any]:
    """Two one-sided tests at 5 % each: whether the 90 % bootstrap interval of PrivLeak lies within the margin.

    The same rows are drawn for model and gold, so what both find easy or hard falls out.
    """
    pairs = [[rows.attack_score(t[s], "min_k") for s in ("forget", "never_seen")] for t in (own, gold)]
    draws = [bootstrap_counts(len(values), seed=i) for i, values in enumerate(pairs[0])]
    samples = [bootstrap_auc(member, other, *draws) for member, other in pairs]
    low, high = interval(privleak(*samples), 0.9)
    found = low is not None and high is not None and low > -MARGIN and high < MARGIN
    return {"low": low, "high": high, "equivalent": found, "margin": MARGIN}
