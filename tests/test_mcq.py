"""Multiple choice: the local task against an oracle, names and intervals, refusals, no network, no text left behind."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import excise
import oracle_mcq
import small_world
import tiny
from excise import artifacts, cli, models, recipe
from excise.commands.measuring.findings import findings
from excise.commands.progress import Progress
from excise.errors import InputRefused, UsageError
from excise.metrics import catalogue, mcq
from excise.metrics.statistics import wilson
from excise.records import Question, as_record, check_sides, read_questions, read_records

SUBJECTS = {"colours": ("red", "green", "blue", "white"), "animals": ("cat", "owl", "ant", "eel")}
CANARIES = ("qwyzzle", "vrumpkin")

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="LM-EVAL ABSENT: pip install 'excise[mcq]'"
)


def rows_of(count: int, *, canary: str = "thing") -> list[dict[str, Any]]:
    """Questions of two subjects, of four choices each."""
    made = []
    for number in range(count):
        subject = ("colours", "animals")[number % 2]
        words = SUBJECTS[subject]
        choices = [f"{words[(number + i) % 4]} {canary} {i}" for i in range(4)]
        question = f"Which {canary} {number} is it?"
        made.append({"subject": subject, "question": question, "choices": choices, "answer": number * 7 % 4})
    return made


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models with a tokenizer, and a file of questions."""
    folder = tmp_path_factory.mktemp("mcq")
    rows = rows_of(22)
    tokenizer = models.new_tokenizer([oracle_mcq.prompt(row) for row in rows], 300)
    for seed, name in enumerate(("original", "gold", "changed")):
        torch.manual_seed(seed)
        net = tiny.model("llama", seed=seed, max_position_embeddings=128)
        net.resize_token_embeddings(len(tokenizer))
        with torch.no_grad():  # far apart answers: ties would hide a mistake
            net.get_input_embeddings().weight.normal_(0, 0.5)
        models.save(net, tokenizer, folder / name)
    small_world.write(folder / "quiz.jsonl", rows)
    return {path.name: path for path in folder.iterdir()}


def _loaded(places: dict[str, Path], name: str = "original") -> tuple[Any, Any]:
    return models.load(recipe.Model(name=str(places[name]))), models.load_tokenizer(str(places[name]))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_question_becomes_the_prompt_that_the_papers_score(places: dict[str, Path]) -> None:
    rows = small_world.rows(places["quiz.jsonl"])
    questions = read_questions(str(places["quiz.jsonl"]))
    assert [q.prompt for q in questions] == [oracle_mcq.prompt(row) for row in rows]
    assert [(q.subject, q.answer, q.line) for q in questions[:2]] == [("colours", 0, 1), ("animals", 3, 2)]
    records = read_records(str(places["quiz.jsonl"]))
    assert records == [as_record(q) for q in questions]
    assert [(r.completion, r.false_answers) for r in records[:2]] == [("A", ("B", "C", "D")), ("D", ("A", "B", "C"))]
    assert check_sides(records[:4], {"retain": records[4:]}) is not None


def test_letters_and_fewer_choices(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["this", "that", "both"], "answer": " c "}
    made = read_questions(str(small_world.write(tmp_path / "q.jsonl", [row])))[0]
    assert (made.answer, made.letters, made.subject) == (2, ["A", "B", "C"], None)


def test_an_answer_in_words_is_a_question_and_its_answer(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["this", "that"], "answer": "that one"}
    made = read_records(str(small_world.write(tmp_path / "q.jsonl", [row])))[0]
    assert (made.prompt, made.completion) == ("Which?", "that one")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": ["qwyzzle"]}, "'choices'"),
        ({"choices": "qwyzzle"}, "'choices'"),
        ({"choices": ["qwyzzle", 3]}, "'choices[2]' is a number"),
        ({"answer": 4}, "'answer'"),
        ({"answer": -1}, "'answer'"),
        ({"answer": True}, "'answer'"),
        ({"answer": "qwyzzle"}, "'answer'"),
        ({"answer": "E"}, "'answer'"),
        ({"question": " "}, "'question' is empty"),
        ({"subject": "qwyzzle " * 20}, "'subject'"),
        ({"subject": "a\nqwyzzle"}, "'subject'"),
        ({"subject": 3}, "'subject'"),
    ],
)
def test_broken_questions_are_refused_by_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[1] |= change
    file = small_world.write(tmp_path / "q.jsonl", rows)
    with pytest.raises(InputRefused) as caught:
        read_questions(str(file))
    assert f"{file}:2: field {said}" in str(caught.value)
    assert "qwyzzle" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    file = small_world.write(tmp_path / "q.jsonl", [{"question": "Which?", "answer": 1}])
    with pytest.raises(InputRefused, match=r"q\.jsonl:1: field 'choices' is missing"):
        read_questions(str(file))


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (3, 10), (50, 200), (1, 1)])
def test_wilson_solves_the_score_equation(hits: int, n: int) -> None:
    """Its bounds are where the observed share lies 1.96 standard errors *of the bound* away."""
    low, high = wilson(hits, n)
    share = hits / n
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-5)
    assert all(math.isnan(bound) for bound in wilson(0, 0))


def test_counts_are_pooled_by_question_not_by_task() -> None:
    counts = {"t/a": mcq.Count(1, 1, 0.5), "t/b": mcq.Count(0, 3, 0.25, cut=2), "u": mcq.Count(2, 4, 0.25)}
    found = mcq.numbers(counts, {"t": ("t/a", "t/b"), "u": ("u",)})
    assert list(found) == [f"mcq_accuracy{end}" for end in ("", "/t", "/t/a", "/t/b", "/u")]
    assert {k: (v["value"], v["n"]) for k, v in found.items() if "/t/" not in k} == {
        "mcq_accuracy": (3 / 8, 8), "mcq_accuracy/t": (1 / 4, 4), "mcq_accuracy/u": (0.5, 4),
    }  # fmt: skip
    assert found["mcq_accuracy/t"]["chance"] == pytest.approx((0.5 + 3 * 0.25) / 4)
    assert (found["mcq_accuracy/t"]["cut"], "cut" in found["mcq_accuracy/u"]) == (2, False)
    assert catalogue.find("mcq_accuracy/t/a").title == "Multiple-choice accuracy: t, a"  # type: ignore[union-attr]
    assert all(catalogue.label(name) for name in found)


def test_avoiding_right_answers_is_called_over_forgetting() -> None:
    def number(value: float, n: int = 150) -> dict[str, Any]:
        return {"value": value, "n": n, "chance": 0.25}

    def codes(**models: float) -> list[str]:
        numbers = {name: {"mcq_accuracy/t/a": number(v)} for name, v in models.items()}
        return [f["code"] for f in findings(numbers, [])]

    assert codes(unlearned=0.02, original=1.0) == ["below_chance"]
    assert codes(unlearned=0.02, gold=0.25) == ["below_chance"]
    assert codes(unlearned=0.2, original=1.0) == []
    assert codes(unlearned=0.02, gold=0.02) == []
    many = {f"mcq_accuracy/t/{i}": number(0.17) for i in range(60)}
    assert wilson(round(0.17 * 150), 150)[1] < 0.25, "one alone would be below"
    assert findings({"unlearned": many}, []) == [], "of sixty looked at, some are low by chance"


# --- through the harness ----------------------------------------------------------------------------------------------


@harness
def test_the_local_task_agrees_with_the_oracle(places: dict[str, Path]) -> None:
    net, tokenizer = _loaded(places)
    rows = small_world.rows(places["quiz.jsonl"])
    asked = mcq.load([str(places["quiz.jsonl"])])
    assert asked.members == {"quiz": ("quiz/animals", "quiz/colours")}
    counts = mcq.measure(net, tokenizer, asked, context=128)
    hits = oracle_mcq.correct(net, tokenizer, rows, 128)
    assert 0 < sum(hits) < len(hits), "a case in which a mistake would show"
    for subject in SUBJECTS:
        own = [hit for hit, row in zip(hits, rows, strict=True) if row["subject"] == subject]
        assert (counts[f"quiz/{subject}"].correct, counts[f"quiz/{subject}"].n) == (sum(own), len(own))
        given = [row for row in rows if row["subject"] == subject]
        for instance in asked.parts[f"quiz/{subject}"].instances:
            text, letter = instance.args
            assert text == oracle_mcq.prompt(given[instance.doc_id])
            wanted = oracle_mcq.letter_logp(net, tokenizer, text, letter.strip(), 128)
            assert instance.resps[0][0] == pytest.approx(wanted, abs=1e-4)


@harness
@pytest.mark.parametrize("context", [128, 24])
def test_no_batch_size_changes_an_answer_and_cuts_are_counted(places: dict[str, Path], context: int) -> None:
    net, tokenizer = _loaded(places, "gold")
    rows = small_world.rows(places["quiz.jsonl"])
    asked = mcq.load([str(places["quiz.jsonl"])])
    found = [mcq.measure(net, tokenizer, asked, context=context, batch_tokens=size) for size in (1, 8192)]
    assert found[0] == found[1]
    assert sum(c.correct for c in found[0].values()) == sum(oracle_mcq.correct(net, tokenizer, rows, context))
    long = [len(tokenizer(f"{oracle_mcq.prompt(row)} A")["input_ids"]) > context + 1 for row in rows]
    assert sum(c.cut for c in found[0].values()) == sum(long)
    assert any(long) == (context == 24)


@harness
def test_real_questions_agree_with_the_oracle(shared: Path, tmp_path: Path) -> None:
    net = models.load(recipe.Model(name=str(shared / "models" / "stories260K")))
    tokenizer = models.load_tokenizer(str(shared / "models" / "stories260K"))
    rows = small_world.rows(shared / "data" / "mmlu_subset" / "dev.jsonl")
    asked = mcq.load([str(small_world.write(tmp_path / "few.jsonl", rows))])
    counts = mcq.measure(net, tokenizer, asked, context=512)
    hits = oracle_mcq.correct(net, tokenizer, rows, 512)
    assert {part: c.correct for part, c in counts.items()} == {
        f"few/{s}": sum(h for h, row in zip(hits, rows, strict=True) if row["subject"] == s)
        for s in {row["subject"] for row in rows}
    }
    assert sum(c.n for c in counts.values()) == 75


@harness
def test_model_mode_and_random_state_are_left_alone(places: dict[str, Path]) -> None:
    net, tokenizer = _loaded(places)
    net.train()
    before = tiny.weights(net)
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = (torch.rand(3), np.random.rand())
    torch.manual_seed(5)
    np.random.seed(5)
    level = logging.getLogger("lm_eval").level
    mcq.measure(net, tokenizer, mcq.load([str(places["quiz.jsonl"])]), context=128)
    assert torch.equal(torch.rand(3), wanted[0])
    assert np.random.rand() == wanted[1]
    assert net.training
    assert tiny.apart(before, tiny.weights(net)) == 0
    assert logging.getLogger("lm_eval").level == level


@harness
def test_chance_is_that_of_the_choices(places: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"question": f"Which {i}?", "choices": list("pqrs")[: 2 + 2 * (i % 2)], "answer": 0} for i in range(4)]
    asked = mcq.load([str(small_world.write(tmp_path / "mixed.jsonl", rows))])
    assert asked.chance == {"mixed": pytest.approx((0.5 + 0.25) / 2)}
    net, tokenizer = _loaded(places)
    assert list(mcq.numbers(mcq.measure(net, tokenizer, asked, context=128), asked.members)) == [
        "mcq_accuracy", "mcq_accuracy/mixed",
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------


@harness
def test_the_suite_beside_original_and_gold(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{name: {places['original']}, precision: fp32}}\n")
    quiz, out = str(places["quiz.jsonl"]), tmp_path / "out"
    command = ["evaluate", str(places["changed"]), "--suite", "mcq", "--tasks", quiz, "--recipe", str(file)]
    assert cli.main([*command, "--against", str(places["gold"]), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mcq_accuracy/quiz/animals (n 11, chance 0.25)" in shown
    assert "privleak" not in shown
    found = artifacts.read_results(artifacts.RunFolder(out)).models
    assert list(found) == ["original", "gold", "unlearned"]
    for name, place in (("original", "original"), ("gold", "gold"), ("unlearned", "changed")):
        net, tokenizer = _loaded(places, place)
        hits = oracle_mcq.correct(net, tokenizer, small_world.rows(places["quiz.jsonl"]), 128)
        number = found[name]["mcq_accuracy"]
        assert (number.value, number.n, number.extra) == (pytest.approx(sum(hits) / 22), 22, {"chance": 0.25})
        assert (number.low, number.high) == pytest.approx(wilson(sum(hits), 22))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Multiple-choice accuracy: quiz, animals" in page
    assert "chance 0.250" in page
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["quiz"]["rows"] == 22
    assert recipe.load(str(out / "recipe.yaml")).evaluate.tasks == (quiz,)


@harness
def test_a_model_alone_needs_no_recipe(places: dict[str, Path]) -> None:
    found = excise.evaluate(
        str(places["gold"]), suite="mcq", tasks=[str(places["quiz.jsonl"])], progress=Progress(quiet=True)
    )
    assert isinstance(found, dict)
    assert list(found["models"]) == ["unlearned"]
    assert set(found["models"]["unlearned"]["mcq_accuracy"]) == {"value", "low", "high", "n", "chance"}


@harness
def test_a_run_asks_too_and_leaves_no_text(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Questions go through training, measuring and the report; nothing that is written or said holds their words."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    out, rows = tmp_path / "run", rows_of(16, canary=CANARIES[0])
    sides = {"forget": rows[:6], "retain": rows_of(8, canary=CANARIES[1])}
    files = {name: str(small_world.write(tmp_path / f"{name}.jsonl", own)) for name, own in sides.items()}
    values = {
        "model": {"name": str(places["original"]), "precision": "fp32"},
        "data": {**files, "untouched": 0, "template": "{prompt} ", "chat": "never"},
        "objective": {"forget": {"npo": {}}, "regularise": {}},
        "schedule": {"steps": 2, "forget_batch": 4, "retain_batch": 4},
        "evaluate": {"tasks": list(files.values()), "generate": 0, "latent": False, "relearn_steps": [], "map": "none"},
        "out": str(out),
    }
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    with caplog.at_level(logging.DEBUG):
        assert cli.main(["run", str(tmp_path / "r.yaml")]) == 0
        command = ["evaluate", str(out), "--suite", "mcq", "--out", str(out / "again")]
        assert cli.main(command) == 0, "the tasks are the recipe's"
    found = artifacts.read_results(artifacts.RunFolder(out)).models
    assert {"mcq_accuracy/forget/animals", "mcq_accuracy/retain", "forget_probability"} <= set(found["unlearned"])
    assert "mcq_accuracy" in found["original"]
    again = artifacts.read_results(artifacts.RunFolder(out / "again")).models
    assert again["unlearned"]["mcq_accuracy"] == found["unlearned"]["mcq_accuracy"]
    printed = capfd.readouterr()
    said = (printed.out + printed.err + caplog.text).lower()
    assert not [mark for mark in CANARIES if mark in said]
    written = [p for p in (*out.rglob("*"), *(tmp_path / "cache").rglob("*")) if p.is_file()]
    assert len(written) > 8
    assert not [p for p in written for mark in CANARIES if mark.encode() in p.read_bytes().lower()]


@harness
def test_local_questions_need_no_network(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something went to the network")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = excise.evaluate(
        str(places["gold"]), suite="mcq", tasks=[str(places["quiz.jsonl"])], progress=Progress(quiet=True)
    )
    assert found["models"]["unlearned"]["mcq_accuracy"]["n"] == 22  # type: ignore[index]


# --- refusals ---------------------------------------------------------------------------------------------------------


def _said(command: list[str], code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    return captured.err.strip()


def test_without_the_extra_one_line_says_how_to_install_it(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else known(name, *a))
    command = ["evaluate", str(places["gold"]), "--suite", "mcq", "--tasks", str(places["quiz.jsonl"])]
    line = _said(command, 2, capsys, tmp_path)
    assert line == "excise: multiple choice needs lm-eval: pip install 'excise[mcq]'"


def test_suites_and_tasks_that_do_not_fit(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("{}")
    command = ["evaluate", str(places["gold"]), "--recipe", str(tmp_path / "r.yaml")]
    assert "--tasks FILE.jsonl" in _said([*command, "--suite", "mcq"], 2, capsys, tmp_path)
    assert "--suite mcq" in _said([*command, "--suite", "tofu", "--tasks", "mmlu"], 2, capsys, tmp_path)


@harness
def test_files_that_cannot_be_asked(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = small_world.write(tmp_path / "quiz.jsonl", [{"question": "qwyzzle", "choices": ["a", "b"], "answer": 9}])
    command = ["evaluate", str(places["gold"]), "--suite", "mcq", "--tasks"]
    line = _said([*command, str(bad)], 3, capsys, tmp_path)
    assert f"{bad}:1: field 'answer'" in line
    assert "qwyzzle" not in line
    assert "no such file" in _said([*command, str(tmp_path / "none.jsonl")], 3, capsys, tmp_path)
    twice = [str(places["quiz.jsonl"])] * 2
    assert "two multiple-choice tasks are called 'quiz'" in _said([*command, *twice], 2, capsys, tmp_path)


@harness
def test_names_of_the_harness(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real tasks of the harness, of which reading the whole list would take ten seconds; no network here."""
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    some = [str(shipped / name) for name in ("wmdp", "gsm8k")]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=some)
    monkeypatch.setattr(mcq, "_index", lambda: manager)
    command = ["evaluate", str(places["gold"]), "--suite", "mcq", "--tasks"]
    line = _said([*command, "wmdp_bio"], 3, capsys, tmp_path)
    assert line.startswith("excise: wmdp_bio: the questions cannot be fetched")
    assert "did you mean 'wmdp_bio'" in _said([*command, "wmdp_boi"], 2, capsys, tmp_path)


@harness
def test_a_group_of_the_harness_is_asked_whole(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WMDP's own task files, prompt and header included, over questions that stand in for the hub's."""
    import datasets
    import lm_eval.tasks

    rows = rows_of(6)
    drop = [{k: row[k] for k in ("question", "choices", "answer")} for row in rows]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: {"test": datasets.Dataset.from_list(drop)})
    shipped = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[str(shipped / "wmdp")])
    monkeypatch.setattr(mcq, "_index", lambda: manager)
    asked = mcq.load(["wmdp"])
    assert {k: set(v) for k, v in asked.members.items()} == {"wmdp": {"wmdp_bio", "wmdp_chem", "wmdp_cyber"}}
    net, tokenizer = _loaded(places)
    found = mcq.numbers(mcq.measure(net, tokenizer, asked, context=128), asked.members)
    assert (found["mcq_accuracy/wmdp"]["n"], found["mcq_accuracy/wmdp/wmdp_chem"]["n"]) == (18, 6)
    assert found["mcq_accuracy"]["chance"] == 0.25
    texts = {i.args[0] for i in asked.parts["wmdp_bio"].instances}
    header = "The following are multiple choice questions (with answers) about biology.\n\n"
    assert texts == {header + oracle_mcq.prompt(row) for row in rows}, "our prompt is theirs, but for the header"


@harness
def test_another_kind_of_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        OUTPUT_TYPE = "generate_until"

    class Index:
        all_tasks = ("sums",)

        def load(self, names: list[str]) -> dict[str, Any]:
            return {"tasks": {names[0]: Other()}}

    monkeypatch.setattr(mcq, "_index", Index)
    with pytest.raises(UsageError, match="sums: a task of another kind"):
        mcq.load(["sums"])


def test_the_prompt_of_a_question_with_braces_is_not_a_template() -> None:
    asked = Question("What is {{ 7*7 }} and {x}?", ("{a}", "{{ b }}"), 0)
    assert asked.prompt == "What is {{ 7*7 }} and {x}?\nA. {a}\nB. {{ b }}\nAnswer:"
