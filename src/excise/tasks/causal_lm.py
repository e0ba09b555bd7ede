"""Causal language modelling: records to token sequences whose labels are the answer, and sequences to padded tensors.

Three traps are closed here. The prompt's tokens are not always a prefix of the row's tokens, so labels start after the
common prefix of both. Masks are built from lengths, since padding and end-of-sequence may be one token. And a chat
template writes its own beginning-of-sequence token, so none is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from excise import paraphrase
from excise.errors import InputRefused, UsageError
from excise.records import Record, read_records
from excise.tasks.chunks import chunk_text_records, token_ids

ANSWER, PARAPHRASE, FALSE_ANSWER = 0, 1, 2
LONG = "split"  # what becomes of plain texts that are too long, unless the recipe says
Chat = Literal["auto", "always", "never"]

#: Templates that print today's date make runs differ from day to day; Llama 3 reads this variable instead.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Example:
    """Token ids of one row; ``input_ids[label_start:]`` are the labels, end-of-sequence included.

    ``label_start`` is at least 1: the first token of a sequence is predicted by nothing.
    """

    input_ids: tuple[int, ...]
    label_start: int

    @property
    def labels(self) -> int:
        """Number of labels."""
        return len(self.input_ids) - self.label_start


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens.

    Attributes:
        template: How a prompt is written before its answer, with one ``{prompt}``; not used with a chat template.
        max_length: Longest sequence in tokens, end-of-sequence included.
        chat: Use the tokenizer's chat template: where it has one, always, or never. Plain text rows never do.
        truncate: Cut answers that are too long, which then do not end, instead of refusing them.
        text_eos: End plain text rows with end-of-sequence; False for pieces made by `chunk_text_records`, which stop
            in the middle of a text.

    Raises:
        UsageError: The template does not hold ``{prompt}`` once, or ``max_length`` is below 2.
    """

    template: str = "{prompt}\n"
    max_length: int = 512
    chat: Chat = "auto"
    truncate: bool = False
    text_eos: bool = True

    def __post_init__(self) -> None:
        if self.template.count("{prompt}") != 1:
            raise UsageError("template must hold {prompt} exactly once, as in 'Question: {prompt}\\nAnswer: '")
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, not {self.max_length}")
        if self.chat not in ("auto", "always", "never"):
            raise UsageError("chat must be auto, always or never")


def read(source: str, *, limit: int | None = None, tag_names: Sequence[str] = ()) -> list[Record]:
    """The rows of this task: `read_records`; classes have no names here."""
    return read_records(source, limit=limit)


# --- one row ------------------------------------------------------------------------------------------------------


def encode(
    prompt: str | None,
    completion: str,
    tokenizer: Any,
    *,
    template: str = "{prompt}\n",
    max_length: int,
    where: str = "",
    chat: Chat = "auto",
    truncate: bool = False,
    text_eos: bool = True,
    messages: Sequence[dict[str, str]] | None = None,
) -> Example:
    """Tokens of one row, with the place where its labels start.

    Args:
        prompt: What comes before the answer; None for a plain text row, all of which is label.
        completion: The answer, or the whole text.
        tokenizer: Of transformers.
        template: See `Encoding`, as for ``max_length``, ``chat``, ``truncate`` and ``text_eos``.
        max_length: Longest sequence in tokens.
        where: ``file:line``, for messages.
        chat: Whether to use the tokenizer's chat template.
        truncate: Whether to cut a long answer.
        text_eos: Whether a plain text row ends with end-of-sequence.
        messages: The turns before the answer, for chat rows; ``prompt`` is then what is used without a chat template.

    Raises:
        InputRefused: The prompt leaves no room for an answer, the row is too long, the tokenizer has no
            end-of-sequence token, or its chat template refuses the turns.

    Example:
        >>> class Bytes:  # the few things that are asked of a tokenizer
        ...     eos_token_id, chat_template = 0, None
        ...     def __call__(self, text, **_): return {"input_ids": list(text.encode())}
        >>> encode("Q?", "ab", Bytes(), max_length=8)
        Example(input_ids=(81, 63, 10, 97, 98, 0), label_start=3)
    """
    spec = Encoding(template, max_length, chat, truncate, text_eos)
    return _encode(Record(prompt, completion, tuple(messages) if messages else None), tokenizer, spec, where)


def encode_records(records: Sequence[Record], tokenizer: Any, spec: Encoding, *, source: str = "") -> list[Example]:
    """`encode` for every record, in order; ``source`` names the file or side in messages."""
    return [_encode(r, tokenizer, spec, where_of(source, r, i)) for i, r in enumerate(records)]


def sequences(
    records: Sequence[Record],
    tokenizer: Any,
    spec: Encoding,
    *,
    source: str = "",
    ask: Literal["same", "own"] = "same",
) -> list[tuple[int, int, Example]]:
    """What evaluation scores: every answer, its paraphrases and its false answers.

    Args:
        records: Rows of one side.
        tokenizer: Of transformers.
        spec: How text becomes tokens.
        source: The file or side, for messages.
        ask: Which question stands before a paraphrased answer: the row's own question (``same``, as TOFU's evaluation
            does, so that right and wrong answers of a truth ratio answer one question), or the paraphrased one.

    Returns:
        ``(row, kind, example)`` with kind 0 for the answer, 1 for a paraphrase, 2 for a false answer; rows in order,
        and kinds in order within a row.
    """
    out = []
    for row, record in enumerate(records):
        where = where_of(source, record, row)
        out.append((row, ANSWER, _encode(record, tokenizer, spec, where)))
        for question, answer in record.paraphrases:
            asked = asking(record, question if ask == "own" else None)
            out.append((row, PARAPHRASE, _encode(replace(asked, completion=answer), tokenizer, spec, where)))
        for answer in record.false_answers:
            out.append((row, FALSE_ANSWER, _encode(replace(record, completion=answer), tokenizer, spec, where)))
    return out


def prompts(records: Sequence[Record], tokenizer: Any, spec: Encoding, *, source: str = "") -> list[tuple[int, ...]]:
    """Token ids to generate from, one tuple per record; empty for plain text rows, which ask nothing.

    Raises:
        InputRefused: A prompt fills the context.
    """
    out: list[tuple[int, ...]] = []
    for row, record in enumerate(records):
        if record.prompt is None:
            out.append(())
            continue
        head, _ = _tokens(record, tokenizer, spec, where_of(source, record, row))
        if len(head) >= spec.max_length:
            raise _filled(where_of(source, record, row), len(head), spec)
        out.append(tuple(head))
    return out


def reworded(records: Sequence[Record], seed: int) -> list[Record]:
    """The same records with each question reworded by rule (`excise.paraphrase`), drawn by (seed, row)."""
    return [
        r if r.prompt is None else asking(r, paraphrase.paraphrase(str(question_of(r)), seed + row))
        for row, r in enumerate(records)
    ]


def question_of(record: Record) -> str | None:
    """What is asked: the last thing the user says; None for plain text."""
    turns = record.messages or ()
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), record.prompt)


def asking(record: Record, question: str | None) -> Record:
    """The record with another question; in a chat, another last user turn."""
    if question is None or record.prompt is None:
        return record
    if not record.messages:
        return replace(record, prompt=question)
    turns = list(record.messages)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[last] = {"role": "user", "content": question}
    return replace(record, prompt="\n".join(turn["content"] for turn in turns), messages=tuple(turns))


def where_of(source: str, record: Record, row: int) -> str:
    """File (or side) and line of a row, for messages."""
    return f"{source}:{record.line or row + 1}" if source else f"line {record.line or row + 1}"


def _encode(record: Record, tokenizer: Any, spec: Encoding, where: str) -> Example:
    head, ids = _tokens(record, tokenizer, spec, where)
    start = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    start = max(start, 1)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputRefused("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    if eos in ids[start:]:  # written by the tokenizer, or by a chat template with a line break after it
        end = len(ids) - ids[::-1].index(eos)
        if end < len(ids) and not tokenizer.decode(ids[end:]).strip():
            ids = ids[:end]
    if ids[-1:] != [eos] and (record.prompt is not None or spec.text_eos):
        ids = [*ids, eos]
    if start >= spec.max_length:
        raise _filled(where, start, spec)
    if start >= len(ids):
        raise InputRefused(f"{_at(where)}the text is a single token, which nothing predicts: give a longer text")
    if len(ids) > spec.max_length:
        if not spec.truncate:
            hint = "truncate or chunk it" if record.prompt is None else "shorten the answer, or set truncate"
            raise InputRefused(f"{_at(where)}{len(ids)} tokens, more than max_length {spec.max_length}: {hint}")
        ids = ids[: spec.max_length]
    return Example(tuple(ids), start)


def _filled(where: str, length: int, spec: Encoding) -> InputRefused:
    what = f"the prompt has {length} tokens and leaves no room for an answer in max_length {spec.max_length}"
    return InputRefused(f"{_at(where)}{what}: shorten it, or raise max_length")


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _tokens(record: Record, tokenizer: Any, spec: Encoding, where: str) -> tuple[list[int], list[int]]:
    """Tokens of the part before the answer, and of the whole row, both without an end that nobody wrote."""
    if record.prompt is None:
        return [], token_ids(tokenizer, record.completion)
    if spec.chat == "always" and not getattr(tokenizer, "chat_template", None):
        raise InputRefused("the tokenizer has no chat template: set chat to auto or never, or give it one")
    if spec.chat != "never" and getattr(tokenizer, "chat_template", None):
        turns = list(record.messages or ({"role": "user", "content": record.prompt},))
        answer = {"role": "assistant", "content": record.completion}
        head = _chat(tokenizer, turns, True, where)
        whole = _chat(tokenizer, [*turns, answer], False, where)
        return token_ids(tokenizer, head, special=False), token_ids(tokenizer, whole, special=False)
    head = spec.template.replace("{prompt}", record.prompt)  # not format: braces in a prompt are text
    ids = token_ids(tokenizer, head)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids, token_ids(tokenizer, head + record.completion)


def _chat(tokenizer: Any, turns: list[dict[str, str]], answer_next: bool, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer_next, date_string=_DATE
        )
    except Exception as error:  # templates raise what they like, with the turns in the text
        kind = type(error).__name__
        raise InputRefused(f"{_at(where)}the chat template refuses these turns ({kind}): check their order") from None


def cut(records: Sequence[Record], tokenizer: Any, max_length: int, *, source: str = "") -> list[Record]:
    """`chunk_text_records` for rows that are too long; others stay as they are, white space and all.

    A last piece of a single token is left out: nothing predicts it.
    """
    out: list[Record] = []
    for record in records:
        pieces = [record] if record.prompt is not None else chunk_text_records([record], tokenizer, max_length)
        if len(pieces) > 1 and len(tokenizer(pieces[-1].completion)["input_ids"]) < 2:
            pieces.pop()
        out += pieces if len(pieces) > 1 else [record]
    return out


# --- tensors ------------------------------------------------------------------------------------------------------


def collate(
    examples: Sequence[Example], *, pad_id: int, pad_side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """Pad sequences to one length; masks come from lengths, never from ids (padding may be a real token).

    Args:
        examples: At least one.
        pad_id: Token id to fill with; any valid one.
        pad_side: ``right`` or ``left``.

    Returns:
        ``input_ids`` int64 ``[B, T]``; ``attention_mask`` int64 ``[B, T]``; ``label_mask`` bool ``[B, T]``, true where
        the token is a label (the logits that predict it stand one position to the left).

    Example:
        >>> collate([Example((5, 6, 2), 2), Example((7, 2), 1)], pad_id=2)["attention_mask"].tolist()
        [[1, 1, 1], [1, 1, 0]]
    """
    if not examples:
        raise ValueError("nothing to collate")
    if pad_side not in ("right", "left"):
        raise ValueError(f"pad_side is 'right' or 'left', not {pad_side!r}")
    width = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attended = torch.zeros((len(examples), width), dtype=torch.int64)
    label = torch.zeros((len(examples), width), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        first = width - length if pad_side == "left" else 0
        ids[row, first : first + length] = torch.tensor(example.input_ids, dtype=torch.int64)
        attended[row, first : first + length] = 1
        label[row, first + example.label_start : first + length] = True
    return {"input_ids": ids, "attention_mask": attended, "label_mask": label}


def length_batches(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Batches of rows of like length, longest first: little padding, and a lack of memory shows at once.

    Args:
        lengths: Tokens of each row.
        max_tokens: Most tokens of a batch with its padding; a longer row has a batch of its own.
        max_rows: Most rows of a batch.

    Returns:
        Row indices; every row exactly once.

    Example:
        >>> length_batches([3, 9, 4, 2], max_tokens=9, max_rows=2)
        [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = not batches or len(batches[-1]) >= max_rows
        if full or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
