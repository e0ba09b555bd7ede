"""Read user data: a validating reader that names file, line, field and what to do, and never echoes content.

Sides are then held against each other: a row that is to be forgotten and kept at once is refused.
"""

from __future__ import annotations

import itertools

from excise.records import choices as _choices
from excise.records import source as _source
from excise.records.choices import Question, as_record, read_questions
from excise.records.labelled import read_labelled
from excise.records.row import Record, record
from excise.records.sides import check_sides, fingerprint, identity, in_part, near_duplicates, split_untouched
from excise.records.tagged import read_tagged

__all__ = [
    "Record",
    "Question",
    "as_record",
    "read_records",
    "read_questions",
    "read_tagged",
    "read_labelled",
    "check_sides",
    "fingerprint",
    "identity",
    "in_part",
    "near_duplicates",
    "split_untouched",
]


def read_records(source: str, *, limit: int | None = None) -> list[Record]:
    """Read the rows of a file or of a data set on the Hugging Face hub.

    Args:
        source: Path of JSON lines (``.gz`` too) or of one JSON array, or ``hub:owner/name[:config][:split]`` (split
            ``train`` unless named; ``hub:owner/name::test`` names a split alone; slices as in ``train[400:]``).
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
    source, name = str(source), _source.shown(source, limit)
    records: list[Record] = []
    first = ""
    for line, row in itertools.islice(_source.rows(source, name), limit):
        made, kind = _row(row, f"{name}:{line}", line)
        first = first or kind
        if kind != first:
            what = f"this row is {kind}, the rows before it are {first}: use one format per file"
            _source.refuse(f"{name}:{line}", what)
        records.append(made)
    if not records:
        _source.refuse(name, "holds no rows: write one JSON object per line")
    return records


def _row(row: object, where: str, line: int) -> tuple[Record, str]:
    """A row of any format; a multiple-choice question becomes its prompt and the right letter."""
    if _choices.is_question(row):
        return as_record(_choices.question(row, where, line)), "a multiple-choice question"
    return record(row, where, line)
