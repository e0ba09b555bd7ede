"""One row of user data: which fields are accepted, and how a decoded row becomes a `Record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from excise.records.source import refuse

FORMATS = {
    "prompt/completion": ("prompt", "completion"),
    "prompt/gt": ("prompt", "gt"),  # as MUSE names them
    "question/answer": ("question", "answer"),
    "messages": ("messages",),
    "text": ("text",),
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One row of user data.

    Attributes:
        prompt: What is asked; None for plain text rows. Of a chat row, the contents before the last turn, joined.
        completion: The answer, or the whole text.
        messages: Chat rows: the turns before the last assistant turn, which is ``completion``.
        paraphrases: (question or None for the same question, answer) in other words.
        false_answers: Answers to the same question that are wrong.
        alternatives: Plausible other answers to train towards (AltPO).
        group: Person or author, where given: rows of one group stay together in splits.
        line: Line in the file, from 1.
        tokens: Tagged sentences: the words; ``completion`` is these, joined by blanks.
        tags: The class of each word (IOB2), or of a labelled text its one class.
    """

    prompt: str | None
    completion: str
    messages: tuple[dict[str, str], ...] | None = None
    paraphrases: tuple[tuple[str | None, str], ...] = ()
    false_answers: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    group: str | None = None
    line: int = 0
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def record(row: Any, where: str, line: int) -> tuple[Record, str]:
    """Validate a row; also the name of its format."""
    if not isinstance(row, dict):
        refuse(where, "is not a JSON object: write one object with named fields per record")
    whole = [kind for kind, fields in FORMATS.items() if all(f in row for f in fields)]
    if len(whole) > 1:
        refuse(where, f"is {' and '.join(whole)} at once: keep the fields of one format")
    if not whole:
        part = [f for fields in FORMATS.values() if any(g in row for g in fields) for f in fields if f not in row]
        if part:
            refuse(where, f"field {part[0]!r} is missing: add it")
        refuse(where, f"no known fields: give one of {', '.join(FORMATS)}")
    kind = whole[0]
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    if kind == "messages":
        messages, completion = _turns(row["messages"], where)
        prompt = "\n".join(turn["content"] for turn in messages)
    elif kind == "text":
        completion = as_text(row["text"], "text", where)
    else:
        prompt, completion = (as_text(row[field], field, where) for field in FORMATS[kind])
    made = Record(
        prompt=prompt,
        completion=completion,
        messages=messages,
        paraphrases=_paraphrases(row, completion, where),
        false_answers=_either(row, "false_answers", "perturbed_answer", where),
        alternatives=_texts(row, "alternatives", where),
        group=group_of(row, where),
        line=line,
    )
    return made, kind


def as_text(value: Any, field: str, where: str) -> str:
    """A string with something in it, or one line that says why not."""
    if value is None:
        refuse(where, f"field {field!r} is null: give the text, or leave the row out")
    if not isinstance(value, str):
        hint = "put chat turns in 'messages'" if field in ("prompt", "completion") else "write text in quotes"
        refuse(where, f"field {field!r} is {kind_of(value)}, not a string: {hint}")
    if not value.strip():
        refuse(where, f"field {field!r} is empty: give the text, or leave the row out")
    if "\0" in value:
        refuse(where, f"field {field!r} holds a NUL character: remove it")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "of another type")


def _turns(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str]:
    """The turns of a chat before its last one, and the text of that, which has to be the assistant's."""
    if not isinstance(value, list) or not value:
        refuse(where, "field 'messages' is not a list of turns: write a list of objects with 'role' and 'content'")
    turns = []
    for number, turn in enumerate(value, 1):
        at = f"messages[{number}]"
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            refuse(where, f"field '{at}' needs 'role' and 'content': add them")
        if turn["role"] not in _ROLES or (turn["role"] == "system" and number > 1):
            refuse(where, f"field '{at}.role' must be user or assistant (system only first): correct it")
        turns.append({"role": turn["role"], "content": as_text(turn["content"], f"{at}.content", where)})
    if turns[-1]["role"] != "assistant":
        refuse(where, "field 'messages' must end with an assistant turn: that is the text to forget or keep")
    if not any(turn["role"] == "user" for turn in turns):
        refuse(where, "field 'messages' has no user turn: add one, or use 'text'")
    return tuple(turns[:-1]), turns[-1]["content"]


def _texts(row: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """An optional field that is one text or a list of them."""
    if field not in row:
        return ()
    if isinstance(row[field], list):
        return tuple(as_text(value, f"{field}[{i}]", where) for i, value in enumerate(row[field], 1))
    return (as_text(row[field], field, where),)


def _either(row: Mapping[str, Any], field: str, other: str, where: str) -> tuple[str, ...]:
    if field in row and other in row:
        refuse(where, f"fields {field!r} and {other!r} mean the same: keep one")
    return _texts(row, field, where) or _texts(row, other, where)


def _paraphrases(row: Mapping[str, Any], completion: str, where: str) -> tuple[tuple[str | None, str], ...]:
    questions: tuple[str | None, ...] = _texts(row, "paraphrased_question", where)
    answers = _texts(row, "paraphrased_answer", where) or ((completion,) if questions else ())
    size = max(len(questions), len(answers))
    questions = questions or (None,)
    if not {len(questions), len(answers)} <= {0, 1, size}:
        refuse(where, "fields 'paraphrased_question' and 'paraphrased_answer' differ in length: make pairs")
    out = [(questions[i % len(questions)], answers[i % len(answers)]) for i in range(size)]
    extra = row.get("paraphrases", [])
    if not isinstance(extra, list):
        refuse(where, f"field 'paraphrases' is {kind_of(extra)}, not a list: write a list of texts or of pairs")
    for number, value in enumerate(extra, 1):
        at = f"paraphrases[{number}]"
        if isinstance(value, dict):
            question = as_text(value["question"], f"{at}.question", where) if "question" in value else None
            out.append((question, as_text(value.get("answer"), f"{at}.answer", where)))
        else:
            out.append((None, as_text(value, at, where)))
    return tuple(out)


def group_of(row: Mapping[str, Any], where: str) -> str | None:
    """The person or author of a row, where one is given."""
    if "group" in row and "author" in row:
        refuse(where, "fields 'group' and 'author' mean the same: keep one")
    for field in ("group", "author"):
        if field in row:
            value = row[field]
            return str(value) if type(value) is int else as_text(value, field, where)
    return None
