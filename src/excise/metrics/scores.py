"""Every number that saved tables can give, with interval and row count, or why it is not shown. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.catalogue import METRICS
from excise.metrics.statistics import (
    RESAMPLES,
    auc,
    bootstrap_auc,
    bootstrap_counts,
    bootstrap_means,
    harmonic_mean,
    interval,
    ks_log10,
    permutation_p,
    privleak,
    privleak_null_spread,
    tpr_at_fpr,
)
from excise.metrics.table import PARAPHRASE, Table
from excise.metrics.utility import ROW_SETS, TOFU_SETS, stored, utility_parts

__all__ = [
    "Scores", "auc", "forget_quality", "harmonic_mean", "ks_log10", "permutation_p", "privleak",
    "privleak_null_spread", "score", "tpr_at_fpr", "utility_parts",
]  # fmt: skip

Floats = NDArray[np.float64]
Entry = dict[str, Any]
Part = tuple[str, Floats]  # side, one value per row


@dataclass(frozen=True)
class Scores:
    """The numbers of one model.

    Args:
        values: metric -> {"value", "low", "high", "n"}; 95 % percentile bootstrap over rows, ``None`` where an interval
            has no meaning (forget quality). ``n`` is the smallest number of rows behind a part. ``model_utility`` and
            ``unlearning_score`` add "parts" (how many utility parts) and "complete" (the nine of TOFU); a membership
            number adds "n_never_seen"; ``forget_quality_log10`` adds "n_gold" and "how".
        not_shown: metric -> reason, for every metric of the catalogue that is not in ``values``.
    """

    values: dict[str, Entry]
    not_shown: dict[str, str]


@dataclass
class _Bench:
    """One model's tables, the gold's, and the bootstrap draws that all numbers of a side share: parts stay paired."""

    tables: Mapping[str, Table]
    gold: Mapping[str, Table] | None
    mean: str
    resamples: int
    seed: int
    draws: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def side(self, name: str) -> Table:
        if name not in self.tables:
            raise NotShown(f"no {name.replace('_', '-')} rows were evaluated")
        return self.tables[name]

    def kept(self) -> Table:
        """The rows that answer for retained knowledge: those that unlearning never touched, where there are any."""
        return self.side("untouched" if "untouched" in self.tables else "retain")

    def counts(self, side: str, n: int) -> Floats:
        # The draws depend on n and the side's place in the seed only, so the gold's rows are drawn together with the
        # model's.
        key = (side, n)
        if key not in self.draws:
            self.draws[key] = bootstrap_counts(n, self.resamples, self.seed + sum(side.encode()))
        return self.draws[key]


def _identity(x: Floats) -> Floats:
    return x[..., 0]


def _combined(bench: _Bench, parts: Sequence[Part], fn: Callable[[Floats], Floats] = _identity) -> Entry:
    """``fn`` of the parts' means, with an interval from resampling the rows of each side together."""
    present = [int(np.sum(~np.isnan(values))) for _, values in parts]
    if not present or min(present) == 0:
        raise NotShown("no row has a value")
    means = np.array([np.nanmean(values) for _, values in parts])
    draws = [bootstrap_means(values, bench.counts(side, len(values))) for side, values in parts]
    fewest = min(len(d) for d in draws)
    with np.errstate(over="ignore"):
        value, low_high = float(fn(means)), interval(fn(np.stack([d[:fewest] for d in draws], axis=-1)))
    return {"value": value, "low": low_high[0], "high": low_high[1], "n": min(present)}


def _one(fn: Callable[[Table], Floats], where: str, bench: _Bench) -> Entry:
    table = bench.kept() if where == "kept" else bench.side(where)
    return _combined(bench, [(table.side, fn(table))])


def _truth(bench: _Bench, fn: Callable[[Floats], Floats], table: Table, correct: int = PARAPHRASE) -> Floats:
    return fn(per_row.log_truth_ratio(table, correct, bench.mean))


def _perplexity(where: str, bench: _Bench) -> Entry:
    table = bench.kept() if where == "kept" else bench.side(where)
    nll, tokens = per_row.nll_and_tokens(table)
    return _combined(bench, [(table.side, nll), (table.side, tokens)], lambda x: np.exp(x[..., 0] / x[..., 1]))


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


def _forget_quality(bench: _Bench) -> Entry:
    bench.side("forget")
    gold = _gold(bench)
    value, how = forget_quality(bench.tables, gold, mean=bench.mean)
    n, m = (int(np.sum(~np.isnan(per_row.log_truth_ratio(t["forget"])))) for t in (bench.tables, gold))
    return {"value": value, "low": None, "high": None, "n": n, "n_gold": m, "how": how}


def _gold(bench: _Bench) -> Mapping[str, Table]:
    if bench.gold is None or "forget" not in bench.gold:
        raise NotShown("needs the gold: the same model trained without the forget rows, evaluated on them")
    return bench.gold


def _attack_scores(tables: Mapping[str, Table], attack: str) -> tuple[Floats, Floats]:
    return per_row.attack_score(tables["forget"], attack), per_row.attack_score(tables["never_seen"], attack)


def _membership(attack: str, bench: _Bench) -> Entry:
    bench.side("forget"), bench.side("never_seen")
    member, other = _attack_scores(bench.tables, attack)
    draws = _auc_draws(bench, member, other)
    low, high = interval(draws)
    return {"value": auc(member, other), "low": low, "high": high, **_counted(member, other)}


def _counted(member: Floats, other: Floats) -> dict[str, int]:
    return {"n": int(np.sum(~np.isnan(member))), "n_never_seen": int(np.sum(~np.isnan(other)))}


def _auc_draws(bench: _Bench, member: Floats, other: Floats) -> Floats:
    return bootstrap_auc(member, other, bench.counts("forget", len(member)), bench.counts("never_seen", len(other)))


def _membership_tpr(attack: str, bench: _Bench) -> Entry:
    bench.side("forget"), bench.side("never_seen")
    member, other = _attack_scores(bench.tables, attack)
    rng = np.random.default_rng(bench.seed)
    a, b = member[~np.isnan(member)], other[~np.isnan(other)]
    if not len(a) or not len(b):
        raise NotShown("no row has a value")
    draws = [tpr_at_fpr(rng.choice(a, len(a)), rng.choice(b, len(b))) for _ in range(min(bench.resamples, 300))]
    low, high = interval(np.array(draws))
    return {"value": tpr_at_fpr(a, b), "low": low, "high": high, **_counted(member, other)}


def _privleak(bench: _Bench) -> Entry:
    bench.side("forget"), bench.side("never_seen")
    gold = _gold(bench)
    if "never_seen" not in gold:
        raise NotShown("the gold was not evaluated on never-seen rows")
    mine, theirs = _attack_scores(bench.tables, "min_k"), _attack_scores(gold, "min_k")
    value = float(privleak(auc(*mine), auc(*theirs)))
    if math.isnan(value):
        raise NotShown("the gold ranks every forget row as a member, so its AUC cannot be a reference")
    samples = [_auc_draws(bench, *pair) for pair in (mine, theirs)]
    fewest = min(len(s) for s in samples)
    low, high = interval(privleak(samples[0][:fewest], samples[1][:fewest]))
    return {"value": value, "low": low, "high": high, **_counted(*mine)}


def _forget_parts(bench: _Bench) -> list[Part]:
    table = bench.side("forget")
    values = [
        1 - per_row.exact_memorization(table),
        1 - per_row.extraction_strength(table),
        1 - per_row.probability(table, PARAPHRASE),
        1 - _truth(bench, per_row.truth_share, table),
    ]
    return [("forget", v) for v in values]


def _utility(bench: _Bench) -> tuple[list[Part], Entry]:
    found = utility_parts(bench.tables, mean=bench.mean)
    sets = {side for side, _ in found} - ROW_SETS
    if not sets and not any(name == "rouge" for _, name in found):
        raise NotShown("needs a utility set, or generations on retained rows")
    complete = len(found) == 9 and sets == TOFU_SETS
    return [(side, values) for (side, _), values in found.items()], {"parts": len(found), "complete": complete}


def _model_utility(bench: _Bench) -> Entry:
    parts, extra = _utility(bench)
    return _combined(bench, parts, harmonic_mean) | extra


def _unlearning_score(bench: _Bench) -> Entry:
    forget, (kept, extra) = _forget_parts(bench), _utility(bench)

    def both(x: Floats) -> Floats:
        return harmonic_mean(np.stack((harmonic_mean(x[..., :4]), harmonic_mean(x[..., 4:])), axis=-1))

    return _combined(bench, forget + kept, both) | extra


_FROM_TABLES: dict[str, Callable[[_Bench], Entry]] = {
    "forget_probability": partial(_one, per_row.probability, "forget"),
    "retain_probability": partial(_one, per_row.probability, "kept"),
    "paraphrase_probability": partial(_one, partial(per_row.probability, kind=PARAPHRASE), "forget"),
    "forget_truth_ratio": lambda b: _one(partial(_truth, b, per_row.closeness_to_one), "forget", b),
    "retain_truth_ratio": lambda b: _one(partial(_truth, b, per_row.truthfulness), "kept", b),
    "forget_rouge": partial(_one, partial(stored, "rouge_l_recall"), "forget"),
    "retain_rouge": partial(_one, partial(stored, "rouge_l_recall"), "kept"),
    "exact_memorization": partial(_one, per_row.exact_memorization, "forget"),
    "extraction_strength": partial(_one, per_row.extraction_strength, "forget"),
    "forget_perplexity": partial(_perplexity, "forget"),
    "retain_perplexity": partial(_perplexity, "kept"),
    "forget_quality_log10": _forget_quality,
    "model_utility": _model_utility,
    "mia_loss_auc": partial(_membership, "loss"),
    "mia_zlib_auc": partial(_membership, "zlib"),
    "mia_min_k_auc": partial(_membership, "min_k"),
    "mia_min_k_plus_plus_auc": partial(_membership, "min_k_plus_plus"),
    "mia_loss_tpr": partial(_membership_tpr, "loss"),
    "privleak": _privleak,
    "forget_score": lambda b: _combined(b, _forget_parts(b), harmonic_mean),
    "unlearning_score": _unlearning_score,
    "forget_repetition": partial(_one, partial(stored, "repetition"), "forget"),
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
    truth_ratio: str = "geometric",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Every metric of the catalogue that one model's saved tables can give.

    Args:
        tables: side -> table of the model.
        against: the same of the gold; without it forget quality and PrivLeak are not shown.
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
    bench = _Bench(tables, against, truth_ratio, resamples, seed)
    values, not_shown = {}, {}
    for name, metric in METRICS.items():
        if name not in _FROM_TABLES:
            not_shown[name] = _ELSEWHERE[metric.source]
            continue
        try:
            entry = _FROM_TABLES[name](bench)
        except NotShown as reason:
            not_shown[name] = str(reason)
            continue
        if math.isfinite(entry["value"]):
            values[name] = entry
        else:
            not_shown[name] = "the result is not a finite number"
    return Scores(values, not_shown)
