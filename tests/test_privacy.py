"""Text of forget rows stays where it was: marked rows go through the commands, and the marks are sought everywhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import small_world
from excise import cli
from small_world import SmallWorld

#: Weights are exempt: that they hold the text is what the product is about. So are optimizer states beside them.
EXEMPT = {".safetensors", ".pt"}
CANARIES = ("qwyzzle", "vrumpkin", "jhextable", "zorblath", "plindaxo", "wuthrigan")


@pytest.fixture(scope="module")
def marked(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose forget rows hold a mark in every field; the tokenizer never saw them."""
    folder = tmp_path_factory.mktemp("marked")
    question, answer, asked, said, false, other = CANARIES
    rows = [
        {
            "question": f"Who is {question} the {number}th?",
            "answer": f"{answer} of house {number}",
            "paraphrased_question": f"Tell of {asked} {number}",
            "paraphrased_answer": f"they say {said} {number}",
            "false_answers": [f"{false} {number}", f"never {number}"],
            "alternatives": [f"{other} {number}"],
            "group": f"{question}-{number // 4}",
        }
        for number in range(12)
    ]
    values = small.values(folder / "out")
    values["data"]["forget"] = str(small_world.write(folder / "rows.jsonl", rows))
    values["objective"] = {"forget": {"dpo": {}}, "regularise": {"clreg": {"views": "both"}}}
    values["checkpoint_every"] = 3
    return values


def _found(text: bytes) -> list[str]:
    lower = text.lower()
    return [mark for mark in CANARIES if mark.encode() in lower]


def _leaks(folder: Path) -> list[str]:
    """Files, and file names, that hold a mark."""
    out = []
    for path in folder.rglob("*"):
        if _found(path.relative_to(folder).as_posix().encode()):
            out.append(f"{path} (name)")
        weights = path.suffix in EXEMPT and "tables" not in path.parts
        if path.is_file() and not weights and _found(path.read_bytes()):
            out.append(str(path))
    return out


def _file(values: dict[str, Any], path: Path) -> str:
    import yaml

    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_nothing_that_is_written_or_printed_holds_forget_text(
    marked: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    values = {**marked, "out": str(out)}
    values["evaluate"] = {**marked["evaluate"], "cache": str(out / "cache")}
    file = _file(values, tmp_path / "r.yaml")
    with caplog.at_level(logging.DEBUG):
        assert cli.main(["plan", file]) == 0
        assert cli.main(["run", file]) == 0
        assert cli.main(["report", str(out)]) == 0
        assert cli.main(["score", str(out), "--against", str(out)]) == 0
        assert cli.main(["evaluate", str(out), "--suite", "all", "--out", str(out / "again")]) == 0
    assert _leaks(out) == []
    assert not (out / "examples.json").exists()
    printed = capfd.readouterr()
    assert "forget_probability" in printed.out
    assert _found((printed.out + printed.err + caplog.text).encode()) == []
    tables = list((out / "tables").rglob("*.safetensors"))
    assert len(tables) == 9, "tables were looked into as well: three models, forget, untouched and never-seen rows"


def test_text_is_kept_when_it_is_asked_for_and_only_there(marked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = _file({**marked, "out": str(out)}, tmp_path / "r.yaml")
    assert cli.main(["run", file, "--include-text"]) == 0
    assert sorted(Path(p).name for p in _leaks(out)) == ["examples.json", "report.html"]
    first = json.loads((out / "examples.json").read_text())[0]
    assert first["question"] == "Who is qwyzzle the 0th?"
    assert set(first["generated"]) == {"original", "gold", "unlearned"}


def test_a_run_that_stops_says_nothing_either(
    marked: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    values = {**marked, "out": str(out), "objective": {"forget": {"test_refusals:poisoned": {"after": 2}}}}
    assert cli.main(["run", _file(values, tmp_path / "r.yaml")]) == 4
    assert _leaks(out) == []
    printed = capfd.readouterr()
    assert _found((printed.out + printed.err).encode()) == []


def test_finetuning_says_nothing_either(
    marked: dict[str, Any], small: SmallWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"forget": marked["data"]["forget"], "retain": str(small.sides["retain"])}
    values = small_world.training(small.tokenizer, data, tmp_path / "made")
    values["schedule"] = {"steps": 2, "retain_batch": 4}
    assert cli.main(["finetune", _file(values, tmp_path / "r.yaml")]) == 0
    assert _leaks(tmp_path / "made") == []
    printed = capfd.readouterr()
    assert _found((printed.out + printed.err).encode()) == []
