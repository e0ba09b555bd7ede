"""tofu-tiny: a hundred TOFU authors, their splits, and the models that the studies start from.

Authors 1-90 are retained (1,800 questions; the first 20 authors have false answers and are the retained rows that are
measured, never trained on while unlearning), authors 191-200 are to be forgotten (the last 10, 5 or 1 of them), authors
181-190 are never seen by any model. Settings are tuned on authors 86-90 as the forget set. The real-authors and
world-facts questions are trained into every original and gold as general knowledge and never stand in a retain batch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PER_AUTHOR = 20
#: Forget authors of each split; the rest of 1-90 and 191-200 is retained.
SPLITS = {
    "forget10": range(191, 201),
    "forget05": range(196, 201),
    "forget01": range(200, 201),
    "tune05": range(86, 91),
}
TRAINED = [*range(1, 91), *range(191, 201)]
NEVER_SEEN = range(181, 191)
UNTOUCHED = range(1, 21)


def shared() -> Path:
    """The folder of third-party data."""
    return Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def read(name: str) -> list[Row]:
    """Rows of a TOFU file."""
    return [json.loads(line) for line in (shared() / "data" / "tofu" / name).read_text().splitlines()]


def authors() -> dict[int, list[Row]]:
    """Rows by author (1-200), with paraphrases and false answers where TOFU gives them."""
    rows = read("full.jsonl")
    perturbed = {
        (r["question"], r["answer"]): r for n in ("retain_perturbed", "forget10_perturbed") for r in read(n + ".jsonl")
    }
    out: dict[int, list[Row]] = {}
    for i, row in enumerate(rows):
        author = i // PER_AUTHOR + 1
        full = perturbed.get((row["question"], row["answer"]), row)
        out.setdefault(author, []).append({**full, "group": f"author-{author}"})
    return out


def general() -> dict[str, list[Row]]:
    """General knowledge with false answers, for model utility."""
    return {"real_authors": read("real_authors_perturbed.jsonl"), "world_facts": read("world_facts_perturbed.jsonl")}


def write(folder: Path) -> None:
    """Write every side of every split as JSON lines below ``folder``."""
    by_author, known = authors(), general()
    for split, forget in SPLITS.items():
        retain = [a for a in TRAINED if a not in forget and a not in UNTOUCHED]
        sides = {"forget": forget, "retain": retain, "untouched": UNTOUCHED, "never_seen": NEVER_SEEN}
        for side, chosen in sides.items():
            _write(folder / split / f"{side}.jsonl", [r for a in chosen for r in by_author[a]])
    for name, rows in known.items():
        _write(folder / f"{name}.jsonl", rows)
    texts = [r["question"] for r in read("full.jsonl")] + [r["answer"] for r in read("full.jsonl")]
    texts += [t for rows in known.values() for r in rows for t in (r["question"], r["answer"], *r["perturbed_answer"])]
    (folder / "corpus.json").write_text(json.dumps(texts))


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def model_recipe(folder: Path, name: str, *, epochs: float, seed: int = 0) -> dict[str, Any]:
    """The recipe that trains the original (``name="original"``) or the gold of a split, as plain values."""
    split = "forget10" if name == "original" else name.removeprefix("gold-")
    sides = folder / split
    return {
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "forget": str(sides / "forget.jsonl") if name == "original" else "",
            "retain": str(sides / "retain.jsonl"),
            "train": [str(p) for p in (sides / "untouched.jsonl", *(folder / f"{n}.jsonl" for n in general()))],
        },
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": epochs, "retain_batch": 16},
        "optimiser": {"name": "muon", "lr": 0.02, "adamw_lr": 0.004, "warmup": 0.05, "decay": "cosine", "floor": 0.05},
        "checkpoint_every": 0, "log_every": 10, "seed": seed, "out": str(folder / "models" / name),
    }  # fmt: skip


def train(folder: Path, name: str, *, epochs: float, seed: int = 0) -> Path:
    """Train the original or a gold unless it is there already; returns its folder."""
    from excise import models, recipe
    from excise.commands.training import finetune

    if not (folder / "corpus.json").is_file():
        write(folder)
    if not (folder / "tokenizer").is_dir():
        models.new_tokenizer(json.loads((folder / "corpus.json").read_text()), 4096).save_pretrained(
            folder / "tokenizer"
        )
    done = folder / "models" / name / "model"
    if (done / "COMPLETE.json").is_file():
        return done
    return finetune(recipe.build(model_recipe(folder, name, epochs=epochs, seed=seed)), resume=True)


if __name__ == "__main__":
    import sys

    import torch

    torch.set_num_threads(1)
    for wanted in sys.argv[2:]:
        print(train(Path(sys.argv[1]), wanted, epochs=11))
