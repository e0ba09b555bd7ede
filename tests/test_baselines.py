"""Baselines of classifiers: what relabelling draws, what a bad teacher says, and the study's KGA, SISA and splits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from excise import recipe
from excise.commands.starting import objective
from excise.errors import UsageError
from excise.forward import Batch, Step, row_numbers
from excise.objectives import FORGET
from excise.objectives.forget_class import bad_teacher_tokens, drawn, outside_tokens, random_tokens
from excise.records import Record

sys.path[:0] = [str(Path(__file__).parents[1] / "studies" / own) for own in ("deepcut", "")]
twin: Any = __import__("twin")
kga: Any = __import__("kga")
sisa: Any = __import__("sisa")
splits: Any = __import__("splits")
pooled: Any = __import__("pooled")


def places(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.arange(rows).repeat_interleave(length)
    return row, torch.arange(length).repeat(rows)


# --- relabelling --------------------------------------------------------------------------------------------------


def test_a_drawn_class_is_another_one_and_all_others_are_as_likely() -> None:
    row, place = places(300, 20)
    labels = torch.full_like(row, 3)
    found = drawn(labels, row, place, torch.tensor(0), 5)
    shares = torch.bincount(found, minlength=5) / len(found)
    assert shares[3] == 0
    assert (shares[[0, 1, 2, 4]] - 0.25).abs().max() < 0.02
    # Neighbours in a row, the same place in neighbouring rows, and the next seed draw independently.
    grid = found.view(300, 20)
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        assert abs(float((a == b).float().mean()) - 0.25) < 0.02
    again = drawn(labels, row, place, torch.tensor(1), 5)
    assert abs(float((again == found).float().mean()) - 0.25) < 0.02


def test_a_row_keeps_its_targets_in_any_batch() -> None:
    row, place = places(6, 3)
    labels = torch.arange(18) % 4
    whole = drawn(labels, row, place, torch.tensor(2), 4)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    part = order[:7]
    assert torch.equal(drawn(labels[part], row[part], place[part], torch.tensor(2), 4), whole[part])


def test_two_classes_leave_one_choice() -> None:
    row, place = places(4, 2)
    labels = torch.tensor([0, 1] * 4)
    assert torch.equal(drawn(labels, row, place, torch.tensor(5), 2), 1 - labels)


def test_labels_that_do_not_count_are_never_read() -> None:
    labels, at = torch.tensor([1, -100]), torch.arange(2)
    z = torch.zeros(2, 3, requires_grad=True)
    made = (
        outside_tokens(z, labels, torch.tensor([0, 1, 1]), only_entities=True),
        random_tokens(z, labels, at, at, torch.tensor(0), None),
    )
    for values in made:
        (slope,) = torch.autograd.grad(values.sum(), z, retain_graph=True)
        assert values[0] > 0
        assert values[1] == 0
        assert slope[1].abs().sum() == 0


def test_without_o_there_is_nothing_to_relabel_to() -> None:
    with pytest.raises(UsageError, match=r"\Arelabel: no class is O: use to: random\Z"):
        outside_tokens(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1, 2]), only_entities=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("relabel", {"to": "inside"}), ("relabel", {"labels": "some"}), ("bad_teacher", {"spread": -0.1})],
)
def test_options_are_refused_in_one_line(name: str, options: dict) -> None:
    with pytest.raises(UsageError, match=rf"\A{name}: option '{next(iter(options))}' [^\n]+\Z"):
        FORGET[name](**options)


def test_row_numbers_are_those_of_the_side() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), mask, indices=(7, 2))
    step = Step(torch.nn.Identity(), None, {"forget": batch})  # type: ignore[arg-type]
    assert step.run([row_numbers("forget")])[row_numbers("forget")].tolist() == [7, 7, 2]


def test_the_seed_of_the_run_is_a_constant() -> None:
    terms = objective.terms(recipe.Objective({"relabel": {"to": "random", "labels": "all"}}, {}, {}))
    assert int(objective.constants(terms, 4, 9)["seed"]) == 9


# --- the bad teacher ----------------------------------------------------------------------------------------------


def test_the_teacher_is_uniform_without_spread_and_of_the_seed_with_it() -> None:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    h = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    flat = bad_teacher_tokens(z, h, torch.tensor(0), spread=0.0)
    torch.testing.assert_close(flat, -z.log_softmax(-1).mean(-1) - torch.tensor(3.0).log())
    one, same, other = (bad_teacher_tokens(z, h, torch.tensor(seed), spread=1.0) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


# --- KGA ----------------------------------------------------------------------------------------------------------


def test_kga_reads_the_stored_prediction_of_each_label_and_stops_at_sigma(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    said = [torch.randn(n, 3, generator=generator) for n in (2, 4, 1)]
    kga.store(tmp_path / "said.safetensors", said)
    assert load_file(tmp_path / "said.safetensors")["starts"].tolist() == [0, 2, 6, 7]
    z = torch.randn(3, 3, generator=generator)
    rows, at = torch.tensor([1, 1, 2]), torch.tensor([3, 0, 0])
    theirs = torch.stack([said[1][3], said[1][0], said[2][0]])
    expected = sum(
        float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()) for p, q in zip(z, theirs, strict=True)
    )
    for target, sigma in ((expected / 3 + 0.5, 0.1), (expected / 3 + 0.01, 0.5)):
        term = kga.kga(str(tmp_path / "said.safetensors"), target=target, sigma=sigma)
        found = term.fn(logits=z, rows=rows, places=at)
        wanted = max(abs(expected / 3 - target) - sigma * target, 0.0)
        torch.testing.assert_close(found, torch.full((3,), wanted), rtol=1e-4, atol=1e-5)
    assert term.fn(logits=z, rows=rows, places=at).sum() == 0


# --- SISA ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_trained_again_from_the_first_slice_that_was_hit() -> None:
    plan = sisa.stages(30, set(), shards=3, slices=2, seed=4)
    assert sorted(row for s in plan if s.slice == 1 for row in s.rows) == list(range(30))
    assert not any(s.again for s in plan)
    later = set(plan[3].rows) - set(plan[2].rows)  # second slice of the second shard
    hit = sisa.stages(30, {min(later)}, shards=3, slices=2, seed=4)
    assert [s.again for s in hit] == [False, False, False, True, False, False]
    assert min(later) not in hit[3].rows
    first = sisa.stages(30, {plan[2].rows[0]}, shards=3, slices=2, seed=4)
    assert [s.again for s in first] == [False, False, True, True, False, False]
    assert [s.rows for s in first if not s.again] == [s.rows for s, f in zip(plan, first, strict=True) if not f.again]


def test_each_shard_takes_as_many_steps_as_a_whole_model() -> None:
    plan = sisa.stages(120, set(), shards=3, slices=2)
    seen = sum(len(s.rows) * sisa.epochs(8, shards=3, slices=2) for s in plan if s.shard == 0)
    assert seen == 8 * 120


def test_logits_are_averaged() -> None:
    rows = [[torch.tensor([[1.0, 3.0]])], [torch.tensor([[3.0, -1.0]])]]
    assert sisa.averaged(rows)[0].tolist() == [[2.0, 1.0]]


# --- pooled gaps --------------------------------------------------------------------------------------------------


def run_of(value: float, below: float, above: float, *, n: int = 10) -> dict[str, Any]:
    """A row of the study whose run reports this gap."""
    own = {"value": value, "low": value - below, "high": value + above, "n": n}
    return {"name": "one", "metrics": {"unlearned": {"forget_f1_gap": own}}}


def test_runs_count_alike_and_their_intervals_add_up() -> None:
    """Beside a bootstrap of made-up sentences, drawn within each run."""
    draw, runs, ends = np.random.default_rng(0), [], []
    for centre in (0.3, -0.1, 0.05):
        sentences = draw.normal(centre, 0.5, 200)
        means = sentences[draw.integers(0, 200, (4000, 200))].mean(1)
        low, high = np.quantile(means, [0.05, 0.95])
        runs.append(run_of(sentences.mean(), sentences.mean() - low, high - sentences.mean(), n=200))
        ends.append(means)
    found = pooled.gap(runs)
    low, high = np.quantile(np.mean(ends, axis=0), [0.05, 0.95])
    assert found.value == pytest.approx(np.mean([r["metrics"]["unlearned"]["forget_f1_gap"]["value"] for r in runs]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)
    assert found.rows == 600
    own = runs[0]["metrics"]["unlearned"]["forget_f1_gap"]
    assert pooled.gap(runs[:1])[:3] == pytest.approx((own["value"], own["low"], own["high"]))


def test_what_was_not_shown_is_not_pooled() -> None:
    assert pooled.gap([]) is None
    assert pooled.gap([run_of(0.1, 0.1, 0.1), {"metrics": {"unlearned": {}}}]) is None
    assert pooled.gap([run_of(0.1, 0.1, 0.1)], "test") is None
    assert pooled.nearer([run_of(0.1, 0.1, 0.1)], []) is None


def test_nearer_goes_by_size_whatever_the_sign() -> None:
    near, far = run_of(-0.01, 0.02, 0.03), run_of(-0.2, 0.05, 0.04)
    value, low, high = pooled.nearer([near], [far])
    assert value == pytest.approx(-0.19)
    assert low < value < high < 0
    assert pooled.nearer([far], [near])[0] == pytest.approx(0.19)
    assert pooled.nearer([far], [run_of(0.2, 0.04, 0.05)])[0] == pytest.approx(0.0)
    # An interval that holds 0 begins at 0 without its sign, and ends at its longer arm.
    assert pooled.nearer([near], [far])[1] == pytest.approx(-0.19 - np.hypot(0.01, 0.05))


def test_a_row_comes_back_from_its_line(tmp_path: Path) -> None:
    rows = [run_of(0.1, 0.2, 0.3), {"name": "umlaut", "text": "Ä"}]
    twin.write(tmp_path / "new" / "twin.json", rows)
    assert list(twin.read(tmp_path / "new" / "twin.json").values()) == rows
    assert len((tmp_path / "new" / "twin.json").read_text().splitlines()) == 4
    assert twin.read(tmp_path / "none.json") == {}


# --- splits -------------------------------------------------------------------------------------------------------


def made_up(count: int) -> list[Record]:
    return [Record(None, str(i), tokens=(str(i),), tags=("B-x" if i % 2 else "O",)) for i in range(count)]


def test_draws_do_not_overlap_each_other_or_the_rows_that_are_tuned_on() -> None:
    train = made_up(200)

    def rows(*names: str) -> list[int]:
        return [i for name in names for i in splits.chosen(train, name, lambda: np.zeros((0, 2)))]

    for share in ("05", "10"):
        found = rows(splits.TUNE, *(f"random{share}-{draw}" for draw in range(3)))
        assert len(found) == len(set(found)) == 10 + 3 * 200 * int(share) // 100
    ten = rows(*(f"random01-{draw}" for draw in range(10)))
    assert len(ten) == len(set(ten)) == 20
    assert all(train[i].tags == ("B-x",) for i in rows("type-x"))


def test_training_and_unseen_sentences_have_entities_as_often_and_none_is_on_both_sides() -> None:
    train, unseen = splits.divided(made_up(1000), 240, lambda r: r.tags[0] != "O")
    assert (len(train), len(unseen)) == (240, 80)
    assert not {r.completion for r in train} & {r.completion for r in unseen}
    for part in (train, unseen):
        assert sum(r.tags[0] != "O" for r in part) == 0.75 * len(part)


def test_a_cluster_is_of_rows_that_are_near_each_other() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8))
    vectors[50:75] = rng.normal(size=8) * 10 + rng.normal(size=(25, 8)) * 0.05
    found = splits.nearest_cluster(vectors, 20)
    assert len(found) == len(set(found)) == 20
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit[found] @ unit[found].T).mean() > (unit @ unit.T).mean() + 0.1


def test_no_sentence_of_the_real_data_is_on_two_sides(shared: Path) -> None:
    del shared
    for name in splits.TAGGED:
        made = splits.sides(name, splits.Limits())
        shares = [made.pop(side) for side in ("aimed_at", "judged_by")]
        texts = [r.completion for rows in made.values() for r in rows]
        assert len(texts) == len(set(texts)), name
        # An objective that reads never-seen rows shares the stopping rule's with it: no row is read by both.
        assert sorted(r.completion for own in shares for r in own) == sorted(r.completion for r in made["calibration"])
        assert len(made["train"]) <= 1200
        assert abs(len(made["never_seen"]) - len(made["calibration"])) <= 1


def test_the_shipped_row_has_the_values_of_the_recipe() -> None:
    rows: Any = __import__("rows")
    made = recipe.load("deepcut")
    assert recipe.changed(made, rows.AS_SHIPPED) == made
    names = [row.name for row in rows.whole()]
    assert len(names) == len(set(names))
    for method in rows.METHODS.values():
        # Each has four trials, or takes the choice of a method that had them.
        assert len(rows.METHODS[method.tuned_as].trials if method.tuned_as else method.trials) == 4
        assert not (method.tuned_as and method.trials)
        keys = {k for trial in method.trials for k in trial if "kga" not in k}
        added = {f"{term}.weight" for term in method.changes}  # terms that the recipe lacks, alone or as a field
        added |= {f"{k}.{term}.weight" for k, own in method.changes.items() if isinstance(own, dict) for term in own}
        keys -= {"objective.retain"}  # which term holds the rest: none of a search space's numbers
        assert keys <= {"optimiser.lr", *recipe.load(method.recipe).tune.space, *added}, method.recipe
