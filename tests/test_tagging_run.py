"""Taggers and text classifiers in whole runs: new heads, every kind of term, adapters, stopping, resuming, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig

import excise
from excise import artifacts, models, recipe, world, world_tagged
from excise.commands import kinds, watching
from excise.commands.finetuning import finetune
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import sides
from excise.commands.starting.sides import Rows
from excise.errors import InputRefused, NotShown, UsageError
from excise.tasks.token_classification import ClassExample
from small_world import rows, write

QUIET = Progress(quiet=True)
ENCODER = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96,
}  # fmt: skip
TERMS: dict[str, dict[str, Any]] = {
    "ga": {"forget": {"ga": {}}}, "npo": {"forget": {"npo": {}}}, "undial": {"forget": {"undial": {}}},
    "relabel": {"forget": {"relabel": {}}}, "random labels": {"forget": {"relabel": {"to": "random"}}},
    "bad teacher": {"forget": {"bad_teacher": {}}, "retain": {"kl": {}}},
    "deepcut": {"regularise": {"deepcut": {}}}, "deepcut full": {"regularise": {"deepcut": {"form": "full"}}},
    "quantile": {"forget": {"quantile": {"within": "class"}}, "regularise": {"deepcut": {}}},
    "one view": {"regularise": {"deepcut": {"views": 1}}}, "clreg": {"regularise": {"clreg": {}}},
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    folder: Path
    sides: dict[str, Path]

    def values(self, out: Path, **changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "model": {"task": "token_classification", "name": str(self.folder / "original" / "model")},
            "data": {side: str(path) for side, path in self.sides.items() if side != "stopping"},
            "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {"deepcut": {}}},
            "schedule": {"steps": 4, "forget_batch": 6, "retain_batch": 6, "retain_steps": 1},
            "optimiser": {"lr": 1e-3},
            "evaluate": {"max_rows": 8, "relearn_steps": [], "latent": False, "map": "none"},
            "out": str(out),
        }
        for key, value in changes.items():
            recipe.put(made, key.split("__"), value)
        return made

    def recipe(self, out: Path, **changes: Any) -> recipe.Recipe:
        return recipe.build(self.values(out, **changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("tagged")
    made = world_tagged.tagged_world(0, forget=2, retain=6, untouched=2, never_seen=2, stopping=2, sentences=6)
    sides = world.write(made, folder / "data")
    models.new_tokenizer(world_tagged.tagged_corpus(made), 400).save_pretrained(folder / "tokenizer")
    finetune(recipe.build({
        "model": {"task": "token_classification", "config": ENCODER, "tokenizer": str(folder / "tokenizer")},
        "data": {"forget": str(sides["forget"]), "retain": str(sides["retain"]), "train": [str(sides["untouched"])]},
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": 3, "retain_batch": 16}, "optimiser": {"lr": 3e-3},
        "out": str(folder / "original"),
    }), progress=QUIET)  # fmt: skip
    return Small(folder, sides)


def test_the_head_knows_its_classes(small: Small) -> None:
    config = json.loads((small.folder / "original" / "model" / "config.json").read_text())
    kinds = sorted(f"{prefix}-{kind}" for kind in world_tagged.TYPES for prefix in "BI")
    assert [config["id2label"][str(i)] for i in range(len(config["id2label"]))] == ["O", *kinds]


@pytest.mark.parametrize("case", TERMS)
def test_every_kind_of_term_trains(case: str, small: Small, tmp_path: Path) -> None:
    objective = {"forget": {}, "retain": {"nll": {}}, "regularise": {}, **TERMS[case]}
    run(small.recipe(tmp_path / "run", objective=objective), progress=QUIET)
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    expected = {name for kind in objective.values() for name in kind}
    assert expected <= {name for row in log for name in row["terms"]}
    assert all(math.isfinite(v) for row in log for v in row["terms"].values())
    assert all(math.isfinite(v) for row in log for v in row.get("monitor", {}).values())
    before, after = (
        load_file(f / "model" / "model.safetensors") for f in (small.folder / "original", tmp_path / "run")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule__balance": "classes"},
        {"schedule__mixed": True, "schedule__retain_steps": 0},
        {"objective__regularise": {"deepcut": {"contrast": "both"}}, "schedule__contrast_batch": 4},
        {"model__train_only": r"encoder\.layer\.1\.|classifier"},
        {"model__lora": {"r": 2, "target_modules": ["query", "value"]}},
        {"model__lora": {"r": 2, "target_modules": ["query"]}, "initialise": {"pissa": {}}},
    ],
    ids=["balanced", "mixed", "contrast rows", "upper layers", "lora", "lora from pissa"],
)
def test_settings_that_only_classifiers_or_adapters_have(changes: dict, small: Small, tmp_path: Path) -> None:
    run(small.recipe(tmp_path / "run", **changes), progress=QUIET)
    numbers = artifacts.read_results(artifacts.RunFolder(tmp_path / "run")).models["unlearned"]
    assert 0 <= numbers["forget_f1"].value <= 1
    assert numbers["retain_probability"].n


def test_two_runs_and_a_resumed_one_are_the_same(small: Small, tmp_path: Path) -> None:
    """Dropout is the model's own here; its draws are the trainer's, which a checkpoint keeps."""
    for name in ("a", "b"):
        run(small.recipe(tmp_path / name, checkpoint_every=2), progress=QUIET)
    whole = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert all(torch.equal(whole[k], v) for k, v in load_file(tmp_path / "b" / "model" / "model.safetensors").items())
    import shutil

    for part in ("model", "results.json", "checkpoints/checkpoint-4"):
        place = tmp_path / "b" / part
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    record = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**record, "status": "running"}))
    run(small.recipe(tmp_path / "b", checkpoint_every=2), resume=True, progress=QUIET)
    again = load_file(tmp_path / "b" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_rule_counts_entities_of_a_kind(small: Small, tmp_path: Path) -> None:
    stop = {
        "rule": "two_sided",
        "band": [0.0, 1.0],
        "quality": 0.0,
        "every": 1,
        "calibration": str(small.sides["stopping"]),
    }
    run(small.recipe(tmp_path / "run", stop=stop), progress=QUIET)
    seen = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["stopping"]
    assert seen["kept"] in [c["step"] for c in seen["checks"]]
    assert all(0 <= c["auc"] <= 1 for c in seen["checks"])


@pytest.mark.parametrize(
    ("band", "looks"), [([0.0, 1.0], 4), ([0.5 - 1e-9, 0.5], 0)], ids=["in the band", "never there"]
)
def test_a_look_reads_nothing_that_decides_nothing(
    band: list[float], looks: int, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not sentences without entities, nor the retained outside the band; and the statistic is that of all rows."""
    plain = [{**row, "ner_tags": ["O"] * len(row["tokens"])} for row in rows(small.sides["stopping"])[:3]]
    own = write(tmp_path / "own.jsonl", [*plain, *rows(small.sides["stopping"])])
    stop = {"rule": "two_sided", "band": band, "quality": 2.0, "every": 1, "calibration": str(own)}
    read: list[tuple[str, tuple[int, ...]]] = []
    batch = sides.Rows.batch
    monkeypatch.setattr(sides.Rows, "batch", lambda s, side, i: (read.append((side, tuple(i))), batch(s, side, i))[1])

    def checks(name: str) -> list[dict[str, Any]]:
        with pytest.raises(NotShown):
            run(small.recipe(tmp_path / name, stop=stop), progress=QUIET)
        return artifacts.read_manifest(artifacts.RunFolder(tmp_path / name))["stopping"]["checks"]

    seen = checks("own")
    assert len(seen) == 4
    assert sum(side == "watch" for side, _ in read) == 1 + looks  # once before training
    assert sum(c["quality"] is not None for c in seen) == looks
    assert {0, 1, 2}.isdisjoint(i for side, indices in read if side == "calibration" for i in indices)
    monkeypatch.setattr(watching, "_with_units", lambda rows, side, chosen, of: chosen)
    assert [c["auc"] for c in checks("all")] == pytest.approx([c["auc"] for c in seen])
    assert any(0 in indices for side, indices in read if side == "calibration")


def test_a_rule_with_nothing_to_compare_is_refused(small: Small, tmp_path: Path) -> None:
    plain = [{**row, "ner_tags": ["O"] * len(row["tokens"])} for row in rows(small.sides["stopping"])]
    stop = {"rule": "two_sided", "calibration": str(write(tmp_path / "plain.jsonl", plain))}
    with pytest.raises(UsageError, match="no entity type of the forgotten rows"):
        run(small.recipe(tmp_path / "run", stop=stop), progress=QUIET)


def test_the_rule_may_aim_at_a_gap_of_probabilities(small: Small, tmp_path: Path) -> None:
    stop = {"rule": "two_sided", "statistic": "gap", "quality": 0.0, "every": 1, "band": [-1.0, 1.0],
            "calibration": str(small.sides["stopping"])}  # fmt: skip
    run(small.recipe(tmp_path / "run", stop=stop), progress=QUIET)
    seen = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["stopping"]
    nearest = min(seen["checks"], key=lambda c: abs(c["gap"]))
    assert (seen["statistic"], seen["kept"]) == ("gap", nearest["step"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "probability on average" in page
    with pytest.raises(UsageError, match=r"stop\.band is 0\.45 to 0\.55: give one around 0, where"):
        run(small.recipe(tmp_path / "trap", stop={**stop, "band": [0.45, 0.55]}), progress=QUIET)
    assert not (tmp_path / "trap").exists()


# --- what entities are compared within ----------------------------------------------------------------------------

_PERSON, _PLACE = 1, 2  # of the classes O, B-person, B-place
_TYPES = kinds.types(np.array([0, _PERSON, _PLACE]))


def sentence(*words: tuple[int, int]) -> ClassExample:
    """Words of one token each, between the special ones."""
    return ClassExample((101, *(w for w, _ in words), 102), tuple(range(1, len(words) + 1)), tuple(c for _, c in words))


def test_words_are_held_against_never_seen_ones_that_are_as_familiar() -> None:
    """By hand: 7 is a retained person, 8 a retained place, 9 nothing but O there, 11 to 99 are not there."""
    retain = [sentence((7, 1), (9, 0)), sentence((8, 2))]
    calibration = [sentence((7, 1)), sentence((8, 1)), sentence((11, 1)), sentence((12, 2))] * kinds.LEAST
    forget = sentence((7, 1), (8, 1), (9, 1), (7, 0), (13, 1), (14, 2))
    given = {"retain": retain, "calibration": calibration, "forget": [forget]}
    every = {side: list(range(len(own))) for side, own in given.items()}

    def of(given: dict[str, list[ClassExample]], every: dict[str, list[int]]) -> list[int]:
        return kinds.familiar(Rows(given, 0, "token_classification"), every, _TYPES)(forget)

    same, other, novel = (3 * _PERSON + i for i in range(3))
    assert of(given, every) == [same, other, other, 0, novel, 3 * _PLACE + 2]
    fewer = {**every, "calibration": every["calibration"][1:]}  # one retained person fewer: too few, so all of the type
    assert of(given, fewer) == [same, same, same, 0, same, 3 * _PLACE + 2]


def test_a_word_is_all_of_its_tokens() -> None:
    """Two words that begin alike are two; the special token at the end is no part of the last."""
    example = ClassExample((101, 5, 6, 5, 102), (1, 3), (1, 1))
    assert kinds._words(example) == [(5, 6), (5,)]
    assert kinds._words(ClassExample((5,), (0,), (1,))) == [(5,)]  # a tokenizer without special tokens
    assert kinds._words(ClassExample((101, 102), (), ())) == []


def test_texts_have_one_class(small: Small, tmp_path: Path) -> None:
    sides = {
        side: write(tmp_path / f"{side}.jsonl", [
            {"text": " ".join(r["tokens"]), "label": r["tokens"][0].lower()[0], "group": r["group"]} for r in rows(path)
        ])
        for side, path in small.sides.items()
    }  # fmt: skip
    texts = Small(tmp_path, sides)
    task = {"task": "sequence_classification"}
    finetune(recipe.build({
        "model": {**task, "config": ENCODER, "tokenizer": str(small.folder / "tokenizer")},
        "data": {"forget": str(sides["forget"]), "retain": str(sides["retain"]), "train": [str(sides["untouched"])]},
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": 2, "retain_batch": 16}, "optimiser": {"lr": 3e-3}, "out": str(tmp_path / "original"),
    }), progress=QUIET)  # fmt: skip
    classes = {r["label"] for side in ("forget", "retain", "untouched") for r in rows(sides[side])}
    kept = {s: [r for r in rows(p) if r["label"] in classes] for s, p in sides.items()}
    for side, own in kept.items():
        write(sides[side], own)
    run(texts.recipe(tmp_path / "run", model__task="sequence_classification"), progress=QUIET)
    numbers = artifacts.read_results(artifacts.RunFolder(tmp_path / "run")).models["unlearned"]
    assert 0 <= numbers["forget_accuracy"].value <= 1


def test_an_encoder_gets_a_head_by_training_and_not_by_forgetting(small: Small, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(str(small.folder / "tokenizer"))
    bare = AutoModel.from_config(
        BertConfig(vocab_size=len(tokenizer), **{k: v for k, v in ENCODER.items() if k != "model_type"})
    )
    bare.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputRefused, match="finetune"):
        run(small.recipe(tmp_path / "run", model__name=str(tmp_path / "bare")), progress=QUIET)
    assert not (tmp_path / "run").exists()
    values = small.values(tmp_path / "made", model__name=str(tmp_path / "bare"))
    values["data"] = {"retain": str(small.sides["retain"])}
    values["objective"] = {"forget": {}, "retain": {"nll": {}}, "regularise": {}}
    values["schedule"] = {"epochs": 1, "retain_batch": 16}
    made = finetune(recipe.build(values), progress=QUIET)
    kept, own = load_file(tmp_path / "bare" / "model.safetensors"), load_file(made / "model.safetensors")
    assert any(name.startswith("classifier") for name in own)
    assert {f"bert.{name}" for name in kept if not name.startswith("pooler")} <= set(own)


def test_unknown_tags_are_refused_before_anything_is_written(small: Small, tmp_path: Path) -> None:
    strange = write(tmp_path / "strange.jsonl", [{"tokens": ["Ada"], "ner_tags": ["B-planet"]}])
    with pytest.raises(InputRefused, match=r"strange\.jsonl:1"):
        run(small.recipe(tmp_path / "run", data__forget=str(strange)), progress=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_plan_is_made_without_weights(small: Small, tmp_path: Path) -> None:
    planned = excise.plan(small.recipe(tmp_path / "run"))
    assert {entry["side"] for entry in planned["passes"]} >= {"forget", "retain"}
    assert planned["steps"] == 4
