"""Read user data: a validating reader that names file, line, field and what to do, and never echoes content.

Sides are then held against each other: a row that is to be forgotten and kept at once is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from excise.errors import InputRefused, UsageError

MAX_LINE = 64 << 20  # bytes: a longer "line" is not a record, more likely a compressed bomb
MAX_BYTES = 4 << 30  # bytes after unpacking
NEAR = 0.8  # word 5-gram Jaccard similarity from which two rows are called near duplicates
_SHOWN = 5  # line numbers named in a message

_FORMATS = {
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "messages": ("messages",),
    "text": ("text",),
}
_OPTIONAL = ("paraphrased_question", "paraphrased_answer", "paraphrases", "perturbed_answer", "false_answers",
             "alternatives", "group", "author")  # fmt: skip
_FIELDS = {name for names in _FORMATS.values() for name in names} | set(_OPTIONAL)
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
    """

    prompt: str | None
    completion: str
    messages: tuple[dict[str, str], ...] | None = None
    paraphrases: tuple[tuple[str | None, str], ...] = ()
    false_answers: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    group: str | None = None
    line: int = 0


def read_records(source: str, *, limit: int | None = None) -> list[Record]:
    """Read the rows of a file or of a data set on the Hugging Face hub.

    Args:
        source: Path of JSON lines (``.gz`` too) or of one JSON array, or ``hub:owner/name[:config][:split]`` (split
            ``train`` unless named; ``hub:owner/name::test`` names a split alone).
        limit: Stop after this many rows; what follows is not looked at.

    Returns:
        The rows in order, all of one format.

    Raises:
        InputRefused: One line that names file, line, field and what to do, without content.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        ...     _ = f.write('{"question": "Who wrote it?", "answer": "A. Nobody."}')
        ...     f.flush()
        ...     read_records(f.name)[0].completion
        'A. Nobody.'
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    source = str(source)
    name = " ".join(source.split())  # a message is one line, whatever the path
    rows = _hub_rows(source, name) if source.startswith("hub:") else _file_rows(source, name)
    records: list[Record] = []
    first = ""
    for line, row in itertools.islice(rows, limit):
        record, kind = _record(row, f"{name}:{line}", line)
        first = first or kind
        if kind != first:
            _refuse(f"{name}:{line}", f"this row is {kind}, the rows before it are {first}: use one format per file")
        records.append(record)
    if not records:
        _refuse(name, "holds no rows: write one JSON object per line")
    return records


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over the rows in order, as canonical JSON; line numbers do not count.

    Example:
        >>> fingerprint([Record("q", "a", line=1)]) == fingerprint([Record("q", "a", line=7)])
        True
    """
    digest = hashlib.sha256()
    for r in records:
        row = [r.prompt, r.completion, r.messages, r.paraphrases, r.false_answers, r.alternatives, r.group]
        digest.update(json.dumps(row, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def split_untouched(records: Sequence[Record], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows in two: indices to train on, and indices that unlearning never touches.

    Rows of one group stay together, so that an untouched person is one that no step has seen; a row without a group is
    a group of its own. Both parts hold at least one group if ``share`` is above 0.

    Args:
        records: The retained rows.
        share: Wanted share of untouched rows, from 0 to below 1; groups are added in a seeded order while that brings
            the share nearer.
        seed: Seed of the order.

    Raises:
        UsageError: ``share`` is out of range.
        InputRefused: There is only one group, so nothing can be set aside.

    Example:
        >>> trained, untouched = split_untouched([Record("q", str(i)) for i in range(10)], 0.3, seed=0)
        >>> len(untouched), sorted(trained + untouched) == list(range(10))
        (3, True)
    """
    if not 0 <= share < 1:
        raise UsageError(f"the untouched share must be from 0 to below 1, not {share}")
    if share == 0:
        return list(range(len(records))), []
    groups: dict[object, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[index if record.group is None else f"group {record.group}"].append(index)
    if len(groups) < 2:
        raise InputRefused("the retained rows are a single group: give more groups, or a file of untouched rows")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, untouched = share * len(records), list(order[0])
    for members in order[1:-1]:
        if abs(len(untouched) + len(members) - wanted) < abs(len(untouched) - wanted):
            untouched += members
    chosen = set(untouched)
    return [i for i in range(len(records)) if i not in chosen], sorted(untouched)


# --- reading ------------------------------------------------------------------------------------------------------


def _refuse(where: str, what: str) -> NoReturn:
    raise InputRefused(f"{where}: {what}") from None


def _file_rows(source: str, name: str) -> Iterator[tuple[int, Any]]:
    """Line number and decoded JSON of every row of a file of JSON lines or of one JSON array."""
    path = Path(source).expanduser()
    if not path.is_file():
        _refuse(name, "no such file: check the path (data sets of the hub begin with hub:)")
    lines = _lines(path, name)
    for line, text in lines:
        if text.lstrip().startswith("["):
            rest = [text]
            for number, more in lines:
                rest += [""] * (number - line - len(rest)) + [more]  # blank lines were skipped
            yield from _array("\n".join(rest), line, name)
            return
        yield line, _decoded(text, f"{name}:{line}")
        break
    for line, text in lines:
        yield line, _decoded(text, f"{name}:{line}")


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank, checked byte by byte before anything is parsed."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        line = total = 0
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            while data := handle.readline(MAX_LINE + 1):
                line, total = line + 1, total + len(data)
                if len(data) > MAX_LINE or total > MAX_BYTES:
                    _refuse(f"{name}:{line}", "too long: split the file, one record per line")
                if line == 1:
                    _refuse_utf16(data, name)
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if b"\0" in data:
                    _refuse(f"{name}:{line}", "holds a NUL byte: the file is damaged or not text")
                try:
                    text = data.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    _refuse(f"{name}:{line}", f"byte {error.start + 1} is not UTF-8: save the file as UTF-8")
                if text.strip():
                    yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile):
        _refuse(f"{name}:{line + 1}", "the compressed file is cut off or damaged: copy it again")
    except OSError as error:
        _refuse(name, f"cannot be read ({error.strerror}): check the file and its permissions")


def _refuse_utf16(start: bytes, name: str) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(start) > 3 and start[:4].count(0) >= 2):
        _refuse(f"{name}:1", "is UTF-16 or UTF-32: save the file as UTF-8")


class _BadJSON(ValueError):
    """A reason that is safe to show: it holds nothing of the row."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        shown = f"field {twice!r}" if twice in _FIELDS else "a field"
        raise _BadJSON(f"{shown} stands twice in the row: keep one")
    return row


def _constant(_name: str) -> NoReturn:
    raise _BadJSON("NaN and Infinity are not JSON: write a number, or leave the field out")


_JSON = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def _decoded(text: str, where: str) -> Any:
    row, end = _value(text, len(text) - len(text.lstrip()), where)
    if text[end:].strip():
        _refuse(where, f"column {end + 1}: more text after the record: write one JSON object per line")
    return row


def _value(text: str, start: int, where: str) -> tuple[Any, int]:
    """Decode one JSON value that starts at ``start``; also its end."""
    try:
        row, end = _JSON.raw_decode(text, start)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair fails here
    except _BadJSON as error:
        _refuse(where, str(error))
    except json.JSONDecodeError as error:
        _refuse(where, f"column {error.colno}: broken JSON: write one whole JSON object per line")
    except UnicodeEncodeError:
        _refuse(where, r"half of a surrogate pair (\ud800 to \udfff): write the whole character")
    except RecursionError:
        _refuse(where, "nested too deeply: records are flat")
    except ValueError:  # an integer of thousands of digits
        _refuse(where, "a number is too long: leave the field out, or write it as text")
    return row, end


def _array(text: str, line: int, name: str) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array, each with the line on which it starts."""
    space = re.compile(r"[ \t\r\n]*")

    def after_space(start: int) -> int:
        match = space.match(text, start)
        return match.end() if match else start

    at, seen = after_space(text.index("[") + 1), 0
    ended = text[at : at + 1] == "]"
    while not ended:
        line += text.count("\n", seen, at)
        seen = at
        row, at = _value(text, at, f"{name}:{line}")
        yield line, row
        at = after_space(at)
        ended = text[at : at + 1] == "]"
        if not ended:
            if text[at : at + 1] != ",":
                _refuse(f"{name}:{line}", "the JSON array breaks off after this record: write [record, record, ...]")
            at = after_space(at + 1)
    if text[at + 1 :].strip():
        _refuse(f"{name}:{line}", "more text after the JSON array: write one array, or one JSON object per line")


def _hub_rows(source: str, name: str) -> Iterator[tuple[int, Any]]:
    """Rows of a data set on the hub; empty cells of optional columns are left out, since a table has no other way."""
    parts = source.removeprefix("hub:").split(":")
    if len(parts) > 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", parts[0]):
        raise UsageError(f"{name}: write hub:owner/name, hub:owner/name:config or hub:owner/name:config:split")
    config, split = (parts[1:] + ["", ""])[:2]
    try:
        import datasets

        table = datasets.load_dataset(parts[0], config or None, split=split or "train")
        for index, row in enumerate(table, 1):
            yield index, {k: v for k, v in dict(row).items() if v is not None or k not in _OPTIONAL}
    except InputRefused:
        raise
    except Exception as error:  # the library raises dozens of types, some with rows in their text
        kind = type(error).__name__
        _refuse(name, f"cannot be read from the hub ({kind}): check the name, config, split and network, or give a file")


# --- one row ------------------------------------------------------------------------------------------------------


def _record(row: Any, where: str, line: int) -> tuple[Record, str]:
    """Validate a row; also the name of its format."""
    if not isinstance(row, dict):
        _refuse(where, "is not a JSON object: write one object with named fields per record")
    whole = [kind for kind, fields in _FORMATS.items() if all(f in row for f in fields)]
    if len(whole) > 1:
        _refuse(where, f"is {' and '.join(whole)} at once: keep the fields of one format")
    if not whole:
        part = [f for fields in _FORMATS.values() if any(g in row for g in fields) for f in fields if f not in row]
        if part:
            _refuse(where, f"field {part[0]!r} is missing: add it")
        _refuse(where, f"no known fields: give one of {', '.join(_FORMATS)}")
    kind = whole[0]
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    if kind == "messages":
        messages, completion = _turns(row["messages"], where)
        prompt = "\n".join(turn["content"] for turn in messages)
    elif kind == "text":
        completion = _text(row["text"], "text", where)
    else:
        prompt, completion = (_text(row[field], field, where) for field in _FORMATS[kind])
    record = Record(
        prompt=prompt,
        completion=completion,
        messages=messages,
        paraphrases=_paraphrases(row, completion, where),
        false_answers=_either(row, "false_answers", "perturbed_answer", where),
        alternatives=_texts(row, "alternatives", where),
        group=_group(row, where),
        line=line,
    )
    return record, kind


def _text(value: Any, field: str, where: str) -> str:
    """A string with something in it, or one line that says why not."""
    if value is None:
        _refuse(where, f"field {field!r} is null: give the text, or leave the row out")
    if not isinstance(value, str):
        hint = "put chat turns in 'messages'" if field in ("prompt", "completion") else "write text in quotes"
        _refuse(where, f"field {field!r} is {_kind(value)}, not a string: {hint}")
    if not value.strip():
        _refuse(where, f"field {field!r} is empty: give the text, or leave the row out")
    if "\0" in value:
        _refuse(where, f"field {field!r} holds a NUL character: remove it")
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "of another type")


def _turns(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str]:
    """The turns of a chat before its last one, and the text of that, which has to be the assistant's."""
    if not isinstance(value, list) or not value:
        _refuse(where, "field 'messages' is not a list of turns: write [{\"role\": ..., \"content\": ...}, ...]")
    turns = []
    for number, turn in enumerate(value, 1):
        at = f"messages[{number}]"
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            _refuse(where, f"field '{at}' needs 'role' and 'content': add them")
        if turn["role"] not in _ROLES or (turn["role"] == "system" and number > 1):
            _refuse(where, f"field '{at}.role' must be user or assistant (system only first): correct it")
        turns.append({"role": turn["role"], "content": _text(turn["content"], f"{at}.content", where)})
    if turns[-1]["role"] != "assistant":
        _refuse(where, "field 'messages' must end with an assistant turn: that is the text to forget or keep")
    if not any(turn["role"] == "user" for turn in turns):
        _refuse(where, "field 'messages' has no user turn: add one, or use 'text'")
    return tuple(turns[:-1]), turns[-1]["content"]


def _texts(row: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """An optional field that is one text or a list of them."""
    if field not in row:
        return ()
    if isinstance(row[field], list):
        return tuple(_text(value, f"{field}[{i}]", where) for i, value in enumerate(row[field], 1))
    return (_text(row[field], field, where),)


def _either(row: Mapping[str, Any], field: str, other: str, where: str) -> tuple[str, ...]:
    if field in row and other in row:
        _refuse(where, f"fields {field!r} and {other!r} mean the same: keep one")
    return _texts(row, field, where) or _texts(row, other, where)


def _paraphrases(row: Mapping[str, Any], completion: str, where: str) -> tuple[tuple[str | None, str], ...]:
    questions: tuple[str | None, ...] = _texts(row, "paraphrased_question", where)
    answers = _texts(row, "paraphrased_answer", where) or ((completion,) if questions else ())
    size = max(len(questions), len(answers))
    questions = questions or (None,)
    if not {len(questions), len(answers)} <= {0, 1, size}:
        _refuse(where, "fields 'paraphrased_question' and 'paraphrased_answer' differ in length: make pairs")
    out = [(questions[i % len(questions)], answers[i % len(answers)]) for i in range(size)]
    extra = row.get("paraphrases", [])
    if not isinstance(extra, list):
        _refuse(where, f"field 'paraphrases' is {_kind(extra)}, not a list: write a list of texts or of pairs")
    for number, value in enumerate(extra, 1):
        at = f"paraphrases[{number}]"
        if isinstance(value, dict):
            question = _text(value["question"], f"{at}.question", where) if "question" in value else None
            out.append((question, _text(value.get("answer"), f"{at}.answer", where)))
        else:
            out.append((None, _text(value, at, where)))
    return tuple(out)


def _group(row: Mapping[str, Any], where: str) -> str | None:
    if "group" in row and "author" in row:
        _refuse(where, "fields 'group' and 'author' mean the same: keep one")
    for field in ("group", "author"):
        if field in row:
            value = row[field]
            return str(value) if type(value) is int else _text(value, field, where)
    return None


# --- sides against each other -------------------------------------------------------------------------------------


def check_sides(forget: Sequence[Record], others: Mapping[str, Sequence[Record]]) -> list[str]:
    """Refuse rows that are to be forgotten and kept at once; warn of rows that nearly are.

    Rows are compared as (prompt, completion) after NFKC, case folding and joining of white space. Near duplicates share
    at least 0.8 of their word 5-grams (Jaccard).

    Args:
        forget: Rows to forget.
        others: Rows by side: ``retain``, ``untouched``, ``never_seen``.

    Returns:
        Warnings with counts and line numbers, never text.

    Raises:
        InputRefused: An empty side, a forget row that stands on another side too, or a never-seen row that is retained.

    Example:
        >>> check_sides([Record("Who?", "Ada", line=1)], {"retain": [Record("who?", " ADA", line=4)]})
        Traceback (most recent call last):
        excise.errors.InputRefused: 1 forget row stands in retain too (forget 1 = retain 4): remove it from one side
    """
    for side, records in {"forget": forget, **others}.items():
        if not records:
            raise InputRefused(f"the side {side!r} has no rows: give at least one")
    keys = {side: [_key(r) for r in records] for side, records in {"forget": forget, **others}.items()}
    sides = {"forget": forget, **others}
    pairs = [("forget", side) for side in others]
    if "never_seen" in others:
        pairs += [(side, "never_seen") for side in others if side != "never_seen"]
    for left, right in pairs:
        same = _same(keys[left], keys[right])
        if same:
            count = f"{len(same)} {left} row{'s stand' if len(same) > 1 else ' stands'} in {right} too"
            it = "them" if len(same) > 1 else "it"
            raise InputRefused(f"{count} ({_shown(same, left, sides, right)}): remove {it} from one side")
    warnings = []
    twice = [(i, keys["forget"].index(key)) for i, key in enumerate(keys["forget"]) if keys["forget"].index(key) < i]
    if twice:
        shown = _shown([(j, i) for i, j in twice], "forget", sides, "forget")
        warnings.append(f"forget: {len(twice)} row(s) repeat an earlier one ({shown}): they weigh double")
    if {"retain", "untouched"} <= others.keys() and (same := _same(keys["retain"], keys["untouched"])):
        shown = _shown(same, "retain", sides, "untouched")
        warnings.append(f"{len(same)} retain row(s) stand in untouched too ({shown}): they are not untouched")
    for side, records in others.items():
        near = near_duplicates(forget, records)
        if near:
            shown = _shown(near, "forget", sides, side)
            rows = len({i for i, _ in near})
            warnings.append(f"{rows} forget row(s) nearly stand in {side} too ({shown}): is that meant?")
    return warnings


def near_duplicates(left: Sequence[Record], right: Sequence[Record], *, threshold: float = NEAR) -> list[tuple[int, int]]:
    """Pairs of row indices whose word 5-grams have a Jaccard similarity of at least ``threshold``.

    Exact, by prefix filtering (Chaudhuri, Ganti & Kaushik 2006): two sets that alike share one of the rarest
    ``n - ceil(threshold n) + 1`` grams of either, so only rows that do are compared.

    Example:
        >>> near_duplicates([Record("a b c d e f g", "h")], [Record("x", "y"), Record("A b c d e f g", "h")])
        [(0, 1)]
    """
    grams = [[_grams(r) for r in records] for records in (left, right)]
    count = Counter(g for side in grams for row in side for g in row)

    def rarest(row: set[str]) -> list[str]:
        keep = len(row) - -int(-threshold * len(row) // 1) + 1
        return sorted(row, key=lambda g: (count[g], g))[:keep]

    index: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(grams[0]):
        for gram in rarest(row):
            index[gram].append(i)
    found = []
    for j, row in enumerate(grams[1]):
        for i in sorted({i for gram in rarest(row) for i in index.get(gram, ())}):
            shared = len(row & grams[0][i])
            if shared >= threshold * (len(row) + len(grams[0][i]) - shared):
                found.append((i, j))
    return sorted(found)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _key(record: Record) -> tuple[str, str]:
    return _normal(record.prompt or ""), _normal(record.completion)


def _grams(record: Record) -> set[str]:
    words = re.findall(r"\w+", _normal(f"{record.prompt or ''} {record.completion}"))
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def _same(left: Sequence[tuple[str, str]], right: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    first = {key: j for j, key in reversed(list(enumerate(right)))}
    return [(i, first[key]) for i, key in enumerate(left) if key in first]


def _shown(pairs: Sequence[tuple[int, int]], left: str, sides: Mapping[str, Sequence[Record]], right: str) -> str:
    """The first few pairs of lines; the place in the list where a row has no line."""
    named = [f"{left} {sides[left][i].line or i + 1} = {right} {sides[right][j].line or j + 1}" for i, j in pairs]
    return ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
