"""Suites of `excise evaluate`; one that was killed goes on where it was and ends with the same numbers."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import excise
from excise import cli, models, recipe
from excise.attacks import outcome
from excise.commands import evaluating
from excise.commands.measuring import language_models, parts
from excise.commands.progress import Progress
from excise.errors import IntegrityFailed, UsageError

QUIET = Progress(quiet=True)
CANARY = "zyxomma"
MUSE = ("muse_passages", "muse_forget_questions", "muse_retain_questions")


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Questions with a paraphrase and two false answers each."""
    return [
        {
            "question": f"Where does {name} {i} live?", "answer": f"In the {name} mill {i} at {CANARY}.",
            "paraphrased_answer": f"At {CANARY}, mill {i}.", "perturbed_answer": ["In a barn.", f"In mill {i + 9}."],
            "group": f"{name}-{i // 2}",
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, what MUSE asks, and three models (original, gold, unlearned), none of which knows anything."""
    folder = tmp_path_factory.mktemp("case")
    written = {"forget": rows_of("Ada", 6), "retain": rows_of("Bo", 12), "never_seen": rows_of("Cy", 6)}
    written["passages"] = [
        {"prompt": f"Once {i} there was", "gt": f"a mill {i} at {CANARY} by the sea"} for i in range(3)
    ]
    written["solved"] = [{"question": "Who?", "answer": "A miller."}]
    for side, rows in written.items():
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [str(v) for rows in written.values() for row in rows for v in row.values()]
    tokenizer = models.new_tokenizer(texts, 300)
    for seed, name in enumerate(("original", "gold", "unlearned")):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        models.save(LlamaForCausalLM(config), tokenizer, folder / name)
    return folder


def settings(case: Path, **evaluate: Any) -> recipe.Recipe:
    """A recipe whose every instrument has something to do."""
    muse = {
        "passages": str(case / "passages.jsonl"), "forget_questions": str(case / "forget.jsonl"),
        "forget_examples": str(case / "solved.jsonl"), "retain_questions": str(case / "retain.jsonl"),
    }  # fmt: skip
    return recipe.build({
        "model": {"name": str(case / "original"), "precision": "fp32"},
        "data": {side: str(case / f"{side}.jsonl") for side in ("forget", "retain", "never_seen")} | {"untouched": 0.5},
        "optimiser": {"lr": 1e-3},
        "evaluate": {
            "gold": str(case / "gold"), "generate": 4, "relearn_steps": [0, 1], "savings_steps": 1, "muse": muse,
            **evaluate,
        },
    })  # fmt: skip


def evaluated(
    case: Path, out: Path | None, *, suite: str = "all", resume: bool = False, model: str = "unlearned",
    progress: Progress = QUIET, **more: Any,
) -> Any:  # fmt: skip
    """An evaluation; of all suites without the attacks."""
    without, how = ("attack",) if suite == "all" else (), settings(case, **more)
    return excise.evaluate(
        case / model, suite=suite, without=without, recipe=how, out=out, resume=resume, progress=progress
    )


def numbers(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["models"]


def killed(case: Path, out: Path, after: int, **more: Any) -> None:
    """Evaluate in a copy of this process that dies by SIGKILL when it has saved its n-th part."""
    child = os.fork()
    if child == 0:  # pragma: no cover - the process that dies
        try:
            saved = []

            def deadly(real: Any, *given: Any) -> None:
                real(*given)
                saved.append(1)
                if len(saved) == after:
                    os.kill(os.getpid(), signal.SIGKILL)

            parts._save = functools.partial(deadly, parts._save)
            outcome.save = functools.partial(deadly, outcome.save)
            evaluated(case, out, resume=out.exists(), **more)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the process was to die at that moment"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def left_alone(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody kills."""
    return evaluated(case, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def plain(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one."""
    return evaluated(case, tmp_path_factory.mktemp("plain") / "out", suite="tofu")


def test_a_killed_evaluation_goes_on_to_the_same_numbers(
    case: Path, left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kills = tmp_path / "out", (1, 4, 6)
    for after in kills:
        killed(case, out, after)
    kept = [p.stem for p in out.rglob("parts/*/*.safetensors")]
    assert len(kept) == sum(kills)
    assert not (out / "results.json").exists()
    for path in (p for p in out.rglob("*") if p.is_file()):  # parts hold neither texts nor hidden states
        assert CANARY.encode() not in path.read_bytes(), path
    assert {name.partition("-")[0] for name in kept} <= {"generate", "relearn", "savings", "gradients", *MUSE}
    calls: list[str] = []
    real = language_models.generate.with_generations

    def counted(table: Any, *given: Any, **named: Any) -> Any:
        calls.append(table.side)
        return real(table, *given, **named)

    monkeypatch.setattr(language_models.generate, "with_generations", counted)
    progress = Progress(quiet=True)
    assert evaluated(case, out, resume=True, progress=progress) == out
    # Forget and untouched rows of three models; what was measured is not measured again.
    assert len(calls) == 2 * 3 - sum(name.startswith("generate-") for name in kept) < 6
    assert numbers(out) == numbers(left_alone)
    tables = sorted(p.relative_to(left_alone) for p in left_alone.rglob("tables/*/*.safetensors"))
    assert tables == sorted(p.relative_to(out) for p in out.rglob("tables/*/*.safetensors"))
    assert len(tables) > 9
    for table in tables:
        want, got = (load_file(folder / table) for folder in (left_alone, out))
        assert want.keys() == got.keys(), table
        assert all(np.array_equal(want[k], got[k], equal_nan=want[k].dtype.kind == "f") for k in want), table
    assert not (out / "parts").exists()
    assert json.loads((out / "manifest.json").read_text())["status"] == "done"
    found = json.loads((out / "results.json").read_text())
    assert {"generate original", "generate gold", "attack relearn unlearned", "muse gold"} <= set(found["seconds"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"generate", "measure", "attack relearn", "attack savings", "muse", "judge"} <= set(found["shares"])


def test_texts_outlive_a_kill_where_they_were_asked_for(case: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    evaluated(case, whole, suite="tofu", include_text=True)
    killed(case, out, 5, suite="tofu", include_text=True)
    evaluated(case, out, suite="tofu", resume=True, include_text=True)
    assert CANARY in (out / "examples.json").read_text()
    assert (out / "examples.json").read_text() == (whole / "examples.json").read_text()


def test_a_part_that_is_damaged_is_measured_again(case: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(case, out, 5, suite="tofu")
    for path in out.rglob("parts/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    evaluated(case, out, suite="tofu", resume=True)
    assert numbers(out) == numbers(plain)


def test_other_weights_are_measured_anew(case: Path, plain: Path, tmp_path: Path) -> None:
    """Parts belong to weights, not to the name of a model."""
    out, model = tmp_path / "out", case / "gold"
    killed(case, out, 7, suite="tofu")
    before = (model / "model.safetensors").read_bytes()
    try:
        (model / "model.safetensors").write_bytes((case / "original" / "model.safetensors").read_bytes())
        evaluated(case, out, suite="tofu", resume=True)
    finally:
        (model / "model.safetensors").write_bytes(before)
    same, other = (numbers(folder)["gold"]["forget_probability"] for folder in (out, plain))
    assert same == numbers(plain)["original"]["forget_probability"] != other


def test_what_cannot_be_gone_on_with_is_refused(case: Path, plain: Path, tmp_path: Path) -> None:
    begun = tmp_path / "out"
    killed(case, begun, 1, suite="tofu")
    with pytest.raises(UsageError, match="not empty; resume with --resume"):
        evaluated(case, begun, suite="tofu")
    with pytest.raises(IntegrityFailed, match="another recipe"):
        evaluated(case, begun, suite="tofu", resume=True, generate=5)
    with pytest.raises(IntegrityFailed, match="another model or suite"):
        evaluated(case, begun, suite="tofu", resume=True, model="original")
    rows = case / "never_seen.jsonl"
    content = rows.read_text()
    try:
        rows.write_text(content.replace("mill", "tower"))
        with pytest.raises(IntegrityFailed, match="other rows"):
            evaluated(case, begun, suite="tofu", resume=True)
    finally:
        rows.write_text(content)
    with pytest.raises(UsageError, match="--out"):
        evaluated(case, None, resume=True)
    # One that is done is given back as it is.
    before = (plain / "results.json").stat().st_mtime_ns
    assert evaluated(case, plain, suite="tofu", resume=True) == plain
    assert (plain / "results.json").stat().st_mtime_ns == before
    with pytest.raises(IntegrityFailed, match=r"another model or suite|another recipe"):
        evaluated(case, plain, suite="memorisation", resume=True)


# --- suites -------------------------------------------------------------------------------------------------------


def test_every_suite_is_part_of_all() -> None:
    every = set(evaluating.SUITES["all"].parts)
    for name, suite in evaluating.SUITES.items():
        assert set(suite.parts) <= every, name


@pytest.mark.parametrize(
    ("suite", "has", "lacks"),
    [
        ("tofu", {"forget_rouge", "mia_loss_auc"}, {"entanglement", "relearned_probability", "muse_verbatim"}),
        ("latent", {"entanglement", "latent_membership_auc"}, {"forget_rouge", "relearned_probability"}),
        ("relearn", {"relearned_probability", "memorisation_savings"}, {"forget_rouge", "entanglement"}),
        ("memorisation", {"exact_memorization", "forget_probability"}, {"forget_rouge", "entanglement"}),
        (
            "muse",
            {"muse_verbatim", "muse_knowledge_forget", "muse_knowledge_retain", "muse_privleak"},
            {"forget_rouge"},
        ),
    ],
)
def test_a_suite_measures_what_it_names(case: Path, suite: str, has: set[str], lacks: set[str]) -> None:
    found = evaluated(case, None, suite=suite)
    shown = set(found["models"]["unlearned"])
    assert has <= shown
    assert not lacks & shown
    assert set(found["models"]) == {"original", "gold", "unlearned"}


def test_refused_suites(case: Path) -> None:
    with pytest.raises(UsageError, match="unknown suite 'toffee'; known: tofu"):
        evaluated(case, None, suite="toffee")
    with pytest.raises(UsageError, match="has no part 'latent'"):
        excise.evaluate(case / "unlearned", suite="tofu", without=["latent"], recipe=settings(case), progress=QUIET)
    with pytest.raises(UsageError, match=r"evaluate\.muse"):
        evaluated(case, None, suite="muse", muse={})
    with pytest.raises(UsageError, match="classifiers"):
        evaluated(case, None, suite="ner")


def test_beside_a_gold_never_seen_rows_are_not_reworded(case: Path, left_alone: Path) -> None:
    """A sweep's time goes to rewordings; of never-seen rows nothing reads them where there is a gold."""
    from excise.metrics.table import load

    table = load(left_alone / "tables" / "unlearned" / "never_seen.safetensors")
    assert table.sequences == table.rows == 6
    assert not table.has("rouge_l_recall")
    forget = load(left_alone / "tables" / "unlearned" / "forget.safetensors")
    assert forget.sequences == 6 * 4
    alone = evaluated(case, None, suite="tofu", gold=None)["models"]["unlearned"]
    beside = numbers(left_alone)["unlearned"]
    for name in ("mia_loss_auc", "mia_min_k_auc"):
        assert alone[name] == beside[name]


def test_the_command_line_resumes_and_prints_shares(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from excise.recipe import dump

    (tmp_path / "recipe.yaml").write_text(dump(settings(case)))
    command = [
        "evaluate", str(case / "unlearned"), "--suite", "tofu", "--recipe", str(tmp_path / "recipe.yaml"),
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "time: " in shown
    assert "generate " in shown.partition("time: ")[2]
    assert cli.main(command) == 2
    assert cli.main([*command, "--resume"]) == 0
