"""The run folder: what is written is what is read, torn and foreign files are met in the open, names are safe."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from excise import artifacts
from excise.artifacts import Number, Results, RunFolder
from excise.errors import InputRefused, UsageError
from fake_run import HOSTILE, write_fake_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_results_come_back_as_they_were_written(run: RunFolder) -> None:
    utility = Number(0.5, extra={"parts": 4, "complete": False})
    before = Results({"gold": {"privleak": Number(0.0, -9.5, 9.5, 60), "model_utility": utility}}, {"train": 1.5})
    artifacts.write_results(run, before)
    assert artifacts.read_results(run) == before
    content = json.loads(run.results.read_text("utf-8"))
    assert content["format"] == 1
    assert content["models"]["gold"]["privleak"] == {"value": 0.0, "low": -9.5, "high": 9.5, "n": 60}


def test_what_is_not_finite_reads_not_shown_and_never_zero(run: RunFolder) -> None:
    numbers = {"a": Number(math.nan, -math.inf, math.inf, 3), "b": Number(float(np.float32(0.25)))}
    artifacts.write_results(run, Results({"unlearned": numbers}))
    assert "NaN" not in run.results.read_text("utf-8")
    back = artifacts.read_results(run)
    assert back.number("unlearned", "a") == Number(None, None, None, 3)
    assert not back.number("unlearned", "a").shown
    assert not back.number("nobody", "a").shown


def test_numbers_of_numpy_are_plain_numbers_in_the_file(run: RunFolder) -> None:
    artifacts.write_pictures(
        run, {"map": {"x": np.eye(2), "y": np.float32(0.5), "z": np.int64(3), "bad": np.float64("nan")}}
    )
    assert artifacts.read_pictures(run)["map"] == {"x": [[1.0, 0.0], [0.0, 1.0]], "y": 0.5, "z": 3, "bad": None}


def test_main_unlearned_model_stands_first() -> None:
    results = Results({"original": {}, "simnpo_clreg": {}, "gold": {}, "unlearned": {}})
    assert results.unlearned() == ["unlearned", "simnpo_clreg"]


def test_absent_files_are_empty_not_errors(run: RunFolder) -> None:
    assert artifacts.read_results(run) == Results()
    assert artifacts.read_pictures(run) == {}
    assert artifacts.read_log(run) == []
    assert artifacts.read_recipe(run) == ""
    assert artifacts.read_examples(run) is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", b"{", r"results\.json:1: not JSON"),
        ("results.json", b"[]", "not a JSON object"),
        ("results.json", b"\xff{}", "not UTF-8"),
        ("results.json", b'{"models": {}}', "'format' is missing, this version reads 1"),
        ("results.json", b'{"format": 2, "models": {}}', "'format' is 2"),
        ("results.json", b'{"format": 1, "models": {"gold": []}}', r"'models\.gold' is no object"),
        ("results.json", b'{"format": 1, "models": {"m": {"a": {"value": "x"}}}}', r"models\.m\.a\.value' is no num"),
        ("results.json", b'{"format": 1, "models": {"gold": {"a": {"value": true}}}}', "is no number"),
    ],
)  # fmt: skip
def test_broken_results_are_refused_in_one_line(run: RunFolder, name: str, content: bytes, says: str) -> None:
    (run.root / name).write_bytes(content)
    with pytest.raises(InputRefused, match=says) as caught:
        artifacts.read_results(run)
    assert "\n" not in str(caught.value)


def test_a_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"no manifest\.json"):
        artifacts.open_run(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\0b", "x" * 101, "a b", HOSTILE])
def test_names_that_could_leave_the_folder_are_refused(run: RunFolder, name: str) -> None:
    with pytest.raises(UsageError):
        run.table(name, "forget")
    with pytest.raises(UsageError):
        run.table("gold", name)


def test_log_survives_a_kill_in_the_middle_of_a_line(run: RunFolder) -> None:
    artifacts.append_log(run, {"step": 1, "loss": 2.0})
    with open(run.log, "ab") as handle:
        handle.write(b'{"step": 2, "lo')  # the process died here
    assert [row["step"] for row in artifacts.read_log(run)] == [1]
    artifacts.append_log(run, {"step": 2, "loss": math.nan})  # resumed
    artifacts.append_log(run, {"step": 3, "loss": 1.0})
    assert [(row["step"], row["loss"]) for row in artifacts.read_log(run)] == [(1, 2.0), (2, None), (3, 1.0)]


def test_log_of_a_resumed_run_counts_each_step_once(run: RunFolder) -> None:
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5)]:
        artifacts.append_log(run, {"step": step, "loss": loss})
    assert [row["loss"] for row in artifacts.read_log(run)] == [5.0, 4.5, 3.5]
    artifacts.cut_log(run, after_step=2)
    assert [row["step"] for row in artifacts.read_log(run)] == [1, 2]


def test_log_with_a_foreign_line_names_file_and_line(run: RunFolder) -> None:
    run.log.write_bytes(b'{"step": 1}\nhello secret\n{"step": 2}\n')
    with pytest.raises(InputRefused, match=r"log\.jsonl:2:") as caught:
        artifacts.read_log(run)
    assert "secret" not in str(caught.value)


def test_hashes_cover_the_run_and_show_a_change(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    (run.checkpoints / "step-1").mkdir(parents=True)
    (run.checkpoints / "step-1" / "state").write_bytes(b"x")
    (run.root / ".lock").write_bytes(b"x")
    (run.root / "out").symlink_to(tmp_path)
    table = run.table("gold", "forget")
    table.parent.mkdir(parents=True)
    table.write_bytes(b"x")
    found = artifacts.hash_files(run)
    assert sorted(found) == [
        "log.jsonl",
        "pictures.json",
        "recipe.yaml",
        "results.json",
        "tables/gold/forget.safetensors",
    ]
    assert artifacts.changed_files(run, found) == []
    table.write_bytes(b"y")
    run.recipe.unlink()
    assert artifacts.changed_files(run, found) == ["recipe.yaml", "tables/gold/forget.safetensors"]
    assert artifacts.changed_files(run, found, ["results.json", "never recorded"]) == []


def test_manifest_round_trip_and_environment(run: RunFolder) -> None:
    artifacts.write_manifest(run, {"status": "done", "seed": 3, "versions": artifacts.environment()})
    manifest = artifacts.read_manifest(run)
    assert (manifest["format"], manifest["status"], manifest["seed"]) == (1, "done", 3)
    assert {"python", "system", "cpus", "torch"} <= set(manifest["versions"])
