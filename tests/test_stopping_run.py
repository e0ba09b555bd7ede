"""The stopping rule in a whole run: rows set aside, what is kept, what is said when nothing is, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import small_world
from excise import artifacts, cli, recipe
from excise.commands import training
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import preparing, sides
from excise.errors import NotShown, UsageError
from small_world import SmallWorld

#: Ascent that crosses the middle of the band within a few steps, whatever the rounding.
WIDE = {
    "objective__forget": {"ga": {}}, "objective__regularise": {}, "optimiser__lr": 5e-3, "schedule__steps": 12,
    "stop__rule": "two_sided", "stop__band": [0.0, 1.0], "stop__quality": 0.05, "stop__every": 1, "stop__patience": 3,
}  # fmt: skip
QUICK = {"evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none"}


def settings(small: SmallWorld, out: Path, **changes: Any) -> recipe.Recipe:
    return small.recipe(out, **{**QUICK, **WIDE, **changes})


def groups(records: list) -> set:
    return {r.group for r in records}


def test_the_rules_rows_are_nobody_elses(small: SmallWorld, tmp_path: Path) -> None:
    given = sides.of(settings(small, tmp_path / "run"))
    for side, other in (("never_seen", "calibration"), ("retain", "watch")):
        assert given.records[side]
        assert given.records[other]
        assert not groups(given.records[side]) & groups(given.records[other])
    assert {"calibration", "watch"} <= set(given.sources)
    plain = sides.of(settings(small, tmp_path / "run", stop__rule="none"))
    assert {"calibration", "watch"}.isdisjoint(plain.records)
    assert len(plain.records["never_seen"]) == sum(len(given.records[s]) for s in ("never_seen", "calibration"))


def test_a_source_of_its_own_may_not_stand_elsewhere(small: SmallWorld, tmp_path: Path) -> None:
    from excise.errors import InputRefused

    for side in ("never_seen", "untouched", "retain", "forget"):
        with pytest.raises(InputRefused):
            sides.of(settings(small, tmp_path / "run", stop__calibration=str(small.sides[side])))


def test_without_never_seen_rows_there_is_no_rule(small: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never saw"):
        sides.of(settings(small, tmp_path / "run", data__never_seen=None))


def test_a_run_keeps_the_best_weights_and_says_so(small: SmallWorld, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(settings(small, out), progress=Progress(quiet=True))
    record = artifacts.read_manifest(artifacts.RunFolder(out))
    seen = record["stopping"]
    kept = next(c for c in seen["checks"] if c["step"] == seen["kept"])
    allowed = [c for c in seen["checks"] if c["quality"] >= 0.05]
    assert kept in allowed
    assert abs(kept["auc"] - 0.5) == min(abs(c["auc"] - 0.5) for c in allowed)
    assert [p.name for p in (out / "stopping").iterdir()] == ["checks.json"]
    # The saved weights are those of the step that was kept: the same run ends there if it may not look any further.
    weights, plain = load_file(out / "model" / "model.safetensors"), stopped_at(small, tmp_path / "plain", seen["kept"])
    assert seen["kept"] < seen["checks"][-1]["step"]
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def stopped_at(small: SmallWorld, out: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights after ``step`` steps of the same run: its rule stops at the first look, which is then."""
    own = settings(small, out, stop__every=step, stop__near=0.0, stop__patience=0, stop__band=[0.0, 1.0])
    run(own, progress=Progress(quiet=True))
    return load_file(out / "model" / "model.safetensors")


def test_nothing_admissible_is_no_success(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    own = settings(small, out, stop__quality=50.0)
    with pytest.raises(NotShown, match="never-seen"):
        run(own, progress=Progress(quiet=True))
    assert (out / "report.html").is_file()
    assert artifacts.read_manifest(artifacts.RunFolder(out))["stopping"]["kept"] is None
    assert "found no weights to keep" in (out / "report.html").read_text().lower()
    with pytest.raises(NotShown):  # asked again, it says the same
        run(own, resume=True, progress=Progress(quiet=True))
    file = small.file(tmp_path / "r.yaml", out, **{**QUICK, **WIDE, "stop__quality": 50.0})
    assert cli.main(["run", str(file), "--resume"]) == 7
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_resumed_run_decides_as_one_that_was_left_alone(small: SmallWorld, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(settings(small, whole, checkpoint_every=2), progress=Progress(quiet=True))
    own = settings(small, broken, checkpoint_every=2)
    assert len(json.loads((whole / "stopping" / "checks.json").read_text())) > 4
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)
    from excise.commands import folders

    prepared.model.register_forward_hook(_Stop(8))
    with folders.opened(own, resume=False) as folder, pytest.raises(KeyboardInterrupt):
        training.train_into(prepared, folder, Progress(quiet=True), stage="unlearn", resume=False)
    assert not (broken / "model").exists()
    run(own, resume=True, progress=Progress(quiet=True))
    checks = [json.loads((f / "stopping" / "checks.json").read_text()) for f in (whole, broken)]
    assert checks[0] == checks[1]
    a, b = (load_file(f / "model" / "model.safetensors") for f in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


class _Stop:
    """Interrupts at the n-th forward pass in training mode."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, module: Any, *_: Any) -> None:
        self.left -= module.training
        if self.left < 0:
            raise KeyboardInterrupt


def test_calibration_rows_do_not_reach_the_evaluation(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(small, tmp_path / "run")
    from excise.commands.measuring import evaluation

    measured = evaluation.limited(sides.of(own).records, own.evaluate)
    assert {"calibration", "watch"}.isdisjoint(measured)
    assert small_world.rows(small.sides["never_seen"])
