"""States that are held: whose, against what, stored for the rows of a run alone; never-seen rows as a side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from excise import reference, train
from excise.errors import UsageError
from excise.forward import REFERENCE, Anatomy, hidden, mask, token_logp
from excise.objectives.regularise import clreg
from excise.objectives.retain import anchor, anchor_rows, nll
from excise.objectives.term import Term
from excise.objectives.value import value_of
from excise.recipe import Schedule
from excise.schedule import Plan

COUNTS = {"forget": 8, "retain": 10, "never_seen": 9}
UP = Term("ga", lambda logp: logp, {"logp": token_logp("forget")}, over="forget", per="token")


def moved(net: Any, start: Any, data: tiny.Data, side: str, layer: int) -> float:
    """Relative squared distance of the states of a side at a layer, mean over rows of means over tokens."""
    out = []
    for row in data.rows[side]:
        with torch.no_grad():
            now, then = (
                m(input_ids=row[None], output_hidden_states=True).hidden_states[layer][0] for m in (net, start)
            )
        out.append(float(((now - then).square().sum(-1) / then.square().sum(-1)).mean()))
    return sum(out) / len(out)


def test_it_is_the_distance_from_the_stored_states(tmp_path: Path) -> None:
    data, start = tiny.Data(COUNTS), tiny.model()
    terms = [*anchor(layers=2)]
    run = tiny.Run(tmp_path, [UP, *terms], net=start, data=data)
    with torch.no_grad():
        for parameter in run.net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for made, side in zip(terms, ("retain", "never_seen"), strict=True):
        batch = data.batch(side, range(COUNTS[side]), extra=3)
        step = tiny.step_of(run.net, (side, batch), reference=run.trainer.reference)
        value = float(value_of(made, step.run(made.needs())).detach().mean())
        # The last of transformers' hidden states is normed, as layer -1 here is.
        expected = sum(moved(run.net, start, data, side, layer) for layer in (tiny.DEPTH, tiny.DEPTH - 1)) / 2
        assert value == pytest.approx(expected, rel=1e-3)
        assert value > 1e-3


def test_states_move_less_with_it(tmp_path: Path) -> None:
    data, far = tiny.Data(COUNTS), {}
    for name, terms in (("without", []), ("with", [*anchor(weight=60.0)])):
        run = tiny.Run(
            tmp_path / name, [UP, *terms], data=data, schedule={"steps": 6}, optimiser={"lr": 3e-3}
        ).go()  # fmt: skip
        far[name] = [moved(run.net, tiny.model(), data, side, tiny.DEPTH) for side in ("retain", "never_seen")]
    assert all(held < 0.3 * free for held, free in zip(far["with"], far["without"], strict=True))


def test_a_long_state_counts_no_more_than_others() -> None:
    start = torch.ones(1, 2, 4)
    start[0, 0] *= 1000
    own, where = start.clone(), torch.ones(1, 2, dtype=torch.bool)
    own[0, 1] += 1
    assert float(anchor_rows((own,), (start,), where)) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{"sides": []}, {"sides": ["retain", "retain"]}, {"layers": 0}, {"layers": [0, 1]}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="anchor"):
        anchor(**options)


# --- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_the_rows_of_a_run_are_stored(in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(reference, "IN_MEMORY", 0)
    net, data, asked = tiny.model(), tiny.Data(COUNTS), hidden("retain", 2, REFERENCE)
    read: list[int] = []

    def collate(side: str, rows: Any) -> Any:
        read.extend(rows)
        return data.batch(side, rows)

    stored = reference.store(
        net, Anatomy.of(net), [asked], data.counts, collate, autocast=lambda: train.autocast("fp32"),
        only={"retain": [1, 4, 9]}, batch_rows=2,
    )  # fmt: skip
    assert read == [1, 4, 9]
    batch = data.batch("retain", [9, 1])
    live = tiny.step_of(net, ("retain", batch)).run([hidden("retain", 2)])[hidden("retain", 2)]
    where = batch.attention_mask.bool()
    torch.testing.assert_close(stored(asked, batch)[where], live.detach()[where], rtol=1e-5, atol=1e-5)
    assert stored.stored[asked].offsets.diff().tolist() == [
        len(data.rows["retain"][i]) if i in (1, 4, 9) else 0 for i in range(10)
    ]


@pytest.mark.parametrize("how", [{"steps": 3}, {"epochs": 2, "retain_steps": 1}, {"steps": 2, "mixed": True}])
def test_what_a_plan_visits_is_what_it_draws(how: dict[str, Any]) -> None:
    plan = Plan({"forget": 5, "retain": 30, "never_seen": 12}, Schedule(forget_batch=2, retain_batch=3, **how), seed=4)
    drawn: dict[str, set[int]] = {}
    for micro in range(plan.micro_steps):
        for side, draw in plan.draw(micro).items():
            drawn.setdefault(side, set()).update(draw.indices)
    assert {side: set(rows) for side, rows in plan.visited().items()} == drawn


# --- never-seen rows in a step ------------------------------------------------------------------------------------


def test_never_seen_rows_come_in_batches_of_their_own() -> None:
    rows = {"forget": 8, "retain": 30, "never_seen": 9}
    plan = Plan(rows, Schedule(forget_batch=4, retain_batch=5, never_seen_batch=2, epochs=3), seed=1)
    sizes = {side: len(draw.indices) for side, draw in plan.draw(0).items()}
    assert sizes == {"forget": 4, "retain": 5, "never_seen": 2}
    drawn = [i for m in range(5) for i in plan.draw(m)["never_seen"].indices]
    assert len(set(drawn[:9])) == 9  # a stream of epochs
    plain = Plan(rows, Schedule(forget_batch=4, retain_batch=5), seed=1)
    assert len(plain.draw(0)["never_seen"].indices) == 5
    alone = Plan({"forget": 8, "retain": 30}, Schedule(forget_batch=4, retain_batch=5), seed=1)
    assert plan.draw(1)["retain"] == alone.draw(1)["retain"]  # nobody else's rows change for it


def test_clreg_draws_forgotten_rows_to_where_the_never_seen_lie(tmp_path: Path) -> None:
    data, cosines = tiny.Data(COUNTS), {}
    made = clreg(views="never_seen", weight=4.0, detach_positive=True)
    assert isinstance(made, Term)
    assert made.gathered == {"negative", "never_seen"}
    run = tiny.Run(tmp_path, [made, nll("retain")], data=data, schedule={"steps": 12}, optimiser={"lr": 1e-2}).go()
    for key in ("positive_cosine", "negative_cosine"):
        cosines[key] = [row[f"monitor/clreg/{key}"] for row in run.log]
    gap = [p - n for p, n in zip(cosines["positive_cosine"], cosines["negative_cosine"], strict=True)]
    assert gap[-1] > gap[0] + 0.2
    assert mask("forget", "attended") not in made.needs()
