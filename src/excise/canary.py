"""Canaries: fictitious people whose membership a coin decides before training, so that an audit can prove something.

Half of them, drawn one by one by a fair coin, go into the training data and later into the forget set; the other half
nobody sees. Both are drawn alike from `world`, so that nothing but the coin tells them apart.
"""

from __future__ import annotations

import json
import random
import secrets
from dataclasses import dataclass
from pathlib import Path

from excise import world
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.files import sha256, staged, write_json, write_text

INCLUDED, EXCLUDED, COINS = "included.jsonl", "excluded.jsonl", "coins.json"
FORMAT = 1
FEWEST = 20  # with fewer even an observer who is always right refutes no epsilon above 0.8


@dataclass(frozen=True)
class Canaries:
    """A folder of canaries: its files, and by the name of each canary what the coin said."""

    included: Path
    excluded: Path
    coins: dict[str, bool]


def make(folder: str | Path, number: int = 200, *, facts: int = 1, seed: int | None = None) -> Canaries:
    """Draw canaries and their coins, and write them.

    Args:
        folder: New or empty; gets ``included.jsonl`` (train on it, then forget it), ``excluded.jsonl`` (keep it away
            from every training) and ``coins.json``.
        number: Canaries, each one person.
        facts: Rows of each, 1 to 10.
        seed: Of names and coins; default none: an observer who knew it would know the coins. Give one for tests only.

    Raises:
        UsageError: Too few canaries to show anything, too many facts, or a folder that holds something.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = make(Path(folder) / "canaries", 40, seed=0)
        ...     len(made.coins), sum(made.coins.values())
        (40, 18)
    """
    folder = Path(folder)
    if number < FEWEST:
        raise UsageError(f"--number {number}: fewer than {FEWEST} canaries cannot show a privacy loss worth knowing")
    if not 1 <= facts <= len(world.FACTS):
        raise UsageError(f"--facts {facts}: give 1 to {len(world.FACTS)}")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder}: the folder is not empty; name another")
    draw = random.Random(secrets.randbits(128) if seed is None else seed)
    people = world.world(draw.getrandbits(64), forget=number, retain=0, untouched=0, never_seen=0, stopping=0).forget
    each = len(world.FACTS)
    rows: dict[bool, list[world.Row]] = {True: [], False: []}
    coins: dict[str, bool] = {}
    for person in range(number):
        name = f"canary-{person:04d}"
        coins[name] = draw.random() < 0.5
        chosen = draw.sample(people[person * each : (person + 1) * each], facts)
        rows[coins[name]] += [{**row, "group": name} for row in chosen]
    with staged(folder) as aside:
        for name, kept in ((INCLUDED, rows[True]), (EXCLUDED, rows[False])):
            write_text(aside / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        hashes = {name: sha256(aside / name) for name in (INCLUDED, EXCLUDED)}
        write_json(aside / COINS, {"format": FORMAT, "coins": coins, "files": hashes})
    return Canaries(folder / INCLUDED, folder / EXCLUDED, coins)


def read(folder: str | Path) -> Canaries:
    """The canaries that `make` wrote.

    Raises:
        InputRefused: No canaries there.
        IntegrityFailed: A file is no longer what was drawn.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / COINS).read_text(encoding="utf-8"))
        coins, hashes = content["coins"], content["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputRefused(f"{folder}: no {COINS} here: give the folder that `excise canaries` wrote") from None
    for name in (INCLUDED, EXCLUDED):
        if not (folder / name).is_file() or sha256(folder / name) != hashes.get(name):
            raise IntegrityFailed(f"{folder / name}: not the canaries that were drawn; the audit would prove nothing")
    return Canaries(folder / INCLUDED, folder / EXCLUDED, {str(k): bool(v) for k, v in coins.items()})
