"""A synthetic world of tagged sentences: made-up writers and the names they mention, for the named-entity demo.

What a name stands for is drawn for each name and only partly told by its place in the sentence, so that a tagger does
better on names that it was trained on than on others: there is something to forget, and something that stays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from excise.errors import UsageError
from excise.world import SIDES, Row, World, coin

TYPES = ("person", "place", "product", "group")
#: Each slot's place tells its most usual type; `_SHARE` says how often that is the right one.
FRAMES = tuple(
    line.strip()
    for line in """
    yesterday {person} drove to {place} and came back late
    has anybody heard from {person} since the meeting with {group}
    my new {product} broke after a week near {place}
    they sold {product} at the market of {place} until noon
    {group} will open an office in {place} this spring
    the letter from {person} arrived together with {product}
    i never liked {product} but {person} uses it every day
    {group} and {group} signed the papers without {person}
    we waited two hours for {person} outside {place}
    nobody at {group} answers when {person} calls
    the road between {place} and {place} is closed again
    if you see {person} give back the {product} please
    {group} wants to buy {product} from a shop in {place}
    it rained in {place} when {person} left {group}
    """.strip().splitlines()
)
_SHARE, _OUTSIDE, _TWO_WORDS = 0.9, 0.08, 0.35


def _name(draw: random.Random, used: set[str]) -> str:
    words = [coin(draw, used) for _ in range(2 if draw.random() < _TWO_WORDS else 1)]
    return " ".join(words).lower() if draw.random() < 0.5 else " ".join(words)


def _kind(slot: str, draw: random.Random) -> str:
    """What stands in a slot: mostly its own type, sometimes another, sometimes a made-up word that is no name."""
    if draw.random() < _OUTSIDE:
        return "O"
    return slot if draw.random() < _SHARE else draw.choice(TYPES)


def _sentence(names: Mapping[str, list[str]], group: str, draw: random.Random) -> Row:
    tokens: list[str] = []
    tags: list[str] = []
    for part in re.split(r"({\w+})", draw.choice(FRAMES)):
        if not part.startswith("{"):
            words = part.split()
            tokens += words
            tags += ["O"] * len(words)
            continue
        kind = _kind(part[1:-1], draw)
        words = draw.choice(names[kind]).split()
        tokens += words
        tags += ["O"] * len(words) if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
    return {"tokens": tokens, "ner_tags": tags, "group": group}


def tagged_world(
    seed: int = 0,
    *,
    forget: int = 5,
    retain: int = 40,
    untouched: int = 10,
    never_seen: int = 10,
    stopping: int = 10,
    sentences: int = 12,
) -> World:
    """Draw a world of writers; the same arguments give the same rows on every machine.

    Args:
        seed: Seed of everything.
        forget: Writers whose sentences are to be forgotten.
        retain: Writers to be kept.
        untouched: Writers to be kept whom unlearning never reads.
        never_seen: Writers never trained on, for evaluation.
        stopping: Writers never trained on, for stopping rules.
        sentences: Sentences of each writer, about names of their own.

    Returns:
        Rows with ``tokens``, ``ner_tags`` (IOB2) and ``group``.

    Raises:
        UsageError: A negative number, or so many writers that the supply of coined words would run short.

    Example:
        >>> made = tagged_world(forget=1, retain=1, untouched=0, never_seen=0, stopping=0, sentences=3)
        >>> {side: len(rows) for side, rows in made.sides().items() if rows}
        {'forget': 3, 'retain': 3}
    """
    counts = dict(zip(SIDES, (forget, retain, untouched, never_seen, stopping), strict=True))
    if min(*counts.values(), sentences) < 0 or sum(counts.values()) > 1000:
        raise UsageError("world: writers per side and sentences must be 0 or more, and 1000 writers at most")
    draw, used, writer = random.Random(f"tagged {seed}"), set[str](), 0
    sides: dict[str, list[Row]] = {}
    for side, writers in counts.items():
        sides[side] = []
        for _ in range(writers):
            names = {kind: [_name(draw, used) for _ in range(3)] for kind in (*TYPES, "O")}
            sides[side] += [_sentence(names, f"writer-{writer:03d}", draw) for _ in range(sentences)]
            writer += 1
    return World(**sides)


def tagged_corpus(made: World) -> list[str]:
    """All sentences of all sides as text, for training a tokenizer; never-seen ones too, so that length tells nothing.

    Example:
        >>> len(tagged_corpus(tagged_world(forget=1, retain=0, untouched=0, never_seen=0, stopping=0)))
        12
    """
    return [" ".join(row["tokens"]) for rows in made.sides().values() for row in rows]
