"""Numbers from saved tables: against loop-written oracles, at their limits, and where nothing may be shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import oracle_metrics as oracle
from excise.errors import InputRefused, NotShown
from excise.metrics import rows, statistics
from excise.metrics.catalogue import METRICS, label
from excise.metrics.scores import score
from excise.metrics.table import ANSWER, FALSE_ANSWER, PARAPHRASE, Table, check, load, save
from excise.metrics.utility import utility_parts


@pytest.fixture
def table() -> Table:
    return oracle.make_table("forget", 17, paraphrases=2)


def one_answer(logp: list[float], hit: list[bool], *, eos: bool = True) -> Table:
    """A side with a single answer."""
    n = len(logp)
    return check(
        Table(
            "forget",
            1,
            {
                "row": np.zeros(1),
                "kind": np.zeros(1),
                "zlib": np.array([10]),
                "eos": np.array([eos]),
                "offsets": np.array([0, n]),
                "logp": np.array(logp),
                "hit": np.array(hit),
                "mu": np.zeros(n),
                "sigma": np.ones(n),
            },
        )
    )


def without(table: Table, *columns: str) -> Table:
    return Table(table.side, table.rows, {k: v for k, v in table.columns.items() if k not in columns})


# Each row value against its oracle


@pytest.mark.parametrize("kind", [ANSWER, PARAPHRASE, FALSE_ANSWER])
def test_probability_is_the_oracle(table: Table, kind: int) -> None:
    np.testing.assert_allclose(rows.probability(table, kind), oracle.probability(table, kind), rtol=1e-6)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("correct", [ANSWER, PARAPHRASE])
def test_truth_ratio_and_its_three_aggregations(table: Table, mean: str, correct: int) -> None:
    expected = np.array(oracle.truth_ratio(table, correct, mean))
    log_ratio = rows.log_truth_ratio(table, correct, mean)
    np.testing.assert_allclose(np.exp(log_ratio), expected, rtol=1e-6)
    np.testing.assert_allclose(rows.closeness_to_one(log_ratio), np.minimum(expected, 1 / expected), rtol=1e-6)
    np.testing.assert_allclose(rows.truthfulness(log_ratio), np.maximum(0, 1 - expected), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rows.truth_share(log_ratio), 1 / (1 + expected), rtol=1e-6)


def test_normalised_probability_is_the_oracle(table: Table) -> None:
    for row, value in enumerate(rows.normalised_probability(table)):
        right, *wrong = (
            math.exp(-oracle.mean_nll(table, s)) for k in (0, 2) for s in oracle.sequences_of(table, row, k)
        )
        assert value == pytest.approx(right / (right + sum(wrong)), rel=1e-6)


def test_memorisation_is_the_oracle(table: Table) -> None:
    np.testing.assert_allclose(rows.exact_memorization(table), oracle.exact_memorization(table))
    for compat in (False, True):
        fast, slow = (f(table, ou_compat=compat) for f in (rows.extraction_strength, oracle.extraction_strength))
        np.testing.assert_allclose(fast, slow)


@pytest.mark.parametrize("k", [0.05, 0.4, 1.0])
def test_min_k_is_the_oracle(table: Table, k: float) -> None:
    for attack, standardise in (("min_k", False), ("min_k_plus_plus", True)):
        expected = oracle.min_k(table, k, standardise=standardise)
        np.testing.assert_allclose(rows.attack_score(table, attack, k=k), expected, rtol=1e-5)


def test_statistics_are_the_oracle() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 31) / 3, rng.integers(2, 11, 22) / 3  # many ties
    assert statistics.auc(a, b) == pytest.approx(oracle.auc(a, b))
    parts = rng.random((5, 4))
    expected = [oracle.harmonic_mean(p) for p in parts]
    np.testing.assert_allclose(statistics.harmonic_mean(parts), expected)


# Traps


def test_answer_without_any_match_has_no_extraction_strength() -> None:
    nothing = one_answer([-1.0] * 5, [False] * 5)
    assert rows.extraction_strength(nothing)[0] == 0.0
    assert rows.extraction_strength(nothing, ou_compat=True)[0] == 0.25


def test_end_of_sequence_counts_for_probability_but_not_for_memorisation() -> None:
    t = one_answer([0.0, 0.0, -3.0], [True, True, False])
    assert rows.probability(t)[0] == pytest.approx(math.exp(-1))
    assert rows.exact_memorization(t)[0] == 1.0
    assert rows.extraction_strength(t)[0] == 1.0
    assert rows.attack_score(t, "min_k")[0] == 0.0
    assert rows.attack_score(t, "loss")[0] == pytest.approx(-1)
    cut = one_answer([0.0, 0.0, -3.0], [True, True, False], eos=False)  # a truncated answer ends without it
    assert rows.exact_memorization(cut)[0] == pytest.approx(2 / 3)
    assert rows.extraction_strength(cut)[0] == 0.0


def test_answer_that_is_only_end_of_sequence_is_left_out_not_counted_as_zero() -> None:
    t = one_answer([-1.0], [True])
    assert np.isnan(rows.exact_memorization(t)).all()
    assert np.isnan(rows.extraction_strength(t)).all()
    assert np.isnan(rows.attack_score(t, "min_k")).all()
    assert "exact_memorization" in score({"forget": t}).not_shown


def test_order_of_sequences_is_irrelevant(table: Table) -> None:
    order = np.random.default_rng(1).permutation(table.sequences)
    columns = dict(table.columns)
    for name in ("row", "kind", "zlib", "eos"):
        columns[name] = table.columns[name][order]
    pieces = [list(oracle.tokens_of(table, s)) for s in order]
    columns["offsets"] = np.concatenate(([0], np.cumsum([len(p) for p in pieces])))
    for name in ("logp", "hit", "mu", "sigma"):
        columns[name] = table.columns[name][np.concatenate(pieces)]
    shuffled, kept = Table("forget", table.rows, columns), oracle.make_table("retain", 9, seed=3)
    before, after = (score({"forget": t, "retain": kept}).values for t in (table, shuffled))
    assert before.keys() == after.keys()
    for name in before:
        assert after[name]["value"] == pytest.approx(before[name]["value"], rel=1e-9), name


def test_truth_ratio_of_a_ruined_model_neither_overflows_nor_vanishes() -> None:
    columns = {"row": np.zeros(3), "kind": np.array([1, 2, 2]), "mean_nll": np.array([5000.0, 1.0, 3.0])}
    t = check(Table("forget", 1, columns))
    for mean in ("geometric", "arithmetic"):
        log_ratio = rows.log_truth_ratio(t, mean=mean)
        assert log_ratio[0] == pytest.approx(4998, abs=1)
        assert rows.closeness_to_one(log_ratio)[0] == 0.0
        assert rows.truth_share(log_ratio)[0] == 0.0


def test_forget_quality_never_underflows() -> None:
    value, how = statistics.ks_log10(np.arange(3000), np.arange(9000, 12000))
    exact = 2 * (math.lgamma(3001)) - math.lgamma(6001) + math.log(2)  # disjoint samples: 2 / C(2n, n)
    assert value == pytest.approx(exact / math.log(10))
    assert how == "exact, in logarithms"
    value, how = statistics.ks_log10(np.arange(3000), np.arange(9000, 13000))
    assert -2000 < value < -500
    assert how == "asymptotic, in logarithms"


def test_forget_quality_in_logarithms_is_scipys_where_both_exist() -> None:
    for n, shift in ((20, 20), (60, 22), (300, 280)):
        x, y = np.arange(n), np.arange(shift, n + shift)
        exact = stats.ks_2samp(x, y, method="exact")
        tail = statistics._equal_size_tail(n, round(exact.statistic * n)) / math.log(10)
        assert tail == pytest.approx(math.log10(exact.pvalue), rel=1e-9)


def test_harmonic_mean_is_zero_when_a_part_is_and_no_warning_is_needed() -> None:
    with np.errstate(all="raise"):
        assert statistics.harmonic_mean([0.9, 0.0, 0.8]) == 0.0
        assert statistics.harmonic_mean(np.array([[1.0, 1.0], [0.0, 0.0]])).tolist() == [1.0, 0.0]


# Directions and signs


def membership_tables(forget_level: float) -> dict[str, Table]:
    return {
        "forget": oracle.make_table("forget", 60, seed=5, level=forget_level),
        "never_seen": oracle.make_table("never_seen", 60, seed=6, level=2.0),
    }


@pytest.mark.parametrize("attack", ["loss", "zlib", "min_k"])
def test_memorised_rows_look_like_members(attack: str) -> None:
    memorised, gold, buried = (membership_tables(level) for level in (0.01, 2.0, 100.0))
    values = [score(t).values[f"mia_{attack}_auc"] for t in (memorised, gold, buried)]
    assert values[0]["value"] > 0.99
    assert values[1]["low"] < 0.5 < values[1]["high"]
    assert values[2]["value"] < 0.05


def test_privleak_has_the_sign_of_muse() -> None:
    memorised, gold, buried = (membership_tables(level) for level in (0.01, 2.0, 100.0))
    under, same, over = (score(t, gold).values["privleak"]["value"] for t in (memorised, gold, buried))
    assert under == pytest.approx(-100, abs=1)
    assert same == 0.0
    assert over > 50


def test_privleak_null_spread_matches_what_was_simulated() -> None:
    rng = np.random.default_rng(0)
    for n, expected in ((40, 9.8), (200, 5.8), (400, 5.0)):
        assert statistics.privleak_null_spread(n, 200) == pytest.approx(expected, abs=0.3)
    simulated = [100 * (1 - statistics.auc(rng.random(40), rng.random(200)) - 0.5) / 0.5 for _ in range(2000)]
    assert np.std(simulated) == pytest.approx(statistics.privleak_null_spread(40, 200), rel=0.06)


def test_one_per_cent_of_false_alarms() -> None:
    rng = np.random.default_rng(0)
    negative = rng.random(1000)
    threshold = np.sort(negative)[-11]
    assert statistics.tpr_at_fpr([threshold + 1e-9, threshold - 1e-9], negative) == 0.5
    assert statistics.tpr_at_fpr([2.0, 0.5], negative[:50]) == 0.5  # too few negatives: no false alarm at all


def test_forget_score_and_unlearning_score_are_harmonic_means() -> None:
    forget, kept = oracle.make_table("forget", 30, seed=1), oracle.make_table("untouched", 30, seed=2)
    found = score({"forget": forget, "untouched": kept}).values
    parts = [
        1 - np.nanmean(oracle.exact_memorization(forget)),
        1 - np.nanmean(oracle.extraction_strength(forget, ou_compat=False)),
        1 - np.mean(oracle.probability(forget, 1)),
        1 - np.mean([1 / (1 + r) for r in oracle.truth_ratio(forget, 1, "geometric")]),
    ]
    assert found["forget_score"]["value"] == pytest.approx(oracle.harmonic_mean(parts), rel=1e-6)
    both = oracle.harmonic_mean([found["forget_score"]["value"], found["model_utility"]["value"]])
    assert found["unlearning_score"]["value"] == pytest.approx(both, rel=1e-9)
    assert (found["unlearning_score"]["parts"], found["unlearning_score"]["complete"]) == (3, False)


def test_perplexity_is_of_the_corpus_not_a_mean_of_rows(table: Table) -> None:
    answers = [s for r in range(table.rows) for s in oracle.sequences_of(table, r, 0)]
    places = [t for s in answers for t in oracle.tokens_of(table, s)]
    expected = math.exp(-float(np.mean(table.columns["logp"][places].astype(np.float64))))
    assert score({"forget": table}).values["forget_perplexity"]["value"] == pytest.approx(expected, rel=1e-9)


# Model utility


def nine() -> dict[str, Table]:
    names = ("retain", "real_authors", "world_facts")
    return {n: oracle.make_table(n, 12, seed=i) for i, n in enumerate(names)}


def test_model_utility_needs_all_nine_parts_for_its_name() -> None:
    tables = nine()
    full = score(tables).values["model_utility"]
    parts = [np.mean(v) for v in utility_parts(tables).values()]
    assert (full["parts"], full["complete"]) == (9, True)
    assert full["value"] == pytest.approx(oracle.harmonic_mean(parts))
    assert label("model_utility", full) == "Model utility"
    del tables["world_facts"]
    partial = score(tables).values["model_utility"]
    assert (partial["parts"], partial["complete"]) == (6, False)
    assert "6 parts" in label("model_utility", partial)


def test_utility_uses_plain_answers_of_utility_sets_and_paraphrases_of_retained_rows() -> None:
    tables = nine()
    found = utility_parts(tables)
    for side, correct in (("retain", 1), ("world_facts", 0)):
        expected = [max(0, 1 - r) for r in oracle.truth_ratio(tables[side], correct, "geometric")]
        np.testing.assert_allclose(found[side, "truth_ratio"], expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found["retain", "probability"], oracle.probability(tables["retain"], 0), rtol=1e-6)
    assert np.all(found["world_facts", "probability"] < rows.probability(tables["world_facts"]))


def test_untouched_rows_come_before_trained_ones() -> None:
    tables = {"retain": oracle.make_table("retain", 9), "untouched": oracle.make_table("untouched", 5, seed=4)}
    values = score(tables).values
    assert values["retain_probability"]["n"] == 5
    assert values["retain_probability"]["value"] == pytest.approx(
        np.mean(oracle.probability(tables["untouched"], 0)), rel=1e-6
    )


def test_utility_without_generations_or_utility_set_is_not_shown() -> None:
    bare = without(oracle.make_table("retain", 9, paraphrases=0, false_answers=0), "rouge_l_recall")
    found = score({"retain": bare})
    assert "model_utility" in found.not_shown
    assert "unlearning_score" in found.not_shown


# Nothing is guessed


def test_every_metric_is_shown_or_explained(table: Table) -> None:
    sides = {"forget": table, **nine(), "never_seen": oracle.make_table("never_seen", 11)}
    asked = {name for name, m in METRICS.items() if m.source != "muse"}
    before = sides | {"forget": oracle.make_table("forget", 17, paraphrases=2, level=0.01)}
    for tables in ({}, {"forget": table}, sides):
        for gold in (None, {}, sides):
            found = score(tables, gold, original=before, resamples=50)
            assert found.values.keys() | found.not_shown.keys() == asked
            assert not found.values.keys() & found.not_shown.keys()
            assert all(reason and "\n" not in reason for reason in found.not_shown.values())
            json.dumps(found.values, allow_nan=False)
    shown = score(sides, sides, original=before, resamples=50).values
    assert shown.keys() == {name for name, m in METRICS.items() if m.source == "tables"}


def test_gold_metrics_need_the_gold(table: Table) -> None:
    found = score({"forget": table, "never_seen": oracle.make_table("never_seen", 11)})
    for name, metric in METRICS.items():
        if metric.needs_gold and metric.source != "muse":
            assert "gold" in found.not_shown[name]


def test_missing_columns_are_named() -> None:
    bare = without(oracle.make_table("forget", 5), "hit", "mu")
    with pytest.raises(NotShown, match="'hit'"):
        rows.exact_memorization(bare)
    reasons = score({"forget": bare, "never_seen": bare}).not_shown
    assert "'mu'" in reasons["mia_min_k_plus_plus_auc"]


# Intervals


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        values = rng.exponential(1.0, 60)
        draws = statistics.bootstrap_means(values, statistics.bootstrap_counts(60, 400, i))
        low, high = statistics.interval(draws)
        assert low is not None
        assert high is not None
        inside += low < 1.0 < high
    assert 0.88 <= inside / 200 <= 0.98


def test_bootstrap_auc_is_the_auc_of_the_drawn_rows() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 6, 14).astype(float), rng.integers(2, 8, 11).astype(float)
    a[3], b[7] = np.nan, np.nan
    ca, cb = statistics.bootstrap_counts(14, 20, 1), statistics.bootstrap_counts(11, 20, 2)
    fast = statistics.bootstrap_auc(a, b, ca, cb)
    for i in range(20):
        drawn = [np.repeat(x, c[i].astype(int)) for x, c in ((a, ca), (b, cb))]
        assert fast[i] == pytest.approx(oracle.auc(*(x[~np.isnan(x)] for x in drawn)))


def test_intervals_are_seeded_and_hold_the_value() -> None:
    tables = nine() | {"forget": oracle.make_table("forget", 30), "never_seen": oracle.make_table("never_seen", 30)}
    first, second = (score(tables, tables, seed=4).values for _ in range(2))
    assert first == second
    for name, entry in first.items():
        if entry["low"] is not None:
            assert entry["low"] - 1e-9 <= entry["value"] <= entry["high"] + 1e-9, name
            assert entry["n"] > 0


def test_privleak_of_the_gold_against_itself_is_certain_because_rows_are_paired() -> None:
    gold = membership_tables(2.0)
    assert score(gold, gold).values["privleak"] | {"n": 0, "n_never_seen": 0} == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "n": 0,
        "n_never_seen": 0,
    }


def test_permutation_p_is_uniform_without_and_small_with_a_difference() -> None:
    rng = np.random.default_rng(0)

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(a.mean() - b.mean()))

    null = [
        statistics.permutation_p(rng.normal(size=12), rng.normal(size=9), gap, resamples=99, seed=i) for i in range(150)
    ]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert statistics.permutation_p(rng.normal(size=30), rng.normal(2, 1, 30), gap, resamples=199) == 1 / 200


# The catalogue


def test_catalogue_says_what_a_privacy_officer_needs() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.sentence.endswith(".")
        assert metric.direction in ("up", "down", "gold")
        assert metric.citation
        assert metric.sides
        assert not {"better", "compliant", "erased"} & set(metric.sentence.lower().replace(".", "").split()), name


def test_lower_is_never_better_where_the_gold_is_the_target() -> None:
    down = {name for name, m in METRICS.items() if m.direction == "down"}
    assert down == {"retain_perplexity", "retain_drift"}
    assert {name for name, m in METRICS.items() if "forget" in m.sides and m.direction != "gold"} == {
        "forget_quality_log10"
    }


# Tables on disk


def test_a_table_comes_back_as_it_was(table: Table, tmp_path: Path) -> None:
    save(table, tmp_path / "a" / "forget.safetensors")
    back = load(tmp_path / "a" / "forget.safetensors")
    assert (back.side, back.rows) == (table.side, table.rows)
    assert back.columns.keys() == table.columns.keys()
    for name, values in table.columns.items():
        np.testing.assert_array_equal(back.columns[name], values)
        assert back.columns[name].dtype == values.dtype
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["forget.safetensors"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"logp": None}, "'logp'"),
        ({"row": 99}, "'row'"),
        ({"kind": 3}, "'kind'"),
        ({"logp": math.nan}, "'logp'"),
        ({"offsets": 1}, "'offsets'"),
        ({"mystery": 0}, "'mystery'"),
        ({"rouge_l_recall": math.inf}, "'rouge_l_recall'"),
    ],
)
def test_contradictions_are_refused_in_one_line(table: Table, change: dict[str, float | None], word: str) -> None:
    columns = dict(table.columns)
    for name, value in change.items():
        if value is None:
            del columns[name]
        else:
            columns[name] = np.array(columns.get(name, np.zeros(1)), copy=True)
            columns[name][0] = value
    with pytest.raises(InputRefused, match=word) as refused:
        check(Table("forget", table.rows, columns))
    assert "\n" not in str(refused.value)


def test_wrong_length_is_refused(table: Table) -> None:
    with pytest.raises(InputRefused, match="'hit'"):
        check(Table("forget", table.rows, table.columns | {"hit": table.columns["hit"][:-1]}))


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x00" * 64])
def test_damaged_tables_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "forget.safetensors"
    with pytest.raises(InputRefused, match="no such table"):
        load(path)
    path.write_bytes(content)
    with pytest.raises(InputRefused):
        load(path)


def test_a_flipped_length_is_not_read_as_scores(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "forget.safetensors"
    save(table, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputRefused):
        load(path)
