"""How much leaks in many tries: leak@k, its exact upper bounds, and a band for scores that are not yes or no. No torch.

What is given are samples of a model's answers to each prompt: how many of them leak, or how much each does.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def leak_at_k(leaks: ArrayLike, samples: int, k: int) -> Floats:
    """Probability that at least one of k answers, drawn without replacement from the samples, leaks.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of 1 - (1 - p)^k from n samples of which c leak.

    Args:
        leaks: ``[prompts]`` samples that leak, c.
        samples: Samples of each prompt, n.
        k: How many the attacker takes, 1 to n.

    Returns:
        ``[prompts]``; c / n at k = 1, and 1 as soon as c > 0 at k = n.

    Raises:
        ValueError: A k or c outside its range.

    Source:
        leak@k, OptimAI-Lab; the estimator is that of pass@k (Chen et al., 2107.03374, equation 1).

    Example:
        >>> leak_at_k([0, 1, 2], 4, 2).round(3).tolist()
        [0.0, 0.5, 0.833]
    """
    c = np.asarray(leaks, np.int64)
    if not 1 <= k <= samples or np.any(c < 0) or np.any(c > samples):
        raise ValueError(f"k must be 1 to {samples}, and leaks 0 to {samples}")
    # C(n - c, k) / C(n, k) = product over i < k of (n - c - i) / (n - i): no factorial overflows.
    i = np.arange(k)
    factors = np.maximum(samples - c[..., None] - i, 0) / (samples - i)
    return np.where(c == 0, 0.0, 1.0 - factors.prod(axis=-1))


def best_of_k(scores: ArrayLike, k: int) -> Floats:
    """Expected highest score of k answers drawn without replacement from the samples.

    Args:
        scores: ``[..., n]`` scores of the samples.
        k: How many the attacker takes, 1 to n.

    Returns:
        ``[...]``: sum over the i-th lowest score of C(i - 1, k - 1) / C(n, k) times it; the mean at k = 1, the highest
        at k = n. For scores 0 and 1 this is `leak_at_k`.

    Raises:
        ValueError: A k outside 1 to n.

    Example:
        >>> best_of_k([0.0, 0.5, 1.0], 1).round(3).item(), best_of_k([0.0, 0.5, 1.0], 3).item()
        (0.5, 1.0)
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    n = ordered.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to {n}")
    total = math.comb(n, k)
    weights = np.array([math.comb(i - 1, k - 1) / total for i in range(1, n + 1)])
    return ordered @ weights


def clopper_pearson_upper(successes: ArrayLike, n: ArrayLike, alpha: float = 0.01) -> Floats:
    """Largest probability that is not rejected at level alpha by so many successes: exact, one-sided.

    Args:
        successes: How many succeeded.
        n: Of how many, at least 1.
        alpha: Probability that the bound lies below the truth, at most.

    Returns:
        The 1 - alpha quantile of Beta(c + 1, n - c); 1 - alpha^(1/n) at c = 0, and 1 at c = n.

    Source:
        Clopper and Pearson 1934; used so by Scholten et al., 2410.03523.

    Example:
        >>> clopper_pearson_upper([0, 64], 64).round(4).tolist()
        [0.0694, 1.0]
    """
    from scipy import stats

    c, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    if np.any(n < 1) or np.any(c < 0) or np.any(c > n):
        raise ValueError("successes must be 0 to n, and n at least 1")
    beta = stats.beta.ppf(1 - alpha, np.where(c < n, c + 1, 1), np.where(c < n, n - c, 1))
    return np.where(c < n, beta, 1.0)


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a share; at 0 and at n successes its inner end alone is informative.

    Example:
        >>> [round(x, 4) for x in clopper_pearson(0, 10)], [round(x, 4) for x in clopper_pearson(5, 10)]
        ([0.0, 0.3085], [0.1871, 0.8129])
    """
    half = (1 - level) / 2
    low = 1.0 - float(clopper_pearson_upper(n - successes, n, half))
    return low, float(clopper_pearson_upper(successes, n, half))


def dkw_width(n: int, alpha: float = 0.01) -> float:
    """Half-width of the one-sided band around an empirical distribution function: sqrt(ln(1 / alpha) / (2 n)).

    Source:
        Dvoretzky, Kiefer and Wolfowitz 1956 with Massart's constant (1990), valid one-sided for alpha <= 1/2.

    Example:
        >>> round(dkw_width(128), 4)
        0.1341
    """
    if not 0 < alpha <= 0.5 or n < 1:
        raise ValueError("alpha must be in (0, 0.5], and n at least 1")
    return math.sqrt(math.log(1 / alpha) / (2 * n))


def exceedance_upper(scores: ArrayLike, at: ArrayLike, alpha: float = 0.01) -> Floats:
    """Upper band of P(score > x), for all x at once: min(1, 1 - F_n(x) + width).

    Args:
        scores: ``[n]`` samples of a score in [0, 1].
        at: ``[m]`` places x.
        alpha: Probability that the band fails anywhere, at most.

    Returns:
        ``[m]``.

    Source:
        Scholten et al., 2410.03523, section 4, from `dkw_width`.

    Example:
        >>> exceedance_upper(np.zeros(128), [0.0]).round(4).tolist()
        [0.1341]
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    above = 1.0 - np.searchsorted(ordered, np.asarray(at, np.float64), "right") / len(ordered)
    return np.minimum(1.0, above + dkw_width(len(ordered), alpha))


def mean_upper(scores: ArrayLike, alpha: float = 0.01) -> float:
    """Upper bound of the mean of a score in [0, 1]: the area under `exceedance_upper`.

    Raises:
        ValueError: Scores outside [0, 1].

    Source:
        Anderson 1969, with the band of Dvoretzky, Kiefer, Wolfowitz and Massart.

    Example:
        >>> round(mean_upper(np.zeros(128)), 4), mean_upper(np.ones(128))
        (0.1341, 1.0)
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    if not len(ordered) or ordered[0] < 0 or ordered[-1] > 1:
        raise ValueError("scores must be in [0, 1], at least one")
    edges = np.concatenate(([0.0], ordered, [1.0]))
    return float(np.sum(np.diff(edges) * exceedance_upper(ordered, edges[:-1], alpha)))
