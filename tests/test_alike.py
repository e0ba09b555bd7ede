"""Never-seen rows as easy as the forgotten ones: who is chosen, and what a run then reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from excise import artifacts, recipe
from excise.alike import alike
from excise.commands import matching, running
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import sides
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.metrics.statistics import auc
from excise.records import fingerprint
from excise.tasks.causal_lm import encode_records
from small_world import SmallWorld

numbers = st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=12)
STOP = {"stop__rule": "two_sided", "stop__band": [0.0, 1.0], "stop__quality": 0.0}
QUICK = {
    "evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none",
    "schedule__steps": 2,
}  # fmt: skip
QUIET = Progress(quiet=True)


@given(numbers, st.lists(st.floats(-20, 0, width=32), min_size=2, max_size=40))
def test_half_of_them_at_most_each_once_and_every_forgotten_row_as_often(
    mine: list[float], others: list[float]
) -> None:
    chosen = alike(mine, others)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= len(others) // 2
    assert len(chosen) % len(mine) == 0 or len(others) < 2 * len(mine)
    assert chosen


@given(st.floats(-20, 0, width=32), st.lists(st.floats(-20, 0, width=32), min_size=2, max_size=20))
def test_one_forgotten_row_takes_the_nearest(mine: float, others: list[float]) -> None:
    """By a sort of all distances."""
    chosen = alike([mine], others)
    nearest = sorted(abs(x - mine) for x in others)[: len(chosen)]
    assert sorted(abs(others[i] - mine) for i in chosen) == nearest


def test_rows_about_easier_things_are_told_apart_no_longer() -> None:
    draw = np.random.default_rng(0)
    never = draw.normal(0.0, 1, 600)
    for easier in (0.0, 0.4, -0.4):
        forget = draw.normal(easier, 1, 200)
        chosen = alike(forget, never)
        assert abs(auc(forget, never) - 0.5 - 0.28 * easier) < 0.05
        assert abs(auc(forget, never[chosen]) - 0.5) < 0.03
        assert len(chosen) == 200
    assert len(alike(draw.normal(0.0, 1, 100), never)) == 300  # all rounds, where all leave them alike


# --- in a run -----------------------------------------------------------------------------------------------------


def settings(small: SmallWorld, out: Path, **changes: Any) -> recipe.Recipe:
    own = {**QUICK, **STOP, "data__never_saw": str(small.gold), **changes}
    return small.recipe(out, **own)


def likelihoods(model: Path, records: list, data: recipe.Data) -> list[float]:
    """One row after the other."""
    net, tokens = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    found = []
    for example in encode_records(records, tokens, sides.encoding(data)):
        ids = torch.tensor([example.input_ids])
        logp = net(ids).logits[0].log_softmax(-1).detach()
        answer = range(example.label_start, len(example.input_ids))
        found.append(sum(float(logp[t - 1, ids[0, t]]) for t in answer) / len(answer))
    return found


def test_the_rules_rows_are_chosen_and_the_measured_ones_are_not(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(small, tmp_path / "run")
    whole, found = sides.of(own), sides.of(own)
    matching.match(own, found, QUIET)
    mine, others = (likelihoods(small.gold, whole.records[side], own.data) for side in ("forget", "calibration"))
    expected = [whole.records["calibration"][i] for i in alike(mine, others, seed=own.seed)]
    assert found.records["calibration"] == expected
    assert len(expected) < len(whole.records["calibration"])
    for side in ("never_seen", "forget", "retain", "watch"):
        assert found.records[side] == whole.records[side]
    chosen = {"rows": len(expected), "fingerprint": fingerprint(expected)}
    assert found.sources == {**whole.sources, "calibration-alike": chosen}


def test_rows_that_terms_read_are_chosen_too(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(
        small, tmp_path / "run", objective__forget={"quantile": {}}, objective__regularise={}, stop__rule="none"
    )
    whole, found = sides.of(own), sides.of(own)
    matching.match(own, found, QUIET)
    assert 0 < len(found.records["never_seen_training"]) <= len(whole.records["never_seen_training"]) / 2
    run(own, progress=QUIET)
    assert artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["status"] == "done"


@pytest.mark.parametrize(
    ("forget", "held"), [("npo", "calibration-alike"), ("distil", "calibration-alike"), ("distil", "forget-never-saw")]
)
def test_going_on_with_another_model_is_refused(
    forget: str, held: str, small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names the same folder, but another model lies there by now: it would choose, or teach, otherwise."""
    place = tmp_path / "never-saw"
    shutil.copytree(small.gold, place)
    rule = {} if held == "calibration-alike" else {"stop__rule": "none"}
    objective = {"objective__forget": {forget: {}}, "objective__regularise": {}}
    own = settings(small, tmp_path / "run", data__never_saw=str(place), **objective, **rule)
    with monkeypatch.context() as cut_off:
        cut_off.setattr(running.writing, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(own, progress=QUIET)
    shutil.rmtree(place)
    shutil.copytree(small.original, place)
    with pytest.raises(IntegrityFailed, match=f"{held} rows"):
        run(own, resume=True, progress=QUIET)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_model_that_knows_them_is_asked_about(small: SmallWorld, tmp_path: Path) -> None:
    found = sides.of(own := settings(small, tmp_path / "run", data__never_saw=str(small.original)))
    matching.match(own, found, QUIET)
    assert "make sure that it never saw them" in found.warnings[-1]


def test_what_it_cannot_serve_is_refused_and_nothing_written(small: SmallWorld, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for error, changes in (
        (UsageError, {"stop__rule": "none"}),
        (InputRefused, {"data__never_saw": str(tmp_path / "nowhere")}),
    ):
        with pytest.raises(error):
            run(settings(small, out, **changes), progress=QUIET)
    assert not out.exists()
