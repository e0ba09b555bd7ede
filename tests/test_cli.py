"""The command line: quick help, exit codes, one line for a refusal, and what each command hands to which function."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import excise
from excise import cli, errors, recipe, terminal

FUNCTIONS = ("demo", "evaluate", "export", "finetune", "plan", "report", "run", "score", "tune", "verify")
#: What `excise ledger DIR ...` and `excise cut` call; tests/test_ledger_run.py and tests/test_cut.py have the calls.
LEDGER = ("add_run", "check_ledger", "cut", "request", "reverify", "show_ledger")
#: tests/test_audit.py has the calls.
AUDIT = ("audit", "canaries")
#: What `excise run` and `excise plan` take where no recipe is named; tests/test_default.py has the calls.
DEFAULT = ("default_recipe",)
#: For PEFT models of one's own: no command has their name.
LIBRARY = ("get_rila_state_dict", "initialize_lora_rila_weights", "save_lora_adapter")

RESULTS = {
    "format": 1,
    "models": {
        "original": {"forget_probability": {"value": 0.93, "low": 0.9, "high": 0.96, "n": 40}},
        "unlearned": {"forget_probability": {"value": 0.01, "low": None, "high": None, "n": 40}, "privleak": None},
    },
    "seconds": {},
}


@dataclass
class Functions:
    """Stand in for the functions of `excise`: note what they are asked for, and answer with what the test says."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            self.calls.append((name, args, settings))
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Functions:
    made = Functions()
    for name in FUNCTIONS:
        monkeypatch.setitem(vars(excise), name, made.function(name))  # found before the lazy look-up
    return made


def _excise(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "excise", *arguments], capture_output=True, text=True, **settings)


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):  # the least of several: the machine may be busy, the program may not
        start = time.perf_counter()
        done = _excise("--help", check=True)
        seconds.append(time.perf_counter() - start)
        assert all(command in done.stdout for command in cli.COMMANDS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert cli.COMMANDS[command].help.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["report"],
        ["tune", "r.yaml"],
        ["demo", "--fast"],
        ["demo", "--seed", "x"],
        ["plan"],
        ["plan", "no-such-recipe"],
        ["plan", "--model"],
        ["plan", "--model", "m", "--optimiser.lr"],
        ["plan", "--model", "m", "--optimiser.lr", "--seed", "1"],
        ["plan", "--model", "m", "--optimizer.lr", "1e-5"],
        ["plan", "--model", "m", "--optimiser.rate", "1e-5"],
        ["run", "--model", "m", "--forget", "f", "--retian", "r", "--out", "o"],
        ["run", "--model", "m", "--forget", "f", "--retain", "r"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], functions: Functions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert not functions.calls
    assert captured.out == ""
    if arguments:
        assert captured.err.startswith("excise: ")
        assert captured.err.count("\n") == 1


def test_a_mistyped_flag_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["run", "--model", "m", "--retian", "r"])
    assert "did you mean --retain?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.ExciseError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.InputRefused("f.jsonl:3: field 'answer' is empty: give the text to forget"), 3),
        (errors.TrainingStopped("x"), 4),
        (errors.VerificationFailed("x"), 5),
        (errors.IntegrityFailed("x"), 6),
        (errors.NotShown("x"), 7),
        (PermissionError(13, "Permission denied", "report.html"), 1),
        (OSError("first line\nsecond line"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, functions: Functions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    functions.answers["report"] = raised
    assert cli.main(["report", str(tmp_path)]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("excise: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_bug_is_not_hidden(functions: Functions, tmp_path: Path) -> None:
    functions.answers["report"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", str(tmp_path)])


def test_run_without_a_file(functions: Functions, tmp_path: Path) -> None:
    out = tmp_path / "o"
    given = ["--model", "m", "--forget", "f.jsonl", "--retain=r.jsonl", "--never-seen", "n.jsonl", "--gold", "g"]
    more = ["--optimiser.lr", "5e-5", "--objective.forget.npo.beta=0.2", "--seed", "7", "--include-text", "--resume"]
    assert cli.main(["run", *given, *more, "--out", str(out)]) == 0
    [(name, (made,), settings)] = functions.calls
    assert name == "run"
    assert settings == {"out": out, "resume": True}
    assert isinstance(made, recipe.Recipe)
    assert (made.model.name, made.data.forget, made.data.retain) == ("m", "f.jsonl", "r.jsonl")
    assert (made.data.never_seen, made.evaluate.gold, made.evaluate.include_text) == ("n.jsonl", "g", True)
    assert made.optimiser.lr == 5e-5
    assert made.seed == 7
    assert made.objective.forget["npo"]["beta"] == 0.2


def test_an_unknown_flag_does_not_swallow_the_recipe(functions: Functions, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: m}\noptimiser: {lr: 5e-5}\n")
    assert cli.main(["run", "--schedule.epochs", "3", str(file), "--optimiser.weight_decay", "0", "--out", "o"]) == 0
    made = functions.calls[0][1][0]
    assert (made.model.name, made.schedule.epochs, made.optimiser.lr) == ("m", 3, 5e-5)


@pytest.mark.parametrize("name", ["yes", "1e5", "null", "a: b", "# c", "ünï-😀.jsonl"])
def test_file_names_that_yaml_would_read_otherwise(name: str, functions: Functions) -> None:
    assert cli.main(["run", "--model", "m", "--forget", name, "--retain", "r", "--out", "o"]) == 0
    assert functions.calls[0][1][0].data.forget == name


def test_negative_values_are_values(functions: Functions) -> None:
    functions.answers["plan"] = {"passes": []}
    assert cli.main(["plan", "--model", "m", "--objective.forget.ga.weight", "-0.5"]) == 0
    assert functions.calls[0][1][0].objective.forget["ga"]["weight"] == -0.5


def test_the_other_commands_hand_over(functions: Functions, tmp_path: Path) -> None:
    functions.answers = {"score": {"privleak": {"value": 1.0}}, "evaluate": RESULTS, "report": tmp_path / "report.html"}
    file = tmp_path / "r.yaml"
    file.write_text("seed: 3\n")
    for line in (
        f"demo --out {tmp_path} --quick --seed 5",
        f"finetune {file} --out o",
        f"tune {file} --trials 4 --study s.db --processes 2",
        "evaluate m --suite tofu --against g",
        "score a.json --against b.json",
        f"report {tmp_path}",
        "export r --to adapter --out o --rank 4",
    ):
        assert cli.main(line.split()) == 0, line
    made = recipe.load(str(file))
    assert functions.calls == [
        ("demo", (tmp_path,), {"task": "qa", "quick": True, "seed": 5}),
        ("finetune", (recipe.changed(made, {"out": "o"}),), {"resume": False}),
        ("tune", (made, 4), {"study": "s.db", "processes": 2}),
        (
            "evaluate",
            ("m",),
            {
                "suite": "tofu",
                "without": (),
                "against": "g",
                "tasks": (),
                "recipe": None,
                "out": None,
                "resume": False,
            },
        ),
        ("score", ("a.json", "b.json"), {}),
        ("report", (tmp_path,), {}),
        ("export", (Path("r"),), {"to": "adapter", "out": Path("o"), "rank": 4}),
    ]


def test_the_functions_take_what_the_commands_give() -> None:
    """The calls above against the real signatures, so that the stand-ins cannot drift from them."""
    out, some = Path("o"), recipe.Recipe()
    for function, args, settings in (
        (excise.demo, (out,), {"task": "qa", "quick": True, "seed": 5}),
        (excise.finetune, (some,), {"resume": False}),
        (excise.plan, (some,), {}),
        (excise.run, (some,), {"out": out, "resume": True}),
        (excise.tune, (some, 4), {"study": None, "processes": 1}),
        (
            excise.evaluate,
            ("m",),
            {
                "suite": "tofu",
                "without": (),
                "against": None,
                "tasks": (),
                "recipe": None,
                "out": None,
                "resume": True,
            },
        ),
        (excise.score, ("a", None), {}),
        (excise.report, (out,), {}),
        (excise.export, (out,), {"to": "merged", "out": out, "rank": None}),
    ):
        inspect.signature(function).bind(*args, **settings)


def test_every_public_function_is_documented_and_found_again() -> None:
    assert {*FUNCTIONS, *LEDGER, *AUDIT, *DEFAULT, *LIBRARY, "recipe", "__version__"} == set(excise.__all__)
    for name in (*FUNCTIONS, *LEDGER, *AUDIT, *DEFAULT, *LIBRARY):
        function = getattr(excise, name)
        assert callable(function)
        assert function.__name__ == name
        assert all(part in function.__doc__ for part in ("Example:", ">>> ")), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = excise.nothing


def test_json_is_json(functions: Functions, capsys: pytest.CaptureFixture[str]) -> None:
    functions.answers = {"plan": {"passes": [{"side": "forget", "model": "policy", "layers": 4}], "seconds": 1.5}}
    functions.answers["score"] = {"model_utility": {"value": 0.5221, "low": None, "high": None, "n": 900}}
    assert cli.main(["plan", "--model", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == functions.answers["plan"]
    assert cli.main(["score", "log.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == functions.answers["score"]


def test_tables_say_what_is_not_shown(functions: Functions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "report.html").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0.93 [0.9, 0.96]" in out
    assert "not shown" in out
    assert str(tmp_path / "report.html") in out
    functions.answers["plan"] = {"passes": [{"side": "forget", "model": "policy", "layers": [4]}], "seconds": 1.5}
    assert cli.main(["plan", "--model", "m"]) == 0
    assert "seconds: 1.5" in capsys.readouterr().out


def test_a_narrow_terminal_gets_the_values_without_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: RESULTS["models"]["original"] for name in ("original", "gold", "unlearned", "simnpo_clreg")}
    monkeypatch.setenv("COLUMNS", "80")
    terminal.scores({"models": models})
    out = capsys.readouterr().out
    assert out.count("0.93") == 4
    assert "[0.9" not in out
    assert "simnpo_clreg" in out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe.shipped()
    assert all(len(line.split()) > 3 for line in lines), "a recipe's first line is a comment that says what it is"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "excise", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, cli.BROKEN_PIPE)


def test_version() -> None:
    from excise import __version__

    assert _excise("--version", check=True).stdout.split() == ["excise", __version__]
