"""Staged, hashed, atomic writing and verified reading: a file or folder is whole, or it is not there.

The recipe is the usual one (temporary name in the same folder, flush, fsync, rename, fsync of the folder); it holds on
one local file system. Whole folders carry a ``COMPLETE.json`` with the size and SHA-256 of every file, which is what
`verify` trusts, never a name.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excise.errors import InputRefused, IntegrityFailed, UsageError

COMPLETE = "COMPLETE.json"
LOCK = ".lock"
_FORMAT = 1


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d:
        ...     write_text(Path(d) / "a", "abc")
        ...     sha256(Path(d) / "a")[:8]
        'ba7816bf'
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, never a part; missing folders are made.

    Raises:
        OSError: The disk refused; the old file, if there was one, is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as `write_bytes` does; line ends stay as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON as `write_bytes` does.

    Raises:
        ValueError: A number is not finite; JSON has no way to say that.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The path ``root/name``, where that is truly below ``root``.

    Args:
        root: A folder; it may itself be reached through a link.
        name: A relative path.

    Raises:
        InputRefused: An absolute path, ``..``, or a symbolic link that leads out of the folder.

    Example:
        >>> inside("runs", "../secret")
        Traceback (most recent call last):
        excise.errors.InputRefused: a path leads out of 'runs': give one below that folder
    """
    root, path = Path(root), Path(root) / name
    outside = not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts
    if outside or not path.resolve().is_relative_to(root.resolve()):
        raise InputRefused(f"a path leads out of {str(root)!r}: give one below that folder")
    return path


# --- folders ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder aside and put it in place whole when the block ends without an exception.

    Yields:
        An empty folder next to the final one. It is removed if the block raises.

    Raises:
        IntegrityFailed: What was built holds a link or something else that is not a plain file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d:
        ...     with staged(Path(d) / "model") as aside:
        ...         _ = (aside / "weights").write_bytes(b"1")
        ...     sorted(verify(Path(d) / "model"))
        ['weights']
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    aside = _beside(folder, "staging")
    aside.mkdir()
    try:
        yield aside
        seal(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def seal(aside: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Record the hash of every file of ``aside``, bring all to the disk, and rename it to ``folder``.

    A folder that is already there is moved away first and removed last. Between the two renames it is missing for a
    moment; `settle`, which `verify` and `staged` call, brings it back if the process died right there.

    Raises:
        IntegrityFailed: ``aside`` holds a link or something else that is not a plain file.
    """
    aside, folder = Path(aside), Path(folder)
    listing = {}
    for name, path in _walk(aside):
        if name != COMPLETE:
            listing[name] = {"sha256": sha256(path), "size": path.stat().st_size}
            _sync_file(path)
    write_json(aside / COMPLETE, {"format": _FORMAT, "files": listing})
    for below in sorted((p for p in aside.rglob("*") if p.is_dir()), reverse=True):
        _sync_folder(below)
    _sync_folder(aside)
    old = _beside(folder, "old")
    if os.path.lexists(folder):
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except BaseException:
        if os.path.lexists(old):
            os.rename(old, folder)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: str | os.PathLike[str]) -> None:
    """Undo a replacement that a killed process left half done, and remove what dead processes were building."""
    folder = Path(folder)
    if not folder.parent.is_dir():
        return
    for what in ("old", "staging"):  # first the folder itself, then the scratch
        for entry in sorted(folder.parent.glob(f"{glob.escape(_prefix(folder, what))}*")):
            pid = entry.name.removeprefix(_prefix(folder, what)).split("-")[0]
            if not pid.isdigit() or _alive(int(pid)):  # a living process is at it
                continue
            if what == "old" and not os.path.lexists(folder):
                with contextlib.suppress(FileNotFoundError):  # another process settled it first
                    os.rename(entry, folder)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _prefix(folder: Path, what: str) -> str:
    """Scratch names carry the machine and the process: only those known to be dead are ever touched."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
    return f".{folder.name}.{what}-{host}-"


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f"{_prefix(folder, what)}{os.getpid()}-{secrets.token_hex(4)}"


def verify(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Check a folder written by `staged` or `seal`: every listed file is there and unchanged, and no other is.

    Returns:
        The SHA-256 of each file by its path below the folder.

    Raises:
        IntegrityFailed: Naming the first file that is missing, changed, a link, or not listed.
    """
    folder = Path(folder)
    settle(folder)
    try:
        listing = json.loads((folder / COMPLETE).read_bytes())["files"]
        wanted = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in listing.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityFailed(f"{folder / COMPLETE}: missing or broken: the folder is not whole") from None
    found = {name: path for name, path in _walk(folder) if name != COMPLETE}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise IntegrityFailed(f"{folder}: file {name!r} is missing")
        if name not in wanted:
            raise IntegrityFailed(f"{folder}: file {name!r} is not in {COMPLETE}: it was added later")
        digest, size = wanted[name]
        if found[name].stat().st_size != size or sha256(found[name]) != digest:
            raise IntegrityFailed(f"{folder}: file {name!r} is not what was written: its size or SHA-256 differs")
    return {name: digest for name, (digest, _) in wanted.items()}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Plain files below a folder with their relative names; anything else is refused, links above all."""
    for entry in sorted(folder.iterdir()):
        mode = entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            for name, path in _walk(entry):
                yield f"{entry.name}/{name}", path
        elif stat.S_ISREG(mode):
            yield entry.name, entry
        else:
            raise IntegrityFailed(f"{entry}: neither a plain file nor a folder: remove it")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- one process per folder ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for this process; the lock of a process that died on this machine is taken over.

    Raises:
        UsageError: Another process holds it (this one included: the lock is not re-entrant).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d, locked(d):
        ...     (Path(d) / LOCK).exists()
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid()), "token": secrets.token_hex(8)}
    with alone(folder):
        holder = _holder(path)
        if holder is not None:
            if not _gone(holder):
                who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
                raise UsageError(f"{folder}: in use by {who}: wait, or delete {LOCK} if that is not so")
            path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise UsageError(f"{folder}: in use by another process, which was quicker") from None
        with open(descriptor, "w", encoding="utf-8") as handle:
            json.dump(mine, handle)
    try:
        yield
    finally:
        if (_holder(path) or {}).get("token") == mine["token"]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, the others wait: for moments (looking at a lock, adding a line), not for work.

    Of two processes that find a lock stale, the second must not remove the first's.
    """
    try:
        import fcntl
    except ImportError:  # no such call on this system: O_EXCL alone decides
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> dict[str, Any] | None:
    """What a lock file says; empty if it cannot be read, None if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead: same machine, and no such process or a later one of that number."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    return not _alive(pid) or holder.get("born") != _born(pid)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 would not be harmless
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it lives and belongs to someone else
        return True
    return True


def _born(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, where the system tells (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
