"""Sequence classification: labelled texts to tensors in which one position of each row holds the class of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from excise.errors import InputRefused
from excise.records import Record, read_labelled
from excise.tasks.causal_lm import ANSWER, Encoding, where_of
from excise.tasks.chunks import chunk_text_records
from excise.tasks.token_classification import ClassExample, collate, too_long, unknown_class

__all__ = ["LONG", "ClassExample", "class_names", "collate", "cut", "encode_records", "read", "sequences"]

LONG = "refuse"  # what becomes of rows that are too long, unless the recipe says


def read(source: str, *, limit: int | None = None, tag_names: Sequence[str] = ()) -> list[Record]:
    """The rows of this task: `read_labelled`."""
    return read_labelled(source, limit=limit, names=tag_names)


def class_names(records: Sequence[Record]) -> tuple[str, ...]:
    """The classes of a fresh head: every label that occurs, sorted.

    Example:
        >>> class_names([Record(None, "t", tags=("b",)), Record(None, "u", tags=("a",))])
        ('a', 'b')
    """
    return tuple(sorted({label for record in records for label in record.tags}))


def encode_records(
    records: Sequence[Record],
    tokenizer: Any,
    spec: Encoding,
    *,
    names: Sequence[str],
    source: str = "",
    at: Literal["auto", "first", "last"] = "auto",
) -> list[ClassExample]:
    """Token ids of every text, with its class at one position.

    Args:
        records: With ``completion`` and one label in ``tags``.
        tokenizer: Of transformers.
        spec: Of which ``max_length`` and ``truncate`` count.
        names: The classes, by number.
        source: The file or side, for messages.
        at: The position that holds the class: ``first`` (BERT's [CLS]) or ``last`` (what decoders read); ``auto`` is
            the first where the tokenizer begins a text with its [CLS] token.

    Raises:
        InputRefused: A text is too long or has no token, or its label is none of the classes.
    """
    numbers = {name: number for number, name in enumerate(names)}
    out = []
    for row, record in enumerate(records):
        where = where_of(source, record, row)
        how = {"truncation": True, "max_length": spec.max_length} if spec.truncate else {"truncation": False}
        ids = tuple(tokenizer(record.completion, padding=False, verbose=False, **how)["input_ids"])
        if not ids:
            raise InputRefused(f"{where}: the tokenizer leaves nothing of the text: give a longer one")
        if len(ids) > spec.max_length:
            raise too_long(where, len(ids), spec.max_length)
        if record.tags[0] not in numbers:
            raise unknown_class(where, "the label", len(numbers))
        begins = ids[0] == getattr(tokenizer, "cls_token_id", None)
        first = begins if at == "auto" else at == "first"
        out.append(ClassExample(ids, (0 if first else len(ids) - 1,), (numbers[record.tags[0]],)))
    return out


def sequences(
    records: Sequence[Record], tokenizer: Any, spec: Encoding, *, names: Sequence[str], source: str = ""
) -> list[tuple[int, int, ClassExample]]:
    """What evaluation scores, as ``(row, kind, example)``: every row once, kind 0."""
    examples = encode_records(records, tokenizer, spec, names=names, source=source)
    return [(row, ANSWER, example) for row, example in enumerate(examples)]


def cut(records: Sequence[Record], tokenizer: Any, max_length: int, *, source: str = "") -> list[Record]:
    """Split texts of more than ``max_length`` tokens between words where that can be; each piece has the label.

    Args:
        records: With ``completion`` and one label in ``tags``.
        tokenizer: Of transformers.
        max_length: Longest piece in tokens, with what the tokenizer adds.
        source: Not needed: no text is refused.

    Raises:
        UsageError: ``max_length`` has no room for a single character.
    """
    out = []
    for record in records:
        if len(tokenizer(record.completion, padding=False, truncation=False, verbose=False)["input_ids"]) <= max_length:
            out.append(record)
            continue
        pieces = chunk_text_records([record], tokenizer, max_length + 1)  # that keeps a place for an end, this has none
        out += [replace(record, completion=piece.completion) for piece in pieces]
    return out
