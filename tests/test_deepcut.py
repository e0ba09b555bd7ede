"""DeepCUT: both readings against loops, empty contrast, what never counts, directions of the gradient, and its mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

import tiny
from excise.commands.starting.objective import cautions
from excise.errors import UsageError
from excise.forward import View, passes
from excise.objectives import Term
from excise.objectives.class_contrast import Reading, contrast_anchors
from excise.objectives.regularise_class import deepcut
from excise.objectives.retain import nll
from excise.recipe import Objective
from oracles_class import anchors as anchor_values
from oracles_class import cosine

#: O, B-a, I-a, B-b, I-b: what the types are, and what the tags are.
TYPES, TAGS = torch.tensor([0, 1, 1, 2, 2]), torch.arange(5)
FORMS = ["ratio", "full"]
WIDTH = 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_of(
    own: list[int],
    retained: list[int],
    *,
    views: int = 2,
    pooled: bool = False,
    class_map: Tensor = TYPES,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs of the term for given labels, with states drawn at random; pooled rows have two labels each."""
    y, r = torch.tensor(own, dtype=torch.int64), torch.tensor(retained, dtype=torch.int64)
    out: dict[str, Any] = {
        "anchor": normal(len(own), WIDTH, seed=seed),
        "labels": y,
        "contrast": tuple(normal(len(retained), WIDTH, seed=seed + 10 + v) for v in range(views)),
        "contrast_labels": (r,) * views,
        "class_map": class_map,
    }
    if views == 2:
        out["own_view"] = normal(len(own), WIDTH, seed=seed + 1)
    if pooled:
        out |= {"rows": torch.arange(len(own)) // 2, "contrast_rows": (torch.arange(len(retained)) // 2,) * views}
    return out


def counts_of(term: Term, inputs: dict[str, Any]) -> Tensor:
    assert term.counts is not None
    free = [k for k, v in term.inputs.items() if not passes(v if isinstance(v, tuple) else (v,))]
    return term.counts(**{name: inputs[name] for name in free})


def mean(term: Term, inputs: dict[str, Any]) -> float:
    """The term's value as the engine takes it."""
    counts = counts_of(term, inputs)
    return float((term.fn(**inputs).detach() * counts).sum() / (counts.sum() or 1.0))


labels = st.lists(st.sampled_from([0, 1, 2, 3, 4, -100]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    labels, labels, st.sampled_from(FORMS), st.sampled_from(["entity", "all", "pooled"]), st.sampled_from([1, 2]),
    st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_any_labels_agree_with_the_loops(
    own: list, retained: list, form: Any, anchors: Any, views: Any, outside: bool, seed: int
) -> None:
    """Values, what counts, the mean over anchors, and gradients that stay finite, with contrast that may be empty."""
    inputs = given_of(own, retained, views=views, pooled=anchors == "pooled", seed=seed)
    options = {"form": form, "anchors": anchors, "outside": outside, "views": views}
    term = deepcut(**options)
    inputs["anchor"].requires_grad_()
    values, counts = term.fn(**inputs), counts_of(term, inputs)
    expected = anchor_values({**inputs, "anchor": inputs["anchor"].detach()}, {**options, "temperature": 0.1})
    wanted = torch.tensor([0.0 if v is None else v for v in expected], dtype=torch.float64)
    torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-9)
    assert (counts > 0).tolist() == [v is not None for v in expected]
    if anchors == "pooled":
        rows = {r: v for r, v in zip(inputs["rows"].tolist(), expected, strict=True) if v is not None}
        each = list(rows.values())
    else:
        each = [v for v in expected if v is not None]
    assert float(counts.sum()) == pytest.approx(len(each))
    assert mean(term, inputs) == pytest.approx(sum(each) / len(each) if each else 0.0, abs=1e-9)
    values.sum().backward()
    assert torch.isfinite(inputs["anchor"].grad).all()


def test_both_readings_by_hand() -> None:
    """Cosine 1 with its class, 0 and 0.6 with others, tau 0.5."""
    z = torch.tensor([[1.0, 0.0]])
    contrast = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    same = torch.tensor([[True, False, False]])
    ratio, full = (contrast_anchors(z, contrast, same, ~same, None, Reading(form, temperature=0.5)) for form in FORMS)
    assert float(ratio) == pytest.approx(2.0 - 0.6)
    assert float(full) == pytest.approx(math.log(math.exp(2) + math.exp(0) + math.exp(1.2)) - 0.6)


def test_slopes_by_cosine() -> None:
    """Up with the cosine to its own class, down with those to others: each by itself for the ratio, together for full.

    The ratio pulls every other label alike. The full form also spreads them: what is nearest already is let go.
    """
    z, contrast = normal(1, 3, seed=1), normal(5, 3, seed=2).requires_grad_()
    same = torch.tensor([[True, True, False, False, False]])
    cosines = [cosine(z[0].tolist(), r) for r in contrast.tolist()]
    slopes = {}
    for form in FORMS:
        (slope,) = grad(contrast_anchors(z, contrast, same, ~same, None, Reading(form)).sum(), contrast)
        r = contrast.detach()
        size = r.norm(dim=1, keepdim=True)
        uphill = z / z.norm() - torch.tensor(cosines)[:, None] * r / size  # of the cosine, times the size
        slopes[form] = (slope * uphill).sum(1) * size[:, 0] / uphill.square().sum(1) * 0.1  # in units of 1 / tau
    assert (slopes["ratio"][:2] > 0).all()
    assert slopes["ratio"][:2].sum() == pytest.approx(1.0)
    torch.testing.assert_close(slopes["ratio"][2:], torch.full((3,), -1 / 3, dtype=torch.float64))
    mass = [math.exp(s / 0.1) for s in cosines]
    on_own = sum(mass[:2]) / sum(mass)
    assert (slopes["full"][:2] > 0).all()
    assert slopes["full"][:2].sum() == pytest.approx(on_own)
    assert slopes["full"][2:].sum() == pytest.approx(-on_own)
    assert slopes["full"][2 + cosines[2:].index(max(cosines[2:]))] > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_step_raises_the_cosine_to_others_and_lowers_that_to_its_class(form: Any) -> None:
    inputs = given_of([1], [2, 2, 0, 3], views=1)
    z = inputs["anchor"].requires_grad_()
    value = deepcut(form=form, views=1).fn(**inputs)
    (slope,) = grad(value.sum(), z)
    moved = z.detach() - 1e-3 * slope
    before, after = (
        [cosine(x[0].tolist(), r) for r in inputs["contrast"][0].tolist()] for x in (z.detach(), moved)
    )  # fmt: skip
    gap = [sum(c[2:]) / 2 - max(c[:2]) for c in (before, after)]
    assert gap[1] > gap[0]


def test_ratio_is_bounded_below_and_full_by_zero() -> None:
    inputs = given_of([1] * 4, [1, 2, 0, 0, 3])
    for seed in range(20):
        inputs |= {"anchor": normal(4, WIDTH, seed=seed)}
        same = 4  # two tokens of the class in two views
        assert float(deepcut(form="ratio").fn(**inputs).min()) >= -2 / 0.1 + math.log(same)
        assert float(deepcut(form="full").fn(**inputs).min()) >= 0


@pytest.mark.parametrize(("form", "views", "counts"), [("ratio", 1, 0.0), ("ratio", 2, 1.0), ("full", 1, 1.0)])
def test_without_retained_labels_of_its_class(form: Any, views: Any, counts: float) -> None:
    """The second view stands in for them; without one, the ratio has nothing to say and the anchor is left out."""
    inputs, term = given_of([1], [0, 3], views=views), deepcut(form=form, views=views)
    assert counts_of(term, inputs).tolist() == [counts]
    if counts and views == 2:
        own = cosine(inputs["anchor"][0].tolist(), inputs["own_view"][0].tolist()) / 0.1
        others = [cosine(inputs["anchor"][0].tolist(), z) / 0.1 for c in inputs["contrast"] for z in c.tolist()]
        assert float(term.fn(**inputs)) == pytest.approx(own - sum(others) / 4)


def test_the_second_view_of_an_anchor_is_not_read_where_the_batch_has_its_class() -> None:
    inputs = given_of([1, 3], [2, 0])
    value = deepcut().fn(**inputs)
    other = deepcut().fn(**{**inputs, "own_view": normal(2, WIDTH, seed=99)})
    assert value[0] == other[0]
    assert value[1] != other[1]


@pytest.mark.parametrize("form", FORMS)
def test_data_of_one_type_has_o_as_its_only_other_class(form: Any) -> None:
    one = torch.tensor([0, 1, 1])
    inputs = given_of([1, 2, 0], [1, 0, 2, 0], class_map=one)
    assert counts_of(deepcut(form=form), inputs).tolist() == [1.0, 1.0, 0.0]
    without = deepcut(form=form, outside=False)
    assert counts_of(without, inputs).tolist() == [0.0, 0.0, 0.0]
    assert without.fn(**inputs).tolist() == [0.0, 0.0, 0.0]
    assert {k: float(v) for k, v in without.monitor(**inputs).items()} == {  # type: ignore[misc]
        "anchors": 2.0, "skipped": 2.0, "without_same": 0.0, "without_other": 1.0,
    }  # fmt: skip


def test_without_anchors_there_is_no_value_and_still_a_gradient_of_zero() -> None:
    inputs = given_of([0, -100], [1, 0])
    states = [inputs["anchor"].requires_grad_(), *(c.requires_grad_() for c in inputs["contrast"])]
    found = grad(deepcut().fn(**inputs).sum(), states)  # every rank takes part in the backward pass
    assert all(not g.any() for g in found)
    assert {k: float(v) for k, v in deepcut().monitor(**inputs).items()} == {"anchors": 0.0, "skipped": 0.0}  # type: ignore[misc]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("anchors", ["entity", "all", "pooled"])
def test_labels_that_do_not_count_change_nothing(form: Any, anchors: Any) -> None:
    """-100, wherever it stands: as an anchor, in the contrast, and in the mean of a row."""
    pooled = anchors == "pooled"
    inputs = given_of([1, 4, 2, 0], [1, 0, 3, 3], pooled=pooled)
    padded = {**inputs, "labels": torch.cat([inputs["labels"], torch.tensor([-100, -100])])}
    for name in ("anchor", "own_view"):
        padded[name] = torch.cat([inputs[name], normal(2, WIDTH, seed=50)])
    padded["contrast"] = tuple(torch.cat([normal(1, WIDTH, seed=60), c]) for c in inputs["contrast"])
    padded["contrast_labels"] = tuple(torch.cat([torch.tensor([-100]), c]) for c in inputs["contrast_labels"])
    if pooled:
        padded["rows"] = torch.cat([inputs["rows"], torch.tensor([1, 7])])
        padded["contrast_rows"] = tuple(torch.cat([torch.tensor([0]), c]) for c in inputs["contrast_rows"])
    term = deepcut(form=form, anchors=anchors)
    assert mean(term, padded) == pytest.approx(mean(term, inputs), rel=1e-6)
    if not pooled:
        torch.testing.assert_close(term.fn(**padded)[:4], term.fn(**inputs))
        assert counts_of(term, padded)[4:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("anchors", ["entity", "all", "pooled"])
def test_order_of_labels_does_not_matter(anchors: Any) -> None:
    inputs = given_of([1, 4, 2, 0, 3], [1, 0, 3, 3, 2, 0], pooled=anchors == "pooled")
    term, own, other = deepcut(anchors=anchors), torch.tensor([3, 1, 4, 0, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
    turned = {
        k: tuple(t[other] for t in v) if isinstance(v, tuple) else v if k == "class_map" else v[own]
        for k, v in inputs.items()
    }
    torch.testing.assert_close(term.fn(**turned), term.fn(**inputs)[own])


@pytest.mark.parametrize("form", FORMS)
def test_views_that_agree_are_one_view_twice(form: Any) -> None:
    """Every retained label then counts twice in the sum: a constant log 2, and the same gradient."""
    two = given_of([1, 3, 0], [1, 0, 3, 4, 0])
    two["contrast"] = (two["contrast"][0],) * 2
    one = {k: v[:1] if isinstance(v, tuple) else v for k, v in two.items() if k != "own_view"}
    z = two["anchor"].requires_grad_()
    pairs = [(deepcut(form=form, views=2).fn(**two), two), (deepcut(form=form, views=1).fn(**one), one)]
    counted = counts_of(deepcut(form=form), two)
    torch.testing.assert_close(pairs[0][0], pairs[1][0] + math.log(2) * counted)
    torch.testing.assert_close(*(grad(values.sum(), z)[0] for values, _ in pairs))


def test_prefixes_are_classes_where_the_map_says_so() -> None:
    inputs = given_of([1], [2, 0], views=1)
    term = deepcut(views=1)
    assert counts_of(term, inputs).tolist() == [1.0]
    assert counts_of(term, {**inputs, "class_map": TAGS}).tolist() == [0.0]  # I-a is another class than B-a
    assert deepcut(classes="prefixed").inputs["class_map"].detail == "class_map/prefixed"  # type: ignore[union-attr]


def test_retained_states_are_moved_unless_they_are_detached() -> None:
    for detach in (False, True):
        inputs = given_of([1], [2, 0])
        z, r = inputs["anchor"].requires_grad_(), inputs["contrast"][0].requires_grad_()
        found = grad(deepcut(detach_retain=detach).fn(**inputs).sum(), [z, r], allow_unused=True)
        assert found[0] is not None
        assert found[0].abs().sum() > 0
        assert (found[1] is None) is detach


def test_sequences_have_one_anchor_a_row() -> None:
    """The same function: one label each, and no class 0."""
    inputs = given_of([0, 1, 2], [0, 1, 0, 2], class_map=torch.tensor([1, 2, 3]))
    assert counts_of(deepcut(), inputs).tolist() == [1.0, 1.0, 1.0]


def test_what_it_costs_is_what_it_says() -> None:
    """One view: no second run. Two: one block of each side again. Drawn rows: a pass of their own."""
    assert passes(deepcut(views=1).needs()).keys() == {("forget", "policy"), ("retain", "policy")}
    assert not any(wanted.views for wanted in passes(deepcut(views=1).needs()).values())
    for side, wanted in passes(deepcut(contrast="both", layer=3).needs()).items():
        assert list(wanted.views) == [View(side[0], from_layer=2, dropout=0.1)]
    assert {side for side, _ in passes(deepcut(contrast="drawn").needs())} == {"forget", "contrast"}


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({"form": "sum"}, "ratio or full"),
        ({"anchors": "words"}, "'anchors' is 'words'"),
        ({"classes": "bio"}, "'classes' is 'bio'"),
        ({"contrast": "all"}, "'contrast' is 'all'"),
        ({"temperature": 0.0}, "above 0"),
        ({"views": 3}, "use 1 or 2"),
        ({"layer": 0}, "embeddings"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_options_that_it_cannot_work_with_are_refused(options: dict, say: str) -> None:
    with pytest.raises(UsageError, match=say):
        deepcut(**options)


def test_settings_that_failed_before_are_pointed_out() -> None:
    def of(**options: Any) -> list[str]:
        return cautions(Objective({}, {}, {"deepcut": options}))

    assert of() == of(anchors="entity", outside=True) == cautions(Objective()) == []
    assert "anchors: entity" in of(anchors="all")[0]
    assert "anchors: entity" in of(anchors="pooled")[0]
    assert len(of(anchors="all", outside=False)) == 2


# --- in the engine ------------------------------------------------------------------------------------------------

#: Contrast classes of made-up tokens: a third of them are outside, the others of four classes.
MAP = {"class_map/type": torch.arange(tiny.VOCABULARY) % 6 % 5}


def test_the_mean_is_over_the_anchors_of_the_step(tmp_path: Path) -> None:
    """Tokens that are no anchors do not dilute it: what is logged is the loops' mean, whatever share is entities."""
    run = tiny.Run(tmp_path, [deepcut(views=1)], constants=MAP, schedule={"steps": 1})
    draw = run.trainer.plan.draw(0)
    batches = [(side, run.data.batch(side, part.indices)) for side, part in draw.items()]
    term = deepcut(views=1)
    made = tiny.step_of(run.net, *batches, constants=MAP).run(term.needs())
    inputs = {k: tuple(made[p] for p in v) if isinstance(v, tuple) else made[v] for k, v in term.inputs.items()}
    expected = [
        v for v in anchor_values(inputs, {"form": "ratio", "anchors": "entity", "outside": True, "temperature": 0.1})
        if v is not None
    ]  # fmt: skip
    assert 0 < len(expected) < len(inputs["labels"])
    run.go()
    assert run.log[0]["terms/deepcut"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert run.log[0]["monitor/deepcut/anchors"] == len(expected) + run.log[0]["monitor/deepcut/skipped"]


def test_gamma_means_the_same_for_every_batch_size(tmp_path: Path) -> None:
    """The same anchors and contrast twice in a batch: the same mean, where a sum would double."""
    inputs = given_of([1, 3, 0], [1, 0, 3, 4, 0], views=1)
    twice = {k: torch.cat([v, v]) if k in ("anchor", "labels") else v for k, v in inputs.items()}
    diluted = {**twice, "labels": torch.cat([inputs["labels"], torch.zeros(3, dtype=torch.int64)])}
    term = deepcut(views=1)
    assert mean(term, twice) == mean(term, diluted) == pytest.approx(mean(term, inputs), rel=1e-12)


@pytest.mark.parametrize("anchors", ["entity", "pooled"])
def test_accumulated_micro_batches_are_weighted_by_their_anchors(tmp_path: Path, anchors: Any) -> None:
    """Each micro-batch has its own contrast; each anchor of the step counts the same."""
    term = deepcut(views=1, anchors=anchors, form="full")
    run = tiny.Run(
        tmp_path, [term], constants=MAP, schedule={"steps": 1, "accumulate": 3, "forget_batch": 2, "retain_batch": 2}
    )
    total = count = 0.0
    for micro in range(3):
        batches = [(side, run.data.batch(side, d.indices)) for side, d in run.trainer.plan.draw(micro).items()]
        made = tiny.step_of(run.net, *batches, constants=MAP).run(term.needs())
        inputs = {k: tuple(made[p] for p in v) if isinstance(v, tuple) else made[v] for k, v in term.inputs.items()}
        counts = counts_of(term, inputs)
        total, count = total + float((term.fn(**inputs).detach() * counts).sum()), count + float(counts.sum())
    run.go()
    assert run.log[0]["terms/deepcut"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_moves_weights_with_all_that_there_is(tmp_path: Path) -> None:
    """Beside cross-entropy, with drawn contrast and second views; retain-only steps leave the term out."""
    data = tiny.Data({"forget": 6, "retain": 20, "contrast": 20})
    run = tiny.Run(
        tmp_path, [nll(), deepcut(contrast="both", anchors="pooled")], data=data, constants=MAP,
        schedule={"steps": 4, "forget_batch": 3, "contrast_batch": 5, "retain_steps": 1},
    ).go()  # fmt: skip
    assert run.moved() > 1e-4
    assert ["terms/deepcut" in row for row in run.log] == [True, False, True, False]
    assert all("terms/nll" in row for row in run.log)
