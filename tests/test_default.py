"""A run without a recipe file: what is chosen from what is given, what is said of it, and that it runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import small_world
from excise import cli, recipe
from excise.commands.starting import beginning, choosing, defaults, objective, sides
from excise.commands.starting.defaults import Given, choose
from small_world import SmallWorld
from test_never_seen import row

PEOPLE = {"forget": 3, "retain": 6, "never_seen": 8}
LORA = [("model.lora", "{r: 2, target_modules: all-linear}")]


def write(folder: Path, groups: Mapping[str, int], each: int = 3, *, grouped: bool = True, text: bool = False) -> Any:
    """Rows of so many people on each side; the keys that name them."""
    out = [("model.name", "m")]
    for side, count in groups.items():
        made = [row(side, g, n) for g in range(count) for n in range(each)]
        if not grouped:
            made = [{k: v for k, v in r.items() if k != "group"} for r in made]
        if text:
            made = [{"text": f"{r['question']} {r['answer']}"} for r in made]
        out.append((f"data.{side}", str(small_world.write(folder / f"{side}.jsonl", made))))
    return out


def made(folder: Path, more: Any = (), **changes: int) -> recipe.Recipe:
    groups = {side: n for side, n in (PEOPLE | changes).items() if n}
    return choosing.default_recipe([*write(folder, groups), *more])


def names(settings: recipe.Recipe) -> list[str]:
    return [t.name for t in objective.terms(settings.objective)]


# --- facts to a choice --------------------------------------------------------------------------------------------


def every_given() -> list[Given]:
    fields = [f.name for f in dataclasses.fields(Given) if isinstance(f.default, bool)]
    settings = [dict(zip(fields, v, strict=True)) for v in itertools.product((True, False), repeat=len(fields))]
    more = [{"task": "causal_lm"}, {"task": "token_classification"}, {"unshaped": "of this", "untied": "of that"}]
    return [Given(**{**own, **other}) for own in settings for other in more]


def test_every_choice_builds_and_says_why() -> None:
    for given in every_given():
        choice = choose(given)
        built = recipe.load(choice.recipe, (), {**choice.changes, "model.task": given.task})
        assert objective.terms(built.objective)
        assert choice.why[0] == f"no recipe was named: {choice.recipe}, " + choice.why[0].partition(", ")[2]
        assert all(why and "\n" not in why and not why.endswith(".") for why in choice.why)
        lora = {"model.lora": {"r": 2, "target_modules": "all-linear"}} if given.lora else {}
        with_model = recipe.changed(built, {"model.name": "m", **lora})
        if given.task == "causal_lm":  # nothing chosen is refused by what it was chosen for
            beginning.wanted(with_model, objective.terms(built.objective))
            objective.check_stand_in(objective.terms(built.objective), built.data)
            assert not (given.lora and built.edit.reset_rows)
        stops = built.stop.rule != "none"
        assert not stops or (given.calibrates and given.watches)
        said = " ".join(choice.why[1:])
        assert stops or "stopping rule" in said or choice.recipe in ("simnpo-clreg", "gold-like-ner")
        assert (built.data.never_seen_training == "shuffled") == ("stand in" in said)


def test_the_whole_default_says_one_thing_and_changes_nothing() -> None:
    assert dict(choose(Given()).changes) == {}
    assert len(choose(Given()).why) == 1
    assert choose(Given(task="sequence_classification")).recipe == "deepcut"
    assert dict(choose(Given(task="sequence_classification")).changes) == {}


@pytest.mark.parametrize("task", ["token_classification", "sequence_classification"])
def test_a_classifier_beside_models_that_never_saw_the_rows(task: str) -> None:
    """It learns from them, whatever else it is given: it reads no never-seen rows and has no rule."""
    bare = Given(task=task, never_saw=True, never_seen=False, calibrates=False, watches=False)
    for given in (Given(task=task, never_saw=True), bare):
        assert (choose(given).recipe, dict(choose(given).changes)) == ("gold-like-ner", {})
    assert choose(dataclasses.replace(bare, never_saw=False)).recipe == "deepcut"


def test_plain_steps_do_not_pull_weights_to_zero() -> None:
    for given in (Given(lora=True), Given(unshaped="bf16")):
        built = recipe.load("gold-like", (), choose(given).changes)
        assert built.initialise == {}
        assert built.optimiser.weight_decay == 0
        assert built.optimiser.lr == (1e-4 if given.lora else 1e-5)
        assert (built.edit.reset_rows is None) == given.lora
        assert {"quantile", "latent_match"} <= set(names(built))


# --- rows to a choice ---------------------------------------------------------------------------------------------


def test_three_groups_get_the_whole(tmp_path: Path) -> None:
    for people in (3, 8):
        settings = made(tmp_path, never_seen=people)
        assert recipe.changed(settings, {"chosen": [], "model": {}, "data": {}}) == recipe.load("gold-like")
        assert len(settings.chosen) == 1
        given = sides.of(settings)  # what was chosen can be read
        assert {"never_seen_training", "calibration", "watch", "never_seen"} <= set(given.records)


def test_fewer_groups_lose_the_stop_then_the_rest(tmp_path: Path) -> None:
    two = made(tmp_path, never_seen=2)
    assert two.stop.rule == "none"
    assert {"quantile", "latent_match", "anchor_never_seen"} <= set(names(two))
    assert "too few groups" in two.chosen[1]
    assert sides.of(two).records["never_seen_training"]
    one = made(tmp_path, never_seen=1)
    assert one.data.never_seen_training == "shuffled"
    assert names(one) == ["quantile", "quantile_rows", "nll", "anchor"]
    assert "one group" in one.chosen[1]
    assert len(sides.of(one).records["never_seen"]) == 3  # the evaluation keeps them
    few = made(tmp_path, retain=2)
    assert few.stop.rule == "none"
    assert "retained rows are too few" in few.chosen[1]
    assert sides.of(few).records["untouched"]


def test_none_get_the_stand_in(tmp_path: Path) -> None:
    settings = made(tmp_path, never_seen=0)
    assert settings.data.never_seen_training == "shuffled"
    assert settings.stop.rule == "none"
    assert settings.objective.forget["quantile"]["refresh"] == 0
    assert settings.objective.retain["anchor"]["sides"] == ["retain"]
    assert "stand in" in settings.chosen[1]
    assert "no never-seen rows" in settings.chosen[1]
    given = sides.of(settings)
    objective.check_stand_in(objective.terms(settings.objective), settings.data)
    assert len(given.records["never_seen_training"]) == 9


def test_rows_without_groups_are_divided_by_rows(tmp_path: Path) -> None:
    settings = choosing.default_recipe(write(tmp_path, PEOPLE, grouped=False))
    assert settings.stop.rule == "two_sided"
    assert "row by row" in settings.chosen[1]
    assert len(sides.of(settings).records["never_seen_training"]) == 12


def test_texts_without_questions(tmp_path: Path) -> None:
    alone = choosing.default_recipe(write(tmp_path, {"forget": 3, "retain": 6}, text=True))
    assert names(alone) == ["simnpo", "nll", "clreg"]
    assert "not gold-like" in alone.chosen[1]
    assert names(made(tmp_path, never_seen=0, forget=1)) == ["simnpo", "nll", "clreg"]  # one person: nothing to shuffle
    whole = choosing.default_recipe(write(tmp_path, PEOPLE, text=True))
    assert {"quantile", "latent_match"} <= set(names(whole))


def test_sources_of_their_own(tmp_path: Path) -> None:
    more = str(small_world.write(tmp_path / "more.jsonl", [row("more", g, n) for g in range(2) for n in range(3)]))
    keys = [("data.never_seen_training", more)]
    alone = made(tmp_path, keys, never_seen=0)
    assert (alone.data.never_seen_training, alone.stop.rule) == (more, "none")
    assert {"quantile", "latent_match"} <= set(names(alone))
    other = str(small_world.write(tmp_path / "other.jsonl", [row("other", 0, n) for n in range(3)]))
    both = made(tmp_path, [*keys, ("stop.calibration", other)], never_seen=0)
    assert both.stop.rule == "two_sided"
    assert len(sides.of(both).records["calibration"]) == 3
    wanted = made(tmp_path, [("data.never_seen_training", "shuffled")])  # asked for, whatever is given
    assert names(wanted) == ["quantile", "quantile_rows", "nll", "anchor"]


def test_classifiers_get_deepcut(tmp_path: Path) -> None:
    import small_tagger

    def keys(**groups: int) -> Any:
        found = [("model.name", "m"), ("model.task", "token_classification")]
        for seed, (side, n) in enumerate(groups.items()):
            rows = small_tagger.sentences(12, seed=seed, groups=n)
            found.append((f"data.{side}", str(small_tagger.write_rows(tmp_path / f"{side}.jsonl", rows))))
        return found

    whole = choosing.default_recipe(keys(forget=2, retain=6, never_seen=4))
    assert (list(whole.objective.regularise), whole.stop.rule, len(whole.chosen)) == (["deepcut"], "two_sided", 1)
    alone = choosing.default_recipe(keys(forget=2, retain=6))
    assert alone.stop.rule == "none"
    assert "no never-seen rows" in alone.chosen[1]
    assert choosing.default_recipe([*keys(forget=2, retain=6), ("objective.forget", "ga")]).chosen == ()


# --- the keys given on top ----------------------------------------------------------------------------------------


def test_keys_win_over_the_default(tmp_path: Path) -> None:
    keys = [("optimiser.lr", "5e-4"), ("objective.forget.quantile.weight", "8"), ("objective.regularise", "{}"),
            ("stop.rule", "none"), ("edit", "{}"), ("initialise", "{}")]  # fmt: skip
    settings = made(tmp_path, keys)
    assert settings.optimiser.lr == 5e-4
    assert settings.objective.forget["quantile"]["weight"] == 8
    assert settings.objective.forget["quantile"]["refresh"] == 6
    assert (settings.objective.regularise, settings.stop.rule, settings.initialise) == ({}, "none", {})
    assert settings.edit.reset_rows is None


def test_an_adapter_and_other_optimisers(tmp_path: Path) -> None:
    adapter = made(tmp_path, LORA)
    assert (adapter.initialise, adapter.edit.reset_rows, adapter.optimiser.lr) == ({}, None, 1e-4)
    assert "no preconditioned start" in adapter.chosen[1]
    assert "no embedding rows" in adapter.chosen[2]
    started = made(tmp_path, [*LORA, ("initialise.rila.beta", "0.5")])
    assert started.initialise == {"rila": {"beta": 0.5}}
    for keys in ([("optimiser.name", "muon")], [("model.precision", "bf16")], [("model.train_only", "lm_head")]):
        settings = made(tmp_path, keys)
        beginning.wanted(settings, objective.terms(settings.objective))
        assert settings.initialise == {}
        assert settings.optimiser.weight_decay == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("objective.forget", "npo"), ("objective.forget.npo.beta", "0.1"), ("objective", "{forget: {ga: {}}}")],
)
def test_a_method_of_ones_own_is_left_alone(tmp_path: Path, key: str, value: str) -> None:
    settings = made(tmp_path, [(key, value)])
    assert settings == recipe.load(None, [*write(tmp_path, PEOPLE), (key, value)])
    assert settings.chosen == ()


def test_what_cannot_be_read_is_the_runs_to_refuse(tmp_path: Path) -> None:
    keys = [("model.name", "m"), ("data.forget", str(tmp_path / "no.jsonl")), ("data.retain", "r")]
    assert choosing.default_recipe(keys) == recipe.load(None, keys)
    assert choosing.look(recipe.load(None, [("model.name", "m")])) is None


# --- what is said, and what is run --------------------------------------------------------------------------------


def command(small: SmallWorld, out: Path, *without: str) -> list[str]:
    """A run by flags alone, short; the model that knows everybody, and no gold."""
    given = {"--forget": "forget", "--retain": "retain", "--never-seen": "never_seen"}
    flags = [text for flag, side in given.items() if side not in without for text in (flag, str(small.sides[side]))]
    brief = {"schedule.epochs": 2, "model.precision": "fp32", "evaluate.generate": 0, "evaluate.max_rows": 10,
             "evaluate.relearn_steps": "[0, 1]", "evaluate.savings_steps": 0}  # fmt: skip
    keys = [text for key, value in brief.items() for text in (f"--{key}", str(value))]
    return ["run", "--model", str(small.original), *flags, "--out", str(out), *keys]


def _record(out: Path) -> tuple[dict[str, Any], recipe.Recipe]:
    return json.loads((out / "manifest.json").read_text()), recipe.load(str(out / "recipe.yaml"))


def test_a_run_with_never_seen_rows(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people: dict[str, list[Any]] = {}  # two of them were trained on, which nothing here minds
    for r in [*small_world.rows(small.sides["never_seen"]), *small_world.rows(small.sides["untouched"])]:
        people.setdefault(r["group"], []).append(r)
    never = small_world.write(tmp_path / "n.jsonl", [r for rows in people.values() for r in rows])
    out = tmp_path / "run"
    wide = ["--stop.band", "[0.0, 1.0]", "--stop.quality", "0"]  # whatever two epochs come to is admissible
    assert cli.main([*command(small, out, "never_seen"), "--never-seen", str(never), *wide]) == 0
    manifest, settings = _record(out)
    said = capsys.readouterr().err.splitlines()[0]
    assert said == "excise: no recipe was named: gold-like, the default: forgotten rows become like never-seen ones"
    assert settings.chosen == (said.removeprefix("excise: "),)
    assert not set(settings.chosen) & set(manifest["warnings"])
    assert manifest["start"]["name"] == "preconditioned"
    assert {"quantile", "anchor", "latent_match"} <= {t["name"] for t in manifest["terms"]}
    assert manifest["stopping"]["kept"] is not None
    assert set(json.loads((out / "results.json").read_text())["models"]) == {"original", "unlearned"}
    assert cli.main([*command(small, out, "never_seen"), "--never-seen", str(never), *wide, "--resume"]) == 0


def test_a_run_without_them_says_what_it_lost(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(command(small, out, "never_seen")) == 0
    said = capsys.readouterr().err.splitlines()[0]
    manifest, settings = _record(out)
    assert "gold-like" in said
    assert "stand in" in said
    assert settings.chosen[1] in manifest["warnings"]
    assert said == f"excise: {'; '.join(settings.chosen)}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "stand in for them" in page
    assert not any("Where was" in line for line in manifest["warnings"])  # no text of rows


def test_a_plan_says_it_too(small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", *command(small, tmp_path / "no", "never_seen")[1:], "--json"]
    assert cli.main(plan) == 0
    printed = capsys.readouterr()
    assert "gold-like" in printed.err
    assert any("stand in" in line for line in json.loads(printed.out)["warnings"])
    assert not (tmp_path / "no").exists()


def test_a_recipe_that_is_named_is_not_touched(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(small.values()))
    assert cli.main(["plan", str(file)]) == 0
    assert capsys.readouterr().err == ""
    assert recipe.load(str(file)).chosen == ()
    assert recipe.build(small.values()).objective == recipe.Objective()  # the schema's own default is what it was


def test_a_default_that_has_no_place_is_left_out() -> None:
    """No unused token to draw from: an edit that was asked for is refused, a chosen one does nothing and says so."""
    import torch

    from excise.commands.starting import editing
    from excise.errors import InputRefused
    from excise.tasks import causal_lm
    from tokenizers_tiny import word_piece

    tokenizer = word_piece()
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]

    def example(found: list[int]) -> Any:
        return causal_lm.Example(tuple(found), 1)

    rows = sides.Rows({"forget": [example(ids[:5])], "retain": [example(ids[5:])]}, pad_id=0)
    asked = recipe.build({"edit": {"reset_rows": {}}, "model": {"name": "m"}})
    with pytest.raises(InputRefused, match="unused"):
        editing.chosen(asked, ["forget", "retain"], rows, tokenizer)
    found = editing.chosen(recipe.changed(asked, {"chosen": ["why"]}), ["forget", "retain"], rows, tokenizer)
    assert found is not None
    assert len(found.tokens) == len(found.weights) == 0
    assert torch.equal(found.unused, found.unused[:1])


def test_the_default_of_language_models_is_a_recipe_that_ships() -> None:
    assert {defaults.DEFAULT, defaults.WITHOUT, defaults.CLASSES} <= set(recipe.shipped())
