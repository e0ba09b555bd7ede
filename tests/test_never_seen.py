"""Never-seen rows as a side of training: who reads which, what is refused, the stand-in, whole runs on both tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import small_tagger
import small_world
from excise import artifacts, cli, models, recipe, world, world_tagged
from excise.commands import folders, training
from excise.commands.finetuning import finetune
from excise.commands.measuring import evaluation
from excise.commands.planning import plan
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import objective, preparing, sides
from excise.errors import InputRefused, UsageError
from small_world import SmallWorld
from test_tagging_run import ENCODER, Small

MATCH: dict[str, Any] = {
    "forget": {"quantile": {}}, "retain": {"nll": {}, "anchor": {}}, "regularise": {"latent_match": {}},
}  # fmt: skip
QUICK = {"evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none"}
QUIET = Progress(quiet=True)


def row(side: str, group: int, number: int) -> dict[str, Any]:
    words = f"{side} person {group} fact {number}"
    return {"question": f"What is {words} about?", "answer": f"It is {words} and no other.", "group": f"{side}{group}"}


def write(folder: Path, groups: dict[str, int], each: int = 3) -> dict[str, str]:
    out = {}
    for side, count in groups.items():
        made = [row(side, g, n) for g in range(count) for n in range(each)]
        out[side] = str(small_world.write(folder / f"{side}.jsonl", made))
    return out


def settings(folder: Path, groups: dict[str, int] | None = None, **changes: Any) -> recipe.Recipe:
    data = write(folder, {"forget": 3, "retain": 6, "never_seen": 8} if groups is None else groups)
    values: dict[str, Any] = {"data": {**data, "untouched": 0.2}, "objective": MATCH}
    for key, value in changes.items():
        recipe.put(values, key.split("__"), value)
    return recipe.build(values)


def people(records: Sequence[Any]) -> set[Any]:
    return {r.group for r in records}


# --- whose rows ---------------------------------------------------------------------------------------------------


def test_training_stopping_and_evaluation_share_nobody(tmp_path: Path) -> None:
    own = settings(tmp_path, stop__rule="two_sided")
    given = sides.of(own)
    parts = [people(given.records[side]) for side in ("never_seen_training", "calibration", "never_seen")]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len(set.union(*parts)) == 8
    assert given.sources["never_seen_training"]["rows"] == 12
    measured = evaluation.limited(given.records, own.evaluate)
    assert "never_seen_training" not in measured
    assert people(measured["never_seen"]) == parts[2]


def test_rows_are_set_aside_only_where_a_term_reads_them(tmp_path: Path) -> None:
    plain = sides.of(settings(tmp_path, objective={"forget": {"npo": {}}}))
    assert "never_seen_training" not in plain.records
    assert len(people(plain.records["never_seen"])) == 8
    for name, kind in (("quantile", "forget"), ("anchor", "retain"), ("latent_match", "regularise")):
        own: dict[str, Any] = {"forget": {"npo": {}}, "retain": {}, "regularise": {}}
        given = sides.of(settings(tmp_path, objective={**own, kind: {name: {}}}))
        assert len(people(given.records["never_seen_training"])) == 4, name
    named = sides.of(settings(tmp_path, objective={"forget": {"npo": {}}, "retain": {"kl": {"side": "never_seen"}}}))
    assert len(people(named.records["never_seen"])) == 4  # no term can train on what is measured


def test_a_source_of_its_own_leaves_the_others_alone(tmp_path: Path) -> None:
    more = str(small_world.write(tmp_path / "more.jsonl", [row("more", g, n) for g in range(2) for n in range(3)]))
    given = sides.of(settings(tmp_path, data__never_seen_training=more))
    assert people(given.records["never_seen_training"]) == {"more0", "more1"}
    assert len(people(given.records["never_seen"])) == 8
    assert sides.source_of("never_seen", settings(tmp_path, data__never_seen_training=more).data) == more
    alone = sides.of(settings(tmp_path, data__never_seen=None, data__never_seen_training=more))
    assert "never_seen" not in alone.records
    for side in ("forget", "retain", "never_seen"):
        with pytest.raises(InputRefused, match="too"):
            sides.of(settings(tmp_path, data__never_seen_training=str(tmp_path / f"{side}.jsonl")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__never_seen": None}, "name data.never_seen"),
        ({"data__never_seen_training": 0.0}, "data.never_seen_training: a share of 0"),
        ({"data__never_seen_training": 1.5}, "share"),
    ],
)
def test_no_rows_no_run(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sides.of(settings(tmp_path, **changes))


def test_too_few_people_are_refused(tmp_path: Path) -> None:
    few = {"forget": 3, "retain": 6, "never_seen": 2}
    assert sides.of(settings(tmp_path, few)).records["never_seen_training"]
    with pytest.raises(InputRefused, match="cannot be divided for calibration"):
        sides.of(settings(tmp_path, few, stop__rule="two_sided"))


# --- the stand-in -------------------------------------------------------------------------------------------------

ALONE: dict[str, Any] = {
    "objective": {"forget": {"quantile": {}}},
    "data__never_seen": None,
    "data__never_seen_training": "shuffled",
}


def test_the_stand_in_asks_others_questions_and_says_so(tmp_path: Path) -> None:
    given = sides.of(settings(tmp_path, **ALONE))
    forget, made = given.records["forget"], given.records["never_seen_training"]
    asked = {r.prompt: r.group for r in forget}
    assert [r.completion for r in made] == [r.completion for r in forget]
    assert all(asked[m.prompt] != f.group for m, f in zip(made, forget, strict=True))
    assert any("stand-in" in line for line in given.warnings)
    assert sides.of(settings(tmp_path, **ALONE)).records["never_seen_training"] == made
    assert not any("person" in line for line in given.warnings)  # no text of forget rows


def test_the_stand_in_is_refused_where_it_is_none(tmp_path: Path) -> None:
    for name, kind in (("anchor", "retain"), ("latent_match", "regularise")):
        own = settings(tmp_path, **{**ALONE, "objective": {"forget": {"quantile": {}}, kind: {name: {}}}})
        with pytest.raises(UsageError, match="no stand-in"):
            objective.check_stand_in(objective.terms(own.objective), own.data)
    held = {"forget": {"quantile": {}}, "retain": {"anchor": {"sides": ["retain"]}}, "regularise": {}}
    own = settings(tmp_path, **{**ALONE, "objective": held})
    objective.check_stand_in(objective.terms(own.objective), own.data)
    with pytest.raises(InputRefused, match="one group alone"):
        sides.of(settings(tmp_path, {"forget": 1, "retain": 6}, **ALONE))
    texts = small_world.write(tmp_path / "texts.jsonl", [{"text": f"a text of {n} words or so"} for n in range(3)])
    with pytest.raises(InputRefused, match="no question"):
        sides.of(settings(tmp_path, **ALONE, data__forget=str(texts)))
    tagged = small_tagger.write_rows(tmp_path / "tags.jsonl", small_tagger.sentences(6, groups=2))
    kept = small_tagger.write_rows(tmp_path / "kept.jsonl", small_tagger.sentences(9, seed=5, groups=3))
    named = {"model__task": "token_classification", "data__forget": tagged, "data__retain": kept}
    with pytest.raises(UsageError, match="questions and answers"):
        sides.of(settings(tmp_path, **ALONE, **named))


# --- whole runs ---------------------------------------------------------------------------------------------------


def matching(small: SmallWorld, out: Path, **changes: Any) -> recipe.Recipe:
    own = {"objective": MATCH, "schedule__never_seen_batch": 4, "optimiser__tail": 0.3, **QUICK}
    return small.recipe(out, **{**own, **changes})


def test_a_run_reads_its_part_and_says_what_it_costs(small: SmallWorld, tmp_path: Path) -> None:
    own = matching(small, tmp_path / "run", schedule__steps=3)
    told = plan(own)
    assert {"side": "never_seen", "model": "policy", "layers": [1, 2]} in told["passes"]
    assert any(line.startswith("hidden(never_seen") for line in told["reference"])
    assert any("population/never_seen" in line for line in told["products"])
    run(own, progress=QUIET)
    manifest = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))
    assert {t["name"] for t in manifest["terms"]} == {
        "quantile", "quantile_rows", "nll", "anchor", "anchor_never_seen", "latent_match",
    }  # fmt: skip
    counts = {side: manifest["data"][side]["rows"] for side in ("never_seen", "never_seen_training")}
    assert counts == {"never_seen": 10, "never_seen_training": 10}
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)
    assert prepared.rows.counts["never_seen"] == 10


def test_a_killed_run_goes_on_to_the_same_weights(small: SmallWorld, tmp_path: Path) -> None:
    how = {"schedule__steps": 6, "checkpoint_every": 2, "objective__forget": {"quantile": {"refresh": 2}}}
    run(matching(small, tmp_path / "whole", **how), progress=QUIET)
    own = matching(small, tmp_path / "broken", **how)
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)
    passes = {"left": 9}  # three sides a step

    def stop(module: Any, *_: Any) -> None:
        passes["left"] -= module.training
        if passes["left"] < 0:
            raise KeyboardInterrupt

    prepared.model.register_forward_hook(stop)
    with folders.opened(own, resume=False) as folder, pytest.raises(KeyboardInterrupt):
        training.train_into(prepared, folder, QUIET, stage="unlearn", resume=False)
    assert (tmp_path / "broken" / "checkpoints" / "checkpoint-2" / "constants.safetensors").is_file()
    run(own, resume=True, progress=QUIET)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_shipped_recipe_runs_and_is_refused_without_its_rows(small: SmallWorld, tmp_path: Path) -> None:
    values = recipe.read_yaml("gold-like")
    made = small.values(tmp_path / "run", **QUICK, stop__rule="none", schedule__steps=3)
    for section in ("model", "data", "evaluate"):
        values[section] = made[section]
    values |= {"out": made["out"], "stop": {"rule": "none"}, "schedule": {**values["schedule"], "steps": 3}}
    run(recipe.build(values), progress=QUIET)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["terms"]["quantile"] < log[0]["terms"]["quantile"]
    values["data"] = {**values["data"], "never_seen": None}
    file = tmp_path / "r.yaml"
    file.write_text(recipe.dump(recipe.build({**values, "out": str(tmp_path / "none")})), encoding="utf-8")
    assert cli.main(["run", str(file)]) == 2
    assert not (tmp_path / "none").exists()


def test_the_rule_looks_at_the_end_alone(small: SmallWorld, tmp_path: Path) -> None:
    more = [row("other", g, n) for g in range(3) for n in range(4)]
    own = matching(
        small, tmp_path / "run", schedule__steps=8, stop__rule="two_sided", stop__every=1, stop__after=0.5,
        stop__band=[0.0, 1.0], stop__quality=0.0, stop__patience=99,
        stop__calibration=str(small_world.write(tmp_path / "more.jsonl", more)),
    )  # fmt: skip
    run(own, progress=QUIET)
    seen = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["stopping"]["checks"]
    assert seen[0]["step"] == 5
    with pytest.raises(UsageError, match=r"stop\.after"):
        plan(recipe.changed(own, {"stop.after": 2.0}))


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("tagged")
    made = world_tagged.tagged_world(0, forget=2, retain=4, untouched=1, never_seen=3, stopping=0, sentences=4)
    written = world.write(made, folder / "data")
    models.new_tokenizer(world_tagged.tagged_corpus(made), 400).save_pretrained(folder / "tokenizer")
    finetune(recipe.build({
        "model": {"task": "token_classification", "config": ENCODER, "tokenizer": str(folder / "tokenizer")},
        "data": {"forget": str(written["forget"]), "retain": str(written["retain"]), "untouched": 0},
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": 10, "retain_batch": 8}, "optimiser": {"lr": 3e-3},
        "out": str(folder / "original"),
    }), progress=QUIET)  # fmt: skip
    return Small(folder, {k: v for k, v in written.items() if k != "stopping"})


def test_a_tagger_is_matched_by_type(taggers: Small, tmp_path: Path) -> None:
    """Both tasks: types of entities by themselves, states held and matched as for language models."""
    never = [json.loads(line) for line in taggers.sides["never_seen"].read_text(encoding="utf-8").splitlines()]
    assert len({r.get("group") for r in never}) > 1
    values = taggers.values(tmp_path / "run")
    values["objective"] = {**MATCH, "forget": {"quantile": {"within": "type", "refresh": 2}}}
    values["schedule"] = {"steps": 16, "forget_batch": 8, "retain_batch": 6, "never_seen_batch": 4}
    run(recipe.build(values), progress=QUIET)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert set(log[0]["terms"]) == {"quantile", "nll", "anchor", "anchor_never_seen", "latent_match"}
    assert log[-1]["terms"]["quantile"] < log[0]["terms"]["quantile"]
