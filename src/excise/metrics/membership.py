"""Membership attacks on saved tables: AUC, the share found at few false alarms, PrivLeak, gap to never-seen rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.bench import Bench, Entry, Sample, combined, together
from excise.metrics.statistics import auc, bootstrap_auc, interval, privleak, tpr_at_fpr
from excise.metrics.table import Table

Floats = NDArray[np.float64]
#: The attacks that the privacy scores are made of.
BY_LIKELIHOOD = ("loss", "zlib", "min_k", "min_k_plus_plus")


def scores(tables: Mapping[str, Table], attack: str) -> tuple[Floats, Floats]:
    """Scores of the forget and of the never-seen rows, higher = more like training data; see `rows.attack_score`."""
    for side in ("forget", "never_seen"):
        if side not in tables:
            raise NotShown(f"no {side.replace('_', '-')} rows were evaluated")
    return per_row.attack_score(tables["forget"], attack), per_row.attack_score(tables["never_seen"], attack)


def against_reference(tables: Mapping[str, Table], reference: Mapping[str, Table], side: str) -> Floats:
    """``[rows]`` mean log p by the model minus mean log p by a reference: what the text's own difficulty leaves.

    Args:
        tables: The model's.
        reference: A model that was not trained on the rows; here the gold.
        side: Of the rows.

    Source:
        Carlini et al., 2012.07805; Mireshghallah et al., 2203.03929.
    """
    mine = tables[side]
    if mine.has("attack_reference"):
        return per_row.attack_score(mine, "reference")
    if side not in reference or reference[side].rows != mine.rows:
        raise NotShown(f"the gold was not evaluated on the same {side.replace('_', '-')} rows")
    return per_row.attack_score(mine, "loss") - per_row.attack_score(reference[side], "loss")


def attacked(attack: str, bench: Bench) -> Entry:
    """AUC of an attack, with the number of rows on both sides."""
    return _entry(bench, *scores(bench.tables, attack))


def by_reference(bench: Bench) -> Entry:
    """AUC of `against_reference`."""
    bench.side("forget"), bench.side("never_seen")
    stored = bench.tables["forget"].has("attack_reference")
    reference = bench.tables if stored else bench.golds()
    member, other = (against_reference(bench.tables, reference, side) for side in ("forget", "never_seen"))
    return _entry(bench, member, other)


def auc_sample(bench: Bench, member: Floats, other: Floats) -> Sample:
    """An AUC and its values under resampling, the two sides drawn separately."""
    draws = bootstrap_auc(member, other, bench.counts("forget", len(member)), bench.counts("never_seen", len(other)))
    return Sample(auc(member, other), draws, int(np.sum(~np.isnan(member))))


def _entry(bench: Bench, member: Floats, other: Floats) -> Entry:
    return auc_sample(bench, member, other).entry() | _counted(member, other)


def _counted(member: Floats, other: Floats) -> dict[str, int]:
    return {"n": int(np.sum(~np.isnan(member))), "n_never_seen": int(np.sum(~np.isnan(other)))}


def found_at_few_alarms(attack: str, bench: Bench) -> Entry:
    """Share of forget rows that an attack finds at 1 % false alarms."""
    member, other = scores(bench.tables, attack)
    rng = np.random.default_rng(bench.seed)
    a, b = member[~np.isnan(member)], other[~np.isnan(other)]
    if not len(a) or not len(b):
        raise NotShown("no row has a value")
    draws = [tpr_at_fpr(rng.choice(a, len(a)), rng.choice(b, len(b))) for _ in range(min(bench.resamples, 300))]
    low, high = interval(np.array(draws))
    return {"value": tpr_at_fpr(a, b), "low": low, "high": high, **_counted(member, other)}


def leaked(bench: Bench) -> Entry:
    """PrivLeak of the Min-40 % attack."""
    mine = scores(bench.tables, "min_k")
    gold = bench.golds()
    if "never_seen" not in gold:
        raise NotShown("the gold was not evaluated on never-seen rows")
    both = [auc_sample(bench, *pair) for pair in (mine, scores(gold, "min_k"))]
    value = float(privleak(both[0].value, both[1].value))
    if math.isnan(value):
        raise NotShown("the gold ranks every forget row as a member, so its AUC cannot be a reference")
    draws = together([b.draws for b in both])
    low, high = interval(privleak(draws[:, 0], draws[:, 1]))
    return {"value": value, "low": low, "high": high, **_counted(*mine)}


def gap_to_never_seen(bench: Bench) -> Entry:
    """Mean log p of the forget rows minus that of the never-seen ones, in nats per token.

    Source:
        Ours.
    """
    member, other = scores(bench.tables, "loss")
    parts = [("forget", member), ("never_seen", other)]
    return combined(bench, parts, lambda x: x[..., 0] - x[..., 1]) | _counted(member, other)
