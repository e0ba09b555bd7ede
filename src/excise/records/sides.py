"""Sides held against each other: overlaps, near duplicates, splits, and the fingerprint of a side."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from excise.errors import InputRefused, UsageError
from excise.records.row import Record

NEAR = 0.8  # word 5-gram Jaccard similarity from which two rows are called near duplicates
_SHOWN = 5  # pairs of line numbers named in a message


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over the rows in order, as canonical JSON; line numbers do not count; words and classes do, if any.

    Example:
        >>> fingerprint([Record("q", "a", line=1)]) == fingerprint([Record("q", "a", line=7)])
        True
    """
    digest = hashlib.sha256()
    for r in records:
        texts = [r.prompt, r.completion, r.messages, r.paraphrases, r.false_answers, r.alternatives, r.group]
        row = [*texts, r.tokens, r.tags] if r.tokens or r.tags else texts
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


def in_part(records: Sequence[Record], part: str) -> list[Record]:
    """The rows that belong to a part of a whole: ``"1/2"`` is the first of two, ``"all but 1/4"`` the other three.

    Where a row belongs follows from its group, or where it has none from its text, and from nothing else: rows of one
    group and rows that are the same are never apart, and a row stays where it is when others come or go. Parts are as
    large as chance makes them.

    Args:
        records: The rows.
        part: ``"i/n"`` or ``"all but i/n"`` with ``1 <= i <= n``.

    Returns:
        Those of the part, in order.

    Raises:
        UsageError: ``part`` is no such thing.
        InputRefused: No row belongs to it.

    Example:
        >>> rows = [Record("q", str(i)) for i in range(6)]
        >>> [[r.completion for r in in_part(rows, part)] for part in ("1/2", "2/2")]
        [['2', '4', '5'], ['0', '1', '3']]
    """
    found = re.fullmatch(r"(all but )?([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    number, parts = (int(n) for n in found.groups()[1:]) if found else (1, 0)
    if found is None or number > parts:
        raise UsageError(f"a part is i/n, as 1/2 for the first of two, or all but i/n, not {part!r}")

    def place(record: Record) -> int:
        key = json.dumps(identity(record) if record.group is None else [str(record.group)])
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % parts + 1

    own = [r for r in records if (place(r) == number) != bool(found[1])]
    if not own:
        raise InputRefused(f"part {part} has no rows: give more, or fewer parts")
    return own


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
    sides = {"forget": forget, **others}
    for side, records in sides.items():
        if not records:
            raise InputRefused(f"the side {side!r} has no rows: give at least one")
    keys = {side: [identity(r) for r in records] for side, records in sides.items()}
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
    first = {key: i for i, key in reversed(list(enumerate(keys["forget"])))}
    twice = [(first[key], i) for i, key in enumerate(keys["forget"]) if first[key] < i]
    if twice:
        shown = _shown(twice, "forget", sides, "forget")
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


def near_duplicates(
    left: Sequence[Record], right: Sequence[Record], *, threshold: float = NEAR
) -> list[tuple[int, int]]:
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
        keep = len(row) - math.ceil(threshold * len(row) - 1e-9) + 1
        return sorted(row, key=lambda g: (count[g], g))[:keep]

    index: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(grams[0]):
        for gram in rarest(row):
            index[gram].append(i)
    found = []
    for j, row in enumerate(grams[1]):
        for i in sorted({i for gram in rarest(row) for i in index.get(gram, ())}):
            shared = len(row & grams[0][i])
            if shared >= threshold * (len(row) + len(grams[0][i]) - shared) - 1e-9:
                found.append((i, j))
    return sorted(found)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def identity(record: Record) -> tuple[str, str]:
    """What makes two rows the same: prompt and completion after NFKC, case folding and joining of white space.

    Example:
        >>> identity(Record("Who  wrote it?", "ADA")) == identity(Record("who wrote it?", "Ada "))
        True
    """
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
