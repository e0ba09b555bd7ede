"""Which rows a step reads: every forget row once an epoch, the same for any number of ranks and after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise import draws, recipe, schedule
from excise.schedule import Draw, Plan

sizes = st.integers(1, 9)


@st.composite
def plans(draw: st.DrawFn, *, retain: bool = True, steps: bool = False) -> Plan:
    rows = {"forget": draw(st.integers(1, 40))}
    if retain:
        rows["retain"] = draw(st.integers(1, 50))
    how = recipe.Schedule(
        epochs=draw(st.integers(1, 3)),
        steps=draw(st.integers(1, 30)) if steps else None,
        forget_batch=draw(sizes),
        retain_batch=draw(sizes),
        accumulate=draw(st.integers(1, 4)),
        retain_steps=draw(st.integers(0, 2)) if retain else 0,
    )
    return Plan(rows, how, seed=draw(st.integers(0, 2**31)))


def rows_of(plan: Plan, side: str) -> Iterator[list[int]]:
    """Rows of a side, micro-batch by micro-batch."""
    for micro in range(plan.micro_steps):
        draw = plan.draw(micro).get(side)
        yield list(draw.indices) if draw else []


@given(plans())
def test_each_epoch_visits_each_forget_row_once(plan: Plan) -> None:
    cycle = (1 + plan.settings.retain_steps) * plan.settings.accumulate
    forgetting = [rows for m, rows in enumerate(rows_of(plan, "forget")) if m % cycle < plan.settings.accumulate]
    an_epoch = plan.micro_per_epoch
    assert len(forgetting) == an_epoch * plan.settings.epochs
    orders = []
    for epoch in range(int(plan.settings.epochs)):
        part = forgetting[epoch * an_epoch : (epoch + 1) * an_epoch]
        assert sorted(i for rows in part for i in rows) == list(range(plan.rows["forget"]))
        assert max(map(len, part)) - min(map(len, part)) <= 1
        assert max(map(len, part)) <= plan.settings.forget_batch
        orders.append([i for rows in part for i in rows])
        for start in range(0, an_epoch, plan.settings.accumulate):
            assert part[start + plan.settings.accumulate - 1], "the micro-batch that steps must not be empty"
    if plan.rows["forget"] > 10:
        assert len({tuple(order) for order in orders}) == len(orders)


@given(plans(), st.sampled_from([2, 3, 5]))
def test_ranks_share_a_batch_between_them(plan: Plan, world: int) -> None:
    for micro in range(min(plan.micro_steps, 12)):
        whole = plan.draw(micro)
        shares = [plan.draw(micro, rank, world) for rank in range(world)]
        for side, draw in whole.items():
            assert draw.weights == (1.0,) * len(draw.indices)
            own = [share[side] for share in shares]
            assert len({len(d.indices) for d in own}) == 1, "each rank runs the same number of rows"
            real = Counter(i for d in own for i, w in zip(d.indices, d.weights, strict=True) if w)
            assert real == Counter(draw.indices)
            assert {i for d in own for i in d.indices} <= set(draw.indices), "fillers are rows of the same batch"
            assert {w for d in own for w in d.weights} <= {0.0, 1.0}
        assert all(share.keys() == whole.keys() for share in shares)


@given(plans())
def test_the_retain_stream_covers_all_rows_before_it_repeats(plan: Plan) -> None:
    drawn = list(rows_of(plan, "retain"))
    assert {len(rows) for rows in drawn} == {plan.settings.retain_batch}
    stream, count = [i for rows in drawn for i in rows], plan.rows["retain"]
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))


@given(plans(steps=True))
def test_steps_set_the_length(plan: Plan) -> None:
    assert plan.steps == plan.settings.steps
    assert plan.micro_steps == plan.settings.steps * plan.settings.accumulate


@given(plans(), st.randoms())
def test_a_draw_is_a_function_of_its_number(plan: Plan, random: object) -> None:
    """A resumed run asks for later steps only, in a new process: nothing may depend on what was asked before."""
    straight = [plan.draw(m) for m in range(min(plan.micro_steps, 20))]
    order = list(range(len(straight)))
    random.shuffle(order)  # type: ignore[attr-defined]
    draws.order.cache_clear()
    again = Plan(dict(plan.rows), plan.settings, plan.seed)
    for micro in order:
        assert again.draw(micro) == straight[micro]


def test_a_draw_is_the_same_in_another_process() -> None:
    code = (
        "from excise import recipe; from excise.schedule import Plan\n"
        "how = recipe.Schedule(forget_batch=4, retain_batch=3, accumulate=2)\n"
        "plan = Plan({'forget': 11, 'retain': 17}, how, seed=3)\n"
        "print([sorted((s, d.indices) for s, d in plan.draw(m, 1, 2).items()) for m in range(9)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(hash_seed)
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(said) == 1


def environment(hash_seed: str) -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": hash_seed}


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_accumulation_reads_the_same_rows_in_a_step(rows: int, batch: int, parts: int, seed: int) -> None:
    counts = {"forget": rows, "retain": 13}
    whole = Plan(counts, recipe.Schedule(epochs=2, forget_batch=batch * parts, retain_batch=batch * parts), seed)
    split = Plan(counts, recipe.Schedule(epochs=2, forget_batch=batch, retain_batch=batch, accumulate=parts), seed)
    assert whole.steps == split.steps
    for step in range(whole.steps):
        for side in ("forget", "retain"):
            together = [i for p in range(parts) for i in split.draw(step * parts + p).get(side, Draw((), ())).indices]
            assert together == list(whole.draw(step)[side].indices)


@given(plans())
def test_retain_steps_follow_each_step_that_forgets(plan: Plan) -> None:
    cycle = 1 + plan.settings.retain_steps
    for step in range(plan.steps):
        parts = [plan.draw(step * plan.settings.accumulate + p) for p in range(plan.settings.accumulate)]
        assert any("forget" in d for d in parts) is (step % cycle == 0)
        assert all("retain" in d for d in parts)


@given(plans(), st.sampled_from([1, 3]))
def test_aligned_sides_stand_row_by_row_beside_the_forget_rows(plan: Plan, world: int) -> None:
    more = Plan({**plan.rows, **dict.fromkeys(schedule.ALIGNED, plan.rows["forget"])}, plan.settings, plan.seed)
    for micro in range(min(plan.micro_steps, 12)):
        for rank in range(world):
            draw = more.draw(micro, rank, world)
            assert all(draw.get(side) == draw.get("forget") for side in schedule.ALIGNED)
            assert {s: d for s, d in draw.items() if s not in schedule.ALIGNED} == plan.draw(micro, rank, world)


@given(plans(), st.sampled_from([1, 2]))
def test_an_aligned_side_is_there_without_the_forget_rows_themselves(plan: Plan, world: int) -> None:
    """An objective may read the refusals and not the rows: `idk_nll`."""
    both = Plan({**plan.rows, "forget_alternative": plan.rows["forget"]}, plan.settings, plan.seed)
    alone = Plan({"forget_alternative": plan.rows["forget"], "retain": plan.rows["retain"]}, plan.settings, plan.seed)
    assert alone.steps == both.steps
    for micro in range(min(alone.micro_steps, 12)):
        want = both.draw(micro, 0, world)
        want.pop("forget", None)
        assert alone.draw(micro, 0, world) == want


@given(plans(retain=False))
def test_without_retain_rows_there_are_forget_steps_only(plan: Plan) -> None:
    lazy = Plan(plan.rows, recipe.Schedule(**{**vars(plan.settings), "retain_steps": 2}), plan.seed)
    assert lazy.steps == plan.steps  # a step on retain rows that are not read would be empty
    assert [lazy.draw(m) for m in range(plan.micro_steps)] == [plan.draw(m) for m in range(plan.micro_steps)]


@given(plans())
def test_a_further_side_is_a_stream_like_the_retain_rows(plan: Plan) -> None:
    """Terms such as `nll(side="general")` read sets of their own."""
    more = Plan({**plan.rows, "general": 7}, plan.settings, plan.seed)
    drawn = list(rows_of(more, "general"))
    assert {len(rows) for rows in drawn} == {plan.settings.retain_batch}
    stream = [i for rows in drawn for i in rows][:7]
    assert len(set(stream)) == len(stream)
    assert len(stream) < 7 or set(stream) == set(range(7))
    assert list(rows_of(more, "retain")) == list(rows_of(plan, "retain"))
    assert list(rows_of(more, "forget")) == list(rows_of(plan, "forget"))


@settings(max_examples=40)
@given(st.integers(1, 30), sizes, st.integers(1, 3), st.integers(1, 3))
def test_without_forget_rows_epochs_are_those_of_the_retain_rows(
    rows: int, batch: int, accumulate: int, epochs: int
) -> None:
    how = recipe.Schedule(epochs=epochs, retain_batch=batch, accumulate=accumulate, retain_steps=3)
    plan = Plan({"retain": rows}, how, seed=4)
    seen = Counter(i for part in rows_of(plan, "retain") for i in part)
    assert seen == dict.fromkeys(range(rows), epochs)


def test_orders_differ_between_sides_and_seeds() -> None:
    how = recipe.Schedule(epochs=1, forget_batch=20, retain_batch=20)
    first, second = (Plan({"forget": 20, "retain": 20}, how, seed).draw(0) for seed in (0, 1))
    assert first["forget"].indices != first["retain"].indices
    assert first["forget"].indices != second["forget"].indices


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (0.01, 1), (1.5, 6)])
def test_parts_of_an_epoch(epochs: float, steps: int) -> None:
    assert Plan({"forget": 16}, recipe.Schedule(epochs=epochs, forget_batch=4)).steps == steps
