"""The chain of the ledger: what is added, what is found out, what a kill leaves, and no row to be read."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise import ledger
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.records import Record

ROWS = [Record("Where was Ada Quill born?", "In Port Sorrow."), Record(None, "A whole text.")]


def filled(folder: Path, entries: int = 5) -> Path:
    ledger.start(folder)
    for number in range(entries - 1):
        ledger.append(folder, "received", request=f"case-{number}", rows=[f"{number:032x}"], received="2026-01-02")
    return folder


def oracle(data: bytes) -> bool:
    """The chain by hand: every line the canonical form of its entry, every hash that of the bytes without it."""
    before = "0" * 64
    for number, line in enumerate(data.decode().splitlines(), 1):
        entry = json.loads(line)
        said = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != said or entry["previous"] != before or entry["n"] != number:
            return False
        before = said
    return True


def test_what_is_added_comes_back(tmp_path: Path) -> None:
    folder = filled(tmp_path / "l")
    entries = ledger.read(folder)
    assert [e["n"] for e in entries] == [1, 2, 3, 4, 5]
    assert [e["event"] for e in entries] == ["opened"] + ["received"] * 4
    assert oracle((folder / ledger.NAME).read_bytes())
    assert json.loads((folder / ledger.HEAD).read_text()) == {"n": 5, "hash": entries[-1]["hash"]}
    assert (folder / ledger.KEY).stat().st_mode & 0o077 == 0, "the secret is for its owner alone"


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_changed_byte_is_found_and_its_entry_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    folder = filled(tmp_path_factory.mktemp("l") / "l", 3)
    path = folder / ledger.NAME
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= flip
    path.write_bytes(bytes(data))
    line = bytes(path.read_bytes()[:place]).count(b"\n") + 1
    with pytest.raises(IntegrityFailed, match=rf"entry [{max(1, line - 1)}{line}{line + 1}]\b"):
        ledger.read(folder)


@pytest.mark.parametrize("how", ["last", "middle", "swapped", "twice", "between", "rehashed", "emptied"])
def test_entries_taken_out_or_put_in_are_found(how: str, tmp_path: Path) -> None:
    folder = filled(tmp_path / "l")
    path = folder / ledger.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "last": lines[:-1],
        "middle": lines[:2] + lines[3:],
        "swapped": [lines[0], lines[2], lines[1], *lines[3:]],
        "twice": [*lines, lines[-1]],
        "between": [*lines[:3], lines[1], *lines[3:]],
        "emptied": [],
    }
    if how == "rehashed":  # an entry written anew with a true hash of its own: the one behind it no longer fits
        entry = json.loads(lines[2])
        entry["rows"] = []
        entry["hash"] = ledger.digest(entry)
        changed[how] = [*lines[:2], ledger.canonical(entry) + b"\n", *lines[3:]]
    path.write_bytes(b"".join(changed[how]))
    named = {"last": 5, "middle": 3, "swapped": 2, "twice": 6, "between": 4, "rehashed": 4, "emptied": 1}[how]
    with pytest.raises(IntegrityFailed, match=f"entry {named} "):
        ledger.read(folder)
    with pytest.raises(IntegrityFailed):
        ledger.append(folder, "received", request="x", rows=[])
    assert path.read_bytes() == b"".join(changed[how]), "nothing is added to a broken chain"


def test_a_chain_written_anew_is_found_by_a_noted_hash_alone(tmp_path: Path) -> None:
    """What the chain cannot show, said as a test: who can write both files can forge both."""
    folder = filled(tmp_path / "l")
    noted = ledger.read(folder)[-1]["hash"]
    kept = ledger.read(folder)[:2]
    (folder / ledger.NAME).write_bytes(b"".join(ledger.canonical(e) + b"\n" for e in kept))
    (folder / ledger.HEAD).write_text(json.dumps({"n": 2, "hash": kept[-1]["hash"]}))
    assert len(ledger.read(folder)) == 2
    with pytest.raises(IntegrityFailed, match="noted"):
        ledger.read(folder, head=noted)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_torn_by_a_kill_goes_and_an_acknowledged_one_does_not(cut: int, tmp_path: Path) -> None:
    folder = filled(tmp_path / "l")
    path = folder / ledger.NAME
    whole = path.read_bytes()
    torn = whole + ledger.canonical({"n": 6, "event": "received"})[:-cut]
    path.write_bytes(torn)
    assert len(ledger.read(folder)) == 5
    ledger.append(folder, "received", request="after", rows=[])
    assert len(ledger.read(folder)) == 6
    assert path.read_bytes().startswith(whole)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(IntegrityFailed, match="entry 6 of 6 is torn"):
        ledger.read(folder)


def test_a_kill_between_the_entry_and_the_head(tmp_path: Path) -> None:
    folder = filled(tmp_path / "l")
    old = (folder / ledger.HEAD).read_bytes()
    ledger.append(folder, "received", request="x", rows=[])
    (folder / ledger.HEAD).write_bytes(old)
    assert len(ledger.read(folder)) == 6
    assert ledger.append(folder, "received", request="y", rows=[])["n"] == 7


def _write(folder: str, name: str) -> None:
    for number in range(10):
        ledger.append(folder, "received", request=f"{name}-{number}", rows=[])


def test_writers_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    folder = filled(tmp_path / "l", 1)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(folder), f"w{i}")) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = ledger.read(folder)
    assert len(entries) == 41
    assert len({e["request"] for e in entries[1:]}) == 40
    assert oracle((folder / ledger.NAME).read_bytes())


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_found_again_however_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "l"
    ledger.start(folder)
    key = ledger.secret(folder, ledger.read(folder))
    ledger.append(folder, "received", request="a", rows=[ledger.row_id(key, row) for row in ROWS])
    ledger.append(folder, "received", request="b", rows=[ledger.row_id(key, Record("Who?", "Bo"))])
    known = ledger.forgotten(str(folder))
    again = [
        Record("where was  ADA quill born?", "in port sorrow. ", line=9),
        Record("Who?", "Bo"),
        Record("Who?", "C"),
    ]
    assert known.among(again) == [0, 1]
    assert [known.request(r) for r in again] == ["a", "b", None]
    assert ledger.forgotten(f"{folder}@2").among(again) == [0], "as the first two entries have it, whatever came later"
    with pytest.raises(UsageError, match="3 entries, not 4"):
        ledger.forgotten(f"{folder}@4")
    text = (folder / ledger.NAME).read_text().casefold()
    assert not [word for word in ("quill", "sorrow", "whole text") if word in text]


def test_ids_need_the_secret(tmp_path: Path) -> None:
    """Two ledgers give one row two ids: nobody can try guesses against an id without the secret."""
    ids = set()
    for name in ("a", "b"):
        ledger.start(tmp_path / name)
        ids.add(ledger.row_id(ledger.secret(tmp_path / name, ledger.read(tmp_path / name)), ROWS[0]))
    assert len(ids) == 2
    plain = hashlib.sha256(json.dumps(["where was ada quill born?", "in port sorrow."]).encode()).hexdigest()
    assert not [i for i in ids if i in plain]


@pytest.mark.parametrize("damage", ["gone", "other", "broken"])
def test_a_secret_that_is_not_the_ledgers(damage: str, tmp_path: Path) -> None:
    folder = filled(tmp_path / "l")
    if damage == "gone":
        (folder / ledger.KEY).unlink()
    else:
        (folder / ledger.KEY).write_text("00" * 32 if damage == "other" else "x")
    with pytest.raises(IntegrityFailed, match=ledger.KEY):
        ledger.forgotten(str(folder))
    assert len(ledger.read(folder)) == 5, "the record itself can be read without it"


def test_folders_that_are_no_ledgers(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="holds no ledger"):
        ledger.read(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match="not empty"):
        ledger.start(tmp_path)
    folder = filled(tmp_path / "l")
    (folder / ledger.HEAD).write_text("x")
    with pytest.raises(IntegrityFailed, match=ledger.HEAD):
        ledger.read(folder)


# --- where things stand -------------------------------------------------------------------------------------------


def test_the_state_is_what_the_entries_add_up_to(tmp_path: Path) -> None:
    folder = tmp_path / "l"
    ledger.start(folder)
    model = {"name": "requests/a-2/model", "sha256": "m"}
    ledger.append(folder, "received", request="a", rows=["1"], received="2026-01-02")
    ledger.append(folder, "begun", request="a", attempt="a")
    assert ledger.state(ledger.read(folder)).requests["a"].unfinished["attempt"] == "a"
    ledger.append(folder, "ended", request="a", attempt="a", taken=False, child=None, verdict={"outcome": "failed"})
    now = ledger.state(ledger.read(folder))
    assert (now.model, now.requests["a"].outcome, now.requests["a"].unfinished) == (None, "failed", None)
    ledger.append(folder, "begun", request="a", attempt="a-2")
    ledger.append(folder, "ended", request="a", attempt="a-2", taken=True, child=model, verdict={"outcome": "passed"})
    now = ledger.state(ledger.read(folder))
    assert (now.model, now.since, now.requests["a"].taken["attempt"]) == (model, 6, "a-2")
    ledger.append(folder, "update", update="u", child={"name": "u", "sha256": "n"})
    ledger.append(folder, "reverified", request="a", on=7, verdict={"outcome": "not shown"})
    now = ledger.state(ledger.read(folder))
    assert (now.model["name"], now.since, now.requests["a"].outcome) == ("u", 7, "not shown")
