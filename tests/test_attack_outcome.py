"""Outcomes of attacks: shapes, files without text, numbers against loops, pairing with the gold by row."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracles_evidence as oracle
from excise.attacks import outcome
from excise.attacks.outcome import Outcome
from excise.errors import InputRefused
from excise.metrics.statistics import bootstrap_counts


def made(seed: int = 0, n: int = 12, **changes: Any) -> Outcome:
    rng = np.random.default_rng(seed)
    values = {"forget": rng.random((3, n)), "retain": rng.random((3, 4))}
    numbers = {"forget": rng.permutation(n), "retain": np.arange(4)}
    own = Outcome(
        "relearn", "probability", "steps", ("0", "1", "2"), values, numbers, {"lr": 0.1, "notes": ["a", "b"]}, 1.5
    )
    return dataclasses.replace(own, **changes)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    own = made()
    path = tmp_path / "unlearned" / "relearn.safetensors"
    outcome.save(own, path)
    found = outcome.load(path)
    assert (found.name, found.unit, found.budget, found.budgets) == ("relearn", "probability", "steps", ("0", "1", "2"))
    assert (found.extra, found.seconds) == ({"lr": 0.1, "notes": ["a", "b"]}, 1.5)
    for side in own.values:
        assert np.array_equal(found.values[side], own.values[side])
        assert np.array_equal(found.rows[side], own.rows[side])
    assert [p.name for p in path.parent.iterdir()] == ["relearn.safetensors"], "nothing unfinished is left"


def test_a_broken_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputRefused, match="run the attack first"):
        outcome.load(path)
    path.write_bytes(b"not one")
    with pytest.raises(InputRefused, match="copy it again"):
        outcome.load(path)
    from safetensors.numpy import save

    path.write_bytes(save({"values.forget": np.zeros((1, 1))}, {"format": "99"}))
    with pytest.raises(InputRefused, match="format"):
        outcome.load(path)
    head = {"format": outcome.FORMAT, "name": "a", "unit": "leak", "budget": "b", "budgets": '["1"]', "extra": "{}"}
    path.write_bytes(
        save({"values.forget": np.zeros((1, 2)), "rows.forget": np.zeros(1, int)}, {**head, "seconds": "0"})
    )
    with pytest.raises(InputRefused, match="contradicts itself"):
        outcome.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "percent"},
        {"budgets": ("0", "0", "1")},
        {"budgets": ("0", "1")},
        {"values": {"retain": np.zeros((3, 4))}, "rows": {"retain": np.arange(4)}},
        {"rows": {"forget": np.arange(12)}},
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unit|budgets|sides|values"):
        made(**changes)


def test_numbers_are_means_with_bootstrap_intervals_over_rows() -> None:
    own = made(n=9)
    own.values["forget"][1, 4] = math.nan
    found = outcome.numbers(own, resamples=200)
    draws = [np.repeat(np.arange(9), c.astype(int)).tolist() for c in bootstrap_counts(9, 200)]
    assert list(found) == ["attack/relearn/0", "attack/relearn/1", "attack/relearn/2"]
    for at, entry in enumerate(found.values()):
        values = own.values["forget"][at].tolist()
        seen = [v for v in values if not math.isnan(v)]
        assert entry["value"] == pytest.approx(sum(seen) / len(seen))
        assert (entry["low"], entry["high"]) == pytest.approx(oracle.bootstrap_bounds(values, draws))
        assert entry["n"] == len(seen)
        assert "gap" not in entry


def test_the_gap_is_paired_by_row_number_and_by_budget() -> None:
    own, order = made(n=8), np.random.default_rng(3).permutation(8)
    shifted = {"forget": own.values["forget"][::-1, order] - 0.25, "retain": own.values["retain"]}
    gold = dataclasses.replace(
        own, budgets=("2", "1", "0"), values=shifted, rows={**own.rows, "forget": own.rows["forget"][order]}
    )
    for entry in outcome.numbers(own, gold).values():
        assert entry["gap"] == pytest.approx(0.25)
        assert (entry["gap_low"], entry["gap_high"]) == pytest.approx((0.25, 0.25)), "paired: no spread is left"


def test_rows_that_the_gold_lacks_have_no_gap() -> None:
    own = made(n=4)
    fewer = dataclasses.replace(
        own, values={"forget": own.values["forget"][:, :2] - 1, "retain": own.values["retain"]},
        rows={**own.rows, "forget": own.rows["forget"][:2]}, budgets=("0", "1", "8"),
    )  # fmt: skip
    found = outcome.numbers(own, fewer)
    assert found["attack/relearn/0"]["gap"] == pytest.approx(1.0)
    assert "gap" not in found["attack/relearn/2"]
    other = dataclasses.replace(own, rows={**own.rows, "forget": own.rows["forget"] + 100})
    assert outcome.numbers(own, other)["attack/relearn/0"]["gap"] is None


def test_what_was_not_measured_is_none_and_json_can_hold_it() -> None:
    own = made()
    own.values["forget"][:] = math.nan
    found = outcome.numbers(own, own)
    assert {entry["value"] for entry in found.values()} == {None}
    json.dumps([found, outcome.picture({"gold": own})], allow_nan=False)


def test_pictures_hold_every_model_at_the_same_budgets() -> None:
    own, gold = made(0), made(1, budgets=("0", "2", "4"))
    found = outcome.picture({"unlearned": own, "gold": gold})
    assert (found["budget"], found["budgets"], found["unit"]) == ("steps", ["0", "1", "2"], "probability")
    curve = found["models"]["gold"]
    assert curve["value"] == [pytest.approx(gold.mean()[0]), None, pytest.approx(gold.mean()[1])]
    assert curve["retain"][1] is None
    assert found["models"]["unlearned"]["retain"] == pytest.approx(own.mean("retain").tolist())
