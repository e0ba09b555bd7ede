"""`excise export`: adapters and whole models that others can load, what their cards say, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import excise
import small_world
import tiny
from excise import cli, files, recipe
from excise.commands import card
from excise.commands.progress import Progress
from excise.errors import IntegrityFailed, UsageError
from excise.initialise import apply, delivery
from small_world import SmallWorld

LORA = {"r": 12, "lora_alpha": 24}
IDS = torch.randint(5, 500, (8, 12), generator=torch.Generator().manual_seed(0))


def _run(small: SmallWorld, out: Path, **changes: Any) -> Path:
    fast = {"evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__map": "none", "evaluate__latent": False}
    settings = small.recipe(out, **{**fast, "schedule__steps": 4, **changes})
    excise.run(settings, progress=Progress(quiet=True))
    return out


@pytest.fixture(scope="module")
def runs(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with a start, one with a plain adapter, and one that trained all weights."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "started": _run(small, folder / "started", model__lora=dict(LORA), initialise={"rila": {}}, optimiser__lr=0.02),
        "plain": _run(small, folder / "plain", model__lora={"r": 4, "use_rslora": True}),
        "whole": _run(small, folder / "whole"),
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def base(small: SmallWorld) -> Any:
    return AutoModelForCausalLM.from_pretrained(small.original)


def delivered(run: Path) -> Tensor:
    """What the run's own model says: its adapter on a fresh base, as PEFT merges it."""
    from excise import models

    return logits(models.load_result(run / "model", recipe.load(str(run / "recipe.yaml")).model))


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["started", "plain"])
def test_stock_peft_loads_the_adapter_on_the_untouched_base(
    kind: str, runs: dict[str, Path], small: SmallWorld, tmp_path: Path
) -> None:
    out = excise.export(runs[kind], to="adapter", out=tmp_path / "out")
    assert out == tmp_path / "out"
    own = logits(base(small))
    model = PeftModel.from_pretrained(base(small), str(out))
    assert float((logits(model) - delivered(runs[kind])).abs().max()) <= 1e-4
    assert float((logits(model) - own).abs().max()) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), own), "rolled back"
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(small.original))
    record = json.loads((out / "export.json").read_text())
    rank = {"started": 24, "plain": 4}[kind]
    assert record["rank"] == rank
    assert json.loads((out / "adapter_config.json").read_text())["r"] == rank
    assert record["base"]["sha256"] == json.loads((runs[kind] / "manifest.json").read_text())["model"]["sha256"]
    listed = files.verify(out)
    assert {"README.md", "export.json", "adapter_model.safetensors", "adapter_config.json"} <= listed.keys()
    assert record["files"]["adapter_model.safetensors"] == listed["adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["started", "plain"])
def test_a_smaller_rank_and_its_measured_error(
    kind: str, runs: dict[str, Path], small: SmallWorld, tmp_path: Path
) -> None:
    out = excise.export(runs[kind], to="adapter", out=tmp_path / "out", rank=2)
    found = json.loads((out / "export.json").read_text())["recompressed"]
    updates = []
    for folder in (runs[kind] / "model", out):
        model = PeftModel.from_pretrained(base(small), str(folder))
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        updates.append({n: m.get_delta_weight("default") for n, m in layers.items()})
    missing = total = 0.0
    for name, whole in updates[0].items():
        assert int(torch.linalg.matrix_rank(updates[1][name], rtol=1e-4)) <= 2
        lost = float((whole - updates[1][name]).norm())
        best = float(torch.linalg.svdvals(whole)[2:].norm())
        assert lost == pytest.approx(best, rel=1e-3, abs=1e-6), "no rank-2 matrix is nearer"
        assert found["layers"][name.removeprefix("base_model.model.")] == pytest.approx(
            lost / float(whole.norm()), rel=1e-3, abs=1e-5
        )
        missing, total = missing + lost**2, total + float(whole.norm()) ** 2
    assert found["error"] == pytest.approx((missing / total) ** 0.5, rel=1e-3)
    assert 0.01 < found["error"] < 1
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    text = (out / "README.md").read_text()
    assert f"{found['error']:.4f} over the model" in text
    assert "measure this one before it is used" in text


def test_the_whole_rank_loses_nothing(runs: dict[str, Path], small: SmallWorld, tmp_path: Path) -> None:
    out = excise.export(runs["started"], to="adapter", out=tmp_path / "out", rank=24)
    assert json.loads((out / "export.json").read_text())["recompressed"]["error"] < 1e-6
    model = PeftModel.from_pretrained(base(small), str(out))
    assert float((logits(model) - delivered(runs["started"])).abs().max()) <= 1e-4


def test_scales_follow_patterns_and_rslora() -> None:
    net = tiny.adapted(
        tiny.model("llama", depth=1), use_rslora=True, rank_pattern={"^model.layers.0.self_attn.q_proj": 9},
        alpha_pattern={"k_proj": 12},
    )  # fmt: skip
    from peft import get_peft_model_state_dict

    state, config = get_peft_model_state_dict(net), net.peft_config["default"].to_dict()
    layers = apply.layers(net)
    assert delivery.scales(state, config) == pytest.approx({n: m.scaling["default"] for n, m in layers.items()})
    assert delivery.highest_rank(state) == 9
    with pytest.raises(UsageError, match="use_dora has no smaller rank"):
        delivery.scales(state, {**config, "use_dora": True})


# --- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["started", "plain", "whole"])
def test_a_merged_model_stands_by_itself(kind: str, runs: dict[str, Path], small: SmallWorld, tmp_path: Path) -> None:
    out = excise.export(runs[kind], to="merged", out=tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert float((logits(model) - delivered(runs[kind])).abs().max()) <= 1e-4
    assert float((logits(model) - logits(base(small))).abs().max()) > 1e-3
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(small.original))
    assert not (out / "adapter_config.json").exists()
    assert not list(out.glob("*.bin"))
    assert "cannot be taken off these weights" in (out / "README.md").read_text()
    files.verify(out)


def test_another_base_is_refused(runs: dict[str, Path], small: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["started"], run)
    other = tmp_path / "other"
    shutil.copytree(small.original, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    text = (run / "recipe.yaml").read_text().replace(str(small.original), str(other))
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(IntegrityFailed, match="not the base that the run was made on"):
        excise.export(run, to="merged", out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_card_of_an_adapter(runs: dict[str, Path], tmp_path: Path) -> None:
    out = excise.export(runs["started"], to="adapter", out=tmp_path / "out")
    text = (out / "README.md").read_text()
    record = json.loads((out / "export.json").read_text())
    for part in (
        "--max-lora-rank 32", "rank is **24**", "hides rather than removes", "the base still knows", "roll back",
        "delete_adapter", "`simnpo`", "2604.17396", "forget_probability", record["base"]["sha256"],
        record["files"]["adapter_model.safetensors"],
    ):  # fmt: skip
        assert part in text, part
    assert text.startswith("---\n")


def test_the_serving_flag_follows_the_rank() -> None:
    record = {"to": "adapter", "base": {"name": "m"}, "methods": [], "run": {}}
    assert "--max-lora-rank" not in card.card({**record, "rank": 16}, {})
    assert "--max-lora-rank 32" in card.card({**record, "rank": 17}, {})
    assert "--max-lora-rank 320" in card.card({**record, "rank": 300}, {})
    assert "more than vLLM allows" in card.card({**record, "rank": 2048}, {})


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_no_row_and_no_path_of_this_machine_is_handed_out(
    to: str, runs: dict[str, Path], small: SmallWorld, tmp_path: Path
) -> None:
    out = excise.export(runs["started"], to=to, out=tmp_path / "out")
    text = "\n".join((out / name).read_text() for name in ("README.md", "export.json"))
    for row in small_world.rows(small.sides["forget"]):
        for value in (row["question"], row["answer"]):
            assert value not in text
    assert str(small.folder) not in text
    assert str(small.folder) not in (out / "README.md").read_text()


# --- refusals -----------------------------------------------------------------------------------------------------


def _refused(arguments: list[str | Path], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(["export", *map(str, arguments)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_command_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(runs["started"]), "--to", "adapter", "--out", str(out), "--rank", "8"]) == 0
    assert capsys.readouterr().out == f"adapter: {out}\n"
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert "the folder is not empty" in _refused([runs["started"], "--to", "merged", "--out", out], capsys)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_what_is_refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    whole, started = runs["whole"], runs["started"]
    cases: list[tuple[list[str | Path], str]] = [
        ([whole, "--to", "adapter", "--out", out], "all weights were trained, there is no adapter: use --to merged"),
        ([started, "--to", "merged", "--out", out, "--rank", "2"], "--rank is for an adapter"),
        ([started, "--to", "adapter", "--out", out, "--rank", "0"], "--rank 0: give 1 or more"),
        ([started, "--to", "adapter", "--out", out, "--rank", "25"], "the adapter has rank 24"),
        ([started, "--to", "onnx", "--out", out], "invalid choice: 'onnx'"),
        ([started, "--to", "adapter", "--out", started / "export"], "lies in the run folder"),
    ]
    for arguments, said in cases:
        assert said in _refused(arguments, capsys)
    assert "no manifest.json here" in _refused([tmp_path, "--to", "adapter", "--out", out], capsys, 3)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_done_or_was_changed(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(runs["started"], run)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert "the run is not done" in _refused([run, "--to", "adapter", "--out", out], capsys)
    (run / "manifest.json").write_text(json.dumps(manifest))
    weights = run / "model" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    assert "is not what was written" in _refused([run, "--to", "adapter", "--out", out], capsys, 6)
    assert not out.exists()


def test_a_failure_half_way_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("excise.commands.exporting.card", broken)
    with pytest.raises(OSError, match="No space left"):
        excise.export(runs["started"], to="adapter", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
