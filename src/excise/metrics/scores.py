"""Every number that saved tables can give, with interval and row count, or why it is not shown. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import aggregates, gaps, membership
from excise.metrics import rows as per_row
from excise.metrics.bench import Bench, Entry, combined, one
from excise.metrics.catalogue import METRICS
from excise.metrics.statistics import (
    RESAMPLES,
    auc,
    harmonic_mean,
    ks_log10,
    permutation_p,
    privleak,
    privleak_null_spread,
    tpr_at_fpr,
)
from excise.metrics.table import PARAPHRASE, Table
from excise.metrics.utility import fluent, stored, utility_parts

__all__ = [
    "Scores", "auc", "forget_quality", "harmonic_mean", "ks_log10", "permutation_p", "privleak",
    "privleak_null_spread", "score", "tpr_at_fpr", "utility_parts",
]  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The numbers of one model.

    Args:
        values: metric -> {"value", "low", "high", "n"}; 95 % percentile bootstrap over rows, ``None`` where an interval
            has no meaning (forget quality). ``n`` is the smallest number of rows behind a part. What holds utility adds
            "parts" (how many utility parts) and "complete" (the nine of TOFU); a membership number "n_never_seen"; a
            gap between groups "groups", "chance" and "p"; the logit lens "layer"; ``forget_quality_log10`` "n_gold" and
            "how".
        not_shown: metric -> reason, for every metric of the catalogue that is not in ``values``.
    """

    values: dict[str, Entry]
    not_shown: dict[str, str]


def _truth(bench: Bench, fn: Callable[[Floats], Floats], table: Table, correct: int = PARAPHRASE) -> Floats:
    return fn(per_row.log_truth_ratio(table, correct, bench.mean))


def _perplexity(where: str, bench: Bench) -> Entry:
    table = bench.kept() if where == "kept" else bench.side(where)
    nll, tokens = per_row.nll_and_tokens(table)
    return combined(bench, [(table.side, nll), (table.side, tokens)], lambda x: np.exp(x[..., 0] / x[..., 1]))


def _lens(bench: Bench) -> Entry:
    """The layer below the last that reads the answers best, and what it reads."""
    found = per_row.lens(bench.side("forget"))
    layers = list(found)
    entry = combined(bench, [("forget", values) for values in found.values()], lambda x: x.max(axis=-1))
    means = [float(np.nanmean(values)) for values in found.values()]
    return entry | {"layer": layers[int(np.argmax(means))]}


def forget_quality(
    tables: Mapping[str, Table], gold: Mapping[str, Table], *, mean: str = "geometric"
) -> tuple[float, str]:
    """Log10 p of the two-sample Kolmogorov-Smirnov test on the truth ratios of model and gold, and how it was found.

    Args:
        tables: the model's tables; "forget" with paraphrases and false answers is read.
        gold: the same of the gold.
        mean: of the false answers, see ``rows.log_truth_ratio``.

    Source:
        TOFU, 2401.06121, section 2.2.2. Logarithms of the ratios are compared: the test only reads their order.
    """
    mine, theirs = (per_row.log_truth_ratio(t["forget"], mean=mean) for t in (tables, gold))
    return ks_log10(mine, theirs)


def _forget_quality(bench: Bench) -> Entry:
    bench.side("forget")
    gold = bench.golds()
    value, how = forget_quality(bench.tables, gold, mean=bench.mean)
    n, m = (int(np.sum(~np.isnan(per_row.log_truth_ratio(t["forget"])))) for t in (bench.tables, gold))
    return {"value": value, "low": None, "high": None, "n": n, "n_gold": m, "how": how}


_FROM_TABLES: dict[str, Callable[[Bench], Entry]] = {
    "forget_probability": partial(one, per_row.probability, "forget"),
    "retain_probability": partial(one, per_row.probability, "kept"),
    "paraphrase_probability": partial(one, partial(per_row.probability, kind=PARAPHRASE), "forget"),
    "forget_truth_ratio": lambda b: one(partial(_truth, b, per_row.closeness_to_one), "forget", b),
    "retain_truth_ratio": lambda b: one(partial(_truth, b, per_row.truthfulness), "kept", b),
    "forget_rouge": partial(one, partial(stored, "rouge_l_recall"), "forget"),
    "retain_rouge": partial(one, partial(stored, "rouge_l_recall"), "kept"),
    "exact_memorization": partial(one, per_row.exact_memorization, "forget"),
    "extraction_strength": partial(one, per_row.extraction_strength, "forget"),
    "logit_lens_probability": _lens,
    "forget_perplexity": partial(_perplexity, "forget"),
    "retain_perplexity": partial(_perplexity, "kept"),
    "forget_quality_log10": _forget_quality,
    "model_utility": aggregates.model_utility,
    "never_seen_gap": membership.gap_to_never_seen,
    "mia_loss_auc": partial(membership.attacked, "loss"),
    "mia_zlib_auc": partial(membership.attacked, "zlib"),
    "mia_min_k_auc": partial(membership.attacked, "min_k"),
    "mia_min_k_plus_plus_auc": partial(membership.attacked, "min_k_plus_plus"),
    "mia_reference_auc": membership.by_reference,
    "mia_gradient_norm_auc": partial(membership.attacked, "gradient_norm"),
    "mia_loss_tpr": partial(membership.found_at_few_alarms, "loss"),
    "privleak": membership.leaked,
    "forget_score": aggregates.forget_score,
    "unlearning_score": aggregates.unlearning_score,
    "privacy_score": aggregates.privacy_score,
    "privacy_score_relative": aggregates.privacy_score_relative,
    "utility_score": aggregates.utility_score,
    "utility_score_relative": aggregates.utility_score_relative,
    "aggregate_score": aggregates.aggregate,
    "aggregate_score_relative": partial(aggregates.aggregate, relative=True),
    "forget_repetition": partial(one, partial(stored, "repetition"), "forget"),
    "forget_fluency": partial(one, fluent, "forget"),
    "retain_fluency": partial(one, fluent, "kept"),
    "forget_group_gap": partial(gaps.gap, "forget"),
    "retain_group_gap": partial(gaps.gap, "kept"),
}

_ELSEWHERE = {
    "states": "needs hidden states, which saved tables do not hold: it is measured while the model is loaded",
    "attack": "needs an attack on a copy of the model",
    "choices": "no multiple-choice tasks were named",
}


def score(
    tables: Mapping[str, Table],
    against: Mapping[str, Table] | None = None,
    *,
    original: Mapping[str, Table] | None = None,
    truth_ratio: str = "geometric",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Every metric of the catalogue that one model's saved tables can give.

    Args:
        tables: side -> table of the model.
        against: the same of the gold; without it forget quality, PrivLeak and what else compares with it are not shown.
        original: the same of the model before unlearning, which utility and one of the privacy scores are relative to.
        truth_ratio: "geometric" or "arithmetic" mean over false answers.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Values with intervals, and the reason for everything that is not shown. Nothing is guessed.

    Example:
        >>> import numpy as np
        >>> t = Table("forget", 2, {"row": np.array([0, 1]), "kind": np.array([0, 0]), "mean_nll": np.log([2.0, 4.0])})
        >>> s = score({"forget": t})
        >>> s.values["forget_probability"]
        {'value': 0.375, 'low': 0.25, 'high': 0.5, 'n': 2}
        >>> s.not_shown["retain_probability"]
        'no retain rows were evaluated'
    """
    bench = Bench(tables, against, resamples, seed, original, truth_ratio)
    own = {name: metric for name, metric in METRICS.items() if metric.source != "muse"}  # that one: `muse_scores`
    makers = {name: _FROM_TABLES[name] for name in own if name in _FROM_TABLES}
    elsewhere = {name: _ELSEWHERE[metric.source] for name, metric in own.items() if name not in makers}
    return taken(makers, bench, elsewhere)


def taken(makers: Mapping[str, Callable[[Bench], Entry]], bench: Bench, elsewhere: Mapping[str, str]) -> Scores:
    """What each maker finds in the tables; what it refuses and what is not finite joins what is not shown.

    Args:
        makers: Metric -> how it is taken from tables; `NotShown` says why it cannot be.
        bench: The tables.
        elsewhere: Metric -> reason, of what no table can give.
    """
    values, not_shown = {}, dict(elsewhere)
    for name, make in makers.items():
        try:
            entry = make(bench)
        except NotShown as reason:
            not_shown[name] = str(reason)
            continue
        if math.isfinite(entry["value"]):
            values[name] = entry
        else:
            not_shown[name] = "the result is not a finite number"
    return Scores(values, not_shown)
