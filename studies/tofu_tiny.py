"""tofu-tiny: a hundred TOFU authors, their splits, and the models that the studies start from.

Authors 1-90 are retained (1,800 questions; the first 20 authors have false answers and are the retained rows that are
measured, never trained on while unlearning), authors 191-200 are to be forgotten (the last 10, 5 or 1 of them), authors
181-190 are never seen by any model; so are 91-120, for objectives that read never-seen rows, and 121-135, for stopping
rules. Settings are tuned on authors 86-90 as the forget set. The real-authors and
world-facts questions are trained into every original and gold as general knowledge and never stand in a retain batch.
``QUICK`` is a small part of it, ``FULL`` all of TOFU with a larger model (where no author is left that nobody saw).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PER_AUTHOR = 20
#: Passes of the small model that never saw the rows: enough to read, too few to know by heart.
STRANGER_EPOCHS = 3.0
#: Originals: the one that the studies start from, and one that is stopped early.
ORIGINALS = ("original", "half")
#: Models of parts of the original's rows, each of all but a quarter: whoever is forgotten, one of them never saw.
WITHOUT = tuple(f"without-{number}" for number in (1, 2, 3, 4))


@dataclass(frozen=True)
class World:
    """Who is trained, forgotten (by split), kept but only measured, never seen; and how large the model is.

    ``strangers`` and ``stopping`` are never seen either: what objectives and stopping rules read, apart from what is
    measured.
    """

    trained: Sequence[int]
    untouched: Sequence[int]
    never_seen: Sequence[int]
    splits: Mapping[str, Sequence[int]]
    epochs: float
    width: int = 256
    blocks: int = 4
    strangers: Sequence[int] = ()
    stopping: Sequence[int] = ()


TINY = World(
    trained=(*range(1, 91), *range(191, 201)),
    untouched=range(1, 21),
    never_seen=range(181, 191),
    splits={
        "forget10": range(191, 201),
        "forget05": range(196, 201),
        "forget01": range(200, 201),
        "tune05": range(86, 91),
    },
    epochs=11,
    strangers=range(91, 121),
    stopping=range(121, 136),
)
QUICK = World(
    trained=(*range(1, 4), *range(79, 91), *range(196, 201)),
    untouched=range(1, 4),
    never_seen=range(181, 184),
    splits={"forget05": range(196, 201)},
    epochs=8,
    strangers=range(91, 97),
    stopping=range(121, 125),
)
FULL = World(
    trained=range(1, 201),
    untouched=range(1, 21),
    never_seen=(),
    splits={"forget10": range(181, 201)},
    epochs=11,
    width=512,
    blocks=6,
)


def shared() -> Path:
    """The folder of third-party data."""
    return Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


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


def write(folder: Path, world: World) -> None:
    """Write every side of every split as JSON lines below ``folder``, and the text that the tokenizer is made from."""
    by_author, known = authors(), general()
    for split, forget in world.splits.items():
        retain = [a for a in world.trained if a not in forget and a not in world.untouched]
        sides = {"forget": forget, "retain": retain, "untouched": world.untouched, "never_seen": world.never_seen}
        for side, own in sides.items():
            if own:
                save(folder / split / f"{side}.jsonl", [r for a in own for r in by_author[a]])
    for name, rows in known.items():
        save(folder / f"{name}.jsonl", rows)
    texts = [r["question"] for r in read("full.jsonl")] + [r["answer"] for r in read("full.jsonl")]
    texts += [t for rows in known.values() for r in rows for t in (r["question"], r["answer"], *r["perturbed_answer"])]
    (folder / "corpus.json").write_text(json.dumps(texts))


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def strangers(folder: Path, world: World) -> dict[str, str]:
    """Never-seen rows for objectives and for stopping rules: their files, written where they are missing."""
    by_author = authors()
    places = {"strangers": folder / "strangers.jsonl", "stopping": folder / "stopping.jsonl"}
    for name, place in places.items():
        if not place.is_file():
            save(place, [row for author in getattr(world, name) for row in by_author[author]])
    return {name: str(place) for name, place in places.items()}


def model_recipe(folder: Path, name: str, world: World, *, epochs: float | None = None) -> dict[str, Any]:
    """The recipe that trains an original, or a gold of a split, as plain values.

    ``gold-SPLIT`` is the gold; ``gold2-SPLIT``, ``gold3-SPLIT`` ... are the same with another seed: the noise floor.
    ``stranger-SPLIT`` never saw the rows either, but is a far smaller model that was trained for a far shorter time.
    ``without-N`` is the original without the ``N``-th quarter of its authors and of its general knowledge.
    """
    kind, _, split = name.partition("-")
    if kind == "stranger":
        world, epochs = dataclasses.replace(world, width=128, blocks=2), epochs or STRANGER_EPOCHS
    part, split = (f"all but {split}/{len(WITHOUT)}", "") if name in WITHOUT else (None, split)
    split = split or next(iter(world.splits))
    sides = folder / split
    return {
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": world.width, "intermediate_size": 43 * world.width // 16,
                "num_hidden_layers": world.blocks, "num_attention_heads": world.width // 64,
                "num_key_value_heads": world.width // 64, "max_position_embeddings": 512, "tie_word_embeddings": True,
            },
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "forget": str(sides / "forget.jsonl") if name in (*ORIGINALS, *WITHOUT) else "",
            "part": part,
            "retain": str(sides / "retain.jsonl"),
            "train": [str(p) for p in (sides / "untouched.jsonl", *(folder / f"{n}.jsonl" for n in general()))],
        },
        "objective": {"forget": {}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"epochs": epochs or world.epochs, "retain_batch": 16},
        "optimiser": {"name": "muon", "lr": 0.02, "adamw_lr": 0.004, "warmup": 0.05, "decay": "cosine", "floor": 0.05},
        "checkpoint_every": 0, "log_every": 10, "out": str(folder / "models" / name),
        "seed": int(kind.removeprefix("gold") or 1) - 1 if kind.startswith("gold") else 0,
    }  # fmt: skip


def train(
    folder: Path, name: str, world: World = TINY, *, epochs: float | None = None, limit: int | None = None
) -> Path:
    """Train an original or a gold unless it is there already; returns its folder.

    Args:
        folder: Where sides, tokenizer and models lie.
        name: ``original``, ``half``, ``gold-SPLIT``, ``gold2-SPLIT`` (another seed), ``stranger-SPLIT``, ``without-N``.
        world: Who is trained, and how large the model is.
        epochs: If not the world's.
        limit: At most so many rows of each side, for a smoke test.
    """
    from excise import models, recipe
    from excise.commands.finetuning import finetune

    if not (folder / "corpus.json").is_file():
        write(folder, world)
    if not (folder / "tokenizer").is_dir():
        texts = json.loads((folder / "corpus.json").read_text())
        models.new_tokenizer(texts, 4096).save_pretrained(folder / "tokenizer")
    done = folder / "models" / name / "model"
    if (done / "COMPLETE.json").is_file():
        return done
    settings = recipe.build(model_recipe(folder, name, world, epochs=epochs))
    return finetune(recipe.changed(settings, {"data.limit": limit}), resume=True)


if __name__ == "__main__":
    import sys

    import torch

    torch.set_num_threads(1)
    for wanted in sys.argv[2:]:
        print(train(Path(sys.argv[1]), wanted))
