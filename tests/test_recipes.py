"""The recipes that ship: each loads and builds its terms, says where every value comes from, and lays over another."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from excise import recipe
from excise.cli import main
from excise.commands.starting import beginning, objective
from excise.errors import UsageError
from excise.objectives import FORGET, RETAIN
from excise.records import Record, check_sides, read_records

RECIPES = Path(recipe.__file__).parents[1] / "recipes"
#: Recipes that name a whole objective: method -> its forget and retain terms.
METHODS = {
    "graddiff": ("ga", "nll"), "npo": ("npo", "nll"), "simnpo": ("simnpo", "nll"), "undial": ("undial", None),
    "pdu": ("pdu", "primal_dual"), "idk-dpo": ("dpo", "nll"), "idk-nll": ("idk_nll", "nll"), "altpo": ("altpo", "nll"),
    "rmu": ("rmu", "rmu_retain"), "ihl": ("ihl", "nll"), "wga": ("wga", "nll"), "satimp": ("satimp", "nll"),
    "ce-u": ("ceu", None), "reverse-gradient": ("ga", "nll"), "relabel": ("relabel", "nll"),
    "random-labels": ("relabel", "nll"), "bad-teacher": ("bad_teacher", "kl"),
    "gold-like-ner": ("distil", "nll"),
}  # fmt: skip
#: Where a value may come from.
SOURCE = re.compile(r"\b(paper|code|ours|hub)\b")


def text_of(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", recipe.shipped())
def test_it_loads_and_its_terms_build(name: str) -> None:
    made = recipe.load(name)
    assert objective.terms(made.objective)
    for term in objective.terms(made.objective):
        assert term.weight is not None
    assert objective.cited(made.objective, objective.terms(made.objective))[0]["citation"]


@pytest.mark.parametrize("name", recipe.shipped())
def test_its_start_can_be_made_of_its_adapter(name: str) -> None:
    made = recipe.load(name)
    wanted = beginning.wanted(made, objective.terms(made.objective))
    assert (wanted.shaper or wanted.start).name == next(iter(made.initialise), "plain")
    assert wanted.start.moves is (bool(made.initialise) and wanted.shaper is None)


def test_the_published_settings_of_the_starts() -> None:
    for name, beta, rank, rows, rate in (("tofu-phi", 0.7, 32, 32, 1e-4), ("wmdp-zephyr", 0.5, 32, 32, 1e-5)):
        made = recipe.load(f"reglu-{name}")
        assert made.initialise == {"rila": {"beta": beta}}
        assert made.statistics.preset == "official"
        assert made.objective.regularise["rol"] == {"k": 128, "normalise": "paper", "layers": "all", "weight": 0.5}
        assert made.model.lora is not None
        assert (made.model.lora["r"], made.model.lora["lora_alpha"]) == (rank, 2 * rank)
        assert (made.schedule.forget_batch * made.schedule.accumulate, made.optimiser.lr) == (rows, rate)
    assert list(recipe.load("reglu-tofu-phi").objective.forget) == ["ihl"]
    assert list(recipe.load("reglu-wmdp-zephyr").objective.forget) == ["ga"]
    for name in ("fila", "vila"):
        assert list(recipe.load(f"ihl-{name}").initialise) == [name]
        assert list(recipe.load(f"ihl-{name}").objective.forget) == ["ihl"]


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_search_space_names_terms_of_the_objective(name: str) -> None:
    """`put` would make a term that a space names and the objective does not have: a second method, unseen."""
    made = recipe.load(name)
    for key in made.tune.space:
        changed = recipe.changed(made, {key: 1})
        assert len(objective.terms(changed.objective)) == len(objective.terms(made.objective)), key


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_first_line_says_what_it_is(name: str) -> None:
    first = text_of(name).splitlines()[0]
    assert first.startswith("# ")
    assert 30 < len(first) <= 120
    assert first.endswith(".")


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == recipe.shipped()
    assert set(METHODS) | {"demo", "simnpo-clreg", "tofu-llama-3.1-8b", "muse-news-llama-2-7b"} <= set(listed)


def values(node: yaml.Node, above: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """For every value of a file, the lines (from 0) of its own key and of the keys that it stands under."""
    if not isinstance(node, yaml.MappingNode):
        yield above
        return
    if not node.value:  # `retain: {}` is a value too
        yield above
    for key, inner in node.value:
        yield from values(inner, (*above, key.start_mark.line))


def unsourced(text: str) -> list[int]:
    """Lines of values that no comment says the source of: beside the key or its parents, or right above one of them."""
    lines = text.splitlines()
    if "very value" in "".join(lines[:2]) and SOURCE.search("".join(lines[:2])):
        return []

    def comment(line: int) -> str:
        found = [lines[line].partition("#")[2]]
        while line and lines[line - 1].lstrip().startswith("#"):
            line -= 1
            found.append(lines[line])
        # The head of a file is about the file, not about the key below it.
        return " ".join(found) if line else found[0]

    node = yaml.compose(text)
    assert node is not None
    return [keys[-1] + 1 for keys in values(node) if not any(SOURCE.search(comment(line)) for line in keys)]


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_value_says_where_it_comes_from(name: str) -> None:
    assert unsourced(text_of(name)) == []


def test_the_search_for_sources_finds_what_has_none() -> None:
    text = "# code, all of it.\na: 1\nb:  # ours\n  c: 2\nd:\n  # paper: so\n  e: 3\n  f: {}\n"
    assert unsourced(text) == [2, 8]
    assert unsourced("# Every value: ours.\na: 1\n") == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete_and_stands_alone(name: str) -> None:
    """Over another recipe it replaces all three kinds of term, so nothing of the other method is left."""
    forget, retain = METHODS[name]
    made = recipe.load(name)
    assert list(made.objective.forget) == [forget]
    assert list(made.objective.retain) == ([retain] if retain else [])
    assert made.objective.regularise == {}
    assert (made.model.name, made.data) == ("", recipe.Data())
    assert made.tune.space
    written = recipe.read_yaml(name)["objective"]
    assert set(written) == {"forget", "retain", "regularise"}
    assert {forget} <= set(FORGET)
    assert not retain or {retain} <= set(RETAIN)


def test_every_forget_loss_has_a_recipe() -> None:
    ours = {forget for name in ("gold-like", "gold-like-strangers") for forget in recipe.load(name).objective.forget}
    assert {forget for forget, _ in METHODS.values()} | ours == set(FORGET)


@pytest.mark.parametrize("model", [n for n in recipe.shipped() if "llama-" in n])
@pytest.mark.parametrize("method", METHODS)
def test_any_method_on_any_model(model: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"extends: [{model}, {method}]\nseed: 3\n")
    made, start = recipe.load(str(tmp_path / "own.yaml")), recipe.load(model)
    assert made.objective == recipe.load(method).objective
    assert (made.data, made.evaluate, made.model.name, made.seed) == (start.data, start.evaluate, start.model.name, 3)
    assert made.evaluate.gold
    assert made.evaluate.gold != made.model.name


def test_the_models_of_the_papers_by_hub_id() -> None:
    for name, size in {"3.1-8b": "3.1-8B", "3.2-3b": "3.2-3B", "3.2-1b": "3.2-1B"}.items():
        made = recipe.load(f"tofu-llama-{name}")
        assert made.model.name == f"open-unlearning/tofu_Llama-{size}-Instruct_full"
        assert made.evaluate.gold == f"open-unlearning/tofu_Llama-{size}-Instruct_retain90"
        assert {"simnpo", "clreg"} <= {t.name for t in objective.terms(made.objective)}
    assert recipe.load("tofu-llama-3.1-8b-lora").model.lora
    assert recipe.load("tofu-llama-3.1-8b-lora").optimiser.lr == 1e-4


# --- extends ------------------------------------------------------------------------------------------------------


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_fields_are_laid_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        a="optimiser: {lr: 1, warmup: 0.5}\nobjective: {forget: {npo: {beta: 0.2}}}\nseed: 1\n",
        b="optimiser: {lr: 2, decay: cosine}\ndata: {utility: {x: x.jsonl}}\n",
        c="extends: [a.yaml, b.yaml]\noptimiser: {clip: 3}\nobjective: {forget: ga}\ndata: {utility: {y: y.jsonl}}\n",
    )
    made = recipe.load("c.yaml", [("optimiser.clip", "4")])
    own = made.optimiser
    assert (own.lr, own.warmup, own.decay, own.clip) == (2, 0.5, "cosine", 4)
    assert made.objective.forget == {"ga": {}}, "a field is replaced whole"
    assert made.data.utility == {"y": "y.jsonl"}
    assert made.seed == 1
    assert recipe.read_yaml("a.yaml")["optimiser"] == {"lr": 1, "warmup": 0.5}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "extends: a.yaml\n"}, r"a.yaml: extends: a.yaml -> a.yaml is a circle"),
        ({"a": "extends: b.yaml\n", "b": "extends: [npo, a.yaml]\n"}, r"a.yaml -> b.yaml -> a.yaml is a circle"),
        ({"a": "extends: {npo: 1}\n"}, "a.yaml: extends: give the name of a recipe"),
        ({"a": "extends: [1]\n"}, "a.yaml: extends: give the name of a recipe"),
        ({"a": "extends: npoo\n"}, "no recipe 'npoo'; did you mean 'npo'?"),
    ],
)
def test_circles_and_other_mistakes_are_refused(
    texts: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **texts)
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        recipe.load("a.yaml")


def test_the_same_recipe_twice_is_no_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="extends: [graddiff, npo]\n")  # both extend preset-tofu
    assert list(recipe.load("a.yaml").objective.forget) == ["npo"]


# --- what the recipes read from the hub ---------------------------------------------------------------------------


def test_the_columns_of_tofu(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's configs are these files; a table fills absent columns with None and adds option1 to option4."""
    tofu = shared / "data" / "tofu"

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tofu / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def load(path: str, config: str, *, split: str) -> list[dict[str, Any]]:
        assert path == "locuslab/TOFU"
        found = rows({"holdout10": "forget01"}.get(config, config))  # no copy of the hold-out rows is at hand
        part = re.fullmatch(r"train(?:\[(\d*):(\d*)\])?", split)
        assert part
        found = found[int(part[1] or 0) : int(part[2]) if part[2] else None]
        columns = {key for row in found for key in row} | {"option1", "paraphrased_question"}
        return [{key: row.get(key) for key in columns} for row in found]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    made = recipe.load("tofu-llama-3.2-1b")
    data, tuning = made.data, made.tune.data
    forget, retain = read_records(data.forget), read_records(data.retain)
    untouched = read_records(str(data.untouched))
    assert (len(forget), len(retain), len(untouched)) == (400, 3200, 400)
    first = rows("forget10_perturbed")[0]
    paraphrases = ((first["paraphrased_question"], first["paraphrased_answer"]),)
    false = tuple(first["perturbed_answer"])
    assert forget[0] == Record(first["question"], first["answer"], paraphrases=paraphrases, false_answers=false, line=1)
    assert all(len(r.false_answers) == 5 and len(r.paraphrases) == 1 for r in [*forget, *untouched])
    facts = {name: read_records(source) for name, source in data.utility.items()}
    assert {name: len(found) for name, found in facts.items()} == {"real_authors": 100, "world_facts": 117}
    assert all(r.false_answers for found in facts.values() for r in found)
    # The rows that are measured as untouched are not trained on, and the search forgets rows that the gold knows.
    assert not any("untouched" in w for w in check_sides(forget, {"retain": retain, "untouched": untouched}))
    searched = {side: read_records(tuning[side]) for side in ("forget", "retain")}
    assert {side: len(found) for side, found in searched.items()} == {"forget": 200, "retain": 3000}
    check_sides(searched["forget"], {"retain": searched["retain"], "untouched": untouched})
    assert len(read_records(str(data.never_seen))) == 40


@pytest.mark.parametrize("name", ["hub:a/b:c:train[5:10]", "hub:a/b:c:train[:10%]+test[90%:]", "hub:a/b::s[1:]"])
def test_a_split_may_be_a_slice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(_path: str, _config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append(split)
        return [{"text": "t"}]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_records(name) == [Record(None, "t", line=1)]
    assert asked == [name.split(":", 3)[3]]
    with pytest.raises(UsageError, match="write hub:"):
        read_records("hub:a/b:c:d:e")
