"""A stopping rule that is no knife edge: means of the last weights are judged and kept, and steps get finer near it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from excise import cli, recipe
from excise.averaging import FILE, Window
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import preparing, sides
from excise.errors import UsageError
from excise.objectives.forget import ga
from excise.objectives.retain import nll
from excise.stopping import Check, Stopping, pace
from small_world import SmallWorld

WIDE = {
    "objective__forget": {"ga": {}}, "objective__regularise": {}, "optimiser__lr": 2e-3, "schedule__steps": 12,
    "stop__rule": "two_sided", "stop__band": [0.0, 1.0], "stop__quality": 0.05, "stop__every": 1, "stop__patience": 3,
    "stop__average": 3, "stop__finer": 0.5, "stop__near": 0.2,
    "evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none",
    "evaluate__gold": None,
}  # fmt: skip


# --- the window ---------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=7), length=st.integers(1, 4),
    values=st.lists(st.floats(-9, 9, width=32), min_size=7, max_size=7),
)  # fmt: skip
def test_the_mean_over_the_last_steps_by_loops(steps: list[int], length: int, values: list[float]) -> None:
    """Steps that were looked at and lie less than the window's length back are averaged, each once."""
    model, at, seen = nn.Linear(1, 1, bias=False), 0, []
    window = Window(model, length)
    for gap, value in zip(steps, values, strict=False):
        at += gap
        nn.init.constant_(model.weight, value)
        seen.append((at, value))
        with window.mean(at):
            inside = [v for s, v in seen if s > at - length]
            assert model.weight.item() == pytest.approx(sum(inside) / len(inside), abs=1e-5)
        assert model.weight.item() == value, "bit by bit as it was"


def test_weights_come_back_whatever_happens_and_frozen_ones_are_left_alone() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    window = Window(model, 2)
    with window.mean(1):
        pass
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()
    lent = window.mean(2)
    lent.__enter__()
    assert torch.allclose(model.weight, (before + own) / 2)
    assert not lent.__exit__(RuntimeError, RuntimeError("look"), None)
    assert torch.equal(model.weight, own)
    assert set(window.held[2]) == {"weight"}


def test_a_window_survives_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    window = Window(model, 3)
    for step in (1, 2, 3):
        nn.init.constant_(model.weight, step)
        with window.mean(step):
            pass
    window.save(tmp_path)
    again = Window(model, 3)
    again.load(tmp_path)
    assert again.held.keys() == window.held.keys() == {1, 2, 3}
    nn.init.constant_(model.weight, 7)
    with again.mean(4):
        assert model.weight.tolist() == [[4.0, 4.0]]
    alone = Window(model, 1)
    with alone.mean(1):
        pass
    (tmp_path / FILE).unlink()
    alone.save(tmp_path)
    assert not (tmp_path / FILE).exists(), "nothing is written where nothing is averaged"


# --- the rule -----------------------------------------------------------------------------------------------------


def rule(folder: Path, model: nn.Module, seen: list[tuple[float, float]], **changes: Any) -> Stopping:
    settings = recipe.Stop(**{"rule": "two_sided", "every": 1, "average": 2, **changes})
    left = iter(seen)
    return Stopping(model, settings, folder, lambda step: Check(step, *next(left)))


def test_what_is_judged_is_kept_and_gone_back_to(tmp_path: Path) -> None:
    model, judged = nn.Linear(1, 1, bias=False), []
    stop = rule(tmp_path, model, [])
    answers = iter([(0.7, 1.0), (0.5, 1.0), (0.46, 1.0)])

    def look(step: int) -> Check:
        judged.append(model.weight.item())
        return Check(step, *next(answers))

    stop.look = look
    for step in (1, 2, 3):
        nn.init.constant_(model.weight, 10.0 * step)
        stop(step)
        assert model.weight.item() == 10.0 * step, "training goes on from the present weights"
    assert judged == [10.0, 15.0, 25.0]
    assert stop.roll_back() == Check(2, 0.5, 1.0)
    assert model.weight.item() == 15.0


def test_a_mean_moves_the_statistic_in_smaller_steps() -> None:
    """What jumps from step to step jumps by its root less in the mean of n weights."""
    generator = torch.Generator().manual_seed(0)
    jitter = torch.randn(400, generator=generator) * 0.03
    model = nn.Linear(1, 1, bias=False)
    spread = {}
    for length in (1, 4):
        window, seen = Window(model, length), []
        for step in range(400):
            nn.init.constant_(model.weight, 0.5 + float(jitter[step]))
            with window.mean(step):
                seen.append(model.weight.item())
        spread[length] = float(torch.tensor(seen[4:]).std())
    assert spread[4] == pytest.approx(spread[1] / 2, rel=0.15)


def test_the_pace_is_that_of_the_last_check() -> None:
    settings = recipe.Stop(band=(0.45, 0.55), near=0.1, finer=0.3)
    for auc, share in ((0.66, 1.0), (0.64, 0.3), (0.5, 0.3), (0.36, 0.3), (0.34, 1.0), (float("nan"), 1.0)):
        assert pace([Check(1, 0.5, 1.0), Check(2, auc, 1.0)], settings) == share
    assert pace([], settings) == 1.0


def test_the_rate_follows_the_pace_and_the_schedule(tmp_path: Path) -> None:
    shares = iter([1.0, 1.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0])  # asked for the log of a step, and after it

    def go(**more: Any) -> tiny.Run:
        return tiny.Run(tmp_path / str(len(more)), [ga(), nll()], optimiser={"lr": 1e-2, "decay": "linear"}, **more)

    plain = [row["lr"] for row in go().go().log]
    made = go()
    seen: list[float] = []
    made.trainer.pace = lambda: next(shares)
    made.trainer.add_callback(_Rates(made.trainer, seen))
    logged = [row["lr"] for row in made.go().log]
    assert logged == pytest.approx([a * b for a, b in zip(plain, (1, 0.25, 0.25, 1), strict=True)])
    assert seen == pytest.approx([a * b for a, b in zip(plain, (1, 1, 0.25, 0.25), strict=True)])


class _Rates(tiny.TrainerCallback):
    """Keeps the rate that the optimizer has when it steps."""

    def __init__(self, trainer: Any, seen: list[float]) -> None:
        self.trainer, self.seen = trainer, seen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(self.trainer.optimizer.param_groups[0]["lr"])


# --- runs ---------------------------------------------------------------------------------------------------------


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def quiet(settings: recipe.Recipe, **more: Any) -> None:
    run(settings, progress=Progress(quiet=True), **more)


class _Weights(tiny.TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, {}  # type: ignore[var-annotated]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen[state.global_step] = tiny.weights(self.model)


def test_a_run_ends_with_the_mean_that_its_best_check_saw(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[_Weights] = []
    made = training.train.UnlearnTrainer.__init__

    def watched(self: Any, model: nn.Module, *args: Any, **more: Any) -> None:
        kept.append(_Weights(model))
        made(self, model, *args, **{**more, "callbacks": [*more["callbacks"], kept[-1]]})

    monkeypatch.setattr(training.train.UnlearnTrainer, "__init__", watched)
    out = tmp_path / "run"
    quiet(small.recipe(out, **{**WIDE, "stop__patience": 12, "optimiser__lr": 5e-3}))
    seen = json.loads((out / "manifest.json").read_text())["stopping"]
    assert seen["average"] == 3
    assert seen["finer"] == 0.5
    last = seen["kept"]
    parts = [kept[0].seen[s] for s in range(max(1, last - 2), last + 1)]
    assert len(parts) > 1
    for name, value in weights(out).items():
        mean = torch.stack([p[name] for p in parts]).double().mean(0).to(value.dtype)
        assert torch.allclose(value, mean, atol=1e-7), name
    log = {row["step"]: row["lr"] for row in tiny.read_log(out / "log.jsonl")}
    assert log[2] < 0.55 * log[1], "the rate is halved after every check near the band, which is all of them here"


def test_a_resumed_run_decides_as_one_that_was_left_alone(small: SmallWorld, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {**WIDE, "checkpoint_every": 2, "initialise": {"preconditioned": {}}, "edit": {"reset_rows": {}}}
    quiet(small.recipe(whole, **changes))
    checks = json.loads((whole / "stopping" / "checks.json").read_text())
    assert len(checks) > 5
    own = small.recipe(broken, **changes)
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)
    left = [10]  # a pass of each side in each step: in the sixth step, after a checkpoint of the fourth

    def interrupt(module: nn.Module, *_: Any) -> None:
        left[0] -= module.training
        if left[0] < 0:
            raise KeyboardInterrupt

    prepared.model.register_forward_hook(interrupt)
    with folders.opened(own, resume=False) as folder, pytest.raises(KeyboardInterrupt):
        training.train_into(prepared, folder, Progress(quiet=True), stage="unlearn", resume=False)
    assert (max((broken / "checkpoints").glob("checkpoint-*")) / FILE).is_file()
    quiet(own, resume=True)
    assert json.loads((broken / "stopping" / "checks.json").read_text()) == checks
    assert tiny.apart(weights(whole), weights(broken)) == 0
    assert [r["lr"] for r in tiny.read_log(whole / "log.jsonl")] == [
        r["lr"] for r in tiny.read_log(broken / "log.jsonl")
    ]


def test_a_run_that_was_killed_after_its_last_look_makes_no_further_step(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quiet(small.recipe(whole, **WIDE, checkpoint_every=1))
    own = small.recipe(broken, **WIDE, checkpoint_every=1)

    def killed(_self: Stopping) -> None:
        raise KeyboardInterrupt

    back = Stopping.roll_back
    monkeypatch.setattr(Stopping, "roll_back", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet(own)
    monkeypatch.setattr(Stopping, "roll_back", back)
    checks = (whole / "stopping" / "checks.json").read_text()
    assert (broken / "stopping" / "checks.json").read_text() == checks
    assert len(json.loads(checks)) < 12, "the rule ended it"
    quiet(own, resume=True)
    assert (broken / "stopping" / "checks.json").read_text() == checks
    assert tiny.apart(weights(whole), weights(broken)) == 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("average", 0, "stop.average is 0"), ("finer", 0, "stop.finer is 0"), ("finer", 2, "up to 1")],
)
def test_what_makes_no_sense_is_refused(
    key: str, value: Any, said: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", **{**WIDE, f"stop__{key}": value})
    assert cli.main(["run", str(file)]) == UsageError.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()
