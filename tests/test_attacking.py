"""The suite of attacks from recipe to report: every model, the gold beside, resumed, cached, refused, without text."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attacked
import excise
from excise import recipe
from excise.artifacts import RunFolder
from excise.attacks import ATTACKS, lending, outcome, table
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.commands.measuring import attacking
from excise.commands.measuring.measured import Measured
from excise.commands.progress import Progress
from excise.errors import UsageError
from small_world import SmallWorld, rows

torch.set_num_threads(1)
FEW = {"relearn": {"steps": [0, 1]}, "sample": {"samples": 8, "prompts": 4}, "prompts": {"rows": 4, "shots": 1}}


def evaluated(small: SmallWorld, out: Path | None, model: Path | None = None, **changes: Any) -> Any:
    settings = small.recipe(**{"evaluate__attacks": FEW, "evaluate__max_rows": 8, **changes})
    resume = out is not None and out.exists()
    return excise.evaluate(
        str(model or small.original), suite="attack", recipe=settings, out=out, resume=resume,
        progress=Progress(quiet=True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(Path(evaluated(small, tmp_path_factory.mktemp("attacks") / "out")))


def test_every_model_is_attacked_and_the_gold_stands_beside(folder: RunFolder) -> None:
    results = json.loads(folder.results.read_text())
    numbers = results["models"]["unlearned"]
    for name, budgets in {"relearn": "01", "sample": "1248"}.items():
        for budget in budgets:
            entry = numbers[f"attack/{name}/{budget}"]
            assert entry["n"] == 4
            assert entry["gap"] is not None
            assert entry["gap_low"] <= entry["gap"] <= entry["gap_high"]
            gold = results["models"]["gold"][f"attack/{name}/{budget}"]
            assert "gap" not in gold
            assert entry["gap"] == pytest.approx(entry["value"] - gold["value"], abs=1e-6)
    assert numbers["attack/relearn/0"]["gap"] > 0.1, "the original knows what the gold does not"
    assert numbers["relearned_probability"]["value"] == numbers["attack/relearn/1"]["value"]
    assert {"leak_any", "leak_rate_upper", "leak_score_upper"} <= set(numbers)
    stages = results["seconds"]
    assert all(stages[f"attack {name} {model}"] > 0 for name in FEW for model in ("unlearned", "gold"))
    assert {f"attack {name}" for name in FEW} <= set(results["shares"])


def test_outcomes_lie_row_by_row_and_pictures_are_drawn_from_them(folder: RunFolder) -> None:
    pictures = json.loads(folder.pictures.read_text())
    assert set(pictures["attacks"]) == set(FEW)
    assert not [name for name in pictures["not_shown"] if name.startswith(("leak_", "attack"))]
    assert not any("ampled" in text for text in pictures["not_tested"])
    for name, picture in pictures["attacks"].items():
        assert list(picture["models"]) == ["unlearned", "gold"]
        for model, curve in picture["models"].items():
            own = outcome.load(folder.attack(model, name))
            assert picture["budgets"] == list(own.budgets)
            assert curve["value"] == pytest.approx(np.nanmean(own.values["forget"], axis=1).tolist())
    assert "attacks/gold/sample.safetensors" in json.loads(folder.manifest.read_text())["files"]
    assert not folder.parts.exists()


def test_the_recipe_in_the_folder_names_every_setting(folder: RunFolder) -> None:
    settings = recipe.load(str(folder.recipe)).evaluate.attacks
    assert set(settings) == set(FEW)
    assert settings["sample"]["samples"] == 8
    assert settings["sample"]["top_p"] == 0.9
    assert settings["relearn"]["lr"] == 2e-3, "the run's own rate, where nobody names another"


def test_no_row_is_in_any_file(small: SmallWorld, folder: RunFolder) -> None:
    texts = [row[key] for row in rows(small.sides["forget"]) for key in ("question", "answer") if key in row]
    assert texts
    for path in folder.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [text for text in texts if text.encode() in content], path.name


def test_an_interrupted_suite_goes_on_where_it_was(
    small: SmallWorld, folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []
    own, power_cut = attacking._made, [True]

    def attack(name: str, settings: Any, role: str, *rest: Any) -> Outcome:
        made.append((role, name))
        if power_cut and made[-1] == ("unlearned", "prompts"):
            raise KeyboardInterrupt
        return own(name, settings, role, *rest)

    monkeypatch.setattr(attacking, "_made", attack)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluated(small, out)
    assert made == [(role, name) for role in ("gold", "unlearned") for name in FEW]
    power_cut.clear()
    evaluated(small, out)
    assert made[6:] == [("unlearned", "prompts")], "what was there is not done again"
    again, whole = (json.loads(f.read_text())["models"] for f in (RunFolder(out).results, folder.results))
    for model in whole:
        assert again[model].keys() == whole[model].keys()
        for name, entry in whole[model].items():
            assert again[model][name]["value"] == pytest.approx(entry["value"], abs=1e-6), name


def test_a_shared_gold_is_attacked_once(small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    own = attacking._made

    def counted(name: str, settings: Any, role: str, *rest: Any) -> Outcome:
        made.append(role)
        return own(name, settings, role, *rest)

    monkeypatch.setattr(attacking, "_made", counted)
    only = {"evaluate__attacks": {"prompts": {"rows": 2, "shots": 0}}, "evaluate__cache": str(tmp_path / "cache")}
    first = evaluated(small, None, **only)
    assert made == ["gold", "unlearned"]
    second = evaluated(small, None, **only)
    assert made == ["gold", "unlearned"]
    assert first["models"] == second["models"]
    other = {**only, "evaluate__attacks": {"prompts": {"rows": 3, "shots": 0}}}
    evaluated(small, None, **other)
    assert len(made) == 4, "other settings are another attack"


def test_a_run_makes_the_attacks_that_its_recipe_names(small: SmallWorld, tmp_path: Path) -> None:
    few = {"adapter": {}, "direction": {"layers": [1]}, "quantise": {"bits": ["4"]}}
    settings = small.recipe(
        tmp_path / "run", evaluate__attacks=few, evaluate__latent=False, evaluate__relearn_steps=[],
        evaluate__generate=0, schedule__steps=2,
    )  # fmt: skip
    excise.run(settings, progress=Progress(quiet=True))
    folder = RunFolder(tmp_path / "run")
    kept = {p.relative_to(folder.attacks).as_posix() for p in folder.attacks.rglob("*.safetensors")}
    assert kept == {f"{model}/{name}.safetensors" for model in ("unlearned", "gold") for name in few} | {
        "original/direction.safetensors", "original/quantise.safetensors",
    }  # fmt: skip
    own = outcome.load(folder.attack("unlearned", "direction"))
    assert "moved-1" in own.budgets, "the original's weights were at hand"
    original = outcome.load(folder.attack("original", "direction"))
    assert "moved-1" not in original.budgets
    picture = json.loads(folder.pictures.read_text())["attacks"]["direction"]
    assert next(iter(picture["models"])) == "unlearned"
    assert picture["models"]["original"]["value"][picture["budgets"].index("moved-1")] is None


# Settings


def test_every_attack_has_the_signature_of_the_table() -> None:
    for name, attack in ATTACKS.items():
        own = table.defaults(name)
        given, *settings = inspect.signature(attack).parameters.values()
        assert (given.name, given.annotation, given.default) == ("target", "Target", given.empty)
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in settings)
        assert own == attack.__kwdefaults__
        assert not own.keys() & {field.name for field in dataclasses.fields(Target)}


def test_where_none_is_named_all_are_meant() -> None:
    assert set(attacking.settled(recipe.Recipe())) == set(ATTACKS)
    none = recipe.build({"evaluate": {"relearn_steps": []}})
    assert attacking.planned(none, lambda name: attacked.llama()) is None
    every_run = attacking.planned(recipe.Recipe(), lambda name: attacked.llama())
    assert every_run is not None
    assert set(every_run.settings) == {"relearn", "savings"}
    assert every_run.settings["savings"]["control"], "without a gold, never-seen rows stand beside the forgotten"


def test_the_rate_is_the_attack_s_own_else_relearn_lr_else_the_run_s() -> None:
    def rate(**values: Any) -> float:
        return attacking.settled(recipe.build(values))["relearn"]["lr"]

    assert rate(optimiser={"lr": 0.5}) == 0.5
    assert rate(optimiser={"lr": 0.5}, evaluate={"relearn_lr": 0.25}) == 0.25
    named = {"relearn_lr": 0.25, "attacks": {"relearn": {"lr": 0.125}}}
    assert rate(optimiser={"lr": 0.5}, evaluate=named) == 0.125


@pytest.mark.parametrize(
    ("attacks", "says"),
    [
        ({"smaple": {}}, "unknown attack 'smaple'; did you mean 'sample'"),
        ({"sample": {"sample": 3}}, "unknown setting 'sample'; did you mean 'samples'"),
        ({"sample": {"zzz": 3}}, "unknown setting 'zzz'; known: samples"),
        ({"sample": 3}, "expected a mapping of settings, found int"),
        ({"sample": {"judged_by": "rogue"}}, "unknown judge 'rogue'"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_loads(attacks: Any, says: str, small: SmallWorld) -> None:
    with pytest.raises(UsageError, match=says):
        evaluated(small, None, evaluate__attacks=attacks)


def test_classifiers_are_refused() -> None:
    with pytest.raises(UsageError, match="for language models"):
        attacking.settled(recipe.build({"model": {"task": "token_classification"}}))


def test_original_weights_are_loaded_once_and_only_when_asked_for() -> None:
    loads: list[str] = []

    def load(name: str) -> Any:
        loads.append(name)
        return attacked.llama()

    asked = attacking.planned(recipe.build({"model": {"name": "x"}, "evaluate": {"attacks": {"adapter": {}}}}), load)
    assert asked is not None
    assert not loads
    assert asked.original() is asked.original()
    assert loads == ["x"]
    nameless = attacking.planned(recipe.build({"evaluate": {"attacks": {"adapter": {}}}}), load)
    assert nameless is not None
    assert nameless.original() is None
    adapter = attacking.planned(
        recipe.build({"model": {"name": "y"}, "evaluate": {"attacks": {"adapter": {}}}}),
        lambda _: attacked.lora(attacked.llama()),
    )
    assert adapter is not None
    assert adapter.original() is None


def reasons(role: str, records: Any, name: str, original: Any = None) -> dict[str, str]:
    asked = attacking.Attacks({name: table.defaults(name)}, lambda: original)
    found, out = attacking.attacked(
        role, "m", lambda: (attacked.llama(), attacked.Bytes()), asked, records, recipe.Recipe(), Progress(quiet=True)
    )
    assert not found
    return out


def test_what_cannot_be_attacked_says_why_and_the_rest_goes_on() -> None:
    one = attacked.sides(forget=1, retain=3)
    assert "two forget rows" in reasons("unlearned", one, "relearn")["relearn"]
    assert "needs the original" in reasons("unlearned", one, "adapter")["adapter"]
    assert (
        "nothing was unlearned" in reasons("original", one, "adapter", lending.weights_of(attacked.llama()))["adapter"]
    )
    assert "forget rows" in reasons("unlearned", {"retain": one["retain"]}, "prompts")["prompts"]
    own = Measured({}, not_attacked={"adapter": "why"})
    numbers: dict[str, Any] = {"unlearned": {}}
    pictures: dict[str, Any] = {}
    attacking.judge({"unlearned": own}, numbers, pictures)
    assert pictures == {"not_shown": {"attack/adapter": "why"}}


def test_reading_outcomes_needs_no_torch() -> None:
    code = "import sys, excise.attacks.outcome, excise.attacks, excise.metrics.leakage; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="nothing_else"):
        _ = excise.attacks.nothing_else  # type: ignore[attr-defined]
