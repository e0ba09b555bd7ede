"""A real run and its verdict: thresholds recorded before the first step, and what was measured is what is judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import excise
from excise import artifacts, cli, verdict
from excise.commands import training
from excise.commands.progress import Progress
from excise.errors import TrainingStopped
from small_world import SmallWorld


def test_the_thresholds_are_recorded_before_the_first_step(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Mapping[str, Any]] = []

    def stopped(prepared: Any, run: artifacts.RunFolder, *_: Any, **__: Any) -> None:
        seen.append(artifacts.read_manifest(run))
        raise TrainingStopped("here")

    monkeypatch.setattr(training, "fit", stopped)
    settings = small.recipe(tmp_path / "run", verify__kept=0.9)
    with pytest.raises(TrainingStopped):
        excise.run(settings, progress=Progress(quiet=True))
    assert seen[0]["status"] == "running"
    assert seen[0]["verify"] == {"sha256": verdict.digest(settings.verify)}
    assert seen[0]["verify"] != {"sha256": verdict.digest(type(settings.verify)())}


def test_a_run_is_verified_and_changed_thresholds_are_refused(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small.recipe(tmp_path / "run", evaluate__max_rows=10)
    excise.run(settings, progress=Progress(quiet=True))
    run = artifacts.RunFolder(tmp_path / "run")
    assert artifacts.read_manifest(run)["verify"] == {"sha256": verdict.digest(settings.verify)}
    capsys.readouterr()
    code = cli.main(["verify", str(run.root), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == verdict.EXIT[found["outcome"]]
    assert code in (5, 7), "ten rows pass nothing"
    assert found["fixed"] is True
    assert found["basis"] == "gold"
    measured = {test["key"] for test in found["tests"] if test["measured"]}
    assert {"answers", "came_back", "membership", "inside", "apart", "repetition", "kept", "savings"} <= measured
    assert not [t for t in found["tests"] if t["outcome"] == "passed" and t["group"] != "kept"]
    run.recipe.write_text(run.recipe.read_text().replace("kept: 0.95", "kept: 0.5"))
    assert cli.main(["verify", str(run.root)]) == 6
