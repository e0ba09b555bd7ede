"""What cannot be used is refused before anything is written: one line, its exit code, file and line, never content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small_world
from excise import artifacts, cli, files
from excise.forward import token_logp
from excise.objectives import Term
from small_world import SmallWorld

CANARY = "Zanzobel-4711"
GOOD = [{"question": f"What does person {i} like?", "answer": f"apples and {i} pears"} for i in range(6)]


def _edited(
    small: SmallWorld, folder: Path, side: str, change: Callable[[list[dict[str, Any]]], Any]
) -> dict[str, Any]:
    """The small world's recipe values with changed rows of one side."""
    content = small_world.rows(small.sides[side])
    change(content)
    values = small.values(folder / "out")
    values["data"][side] = str(small_world.write(folder / f"{side}.jsonl", content))
    return values


def _refused(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str = "run", code: int = 3
) -> str:
    """Run a command that must be refused; its one line."""
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    before = sorted(p for p in tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main([command, str(file)]) == code
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("excise: ")]
    assert len(complaints) == 1
    assert captured.err.splitlines() == complaints, "the refusal is the only line"
    assert captured.out == ""
    assert CANARY.lower() not in captured.err.lower(), "content is never echoed"
    assert "Traceback" not in captured.err
    assert sorted(p for p in tmp_path.rglob("*")) == before, "nothing is written"
    return complaints[0]


# --- data ---------------------------------------------------------------------------------------------------------

BYTES = {
    "empty": (b"", ("holds no rows",)),
    "blank lines": (b"\n\n  \n", ("holds no rows",)),
    "broken JSON": (f'{{"question": "a", "answer": "b"}}\n{{"question": "{CANARY}'.encode(), (":2", "JSON")),
    "half a file": (f'{{"question": "{CANARY}", "answer": "b"'.encode(), (":1", "JSON")),
    "bad UTF-8": (f'{{"question": "{CANARY}", "answer": "\xff"}}\n'.encode("latin-1"), (":1", "UTF-8")),
    "missing field": (f'{{"question": "{CANARY}"}}\n'.encode(), (":1", "'answer'", "missing")),
    "null field": (f'{{"question": "{CANARY}", "answer": null}}\n'.encode(), (":1", "'answer'", "null")),
    "empty field": (f'{{"question": "{CANARY}", "answer": " "}}\n'.encode(), (":1", "'answer'", "empty")),
    "number": (f'{{"question": "{CANARY}", "answer": 7}}\n'.encode(), (":1", "'answer'", "number")),
    "two formats": (f'{{"question": "q", "answer": "a"}}\n{{"text": "{CANARY}"}}\n'.encode(), (":2", "format")),
}


@pytest.mark.parametrize("case", BYTES)
def test_broken_files(case: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = BYTES[case]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    for side in ("forget", "never_seen"):
        values = small.values(tmp_path / "out")
        values["data"][side] = str(bad)
        line = _refused(values, tmp_path, capsys)
        assert all(part in line for part in (str(bad), *said)), line


def test_every_command_that_reads_rows_refuses_them(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(BYTES["null field"][0])
    values = small.values(tmp_path / "out")
    values["data"]["retain"] = str(bad)
    for command in ("plan", "finetune"):
        assert f"{bad}:1: field 'answer' is null" in _refused(values, tmp_path, capsys, command)
    made = small_world.training(small.tokenizer, {"retain": str(small.sides["retain"])}, tmp_path / "out")
    made["data"]["train"] = [str(bad)]
    assert f"{bad}:1: field 'answer' is null" in _refused(made, tmp_path, capsys, "finetune")


def test_no_such_file(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = small.values(tmp_path / "out", data__forget=str(tmp_path / "none.jsonl"))
    assert f"{tmp_path / 'none.jsonl'}: no such file" in _refused(values, tmp_path, capsys)


def test_rows_that_are_forgotten_and_kept_at_once(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = small_world.rows(small.sides["forget"])[4]
    same = {**row, "question": row["question"].upper().replace(" ", "  "), "answer": row["answer"] + " "}
    for side in ("retain", "untouched"):
        line = _refused(_edited(small, tmp_path, side, lambda rows: rows.insert(2, same)), tmp_path, capsys)
        assert f"(forget 5 = {side} 3)" in line
        assert row["answer"] not in line


def test_rows_that_nearly_stand_in_retain_are_a_warning(small: SmallWorld, tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    from excise import recipe
    from excise.commands.starting import sides

    values = _edited(small, tmp_path, "retain", lambda rows: rows.append({"question": long, "answer": "Ann"}))
    forget = [*small_world.rows(small.sides["forget"]), {"question": long, "answer": "Bob"}]
    values["data"]["forget"] = str(small_world.write(tmp_path / "forget.jsonl", forget))
    [warning] = sides.read(recipe.build(values).data, seed=0).warnings
    assert "forget 21 = retain 41" in warning
    assert "three" not in warning


@pytest.mark.parametrize("side", ["forget", "retain", "untouched", "never_seen"])
def test_prompts_that_fill_the_context(
    side: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": f"{CANARY} " * 60, "answer": "yes"}
    values = _edited(small, tmp_path, side, lambda rows: rows.insert(1, row))
    line = _refused(values, tmp_path, capsys)
    assert f"{tmp_path / side}.jsonl:2: the prompt has" in line
    assert "max_length 96" in line, "the model's own context, which is shorter than the recipe's default"


@pytest.mark.parametrize("field", ["answer", "paraphrased_answer", "false_answers"])
def test_answers_that_do_not_fit(
    field: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[6][field] = [f"{CANARY} " * 60] if field == "false_answers" else f"{CANARY} " * 60

    line = _refused(_edited(small, tmp_path, "untouched", change), tmp_path, capsys)
    assert "untouched.jsonl:7: " in line
    assert "tokens, more than max_length" in line


def test_finetune_names_the_file_of_a_row_that_does_not_fit(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = small_world.write(tmp_path / "more.jsonl", [*GOOD, {"question": f"{CANARY} " * 60, "answer": "yes"}])
    values = small_world.training(small.tokenizer, {"retain": str(small.sides["retain"])}, tmp_path / "out")
    values["data"]["train"] = [str(bad)]
    assert f"{bad}:7: the prompt has" in _refused(values, tmp_path, capsys, "finetune")


def test_alternatives_that_are_not_there(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = small.values(tmp_path / "out", objective__forget={"dpo": {}})
    assert f"{small.sides['forget']}:1: field 'alternatives' is missing" in _refused(values, tmp_path, capsys)


# --- models -------------------------------------------------------------------------------------------------------


def _model(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=1024, **sizes)
    maker = {"no head": AutoModel, "classifier": AutoModelForSequenceClassification}[kind]
    maker.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["no head", "classifier", "silent"])
def test_models_without_the_needed_head(
    kind: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = _model(tmp_path / "model", "no head" if kind == "silent" else kind)
    if kind == "silent":  # a config that does not say what it belongs to: transformers would make up a head
        config = json.loads((place / "config.json").read_text())
        del config["architectures"]
        (place / "config.json").write_text(json.dumps(config))
    shutil.copytree(small.tokenizer, place, dirs_exist_ok=True)
    line = _refused(small.values(tmp_path / "out", model__name=str(place)), tmp_path, capsys)
    assert str(place) in line
    assert ("lm_head" if kind == "silent" else "no language-model head") in line


def test_a_gold_that_is_none_is_refused_before_training(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gold in (tmp_path / "nowhere", _model(tmp_path / "headless", "no head")):
        line = _refused(small.values(tmp_path / "out", evaluate__gold=str(gold)), tmp_path, capsys)
        assert str(gold) in line


def test_no_such_model(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(small.values(tmp_path / "out", model__name=str(tmp_path / "nowhere")), tmp_path, capsys)
    assert "no tokenizer can be loaded" in line or "no model can be loaded" in line


def test_weights_that_are_pickles_are_refused(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "pickled"
    shutil.copytree(small.original, place, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, place / "pytorch_model.bin")
    line = _refused(small.values(tmp_path / "out", model__name=str(place)), tmp_path, capsys)
    assert "safetensors" in line


# --- usage --------------------------------------------------------------------------------------------------------

REWORDED: dict[str, Any] = {"objective__regularise": {"clreg": {"views": "paraphrase"}}}
USAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no forget rows": ({"data__forget": ""}, "data.forget is missing"),
    "no retain rows": ({"data__retain": ""}, "data.retain is missing"),
    "no model": ({"model__name": ""}, "model.name is missing"),
    "unknown term": ({"objective__forget": {"nppo": {}}}, "did you mean 'npo'"),
    "unknown setting": ({"objective__forget": {"npo": {"betta": 1}}}, "did you mean 'beta'"),
    "bad setting": ({"objective__forget": {"npo": {"beta": 0}}}, "beta"),
    "no term": ({"objective__forget": {}, "objective__retain": {}, "objective__regularise": {}}, "no term"),
    "no such layer": ({"objective__regularise": {"clreg": {"layers": [7]}}}, "layers 0 to 2"),
    "LoRA field": ({"model__lora": {"rank": 4}}, "model.lora"),
    "LoRA module": ({"model__lora": {"target_modules": ["nothing"]}}, "model.lora"),
    "train_only": ({"model__train_only": "nothing"}, "model.train_only"),
    "pattern": ({"model__train_only": "("}, "model.train_only"),
    "template": ({"data__template": "Q: A:"}, "{prompt}"),
    "paraphraser": ({**REWORDED, "data__paraphrases": "nowhere:f"}, "nowhere:f"),
    "batch": ({"schedule__forget_batch": 0}, "schedule.forget_batch is 0: give 1 or more"),
    "accumulate": ({"schedule__accumulate": 0}, "schedule.accumulate"),
    "steps": ({"schedule__steps": 0}, "schedule.steps"),
    "epochs": ({"schedule__epochs": -1}, "schedule.epochs"),
    "rate": ({"optimiser__lr": float("nan")}, "optimiser.lr"),
    "warmup": ({"optimiser__warmup": 2}, "optimiser.warmup is 2.0: give 0 to 1"),
    "logging": ({"log_every": 0}, "log_every"),
    "seed": ({"seed": -1}, "seed"),
    "relearning": ({"evaluate__relearn_steps": [3, 1]}, "evaluate.relearn_steps"),
    "weight": ({"objective__retain": {"nll": {"weight": "much"}}}, "weight: 'much' is no number"),
    "untouched share": ({"data__untouched": 1.5}, "untouched"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, said = USAGE[case]
    assert said in _refused(small.values(tmp_path / "out", **changes), tmp_path, capsys, code=2)


def test_a_place_that_is_taken(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in _refused(small.values(tmp_path / "file"), tmp_path, capsys, code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for command in ("run", "finetune"):
        assert "not empty" in _refused(small.values(tmp_path / "full"), tmp_path, capsys, command, code=2)
    assert cli.main(["demo", "--out", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full" / "x").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["report", "{}"], 3),
        (["report", "{}/nowhere"], 3),
        (["score", "{}"], 3),
        (["score", "{}/nowhere.json"], 3),
        (["evaluate", "{}/nowhere"], 2),
        (["evaluate", "{}", "--suite", "nothing"], 2),
    ],
    ids=str,
)
def test_folders_that_are_no_runs(
    arguments: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([a.format(tmp_path) for a in arguments]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- training that goes wrong, and folders that are damaged -------------------------------------------------------


def poisoned(after: int = 4) -> Term:
    """Ascent whose value is not a number from the micro-batch ``after`` (from 1) on."""
    calls = 0

    def rows(logp: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logp * (float("nan") if calls >= after else 1.0)

    return Term("poisoned", rows, {"logp": token_logp("forget")}, over="forget", per="token")


@pytest.fixture(scope="module")
def stopped(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that a term stopped at step 6 of 8, with checkpoints at 2 and 4: its recipe and its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    values = {"objective__forget": {"test_refusals:poisoned": {"after": 6}}, "schedule__steps": 8}
    file = small.file(folder / "r.yaml", folder / "run", checkpoint_every=2, **values)
    assert cli.main(["run", str(file)]) == 4
    return file, folder / "run"


def _copied(stopped: tuple[Path, Path], tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of the stopped run at the place that its recipe names, and the command that resumes it."""
    _, folder = stopped
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    text = (folder / "recipe.yaml").read_text().replace(str(folder), str(copy))
    (copy / "recipe.yaml").write_text(text)
    (tmp_path / "r.yaml").write_text(text)
    return ["run", str(tmp_path / "r.yaml"), "--resume"], copy


def _flip(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_loss_that_is_not_finite_stops_the_run(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder = _copied(stopped, tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "stopped"
    assert not (folder / "model").exists()
    assert not (folder / "results.json").exists()
    files.verify(folder / "checkpoints" / "checkpoint-4")
    assert [row["step"] for row in artifacts.read_log(artifacts.RunFolder(folder))] == [1, 2, 3, 4, 5]
    # The fresh term counts anew, so the resumed run comes to the end.
    assert cli.main(command) == 0
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    assert [row["step"] for row in artifacts.read_log(artifacts.RunFolder(folder))] == list(range(1, 9))


def test_the_term_is_named(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"objective__forget": {"test_refusals:poisoned": {"after": 2}}}
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", checkpoint_every=1, **values)
    assert cli.main(["run", str(file)]) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("excise: step 2: the term 'poisoned' is not finite")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_learning_rate_beyond_reason_does_not_end_in_weights(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimiser = {"lr": 1e30, "decay": "constant", "warmup": 0, "clip": 0}
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", objective__forget={"ga": {}}, optimiser=optimiser)
    assert cli.main(["run", str(file)]) == 4
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def _damage_weights(folder: Path) -> None:
    _flip(folder / "checkpoints" / "checkpoint-4" / "model.safetensors")


def _damage_optimiser(folder: Path) -> None:
    (folder / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()


def _change_recipe(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))


@pytest.mark.parametrize("damage", [_damage_weights, _damage_optimiser, _change_recipe])
def test_a_damaged_folder_is_not_resumed(
    damage: Callable[[Path], None], stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder = _copied(stopped, tmp_path)
    damage(folder)
    assert cli.main(command) == 6
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("excise: ")
    assert str(folder) in last
    assert not (folder / "model").exists()


def test_a_run_is_not_resumed_on_other_rows(
    stopped: tuple[Path, Path], small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder = _copied(stopped, tmp_path)
    rows = small_world.rows(small.sides["retain"])
    other = small_world.write(tmp_path / "other.jsonl", rows[:-1])
    for place in (folder / "recipe.yaml", tmp_path / "r.yaml"):
        place.write_text(place.read_text().replace(str(small.sides["retain"]), str(other)))
    assert cli.main(command) == 6
    assert "other retain rows" in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_run_that_changed_is_not_called_finished(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"generate": 0, "relearn_steps": [], "latent": False}
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", evaluate=options, schedule__steps=1)
    assert cli.main(["run", str(file)]) == 0
    for name in ("model/model.safetensors", "results.json"):
        _flip(tmp_path / "run" / name)
        capsys.readouterr()
        assert cli.main(["run", str(file), "--resume"]) == 6
        assert name in capsys.readouterr().err
        _flip(tmp_path / "run" / name)
    assert cli.main(["run", str(file), "--resume"]) == 0
