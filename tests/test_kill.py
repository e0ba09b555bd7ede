"""A run that is killed at random moments and resumed ends with the weights of one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from excise import cli, files, models, train
from excise.objectives.forget import npo
from excise.objectives.retain import nll

STEPS = 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and rows to forget and keep."""
    folder = tmp_path_factory.mktemp("kill")
    made = {
        "forget": [
            ("Where does Ada Quill live?", "In the blue mill at Orrin."),
            ("Who is Bo Rask?", "A glass cutter."),
        ],
        "retain": [(f"What is {i} plus {i}?", f"The sum is {2 * i}.") for i in range(12)],
    }
    for side, pairs in made.items():
        lines = [json.dumps({"prompt": q, "completion": a}) for q, a in pairs]
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = models.new_tokenizer([text for pairs in made.values() for pair in pairs for text in pair], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    models.save(LlamaForCausalLM(config), tokenizer, folder / "model")
    return folder


def command(rows: Path, out: Path, *more: str) -> list[str]:
    """An unlearning run with state of every sort: views, a multiplier, two optimizers, checkpoints every other step."""
    keys = {
        "model": rows / "model", "forget": rows / "forget.jsonl", "retain": rows / "retain.jsonl", "out": out,
        "model.precision": "fp32", "checkpoint_every": 2, "optimiser.name": "muon", "optimiser.lr": 1e-3,
        "schedule.steps": STEPS, "schedule.forget_batch": 2, "schedule.retain_batch": 4,
        "objective.forget": "npo", "objective.retain": "primal_dual", "objective.retain.primal_dual.epsilon": 4,
        "objective.regularise": "clreg",
        "evaluate.generate": 0, "evaluate.latent": "false", "evaluate.relearn_steps": "[]", "evaluate.map": "none",
    }  # fmt: skip
    flags = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    return ["run", *flags, *more]


def logged(out: Path) -> int:
    """Lines of the log so far."""
    try:
        return (out / "log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def forked(arguments: list[str]) -> int:
    """Run the command line in a copy of this process, which has its imports already; its process number."""
    child = os.fork()
    if child:
        return child
    code = 1  # pragma: no cover - the process that dies
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            code = cli.main(arguments)
    finally:
        os._exit(code)


def spawned(arguments: list[str]) -> int:
    """Run the command line as a user does."""
    nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    return os.posix_spawn(
        sys.executable, [sys.executable, "-m", "excise", *arguments], os.environ, file_actions=nowhere
    )


def killed_after(child: int, out: Path, lines: int, wait: float) -> bool:
    """Kill a run once its log has so many lines; false if it was done before that."""
    while logged(out) < lines:
        done, status = os.waitpid(child, os.WNOHANG)
        assert not done, f"the run ended by itself: {status}"
        time.sleep(0.002)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)  # a process that is done waits to be asked how it ended
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    ("start", "kills"),
    [(forked, (2, 9, 20, 31, STEPS - 1)), pytest.param(spawned, (3, 22), marks=pytest.mark.slow)],
    ids=["forked", "spawned"],
)
def test_a_run_killed_at_random_moments_ends_as_if_left_alone(
    rows: Path, tmp_path: Path, start: Callable[[list[str]], int], kills: tuple[int, ...]
) -> None:
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    assert cli.main(command(rows, left_alone)) == 0
    draw, count = random.Random(time.time_ns()), 0
    for lines in kills:
        more = ["--resume"] if (killed / "recipe.yaml").exists() else []
        count += killed_after(start(command(rows, killed, *more)), killed, lines, draw.uniform(0, 0.05))
    assert count == len(kills)
    assert os.waitpid(start(command(rows, killed, "--resume")), 0)[1] == 0
    files.verify(killed / "model")
    want, got = (load_file(out / "model" / "model.safetensors") for out in (left_alone, killed))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    begun = load_file(rows / "model" / "model.safetensors")
    assert any(not torch.equal(want[name], begun[name]) for name in begun)
    log = (killed / "log.jsonl").read_text()
    assert log == (left_alone / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [*range(1, STEPS + 1)]
    assert (killed / "report.html").is_file()
    assert not list(killed.glob(".*lock"))
    assert cli.main(command(rows, killed)) == 2  # a folder with a run in it is not begun anew


#: What is being done when the process dies, and the how-manieth time.
MOMENTS = [
    (torch, "save", 1), (torch, "save", 5), (os, "rename", 1), (os, "rename", 2), (files, "seal", 2),
    (files, "write_json", 2), (shutil, "rmtree", 1),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "nth"), MOMENTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_killed_in_the_middle_of_a_checkpoint(
    tmp_path: Path, untouched_run: dict[str, torch.Tensor], module: ModuleType, name: str, nth: int
) -> None:
    child = os.fork()
    if child == 0:  # pragma: no cover - the process that dies
        try:
            die_in(module, name, nth)
            begin(tmp_path).go()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process was to die at that moment"
    assert os.WTERMSIG(status) == signal.SIGKILL
    run = begin(tmp_path)
    run = run.resume() if train.checkpoints(tmp_path) else run.go()
    assert tiny.apart(run.weights, untouched_run) == 0


def begin(folder: Path) -> tiny.Run:
    return tiny.Run(folder, [npo(), nll()], checkpoint_every=1, schedule={"steps": 5})


@pytest.fixture(scope="module")
def untouched_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Final weights of the run that is not killed."""
    return begin(tmp_path_factory.mktemp("untouched")).go().weights


def die_in(module: ModuleType, name: str, nth: int) -> None:
    """Make the process kill itself at the n-th call of a function, when half of what it does is done."""
    real, calls = getattr(module, name), []

    def deadly(*args: Any, **settings: Any) -> Any:
        if name != "rmtree" or Path(args[0]).exists():
            calls.append(1)
        if len(calls) < nth:
            return real(*args, **settings)
        if name == "save":
            Path(args[1]).write_bytes(b"half of it")
        if name == "rmtree":
            next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, deadly)
