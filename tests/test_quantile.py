"""Forgetting by matching: what the population is, both directions of the loss, and taking it again over a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from excise import population, train
from excise.commands.starting import objective
from excise.errors import UsageError
from excise.forward import AMONG, Anatomy, Step, among, label_count, labels, seq_logp, token_logp
from excise.forward import population as named
from excise.objectives.forget_quantile import quantile, to_quantiles
from excise.objectives.retain import nll
from excise.objectives.term import Term
from excise.objectives.value import value_of
from oracles_gold import matched

COUNTS = {"forget": 8, "retain": 8, "never_seen": 9}
numbers = st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=12)


def take(net: Any, data: tiny.Data, *products: Any, rows: int = 4) -> dict[str, dict[str, Tensor]]:
    return population.take(
        net, Anatomy.of(net), products, data.counts, data.batch, autocast=lambda: train.autocast("fp32"),
        batch_rows=rows,
    )  # fmt: skip


def term(**options: Any) -> Term:
    made = quantile(**options)
    assert isinstance(made, Term)
    return made


def both(**options: Any) -> tuple[Term, ...]:
    made = quantile(**options)
    assert isinstance(made, tuple)
    return made


# --- the loss -----------------------------------------------------------------------------------------------------


@given(numbers, numbers, st.floats(0.1, 5))
def test_levels_and_quantiles_agree_with_the_loops(own: list[float], target: list[float], delta: float) -> None:
    aim = torch.tensor(sorted(target), dtype=torch.float64)
    values = torch.tensor(own, dtype=torch.float64)
    expected = matched(own, own, sorted(target), delta)
    found = to_quantiles(values, values, aim, delta=delta).tolist()
    assert found == pytest.approx(expected, abs=1e-9)


@given(numbers)
def test_a_set_is_matched_to_itself(own: list[float]) -> None:
    values = torch.tensor(own)
    # Equal values share a level and hit the middle of their own quantiles, whatever the order.
    assert float(to_quantiles(values, values, values.sort().values, delta=1.0).max()) == pytest.approx(0, abs=1e-9)


@given(numbers, st.floats(0.5, 8))
def test_with_a_small_delta_it_is_the_wasserstein_distance(own: list[float], shift: float) -> None:
    values = torch.tensor(own, dtype=torch.float64)
    delta = 1e-4
    loss = to_quantiles(values, values, values.sort().values + shift, delta=delta).mean() / delta
    assert float(loss) == pytest.approx(shift, abs=1e-3)


def test_the_gradient_has_two_sides() -> None:
    values = torch.tensor([-0.1, -20.0], requires_grad=True)
    to_quantiles(values, values, torch.tensor([-6.0, -5.0]), delta=1.0).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, -1.0]  # too likely goes down, too unlikely comes up


def test_types_are_matched_by_themselves_and_strangers_do_not_count() -> None:
    made = term(within="type")
    logp = torch.tensor([-1.0, -9.0, -3.0, -5.0])
    classes, kinds = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 1, 1, 2])
    aim = {"tokens": torch.tensor([-9.0, -2.0, -1.0]), "labels": torch.tensor([1, 0, 2])}
    own = {"logp": logp, "classes": classes, "among": logp, "among_classes": classes, "kinds": kinds, "target": aim}
    assert made.fn(**own).tolist() == [0.0, 0.0, 0.0, 0.0]  # -1 and -9 are theirs; O and the type 2 are left out
    assert made.counts is not None
    free = {k: own[k] for k in ("classes", "among_classes", "kinds", "target")}
    assert made.counts(**free).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_words_outside_of_entities_are_matched_by_themselves() -> None:
    """O is a kind like a type: of two forgotten O's the less likely goes to where a never-seen one was wrong."""
    types, outside = both(within="class")
    logp = torch.tensor([-0.1, -9.0, -0.2, -5.0])
    classes, kinds = torch.tensor([0, 1, 0, 3]), torch.tensor([0, 1, 1, 2])
    aim = {"tokens": torch.tensor([-9.0, -3.0, -0.1]), "labels": torch.tensor([1, 0, 0])}
    own = {"logp": logp, "classes": classes, "among": logp, "among_classes": classes, "kinds": kinds, "target": aim}
    free = {k: own[k] for k in ("classes", "among_classes", "kinds", "target")}
    for made, counts, distances in (
        (types, [0, 1, 0, 0], [0, 0, 0, 0]),
        (outside, [1, 0, 1, 0], [0, 0, 2.3, 0]),  # -0.2 is the lower of the two and goes to -3: 2.8 less half of delta
        (term(within="outside"), [1, 0, 1, 0], [0, 0, 2.3, 0]),
    ):
        assert made.fn(**own).tolist() == pytest.approx(distances)
        assert made.counts(**free).tolist() == counts
    assert [types.name, outside.name] == ["quantile", "quantile_outside"]


# --- the population -----------------------------------------------------------------------------------------------


def by_hand(net: Any, data: tiny.Data, side: str) -> tuple[list[float], list[float]]:
    """Log-probabilities of all answer tokens and their row means, from whole logits, a row at a time."""
    tokens, rows = [], []
    for row in data.rows[side]:
        with torch.no_grad():
            scores = net(input_ids=row[None]).logits[0].double().log_softmax(-1)
        own = [float(scores[i - 1, row[i]]) for i in range(3, len(row))]
        tokens += own
        rows.append(sum(own) / len(own))
    return sorted(tokens), sorted(rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_population_is_that_of_all_rows(kind: str) -> None:
    net, data = tiny.model(kind).train(), tiny.Data(COUNTS)
    before, asked = tiny.weights(net), named("likelihood", "never_seen")
    found = take(net, data, asked)[str(asked.detail)]
    assert net.training
    assert tiny.apart(before, tiny.weights(net)) == 0
    tokens, rows = by_hand(net.eval(), data, "never_seen")
    assert found["tokens"].tolist() == pytest.approx(tokens, abs=1e-4)
    assert found["rows"].tolist() == pytest.approx(rows, abs=1e-4)
    again = take(net, data, asked, rows=2)[str(asked.detail)]
    torch.testing.assert_close(again["tokens"], found["tokens"], rtol=1e-5, atol=1e-5)
    assert len(found["labels"]) == len(tokens)


def test_what_is_read_among_all_is_the_same_without_gradient() -> None:
    net, data = tiny.model(), tiny.Data(COUNTS)
    needs = [token_logp("forget"), seq_logp("forget"), label_count("forget"), labels("forget")]
    made = tiny.step_of(net, ("forget", data.batch("forget", range(4)))).run([*needs, *map(among, needs)])
    for product in needs:
        assert torch.equal(made[product], made[among(product)])
        assert not made[among(product)].requires_grad
        assert among(product).detail == AMONG


def test_nothing_is_lost_where_the_forgotten_are_the_never_seen() -> None:
    data = tiny.Data(COUNTS)
    data.rows["never_seen"], data.counts["never_seen"] = data.rows["forget"], COUNTS["forget"]
    net = tiny.model()
    for made in both():
        constants = take(net, data, made.inputs["target"])
        step = tiny.step_of(net, ("forget", data.batch("forget", range(8))), constants=constants)
        values = value_of(made, step.run(made.needs()))
        assert float(values.detach().max()) == pytest.approx(0, abs=1e-8)


# --- in a run -----------------------------------------------------------------------------------------------------


def mean_nll(net: Any, data: tiny.Data, side: str) -> float:
    product = token_logp(side)
    with torch.no_grad():
        step = tiny.step_of(net, (side, data.batch(side, range(data.counts[side]))))
        return -float(step.run([product])[product].mean())


@pytest.mark.parametrize("way", ["down", "up"])
def test_likelihoods_meet_from_either_side(way: str, tmp_path: Path) -> None:
    """Rows that were learned become less likely, rows that were pushed away more so, both as likely as the others."""
    data = tiny.Data(COUNTS)
    start = nll("forget") if way == "down" else Term(
        "ga", lambda logp: logp, {"logp": token_logp("forget")}, over="forget", per="token"
    )  # fmt: skip
    steps = {"steps": 40 if way == "down" else 12, "forget_batch": 8}
    taught = tiny.Run(tmp_path / "a", [start], data=data, schedule=steps).go()
    before = mean_nll(taught.net, data, "forget") - mean_nll(taught.net, data, "never_seen")
    assert (before < -2) if way == "down" else (before > 2)
    terms = [*both(), nll("retain")]
    run = tiny.Run(
        tmp_path / "b", terms, net=taught.net, data=data, schedule={"steps": 60, "forget_batch": 8},
        optimiser={"lr": 3e-3},
    ).go()  # fmt: skip
    aim = run.trainer.constants[str(named("likelihood", "never_seen").detail)]["tokens"]
    assert abs(mean_nll(run.net, data, "forget") + float(aim.mean())) < 0.15 * abs(before)
    assert run.log[-1]["terms/quantile"] < 0.2 * run.log[0]["terms/quantile"]
    assert run.log[-1]["monitor/quantile/never_seen_nll"] == pytest.approx(-float(aim.mean()))


def test_a_fixed_population_stays_and_one_that_is_taken_again_moves(tmp_path: Path) -> None:
    for refresh in (0, 2):
        run = tiny.Run(tmp_path / str(refresh), [term(level="token", refresh=refresh)], data=tiny.Data(COUNTS))
        name = str(named("likelihood", "never_seen", every=refresh).detail)
        first = run.trainer.constants[name]["tokens"].clone()
        run.go()
        last = run.trainer.constants[name]["tokens"]
        assert torch.equal(first, last) is (refresh == 0)
        seen = [row["monitor/quantile/never_seen_nll"] for row in run.log]
        assert len(set(seen)) == (1 if refresh == 0 else 2)  # steps 1 and 2, then 3 and 4
        if refresh:
            now = take(run.net, run.data, named("likelihood", "never_seen", every=refresh))[name]["tokens"]
            torch.testing.assert_close(last, now, rtol=1e-5, atol=1e-5)


def test_taken_again_of_a_few_rows_all_have_their_turn(tmp_path: Path) -> None:
    """Looks after steps 2, 4 and 6 read three rows each of nine; after step 4 the aim is what the second three are."""
    data, asked = tiny.Data(COUNTS), named("likelihood", "never_seen", every=2, rows=3)
    turns = [list(population.looked_at(population.named(asked), 9, step)) for step in (2, 4, 6)]
    assert [len(rows) for rows in turns] == [3, 3, 3]
    assert sorted(row for rows in turns for row in rows) == list(range(9))
    run = tiny.Run(tmp_path, [term(level="token", refresh=2, refresh_rows=3)], data=data).go()
    with torch.no_grad():
        made = Step(run.net, Anatomy.of(run.net), {"never_seen": data.batch("never_seen", turns[1])})
        expected = made.run([token_logp("never_seen")])[token_logp("never_seen")].sort().values
    aim = run.trainer.constants[str(asked.detail)]["tokens"]
    torch.testing.assert_close(aim, expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_with_the_population_that_it_had(tmp_path: Path) -> None:
    terms, data = [*both(refresh=2), nll("retain")], tiny.Data(COUNTS)
    whole = tiny.Run(tmp_path / "whole", terms, data=data, schedule={"steps": 5}, checkpoint_every=3).go()
    part = tiny.Run(
        tmp_path / "part", terms, data=data, schedule={"steps": 5}, checkpoint_every=3, should_stop=lambda s: s >= 3
    ).go()
    again = tiny.Run(tmp_path / "part", terms, data=data, schedule={"steps": 5}, checkpoint_every=3).resume()
    assert tiny.apart(part.weights, whole.weights) > 0
    assert tiny.apart(again.weights, whole.weights) == 0
    name = str(named("likelihood", "never_seen", every=2).detail)
    assert torch.equal(again.trainer.constants[name]["tokens"], whole.trainer.constants[name]["tokens"])


def test_never_seen_rows_cost_no_pass_in_a_step() -> None:
    made = [*both(), nll("retain")]
    assert objective.sides_read(made) == ["forget", "retain"]
    assert objective.populations_read(made) == ["never_seen"]
    assert objective.reads_never_seen(made)
    assert not objective.reads_never_seen([nll("retain")])


@pytest.mark.parametrize(
    "options",
    [
        {"level": "word"}, {"within": "tag"}, {"delta": 0.0}, {"delta": math.inf}, {"refresh": -1}, {"refresh": 1.5},
        {"refresh": True}, {"within": "type", "level": "row"}, {"within": "outside", "level": "row"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="quantile"):
        quantile(**options)
