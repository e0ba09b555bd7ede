"""What one run of canaries proves: a lower bound on the privacy loss that remains, and on what hidden states carry.

Canaries are rows whose membership was drawn by a fair coin before the first training: those that it chose were trained
on and then requested to be forgotten, the others nobody saw. An observer of the final model guesses which were which.
If the whole pipeline, training and forgetting together, were epsilon-private towards each canary, no observer could be
right more often than a coin that lands on the truth with probability e^epsilon / (1 + e^epsilon): whoever is right more
often has refuted that epsilon. A model trained without the canaries has epsilon 0.

Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", arXiv:2305.08500, theorems 3.1, 5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Largest epsilon that is searched: beyond it the accuracy of a guess differs from 1 by less than a float holds.
_MOST = 36.0


@dataclass(frozen=True)
class Guesses:
    """How an observer did: of so many canaries, guesses on some, right ones among them."""

    canaries: int
    made: int
    right: int


def guess(score: ArrayLike, included: ArrayLike, *, share: float = 0.5) -> Guesses:
    """Guess the canaries of highest score as trained on, those of lowest as never seen, and abstain in between.

    Args:
        score: ``[m]``, one per canary, higher = looks more like a trained one. Ties are broken by position, which the
            coin does not know.
        included: ``[m]`` bool, what the coin said.
        share: Share of the canaries that is guessed at, half of it at either end. Fixed before the scores are seen: to
            choose it afterwards would void the bound.

    Example:
        >>> guess([3.0, 2.0, 1.0, 0.0], [True, False, True, False], share=0.5)
        Guesses(canaries=4, made=2, right=2)
    """
    scores, truth = np.asarray(score, np.float64), np.asarray(included, bool)
    if scores.shape != truth.shape or scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError("one finite score for each canary")
    if not 0 < share <= 1:
        raise ValueError("share must lie above 0 and at most at 1")
    each = int(len(scores) * share / 2)
    order = np.argsort(scores, kind="stable")
    right = int((~truth[order[:each]]).sum() + truth[order[len(order) - each :]].sum())
    return Guesses(len(scores), 2 * each, right)


def p_value(found: Guesses, epsilon: float, delta: float = 0.0) -> float:
    """Largest chance that an (epsilon, delta)-private pipeline gives to guesses at least as good as these.

    P[B >= v] for B ~ Binomial(r, e^eps / (1 + e^eps)), plus 2 m delta max_i P[v > B >= v - i] / i.

    Source:
        arXiv:2305.08500, theorem 5.2 (theorem 3.1 at delta 0).

    Example:
        >>> p_value(Guesses(10, 10, 10), 0.0) == 2.0 ** -10
        True
    """
    from scipy import stats

    if epsilon < 0 or not 0 <= delta < 1:
        raise ValueError("epsilon must be at least 0, delta in [0, 1)")
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(found.right - 1, found.made, rate))
    if delta and found.right:
        below = stats.binom.pmf(np.arange(found.right - 1, -1, -1), found.made, rate)  # v - 1, v - 2, ..., 0
        tail += 2 * found.canaries * delta * float(np.max(np.cumsum(below) / np.arange(1, found.right + 1)))
    return min(1.0, tail)


def epsilon_bound(found: Guesses, *, level: float = 0.95, delta: float = 0.0) -> float:
    """Lower confidence bound on epsilon: every smaller one would make these guesses rarer than ``1 - level``; 0 = none.

    Example:
        >>> epsilon_bound(Guesses(100, 50, 25)), round(epsilon_bound(Guesses(100, 50, 45)), 2)
        (0.0, 1.39)
    """
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    low, high = 0.0, _MOST
    if p_value(found, low, delta) >= 1 - level:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(found, middle, delta) < 1 - level else (low, middle)
    return low


def two_sided_bound(found: Guesses, *, level: float = 0.95, delta: float = 0.0) -> float:
    """The larger of the bounds for these guesses and for their opposites, each at half the error.

    Over-forgetting gives canaries away by making them *less* likely than never-seen ones: the observer who knows that
    turns every guess round. Which of the two works is not known beforehand, so each gets half of the error.

    Example:
        >>> two_sided_bound(Guesses(100, 50, 45)) == two_sided_bound(Guesses(100, 50, 5)) > 1
        True
    """
    turned = Guesses(found.canaries, found.made, found.made - found.right)
    each = (1 + level) / 2
    return max(epsilon_bound(g, level=each, delta=delta) for g in (found, turned))


def largest_bound(canaries: int, *, share: float = 0.5, level: float = 0.95) -> float:
    """What `two_sided_bound` could show at most with so many canaries: all guesses right. Below it nothing is shown.

    Example:
        >>> round(largest_bound(20), 2), round(largest_bound(400), 2)
        (0.81, 3.98)
    """
    made = 2 * int(canaries * share / 2)
    return two_sided_bound(Guesses(canaries, made, made), level=level)


def information_bound(errors: int, n: int, *, level: float = 0.95) -> float:
    """Lower confidence bound, in bits, on what a state says about its canary's coin, from a probe's errors on others.

    I(coin; state) >= I(coin; guess) >= 1 - h(P_e) for a fair coin and a guess that errs with probability P_e <= 1/2
    (data processing and Fano's inequality; h is the binary entropy). P_e is replaced by the upper end of its
    Clopper-Pearson interval; 0 where that is 1/2 or more. The probe must not have been fitted on these canaries.

    Example:
        >>> information_bound(10, 20), round(information_bound(0, 100), 2)
        (0.0, 0.81)
    """
    worst = clopper_pearson_upper(errors, n, level=level)
    if worst >= 0.5:
        return 0.0
    return 1.0 + worst * math.log2(worst) + (1 - worst) * math.log2(1 - worst)


def clopper_pearson_upper(successes: int, n: int, *, level: float = 0.95) -> float:
    """Exact one-sided upper confidence bound of a share; at 0 successes it is 1 - (1 - level)^(1/n).

    Source:
        Clopper and Pearson, 1934.

    Example:
        >>> round(clopper_pearson_upper(0, 59), 3)
        0.05
    """
    from scipy import stats

    if not 0 <= successes <= n or n < 1:
        raise ValueError("successes must lie between 0 and n, n at least 1")
    return 1.0 if successes == n else float(stats.beta.ppf(level, successes + 1, n - successes))


def probe_errors(states: NDArray, included: ArrayLike, *, seed: int = 0, c: float = 0.01) -> tuple[int, int]:
    """Errors of a linear probe on the half of the canaries that it was not fitted on, and how many those are.

    Args:
        states: ``[m, d]``, one state per canary.
        included: ``[m]`` bool.
        seed: Of the halves.
        c: Inverse regularisation of the logistic regression; fixed, because to tune it on these canaries would void
            the bound.

    Example:
        >>> import numpy as np
        >>> coin = np.arange(40) % 2 == 0
        >>> probe_errors(np.where(coin, 1.0, -1.0)[:, None] * np.ones((40, 3)), coin)
        (0, 20)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    truth = np.asarray(included, bool)
    order = np.random.default_rng(seed).permutation(len(truth))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    if len(set(truth[fit])) < 2:
        raise ValueError("the fitted half holds canaries of one kind only: use more of them")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    model.fit(states[fit], truth[fit])
    score = model.decision_function(states[fit])
    # Halfway between the classes: the fitted threshold leans to whichever class the first half holds more of.
    cut = (score[truth[fit]].mean() + score[~truth[fit]].mean()) / 2
    return int(((model.decision_function(states[test]) > cut) != truth[test]).sum()), len(test)
