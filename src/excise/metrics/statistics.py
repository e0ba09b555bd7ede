"""Statistics on plain arrays: AUC, PrivLeak, Kolmogorov-Smirnov in logarithms, bootstrap, permutation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative, ties counted half; 0.5 = no difference; NaN is left out.

    Example:
        >>> auc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    a, b = _present(positive), _present(negative)
    if not len(a) or not len(b):
        return math.nan
    b = np.sort(b)
    below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
    return float(below.mean() / (2 * len(b)))


def _present(values: ArrayLike) -> Floats:
    values = np.asarray(values, np.float64)
    return values[~np.isnan(values)]


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float = 0.01) -> float:
    """Share of positives found when at most a share ``fpr`` of the negatives is called positive.

    With fewer than 1/fpr negatives no false alarm is allowed at all, so the number is coarse: report both counts.

    Example:
        >>> tpr_at_fpr([1.0, 5.0], [0.0, 2.0])
        0.5
    """
    a, b = _present(positive), np.sort(_present(negative))
    if not len(a) or not len(b):
        return math.nan
    allowed = min(math.floor(fpr * len(b) + 1e-9), len(b) - 1)
    return float(np.mean(a > b[len(b) - 1 - allowed]))


def privleak(value: ArrayLike, gold: ArrayLike) -> Floats:
    """PrivLeak in per cent with the sign of MUSE (Shi et al., 2407.06460, section 4).

    Args:
        value: AUC of the unlearned model, where higher means that forget rows look more like members.
        gold: the same AUC of the model trained without the forget rows.

    Returns:
        100 (A - A_gold) / A_gold with A = 1 - AUC. -100 to 0: too little was unlearned; above 0: too much; 0: as the
        gold. NaN where A_gold is 0, because the ratio has no meaning there.

    Example:
        >>> float(privleak(1.0, 0.5)), float(privleak(0.5, 0.5)), float(privleak(0.0, 0.5))
        (-100.0, 0.0, 100.0)
    """
    a, reference = 1.0 - np.asarray(value, np.float64), 1.0 - np.asarray(gold, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(reference > 0, 100.0 * (a - reference) / reference, np.nan)


def privleak_null_spread(forget: int, never_seen: int, gold_auc: float = 0.5) -> float:
    """Standard deviation of PrivLeak that chance alone gives to a model that leaks nothing, in per cent points.

    The Mann-Whitney statistic of n and m exchangeable scores has variance (n + m + 1) / (12 n m); the gold's AUC is
    held fixed.

    Example:
        >>> [round(privleak_null_spread(n, 200), 1) for n in (40, 200, 400)]
        [10.0, 5.8, 5.0]
    """
    if forget < 1 or never_seen < 1:
        return math.nan
    return 100.0 * math.sqrt((forget + never_seen + 1) / (12.0 * forget * never_seen)) / (1.0 - gold_auc)


def harmonic_mean(parts: ArrayLike) -> Floats:
    """Harmonic mean over the last axis; 0 as soon as one part is 0 (or below).

    Example:
        >>> float(harmonic_mean([0.5, 1.0])), float(harmonic_mean([0.0, 1.0]))
        (0.6666666666666666, 0.0)
    """
    parts = np.asarray(parts, np.float64)
    dead = np.any(parts <= 0, axis=-1)
    safe = np.where(parts > 0, parts, 1.0) + np.where(np.isnan(parts), np.nan, 0.0)
    return np.where(dead, 0.0, parts.shape[-1] / np.sum(1.0 / safe, axis=-1))


def ks_log10(x: ArrayLike, y: ArrayLike) -> tuple[float, str]:
    """log10 of the two-sample Kolmogorov-Smirnov p-value, and how it was found; never minus infinity.

    Where the p-value is too small for a float, sizes that agree use the exact lattice-path formula in logarithms
    (Gnedenko and Korolyuk, 1951), others the leading term of Kolmogorov's series, log 2 - 2 D^2 n m / (n + m).

    Returns:
        (log10 p, "exact or asymptotic" | "exact, in logarithms" | "asymptotic, in logarithms")

    Example:
        >>> ks_log10([1.0, 2.0], [1.0, 2.0])
        (0.0, 'exact or asymptotic')
        >>> value, how = ks_log10(range(2000), range(5000, 7000))
        >>> round(value), how
        (-1202, 'exact, in logarithms')
    """
    from scipy import stats

    a, b = _present(x), _present(y)
    if not len(a) or not len(b):
        return math.nan, "no rows"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy announces its own switch to the asymptotic form
        result = stats.ks_2samp(a, b)
    p, distance = float(result.pvalue), float(result.statistic)
    if p > 1e-290:
        return math.log10(min(1.0, p)), "exact or asymptotic"
    n, m = len(a), len(b)
    if n == m:
        h = round(distance * n)
        return _equal_size_tail(n, h) / math.log(10), "exact, in logarithms"
    return (math.log(2) - 2 * distance**2 * n * m / (n + m)) / math.log(10), "asymptotic, in logarithms"


def _equal_size_tail(n: int, h: int) -> float:
    """Log P(D >= h/n) = log of 2 sum_k (-1)^(k-1) C(2n, n-kh) / C(2n, n), for two samples of n."""

    def log_choose(k: int) -> float:
        return math.lgamma(2 * n + 1) - math.lgamma(k + 1) - math.lgamma(2 * n - k + 1)

    first = log_choose(n - h)
    series = sum((-1) ** (k - 1) * math.exp(log_choose(n - k * h) - first) for k in range(1, n // h + 1))
    return math.log(2) + first - log_choose(n) + math.log(series)


def bootstrap_counts(n: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """``[resamples, n]`` draws of each row, with replacement. Equal n and seed give equal draws, hence pairing.

    Example:
        >>> bootstrap_counts(5, 3).sum(axis=1)
        array([5., 5., 5.])
    """
    # Very large sides get fewer resamples, so that the counts stay below about 200 MB.
    resamples = min(resamples, max(100, 25_000_000 // max(n, 1)))
    draws = np.random.default_rng([seed, n]).integers(0, max(n, 1), size=(resamples, n))
    flat = (draws + np.arange(resamples)[:, None] * n).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def bootstrap_means(values: Floats, counts: Floats) -> Floats:
    """``[resamples]`` means of the drawn rows, rows with NaN left out."""
    seen = ~np.isnan(values)
    weight = counts @ seen.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0, (counts @ np.where(seen, values, 0.0)) / weight, np.nan)


def bootstrap_auc(positive: Floats, negative: Floats, counts_p: Floats, counts_n: Floats) -> Floats:
    """``[resamples]`` AUCs, the two groups drawn separately (stratified)."""
    rest = ~np.isnan(negative)
    ordered = np.argsort(np.where(rest, negative, np.inf))
    sorted_negative = negative[ordered][: int(rest.sum())]
    resamples = min(len(counts_p), len(counts_n))
    # Cumulative weights of the sorted negatives turn every comparison into two look-ups: no n x m matrix is ever held.
    running = np.cumsum(counts_n[:resamples, ordered[: len(sorted_negative)]], axis=1)
    total = np.concatenate((np.zeros((resamples, 1)), running), axis=1)
    seen = ~np.isnan(positive)
    low = np.searchsorted(sorted_negative, positive[seen], "left")
    high = np.searchsorted(sorted_negative, positive[seen], "right")
    drawn = counts_p[:resamples][:, seen]
    wins = np.sum(drawn * (total[:, low] + total[:, high]), axis=1) / 2
    pairs = drawn.sum(axis=1) * total[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, wins / pairs, np.nan)


def interval(samples: Floats, level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of bootstrap values; ``(None, None)`` when none is finite.

    Example:
        >>> interval(np.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None, None
    low, high = np.percentile(finite, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share by the score test (Wilson 1927): inside 0 to 1, and honest at 0 and at n successes.

    Example:
        >>> [round(bound, 4) for bound in wilson(5, 10)], [round(bound, 4) for bound in wilson(0, 10)]
        ([0.2366, 0.7634], [0.0, 0.2775])
    """
    from scipy import stats

    if n < 1:
        return math.nan, math.nan
    z, share = float(stats.norm.ppf(0.5 + level / 2)), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding at 0 and n


def permutation_p(
    x: ArrayLike, y: ArrayLike, statistic: Callable[[NDArray, NDArray], float], *, resamples: int = 999, seed: int = 0
) -> float:
    """Share of random relabellings of the rows whose statistic is at least the observed one, the observed one included.

    Args:
        x: ``[n, ...]`` rows of the first group.
        y: ``[m, ...]`` rows of the second.
        statistic: larger = more different. Rows must be exchangeable under the null (not several rows of one person).
        resamples: relabellings drawn; the smallest possible p-value is 1 / (resamples + 1).
        seed: of the relabellings.

    Example:
        >>> permutation_p([0.0, 0.1, 0.2, 0.3], [5.0, 5.1, 5.2, 5.3], lambda a, b: abs(a.mean() - b.mean())) < 0.1
        True
    """
    x, y = np.asarray(x), np.asarray(y)
    pooled, n = np.concatenate((x, y)), len(x)
    observed, rng, reached = statistic(x, y), np.random.default_rng(seed), 1
    for _ in range(resamples):
        order = rng.permutation(len(pooled))
        reached += int(statistic(pooled[order[:n]], pooled[order[n:]]) >= observed - 1e-12 * abs(observed))
    return reached / (resamples + 1)
