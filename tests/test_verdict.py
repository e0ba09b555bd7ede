"""A verdict over a whole run folder: each outcome, each way to fail by name, few rows, no gold, tampering, words."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import excise
from excise import artifacts, cli, files, recipe, verdict
from excise.artifacts import GOLD, Number, Results, RunFolder
from excise.attacks.outcome import Outcome
from excise.attacks.outcome import save as save_outcome
from excise.commands import folders
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.metrics.table import Table
from excise.verdict import Evidence, Verdict
from excise.verdict.equivalence import Estimate
from excise.verdict.question import Answer, put
from fake_run import write_fake_run
from fake_tagged_run import write_fake_tagged_run
from fake_verified_run import AS_GOLD, Made, make, outcomes, table

SOURCE = Path(verdict.__file__).parent
FORBIDDEN = re.compile(r"\berase|\bcomplian|\bgdpr\b", re.IGNORECASE)
SHORT = Made(forget=-0.7, rouge=0.5, savings=0.9, inside=0.99, relearned=0.5, leak=0.4)
OVER = Made(forget=-12.0, rouge=0.02, repetition=0.8, apart=1.0)
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "as the gold": ({}, "passed", 0),
    "as the gold, in groups": ({"groups": True}, "passed", 0),
    "still known": ({"made": SHORT}, "failed", 5),
    "pushed too far": ({"made": OVER}, "failed", 5),
    "damaged": ({"made": Made(kept=0.6)}, "failed", 5),
    "a few rows still known": ({"made": Made(odd_rows=14)}, "failed", 5),
    "few rows": ({"rows": 14, "never_seen": 20}, "not shown", 7),
    "no attacks": ({"attacks": False}, "not shown", 7),
    "no gold": ({"gold": False}, "not shown", 7),
    "no gold, no never-seen rows": ({"gold": False, "never_seen": 0}, "not shown", 7),
    "thresholds not fixed": ({"fixed": False}, "not shown", 7),
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make(tmp_path_factory.mktemp("verdict") / "run")
    excise.verify(run.root)
    return run


def _copy(run: RunFolder, place: Path) -> RunFolder:
    shutil.copytree(run.root, place)
    return RunFolder(place)


@pytest.mark.parametrize("name", CASES)
def test_every_outcome_from_folder_to_exit_code(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, outcome, code = CASES[name]
    run = make(tmp_path / "run", **settings)
    assert cli.main(["verify", str(run.root), "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    written = artifacts.read_verdict(run)
    assert written == printed
    assert written["outcome"] == outcome
    assert bool(written["next"]) == (outcome != "passed"), "after failed and not shown, what to try next"
    assert len(written["not_tested"]) > 5
    assert run.report.is_file()
    assert cli.main(["verify", str(run.root)]) == code, "its own verdict.json is no change of the run"
    text = capsys.readouterr().out
    assert written["headline"].split(":")[0] in text
    assert "Not tested" in text
    for said in (text, json.dumps(written)):
        assert not FORBIDDEN.search(said)


def test_words_that_promise_too_much_are_nowhere() -> None:
    for path in SOURCE.rglob("*.py"):
        assert not FORBIDDEN.search(path.read_text("utf-8")), path.name
    assert FORBIDDEN.search("was erased")
    assert FORBIDDEN.search("GDPR compliant")


def test_each_test_carries_what_a_page_needs(passed: RunFolder) -> None:
    written = artifacts.read_verdict(passed)
    assert written is not None
    assert [t["key"] for t in written["tests"]] == [q.key for q in verdict.QUESTIONS["causal_lm"]]
    for test in written["tests"]:
        assert test["title"]
        assert test["question"]
        assert test["meaning"]
        assert test["outcome"] in ("passed", "failed", "not shown")
        if test["measured"]:
            assert test["measure"]
            assert test["against"]
            assert test["n"] >= 30
            assert test["low"] <= test["estimate"] <= test["high"]
            assert test["least"] is not None or test["most"] is not None
        else:
            assert test["outcome"] == "not shown"
            assert test["next"]


# --- failing by name ------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[Made, str, str]] = {
    "answers": (Made(forget=-1.5), "answers", "short"),
    "rows": (Made(odd_rows=30), "came_back", "short"),
    "written, short": (Made(rouge=0.4), "written", "short"),
    "written, over": (Made(rouge=0.02), "written", "over"),
    "truth, short": (Made(truth=-2.0), "truth", "short"),
    "truth, over": (Made(truth=2.0), "truth", "over"),
    "membership, short": (Made(forget=-4.0), "membership", "short"),
    "membership, over": (Made(forget=-6.0), "membership", "over"),
    "min-k, over": (Made(forget=-6.0), "membership_min_k", "over"),
    "inside": (Made(inside=0.95), "inside", "short"),
    "apart": (Made(apart=0.99), "apart", "over"),
    "below": (Made(forget=-7.0), "below_never_seen", "over"),
    "past": (Made(forget=-7.0), "past_gold", "over"),
    "repetition": (Made(repetition=0.6), "repetition", "over"),
    "fluency": (Made(fluent=0.5), "fluency", "over"),
    "savings": (Made(savings=0.48), "savings", "short"),
    "kept": (Made(kept=0.8), "kept", "harm"),
    "relearn": (Made(relearned=0.3), "relearn", "short"),
    "prompts": (Made(leak=0.3), "prompts", "short"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_fail_is_named(way: str, tmp_path: Path) -> None:
    made, key, direction = WAYS[way]
    found = excise.verify(make(tmp_path / "run", made).root)
    test = found.test(key)
    assert (test.outcome, test.direction) == ("failed", direction)
    assert found.outcome == "failed"
    assert (key in found.over) == (direction == "over")
    assert ("over-forgetting" in found.headline) == bool(found.over)
    assert test.next in found.next


def test_the_gold_itself_passes_and_is_judged_beside_itself(tmp_path: Path) -> None:
    found = excise.verify(make(tmp_path / "run", AS_GOLD).root)
    assert found.basis == "gold"
    assert not [t.key for t in found.tests if t.outcome == "failed"]


def test_a_test_beside_does_not_decide(tmp_path: Path) -> None:
    run = make(tmp_path / "run", Made(leak=0.3), limits={"beside": ["prompts"]})
    found = excise.verify(run.root)
    assert (found.outcome, found.test("prompts").outcome) == ("passed", "failed")
    assert any("not deciding" in line for line in found.cautions)


def test_a_required_test_that_was_not_made_is_no_pass(tmp_path: Path) -> None:
    found = excise.verify(make(tmp_path / "run", limits={"require": ["answers", "sample"]}).root)
    assert found.outcome == "not shown"
    assert any("--suite attack" in line for line in found.next)


def test_nothing_required_is_nothing_passed(tmp_path: Path) -> None:
    assert excise.verify(make(tmp_path / "run", limits={"require": []}).root).outcome == "not shown"


# --- few rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 5, 12, 20, 29])
def test_few_rows_never_pass_a_test_of_forgotten_rows(rows: int, tmp_path: Path) -> None:
    found = excise.verify(make(tmp_path / "run", rows=rows).root)
    assert found.outcome == "not shown"
    for test in found.tests:
        assert test.outcome != "passed" or test.group == "kept", test.key


def test_ten_rows_may_fail_and_nine_may_not(tmp_path: Path) -> None:
    for rows, outcome in ((10, "failed"), (9, "not shown")):
        found = excise.verify(make(tmp_path / str(rows), SHORT, rows=rows).root)
        assert found.test("answers").outcome == outcome


def test_no_row_back_is_shown_from_59_rows_on(tmp_path: Path) -> None:
    for rows, outcome in ((58, "not shown"), (59, "passed")):
        test = excise.verify(make(tmp_path / str(rows), rows=rows).root).test("came_back")
        assert (test.estimate, test.outcome) == (0.0, outcome)


def test_an_undecided_test_says_how_many_rows_would_do_or_what_it_points_to() -> None:
    def told(value: float) -> str:
        found = Estimate(value, value - 0.2, value + 0.2, 40, 40)
        asked = dataclasses.replace(
            verdict.QUESTIONS["causal_lm"][0], rule=lambda _: Answer(found, -0.1, 0.1, "a number", "gold")
        )
        test = put(asked, Evidence("unlearned", {}, Results(), recipe.Verify()))
        assert (test.outcome, test.direction) == ("not shown", "")
        return test.meaning

    assert "40 rows; about 160 would do" in told(0.0)
    assert "about 640" in told(0.05)
    assert "still likelier" in told(0.15)
    assert "avoided" in told(-0.15)


# --- without a gold ---------------------------------------------------------------------------------------------------


def _with_control(run: RunFolder) -> None:
    """Never-seen rows in the savings, as the attack measures them where there is no gold."""
    rng = np.random.default_rng(0)
    both = {side: np.clip(rng.normal(0.22, 0.05, (1, 120)), 0, 1) for side in ("forget", "never_seen")}
    made = Outcome("savings", "probability", "steps", ("24",), both, {side: np.arange(120) for side in both})
    save_outcome(made, run.root / "attacks" / "unlearned" / "savings.safetensors")
    _recorded(run)


def _recorded(run: RunFolder) -> None:
    manifest = json.loads(run.manifest.read_text())
    artifacts.write_manifest(run, manifest | {"files": artifacts.hash_files(run)})


def test_savings_are_where_training_ends(tmp_path: Path) -> None:
    """However likely the rows were before: that is asked elsewhere."""
    run = make(tmp_path / "run", gold=False)
    rows = {"forget": np.array([[0.9] * 120, [0.2] * 120]), "never_seen": np.array([[0.0] * 120, [0.2] * 120])}
    made = Outcome("savings", "probability", "steps", ("0", "24"), rows, {side: np.arange(120) for side in rows})
    save_outcome(made, run.root / "attacks" / "unlearned" / "savings.safetensors")
    _recorded(run)
    found = excise.verify(run.root).test("savings")
    assert (found.outcome, found.estimate) == ("passed", 0.0)


def test_without_a_gold_never_seen_rows_are_the_control(tmp_path: Path) -> None:
    run = make(tmp_path / "run", gold=False)
    _with_control(run)
    found = excise.verify(run.root)
    assert (found.outcome, found.basis) == ("passed", "never-seen rows")
    assert {found.test(k).against for k in ("answers", "membership", "repetition", "fluency", "savings")} == {
        "never-seen rows"
    }
    assert found.test("past_gold").measured is False
    assert any("no gold" in line for line in found.not_tested)


@pytest.mark.parametrize(
    "way", ["answers", "membership, over", "below", "repetition", "fluency", "apart", "relearn", "prompts"]
)
def test_without_a_gold_failures_are_found_too(way: str, tmp_path: Path) -> None:
    made, key, direction = WAYS[way]
    run = make(tmp_path / "run", dataclasses.replace(made, forget=min(made.forget, -1.5)), gold=False)
    test = excise.verify(run.root).test(key)
    assert (test.outcome, test.direction) == ("failed", direction)


def test_with_neither_nothing_is_compared(tmp_path: Path) -> None:
    found = excise.verify(make(tmp_path / "run", gold=False, never_seen=0).root)
    assert found.basis == "nothing"
    assert not any(t.measured for t in found.tests if t.group == "forgotten")


# --- tampering --------------------------------------------------------------------------------------------------------


def _other_scores(run: RunFolder) -> None:
    from excise.metrics.table import save

    save(table("forget", AS_GOLD, 120, seed=9, groups=False), run.table("unlearned", "forget"))


def _other_thresholds(run: RunFolder) -> None:
    run.recipe.write_text(run.recipe.read_text().replace("answers: 0.05", "answers: 0.5"))


def _both(run: RunFolder) -> None:
    """The recipe edited and its hash in the manifest brought up to date, but not that of the thresholds."""
    _other_thresholds(run)
    _recorded(run)


def _no_thresholds(run: RunFolder) -> None:
    values = recipe.read_yaml(str(run.recipe))
    values.pop("verify")
    run.recipe.write_text(json.dumps(values))
    _recorded(run)


def _other_numbers(run: RunFolder) -> None:
    run.results.write_text(run.results.read_text().replace("0.58", "0.51", 1))


def _flipped(run: RunFolder) -> None:
    path = run.root / "attacks" / "unlearned" / "relearn.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _removed(run: RunFolder) -> None:
    run.table("unlearned", "never_seen").unlink()


def _added(run: RunFolder) -> None:
    place = run.root / "attacks" / "unlearned" / "sample.safetensors"
    save_outcome(outcomes(AS_GOLD, 120, seed=1)["prompts"], place)


TAMPERED = {
    "scores": _other_scores, "thresholds": _other_thresholds, "thresholds and their record": _both,
    "no thresholds": _no_thresholds, "numbers": _other_numbers, "a bit of an attack": _flipped,
    "a table less": _removed, "an attack more": _added,
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_a_changed_folder_is_refused(
    how: str, passed: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(passed, tmp_path / "run")
    run.verdict.unlink()
    TAMPERED[how](run)
    before = files.sha256(run.report)
    assert cli.main(["verify", str(run.root)]) == IntegrityFailed.exit_code == 6
    told = capsys.readouterr()
    assert len(told.err.strip().splitlines()) == 1
    assert not told.out
    assert not run.verdict.exists(), "nothing is written"
    assert files.sha256(run.report) == before


def test_deleted_weights_are_not_missed_and_changed_ones_are(passed: RunFolder, tmp_path: Path) -> None:
    run = _copy(passed, tmp_path / "run")
    run.model.mkdir()
    (run.model / "model.safetensors").write_bytes(b"weights")
    _recorded(run)
    assert excise.verify(run.root).outcome == "passed"
    (run.model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(IntegrityFailed, match=r"model/model\.safetensors"):
        excise.verify(run.root)
    shutil.rmtree(run.model)
    assert excise.verify(run.root).outcome == "passed"


def test_what_cannot_be_judged_is_refused(passed: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="not finished"):
        excise.verify(make(tmp_path / "running", status="running").root)
    with pytest.raises(InputRefused, match="no model 'nobody'"):
        excise.verify(passed.root, model="nobody")
    with pytest.raises(InputRefused, match=r"no manifest\.json"):
        excise.verify(tmp_path / "nothing")
    empty = make(tmp_path / "empty")
    artifacts.write_results(empty, Results())
    _recorded(empty)
    with pytest.raises(InputRefused, match="nothing was measured"):
        excise.verify(empty.root)


# --- thresholds -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "level": ({"level": 0.5}, r"verify\.level is 0\.5"),
    "rows": ({"rows": 0}, r"verify\.rows is 0: give 1 or more"),
    "margin": ({"membership": 0.7}, "up to 0.5"),
    "nan": ({"answers": float("nan")}, r"verify\.answers"),
    "name": ({"require": ["answer"]}, "did you mean 'answers'"),
    "twice": ({"beside": ["answers"]}, "also required"),
}


@pytest.mark.parametrize("name", WRONG)
def test_thresholds_out_of_range_are_refused_by_name(name: str) -> None:
    values, said = WRONG[name]
    with pytest.raises(UsageError, match=said):
        verdict.check(recipe.build({"verify": values}).verify, verdict.NAMES)


def test_the_hash_is_that_of_the_values_not_of_their_notation() -> None:
    plain = recipe.Verify()
    assert verdict.digest(plain) == verdict.digest(recipe.plain(plain))
    import yaml

    assert verdict.digest(plain) == verdict.digest(yaml.safe_load(recipe.dump(recipe.Recipe()))["verify"])
    for field in dataclasses.fields(plain):
        value = getattr(plain, field.name)
        changed = value[:-1] if isinstance(value, tuple) else value + 1
        assert verdict.digest(dataclasses.replace(plain, **{field.name: changed})) != verdict.digest(plain), field.name


def test_a_threshold_that_a_later_version_adds_leaves_old_runs_as_they_are() -> None:
    older = {key: value for key, value in recipe.plain(recipe.Verify()).items() if key != "choices"}
    assert verdict.digest(older) != verdict.digest(recipe.Verify())
    assert recipe.build({"verify": older}).verify == recipe.Verify()  # and the folder's own hash stays that of `older`


def test_a_run_is_not_resumed_with_other_thresholds(tmp_path: Path) -> None:
    run = make(tmp_path / "run", status="running")
    values = recipe.read_yaml(str(run.recipe)) | {"out": str(run.root)}
    run.recipe.write_text(json.dumps(values))
    settings = recipe.build(values)
    assert folders.standing(settings, resume=True)[1] is False
    values["verify"]["kept"] = 0.5
    run.recipe.write_text(json.dumps(values))  # even where the recipe was changed with it
    with pytest.raises(IntegrityFailed, match="other thresholds"):
        folders.standing(recipe.build(values), resume=True)


# --- other folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_fake_run, write_fake_tagged_run])
def test_a_run_without_saved_rows_is_not_shown(write: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    found = excise.verify(run.root)
    assert found.outcome in ("not shown", "failed")
    assert not [t for t in found.tests if t.outcome == "passed" and t.key in ("answers", "membership", "kept")]


def _tagged(f1: float, logp: float, rows: int = 200, seed: int = 0) -> Table:
    """Sentences of three words with one entity, found with probability ``f1``."""
    rng = np.random.default_rng(seed)
    gold = np.tile([1, 2, 0], rows)
    found = np.repeat(rng.random(rows) < f1, 3)
    given = np.where(found, gold, 0)
    scores = np.minimum(logp + 0.3 * rng.normal(size=3 * rows), -1e-3)
    return Table("forget", rows, {
        "row": np.arange(rows), "kind": np.zeros(rows, int), "eos": np.zeros(rows, bool),
        "offsets": np.arange(0, 3 * rows + 1, 3), "logp": scores, "hit": given == gold, "gold_class": gold,
        "predicted_class": given,
    }, ("O", "B-person", "I-person"))  # fmt: skip


@pytest.mark.parametrize(
    ("f1", "logp", "outcome", "direction"),
    [(0.53, -1.0, "passed", ""), (0.93, -0.05, "failed", "short"), (0.2, -4.0, "failed", "over")],
)
def test_a_tagger_is_judged_by_its_gap_to_the_gold(f1: float, logp: float, outcome: str, direction: str) -> None:
    tables = {
        "unlearned": {"forget": _tagged(f1, logp, 1500, 1), "never_seen": _tagged(0.53, -1.0, 1500, 2)},
        GOLD: {"forget": _tagged(0.53, -1.0, 1500, 3), "never_seen": _tagged(0.53, -1.0, 1500, 4)},
        "original": {"untouched": _tagged(0.93, -0.05, 200, 5)},
    }
    tables["unlearned"]["untouched"] = _tagged(0.92, -0.05, 200, 6)
    found = verdict.judge(
        Evidence("unlearned", tables, Results({"unlearned": {}}, task="token_classification"), recipe.Verify())
    )
    assert [t.key for t in found.tests] == [q.key for q in verdict.QUESTIONS["token_classification"]]
    for key in ("answers", "membership"):
        assert (found.test(key).outcome, found.test(key).direction) == (outcome, direction), key
    assert found.test("kept").outcome == "passed"
    assert (found.test("below_never_seen").outcome == "failed") == (direction == "over")


@pytest.mark.parametrize(
    ("wrong", "outcome", "direction"), [(0.03, "passed", ""), (0.0, "failed", "short"), (0.08, "failed", "over")]
)
def test_words_outside_of_entities_are_held_against_the_gold(wrong: float, outcome: str, direction: str) -> None:
    """The gold takes 3 in 100 of them for an entity; the entities themselves are found alike."""

    def erring(share: float, seed: int) -> Table:
        table = _tagged(0.53, -1.0, 4000, 1)
        outside = table.columns["gold_class"] == 0
        taken = outside & (np.random.default_rng(seed).random(len(outside)) < share)
        given = np.where(taken, 1, table.columns["predicted_class"])
        right = given == table.columns["gold_class"]
        return dataclasses.replace(table, columns={**table.columns, "predicted_class": given, "hit": right})

    tables = {"unlearned": {"forget": erring(wrong, 1)}, GOLD: {"forget": erring(0.03, 2)}}
    results = Results({"unlearned": {}}, task="token_classification")
    found = verdict.judge(Evidence("unlearned", tables, results, recipe.Verify())).test("outside")
    assert (found.outcome, found.direction) == (outcome, direction)
    share = [t["forget"].columns["hit"][t["forget"].columns["gold_class"] == 0].mean() for t in tables.values()]
    assert found.estimate == pytest.approx(share[0] - share[1])
    texts = {m: {"forget": dataclasses.replace(t["forget"], classes=("a", "b", "c"))} for m, t in tables.items()}
    results = Results({"unlearned": {}}, task="sequence_classification")
    asked = verdict.judge(Evidence("unlearned", texts, results, recipe.Verify())).tests
    assert "outside" not in [test.key for test in asked], "not of texts"


def test_multiple_choice_is_compared_task_by_task() -> None:
    def judged(accuracy: float) -> Verdict:
        models = {
            "unlearned": {"mcq_accuracy/bio": Number(accuracy, n=2000), "mcq_accuracy/mmlu": Number(0.5, n=4000)},
            GOLD: {"mcq_accuracy/bio": Number(0.3, n=2000), "mcq_accuracy/mmlu": Number(0.5, n=4000)},
        }
        return verdict.judge(Evidence("unlearned", {}, Results(models), recipe.Verify()))

    assert judged(0.3).test("choices").outcome == "passed"
    worse, better = judged(0.15).test("choices"), judged(0.6).test("choices")
    assert (worse.outcome, worse.direction, worse.detail) == ("failed", "harm", "bio")
    assert (better.outcome, better.direction) == ("failed", "short")


def test_an_attack_is_as_good_as_its_worst_point_and_rows_are_matched_by_number() -> None:
    rng = np.random.default_rng(0)

    def attack(values: np.ndarray, rows: np.ndarray) -> Outcome:
        return Outcome("quantise", "probability", "bits", ("8", "4", "3"), {"forget": values}, {"forget": rows})

    rows = np.arange(100)
    hard = rng.random((3, 100)) * 0.5
    order = rng.permutation(100)
    gold = attack(hard[:, order], rows[order])
    for extra, outcome in ((0.0, "passed"), (0.3, "failed")):
        own = attack(hard + np.array([[0.0], [extra], [0.0]]), rows)
        side = {"forget": table("forget", AS_GOLD, 100, seed=0, groups=False)}
        evidence = Evidence(
            "unlearned", {"unlearned": side, GOLD: side}, Results(), recipe.Verify(),
            {"unlearned": {"quantise": own}, GOLD: {"quantise": gold}},
        )  # fmt: skip
        test = verdict.judge(evidence).test("quantise")
        assert test.outcome == outcome
        assert test.estimate == pytest.approx(extra, abs=1e-12)
    assert test.detail == "worst of 3: bits 4"
