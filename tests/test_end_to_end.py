"""The main job end to end, by the commands: finetune, plan, run, evaluate, score, report, and the demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import demo_gates
import excise
import small_world
from excise import artifacts, cli, files, recipe
from excise.commands.progress import Progress
from excise.errors import NotShown
from excise.metrics.catalogue import METRICS, find
from excise.metrics.table import load as load_table
from small_world import SmallWorld

#: Names that the issue promises; more may be there, these must.
STABLE = (
    "forget_probability",
    "retain_probability",
    "forget_quality_log10",
    "model_utility",
    "entanglement",
    "privleak",
    "latent_membership_auc",
    "relearned_probability",
    "memorisation_savings",
)


def _excise(*arguments: str | Path, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "excise", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def done(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run by a process of its own: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    file = small.file(folder / "r.yaml", folder / "first", checkpoint_every=3)
    finished = _excise("run", file, "--seed", "3")
    assert finished.returncode == 0, finished.stderr
    return folder / "first", finished


# --- making models ------------------------------------------------------------------------------------------------


def test_finetune_from_scratch_with_a_tokenizer_of_its_own(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    values = {
        "model": {"config": small_world.CONFIG, "tokenizer_size": 300},
        "data": {"retain": str(small.sides["retain"]), "train": [str(small.sides["untouched"])]},
        "schedule": {"steps": 2, "retain_batch": 4},
    }
    file = tmp_path / "scratch.yaml"
    file.write_text(yaml.safe_dump(values))
    out = tmp_path / "made"
    assert cli.main(["finetune", str(file), "--out", str(out)]) == 0
    assert str(out / "model") in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert {side: source["rows"] for side, source in manifest["data"].items()} == {"retain": 40, "train-1": 20}
    assert not artifacts.changed_files(artifacts.RunFolder(out), manifest["files"])
    before = _state(out)
    assert cli.main(["finetune", str(file), "--out", str(out), "--resume"]) == 0
    assert _state(out) == before, "a finished run is left alone"


def test_the_original_knows_what_the_gold_does_not(done: tuple[Path, Any]) -> None:
    models = _results(done[0])["models"]
    assert models["original"]["forget_probability"]["value"] > 0.3
    assert models["gold"]["forget_probability"]["value"] < 0.01


# --- planning -----------------------------------------------------------------------------------------------------


def test_a_plan_needs_no_weights(small: SmallWorld, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(small.original, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = small.file(tmp_path / "r.yaml", tmp_path / "out")
    clreg = ["--objective.regularise.clreg.layers", "2"]
    made = _excise("plan", file, "--model", bare, "--json", "--objective.forget", "npo", *clreg)
    assert made.returncode == 0, made.stderr
    plan = json.loads(made.stdout)
    assert not (tmp_path / "out").exists()
    sides = {p["side"]: p["layers"] for p in plan["passes"]}
    assert all(p["model"] == "policy" for p in plan["passes"])
    assert sides["forget"] == sides["retain"] == [1, 2]  # the states of the last two layers, of which 2 feeds the head
    assert len(sides) == 3  # and a second view of the forget rows, from the second block from the end on
    assert any("dropout" in side for side in sides)
    assert plan["reference"] == ["token_logp(forget) of the reference"]
    assert {"token_logp(forget) of the reference", "seq_logp(forget)", "token_logp(retain)"} <= {
        p.replace("seq_logp(forget) of", "token_logp(forget) of") for p in plan["products"]
    }
    assert plan["negatives"] == 8
    assert plan["steps"] == 6
    memory = plan["memory"]
    assert set(memory) == {"weights", "gradients_and_optimizer", "activations", "reference"}
    assert all(isinstance(value, int) and value > 0 for value in memory.values())
    weights = sum(p.stat().st_size for p in small.original.glob("*.safetensors"))
    assert memory["weights"] == pytest.approx(weights, rel=0.1)
    assert 0 < plan["seconds"] < 600


def test_a_plan_is_readable(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small.file(tmp_path / "r.yaml")
    assert cli.main(["plan", str(file)]) == 0
    out = capsys.readouterr().out
    assert "forward pass over" in out
    assert "weights" in out
    assert "MB" in out


# --- one run ------------------------------------------------------------------------------------------------------


def test_results_have_the_promised_shape(done: tuple[Path, Any]) -> None:
    results = _results(done[0])
    assert set(results) == {"format", "task", "models", "seconds", "shares"}
    assert results["format"] == 1
    assert list(results["models"]) == ["original", "gold", "unlearned"]
    for model, numbers in results["models"].items():
        assert set(STABLE) <= set(numbers), model
        assert all(find(name) for name in numbers), "every name is in the catalogue"
        for name, number in numbers.items():
            assert {"value", "low", "high", "n"} <= set(number), name
            assert isinstance(number["value"], float | int), name
            assert isinstance(number["n"], int), name
            if number["low"] is not None:
                assert number["low"] <= number["value"] + 1e-9, name
                assert number["value"] <= number["high"] + 1e-9, name
    assert all(isinstance(s, float) and s >= 0 for s in results["seconds"].values())
    assert {"unlearn", "measure unlearned"} <= set(results["seconds"])


def test_the_gold_stands_beside_itself(done: tuple[Path, Any]) -> None:
    gold = _results(done[0])["models"]["gold"]
    assert gold["privleak"]["value"] == 0
    assert gold["forget_quality_log10"]["value"] == 0


def test_the_run_forgets(done: tuple[Path, Any]) -> None:
    models = _results(done[0])["models"]

    def left(name: str) -> float:
        return models["unlearned"][name]["value"] / models["original"][name]["value"]

    assert left("forget_probability") < 0.7
    assert left("retain_probability") > 1.2 * left("forget_probability")


def test_every_file_is_hashed_and_unchanged(done: tuple[Path, Any], small: SmallWorld) -> None:
    folder, _ = done
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["status"] == "done"
    assert manifest["seed"] == 3
    assert manifest["command"].startswith("excise run ")
    assert {"python", "torch", "transformers", "excise"} <= set(manifest["versions"])
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    left_out = {name for name in there if name.startswith("checkpoints/")} | {"manifest.json", "report.html"}
    assert set(manifest["files"]) == there - left_out
    for name, digest in manifest["files"].items():
        assert files.sha256(folder / name) == digest, name
    assert {"model/model.safetensors", "model/config.json", "results.json", "recipe.yaml"} <= set(manifest["files"])
    assert manifest["data"]["forget"]["rows"] == 20
    assert {t["name"] for t in manifest["terms"]} == {"simnpo", "nll", "clreg"}
    assert all("arXiv" in t["citation"] for t in manifest["terms"])
    files.verify(folder / "model")


def test_the_recipe_reloads_to_itself(done: tuple[Path, Any], small: SmallWorld) -> None:
    folder, _ = done
    again = recipe.load(str(folder / "recipe.yaml"))
    assert again == small.recipe(folder, checkpoint_every=3, seed=3)
    assert recipe.build(yaml.safe_load(recipe.dump(again))) == again


def test_every_step_is_logged_term_by_term(done: tuple[Path, Any]) -> None:
    log = artifacts.read_log(artifacts.RunFolder(done[0]))
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["progress"] == 1
    for row in log:
        assert set(row["terms"]) == {"simnpo", "nll", "clreg"}
        assert row["loss"] == pytest.approx(sum(row["weights"][k] * v for k, v in row["terms"].items()))
        assert row["lr"] >= 0
        assert row["grad_norm"] > 0
        assert {"clreg/positive_cosine", "clreg/negative_cosine"} <= set(row["monitor"])


def test_pictures_are_whole(done: tuple[Path, Any]) -> None:
    pictures = artifacts.read_pictures(artifacts.RunFolder(done[0]))
    assert pictures["relearning"]["steps"] == [0, 1, 2]
    assert {name: len(curve) for name, curve in pictures["relearning"]["models"].items()} == dict.fromkeys(
        ("original", "gold", "unlearned"), 3
    )
    layers = pictures["entanglement_by_layer"]
    assert all(len(values) == len(layers["layers"]) == 2 for values in layers["models"].values())
    assert set(pictures["map"]["models"]["unlearned"]) >= {"forget", "never_seen"}
    assert pictures["not_tested"]


def test_the_terminal_shows_the_summary_and_the_report(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, finished = done
    assert "forget_probability" in finished.stdout
    assert str(folder / "report.html") in finished.stdout.replace("\n", "")
    assert "Traceback" not in finished.stderr
    assert "unlearn" in finished.stderr  # a line for each stage where there is no terminal
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "Content-Security-Policy" in page


# --- a finished run -----------------------------------------------------------------------------------------------


def _state(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(p): (p.stat().st_mtime_ns, files.sha256(p)) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_resuming_a_finished_run_changes_nothing(done: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = done
    before = _state(folder)
    assert cli.main(["run", str(folder / "recipe.yaml"), "--resume"]) == 0
    assert _state(folder) == before
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


def test_a_run_that_died_while_measuring_comes_to_the_same_end(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace(str(folder), str(copy)))
    manifest = json.loads((folder / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "status": "running", "files": {}}))
    for name in ("results.json", "pictures.json", "report.html"):
        (copy / name).unlink()
    assert cli.main(["run", str(copy / "recipe.yaml"), "--resume"]) == 0
    assert _results(copy)["models"] == _results(folder)["models"]
    assert (copy / "model" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    assert "unlearn" not in _results(copy)["seconds"], "weights that are whole are not trained again"


def test_a_folder_that_is_in_use_is_not_overwritten(done: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = done
    before = _state(folder)
    assert cli.main(["run", str(folder / "recipe.yaml")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert _state(folder) == before


def test_the_report_is_rebuilt_from_the_folder_alone(done: tuple[Path, Any], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(done[0], copy, ignore=shutil.ignore_patterns("model", "checkpoints"))
    (copy / "report.html").unlink()
    assert cli.main(["report", str(copy)]) == 0
    assert "Forget" in (copy / "report.html").read_text(encoding="utf-8")


def test_scores_come_from_saved_tables_alone(
    done: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "tables-only"
    shutil.copytree(done[0] / "tables", copy / "tables")
    expected = _results(done[0])["models"]["unlearned"]
    for log, against in ((copy, copy), (copy / "tables" / "unlearned", copy / "tables" / "gold")):
        assert cli.main(["score", str(log), "--against", str(against), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        of_tables = {name for name in expected if name in METRICS and METRICS[name].source == "tables"}
        assert set(found) == of_tables
        for name, number in found.items():
            assert number == expected[name], name
    assert cli.main(["score", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "forget_probability" in shown
    assert "privleak" not in shown  # it needs a gold, and none was named


def test_a_run_is_measured_again(done: tuple[Path, Any], small: SmallWorld, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = done
    command = ["evaluate", str(folder), "--suite", "memorisation", "--against", str(small.gold), "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1
    for model, numbers in _results(folder)["models"].items():
        again = found["models"][model]
        assert "entanglement" not in again
        assert "relearned_probability" not in again
        for name in ("forget_probability", "exact_memorization", "forget_quality_log10", "privleak"):
            assert again[name]["value"] == pytest.approx(numbers[name]["value"], rel=1e-4, abs=1e-6), (model, name)


def test_a_model_is_measured_with_a_recipe(
    done: tuple[Path, Any], small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = small.file(tmp_path / "r.yaml"), tmp_path / "measured"
    command = ["evaluate", str(done[0] / "model"), "--recipe", str(file), "--suite", "latent", "--out", str(out)]
    assert cli.main([*command, "--against", str(small.gold.parent)]) == 0  # a run folder stands for its model
    results = _results(out)
    assert results["models"]["unlearned"]["entanglement"]["value"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert not artifacts.changed_files(artifacts.RunFolder(out), manifest["files"])
    assert (out / "report.html").is_file()
    assert "latent_membership_auc" in capsys.readouterr().out
    assert cli.main(command) == 2, "the folder is taken"


# --- other ways to run --------------------------------------------------------------------------------------------


def test_a_run_without_recipe_gold_or_never_seen_rows(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain"
    command = ["run", "--model", small.original, "--forget", small.sides["forget"], "--retain", small.sides["retain"]]
    brief = ["--schedule.epochs", "1", "--evaluate.generate", "0", "--evaluate.relearn_steps", "[0, 1]"]
    assert cli.main([*map(str, command), "--out", str(out), *brief]) == 0
    captured = capsys.readouterr()
    shown = captured.out
    assert "no recipe was named: gold-like" in captured.err
    assert "no never-seen rows" in captured.err
    models = _results(out)["models"]
    assert set(models) == {"original", "unlearned"}
    absent = {"privleak", "forget_quality_log10", "latent_membership_auc", "mia_loss_auc", "latent_projection_auc"}
    for numbers in models.values():
        assert not absent & set(numbers)
        assert {"forget_probability", "retain_probability", "entanglement"} <= set(numbers)
    # A share of the retained people was set aside by itself, and that is what retain_probability reads.
    assert models["unlearned"]["retain_probability"]["n"] == 10
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") > 2}
    for name in ("privleak", "forget_quality_log10", "latent_membership_auc"):
        assert lines[name].count("not shown") == 2
    pictures = json.loads((out / "pictures.json").read_text())
    assert absent & set(METRICS) <= set(pictures["not_shown"]) | {"latent_membership_auc", "latent_projection_auc"}
    assert any("gold" in line for line in pictures["not_tested"])
    assert any("never-seen" in line for line in pictures["not_tested"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "not shown" in page


def test_two_identical_runs_are_identical(small: SmallWorld, tmp_path: Path) -> None:
    settings = small.recipe(schedule__steps=3, schedule__accumulate=2)
    for name in ("a", "b"):
        excise.run(settings, out=tmp_path / name, progress=Progress(quiet=True))
    first, second = (tmp_path / name for name in ("a", "b"))
    for weights in (first / "model").glob("*.safetensors"):
        assert files.sha256(weights) == files.sha256(second / "model" / weights.name)
    assert _results(first)["models"] == _results(second)["models"]
    assert (first / "log.jsonl").read_bytes() == (second / "log.jsonl").read_bytes()
    for table in sorted((first / "tables").rglob("*.safetensors")):
        one, other = load_table(table).columns, load_table(second / table.relative_to(first)).columns
        assert all(one[name].tobytes() == other[name].tobytes() for name in {*one, *other})


def test_measurements_that_are_kept_give_the_same_numbers(
    done: tuple[Path, Any], small: SmallWorld, tmp_path: Path
) -> None:
    cached = {"evaluate__cache": str(tmp_path / "cache"), "seed": 3}
    for name in ("first", "second"):
        excise.run(small.recipe(**cached), out=tmp_path / name, progress=Progress(quiet=True))
        assert _results(tmp_path / name)["models"] == _results(done[0])["models"]
    assert "measure original" in _results(tmp_path / "first")["seconds"]
    assert "measure original" not in _results(tmp_path / "second")["seconds"]


def test_another_seed_is_another_run(small: SmallWorld, tmp_path: Path) -> None:
    from excise.commands import folders, training
    from excise.commands.starting import preparing, sides

    digests = []
    for seed in (0, 1):
        settings = small.recipe(tmp_path / str(seed), schedule__steps=2, seed=seed)
        given = sides.read(settings.data, seed=seed)
        prepared = preparing.prepare_unlearning(settings, given, resume=False)
        with folders.opened(settings, resume=False) as run:
            training.train_into(prepared, run, Progress(quiet=True), stage="unlearn", resume=False)
            digests.append(files.sha256(run.model / "model.safetensors"))
    assert digests[0] != digests[1]


# --- the demo -----------------------------------------------------------------------------------------------------


def test_the_demo_runs(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    made = _excise("demo", "--quick", "--out", out, seconds=400)  # about 30 s on two cores that are free
    assert made.returncode == 0, made.stderr
    assert str(out / "report.html") in made.stdout.replace("\n", "")
    assert "Traceback" not in made.stderr
    demo_gates.check_shape(out)


@pytest.mark.slow
def test_the_demo_forgets_and_keeps(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    seconds, peak = demo_gates.measured([sys.executable, "-m", "excise", "demo", "--out", str(out)])
    demo_gates.check_shape(out)
    assert demo_gates.failures(out) == []
    assert peak < 2.5e9
    assert seconds < 180


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_of_taggers_keeps_something(seed: int, tmp_path: Path) -> None:
    """In two worlds its rule finds weights to keep, near the gold and with all that it should keep."""
    out = tmp_path / "demo"
    made = _excise("demo", "--task", "ner", "--seed", str(seed), "--out", out, seconds=400)
    assert made.returncode == 0, made.stderr
    results = artifacts.read_results(artifacts.RunFolder(out))
    original, gold, unlearned = ("original", "gold", "unlearned")
    f1 = {m: {s: results.number(m, f"{s}_f1").value for s in ("forget", "retain", "test")} for m in results.models}
    assert abs(f1[unlearned]["forget"] - f1[gold]["forget"]) < 0.2 < f1[original]["forget"] - f1[gold]["forget"]
    assert f1[unlearned]["retain"] >= 0.98 * f1[original]["retain"]
    assert f1[unlearned]["test"] > f1[gold]["test"] - 0.08


@pytest.mark.slow
def test_a_demo_that_kept_nothing_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report is there, and says so; the command says it too."""
    load, whole = recipe.load, recipe.load("demo-ner")
    strict = replace(whole, stop=replace(whole.stop, quality=2.0), schedule=replace(whole.schedule, epochs=1))
    monkeypatch.setattr(recipe, "load", lambda name, *given: strict if name == "demo-ner" else load(name, *given))
    with pytest.raises(NotShown, match="after no step did the forgotten rows"):
        excise.demo(tmp_path / "demo", task="ner", quick=True, progress=Progress(quiet=True))
    assert "no success" in (tmp_path / "demo" / "report.html").read_text()
