"""`excise ledger DIR show|check|reverify`: where the requests stand, and whether all is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise import files, ledger
from excise.commands.progress import Progress
from excise.commands.successive import again, evidence, requests
from excise.commands.successive.evidence import Verifier
from excise.errors import IntegrityFailed


def reverify(
    folder: str | Path, *, suite: str = "all", verify: Verifier | None = None, progress: Progress | None = None
) -> list[ledger.Entry]:
    """Measure and verify every earlier request on the present model, where that was not done yet.

    Args:
        folder: The ledger's folder.
        suite: What is measured, as for `evaluate`.
        verify: In place of `excise.verify`.
        progress: Where progress is shown.

    Returns:
        The entries that were added: none where all was verified before.

    Raises:
        InputRefused: No ledger there.
        IntegrityFailed: The ledger or the weights are not what was written.

    Example:
        >>> reverify("ledger")  # doctest: +SKIP
        []
    """
    with requests.opened(Path(folder)):
        return again.verify_earlier(Path(folder), suite, verify, progress or Progress())


def check_ledger(folder: str | Path, *, head: str | None = None) -> dict[str, Any]:
    """Check the chain, the secret, and every file that the entries point to.

    A run folder that was deleted is listed, for records may have to go after a time; one that was changed is refused,
    and so is a present model that is missing.

    Args:
        folder: The ledger's folder.
        head: A hash that was noted earlier; an entry must have it.

    Returns:
        ``entries``, ``head`` (the hash to note elsewhere), ``checked`` and ``gone`` (paths).

    Raises:
        IntegrityFailed: Naming the entry.

    Example:
        >>> check_ledger("ledger")  # doctest: +SKIP
        {'entries': 9, 'head': '5f2c...', 'checked': ['requests/case-7'], 'gone': []}
    """
    folder = Path(folder)
    entries = ledger.read(folder, head=head)
    ledger.secret(folder, entries)
    checked, gone = [], []
    for entry in entries:
        for what, path, wanted in _recorded(folder, entry):
            if not path.exists():
                gone.append(what)
            elif wanted != _found(path):
                raise IntegrityFailed(f"{what}: not what entry {entry['n']} of the ledger recorded: restore it")
            else:
                checked.append(what)
    now = ledger.state(entries)
    if now.model is not None:
        place = evidence.place(now.model["name"], folder)
        if evidence.weights(place, now.model.get("revision")) != now.model["sha256"]:
            raise IntegrityFailed(f"{now.model['name']}: the weights are not those of entry {now.since}: restore them")
    return {"entries": len(entries), "head": entries[-1]["hash"], "checked": checked, "gone": gone}


def _recorded(folder: Path, entry: ledger.Entry) -> list[tuple[str, Path, str]]:
    """The files that an entry points to: how they are called, where they lie, and their hash."""
    found = []
    if "run" in entry:
        root = Path(evidence.place(entry["run"], folder))
        names = [("manifest.json", entry["manifest"]), ("recipe.yaml", entry["recipe"])]
        names += [(evidence.VERDICT, entry["verdict"]["sha256"])] if "sha256" in entry.get("verdict", {}) else []
        found = [(f"{entry['run']}/{name}", root / name, wanted) for name, wanted in names]
    if entry.get("child"):
        found.append((entry["child"]["name"], Path(evidence.place(entry["child"]["name"], folder)),
                      entry["child"]["sha256"]))  # fmt: skip
    return found


def _found(path: Path) -> str:
    return evidence.weights(str(path)) if path.is_dir() else files.sha256(path)


def show_ledger(folder: str | Path) -> dict[str, Any]:
    """Where the requests of a ledger stand, as plain values; the chain is checked on the way.

    Returns:
        ``requests`` (``request``, ``received``, ``ended``, ``rows``, ``attempts``, ``carried_out``, ``then`` and
        ``now``: the verdict after it was carried out and the latest one, ``current``: whether that is of the present
        model, ``numbers`` of both), ``updates``, the present ``model``, the number of ``entries`` and the ``head``.

    Example:
        >>> show_ledger("ledger")["model"]  # doctest: +SKIP
        'requests/case-7/model'
    """
    folder = Path(folder)
    entries = ledger.read(folder)
    now = ledger.state(entries)
    return {
        "requests": [_row(r, now) for r in now.requests.values()],
        "updates": [{"update": e["update"], "entry": e["n"]} for e in entries if e["event"] == "update"],
        "model": evidence.place(now.model["name"], folder) if now.model else None,
        "entries": len(entries),
        "head": entries[-1]["hash"],
    }


def _row(request: ledger.Request, now: ledger.State) -> dict[str, Any]:
    first = request.taken or (request.ended[-1] if request.ended else None)
    last = request.reverified[-1] if request.reverified else first
    of = (last.get("on") or last["n"]) if last else None
    return {
        "request": request.name,
        "received": request.received["received"],
        "ended": first["time"][:10] if first else None,
        "rows": len(request.received["rows"]),
        "attempts": len(request.begun),
        "carried_out": request.taken is not None,
        "then": first["verdict"]["outcome"] if first else None,
        "now": request.outcome,
        "current": of == now.since,
        "numbers": [part.get("numbers", {}) if part else {} for part in (first, last)],
    }
