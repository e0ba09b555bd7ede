"""Whose sentences are forgotten: every side of every split as a file, no sentence on two sides.

Of each data set up to 1,200 training sentences, three quarters of them with an entity, and a third as many again of the
same source that no model sees: half of those for the stopping rule, half for measuring. The official dev and test parts
only measure (they come from other sites and times, so a membership test against them would measure that). Sentences are
told apart by their words; WNUT17 repeats 103 of its training sentences, which count once.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from excise.records import Record, read_tagged

#: Name of a data set -> its folder below shared/data/ner.
TAGGED = {"wnut17": "wnut17", "ncbi": "ncbi_disease", "wnut16": "wnut16", "bc5cdr": "bc5cdr_chem"}
#: Texts instead of tags: who wrote a passage.
TEXTS = "classics"
AUTHORS, WORDS = 8, 40
WITH_ENTITY, UNSEEN = 0.75, 1 / 3
#: Draws at random are cut from one permutation, so they are disjoint; the settings are tuned on its other end.
TUNE = "tune05"


@dataclass(frozen=True)
class Limits:
    """At most so many training sentences, and sentences of dev and test."""

    train: int = 1200
    measured: int = 1300


def shared() -> Path:
    """The folder of third-party data."""
    return Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def distinct(records: Sequence[Record], seen: set[str] | None = None) -> list[Record]:
    """The first of every sentence, and none that is ``seen``."""
    seen, out = set() if seen is None else seen, []
    for record in records:
        if record.completion not in seen:
            seen.add(record.completion)
            out.append(record)
    return out


def divided(records: Sequence[Record], most: int, has: Callable[[Record], bool]) -> tuple[list[Record], list[Record]]:
    """Training and unseen sentences, `WITH_ENTITY` of each with an entity, in an order of their own."""
    rng = np.random.default_rng(17)
    shuffled = [records[i] for i in rng.permutation(len(records))]
    ours, others = [r for r in shuffled if has(r)], [r for r in shuffled if not has(r)]
    total = min(most * (1 + UNSEEN), len(ours) / WITH_ENTITY, len(others) / (1 - WITH_ENTITY))
    parts: tuple[list[Record], list[Record]] = ([], [])
    for own, share in ((ours, WITH_ENTITY), (others, 1 - WITH_ENTITY)):
        train, unseen = (int(total * share * part / (1 + UNSEEN)) for part in (1, UNSEEN))
        parts[0].extend(own[:train])
        parts[1].extend(own[train : train + unseen])
    mixed = [[part[i] for i in rng.permutation(len(part))] for part in parts]
    return mixed[0], mixed[1]


def sides(name: str, limits: Limits) -> dict[str, list[Record]]:
    """``train``, ``never_seen``, ``calibration``, ``dev`` and ``test`` of a data set.

    Where the objective reads never-seen rows too, it has every second one of the stopping rule's (``aimed_at``), and
    the rule the others (``judged_by``): no method has more of them than another.
    """
    if name == TEXTS:
        parts = passages(limits)
        train, unseen = parts.pop("train"), parts.pop("unseen")
    else:
        folder, seen = shared() / "data" / "ner" / TAGGED[name], set[str]()
        read = {part: distinct(read_tagged(str(folder / f"{part}.conll")), seen) for part in ("train", "dev", "test")}
        train, unseen = divided(read.pop("train"), limits.train, lambda r: any(t != "O" for t in r.tags))
        parts = {part: own[: limits.measured] for part, own in read.items()}
    rule = unseen[1::2]
    shared_out = {"aimed_at": rule[::2], "judged_by": rule[1::2]}
    return {"train": train, "never_seen": unseen[::2], "calibration": rule, **shared_out, **parts}


def passages(limits: Limits) -> dict[str, list[Record]]:
    """First words of passages by the authors of whom there are most; books of a side are its own for dev and test."""
    by_author: dict[str, list[dict]] = {}
    with gzip.open(shared() / "data" / "classics" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            by_author.setdefault(row["author"], []).append(row)
    several = [a for a, rows in by_author.items() if len({r["title"] for r in rows}) > 2]
    chosen = sorted(several, key=lambda a: -len(by_author[a]))
    out: dict[str, list[Record]] = {"train": [], "unseen": [], "dev": [], "test": []}
    each = limits.train // AUTHORS
    for author in sorted(chosen[:AUTHORS]):
        titles = sorted({r["title"] for r in by_author[author]})
        rng = np.random.default_rng(17)
        held = {titles[-1]: "test", titles[-2]: "dev"}
        own: dict[str, list[Record]] = {"test": [], "dev": [], "": []}
        for i in rng.permutation(len(by_author[author])):
            row = by_author[author][i]
            text = " ".join(row["text"].split()[:WORDS])
            own[held.get(row["title"], "")].append(Record(None, text, tags=(author,)))
        many = int(each * UNSEEN)
        own = {part: distinct(rows) for part, rows in own.items()}
        for part in ("dev", "test"):
            out[part] += own[part][: limits.measured // AUTHORS]
        out["train"] += own[""][:each]
        out["unseen"] += own[""][each : each + many]
    return {k: [v[i] for i in np.random.default_rng(17).permutation(len(v))] for k, v in out.items()}


# --- what is forgotten --------------------------------------------------------------------------------------------


def chosen(train: Sequence[Record], split: str, vectors: Callable[[], np.ndarray]) -> list[int]:
    """The rows that a split forgets.

    Args:
        train: Training rows.
        split: ``random05-2`` (per cent and draw), ``tune05``, ``type-person``, or ``cluster`` (about 5 % each).
        vectors: A vector of each training row, asked for by ``cluster`` alone.
    """
    order = np.random.default_rng(5).permutation(len(train))
    five = max(2, round(0.05 * len(train)))
    if split == TUNE:
        return sorted(int(i) for i in order[-five:])
    if split.startswith("random"):
        share, draw = split.removeprefix("random").split("-")
        size = max(2, round(int(share) / 100 * len(train)))
        return sorted(int(i) for i in order[int(draw) * size : (int(draw) + 1) * size])
    if split.startswith("type-"):
        own = [i for i in order if f"B-{split.removeprefix('type-')}" in train[i].tags]
        return sorted(int(i) for i in own[:five])
    return nearest_cluster(vectors(), five)


def nearest_cluster(vectors: np.ndarray, size: int) -> list[int]:
    """``size`` rows of one cluster of directions: the one whose size is nearest to that from above, its middle."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rng = np.random.default_rng(3)
    centres = unit[rng.choice(len(unit), max(2, len(unit) // (2 * size)), replace=False)]
    for _ in range(50):
        own = (unit @ centres.T).argmax(1)
        sums = np.stack([unit[own == k].sum(0) if (own == k).any() else centres[k] for k in range(len(centres))])
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    own = (unit @ centres.T).argmax(1)
    counts = np.bincount(own, minlength=len(centres))
    large = [k for k in range(len(centres)) if counts[k] >= size] or [int(counts.argmax())]
    k = min(large, key=lambda k: counts[k])
    near = np.argsort(-(unit @ centres[k]) + 9.0 * (own != k), kind="stable")
    return sorted(int(i) for i in near[: min(size, counts[k])])


# --- files --------------------------------------------------------------------------------------------------------


def write(path: Path, records: Sequence[Record]) -> None:
    """Tagged sentences as CoNLL, texts as JSON lines; a file that is the same is left alone: others may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".conll":
        blocks = ("".join(f"{w}\t{t}\n" for w, t in zip(r.tokens, r.tags, strict=True)) for r in records)
        text = "\n".join(blocks)
    else:
        rows = ({"text": r.completion, "label": r.tags[0]} for r in records)
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def suffix(name: str) -> str:
    """How the files of a data set end."""
    return ".jsonl" if name == TEXTS else ".conll"


def task(name: str) -> str:
    """The task of a data set."""
    return "sequence_classification" if name == TEXTS else "token_classification"
