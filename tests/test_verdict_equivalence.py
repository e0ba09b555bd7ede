"""Estimates of a verdict against loops, and the error rates of its tests at the margin, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

import oracles_evidence as oracle
from excise.verdict import equivalence as eq
from excise.verdict import shares
from excise.verdict.equivalence import Estimate, rows, settle

LEVEL = 0.05
RUNS = 2000


def _spread(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


# --- against loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_a_paired_mean_is_that_of_students_test(grouped: bool) -> None:
    a, b = _spread(60), _spread(60, 1)
    groups = np.arange(60) // 7 if grouped else np.arange(60)
    found = eq.difference(rows(a, groups if grouped else None), rows(b, groups if grouped else None), paired=True)
    quantile = float(stats.t.ppf(1 - LEVEL, len(set(groups.tolist())) - 1))
    low, high = oracle.grouped_t_bounds((a - b).tolist(), groups.tolist(), quantile)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert (found.units, found.grouped) == (len(set(groups.tolist())), grouped)
    if not grouped:
        own = stats.ttest_1samp(a - b, 0.0).confidence_interval(1 - 2 * LEVEL)
        assert (found.low, found.high) == pytest.approx((own.low, own.high), rel=1e-9)


def test_two_sides_are_compared_as_by_welch() -> None:
    a, b = 2 * _spread(30), _spread(90, 1)
    found = eq.difference(rows(a), rows(b), paired=False)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * LEVEL)
    # Welch's degrees of freedom and variances are those of the influences, exactly.
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_an_auc_has_the_variance_of_delong() -> None:
    p, q = np.round(_spread(25) + 0.5, 1), np.round(_spread(40, 1), 1)  # rounded: there are ties
    found = eq.auc(rows(p), rows(q))
    wins = [(x > y) + 0.5 * (x == y) for x in p for y in q]
    assert found.value == pytest.approx(np.mean(wins), abs=1e-12)
    spread_p = np.array([np.mean([(x > y) + 0.5 * (x == y) for y in q]) for x in p])
    spread_q = np.array([np.mean([(x > y) + 0.5 * (x == y) for x in p]) for y in q])
    parts = np.array([spread_p.var(ddof=1) / 25, spread_q.var(ddof=1) / 40])
    assert parts.sum() == pytest.approx(oracle.delong_variance(p.tolist(), q.tolist()), rel=1e-9)
    degrees = parts.sum() ** 2 / (parts**2 / np.array([24, 39])).sum()
    half = stats.t.ppf(1 - LEVEL, degrees) * math.sqrt(oracle.delong_variance(p.tolist(), q.tolist()))
    area = found.value
    moved = math.log(area / (1 - area)) + half / (area * (1 - area))  # bounds are taken on the logit
    assert found.high == pytest.approx(1 / (1 + math.exp(-moved)), rel=1e-9)


def test_an_auc_of_one_still_has_a_width() -> None:
    found = eq.auc(rows(np.arange(40.0) + 100), rows(np.arange(40.0)))
    assert found.value == 1.0
    assert found.low < 0.99


@pytest.mark.parametrize(("found", "n"), [(0, 1), (0, 59), (3, 60), (60, 60), (17, 40)])
def test_a_share_has_exact_bounds(found: int, n: int) -> None:
    own = shares.share(found, n, level=LEVEL)
    assert (own.low, own.high) == pytest.approx(oracle.binomial_bounds(found, n, LEVEL), abs=1e-9)
    if found == 0:
        assert own.high == pytest.approx(1 - LEVEL ** (1 / n))


def test_a_ratio_and_a_harmonic_ratio_agree_for_one_part() -> None:
    a, b = np.abs(_spread(50)) + 1, np.abs(_spread(50, 1)) + 1
    one = eq.ratio(rows(a), rows(b))
    other = eq.harmonic_ratio({"x": rows(a)}, {"x": rows(b)}, {"x": "facts"})
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-12)
    assert one.value == pytest.approx(a.sum() / b.sum())


def test_the_influence_of_a_harmonic_ratio_is_its_derivative() -> None:
    rng = np.random.default_rng(0)
    a = {"p": rng.random(40) + 0.5, "r": rng.random(40) + 0.2}
    b = {name: rng.random(40) + 0.5 for name in a}

    def value(weight: np.ndarray) -> float:
        means = [np.array([(x[k] * weight).sum() / weight.sum() for k in a]) for x in (a, b)]
        return float((2 / (1 / means[0]).sum()) / (2 / (1 / means[1]).sum()))

    jack = np.array([value(np.arange(40) != i) for i in range(40)])
    spread = math.sqrt(39 / 40 * ((jack - jack.mean()) ** 2).sum())
    found = eq.harmonic_ratio({k: rows(v) for k, v in a.items()}, {k: rows(v) for k, v in b.items()},
                              dict.fromkeys(a, "kept"))  # fmt: skip
    half = stats.t.ppf(1 - LEVEL, 39) * spread
    assert found.high - found.value == pytest.approx(half, rel=0.05)  # the jackknife is the same up to 1/n


def test_a_ratio_of_sums_keeps_rows_without_a_denominator() -> None:
    own, gold = rows([2.0, 0.0, 2.0], bottom=[2.0, 0.0, 4.0]), rows([2.0, 0.0, 0.0], bottom=[2.0, 1.0, 2.0])
    found = eq.difference(own, gold, paired=True)
    assert found.value == pytest.approx(4 / 6 - 2 / 5)  # the row where only the gold finds anything counts for the gold
    assert found.n == 3


def test_rows_that_one_model_lacks_are_left_out_of_both() -> None:
    found = eq.difference(rows([1.0, math.nan, 3.0]), rows([0.0, 5.0, 0.0]), paired=True)
    assert (found.value, found.n) == (2.0, 2)
    with pytest.raises(ValueError, match="same rows"):
        eq.difference(rows([1.0]), rows([1.0, 2.0]), paired=True)


def test_rows_that_all_agree_are_not_certain() -> None:
    found = eq.difference(rows(np.zeros(58)), rows(np.zeros(58)), paired=True, level=LEVEL)
    assert found.high == pytest.approx(shares.share(0, 58, level=LEVEL).high)
    assert settle(found, None, 0.05)[0] == "not shown"


def test_few_groups_are_no_groups() -> None:
    assert rows([1.0] * 8, np.arange(8) // 2).grouped is False  # four groups
    assert rows([1.0] * 10, np.arange(10) // 2).grouped is True
    assert rows([1.0] * 10, [-1, *range(9)]).grouped is False


def test_settling_is_two_sided_and_needs_finite_numbers() -> None:
    inside, above = Estimate(0.0, -0.04, 0.05, 50, 50), Estimate(0.2, 0.06, 0.3, 50, 50)
    assert settle(inside, -0.05, 0.05) == ("passed", "")
    assert settle(above, -0.05, 0.05) == ("failed", "above")
    assert settle(Estimate(-0.2, -0.3, -0.06, 50, 50), -0.05, 0.05) == ("failed", "below")
    assert settle(above, -0.05, None) == ("passed", "")
    assert settle(Estimate(0.04, -0.2, 0.2, 50, 50), -0.05, 0.05) == ("not shown", "")
    assert settle(Estimate(math.nan, math.nan, math.nan, 50, 50), -0.05, 0.05) == ("not shown", "")
    assert settle(Estimate(0.0, -math.inf, math.inf, 1, 1), -0.05, 0.05) == ("not shown", "")


# --- error rates at the margin --------------------------------------------------------------------------------------


def _paired(rng: np.random.Generator, shift: float) -> Estimate:
    return eq.difference(rows(rng.normal(shift, 0.1, 40) + 0.3), rows(np.full(40, 0.3)), paired=True, level=LEVEL)


def _unpaired(rng: np.random.Generator, shift: float) -> Estimate:
    return eq.difference(rows(rng.normal(shift, 0.3, 40)), rows(rng.normal(0, 0.1, 80)), paired=False, level=LEVEL)


def _in_groups(rng: np.random.Generator, shift: float) -> Estimate:
    groups = np.arange(60) // 6
    values = shift + rng.normal(0, 0.05, 10)[groups] + rng.normal(0, 0.05, 60)
    return eq.difference(rows(values, groups), rows(np.zeros(60), groups), paired=True, level=LEVEL)


def _of_areas(rng: np.random.Generator, shift: float) -> Estimate:
    # P(forgotten > never seen) = Phi(d / sqrt 2)
    d = math.sqrt(2) * stats.norm.ppf(0.5 + shift)
    return eq.auc(rows(rng.normal(d, 1, 60)), rows(rng.normal(0, 1, 100)), level=LEVEL)


def _of_two_areas(rng: np.random.Generator, shift: float) -> Estimate:
    d = math.sqrt(2) * stats.norm.ppf(0.5 + shift)
    hard, rest = rng.normal(size=60), rng.normal(size=100)

    def scores(level: float, shared: np.ndarray) -> eq.Rows:
        return rows(level + 0.9 * shared + math.sqrt(1 - 0.81) * rng.normal(size=len(shared)))

    model, gold = (scores(d, hard), scores(0, rest)), (scores(0, hard), scores(0, rest))
    return eq.auc_difference(*model, *gold, level=LEVEL)


def _areas_in_groups(rng: np.random.Generator, shift: float) -> Estimate:
    d = math.sqrt(2) * stats.norm.ppf(0.5 + shift)

    def side(level: float, groups: np.ndarray) -> eq.Rows:
        many = int(groups.max()) + 1
        values = math.sqrt(0.5) * (rng.normal(size=many)[groups] + rng.normal(size=len(groups)))
        return rows(level + values, groups)

    return eq.auc(side(d, np.arange(120) // 6), side(0, np.arange(120) // 6), level=LEVEL)


def _of_shares(rng: np.random.Generator, shift: float) -> Estimate:
    n = 400
    return shares.share_difference(int(rng.binomial(n, 0.3 + shift)), n, int(rng.binomial(n, 0.3)), n, level=LEVEL)


def _share(rng: np.random.Generator, shift: float) -> Estimate:
    return shares.share(int(rng.binomial(80, shift)), 80, level=LEVEL)


CASES: dict[str, tuple[Callable[[np.random.Generator, float], Estimate], float, float | None, float]] = {
    # the test, its margin above, below, and the least rate that shows it is not merely timid
    "paired means": (_paired, 0.05, -0.05, 0.03),
    "means of two sides": (_unpaired, 0.2, -0.2, 0.03),
    "means in groups": (_in_groups, 0.05, -0.05, 0.025),
    "areas": (_of_areas, 0.2, -0.2, 0.03),
    "areas of two models": (_of_two_areas, 0.1, -0.1, 0.025),
    "areas in groups": (_areas_in_groups, 0.25, -0.25, 0.02),
    "shares of two sides": (_of_shares, 0.1, -0.1, 0.03),
    "one share": (_share, 0.1, None, 0.01),  # exact bounds of a count are conservative by nature
}


def _outcomes(name: str, shift: float) -> list[tuple[str, str]]:
    make, most, least, _ = CASES[name]
    rng = np.random.default_rng(sum(name.encode()))
    moved = 0.0 if least is None else 0.5 if name in ("areas", "areas in groups") else 0.0
    bounds = (None if least is None else least + moved, most + moved)
    return [settle(make(rng, shift), *bounds) for _ in range(RUNS)]


@pytest.mark.parametrize("name", CASES)
def test_a_model_on_the_margin_passes_at_the_nominal_level(name: str) -> None:
    """The error that matters: called equivalent where the truth lies on the margin. 2000 draws: SE 0.5 points."""
    _, most, least, timid = CASES[name]
    for shift in (most, least) if least is not None else (most,):
        rate = np.mean([outcome == "passed" for outcome, _ in _outcomes(name, shift)])
        assert timid <= rate <= LEVEL + 0.016, f"{name} at {shift}: {rate:.4f}"


@pytest.mark.parametrize("name", CASES)
def test_a_model_on_the_margin_fails_at_the_nominal_level(name: str) -> None:
    _, most, _, _ = CASES[name]
    rate = np.mean([outcome == "failed" for outcome, _ in _outcomes(name, most)])
    assert rate <= LEVEL + 0.016, f"{name}: {rate:.4f}"


@pytest.mark.parametrize("name", ["paired means", "areas of two models", "means in groups"])
def test_equal_models_pass_and_different_ones_fail(name: str) -> None:
    _, most, _, _ = CASES[name]
    assert np.mean([outcome == "passed" for outcome, _ in _outcomes(name, 0.0)]) > 0.6
    assert np.mean([outcome == "failed" for outcome, _ in _outcomes(name, min(3 * most, 0.4))]) > 0.9
