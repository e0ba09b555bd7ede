"""From a file or the hub to decoded JSON rows, each with its line; nothing of a row is ever in a message."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from excise.errors import InputRefused, UsageError

# Names that a message may repeat, and columns that a table leaves empty.
_REQUIRED = {"prompt", "completion", "gt", "question", "answer", "messages", "role", "content", "text", "tokens",
             "ner_tags", "tags", "label"}  # fmt: skip
_OPTIONAL = {"paraphrased_question", "paraphrased_answer", "paraphrases", "perturbed_answer", "false_answers",
             "alternatives", "group", "author"}  # fmt: skip
_NAMED = _REQUIRED | _OPTIONAL

MAX_LINE = 64 << 20  # bytes: a longer "line" is not a record, more likely a compressed bomb
MAX_BYTES = 4 << 30  # bytes after unpacking


def refuse(where: str, what: str) -> NoReturn:
    """Stop with one line: where it is, what is wrong, what to do; it never quotes the row."""
    raise InputRefused(f"{where}: {what}") from None


def shown(source: str, limit: int | None) -> str:
    """A source as messages show it, one line whatever the path; the limit of a reader is checked with it."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    return " ".join(str(source).split())


def rows(source: str, name: str) -> Iterator[tuple[int, Any]]:
    """Line number and decoded JSON of every row.

    Args:
        source: A path, or ``hub:owner/name[:config][:split]``.
        name: The source as messages show it: one line.
    """
    return _hub_rows(source, name) if source.startswith("hub:") else _file_rows(source, name)


def text_lines(source: str, name: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line of a file, blank ones too, checked as in `rows`."""
    path = Path(source).expanduser()
    if not path.is_file():
        refuse(name, "no such file: check the path (data sets of the hub begin with hub:)")
    return _lines(path, name)


def _file_rows(source: str, name: str) -> Iterator[tuple[int, Any]]:
    """Line number and decoded JSON of every row of a file of JSON lines or of one JSON array."""
    lines = ((line, text) for line, text in text_lines(source, name) if text.strip())
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
    """Number and text of every line, checked byte by byte before anything is parsed."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        line = total = 0
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            while data := handle.readline(MAX_LINE + 1):
                line, total = line + 1, total + len(data)
                if len(data) > MAX_LINE or total > MAX_BYTES:
                    refuse(f"{name}:{line}", "too long: split the file, one record per line")
                if line == 1:
                    _refuse_utf16(data, name)
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if b"\0" in data:
                    refuse(f"{name}:{line}", "holds a NUL byte: the file is damaged or not text")
                try:
                    text = data.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    refuse(f"{name}:{line}", f"byte {error.start + 1} is not UTF-8: save the file as UTF-8")
                yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile):
        refuse(f"{name}:{line + 1}", "the compressed file is cut off or damaged: copy it again")
    except OSError as error:
        refuse(name, f"cannot be read ({error.strerror}): check the file and its permissions")


def _refuse_utf16(start: bytes, name: str) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(start) > 3 and start[:4].count(0) >= 2):
        refuse(f"{name}:1", "is UTF-16 or UTF-32: save the file as UTF-8")


class _BadJSON(ValueError):
    """A reason that is safe to show: it holds nothing of the row."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        shown = f"field {twice!r}" if twice in _NAMED else "a field"  # a stranger's key may be content
        raise _BadJSON(f"{shown} stands twice in the row: keep one")
    return row


def _constant(_name: str) -> NoReturn:
    raise _BadJSON("NaN and Infinity are not JSON: write a number, or leave the field out")


_JSON = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def _decoded(text: str, where: str) -> Any:
    row, end = _value(text, len(text) - len(text.lstrip()), where)
    if text[end:].strip():
        refuse(where, f"column {end + 1}: more text after the record: write one JSON object per line")
    return row


def _value(text: str, start: int, where: str) -> tuple[Any, int]:
    """Decode one JSON value that starts at ``start``; also its end."""
    try:
        row, end = _JSON.raw_decode(text, start)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair fails here
    except _BadJSON as error:
        refuse(where, str(error))
    except json.JSONDecodeError as error:
        refuse(where, f"column {error.colno}: broken JSON: write one whole JSON object per line")
    except UnicodeEncodeError:
        refuse(where, r"half of a surrogate pair (\ud800 to \udfff): write the whole character")
    except RecursionError:
        refuse(where, "nested too deeply: records are flat")
    except ValueError:  # an integer of thousands of digits
        refuse(where, "a number is too long: leave the field out, or write it as text")
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
                refuse(f"{name}:{line}", "the JSON array breaks off after this record: write [record, record, ...]")
            at = after_space(at + 1)
    if text[at + 1 :].strip():
        refuse(f"{name}:{line}", "more text after the JSON array: write one array, or one JSON object per line")


def _hub_rows(source: str, name: str) -> Iterator[tuple[int, Any]]:
    """Rows of a data set on the hub, class numbers as the names that the data set gives them.

    Empty cells of optional columns are left out, since a table has no other way.
    """
    owned, config, split = [*source.removeprefix("hub:").split(":", 2), "", ""][:3]
    # A split may be a slice as the library writes it, train[400:]; a colon outside of brackets is one too many.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", owned) or not re.fullmatch(r"(?:[^:\[\]]|\[[^\[\]]*\])*", split):
        raise UsageError(f"{name}: write hub:owner/name, hub:owner/name:config or hub:owner/name:config:split")
    try:
        import datasets

        table = datasets.load_dataset(owned, config or None, split=split or "train")
        names = _class_names(table)
        for index, row in enumerate(table, 1):
            given = {k: v for k, v in dict(row).items() if v is not None or k not in _OPTIONAL}
            yield index, {k: _named(v, names[k]) if k in names else v for k, v in given.items()}
    except InputRefused:
        raise
    except Exception as error:  # the library raises dozens of types, some with rows in their text
        kind = type(error).__name__
        refuse(name, f"cannot be read from the hub ({kind}): check the name, config, split and network, or give a file")


def _class_names(table: Any) -> dict[str, list[str]]:
    """The names of the classes of each column that holds class numbers, one a row or a list of them."""
    kinds = {k: getattr(kind, "feature", kind) for k, kind in (getattr(table, "features", None) or {}).items()}
    return {k: kind.names for k, kind in kinds.items() if isinstance(getattr(kind, "names", None), list)}


def _named(value: Any, names: list[str]) -> Any:
    """Class numbers as names; what is no number of a class (-1: not labelled) stays as it is."""
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    return names[value] if type(value) is int and 0 <= value < len(names) else value
