"""Between two looks: mixes of the weights on either side of the band's middle are looked at, kept, and gone back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from excise import cli, recipe
from excise.between import FILE, Stretch
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import preparing, sides
from excise.errors import UsageError
from excise.stopping import CLOSE, Check, Stopping, best, crossing, due
from small_world import SmallWorld

RULE = {"rule": "two_sided", "statistic": "gap", "band": (-0.05, 0.05), "quality": 0.9, "every": 5, "between": 6}
FALLS = {
    "objective__forget": {"ga": {}}, "objective__regularise": {}, "optimiser__lr": 5e-3, "schedule__steps": 12,
    "stop__rule": "two_sided", "stop__band": [0.45, 0.75], "stop__quality": 0.01, "stop__every": 2, "stop__between": 3,
    "evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none",
    "evaluate__gold": None,
}  # fmt: skip


# --- the stretch --------------------------------------------------------------------------------------------------


@given(start=st.floats(-9, 9, width=32), end=st.floats(-9, 9, width=32), shares=st.lists(st.floats(0, 1), max_size=4))
def test_mixes_lie_on_the_way_and_the_end_comes_back(start: float, end: float, shares: list[float]) -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    bias = model.bias.item()
    nn.init.constant_(model.weight, start)
    stretch = Stretch(model)
    stretch.begin()
    nn.init.constant_(model.weight, end)
    with stretch.walked() as go:
        for share in shares:
            go(share)
            assert model.weight[0, 0].item() == pytest.approx((1 - share) * start + share * end, abs=1e-5)
            assert model.bias.item() == bias
    assert model.weight.tolist() == [[end, end]], "bit by bit as it was"


def test_the_end_comes_back_whatever_happens() -> None:
    model = nn.Linear(1, 1, bias=False)
    stretch = Stretch(model)
    stretch.begin()
    nn.init.constant_(model.weight, 7.0)
    lent = stretch.walked()
    lent.__enter__()(0.5)
    assert model.weight.item() != 7.0
    assert not lent.__exit__(RuntimeError, RuntimeError("look"), None)
    assert model.weight.item() == 7.0


def test_a_stretch_survives_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    Stretch(model).save(tmp_path)
    assert not (tmp_path / FILE).exists(), "nothing is written where none was begun"
    stretch, again = Stretch(model), Stretch(model)
    nn.init.constant_(model.weight, 2.0)
    stretch.begin()
    stretch.save(tmp_path)
    again.load(tmp_path)
    nn.init.constant_(model.weight, 4.0)
    with again.walked() as go:
        go(0.5)
        assert model.weight.item() == 3.0
    again.load(tmp_path / "another")
    assert again.start == {}


# --- the search ---------------------------------------------------------------------------------------------------


@given(
    start=st.floats(0, 0.5), length=st.floats(0.01, 1), high=st.floats(0.1, 1), low=st.floats(-1, 0),
    aim=st.floats(0.001, 0.099),
)  # fmt: skip
def test_the_crossing_is_inside_and_where_a_line_would_meet_the_aim(
    start: float, length: float, high: float, low: float, aim: float
) -> None:
    share = crossing((start, high), (start + length, low), aim)
    assert start + 0.0999 * length <= share <= start + 0.9001 * length
    line = start + length * (high - aim) / (high - low)
    if start + 0.1 * length < line < start + 0.9 * length:
        assert share == pytest.approx(line, abs=1e-6)


def walked(
    folder: Path, gap: Any, quality: Any = lambda w: 1.0, steps: int = 40, **changes: Any
) -> tuple[nn.Module, Stopping, int]:
    """A model whose weight is the number of the step, and a statistic that is a function of that weight."""
    model = nn.Linear(1, 1, bias=False)

    def look(step: float) -> Check:
        weight = model.weight.item()
        return Check(step, 0.5, quality(weight) if abs(gap(weight)) <= 0.05 else None, gap(weight))

    rule = Stopping(model, recipe.Stop(**{**RULE, **changes}), folder, look, steps=steps)
    rule.begin(0)
    for step in range(1, steps + 1):
        nn.init.constant_(model.weight, float(step))
        if rule(step):
            assert model.weight.item() == float(step), "training would go on from the present weights"
            return model, rule, step
    return model, rule, steps


@pytest.mark.parametrize(("middle", "speed"), [(11.3, 0.3), (11.3, 0.04), (17.9, 0.1), (8.01, 0.5)])
def test_it_ends_at_the_middle_of_a_band_that_steps_jump_over(tmp_path: Path, middle: float, speed: float) -> None:
    """A fall by up to half a unit a step; the band is a tenth wide."""
    model, rule, _ = walked(tmp_path, lambda w: float(np.tanh(speed * (middle - w))))
    found = rule.roll_back()
    assert found is not None
    assert abs(found.gap or 0.0) <= CLOSE * 0.1
    assert model.weight.item() == pytest.approx(found.step, abs=1e-3)
    assert model.weight.item() == pytest.approx(middle, abs=0.3)
    steps = [c.step for c in rule.checks]
    assert steps == sorted(steps)
    assert [c["step"] for c in json.loads((tmp_path / "checks.json").read_text())] == steps


def test_without_it_the_same_fall_leaves_nothing(tmp_path: Path) -> None:
    _, rule, _ = walked(tmp_path, lambda w: float(np.tanh(0.3 * (11.3 - w))), between=0)
    assert best(rule.checks, rule.settings) is None


def test_where_the_middle_costs_too_much_it_goes_back_up(tmp_path: Path) -> None:
    """The retained are good enough down to a gap of 0.02 only: weights between there and the band's edge are kept."""

    def gap(weight: float) -> float:
        return 0.1 * (11.3 - weight)

    model, rule, _ = walked(tmp_path, gap, lambda w: 0.95 if gap(w) > 0.02 else 0.85)
    found = rule.roll_back()
    assert found is not None
    assert 0.02 < gap(model.weight.item()) <= 0.05


def test_a_look_below_the_middle_says_nothing_of_the_middle(tmp_path: Path) -> None:
    """Step 15 lies in the band, below the middle, and costs too much; the middle itself does not."""

    def gap(weight: float) -> float:
        return 0.04 * (14.3 - weight)

    model, rule, _ = walked(tmp_path, gap, lambda w: 0.95 if gap(w) > -0.015 else 0.85)
    assert rule.roll_back() is not None
    assert abs(gap(model.weight.item())) <= CLOSE * 0.1


def test_a_look_in_the_band_whose_retained_are_not_good_enough_is_searched_upwards(tmp_path: Path) -> None:
    """Step 10 lies just above the middle and costs too much; weights before it, at the upper edge, do not."""

    def gap(weight: float) -> float:
        return 0.04 * (10.1 - weight)

    model, rule, step = walked(tmp_path, gap, lambda w: 0.95 if gap(w) > 0.02 else 0.85)
    assert (rule.roll_back() is not None, step) == (True, 15)
    assert 0.02 < gap(model.weight.item()) <= 0.05
    mixed = [c.step for c in rule.checks if c.at is not None]
    assert mixed, "looked for"
    assert max(mixed) < 10, "and not again where all is below what it aims at"


def test_a_run_that_has_left_the_band_behind_ends(tmp_path: Path) -> None:
    """Nowhere are the retained good enough: six looks further and further below the band are enough to know."""

    def gap(weight: float) -> float:
        return 0.03 * (10.1 - weight)

    _, rule, step = walked(tmp_path / "a", gap, lambda w: 0.1, steps=99, patience=5)
    below = [c for c in rule.checks if (c.gap or 0.0) < -0.05]
    assert (len(below), step, rule.roll_back()) == (6, 40, None)
    _, rule, step = walked(tmp_path / "b", lambda w: -0.4 + 0.001 * w, lambda w: 0.1, steps=60, patience=5)
    assert step == 60, "it comes back up"


def test_a_look_at_the_middle_is_enough(tmp_path: Path) -> None:
    """Step 10 is 0.004 above the middle; without the search the run goes on until it has crossed it."""

    def gap(weight: float) -> float:
        return 0.04 * (10.1 - weight)

    _, rule, step = walked(tmp_path / "a", gap)
    assert ([c.step for c in rule.checks], step) == ([5, 10], 10)
    _, rule, step = walked(tmp_path / "b", gap, between=0)
    assert step == 11


def test_mixes_of_a_look_that_is_made_again_are_forgotten(tmp_path: Path) -> None:
    """Gone on with from a checkpoint of step 12, a run has not yet seen what it mixed after step 15."""
    _, rule, _ = walked(tmp_path, lambda w: 0.04 * (11.3 - w), lambda w: 0.1, steps=15)
    mixed = [c for c in rule.checks if c.at is not None]
    assert [(10 < c.step < 15, c.at) for c in mixed] == [(True, 15)] * 6
    assert min(c.step for c in mixed) < 12
    for step, left in ((12, [5, 10]), (15, [c.step for c in rule.checks])):
        again = Stopping(nn.Linear(1, 1), rule.settings, tmp_path, lambda step: Check(step, 0.5, None))
        again.begin(step)
        assert [c.step for c in again.checks] == left
    assert again.checks == rule.checks


def test_no_more_mixes_than_asked_for_and_none_where_the_middle_was_not_passed(tmp_path: Path) -> None:
    _, rule, _ = walked(tmp_path / "a", lambda w: 0.3 if w < 11.3 else -0.3, between=2, steps=15)
    assert sum(c.at is not None for c in rule.checks) == 2, "a jump that no mix is at the middle of"
    _, rule, _ = walked(tmp_path / "b", lambda w: 0.3, steps=15)
    assert all(c.at is None for c in rule.checks)


def test_looks_are_rare_where_the_middle_is_far_and_the_last_step_is_looked_at(tmp_path: Path) -> None:
    rule = recipe.Stop(**RULE)

    def next_look(*seen: tuple[int, float]) -> int:
        return next(s for s in range(21, 99) if due(s, [Check(step, 0.5, None, gap) for step, gap in seen], rule))

    assert next_look((20, 0.4)) == 25, "how fast it moves is not known"
    assert next_look((10, 0.5), (20, 0.4)) == 40, "at 0.01 a step: forty steps away, four times `every` at most"
    assert next_look((10, 0.28), (20, 0.12)) == 28, "seven and a half steps away"
    assert next_look((10, 0.28), (20, 0.01)) == 25
    assert next_look((10, 0.28), (20, -0.2)) == 25
    assert next_look((10, 0.4), (20, 0.4)) == 40, "it does not move"
    assert due(5, [], rule)
    assert not due(4, [], rule)
    _, watched, _ = walked(tmp_path, lambda w: 0.5 - 0.001 * w, steps=37)
    assert watched.checks[-1].step == 37


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


def test_a_run_ends_with_the_mix_that_its_best_check_saw(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[_Weights] = []
    made = training.train.UnlearnTrainer.__init__

    def watched(self: Any, model: nn.Module, *args: Any, **more: Any) -> None:
        kept.append(_Weights(model))
        made(self, model, *args, **{**more, "callbacks": [*more["callbacks"], kept[-1]]})

    monkeypatch.setattr(training.train.UnlearnTrainer, "__init__", watched)
    quiet(small.recipe(tmp_path / "run", **FALLS))
    seen = json.loads((tmp_path / "run" / "manifest.json").read_text())["stopping"]
    at = seen["kept"]
    assert next(c["at"] for c in seen["checks"] if c["step"] == at) is not None, "a mix was kept"
    looked = [c["step"] for c in seen["checks"] if c["at"] is None]
    first, last = max(s for s in looked if s < at), min(s for s in looked if s > at)
    share = (at - first) / (last - first)
    for name, value in weights(tmp_path / "run").items():
        mixed = kept[0].seen[first][name].double().lerp(kept[0].seen[last][name].double(), share)
        assert torch.allclose(value.double(), mixed, atol=1e-4 * float(mixed.abs().max())), name


def test_a_resumed_run_decides_as_one_that_was_left_alone(small: SmallWorld, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {**FALLS, "checkpoint_every": 1}
    quiet(small.recipe(whole, **changes))
    checks = json.loads((whole / "stopping" / "checks.json").read_text())
    mixed = next(c["step"] for c in checks if c["at"] is not None)
    own = small.recipe(broken, **changes)
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)
    left = [
        2 * int(mixed)
    ]  # a pass of each side in each step: in the step at whose end the search begins, or before it

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


def test_a_run_that_was_killed_after_its_last_look_makes_no_further_step(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quiet(small.recipe(whole, **FALLS, checkpoint_every=1))
    own = small.recipe(broken, **FALLS, checkpoint_every=1)

    def killed(_self: Stopping) -> None:
        raise KeyboardInterrupt

    back = Stopping.roll_back
    monkeypatch.setattr(Stopping, "roll_back", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet(own)
    monkeypatch.setattr(Stopping, "roll_back", back)
    checks = (whole / "stopping" / "checks.json").read_text()
    assert (broken / "stopping" / "checks.json").read_text() == checks
    assert json.loads(checks)[-1]["step"] < 12, "the rule ended it"
    quiet(own, resume=True)
    assert (broken / "stopping" / "checks.json").read_text() == checks
    assert tiny.apart(weights(whole), weights(broken)) == 0


@pytest.mark.parametrize(
    ("key", "value", "said"), [("between", -1, "stop.between is -1"), ("every", 0, "stop.every is 0")]
)
def test_what_makes_no_sense_is_refused(
    key: str, value: Any, said: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", **{**FALLS, f"stop__{key}": value})
    assert cli.main(["run", str(file)]) == UsageError.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()
