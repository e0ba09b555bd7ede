"""leak@k and its bounds: against enumeration, at both ends, and by simulation at their nominal level."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles_evidence as oracle
from excise.metrics import leakage

# leak@k


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_leak_at_k_is_the_share_of_subsets_that_leak(samples: int) -> None:
    counts = list(range(samples + 1))
    for k in range(1, samples + 1):
        found = leakage.leak_at_k(counts, samples, k)
        assert found == pytest.approx([oracle.leak_by_enumeration(c, samples, k) for c in counts], abs=1e-12)


def test_leak_at_one_is_the_rate_and_at_n_whether_any() -> None:
    counts = np.arange(65)
    assert leakage.leak_at_k(counts, 64, 1) == pytest.approx(counts / 64, abs=1e-15)
    assert leakage.leak_at_k(counts, 64, 64).tolist() == [0.0] + [1.0] * 64


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_more_tries_and_more_leaks_never_leak_less(samples: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, samples))
    curve = [float(leakage.leak_at_k([c], samples, k)[0]) for k in (1, (samples + 1) // 2, samples)]
    assert curve == sorted(curve)
    assert all(0 <= x <= 1 for x in curve)
    more = float(leakage.leak_at_k([min(c + 1, samples)], samples, 1)[0])
    assert more >= curve[0]


def test_leak_at_k_is_unbiased() -> None:
    """Over many draws of n samples its mean is the chance that k fresh samples leak."""
    rng, p, n, k = np.random.default_rng(0), 0.15, 12, 4
    found = leakage.leak_at_k(rng.binomial(n, p, 40_000), n, k)
    assert found.mean() == pytest.approx(1 - (1 - p) ** k, abs=4 * found.std() / 200)


@pytest.mark.parametrize(("leaks", "samples", "k"), [([1], 4, 0), ([1], 4, 5), ([5], 4, 1), ([-1], 4, 1)])
def test_leak_at_k_refuses_nonsense(leaks: list[int], samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        leakage.leak_at_k(leaks, samples, k)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
@settings(max_examples=60, deadline=None)
def test_best_of_k_is_the_mean_over_subsets_of_the_best(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    assert float(leakage.best_of_k(scores, k)) == pytest.approx(oracle.best_by_enumeration(scores, k), abs=1e-9)


def test_best_of_k_is_leak_at_k_for_yes_and_no() -> None:
    scores = np.array([[1.0] * c + [0.0] * (10 - c) for c in range(11)])
    for k in (1, 3, 10):
        assert leakage.best_of_k(scores, k) == pytest.approx(leakage.leak_at_k(range(11), 10, k))
    with pytest.raises(ValueError, match="k must be"):
        leakage.best_of_k([0.5], 2)


# Clopper-Pearson


@pytest.mark.parametrize("n", [1, 7, 64, 200])
def test_clopper_pearson_is_where_so_few_successes_become_unlikely(n: int) -> None:
    for c in {0, 1, n // 2, n - 1, n}:
        for alpha in (0.05, 0.01):
            own = float(leakage.clopper_pearson_upper(c, n, alpha))
            assert own == pytest.approx(oracle.binomial_upper(c, n, alpha), abs=1e-9)


def test_clopper_pearson_at_zero_and_at_n_is_exact() -> None:
    for n in (1, 64, 10_000):
        assert float(leakage.clopper_pearson_upper(0, n, 0.01)) == pytest.approx(1 - 0.01 ** (1 / n), rel=1e-9)
        assert float(leakage.clopper_pearson_upper(n, n, 0.01)) == 1.0
        low, high = leakage.clopper_pearson(0, n)
        assert low == 0.0
        assert high == pytest.approx(1 - 0.025 ** (1 / n), rel=1e-9)
        assert leakage.clopper_pearson(n, n)[1] == 1.0


def test_clopper_pearson_misses_the_truth_no_oftener_than_it_says() -> None:
    """Summed over all outcomes, not drawn: the chance that the bound lies below the truth."""
    n, alpha = 40, 0.05
    bounds = leakage.clopper_pearson_upper(np.arange(n + 1), n, alpha)
    for p in np.linspace(0.01, 0.99, 99):
        weights = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
        assert weights[bounds < p].sum() <= alpha + 1e-12


def test_clopper_pearson_refuses_nonsense() -> None:
    for c, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            leakage.clopper_pearson_upper(c, n)


# The band


def test_width_of_the_band() -> None:
    assert leakage.dkw_width(128, 0.01) == pytest.approx(math.sqrt(math.log(100) / 256))
    for bad in (0.0, 0.6):
        with pytest.raises(ValueError, match="alpha"):
            leakage.dkw_width(10, bad)


@pytest.mark.parametrize("shape", [(1.0, 1.0), (0.3, 3.0)])
def test_the_band_fails_no_oftener_than_it_says(shape: tuple[float, float]) -> None:
    from scipy import stats

    rng, alpha, n, runs = np.random.default_rng(1), 0.1, 30, 1500
    grid = np.linspace(0, 1, 201)[:-1]
    truth = 1 - stats.beta.cdf(grid, *shape)
    drawn = rng.beta(*shape, (runs, n))
    failed = np.mean([np.any(leakage.exceedance_upper(own, grid, alpha) < truth - 1e-12) for own in drawn])
    assert failed <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert failed > alpha / 4, "a band that never fails is wider than it says"
    means = [leakage.mean_upper(own, alpha) for own in drawn]
    assert np.mean(np.array(means) < shape[0] / sum(shape)) <= alpha


@pytest.mark.parametrize("scores", [[0.0], [1.0], [0.0] * 30 + [0.7] * 10, list(np.linspace(0, 1, 25))])
def test_mean_bound_is_the_area_under_the_band(scores: list[float]) -> None:
    for alpha in (0.01, 0.2):
        assert leakage.mean_upper(scores, alpha) == pytest.approx(oracle.mean_bound(scores, alpha), abs=1e-4)


def test_mean_bound_refuses_scores_outside_the_range() -> None:
    for scores in ([], [-0.1], [1.1]):
        with pytest.raises(ValueError, match="scores"):
            leakage.mean_upper(scores)
