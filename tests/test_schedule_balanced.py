"""Composition of batches: balanced by class, with rows that only contrast, or as natural as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise import draws, recipe
from excise.draws import Groups, distinct
from excise.errors import UsageError
from excise.schedule import Draw, Plan

sizes = st.integers(1, 9)
classes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=40)


def plan_of(
    own: Sequence[tuple[int, ...]], *, forget: int = 7, drawn: bool = True, seed: int = 0, **more: object
) -> Plan:
    how = recipe.Schedule(**{"epochs": 2, "forget_batch": 3, "retain_batch": 4, **more})  # type: ignore[arg-type]
    rows = {"forget": forget, "retain": len(own)} | ({"contrast": len(own)} if drawn else {})
    return Plan({k: v for k, v in rows.items() if v}, how, seed, {"retain": own})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any mixture of the settings that go together."""
    mixed = draw(st.booleans())
    drawn = draw(st.booleans())
    balance = draw(st.sampled_from(["none", "contrast"] if mixed else ["none", "contrast", "classes"]))
    return plan_of(
        draw(classes), forget=draw(st.integers(1, 20)), drawn=drawn, seed=draw(st.integers(0, 2**31)), mixed=mixed,
        balance=balance, contrast_batch=draw(sizes) if drawn else 0, retain_batch=draw(sizes), forget_batch=draw(sizes),
        accumulate=draw(st.integers(1, 3)), retain_steps=0 if mixed else draw(st.integers(0, 2)),
    )  # fmt: skip


def groups_of(own: Sequence[tuple[int, ...]]) -> dict[int, list[int]]:
    """Rows of each class; 0 are those without one."""
    out: dict[int, list[int]] = {}
    for row, given_ in enumerate(own):
        for name in set(given_) or {0}:
            out.setdefault(name, []).append(row)
    return out


def occurrences(rows: Sequence[int], groups: dict[int, list[int]]) -> dict[int, int]:
    return {name: len(set(rows) & set(members)) for name, members in groups.items()}


@given(classes, st.integers(1, 30), st.integers(0, 50), st.integers(0, 99))
def test_every_class_is_in_its_share_of_a_draw(own: list, size: int, turn: int, seed: int) -> None:
    groups = groups_of(own)
    rows = Groups.of(own).draw(turn, size, seed=seed, name="retain")
    assert len(set(rows)) == len(rows) == min(size, len(own))
    for name, count in occurrences(rows, groups).items():
        assert count >= min(len(groups[name]), size // len(groups)), name


@given(st.integers(2, 5), st.integers(1, 20), st.integers(0, 9), st.integers(0, 99))
def test_rows_of_one_class_each_are_drawn_evenly(kinds: int, size: int, turn: int, seed: int) -> None:
    """However rare a class is: here the first has a hundred times the rows of the last."""
    own = [(1,)] * 2000 + [(k,) for k in range(2, kinds + 1) for _ in range(20)]
    counts = occurrences(Groups.of(own).draw(turn, size, seed=seed, name="retain"), groups_of(own)).values()
    assert max(counts) - min(counts) <= 1


def test_balanced_draws_come_round_to_every_row() -> None:
    """Of one class each: the draws of an epoch of the largest class use all its rows, none twice."""
    own = [(1,)] * 12 + [(2,)] * 6
    drawn = Counter(i for turn in range(6) for i in Groups.of(own).draw(turn, 4, seed=3, name="retain"))
    assert drawn == {**dict.fromkeys(range(12), 1), **dict.fromkeys(range(12, 18), 2)}


@given(st.integers(1, 20), st.integers(0, 60), st.sets(st.integers(0, 19)), st.integers(0, 99))
def test_distinct_brings_every_row_once_and_some_last(count: int, start: int, last: set, seed: int) -> None:
    rows = list(distinct(count, seed, "contrast", start, last))
    assert sorted(rows) == list(range(count))
    held = [row in last for row in rows]
    assert held == sorted(held)


@settings(max_examples=60)
@given(plans(), st.sampled_from([2, 3]))
def test_ranks_share_a_batch_between_them(plan: Plan, world: int) -> None:
    for micro in range(min(plan.micro_steps, 8)):
        whole, shares = plan.draw(micro), [plan.draw(micro, rank, world) for rank in range(world)]
        assert all(share.keys() == whole.keys() for share in shares)
        for side, draw in whole.items():
            real = Counter(
                i for share in shares for i, w in zip(share[side].indices, share[side].weights, strict=True) if w
            )
            assert real == Counter(draw.indices)
            assert len({len(share[side].indices) for share in shares}) == 1


@settings(max_examples=60)
@given(plans(), st.randoms())
def test_a_draw_is_a_function_of_its_number(plan: Plan, random: object) -> None:
    straight = [plan.draw(m) for m in range(min(plan.micro_steps, 20))]
    late = list(range(len(straight)))
    random.shuffle(late)  # type: ignore[attr-defined]
    draws.order.cache_clear()
    again = Plan(dict(plan.rows), plan.settings, plan.seed, plan.classes)
    for micro in late:
        assert again.draw(micro) == straight[micro]


@settings(max_examples=60)
@given(plans())
def test_each_epoch_still_visits_each_forget_row_once(plan: Plan) -> None:
    cycle = (1 + plan.settings.retain_steps) * plan.settings.accumulate
    forgetting = [m for m in range(plan.micro_steps) if m % cycle < plan.settings.accumulate]
    assert len(forgetting) == plan.micro_per_epoch * plan.settings.epochs
    for epoch in range(int(plan.settings.epochs)):
        micros = forgetting[epoch * plan.micro_per_epoch : (epoch + 1) * plan.micro_per_epoch]
        seen = Counter(i for m in micros for i in plan.draw(m).get("forget", Draw((), ())).indices)
        assert seen == dict.fromkeys(range(plan.rows["forget"]), 1)


@settings(max_examples=60)
@given(plans())
def test_contrast_stands_beside_forget_rows_and_none_twice(plan: Plan) -> None:
    """Where the retained rows suffice, none is in a step's retain batch and its contrast both."""
    how = plan.settings
    for step in range(min(plan.steps, 8)):
        parts = [plan.draw(step * how.accumulate + p) for p in range(how.accumulate)]
        contrast = [i for d in parts for i in d.get("contrast", Draw((), ())).indices]
        retain = {i for d in parts for i in d.get("retain", Draw((), ())).indices}
        assert len(set(contrast)) == len(contrast)
        assert all(len(d["contrast"].indices) <= how.contrast_batch for d in parts if "contrast" in d)
        assert all("forget" in d for d in parts if "contrast" in d)
        if "contrast" in plan.rows and "forget" in parts[0]:
            assert contrast
        if how.balance == "none" and len(retain) + how.contrast_batch * how.accumulate <= plan.rows["retain"]:
            assert not retain & set(contrast)
            if all("forget" in d for d in parts):
                assert len(contrast) == how.contrast_batch * how.accumulate


@settings(max_examples=60)
@given(plans())
def test_contrast_changes_nothing_else(plan: Plan) -> None:
    how = recipe.Schedule(**{**vars(plan.settings), "contrast_batch": 0})
    without = Plan({s: n for s, n in plan.rows.items() if s != "contrast"}, how, plan.seed, plan.classes)
    assert without.steps == plan.steps
    for micro in range(min(plan.micro_steps, 12)):
        assert without.draw(micro) == {s: d for s, d in plan.draw(micro).items() if s != "contrast"}


@given(classes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_accumulation_reads_the_same_rows_in_a_step(own: list, batch: int, parts: int, seed: int) -> None:
    more = {"balance": "classes", "forget_batch": 2, "seed": seed}
    whole = plan_of(own, retain_batch=batch * parts, contrast_batch=2 * parts, **more | {"forget_batch": 2 * parts})
    cut = plan_of(own, retain_batch=batch, contrast_batch=2, accumulate=parts, forget=2 * parts * 3, **more)
    whole = Plan({**whole.rows, "forget": 2 * parts * 3}, whole.settings, seed, whole.classes)
    for step in range(min(whole.steps, 6)):
        for side in ("forget", "retain", "contrast"):
            together = [i for p in range(parts) for i in cut.draw(step * parts + p).get(side, Draw((), ())).indices]
            assert together == list(whole.draw(step).get(side, Draw((), ())).indices)


@given(st.integers(1, 30), st.integers(1, 60), sizes, sizes, st.integers(0, 99))
def test_natural_batches_are_one_shuffled_stream(forget: int, retain: int, few: int, more: int, seed: int) -> None:
    how = recipe.Schedule(epochs=1, forget_batch=few, retain_batch=more, mixed=True)
    plan = Plan({"forget": forget, "retain": retain}, how, seed)
    drawn = [plan.draw(m) for m in range(plan.micro_steps)]
    seen = [(side, i) for d in drawn for side, part in d.items() for i in part.indices]
    assert Counter(seen) == {(s, i): 1 for s, n in plan.rows.items() for i in range(n)}
    counts = [sum(len(part.indices) for part in d.values()) for d in drawn]
    assert max(counts) <= few + more
    assert max(counts) - min(counts) <= 1


def test_most_natural_batches_have_no_forget_row_when_few_are_forgotten() -> None:
    """At 1 % and 32 rows: 0.99^32 = 72 %; what the laboratory notes call the reason to pair the sides."""
    plan = Plan({"forget": 10, "retain": 990}, recipe.Schedule(epochs=20, mixed=True), seed=1)
    without = sum("forget" not in plan.draw(m) for m in range(plan.micro_steps)) / plan.micro_steps
    assert 0.66 < without < 0.79


def test_aligned_rows_follow_the_forget_rows_of_natural_batches() -> None:
    how = recipe.Schedule(epochs=1, forget_batch=3, retain_batch=3, mixed=True)
    plan = Plan({"forget": 6, "forget_alternative": 6, "retain": 9}, how, seed=2)
    assert all(d.get("forget") == d.get("forget_alternative") for d in map(plan.draw, range(plan.micro_steps)))


def test_training_on_the_retained_rows_alone_is_left_as_it_is() -> None:
    """The original and the gold are trained with the same recipe: every row once an epoch, whatever is balanced."""
    how = recipe.Schedule(epochs=1, retain_batch=4, balance="classes", contrast_batch=3)
    plan = Plan({"retain": 10}, how, seed=0)
    assert sorted(i for m in range(plan.micro_steps) for i in plan.draw(m)["retain"].indices) == list(range(10))


OWN = [(1,), (2,), ()]


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"mixed": True, "retain_steps": 1}, "mixed"),
        ({"mixed": True, "balance": "classes"}, "mixed"),
        ({"drawn": True, "contrast_batch": 0}, "set schedule.contrast_batch"),
        ({"drawn": False, "contrast_batch": 2}, "no term reads contrast rows"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(more: dict, say: str) -> None:
    with pytest.raises(UsageError, match=say):
        plan_of(OWN, **{"drawn": False, **more})


@pytest.mark.parametrize("balance", ["classes", "contrast"])
def test_balance_needs_the_classes_of_every_row(balance: str) -> None:
    how = recipe.Schedule(balance=balance, contrast_batch=2)  # type: ignore[arg-type]
    for given_ in ({}, {"retain": OWN[:2]}):
        with pytest.raises(UsageError, match="classes of each retain row"):
            Plan({"forget": 3, "retain": 3, "contrast": 3}, how, 0, given_)
