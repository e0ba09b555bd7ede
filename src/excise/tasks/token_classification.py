"""Token classification: tagged sentences to tensors in which the first token of each word holds the word's class.

Words are given to the tokenizer one by one, so which token belongs to which word is known and never guessed from text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from excise.errors import InputRefused
from excise.records import Record, read_tagged
from excise.tasks import causal_lm
from excise.tasks.causal_lm import ANSWER, Encoding, Example, where_of

LONG = "refuse"  # what becomes of rows that are too long, unless the recipe says
IGNORED = -100  # the class of a position without a label


@dataclass(frozen=True)
class ClassExample:
    """Token ids of one row, the places in them that hold a label, in order, and the class of each."""

    input_ids: tuple[int, ...]
    places: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def labels(self) -> int:
        """Number of labels."""
        return len(self.places)


def read(source: str, *, limit: int | None = None, tag_names: Sequence[str] = ()) -> list[Record]:
    """The rows of this task: `read_tagged`."""
    return read_tagged(source, limit=limit, names=tag_names)


def class_names(records: Sequence[Record]) -> tuple[str, ...]:
    """The classes of a fresh head: O first, then B- and I- of every type that occurs, sorted.

    Both prefixes stand there although only one may occur: the next rows of a type need not be of the same lengths.

    Example:
        >>> class_names([Record(None, "Ada slept", tokens=("Ada", "slept"), tags=("B-person", "O"))])
        ('O', 'B-person', 'I-person')
    """
    types = {tag[2:] for record in records for tag in record.tags if tag != "O"}
    return ("O", *sorted(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def encode_records(
    records: Sequence[Record], tokenizer: Any, spec: Encoding, *, names: Sequence[str], source: str = ""
) -> list[ClassExample]:
    """Token ids of every sentence, with the class of each word at its first token.

    A word that the tokenizer leaves nothing of (a zero-width character) stands as its unknown token, so that every
    word has a label. Byte-level tokenizers read each word with a blank before it, whether or not they add one.

    Args:
        records: With ``tokens`` and ``tags``.
        tokenizer: A fast one of transformers: the slow ones do not say which word a token is of.
        spec: Of which ``max_length`` counts; ``truncate`` does not, since it would drop labels.
        names: The classes, by number.
        source: The file or side, for messages.

    Raises:
        InputRefused: A sentence is too long (`cut` splits it), a tag is none of the classes, or the tokenizer is slow.
    """
    numbers = {name: number for number, name in enumerate(names)}
    out = []
    for row, (record, (ids, words)) in enumerate(zip(records, _spread(records, tokenizer, source), strict=True)):
        where = where_of(source, record, row)
        if len(ids) > spec.max_length:
            raise too_long(where, len(ids), spec.max_length)
        unknown = next((i for i, tag in enumerate(record.tags, 1) if tag not in numbers), None)
        if unknown:
            raise unknown_class(where, f"tag {unknown}", len(numbers))
        out.append(ClassExample(tuple(ids), tuple(w[0] for w in words), tuple(numbers[tag] for tag in record.tags)))
    return out


def sequences(
    records: Sequence[Record], tokenizer: Any, spec: Encoding, *, names: Sequence[str], source: str = ""
) -> list[tuple[int, int, ClassExample]]:
    """What evaluation scores, as ``(row, kind, example)``: every row once, kind 0."""
    examples = encode_records(records, tokenizer, spec, names=names, source=source)
    return [(row, ANSWER, example) for row, example in enumerate(examples)]


def too_long(where: str, length: int, most: int) -> InputRefused:
    """The refusal of a row that does not fit."""
    return InputRefused(f"{where}: {length} tokens, more than max_length {most}: set data.long to split, or raise it")


def unknown_class(where: str, what: str, count: int) -> InputRefused:
    """The refusal of a class that the model does not have."""
    return InputRefused(f"{where}: {what} is none of the {count} classes of the model: correct it, or train one on it")


# --- words and their tokens ---------------------------------------------------------------------------------------


def _spread(records: Sequence[Record], tokenizer: Any, source: str) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of every sentence, and for each of its words the places of its tokens, at least one."""
    if not getattr(tokenizer, "is_fast", False):
        what = "the tokenizer is a slow one, which does not say which word a token is of"
        raise InputRefused(f"{what}: use one with a tokenizer.json (transformers calls it fast)")
    before = _before(tokenizer)
    sentences = [[before + word for word in record.tokens] for record in records]
    out = _tokenised(sentences, tokenizer)
    for row, (words, (_, places)) in enumerate(zip(sentences, out, strict=True)):
        if all(places):
            continue
        kept = [word if held else tokenizer.unk_token for word, held in zip(words, places, strict=True)]
        if tokenizer.unk_token is not None:
            out[row] = _tokenised([kept], tokenizer)[0]
        if not all(out[row][1]):
            where, lost = where_of(source, records[row], row), 1 + [bool(held) for held in out[row][1]].index(False)
            raise InputRefused(f"{where}: the tokenizer leaves nothing of word {lost}: remove it with its tag")
    return out


def _tokenised(sentences: Sequence[Sequence[str]], tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    if not sentences:
        return []
    made = tokenizer([list(s) for s in sentences], is_split_into_words=True, padding=False, truncation=False,
                     verbose=False)  # fmt: skip
    out = []
    for row, words in enumerate(sentences):
        places: list[list[int]] = [[] for _ in words]
        for at, word in enumerate(made.word_ids(row)):
            if word is not None:
                places[word].append(at)
        out.append((list(made["input_ids"][row]), places))
    return out


def _before(tokenizer: Any) -> str:
    """A blank for tokenizers to which a word by itself is not what it is in a text (byte-level BPE); else nothing."""
    how = {"add_special_tokens": False, "padding": False, "truncation": False}
    in_text = tokenizer("a a", **how)["input_ids"]
    alone = tokenizer(["a", "a"], is_split_into_words=True, **how)["input_ids"]
    return "" if in_text == alone else " "


# --- long sentences -----------------------------------------------------------------------------------------------


def cut(records: Sequence[Record], tokenizer: Any, max_length: int, *, source: str = "") -> list[Record]:
    """Split sentences of more than ``max_length`` tokens at word borders into pieces of like length.

    A split falls within an entity only where no border outside one is in reach; the rest of the entity then begins
    with B-, so that every piece is IOB2 by itself. Pieces keep the line and group of their sentence.

    Args:
        records: With ``tokens`` and ``tags``.
        tokenizer: A fast one of transformers.
        max_length: Longest piece in tokens, with what the tokenizer adds.
        source: The file or side, for messages.

    Raises:
        InputRefused: A single word is too long, or the tokenizer is slow.
    """
    out = []
    for row, (record, (ids, words)) in enumerate(zip(records, _spread(records, tokenizer, source), strict=True)):
        if len(ids) <= max_length:
            out.append(record)
            continue
        sizes = [len(w) for w in words]
        room = max_length - (len(ids) - sum(sizes))
        if max(sizes) > room:
            word = 1 + next(i for i, size in enumerate(sizes) if size > room)
            what = f"word {word} has {sizes[word - 1]} tokens, max_length {max_length} has room for {room}"
            raise InputRefused(f"{where_of(source, record, row)}: {what}: raise max_length, or shorten the word")
        ends = _ends(sizes, room, [tag[0] == "I" for tag in record.tags])
        out += [_piece(record, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return out


def _ends(sizes: Sequence[int], room: int, inside: Sequence[bool]) -> list[int]:
    """Where pieces end: each holds at most ``room`` tokens, and no more pieces than needed are aimed at."""
    total = [0, *accumulate(sizes)]
    ends = [0]
    while ends[-1] < len(sizes):
        done = total[ends[-1]]
        left = total[-1] - done
        aim = done + left / -(-left // room)
        fitting = range(ends[-1] + 1, bisect_right(total, done + room))
        whole = [e for e in fitting if e == len(sizes) or not inside[e]]
        off = {e: abs(total[e] - aim) for e in whole or fitting}
        ends.append(min(off, key=off.__getitem__))
    return ends[1:]


def _piece(record: Record, start: int, end: int) -> Record:
    tokens, tags = record.tokens[start:end], record.tags[start:end]
    if tags[0][0] == "I":
        tags = ("B" + tags[0][1:], *tags[1:])
    return replace(record, completion=" ".join(tokens), tokens=tokens, tags=tags)


# --- tensors ------------------------------------------------------------------------------------------------------


def collate(
    examples: Sequence[ClassExample], *, pad_id: int, pad_side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """Pad rows to one length; masks come from lengths, never from ids.

    Args:
        examples: At least one.
        pad_id: Token id to fill with; any valid one.
        pad_side: ``right`` or ``left``.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, T]``; ``label_mask`` bool ``[B, T]``, true where a class stands
        (the logits of that very position predict it); ``classes`` int64 ``[B, T]``, -100 elsewhere.

    Example:
        >>> collate([ClassExample((1, 7, 8, 2), (1, 2), (0, 3)), ClassExample((1, 2), (0,), (4,))], pad_id=0)["classes"]
        tensor([[-100,    0,    3, -100],
                [   4, -100, -100, -100]])
    """
    plain = [Example(e.input_ids, len(e.input_ids)) for e in examples]
    made = causal_lm.collate(plain, pad_id=pad_id, pad_side=pad_side)
    classes = torch.full_like(made["input_ids"], IGNORED)
    for row, example in enumerate(examples):
        first = classes.shape[1] - len(example.input_ids) if pad_side == "left" else 0
        classes[row, [first + p for p in example.places]] = torch.tensor(example.classes, dtype=torch.int64)
    return {**made, "label_mask": classes != IGNORED, "classes": classes}
