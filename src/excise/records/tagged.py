"""Read tagged sentences, CoNLL or JSON lines: the rows of token classification, IOB2 and nothing else.

A file in another scheme (IOB1, BIOES) would train without an error and be scored wrongly, so it is refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from excise.records import source as _source
from excise.records.labelled import class_name, need
from excise.records.row import Record, as_text, group_of, kind_of
from excise.records.source import refuse

#: Names that hold lines of TOKEN and TAG (before .gz); everything else is JSON.
CONLL = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2")
_IOB2 = re.compile(r"O|[BI]-\S+")
_OTHER = {"E": "BIOES", "S": "BIOES", "L": "BILOU", "U": "BILOU", "M": "BMES"}  # prefixes that IOB2 does not have
_JSON = re.compile(r'\s*\[?\s*\{\s*"[^"]*"\s*:')


def read_tagged(source: str, *, limit: int | None = None, names: Sequence[str] = ()) -> list[Record]:
    r"""Read sentences whose words have IOB2 tags.

    Args:
        source: A CoNLL file (``.conll``, ``.txt``, ``.tsv``, ``.bio``, ``.iob``, ``.iob2``, also with ``.gz``): a line
            a word, first column the word, last one the tag, a tab or blanks between them, a blank line after each
            sentence; ``-DOCSTART-`` lines are skipped. Any other file and ``hub:`` names as for `read_records`, with
            ``tokens`` and ``ner_tags`` (or ``tags``) of equal length, and maybe ``group``.
        limit: Stop after this many sentences; what follows is not looked at.
        names: Names of the tags by number, where rows give numbers (data sets of the hub may bring their own).

    Returns:
        Records without a prompt: ``tokens``, ``tags``, and the words joined by blanks as ``completion``; ``line`` is
        where the sentence begins.

    Raises:
        InputRefused: One line that names file, line, field and what to do, without content.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".conll") as f:
        ...     _ = f.write("Ada B-person\nBly I-person\nwrote O\n")
        ...     f.flush()
        ...     read_tagged(f.name)[0].tags
        ('B-person', 'I-person', 'O')
    """
    name = _source.shown(source, limit)
    source = str(source)
    lines = not source.startswith("hub:") and Path(source.removesuffix(".gz")).suffix.lower() in CONLL
    sentences = _conll(source, name) if lines else _rows(source, name, names)
    records = list(itertools.islice(sentences, limit))
    if not records:
        refuse(name, "holds no sentences: write one word and its tag per line, or one JSON object per line")
    _refuse_broken_entities(records, name, lines)
    return records


# --- lines of TOKEN and TAG ---------------------------------------------------------------------------------------


def _conll(source: str, name: str) -> Iterator[Record]:
    tokens: list[str] = []
    tags: list[str] = []
    start = width = 0
    for line, text in itertools.chain(_source.text_lines(source, name), [(0, "")]):  # the last sentence ends too
        where = f"{name}:{line}"
        if not text.strip() or text.split()[0] == "-DOCSTART-":
            if tokens:
                yield Record(None, " ".join(tokens), line=start, tokens=tuple(tokens), tags=tuple(tags))
            tokens, tags = [], []
            continue
        columns = text.split("\t") if "\t" in text else re.split(" +", text.strip(" "))
        if not width and _JSON.match(text):
            refuse(where, "looks like JSON: name the file .jsonl")
        if len(columns) < 2:
            refuse(where, "has one column: write the word, a tab and its tag on each line")
        if width and len(columns) != width:
            refuse(where, f"has {len(columns)} columns, the lines before it {width}: give every line the same columns")
        token, tag = columns[0].strip(" "), columns[-1].strip(" ")
        if not token.strip():
            refuse(where, "the word is empty: write it in the first column, or leave the line out")
        if not tag:
            refuse(where, "the tag is empty: write O, B-TYPE or I-TYPE in the last column")
        _refuse_shape(tag, where, "the last column")
        start, width = (start if tokens else line), len(columns)
        tokens.append(token)
        tags.append(tag)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _rows(source: str, name: str, names: Sequence[str]) -> Iterator[Record]:
    if not source.startswith("hub:"):
        line, first = next(((n, t) for n, t in _source.text_lines(source, name) if t.strip()), (1, "{"))
        if first.lstrip()[0] not in '{["':
            refuse(f"{name}:{line}", f"is not JSON: name a file of words and tags {CONLL[0]} or {CONLL[1]}")
    for line, row in _source.rows(source, name):
        where = f"{name}:{line}"
        field = "tags" if isinstance(row, dict) and "tags" in row else "ner_tags"
        need(row, ("tokens", field), where)
        if field == "tags" and "ner_tags" in row:
            refuse(where, "fields 'ner_tags' and 'tags' mean the same: keep one")
        for each in ("tokens", field):
            if not isinstance(row[each], list):
                refuse(where, f"field {each!r} is {kind_of(row[each])}, not a list: write one entry per word")
        if not row["tokens"]:
            refuse(where, "field 'tokens' is empty: give the words, or leave the row out")
        if len(row["tokens"]) != len(row[field]):
            lengths = f"{len(row['tokens'])} and {len(row[field])}"
            refuse(where, f"fields 'tokens' and {field!r} differ in length ({lengths}): give one tag per word")
        tokens = tuple(as_text(v, f"tokens[{i}]", where) for i, v in enumerate(row["tokens"], 1))
        tags = tuple(class_name(v, f"{field}[{i}]", where, names) for i, v in enumerate(row[field], 1))
        for i, tag in enumerate(tags, 1):
            _refuse_shape(tag, where, f"field '{field}[{i}]'")
        yield Record(None, " ".join(tokens), group=group_of(row, where), line=line, tokens=tokens, tags=tags)


# --- schemes ------------------------------------------------------------------------------------------------------


def _refuse_shape(tag: str, where: str, what: str) -> None:
    """Refuse what is neither O nor B-TYPE nor I-TYPE, by the name of its scheme where that can be seen."""
    if _IOB2.fullmatch(tag):
        return
    if tag[1:2] == "-" and tag[0] in _OTHER:
        to_do = "convert it to IOB2, where B-TYPE begins an entity and I-TYPE goes on"
        refuse(where, f"{what} is a tag of another scheme; the file looks like {_OTHER[tag[0]]}: {to_do}")
    refuse(where, f"{what} is no IOB2 tag: write O, B-TYPE or I-TYPE")


def _refuse_broken_entities(records: Sequence[Record], name: str, lines: bool) -> None:
    """Refuse an I- that goes on with nothing; where no B- begins an entity by itself, the file is not IOB2 at all."""
    for record in records:
        for i, (before, tag) in enumerate(itertools.pairwise(("O", *record.tags))):
            if not tag.startswith("I-") or before[2:] == tag[2:]:
                continue
            where = f"{name}:{record.line + i if lines else record.line}"
            which = "the tag" if lines else f"tag {i + 1}"
            if not any(_begins_freely(r.tags) for r in records):
                to_do = "convert it to IOB2, where every entity begins with B-"
                refuse(where, f"{which} is I- without a B- before it; the file looks like IOB1 (or has no B-): {to_do}")
            after = "without a B- before it" if before == "O" else "after a tag of another type"
            refuse(where, f"{which} is I- {after}: begin the entity with B- of its type, or correct the type")


def _begins_freely(tags: Sequence[str]) -> bool:
    """Whether a B- stands where IOB1 would write I-: not right after an entity of its own type."""
    return any(tag[0] == "B" and before[2:] != tag[2:] for before, tag in itertools.pairwise(("O", *tags)))
