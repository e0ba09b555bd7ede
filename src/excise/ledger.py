"""The ledger: an append-only, hash-chained record of requests to forget, and which rows they named, without a text.

What the chain shows, and what not: an entry that was changed, removed or put between is found and named, and so are
entries cut off the end as long as `HEAD` or a noted hash says how many there were. Whoever can write the folder could
also write a new chain from the start: keep the hash of the last entry elsewhere (``excise ledger DIR check --head``).
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from excise import files
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.records import Record, identity

NAME, KEY, HEAD = "ledger.jsonl", "ledger.key", "ledger.head"
FORMAT = 1
#: opened: the first entry. received: a request and the ids of its rows. begun: recipe and parent, before the first
#: step. ended: what became of it. update: other training of the same model. reverified: an earlier request, again.
EVENTS = ("opened", "received", "begun", "ended", "update", "reverified")
_START = "0" * 64

Entry = dict[str, Any]


# --- the chain ----------------------------------------------------------------------------------------------------


def canonical(entry: Mapping[str, Any]) -> bytes:
    """The one line that stands for an entry; anything else in its place is a change.

    Example:
        >>> canonical({"n": 1, "event": "opened"})
        b'{"event":"opened","n":1}'
    """
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(entry: Mapping[str, Any]) -> str:
    """SHA-256 over everything in an entry but its own ``hash``; the hash of the entry before it is in there."""
    return hashlib.sha256(canonical({k: v for k, v in entry.items() if k != "hash"})).hexdigest()


def verify_chain(data: bytes, *, path: str = NAME, least: int = 0) -> list[Entry]:
    r"""The entries of a ledger's bytes, each checked against the one before it.

    Args:
        data: The file.
        path: For messages.
        least: Entries that are known to have been written. A last line without its end is the trace of a process that
            died while it wrote, and is left out, unless the entry is among these.

    Raises:
        IntegrityFailed: Naming the first entry that is not what was written, or does not follow the one before it.

    Example:
        >>> first = {"n": 1, "event": "opened", "previous": "0" * 64}
        >>> line = canonical(first | {"hash": digest(first)}) + b"\n"
        >>> len(verify_chain(line))
        1
        >>> verify_chain(line.replace(b"opened", b"update"))
        Traceback (most recent call last):
        excise.errors.IntegrityFailed: ledger.jsonl: entry 1 is not what was written: restore the file from a copy
    """
    *lines, rest = data.split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None or canonical(entry) != line or entry.get("hash") != digest(entry):
            raise IntegrityFailed(f"{path}: entry {number} is not what was written: restore the file from a copy")
        before = entries[-1]["hash"] if entries else _START
        if entry.get("n") != number or entry.get("previous") != before or entry.get("event") not in EVENTS:
            what = "does not follow the one before it: an entry was changed, taken out or put between"
            raise IntegrityFailed(f"{path}: entry {number} {what}: restore the file from a copy")
        entries.append(entry)
    if len(entries) < least:
        torn = "is torn" if rest else "is missing"
        raise IntegrityFailed(f"{path}: entry {len(entries) + 1} of {least} {torn}: restore the file from a copy")
    return entries


def _entry(line: bytes) -> Entry | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read(folder: str | os.PathLike[str], *, head: str | None = None) -> list[Entry]:
    """Every entry of the ledger in a folder, checked.

    Args:
        folder: The ledger's folder.
        head: A hash that was noted earlier: an entry must have it.

    Raises:
        InputRefused: There is no ledger in the folder.
        IntegrityFailed: An entry is not what was written, or entries are missing.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise InputRefused(f"{folder}: holds no {NAME}: give the folder of a ledger")
    known = _head(folder)
    entries = verify_chain(path.read_bytes(), path=str(path), least=known["n"])
    if known["n"] and entries[known["n"] - 1]["hash"] != known["hash"]:
        raise IntegrityFailed(f"{path}: entry {known['n']} is another than {HEAD} says: restore both from a copy")
    if head is not None and head not in {entry["hash"] for entry in entries}:
        raise IntegrityFailed(f"{path}: no entry has the hash that was noted: entries were taken out or written anew")
    return entries


def _head(folder: Path) -> dict[str, Any]:
    """How many entries were surely written, and the hash of the last of them."""
    try:
        value = json.loads((folder / HEAD).read_bytes())
        return {"n": int(value["n"]), "hash": str(value["hash"])}
    except FileNotFoundError:  # the first entry was written a moment ago, or somebody removed the file
        return {"n": 0, "hash": _START}
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityFailed(f"{folder / HEAD}: cannot be read: restore it from a copy") from None


def append(folder: str | os.PathLike[str], event: str, **fields: Any) -> Entry:
    """Add an entry: chained to the last one, on the disk when this returns. Of several writers, one after the other.

    Raises:
        IntegrityFailed: What is there already is not what was written; nothing is added to a broken chain.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = start(folder), append(folder, "received", request="case-7")
        ...     [entry["event"] for entry in read(folder)]
        ['opened', 'received']
    """
    if event not in EVENTS:
        raise ValueError(f"no such event: {event}")
    folder = Path(folder)
    with files.alone(folder):
        entries = read(folder) if (folder / NAME).is_file() else []
        previous = entries[-1]["hash"] if entries else _START
        entry: Entry = {"n": len(entries) + 1, "time": now(), "event": event, "previous": previous, **fields}
        entry["hash"] = digest(entry)
        with open(folder / NAME, "ab") as handle:
            # What a process that died left of its line goes: `read` has seen that nobody was told of it.
            handle.truncate(sum(len(canonical(e)) + 1 for e in entries))
            handle.write(canonical(entry) + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        files.write_json(folder / HEAD, {"n": entry["n"], "hash": entry["hash"]})
    return entry


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def start(folder: str | os.PathLike[str]) -> Entry:
    """Begin a ledger in a new or empty folder, with a secret of its own.

    Raises:
        UsageError: The folder holds something else.
    """
    folder = Path(folder)
    if folder.is_dir() and any(p.name not in (files.LOCK, KEY) for p in folder.iterdir()):
        raise UsageError(f"{folder}: the folder is not empty and holds no {NAME}; name another")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).unlink(missing_ok=True)  # of a process that died before the first entry: it has named nothing
    key = secrets.token_bytes(32)
    descriptor = os.open(folder / KEY, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(descriptor, "w", encoding="ascii") as handle:
        handle.write(key.hex() + "\n")
    return append(folder, "opened", format=FORMAT, key=hashlib.sha256(key).hexdigest())


# --- rows without text --------------------------------------------------------------------------------------------


def row_id(key: bytes, record: Record) -> str:
    """The name of a row in a ledger: HMAC-SHA256 of what makes it the same row, under the ledger's secret; 32 digits.

    Without the secret nobody can try guesses against it, as they could against a plain hash of a short text.

    Example:
        >>> row_id(b"secret", Record("Who?", "Ada")) == row_id(b"secret", Record("who?", " ADA"))
        True
    """
    return hmac.digest(key, json.dumps(identity(record)).encode(), "sha256").hex()[:32]


def secret(folder: str | os.PathLike[str], entries: Sequence[Entry]) -> bytes:
    """The ledger's secret.

    Raises:
        IntegrityFailed: It is missing, or not the one that the ledger was begun with.
    """
    path = Path(folder) / KEY
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        raise IntegrityFailed(f"{path}: missing or broken: without it no row can be matched; restore it") from None
    if hashlib.sha256(key).hexdigest() != entries[0].get("key"):
        raise IntegrityFailed(f"{path}: not the secret that this ledger was begun with: restore it")
    return key


@dataclass(frozen=True)
class Forgotten:
    """The rows that the requests of a ledger named, by id; the first request that named a row counts."""

    key: bytes
    rows: Mapping[str, str] = field(default_factory=dict)

    def request(self, record: Record) -> str | None:
        """The request that named a row, if any did."""
        return self.rows.get(row_id(self.key, record))

    def among(self, records: Iterable[Record]) -> list[int]:
        """Indices of the rows that a request named."""
        return [i for i, record in enumerate(records) if self.request(record) is not None]


def forgotten(source: str) -> Forgotten:
    """What the requests of a ledger named: ``DIR``, or ``DIR@N`` for its first N entries (which never change).

    Raises:
        InputRefused: No ledger there.
        UsageError: It has fewer entries.
        IntegrityFailed: The ledger is not what was written.
    """
    place, at, count = source.rpartition("@")
    folder, upto = (place, int(count)) if at and count.isdigit() else (source, None)
    entries = read(folder)
    if upto is not None and not 0 < upto <= len(entries):
        raise UsageError(f"data.without: {folder} has {len(entries)} entries, not {upto}")
    rows: dict[str, str] = {}
    for entry in entries[:upto]:
        if entry["event"] == "received":
            rows |= {row: entry["request"] for row in entry["rows"] if row not in rows}
    return Forgotten(secret(folder, entries), rows)


# --- where things stand -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request, as the entries tell it.

    Attributes:
        name: Its id.
        received: The entry that says so.
        begun: Attempts, the first first.
        ended: What became of them.
        reverified: What was found of it later, on later models.
    """

    name: str
    received: Entry
    begun: tuple[Entry, ...] = ()
    ended: tuple[Entry, ...] = ()
    reverified: tuple[Entry, ...] = ()

    @property
    def taken(self) -> Entry | None:
        """The attempt whose weights were taken over, if one's were."""
        return next((entry for entry in self.ended if entry["taken"]), None)

    @property
    def unfinished(self) -> Entry | None:
        """The attempt that was begun and not ended: a process died."""
        return self.begun[-1] if len(self.begun) > len(self.ended) else None

    @property
    def outcome(self) -> str | None:
        """The latest verdict: on the model as it is now, once all is verified again."""
        last = self.reverified[-1] if self.reverified else self.taken or (self.ended[-1] if self.ended else None)
        return last["verdict"]["outcome"] if last else None


@dataclass(frozen=True)
class State:
    """Where a ledger stands: its requests by id, and the model as it is now (None before the first one).

    Attributes:
        requests: By id, in order of receipt.
        model: ``name``, ``sha256`` and, of a hub model, ``revision``.
        since: Number of the entry that brought the model; 0 before the first.
    """

    requests: dict[str, Request] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    since: int = 0


def state(entries: Sequence[Entry]) -> State:
    """What the entries add up to.

    Example:
        >>> state([]).model is None
        True
    """
    parts: dict[str, dict[str, list[Entry]]] = {}
    model, since = None, 0
    for entry in entries:
        event = entry["event"]
        if event in ("received", "begun", "ended", "reverified"):
            parts.setdefault(entry["request"], {}).setdefault(event, []).append(entry)
        if event == "update" or (event == "ended" and entry["taken"]):
            model, since = entry["child"], entry["n"]
    requests = {
        name: Request(name, own["received"][0], *(tuple(own.get(e, ())) for e in ("begun", "ended", "reverified")))
        for name, own in parts.items()
    }
    return State(requests, model, since)
