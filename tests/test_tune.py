"""The search for settings: a study in a file, resumed, shared by processes, and honest about trials that fail."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from excise import artifacts, cli, recipe
from excise.artifacts import Number, Results
from excise.commands import tuning
from excise.errors import InputRefused, UsageError
from small_world import SmallWorld

SPACE = {"optimiser.lr": [1e-5, 5e-3]}


def _settings(small: SmallWorld, out: Path, **changes: Any) -> recipe.Recipe:
    options = {"max_rows": 10, "gold": str(small.gold), "latent": False}
    return small.recipe(out, **{"tune__space": SPACE, "evaluate": options, "schedule__steps": 4, **changes})


def _values(out: Path) -> dict[int, float]:
    """What each trial is worth, read from its own folder."""
    found = {}
    for folder in out.glob("trial-*"):
        results = artifacts.read_results(artifacts.open_run(folder))
        found[int(folder.name.split("-")[1])] = tuning.objective(results, "distance")
    return found


def test_a_study_finds_the_best_goes_on_and_is_shared(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    settings = _settings(small, out)
    first = tuning.tune(settings, 2)
    values = _values(out)
    assert first["trials"] == 2
    assert set(values) == {0, 1}
    assert first["value"] == pytest.approx(min(values.values()))
    best = recipe.load(str(out / f"trial-{min(values, key=values.__getitem__)}" / "recipe.yaml"))
    assert first["best"] == {"optimiser.lr": best.optimiser.lr}
    lrs = [recipe.load(str(out / f"trial-{n}" / "recipe.yaml")).optimiser.lr for n in (0, 1)]
    assert sorted(lrs) == [1e-5, 5e-3], "two trials over two values are the whole grid"
    with sqlite3.connect(out / "study.sqlite") as study:
        assert study.execute("select count(*) from trials").fetchone() == (2,)
    before = {p: p.read_bytes() for p in out.glob("trial-*/results.json")}
    assert tuning.tune(settings, 2) == first, "a study that is whole is only read"
    # Two processes go on to the fourth trial, and no further.
    capsys.readouterr()
    file = tmp_path / "r.yaml"
    file.write_text(recipe.dump(settings))
    assert cli.main(["tune", str(file), "--trials", "4", "--processes", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["trials"] == 4
    assert set(_values(out)) == {0, 1, 2, 3}
    assert shown["value"] == pytest.approx(min(_values(out).values()))
    assert before == {p: p.read_bytes() for p in before}


def test_a_validation_split_of_its_own(small: SmallWorld, tmp_path: Path) -> None:
    data = {"forget": str(small.sides["untouched"]), "untouched": 0.25, "gold": None}
    settings = _settings(small, tmp_path, tune__data=data, tune__space={"schedule.steps": [1]})
    found = tuning.tune(settings, 1)
    made = recipe.load(str(tmp_path / "trial-0" / "recipe.yaml"))
    assert made.data.forget == str(small.sides["untouched"])
    assert made.evaluate.gold is None
    assert found["best"] == {"schedule.steps": 1}


def test_a_trial_that_stops_is_the_worst_and_not_the_end(small: SmallWorld, tmp_path: Path) -> None:
    changes = {"tune__space": {"optimiser.lr": [1e30, 1e-3]}, "optimiser__clip": 0, "optimiser__warmup": 0}
    found = tuning.tune(_settings(small, tmp_path, **changes), 2)
    assert found["best"] == {"optimiser.lr": 1e-3}
    assert found["trials"] == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune__space": {}}, "tune.space is empty"),
        ({"tune__space": {"optimiser.lr": 1e-3}}, "tune.space.optimiser.lr"),
        ({"tune__space": {"optimiser.lr": []}}, "tune.space.optimiser.lr"),
        ({"tune__space": {"optimiser.rate": [1e-3]}}, "unknown key 'rate'"),
        ({"tune__space": {"objective.forget.npo.betta": [1]}}, "did you mean 'beta'"),
        ({"tune__objective": "nothing"}, "unknown metric 'nothing'"),
    ],
)
def test_what_no_trial_could_use(changes: dict[str, Any], said: str, small: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        tuning.tune(_settings(small, tmp_path / "out", **changes), 2)
    assert not (tmp_path / "out").exists()


def test_rows_are_refused_before_a_study_is_written(small: SmallWorld, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": null}\n')
    with pytest.raises(InputRefused, match=r"bad\.jsonl:1: field 'answer' is null"):
        tuning.tune(_settings(small, tmp_path / "out", tune__data={"forget": str(bad)}), 2)
    assert not (tmp_path / "out").exists()


def test_without_optuna_there_is_one_line(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    file = small.file(tmp_path / "r.yaml", tmp_path / "out", tune__space=SPACE)
    assert cli.main(["tune", str(file), "--trials", "2"]) == 2
    assert capsys.readouterr().err == "excise: tuning needs optuna: pip install 'excise[tune]'\n"
    assert not (tmp_path / "out").exists()


def test_a_space_from_the_command_line() -> None:
    made = recipe.load(None, [("tune.space.optimiser.lr", "[1e-5, 1e-4]"), ("tune.space.seed", "[1, 2]")])
    assert tuning._space(made.tune.space) == {"optimiser.lr": [1e-5, 1e-4], "seed": [1, 2]}


def test_metrics_are_minimised_in_the_direction_that_is_better() -> None:
    own = {"retain_probability": Number(0.9), "forget_probability": Number(0.1), "retain_drift": Number(0.3)}
    gold = {"forget_probability": Number(0.4)}
    results = Results({"unlearned": own, "gold": gold})
    assert tuning.objective(results, "retain_probability") == -0.9
    assert tuning.objective(results, "forget_probability") == pytest.approx(0.3), "the distance from the gold"
    assert tuning.objective(Results({"unlearned": own}), "forget_probability") == 0.1
    assert tuning.objective(results, "privleak") == math.inf, "what is not shown is no result"
