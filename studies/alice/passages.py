"""The passages of the Alice study: public-domain text and TinyStories, cut into pieces of at most 160 tokens.

No two sides share a page of a book: a page (a row of the source files, about 1,800 characters) gives one piece at most.
``forget``, ``tune`` and ``other_alice`` take pages of Alice's Adventures in Wonderland turn about; no model is trained
on ``other_alice``. ``never_seen`` are pages of Through the Looking-Glass: same author, same heroine, another book.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 160  # tokens of a passage; the first half is the prompt of the verbatim measure, the second half is asked for
SHORTEST = 120  # tokens: a page's short remainder is not used


@dataclass(frozen=True)
class Sizes:
    """Passages of each side."""

    forget: int = 24
    tune: int = 24
    other_alice: int = 36
    never_seen: int = 90
    stories: int = 360
    stories_held_out: int = 90
    classics: int = 140


QUICK = Sizes(forget=12, tune=12, other_alice=12, never_seen=40, stories=100, stories_held_out=40, classics=40)


def shared() -> Path:
    """The folder of third-party data and models."""
    folder = Path(os.environ.get("EXCISE_SHARED") or Path(__file__).resolve().parents[3] / "shared").resolve()
    if not (folder / "data" / "muse_alice").is_dir():
        raise SystemExit("set EXCISE_SHARED to the folder that holds data/ and models/")
    return folder


def _pages(name: str) -> list[str]:
    path = shared() / "data" / name
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _spread(pages: Sequence[str], count: int) -> list[str]:
    """``count`` pages, evenly over the whole."""
    return [pages[i * len(pages) // count] for i in range(min(count, len(pages)))]


def _one_piece(page: str, tokenizer: Any, which: int) -> str | None:
    """The piece number ``which`` of a page, or the first that is long enough."""
    from excise.records import Record
    from excise.tasks.chunks import chunk_text_records

    pieces = [r.completion for r in chunk_text_records([Record(None, page)], tokenizer, PIECE)]
    long = [p for p in pieces if len(tokenizer(p)["input_ids"]) >= SHORTEST]
    return long[min(which, len(long) - 1)] if long else None


def write(folder: Path, sizes: Sizes, tokenizer: Any) -> None:
    """Write ``SIDE.jsonl`` for every side; the same bytes on every machine."""
    alice = _pages("muse_alice/raw_alice.jsonl")
    glass = _pages("muse_alice/raw_looking_glass.jsonl")
    stories = _pages("tinystories_sample/validation.jsonl")
    classics = _pages("classics/train.jsonl.gz")
    third = [alice[i::3] for i in range(3)]
    cut = len(stories) * 2 // 3
    sides = {
        "forget": _spread(third[0], sizes.forget),
        "tune": _spread(third[1], sizes.tune),
        "other_alice": _spread(third[2], sizes.other_alice),
        "never_seen": _spread(glass, sizes.never_seen),
        "other": [*_spread(stories[:cut], sizes.stories), *_spread(classics, sizes.classics)],
        "stories_held_out": _spread(stories[cut:], sizes.stories_held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for side, pages in sides.items():
        pieces = [_one_piece(page, tokenizer, 1) for page in pages]
        rows = "".join(json.dumps({"text": p}, ensure_ascii=False) + "\n" for p in pieces if p)
        (folder / f"{side}.jsonl").write_text(rows, encoding="utf-8")
