"""The stopping rule: what it compares, what it admits, when it ends a run, and that it goes back to what it kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from excise import recipe
from excise.errors import IntegrityFailed
from excise.matched import matched_auc, matched_gap
from excise.reporting.figures import Figure
from excise.reporting.stopping import figure
from excise.stopping import Check, Stopping, admissible, best, clear, due, enough

RULE = recipe.Stop(rule="two_sided", band=(0.45, 0.55), quality=0.98, every=5, near=0.15, patience=3)
NUMBERS = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 2)), min_size=1, max_size=12)


@given(forget=NUMBERS, never=NUMBERS)
def test_pairs_of_one_kind_are_counted(forget: list, never: list) -> None:
    """By loops: within each kind that both sides have, the share of pairs in which the forgotten unit is likelier."""
    shares, counts = [], []
    for kind in {k for _, k in forget} & {k for _, k in never}:
        mine, others = [v for v, k in forget if k == kind], [v for v, k in never if k == kind]
        won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in mine for b in others)
        shares.append(won / (len(mine) * len(others)))
        counts.append(len(mine))
    got = matched_auc(*zip(*forget, strict=True), *zip(*never, strict=True))
    if not counts:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(sum(s * n for s, n in zip(shares, counts, strict=True)) / sum(counts))


@given(forget=NUMBERS, never=NUMBERS)
def test_gaps_are_of_probabilities_within_a_kind(forget: list, never: list) -> None:
    """By loops, over log-probabilities of 0 and below."""
    forget, never = ([(-abs(v), k) for v, k in side] for side in (forget, never))
    total, count = 0.0, 0
    for value, kind in forget:
        others = [np.exp(v) for v, k in never if k == kind]
        if others:
            total, count = total + np.exp(value) - sum(others) / len(others), count + 1
    got = matched_gap(*zip(*forget, strict=True), *zip(*never, strict=True))
    assert np.isnan(got) if not count else got == pytest.approx(total / count)


def test_a_rule_of_gaps_reads_gaps() -> None:
    rule = replace(RULE, statistic="gap", band=(-0.05, 0.05))
    away, near, past = Check(1, 0.5, None, 0.3), Check(2, 0.6, 1.0, 0.04), Check(3, 0.5, 1.0, -0.01)
    assert [admissible(c, rule) for c in (away, near, past)] == [False, True, True]
    assert best([away, near, past], rule) is past
    assert (enough([away, near], rule), enough([away, near, past], rule)) == (False, True)
    assert not admissible(Check(1, 0.5, 1.0), rule)  # a check of a time before gaps were kept
    far = [Check(10, 0.5, None, 0.3)]
    assert [s for s in range(11, 21) if due(s, far, rule)] == [15, 20]
    assert due(11, [Check(10, 0.9, None, 0.0)], rule)


@pytest.mark.parametrize(
    ("auc", "quality", "expected"),
    [(0.5, 1.0, True), (0.45, 0.98, True), (0.55, 0.98, True), (0.56, 1.0, False), (0.44, 1.0, False),
     (0.5, 0.97, False), (float("nan"), 1.0, False), (0.5, None, False)],
)  # fmt: skip
def test_both_sides_and_the_retained_count(auc: float, quality: float | None, expected: bool) -> None:
    assert admissible(Check(1, auc, quality), RULE) is expected


def test_the_nearest_to_the_middle_is_best_and_quality_breaks_ties() -> None:
    checks = [Check(1, 0.54, 1.0), Check(2, 0.51, 0.99), Check(3, 0.49, 1.0), Check(4, 0.5, 0.5)]
    assert best(checks, RULE) == Check(3, 0.49, 1.0)
    assert best([Check(1, 0.9, 1.0)], RULE) is None


def test_a_collapse_at_the_start_does_not_end_the_run() -> None:
    """One-sided rules fire when everything collapses; this one waits until the retained are back."""
    collapsed = [Check(5, 0.2, 0.4), Check(6, 0.3, 0.6)]
    assert not enough(collapsed, RULE)
    assert not enough([*collapsed, Check(7, 0.54, 0.99)], RULE)  # may still come nearer
    assert enough([*collapsed, Check(7, 0.54, 0.99), Check(8, 0.49, 0.99)], RULE)  # has crossed the middle


def test_it_gives_up_on_something_better_after_a_while() -> None:
    checks = [Check(1, 0.52, 1.0), Check(2, 0.53, 1.0), Check(3, 0.54, 1.0)]
    assert not enough(checks, RULE)
    assert enough([*checks, Check(4, 0.53, 1.0)], RULE)


@pytest.mark.parametrize(
    ("seen", "gap"),
    [
        ([0.95], 5),  # far: every five steps, those that five divides
        ([0.69], 1),  # near, and how fast it moves is not known
        ([0.57, 0.69], 1),  # by 0.12 a step: it could be there after the next
        ([0.62, 0.61], 5),  # 0.11 above the middle at 0.01 a step: half-way after five
        ([0.58, 0.56], 2),  # 0.06 above at 0.02: after two (1.5)
        ([0.62, 0.6201], 5),  # it hardly moves
        ([0.66, 0.62, 0.61], 1),  # the fastest of late counts
        ([0.6, 0.6], 5),  # it does not move
        ([0.6, 0.5], 1),  # inside
        ([0.5, 0.4], 1),  # just past it
        ([0.4, 0.2], 5),  # far past it
    ],
)
def test_it_looks_before_it_could_be_half_way_to_the_middle(seen: list[float], gap: int) -> None:
    """The band ends at 0.55, its neighbourhood at 0.7."""
    checks = [Check(11 - len(seen) + i, auc, 1.0) for i, auc in enumerate(seen)]
    assert next(step for step in range(11, 21) if due(step, checks, RULE)) == 10 + gap


def test_without_a_neighbourhood_it_keeps_to_its_rhythm_until_the_band() -> None:
    rule = replace(RULE, near=0.0)
    assert [step for step in range(1, 11) if due(step, [Check(0, 0.56, 1.0)], rule)] == [5, 10]
    assert [step for step in range(1, 4) if due(step, [Check(0, 0.55, 1.0)], rule)] == [1, 2, 3]


def test_looks_that_follow_the_rule_do_not_jump_over_the_band() -> None:
    """A statistic that falls faster and faster, by up to 0.02 a step, is seen before it is past the middle."""
    falls = np.minimum(0.02, 0.0005 * np.arange(100))
    values, checks = 0.8 - np.cumsum(falls), [Check(0, 0.8, 1.0)]
    for step in range(1, 60):
        if due(step, checks, RULE):
            checks.append(Check(step, float(values[step]), 1.0))
    first = next(c for c in checks if c.auc <= 0.55)
    assert first.auc > 0.5
    assert sum(c.step <= first.step for c in checks) < 15


def run(folder: Path, seen: list[tuple[float, float]], *, start: int = 0) -> tuple[nn.Linear, Stopping, list[bool]]:
    """A model whose weight is the number of the step, watched after every step."""
    model = nn.Linear(1, 1, bias=False)
    left = iter(seen)
    rule = Stopping(model, RULE, folder, lambda step: Check(step, *next(left)))
    rule.begin(start)
    said = []
    for step in range(start + 1, start + len(seen) + 1):
        nn.init.constant_(model.weight, step)
        said.append(rule(step)) if due(step, rule.checks, RULE) else None
    return model, rule, said


def test_the_run_goes_back_to_the_best_weights(tmp_path: Path) -> None:
    seen = [(0.56, 1.0)] * 5  # only step 5 is looked at, then every step
    model, rule, _ = run(tmp_path, [(0.56, 1.0), (0.53, 0.99), (0.47, 0.9), *seen])
    found = rule.roll_back()
    assert found is not None
    assert (found.step, model.weight.item()) == (6, 6.0)
    clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checks.json"]
    assert [c["step"] for c in json.loads((tmp_path / "checks.json").read_text())] == [5, 6, 7, 8]


def test_without_anything_admissible_weights_stay_and_it_says_so(tmp_path: Path) -> None:
    model, rule, said = run(tmp_path, [(0.9, 1.0), (0.3, 1.0)] * 3)
    assert rule.roll_back() is None
    assert model.weight.item() == 6.0
    assert not any(said)


def test_the_picture_shows_the_retained_where_they_were_read() -> None:
    def shown(kept: float | None, *checks: tuple[float, float, float | None]) -> Figure:
        seen = [dict(zip(("step", "auc", "quality"), c, strict=True)) for c in checks]
        seen = [{**c, "at": 9} if c["step"] == 7.6 else c for c in seen]
        found = figure({"band": [0.45, 0.55], "quality": 0.98, "checks": seen, "kept": kept})
        assert found is not None
        return found

    both = shown(9, (5, 0.7, None), (7, 0.6, None), (8, 0.54, 0.97), (9, 0.5, 0.99))
    assert "from 0.700 to 0.500" in both.panels[0].label
    assert "from 0.970 to 0.990" in both.panels[1].label
    assert "the weights after step 9." in both.caption
    mixed = shown(7.6, (5, 0.7, None), (7.6, 0.5, 0.97), (9, 0.4, None))
    assert "a mix of the weights" in mixed.caption
    assert "(at step 7.6)" in mixed.caption
    never = shown(None, (5, 0.7, None), (7, 0.6, None))
    assert (len(never.panels), "Second" in never.caption) == (1, False)


def test_a_resumed_run_sees_again_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    seen = [(0.56, 1.0), (0.54, 1.0), (0.52, 1.0)]
    _, whole, _ = run(tmp_path / "a", seen, start=4)
    run(tmp_path / "b", seen[:2], start=4)
    model, resumed, _ = run(tmp_path / "b", seen[1:], start=5)
    assert resumed.checks == whole.checks
    assert resumed.roll_back() == whole.roll_back() == Check(7, 0.52, 1.0)
    assert model.weight.item() == 7.0


def test_damaged_weights_are_not_loaded(tmp_path: Path) -> None:
    _, rule, _ = run(tmp_path, [(0.56, 1.0), (0.5, 1.0)], start=4)
    path = tmp_path / "step-6" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityFailed):
        rule.roll_back()


def test_only_trained_parameters_are_kept(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    rule = Stopping(model, RULE, tmp_path, lambda step: Check(step, 0.5, 1.0))
    rule.begin(0)
    assert rule(5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
        model.bias.add_(1)
    changed = model.bias.item()
    rule.roll_back()
    assert torch.equal(model.weight, before)
    assert model.bias.item() == changed
