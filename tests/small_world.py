"""The smallest whole case: a few people, a tokenizer, an original and a gold, made by the commands in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise import recipe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": True,
}
# Enough to know the rows better than a model that never saw them, which is all that these tests need.
TRAINING = {
    "schedule": {"epochs": 14, "retain_batch": 16},
    "optimiser": {"name": "muon", "lr": 0.02, "adamw_lr": 0.01, "decay": "cosine", "floor": 0.05},
    "log_every": 5,
}


@dataclass(frozen=True)
class SmallWorld:
    """Paths of what the commands read; all of it is read-only for tests.

    Attributes:
        folder: Where everything lies.
        sides: Side -> JSONL file.
        original: Folder of the model that knows everybody.
        gold: Folder of the model that was trained without the people to forget.
    """

    folder: Path
    sides: dict[str, Path]
    original: Path
    gold: Path

    @property
    def tokenizer(self) -> Path:
        """Trained on the text of all sides."""
        return self.folder / "tokenizer"

    def values(self, out: Path | str | None = None, **changes: Any) -> dict[str, Any]:
        """Plain values of a short run; ``changes`` are dotted keys with ``__`` for the dot."""
        values: dict[str, Any] = {
            "model": {"name": str(self.original), "precision": "fp32"},
            "data": {side: str(path) for side, path in self.sides.items()},
            "schedule": {"steps": 6, "forget_batch": 8, "retain_batch": 8},
            "optimiser": {"lr": 2e-3},
            "evaluate": {"gold": str(self.gold), "generate": 6, "max_rows": 10, "relearn_steps": [0, 1, 2]},
        }
        if out is not None:
            values["out"] = str(out)
        for key, value in changes.items():
            recipe.put(values, key.split("__"), value)
        return values

    def recipe(self, out: Path | str | None = None, **changes: Any) -> recipe.Recipe:
        """The recipe of `values`."""
        return recipe.build(self.values(out, **changes))

    def file(self, path: Path, out: Path | str | None = None, **changes: Any) -> Path:
        """The same as a recipe file."""
        import yaml

        path.write_text(yaml.safe_dump(self.values(out, **changes)), encoding="utf-8")
        return path


def training(tokenizer: Path, data: dict[str, str], out: Path) -> dict[str, Any]:
    """A recipe that trains the small model from scratch."""
    model = {"config": CONFIG, "tokenizer": str(tokenizer), "precision": "fp32"}
    return {"model": model, "data": {"untouched": 0, **data}, "out": str(out), **TRAINING}


def build(folder: Path) -> SmallWorld:
    """Write the rows, train the tokenizer, the original and the gold."""
    import excise
    from excise import models, world
    from excise.commands.progress import Progress

    made = world.world(0, forget=2, retain=4, untouched=2, never_seen=2, stopping=0)
    sides = world.write(made, folder / "data")
    models.new_tokenizer(world.corpus(made), 1024).save_pretrained(folder / "tokenizer")
    own = {"retain": str(sides["retain"]), "train": [str(sides["untouched"])]}
    trained = {}
    for name, data in (("original", {**own, "forget": str(sides["forget"])}), ("gold", own)):
        settings = recipe.build(training(folder / "tokenizer", data, folder / name))
        trained[name] = Path(excise.finetune(settings, progress=Progress(quiet=True)))
    return SmallWorld(folder, sides, trained["original"], trained["gold"])


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path
