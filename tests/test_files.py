"""No torn file or folder is ever accepted: faults, kills, tampering, links, and two processes in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from excise import files
from excise.errors import InputRefused, IntegrityFailed, UsageError


def build(folder: Path, version: str) -> None:
    with files.staged(folder) as aside:
        (aside / "deep").mkdir()
        for name in ("a", "b", "deep/c"):
            (aside / name).write_text(version * 50)


def versions(folder: Path) -> set[str]:
    files.verify(folder)
    return {(folder / name).read_text() for name in ("a", "b", "deep/c")}


def test_a_file_is_replaced_whole(tmp_path):
    files.write_json(tmp_path / "new" / "x.json", {"ä": [1, None]})
    assert json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "new" / "x.json", {"a": float("nan")})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.json"]


def test_a_folder_is_verified_and_replaced(tmp_path):
    folder = tmp_path / "model"
    build(folder, "1")
    assert set(files.verify(folder)) == {"a", "b", "deep/c"}
    build(folder, "2")
    assert versions(folder) == {"2" * 50}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def broken() -> None:
        with files.staged(tmp_path / "x") as aside:
            (aside / "a").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        broken()
    assert list(tmp_path.iterdir()) == []


def _flip(folder: Path) -> None:
    data = bytearray((folder / "b").read_bytes())
    data[3] ^= 1
    (folder / "b").write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_flip, "'b'"),
        (lambda d: (d / "deep/c").unlink(), "'deep/c' is missing"),
        (lambda d: (d / "a").write_text(""), "'a'"),
        (lambda d: (d / "evil.pkl").write_text("x"), "'evil.pkl' is not in"),
        (lambda d: (d / "COMPLETE.json").unlink(), "COMPLETE.json"),
        (lambda d: (d / "COMPLETE.json").write_text((d / "COMPLETE.json").read_text()[:40]), "COMPLETE.json"),
        (lambda d: (d / "COMPLETE.json").write_text('{"files": [1]}'), "COMPLETE.json"),
        (lambda d: (d / "deep/link").symlink_to("/etc/passwd"), "link"),
        (shutil.rmtree, "COMPLETE.json"),
    ],
)
def test_any_change_is_found_and_named(tmp_path, harm, named):
    build(tmp_path / "x", "1")
    harm(tmp_path / "x")
    with pytest.raises(IntegrityFailed, match=named):
        files.verify(tmp_path / "x")


def test_a_link_is_not_sealed(tmp_path):
    with pytest.raises(IntegrityFailed), files.staged(tmp_path / "x") as aside:
        (aside / "a").symlink_to("/etc/passwd")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_the_nth_failing_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, call):
    folder = tmp_path / "x"
    build(folder, "1")
    real, failed = getattr(os, call), 0
    for n in range(1, 40):
        count = 0

        def failing(*args, n=n, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        with contextlib.suppress(OSError):
            build(folder, "2")
        monkeypatch.setattr(os, call, real)
        assert versions(folder) in ({"1" * 50}, {"2" * 50})
        if count < n:
            break
        failed += 1
        shutil.rmtree(folder)
        build(folder, "1")
    assert 0 < failed < 39
    assert not [p for p in tmp_path.iterdir() if ".staging-" in p.name or ".tmp" in p.name]


WRITER = """
import itertools, sys
from pathlib import Path
from excise import files
folder = Path(sys.argv[1])
for version in itertools.count():
    with files.staged(folder) as aside:
        for name in ("a", "b", "c", "d"):
            (aside / name).write_text(str(version) * 2000)
    print(version, flush=True)
"""


def test_sigkill_at_any_moment_never_leaves_a_torn_folder(tmp_path):
    folder, draw = tmp_path / "x", random.Random(0)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], env=env, stdout=subprocess.PIPE) as child:
            child.stdout.readline()  # one version is whole
            time.sleep(draw.uniform(0, 0.06))
            child.send_signal(signal.SIGKILL)
            child.wait()
        files.verify(folder)
        texts = {(folder / name).read_text() for name in "abcd"}
        assert len(texts) == 1
    build(tmp_path / "x", "9")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # what the dead left behind is swept away


def test_a_kill_between_the_two_renames_is_undone(tmp_path):
    folder = tmp_path / "x"
    build(folder, "1")
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    os.rename(folder, tmp_path / f"{files._prefix(folder, 'old')}{dead.pid}-aa")
    assert versions(folder) == {"1" * 50}


# --- paths and locks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "out/passwd", "a\0b"])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to("/etc")
    with pytest.raises(InputRefused):
        files.inside(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "~x", "ü and spaces/\n"])
def test_paths_below_are_given(tmp_path, name):
    assert files.inside(tmp_path, name) == tmp_path / name


def test_one_process_holds_a_folder(tmp_path):
    with files.locked(tmp_path):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), files.locked(tmp_path):
            pass
        code = f"from excise.files import locked\nwith locked({str(tmp_path)!r}): pass"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert "in use" in other.stderr
    assert not (tmp_path / files.LOCK).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    (tmp_path / files.LOCK).write_text(json.dumps({"pid": dead.pid, "host": socket.gethostname(), "token": "x"}))
    with files.locked(tmp_path):
        pass
    reused = {"pid": os.getpid(), "host": socket.gethostname(), "born": "1", "token": "x"}
    (tmp_path / files.LOCK).write_text(json.dumps(reused))
    if files._born(os.getpid()) is not None:
        with files.locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ['{"pid": 1, "host": "elsewhere"}', "", "[]"])
def test_a_lock_that_cannot_be_judged_is_respected(tmp_path, text):
    (tmp_path / files.LOCK).write_text(text)
    with pytest.raises(UsageError, match=r"delete \.lock"), files.locked(tmp_path):
        pass
    assert (tmp_path / files.LOCK).read_text() == text
