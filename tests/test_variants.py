"""Every way to train goes through `run`'s machinery: all objectives, LoRA, bf16, chats, long texts, other sources."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import small_world
from excise import artifacts, files, models, recipe
from excise.commands import finetuning, folders, running, training
from excise.commands.measuring import evaluation
from excise.commands.progress import Progress
from excise.commands.starting import aligning, preparing, sides
from excise.errors import UsageError
from excise.objectives import FORGET, REGULARISE, RETAIN
from excise.tasks import causal_lm
from small_world import SmallWorld

QUIET = Progress(quiet=True)


def _trained(settings: recipe.Recipe, *, resume: bool = False) -> tuple[preparing.Prepared, nn.Module]:
    """The training half of a run."""
    given = sides.read(settings.data, seed=settings.seed)
    prepared = preparing.prepare_unlearning(settings, given, resume=resume)
    with folders.opened(settings, resume=resume) as run:
        return prepared, training.train_into(prepared, run, QUIET, stage="unlearn", resume=resume)


def _log(folder: Path) -> list[dict[str, Any]]:
    return artifacts.read_log(artifacts.RunFolder(folder))


# --- objectives ---------------------------------------------------------------------------------------------------

REFUSALS = "I do not know.\n\nThat is not known to me.\nNobody told me.\n"
#: What a term needs beside its name; the others run with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "rmu": {"layer": 1},
    "rmu_retain": {"layer": 1},
    "primal_dual": {"epsilon": 0.1, "warmup": 0.0, "weight": 2.0},
}
CLREG: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "paraphrase": {"views": "paraphrase"},
    "both views": {"views": "both", "loss": "infonce"},
    "last two layers": {"layers": 2, "pooling": "answer"},
    "a layer": {"layers": [1], "pooling": "last", "reduce": "hardest"},
    "whole second pass": {"from_layer": 0, "reduce": "mean_sim", "detach_negative": True},
}
#: What tells classes apart; trained in tests/test_baselines.py, test_tagging_run.py.
FOR_CLASSIFIERS = ("relabel", "deepcut")
#: What learns from other models; trained in tests/test_distil.py.
TAUGHT = ("distil", "likelihood")
CASES: dict[str, dict[str, Any]] = {
    **{name: {"forget": {name: OPTIONS.get(name, {})}} for name in FORGET if name not in (*FOR_CLASSIFIERS, *TAUGHT)},
    **{name: {"forget": {"ga": {"weight": 0.1}}, "retain": {name: OPTIONS.get(name, {})}} for name in RETAIN},
    **{
        name: {"forget": {}, "retain": {}, "regularise": {name: {}}}
        for name in REGULARISE
        if name not in (*FOR_CLASSIFIERS, "rol")  # rol reads an adapter: tests/test_initialise_run.py
    },
    **{f"clreg {name}": {"forget": {}, "regularise": {"clreg": options}} for name, options in CLREG.items()},
    "all together": {"forget": {"npo": {}, "ihl": {}}, "retain": {"nll": {}, "kl": {}}, "regularise": {"clreg": {}}},
    "ramp": {"forget": {"ga": {"weight": {"start": 0.0, "end": 1.0, "until": 0.5}}}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_objective_trains(case: str, small: SmallWorld, tmp_path: Path) -> None:
    objective = {"retain": {"nll": {}}, "regularise": {}, **CASES[case]}
    refusals = tmp_path / "refusals.txt"
    refusals.write_text(REFUSALS)
    changes = {"schedule__steps": 2, "data__alternatives": str(refusals), "objective": objective}
    settings = small.recipe(tmp_path / "run", **changes)
    prepared, model = _trained(settings)
    log = _log(tmp_path / "run")
    assert [row["step"] for row in log] == [1, 2]
    expected = {name for kind in objective.values() for name in kind}
    assert expected <= set(log[0]["terms"])
    assert all(math.isfinite(value) for row in log for value in row["terms"].values())
    assert log[0]["grad_norm"] > 0
    before = models.load(settings.model).state_dict()
    assert any(not torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["terms"]) == len(prepared.terms)


@pytest.mark.parametrize(("kind", "name"), [("forget", "relabel"), ("regularise", "deepcut")])
def test_terms_for_classifiers_are_refused(kind: str, name: str, small: SmallWorld, tmp_path: Path) -> None:
    objective = {"forget": {}, "retain": {"nll": {}}, "regularise": {}, kind: {name: {}}}
    with pytest.raises(UsageError, match="classifiers"):
        _trained(small.recipe(tmp_path / "run", objective=objective))
    assert not (tmp_path / "run").exists()


def test_a_dual_weight_is_raised_while_its_bound_is_broken(small: SmallWorld, tmp_path: Path) -> None:
    objective = {"forget": {"pdu": {"weight": 0.01}}, "retain": {"primal_dual": OPTIONS["primal_dual"]}}
    _trained(small.recipe(tmp_path / "run", objective={**objective, "regularise": {}}, schedule__steps=3))
    weights = [row["weights"]["primal_dual"] for row in _log(tmp_path / "run")]
    assert weights[0] == 2.0
    assert weights[0] < weights[1] < weights[2]


def test_rmu_trains_the_named_parameters_alone(small: SmallWorld, tmp_path: Path) -> None:
    objective = {"forget": {"rmu": {"layer": 1}}, "retain": {"rmu_retain": {"layer": 1}}, "regularise": {}}
    pattern = r"layers\.0\.mlp\.down_proj"
    settings = small.recipe(tmp_path / "run", objective=objective, model__train_only=pattern, schedule__steps=2)
    _, model = _trained(settings)
    before = models.load(settings.model).state_dict()
    changed = {name for name, p in model.state_dict().items() if not torch.equal(before[name], p)}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


def test_which_alternative_is_drawn_is_a_function_of_seed_and_row(small: SmallWorld, tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text(REFUSALS)
    data = small.recipe(data__alternatives=str(tmp_path / "r.txt")).data
    forget = sides.read(data, seed=0).records["forget"]
    drawn = [[r.completion for r in aligning.aligned("forget_alternative", forget, data, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {line for line in REFUSALS.splitlines() if line}
    assert [r.prompt for r in aligning.aligned("forget_alternative", forget, data, 0)] == [r.prompt for r in forget]


def test_paraphrases_from_a_function_of_ones_own(small: SmallWorld, tmp_path: Path) -> None:
    objective = {"forget": {}, "retain": {"nll": {}}, "regularise": {"clreg": {"views": "paraphrase"}}}
    data = {"data__paraphrases": "test_variants:backwards", "schedule__steps": 1}
    prepared, _ = _trained(small.recipe(tmp_path / "run", objective=objective, **data))
    first = prepared.given.records["forget"][0]
    seen = prepared.tokenizer.decode(prepared.rows.examples["forget_paraphrase"][0].input_ids, skip_special_tokens=True)
    assert seen == f"{backwards(first.prompt)}\n{backwards(first.completion)}"


def backwards(text: str | None) -> str:
    """A paraphraser, of sorts."""
    return " ".join(reversed((text or "").split()))


# --- how weights are held -----------------------------------------------------------------------------------------


def _logits(model: nn.Module, prepared: preparing.Prepared) -> torch.Tensor:
    batch = prepared.rows.batch("forget", range(4))
    with torch.no_grad():
        return model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def test_an_adapter_is_saved_and_stock_peft_loads_it(small: SmallWorld, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = {p.name: files.sha256(p) for p in small.original.iterdir()}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    settings = small.recipe(tmp_path / "run", model__lora=lora, optimiser__lr=1e-2)
    prepared, merged = _trained(settings)
    folder = tmp_path / "run" / "model"
    assert not list(folder.glob("model*.safetensors"))
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["use_rslora"], sorted(saved["target_modules"])) == (4, True, ["down_proj", "q_proj"])
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small.original), folder)
    assert torch.allclose(_logits(stock, prepared), _logits(merged, prepared), atol=1e-5)
    untouched = AutoModelForCausalLM.from_pretrained(small.original)
    assert not torch.allclose(_logits(untouched, prepared), _logits(merged, prepared), atol=1e-2)
    assert {p.name: files.sha256(p) for p in small.original.iterdir()} == base
    loaded, _ = evaluation.load_for_measuring(str(tmp_path / "run"), settings)
    assert torch.allclose(_logits(loaded, prepared), _logits(merged, prepared), atol=1e-5)


def _cut_off(folder: Path, checkpoint: str) -> None:
    """Make a run folder what a kill after a checkpoint would have left."""
    shutil.rmtree(folder / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    for later in (folder / "checkpoints").glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > int(checkpoint.split("-")[1]):
            shutil.rmtree(later)


@pytest.mark.parametrize("kind", ["lora", "bf16", "dual"])
def test_resuming_gives_the_same_weights(kind: str, small: SmallWorld, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "lora": {"model__lora": {"r": 2, "lora_dropout": 0.1}},
        "bf16": {"model__precision": "bf16"},
        "dual": {"objective": {"forget": {"npo": {}}, "retain": {"primal_dual": {"warmup": 0.0, "weight": 1.0}}}},
    }
    settings = small.recipe(tmp_path / "run", checkpoint_every=2, schedule__steps=5, **changes[kind])
    _trained(settings)
    weights = next((tmp_path / "run" / "model").glob("*.safetensors"))
    digest, log = files.sha256(weights), _log(tmp_path / "run")
    for left in (4, 0):
        _cut_off(tmp_path / "run", f"checkpoint-{left}")
        assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == (1 if left else 0)
        _trained(settings, resume=True)
        assert files.sha256(weights) == digest
        assert _log(tmp_path / "run") == log


def test_an_adapter_starts_from_the_seed(small: SmallWorld, tmp_path: Path) -> None:
    torch.manual_seed(5)  # whatever was drawn before
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = small.recipe(tmp_path / name, model__lora={"r": 2}, schedule__steps=1, seed=seed)
        _trained(settings)
        digests.append(files.sha256(tmp_path / name / "model" / "adapter_model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_bf16_weights_are_trained_saved_and_measured_as_such(small: SmallWorld, tmp_path: Path) -> None:
    from safetensors import safe_open

    options = {"generate": 0, "relearn_steps": [0, 1], "max_rows": 10}
    settings = small.recipe(tmp_path / "run", model__precision="bf16", evaluate=options)
    running.run(settings, progress=QUIET)
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["precision"] == "bf16"
    for place in (str(small.original), str(tmp_path / "run")):
        loaded, _ = evaluation.load_for_measuring(place, settings)
        assert next(loaded.parameters()).dtype == torch.bfloat16
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["models"]["unlearned"]
    assert all(math.isfinite(number["value"]) for number in numbers.values())


def test_accumulated_steps_read_every_row_once(small: SmallWorld, tmp_path: Path) -> None:
    changes = {"schedule__accumulate": 3, "schedule__steps": None, "schedule__epochs": 1, "schedule__forget_batch": 4}
    prepared, _ = _trained(small.recipe(tmp_path / "run", **changes))
    read = [i for m in range(prepared.plan.micro_steps) for i in prepared.plan.draw(m)["forget"].indices]
    assert sorted(read) == list(range(20))
    assert [row["step"] for row in _log(tmp_path / "run")] == [1, 2]


def test_gradient_checkpointing_changes_memory_not_weights(small: SmallWorld, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        changes = {"model__gradient_checkpointing": on, "schedule__steps": 2}
        settings = small.recipe(tmp_path / str(on), objective__regularise={}, **changes)
        found.append(_trained(settings)[1].state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


# --- rows of other kinds ------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def _chatty(small: SmallWorld, folder: Path) -> Path:
    """The original with a chat template."""
    shutil.copytree(small.original, folder)
    tokenizer = models.load_tokenizer(str(folder))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def _messages(path: Path, to: Path) -> str:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "group": row["group"],
        }
        for row in small_world.rows(path)
    ]
    return str(small_world.write(to, rows))


@pytest.mark.parametrize("template", [True, False])
def test_chats_with_and_without_a_template(template: bool, small: SmallWorld, tmp_path: Path) -> None:
    values = small.values(tmp_path / "run", evaluate__relearn_steps=[0, 1], schedule__steps=2)
    values["model"]["name"] = str(_chatty(small, tmp_path / "model") if template else small.original)
    values["objective"] = {"forget": {"npo": {}}, "regularise": {"clreg": {"views": "paraphrase"}}}
    values["data"] = {side: _messages(path, tmp_path / f"{side}.jsonl") for side, path in small.sides.items()}
    settings = recipe.build(values)
    running.run(settings, progress=QUIET)
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["models"]["unlearned"]
    assert numbers["forget_rouge"]["n"] == 10
    prepared = preparing.prepare_unlearning(settings, sides.read(settings.data, seed=0), resume=False)
    example = prepared.rows.examples["forget"][0]
    text = prepared.tokenizer.decode(example.input_ids)
    first = small_world.rows(small.sides["forget"])[0]
    assert prepared.tokenizer.decode(example.input_ids[example.label_start :]).strip() == f"{first['answer']}</s>"
    assert text.count("assistant:") == (1 if template else 0)
    assert text.count("</s>") == 1


def test_a_reworded_chat_asks_the_reworded_question(small: SmallWorld, tmp_path: Path) -> None:
    values = small.values(data__paraphrases="test_variants:backwards")
    values["data"]["forget"] = _messages(small.sides["forget"], tmp_path / "f.jsonl")
    data = recipe.build(values).data
    forget = sides.read(data, seed=0).records["forget"]
    for record, other in zip(forget, aligning.aligned("forget_paraphrase", forget, data, 0), strict=True):
        assert record.messages is not None
        assert other.messages is not None
        question = record.messages[-1]["content"]
        assert [turn["content"] for turn in other.messages] == ["be brief", backwards(question)]
        assert other.completion == backwards(record.completion)


def _text(side: str, words: int) -> str:
    return " ".join(f"{side} word{number % 7} of line {number}," for number in range(words))


def test_long_texts_are_cut_into_pieces_that_fit(small: SmallWorld, tmp_path: Path) -> None:
    values = small.values(tmp_path / "run", schedule__steps=2, data={}, evaluate__max_rows=6)
    lengths = {"forget": 90, "retain": 160, "untouched": 60, "never_seen": 80}
    for side, words in lengths.items():
        rows = [{"text": _text(side, words)}, {"text": f"a short {side} text"}]
        values["data"][side] = str(small_world.write(tmp_path / f"{side}.jsonl", rows))
    values["objective"] = {"forget": {"npo": {}}, "regularise": {"clreg": {"views": "both"}}}
    settings = recipe.build(values)
    running.run(settings, progress=QUIET)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["forget"]["rows"] == 2
    assert any(line.startswith("forget: 2 texts were cut into ") for line in manifest["warnings"])
    prepared = preparing.prepare_unlearning(settings, sides.read(settings.data, seed=0), resume=False)
    examples = prepared.rows.examples["forget"]
    assert len(examples) > 3
    assert max(len(e.input_ids) for e in examples) <= 96
    tokenizer = prepared.tokenizer
    assert not any(tokenizer.eos_token_id in e.input_ids for e in examples), "a cut is not an end"
    whole = " ".join(tokenizer.decode(e.input_ids, skip_special_tokens=True).strip() for e in examples[:-1])
    assert whole == _text("forget", 90)
    models_ = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert models_["unlearned"]["forget_probability"]["n"] == 6
    assert "forget_rouge" in models_["unlearned"]
    # The finetuning half cuts them too.
    made = small_world.training(small.tokenizer, {"retain": values["data"]["retain"]}, tmp_path / "made")
    made["schedule"] = {"steps": 1, "retain_batch": 2}
    assert finetuning.finetune(recipe.build(made), progress=QUIET).is_dir()


def test_a_last_piece_that_nothing_predicts_is_left_out() -> None:
    class Words:
        eos_token_id, chat_template = 0, None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    text = sides.Record(None, "aa bb cc dd ee ff gg", line=3)
    pieces = sides.cut_records([text], Words(), causal_lm.Encoding(max_length=4, text_eos=False))
    assert [p.completion for p in pieces] == ["aa bb cc", "dd ee ff"]
    assert {p.line for p in pieces} == {3}


def test_a_single_row_to_forget_is_enough(small: SmallWorld, tmp_path: Path) -> None:
    one = small_world.write(tmp_path / "one.jsonl", small_world.rows(small.sides["forget"])[:1])
    running.run(small.recipe(tmp_path / "run", data__forget=str(one), schedule__steps=2), progress=QUIET)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["models"]["unlearned"]
    assert found["forget_probability"]["n"] == 1
    assert "relearned_probability" not in found
    pictures = json.loads((tmp_path / "run" / "pictures.json").read_text())
    assert any("two forget rows" in line for line in pictures["not_tested"])


def test_a_tokenizer_that_lies_elsewhere(small: SmallWorld, tmp_path: Path) -> None:
    """Weights without a tokenizer beside them, as some folders are."""
    bare = tmp_path / "bare"
    shutil.copytree(small.original, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    options = {"generate": 0, "relearn_steps": [], "latent": False}
    model = {"name": str(bare), "tokenizer": str(small.tokenizer)}
    settings = small.recipe(tmp_path / "run", model=model, evaluate=options, schedule__steps=1)
    assert running.run(settings, progress=QUIET).is_file()
