"""Plain texts that are too long for a model, cut into pieces between words."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from excise.errors import UsageError
from excise.records import Record


def chunk_text_records(records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Record]:
    """Cut plain text rows into pieces of at most ``max_length`` tokens, as MUSE does; other rows stay as they are.

    Pieces end between words where they can. White space at a cut is dropped, nothing else is, and no piece is empty.
    Encode them with ``text_eos=False``: a cut is not an end.

    Args:
        records: Rows; pieces keep the line and group of their row.
        tokenizer: Of transformers.
        max_length: Longest piece in tokens, with what the tokenizer adds and one place for end-of-sequence.

    Raises:
        UsageError: ``max_length`` has no room for a single character.
    """
    out = []
    for record in records:
        if record.prompt is not None:
            out.append(record)
            continue
        rest = record.completion.strip()
        while rest:
            end = _fitting(rest, tokenizer, max_length - 1)
            piece = rest[:end].rstrip()
            out.append(Record(prompt=None, completion=piece, group=record.group, line=record.line))
            rest = rest[end:].lstrip()
    return out


def _fitting(text: str, tokenizer: Any, room: int) -> int:
    """How many characters fit in ``room`` tokens: up to a word's end, or within a word that is too long by itself."""
    width = 4 * max(room, 1)
    while True:  # a window of text that is surely long enough, or all of it
        if len(token_ids(tokenizer, text[:width])) > room:
            break
        if width >= len(text):
            return len(text)
        width *= 2
    window = text[:width]

    def too_long(end: int) -> bool:
        return len(token_ids(tokenizer, window[:end])) > room

    words = [match.start() for match in re.finditer(r"\s+", window)]
    for ends in (words, range(1, len(window))):
        fits = bisect_right(ends, False, key=too_long)
        while fits > 0 and too_long(ends[fits - 1]):  # lengths do not grow strictly with the text
            fits -= 1
        if fits > 0:
            return ends[fits - 1]
    raise UsageError(f"max_length {room + 1} has no room for a single character")


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, with or without what the tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
