"""Recipes are strict, forgiving about how numbers are written, and come back from YAML as they went."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from excise import recipe
from excise.errors import UsageError
from excise.recipe import Recipe, build, changed, dump, load, plain, put, read_yaml, shipped

SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": 1}}, r"recipe: unknown key 'optimizer'; did you mean 'optimiser'\?"),
        ({"optimiser": {"learning_rate": 1}}, r"recipe.optimiser: unknown key 'learning_rate'"),
        ({"optimiser": {"warm_up": 1}}, r"recipe.optimiser: unknown key 'warm_up'; did you mean 'warmup'\?"),
        ({"schedule": {"epoch": 1}}, r"recipe.schedule: unknown key 'epoch'; did you mean 'epochs'\?"),
        ({"data": {"forgot": "x"}}, r"recipe.data: unknown key 'forgot'; did you mean 'forget'\?"),
        ({"qqq": 1}, r"recipe: unknown key 'qqq'; known: model, data, objective"),
        ({True: 1}, r"recipe: unknown key 'True'"),
        ({"schedule": 3}, r"recipe.schedule: expected a mapping, found int"),
        ({"schedule": {"steps": "many"}}, r"recipe.schedule.steps: expected int, found 'many'"),
        ({"schedule": {"steps": 2.5}}, r"recipe.schedule.steps: expected int, found 2.5"),
        ({"schedule": {"epochs": True}}, r"recipe.schedule.epochs: expected float, found True"),
        ({"optimiser": {"name": "sgd"}}, r"recipe.optimiser.name: 'sgd' is not one of adamw, muon"),
        ({"optimiser": {"name": ["adamw"]}}, r"recipe.optimiser.name: \['adamw'\] is not one of"),
        ({"optimiser": {"lr": None}}, r"recipe.optimiser.lr: expected float, found None"),
        ({"optimiser": {"lr": [1]}}, r"recipe.optimiser.lr: expected float"),
        ({"data": {"chat": "yes"}}, r"recipe.data.chat: 'yes' is not one of auto, always, never"),
        ({"data": {"truncate": "no"}}, r"recipe.data.truncate: expected bool, found 'no'"),
        ({"data": {"truncate": 1}}, r"recipe.data.truncate: expected bool, found 1"),
        ({"data": {"utility": ["a"]}}, r"recipe.data.utility: expected a mapping, found list"),
        ({"data": {"utility": {"a": None}}}, r"recipe.data.utility.a: expected str, found None"),
        ({"evaluate": {"relearn_steps": [1, "x"]}}, r"recipe.evaluate.relearn_steps\[1\]: expected int, found 'x'"),
        ({"objective": {"forget": 3}}, r"recipe.objective.forget: expected a mapping, found int"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_path(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(values)


@pytest.mark.parametrize("number", ["5e-5", "5E-5", "0.00005", 5e-5, "5.0e-5"])
def test_numbers_as_people_write_them(number: Any) -> None:
    assert build({"optimiser": {"lr": number}}).optimiser.lr == 5e-5
    found = build({"objective": {"forget": {"npo": {"beta": number, "weight": {"start": number}}}}}).objective.forget
    assert found == {"npo": {"beta": 5e-5, "weight": {"start": 5e-5}}}


def test_whole_numbers_stay_whole() -> None:
    made = build({"schedule": {"steps": "1e2", "epochs": 3, "accumulate": 2.0}, "seed": "7"})
    assert (made.schedule.steps, made.schedule.accumulate, made.seed) == (100, 2, 7)
    assert type(made.schedule.steps) is int
    assert type(made.schedule.epochs) is float
    assert type(made.schedule.accumulate) is int


@pytest.mark.parametrize(("value", "kind"), [(0.3, float), ("0.3", float), ("rows.jsonl", str), (1, float)])
def test_a_field_of_two_kinds(value: Any, kind: type) -> None:
    assert type(build({"data": {"untouched": value}}).data.untouched) is kind


def test_single_values_where_lists_or_settings_stand() -> None:
    made = build({"data": {"train": "a.jsonl"}, "evaluate": {"relearn_steps": 4}, "objective": {"forget": "npo"}})
    assert made.data.train == ("a.jsonl",)
    assert made.evaluate.relearn_steps == (4,)
    assert made.objective.forget == {"npo": {}}


def test_empty_sections_and_files_are_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model:\nschedule:\n")
    assert load(str(tmp_path / "r.yaml")) == Recipe()
    (tmp_path / "empty.yaml").write_text("")
    assert load(str(tmp_path / "empty.yaml")) == build({}) == load(None) == Recipe()


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("optimiser: {lr: 1e-3, clip: 2}\nobjective: {forget: {npo: {beta: 0.2}}}\nout: a\n")
    made = load(
        str(file),
        [
            ("optimiser.lr", "5e-5"), ("objective.forget.npo.beta", "0.1"), ("objective.forget.npo.weight", "2"),
            ("evaluate.relearn_steps", "[0, 3]"), ("data.never_seen", "null"), ("data.truncate", "true"),
            ("model.lora", "{r: 4}"), ("out", ""), ("seed", "1"), ("seed", "2"),
        ],
    )  # fmt: skip
    assert (made.optimiser.lr, made.optimiser.clip) == (5e-5, 2.0)
    assert made.objective.forget == {"npo": {"beta": 0.1, "weight": 2}}
    assert made.evaluate.relearn_steps == (0, 3)
    assert made.data.truncate
    assert made.model.lora == {"r": 4}
    assert (made.out, made.seed) == ("", 2)
    with pytest.raises(UsageError, match=r"recipe.optimiser: unknown key 'learning'"):
        load(str(file), [("optimiser.learning", "1")])
    with pytest.raises(UsageError, match=r"recipe.seed: expected int"):
        load(str(file), [("seed.a", "1")])


def test_a_dotted_override_reaches_into_a_term_given_by_name(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("objective: {forget: npo, regularise: {clreg: }}\n")
    made = load(str(file), [("objective.forget.npo.beta", "0.5"), ("objective.regularise.clreg.temperature", "0.9")])
    assert made.objective.forget == {"npo": {"beta": 0.5}}
    assert made.objective.regularise == {"clreg": {"temperature": 0.9}}
    two = load(str(file), [("objective.forget.ga.weight", "0.1")])
    assert two.objective.forget == {"npo": {}, "ga": {"weight": 0.1}}
    deep = load(str(file), [("objective.forget.npo.weight.start", "0"), ("objective.forget.npo.weight.end", "1")])
    assert deep.objective.forget == {"npo": {"weight": {"start": 0, "end": 1}}}


@pytest.mark.parametrize("text", ["[1", "{a: ", "a: b: c", "\t- x", "'"])
def test_an_override_that_is_no_yaml_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"optimiser\.lr"):
        load(None, [("optimiser.lr", text)])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", r"r.yaml:\d: not a YAML file"), ("- a\n", "r.yaml: a recipe is a mapping"), ("x: \x00", "not a YAML")],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a YAML file"):
        load(str(file))


def test_no_code_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("out: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(UsageError, match="not a YAML file"):
        load(str(file))


def test_the_nearest_shipped_recipe_is_named() -> None:
    assert "demo" in shipped()
    with pytest.raises(UsageError, match=r"no recipe 'demoo'; did you mean 'demo'\?"):
        load("demoo")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_come_back(name: str, tmp_path: Path) -> None:
    made = load(name)
    (tmp_path / "again.yaml").write_text(dump(made))
    assert load(str(tmp_path / "again.yaml")) == made
    assert read_yaml(name)


def test_environment_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "/data/rows")
    made = build({"data": {"forget": "${ROWS}/f.jsonl", "utility": {"a": "$ROWS/u.jsonl"}}})
    assert (made.data.forget, made.data.utility) == ("/data/rows/f.jsonl", {"a": "/data/rows/u.jsonl"})


# --- round trips --------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=("Cs", "Cc")), max_size=12)
reals = st.floats(allow_nan=False, allow_infinity=False)
settings_of_terms = st.dictionaries(
    words,
    st.dictionaries(words, reals | st.integers() | st.booleans() | st.none() | st.lists(st.integers())),
    max_size=3,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field of a recipe may have, from its annotation."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(typing.cast(type, kind), **{k: values_of(v) for k, v in hints.items()})
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is dict:
        return settings_of_terms if args[1] is Any else st.dictionaries(words, words, max_size=2)
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if args:
        found = [values_of(a) for a in args if a is not type(None)]
        return st.one_of(*found, *([st.none()] if type(None) in args else []))
    return {int: st.integers(-(2**40), 2**40), float: reals, bool: st.booleans(), str: words, type(None): st.none()}[
        kind
    ]


def a_share_is_no_path(section: Any) -> bool:
    """Whether a share (or a file) is what it looks like: a file called ``1e5`` is beyond the format."""
    shares = [getattr(section, key, 0.0) for key in ("untouched", "never_seen_training", "calibration")]
    return not any(isinstance(share, str) and _is_number(share) for share in shares)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("section", sorted(SECTIONS))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_recipe_comes_back_from_yaml_as_it_went(section: str, data: st.DataObject) -> None:
    value = data.draw(values_of(typing.get_type_hints(Recipe)[section]).filter(a_share_is_no_path))
    made = dataclasses.replace(Recipe(), **{section: value})
    assert build(yaml.safe_load(dump(made))) == made
    assert build(plain(made)) == made


def test_changed_sets_dotted_keys_and_leaves_the_rest() -> None:
    first = build({"objective": {"forget": {"npo": {"beta": 0.1}}}, "data": {"forget": "f"}})
    made = changed(first, {"optimiser.lr": "1e-3", "objective.forget.npo.beta": 0.2, "objective.forget.npo.weight": 3})
    assert made.optimiser.lr == 1e-3
    assert made.objective.forget == {"npo": {"beta": 0.2, "weight": 3}}
    assert made.data == first.data
    assert first.objective.forget == {"npo": {"beta": 0.1}}
    assert changed(first, {}) == first
    with pytest.raises(UsageError, match=r"did you mean 'clip'"):
        changed(first, {"optimiser.clips": 1})


def test_put_makes_the_mappings_on_the_way() -> None:
    values: dict[str, Any] = {"a": None}
    put(values, ["a", "b", "c"], 1)
    put(values, ["d"], 2)
    assert values == {"a": {"b": {"c": 1}}, "d": 2}


def test_sections_are_documented_and_frozen() -> None:
    for kind in (recipe.Model, recipe.Data, recipe.Schedule, recipe.Optimiser, recipe.Evaluate):
        assert kind.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, 1)
    for kind in (recipe.Model, recipe.Data, recipe.Schedule, recipe.Evaluate):
        missing = [f.name for f in dataclasses.fields(kind) if f"{f.name}:" not in (kind.__doc__ or "")]
        assert not missing, f"{kind.__name__}: {missing} have no sentence"
