"""Read labelled texts (``text`` and ``label``): the rows of sequence classification."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from excise.records import source as _source
from excise.records.row import Record, as_text, group_of
from excise.records.source import refuse


def read_labelled(source: str, *, limit: int | None = None, names: Sequence[str] = ()) -> list[Record]:
    """Read texts with one class each.

    Args:
        source: As for `read_records`; rows have ``text`` and ``label``, and may have ``group``.
        limit: Stop after this many rows; what follows is not looked at.
        names: Names of the classes by number, where ``label`` is a number (data sets of the hub may bring their own).

    Returns:
        Records without a prompt: ``completion`` is the text and ``tags`` its class.

    Raises:
        InputRefused: One line that names file, line, field and what to do, without content.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        ...     _ = f.write('{"text": "It rained all day.", "label": "weather"}')
        ...     f.flush()
        ...     read_labelled(f.name)[0].tags
        ('weather',)
    """
    name = _source.shown(source, limit)
    records = []
    for line, row in itertools.islice(_source.rows(str(source), name), limit):
        where = f"{name}:{line}"
        need(row, ("text", "label"), where)
        text = as_text(row["text"], "text", where)
        label = class_name(row["label"], "label", where, names)
        records.append(Record(None, text, group=group_of(row, where), line=line, tags=(label,)))
    if not records:
        refuse(name, "holds no rows: write one JSON object per line")
    return records


def need(row: Any, fields: Sequence[str], where: str) -> None:
    """Refuse what is no object with these fields."""
    if not isinstance(row, dict):
        refuse(where, "is not a JSON object: write one object with named fields per record")
    for field in fields:
        if field not in row:
            refuse(where, f"field {field!r} is missing: this task reads {' and '.join(map(repr, fields))}")


def class_name(value: Any, field: str, where: str, names: Sequence[str]) -> str:
    """The name of a class, from itself or from its number."""
    if type(value) is int:
        if not names:
            what = "is a number: write the name of the class, or name the classes by number in data.tag_names"
            refuse(where, f"field {field!r} {what}")
        if not 0 <= value < len(names):
            refuse(where, f"field {field!r} is a number without a name: data.tag_names has {len(names)}, from 0")
        value = names[value]
    text = as_text(value, field, where)
    if text != text.strip():
        refuse(where, f"field {field!r} begins or ends with white space, which makes a class of its own: remove it")
    return text
