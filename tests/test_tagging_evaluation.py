"""Classifiers through `excise evaluate`, `excise score` and the report: tables, numbers, pictures, words, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import excise
import excise.reporting
import small_tagger as small
from excise import artifacts, recipe
from excise.commands.measuring import cache
from excise.commands.progress import Progress
from excise.errors import InputRefused, UsageError
from excise.metrics import class_scores
from excise.metrics.table import load

QUIET = Progress(quiet=True)


def settings(folder: Path, task: str = "token_classification", **evaluate: Any) -> recipe.Recipe:
    make: Any = small.sentences if task == "token_classification" else small.texts
    files = {
        name: small.write_rows(folder / f"{name}.jsonl", make(n, seed=seed))
        for seed, (name, n) in enumerate({"forget": 6, "retain": 10, "never_seen": 7, "test": 5}.items())
    }
    return recipe.build(
        {
            "model": {"task": task, "name": str(folder / "original"), "precision": "fp32"},
            "data": {
                "forget": files["forget"], "retain": files["retain"], "never_seen": files["never_seen"],
                "untouched": 0.3, "max_length": 40, "utility": {"test": files["test"]},
            },
            "optimiser": {"lr": 5e-3},
            "evaluate": {"gold": str(folder / "gold"), "relearn_steps": [0, 1, 2], **evaluate},
        }
    )  # fmt: skip


def models(folder: Path, task: str = "token_classification") -> None:
    """An original that knows forget and retain rows, a gold that knows the latter, an unlearned one in between."""
    tags = task == "token_classification"
    make: Any = small.sentences if tags else small.texts
    classes = small.TAGS if tags else small.LABELS
    retain, forget = make(10, seed=1), make(6, seed=0)
    small.save(small.taught(small.model(classes), retain + forget), folder / "original")
    small.save(small.taught(small.model(classes), retain), folder / "gold")
    small.save(small.taught(small.model(classes), retain + forget, steps=12), folder / "unlearned")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    models(folder)
    how = settings(folder)
    excise.evaluate(folder / "unlearned", suite="ner", recipe=how, out=folder / "run", progress=QUIET)
    return folder


def test_every_side_has_an_f1_and_the_gold_stands_beside(tagged: Path) -> None:
    results = artifacts.read_results(artifacts.RunFolder(tagged / "run"))
    assert results.task == "token_classification"
    assert set(results.models) == {"original", "gold", "unlearned"}
    for name, numbers in results.models.items():
        sides = {k for k in numbers if k.endswith("_f1") and not k.startswith("relearned")}
        assert sides == {f"{s}_f1" for s in ("forget", "retain", "untouched", "never_seen", "test")}, name
        wanted = {
            "forget_f1_gap", "test_f1_gap", "membership_auc", "entity_membership_auc", "privleak", "forget_probability",
            "retain_probability", "latent_membership_auc", "same_class_neighbours", "own_class_cosine",
            "outside_cosine", "relearned_probability", "relearned_f1", "forget_f1/place",
            "same_class_neighbours/never_seen",
        }  # fmt: skip
        assert wanted <= numbers.keys(), wanted - numbers.keys()
        gap = numbers["forget_f1"].value - results.number("gold", "forget_f1").value  # type: ignore[operator]
        assert numbers["forget_f1_gap"].value == pytest.approx(gap)
        assert numbers["forget_f1_gap"].extra["level"] == 0.9
    assert results.number("original", "forget_f1").value == 1.0
    assert results.number("gold", "forget_f1").value < 0.9  # type: ignore[operator]
    assert results.number("gold", "privleak").value == 0


def test_tables_hold_no_text(tagged: Path) -> None:
    names = {word.encode() for word in small.WORDS if len(word) > 3}
    for path in (tagged / "run" / "tables").rglob("*.safetensors"):
        content = path.read_bytes()
        assert not [word for word in names if word in content]
        assert load(path).classes == small.TAGS
    everything = b"".join(p.read_bytes() for p in (tagged / "run").iterdir() if p.is_file() and p.name != "recipe.yaml")
    assert b"theatre" not in everything


def test_score_reads_the_saved_tables(tagged: Path) -> None:
    found = excise.score(tagged / "run", tagged / "run")
    results = artifacts.read_results(artifacts.RunFolder(tagged / "run"))
    for name in ("forget_f1", "test_f1_gap", "privleak", "entity_membership_auc"):
        assert found[name]["value"] == pytest.approx(results.number("unlearned", name).value)
        assert found[name]["low"] == pytest.approx(results.number("unlearned", name).low)


def test_pictures_have_what_the_report_draws(tagged: Path) -> None:
    pictures = json.loads((tagged / "run" / "pictures.json").read_text())
    models_ = {"original", "gold", "unlearned"}
    for key in ("relearning", "classes", "membership", "map"):
        assert set(pictures[key]["models"]) == models_, key
    assert set(pictures["map"]["models"]["gold"]) == {"forget", "retain", "untouched", "never_seen", "outside"} - {
        "retain"
    }
    assert set(pictures["classes"]["models"]["gold"]) == {"forget", "never_seen", "untouched"}
    for counts in pictures["membership"]["models"].values():
        assert (sum(counts["forget"]), sum(counts["never_seen"])) == (6, 7)
    assert not [line for line in pictures["not_tested"] if "gold" in line]


def test_the_page_says_it_in_words_for_tags(tagged: Path) -> None:
    text = (tagged / "run" / "report.html").read_text("utf-8")
    for words in (
        "Are the tags gone?",
        "Gap to the gold in F1 of entities on forgotten rows",
        "F1, side by side",
        "Where the words lie among their classes",
        "Who looks known",
        "F1 of entities on forgotten rows: work-of-art",
    ):
        assert words in text, words
    for words in ("is better", "answers that it was asked", "Model utility", "erased", "Truth ratio"):
        assert words not in text, words


def test_rebuilding_the_page_needs_no_torch(tagged: Path) -> None:
    import subprocess
    import sys

    code = f"import sys, excise; excise.report({str(tagged / 'run')!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    rows = excise.reporting.summary(tagged / "run")
    assert "F1 of entities on forgotten rows" in [row[0] for row in rows]


def test_the_command_prints_the_numbers_of_the_task(tagged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from excise import terminal

    terminal.run(tagged / "run")
    said = capsys.readouterr().out
    assert "forget_f1" in said
    assert "forget_quality_log10" not in said


def test_measurements_are_kept_and_found_again(tagged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = settings(tagged, cache=str(tagged / "cache"), map="none")
    first: Any = excise.evaluate(tagged / "unlearned", suite="ner", recipe=how, progress=QUIET)
    kept: list[Any] = []
    real = cache.load

    def looked(folder: Path) -> Any:
        kept.append(real(folder))
        return kept[-1]

    monkeypatch.setattr(cache, "load", looked)
    again: Any = excise.evaluate(tagged / "unlearned", suite="ner", recipe=how, progress=QUIET)
    assert len(kept) == 3
    assert all(found is not None for found in kept)
    assert again["models"] == first["models"]
    assert first["task"] == "token_classification"


def test_a_run_forgets_and_counts_what_lacked_its_contrast(tagged: Path) -> None:
    values = recipe.plain(settings(tagged))
    values["objective"] = {"forget": {}, "retain": {"nll": {}}, "regularise": {"deepcut": {"weight": 0.3}}}
    values["schedule"] |= {"steps": 3, "forget_batch": 3, "retain_batch": 3, "retain_steps": 1}
    excise.run(recipe.build(values), out=tagged / "cut", progress=QUIET)
    results = artifacts.read_results(artifacts.RunFolder(tagged / "cut"))
    assert results.number("unlearned", "forget_f1_gap").shown
    found = json.loads((tagged / "cut" / "pictures.json").read_text())["findings"]
    assert {"empty_contrast", "no_anchor"} & {f["code"] for f in found}


def test_texts_with_one_class_each(tmp_path: Path) -> None:
    task = "sequence_classification"
    models(tmp_path, task)
    how = settings(tmp_path, task)
    excise.evaluate(tmp_path / "unlearned", suite="ner", recipe=how, out=tmp_path / "run", progress=QUIET)
    results = artifacts.read_results(artifacts.RunFolder(tmp_path / "run"))
    own = results.models["unlearned"]
    assert {
        "forget_accuracy",
        "test_macro_f1",
        "forget_accuracy_gap",
        "privleak",
        "same_class_neighbours",
    } <= own.keys()
    assert not [name for name in own if name.endswith("_f1") and not name.endswith("macro_f1")]
    assert own["forget_accuracy"].n == 6
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Are the classes gone?" in text
    assert "Accuracy on forgotten rows" in text
    tables = {p.stem: load(p) for p in (tmp_path / "run" / "tables" / "gold").glob("*.safetensors")}
    assert class_scores.task_of(tables) == task
    assert all((np.diff(t.columns["offsets"]) == 1).all() for t in tables.values())


def test_without_a_gold_or_never_seen_rows_nothing_is_guessed(tagged: Path) -> None:
    values = recipe.plain(settings(tagged, gold=None))
    values["data"]["never_seen"] = None
    how = recipe.build(values)
    excise.evaluate(tagged / "unlearned", suite="ner", recipe=how, out=tagged / "alone", progress=QUIET)
    results = artifacts.read_results(artifacts.RunFolder(tagged / "alone"))
    for name in ("forget_f1_gap", "privleak", "membership_auc", "latent_membership_auc"):
        assert not results.number("unlearned", name).shown
    text = (tagged / "alone" / "report.html").read_text("utf-8")
    assert "This run has no gold" in text
    assert "no never-seen rows were" in text


def test_what_does_not_fit_is_refused_before_anything_is_written(tagged: Path) -> None:
    how = settings(tagged)
    small.save(small.model(("O", "B-place", "I-place")), tagged / "poor")
    with pytest.raises(InputRefused, match="lacks 2 of the model's classes"):
        excise.evaluate(tagged / "unlearned", recipe=how, against=tagged / "poor", out=tagged / "no", progress=QUIET)
    asking = settings(tagged, tasks=["wmdp_bio"])
    with pytest.raises(UsageError, match="language models"):
        excise.evaluate(tagged / "unlearned", suite="all", recipe=asking, out=tagged / "no", progress=QUIET)
    values = recipe.plain(how)
    values["model"]["task"] = "causal_lm"
    with pytest.raises(UsageError, match="suite ner"):
        excise.evaluate(tagged / "unlearned", suite="ner", recipe=recipe.build(values), progress=QUIET)
    lm = recipe.plain(how)
    lm["model"]["name"] = str(tagged / "poor")
    config = json.loads((tagged / "poor" / "config.json").read_text())
    (tagged / "poor" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(InputRefused, match="token-classification head"):
        excise.evaluate(tagged / "poor", recipe=recipe.build(lm), out=tagged / "no", progress=QUIET)
    assert not (tagged / "no").exists()
