"""Relearning row by row, on related text, and memorisation savings, which find what a low curve hides."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import attacked
import oracles_evidence as oracle
from attacked import HOW, Bytes, assert_same, llama, rows, sides, snapshot, trained
from excise.attacks import relearn, training
from excise.errors import NotShown
from excise.tasks import causal_lm


def made(attack: Any, model: Any, records: dict, **options: Any) -> Any:
    options = {"lr": 3e-3, "steps": (0, 1, 3), "batch_rows": 3} | options
    return attacked.made(attack, model, records, **options)


def by_hand(model: Any, trained_on: list, measured: list, steps: int, seed: int = 0, size: int = 3) -> list[float]:
    """The probability of each measured row after plain steps on a copy."""
    clone = copy.deepcopy(model).eval()
    examples = causal_lm.encode_records(trained_on, Bytes(), HOW)
    drawn = training.order(range(len(trained_on)), size, seed)
    adam = torch.optim.AdamW(clone.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        adam.zero_grad()
        parts = []
        for i in next(drawn):
            ids, start = examples[i].input_ids, examples[i].label_start
            scores = clone(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            parts += [-scores[t - 1, ids[t]] for t in range(start, len(ids))]
        (sum(parts) / len(parts)).backward()
        adam.step()
    return [oracle.answer_probability(clone, e) for e in causal_lm.encode_records(measured, Bytes(), HOW)]


def test_rows_of_the_curve_and_what_it_costs() -> None:
    model, records = llama(), sides(forget=9, untouched=5)
    before = snapshot(model)
    found = made(relearn.attack, model, records, seed=2, kept_rows=4)
    assert_same(model, before)
    had, held = training.halves([r.group for r in records["forget"]], 2)
    assert found.rows["forget"].tolist() == held
    assert found.rows["retain"].tolist() == [0, 1, 2, 3]
    assert found.budgets == ("0", "1", "3")
    theirs = [records["forget"][i] for i in had]
    for side, measured in {
        "forget": [records["forget"][i] for i in held],
        "retain": records["untouched"][:4],
    }.items():
        for point, steps in enumerate((0, 1, 3)):
            expected = by_hand(model, theirs, measured, steps, seed=2)
            np.testing.assert_allclose(found.values[side][point], expected, rtol=2e-3)
    alone = made(relearn.attack, model, {"forget": records["forget"]}, seed=2)
    assert alone.mean().tolist() == pytest.approx(found.mean().tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "side"),
    [
        ({"never_seen": 5, "retain": 6}, "retain"),
        ({"never_seen": 5}, "never_seen"),
        ({"related": 4, "retain": 6}, "related"),
        ({"untouched": 4, "retain": 6}, "untouched"),
    ],
)
def test_related_text_is_trained_and_the_same_rows_are_measured(counts: dict, side: str) -> None:
    model, records = llama(), sides(forget=6, **counts)
    found = made(relearn.related, model, records)
    assert found.extra["trained_side"] == side
    _, held = training.halves([r.group for r in records["forget"]], 0)
    assert found.rows["forget"].tolist() == held
    expected = by_hand(model, records[side], [records["forget"][i] for i in held], 3)
    np.testing.assert_allclose(found.values["forget"][-1], expected, rtol=2e-3)
    other = made(relearn.related, model, records, rows="never_seen") if "never_seen" in counts else None
    assert other is None or other.extra["trained_side"] == "never_seen"


def test_savings_train_all_rows_and_measure_them_and_a_control_beside() -> None:
    model, records = llama().train(), sides(forget=5, never_seen=9)
    before, told = snapshot(model), []
    found = made(relearn.savings, model, records, progress=lambda done, of: told.append((done, of)))
    assert_same(model, before)
    for side, own in (("forget", records["forget"]), ("never_seen", records["never_seen"][:5])):
        assert found.rows[side].tolist() == [0, 1, 2, 3, 4]
        for point, steps in enumerate((0, 1, 3)):
            np.testing.assert_allclose(found.values[side][point], by_hand(model, own, own, steps), rtol=2e-3)
    assert told == [(i, 6) for i in range(1, 7)]
    assert found.extra["passes"] == pytest.approx(3 * 3 / 5)
    alone = made(relearn.savings, model, records, control=False)
    assert "never_seen" not in alone.values
    np.testing.assert_array_equal(alone.values["forget"], found.values["forget"])


def test_what_is_hidden_is_learned_faster_than_what_was_never_known() -> None:
    records = sides(forget=10, retain=10, never_seen=10)
    original = trained(llama(seed=1), records["forget"] + records["retain"])
    gold = trained(llama(seed=1), records["retain"])
    hidden = trained(copy.deepcopy(original), records["forget"], steps=4, lr=2e-3, sign=-1)
    how = {"steps": (0, 8), "batch_rows": 10}
    ours, theirs = (made(relearn.savings, m, records, **how) for m in (hidden, gold))
    assert ours.mean()[0] < 0.5 * made(relearn.savings, original, records, **how).mean()[0]  # it looks forgotten
    assert ours.mean()[1] > theirs.mean()[1] + 0.1
    # Where there is no gold the control says the same: rows that nobody knew come nowhere near.
    assert ours.mean()[1] > ours.mean("never_seen")[1] + 0.1
    assert abs(theirs.mean()[1] - theirs.mean("never_seen")[1]) < 0.1


def test_divergence_leaves_holes_and_no_trace() -> None:
    model, records = llama(), sides(forget=4, retain=3)
    before = snapshot(model)
    found = made(relearn.attack, model, records, lr=1e30)
    assert_same(model, before)
    assert found.extra["diverged"]
    assert np.isfinite(found.values["forget"][0]).all()
    assert np.isnan(found.values["forget"][-1]).all()
    assert math.isnan(found.mean()[-1])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="two rows"):
        made(relearn.attack, llama(), {"forget": rows(1)})
    with pytest.raises(NotShown, match="forget rows"):
        made(relearn.savings, llama(), {"retain": rows(3)})
    with pytest.raises(NotShown, match="no related rows"):
        made(relearn.related, llama(), {"forget": rows(3)})
    with pytest.raises(NotShown, match="no forget rows"):
        made(relearn.related, llama(), {"forget": rows(3)}, rows="forget")
    with pytest.raises(ValueError, match="ascend"):
        made(relearn.savings, llama(), {"forget": rows(3)}, steps=(3, 1))
