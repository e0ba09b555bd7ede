"""`excise ledger DIR add`: a run that was made elsewhere, entered where it fits: a request, or other training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise import artifacts, ledger, recipe
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.commands.successive import again, evidence, requests
from excise.commands.successive.evidence import Verifier
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.records import Record, fingerprint
from excise.tasks import TASKS


def add_run(
    folder: str | Path,
    run: str | Path,
    *,
    name: str | None = None,
    received: str | None = None,
    accept: bool = False,
    suite: str = "all",
    verify: Verifier | None = None,
    progress: Progress | None = None,
) -> list[ledger.Entry]:
    """Enter a run folder that was made without the ledger, and verify the earlier requests on its model.

    A folder of `run` becomes a request that was carried out; one of `finetune` an update: other training of the same
    model, which may bring back what was forgotten. Either has to begin with the ledger's present weights, and must not
    have trained on rows that a request named.

    Args:
        folder: The ledger's folder; a new one is begun.
        run: The run folder; it stays where it is and has to stay there.
        name: Id of the request or of the update; default the folder's name.
        received: Day of receipt of a request.
        accept: Take the weights of a request over whatever the verdict is.
        suite: What earlier requests are measured with, as for `evaluate`.
        verify: In place of `excise.verify`.
        progress: Where progress is shown.

    Returns:
        The entries that were added.

    Raises:
        UsageError: A run that is not done or began with other weights, or an id that was used.
        InputRefused: The run trained on rows that a request named.
        IntegrityFailed: The run, its rows or the ledger are not what was written.

    Example:
        >>> add_run("ledger", "runs/new-people")  # doctest: +SKIP
        [{'event': 'update', ...}, ...]
    """
    folder, source, progress = Path(folder), Path(run), progress or Progress()
    day, name = requests.day_of(received), artifacts.safe_name(name or Path(run).resolve().name)
    settings, forgets = _read(source)
    rows = _rows(source, settings, forgets)
    parent = {"sha256": evidence.weights(settings.model.name, settings.model.revision)}
    with requests.opened(folder, begin=True):
        entries = ledger.read(folder)
        now = ledger.state(entries)
        _refuse(folder, source, now, name, parent["sha256"], entries)
        key = ledger.secret(folder, entries)
        _refuse_taught(folder, source, rows["retain"])
        parent["name"] = now.model["name"] if now.model else evidence.shown(Path(settings.model.name), folder)
        own = evidence.of_run(source, evidence.shown(source, folder))
        if not forgets:
            made = [ledger.append(folder, "update", update=name, parent=parent, **own,
                                  child=requests.child(folder, source, name))]  # fmt: skip
        else:
            ids = [ledger.row_id(key, row) for row in rows["forget"]]
            made = [ledger.append(folder, "received", request=name, received=day, rows=ids)]
            made.append(ledger.append(folder, "begun", request=name, attempt=name, parent=parent, outside=True,
                                      recipe=own["recipe"], without=len(entries)))  # fmt: skip
            verdict = evidence.judged(source, verify)
            taken = accept or verdict["outcome"] == evidence.PASSED
            made.append(ledger.append(
                folder, "ended", request=name, attempt=name, status="done", verdict=verdict, taken=taken,
                accepted=accept, left_out={}, child=requests.child(folder, source, name) if taken else None,
                numbers=evidence.numbers(source), **evidence.of_run(source, own["run"]),
            ))  # fmt: skip
        return made + again.verify_earlier(folder, suite, verify, progress)


def _read(source: Path) -> tuple[recipe.Recipe, bool]:
    """The recipe of a run that is done and whole, and whether it forgot anything."""
    run = artifacts.open_run(source)
    manifest = artifacts.read_manifest(run)
    if manifest.get("status") != "done" or not run.model.is_dir():
        raise UsageError(f"{source}: not a run that is done and has a model: finish it, or give another folder")
    changed = artifacts.changed_files(run, manifest.get("files", {}))
    if changed:
        raise IntegrityFailed(f"{source}: file {changed[0]!r} is missing or not what the run wrote")
    settings = recipe.load(str(run.recipe))
    if not settings.model.name:
        raise UsageError(f"{source}: was trained from scratch: the ledger's model is another; use it as model.name")
    return settings, artifacts.UNLEARNED in artifacts.read_results(run).models


def _rows(source: Path, settings: recipe.Recipe, forgets: bool) -> dict[str, list[Record]]:
    """The rows that a run forgot, and all that it trained on to keep; they have to be those that it read.

    Raises:
        IntegrityFailed: A file of rows has changed since the run.
    """
    if forgets:
        given = sides.of(settings)
        found = {"forget": given.records["forget"], "retain": given.records["retain"]}
        sources = given.sources
    else:
        task = settings.model.task
        given = sides.read(settings.data, seed=settings.seed, need_forget=False, task=task)
        parts = [given.records.get("forget", []), given.records["retain"]]
        for number, more in enumerate(settings.data.train, 1):
            own = TASKS[task].read(more, limit=settings.data.limit, tag_names=settings.data.tag_names)
            if settings.data.without:
                own = sides.leave_out(given, f"train-{number}", own, settings.data.without)
            given.sources[f"train-{number}"] = {"rows": len(own), "fingerprint": fingerprint(own)}
            parts.append(own)
        found, sources = {"retain": [row for part in parts for row in part]}, given.sources
    recorded: dict[str, Any] = artifacts.read_manifest(artifacts.RunFolder(source)).get("data", {})
    for side, own_source in sources.items():
        if side in recorded and recorded[side].get("fingerprint") != own_source["fingerprint"]:
            raise IntegrityFailed(f"{source}: the rows of {side} are not those that the run read: restore the file")
    return found


def _refuse(folder: Path, source: Path, now: ledger.State, name: str, parent: str, entries: list[ledger.Entry]) -> None:
    """Refuse a run that does not fit behind the last entry."""
    unfinished = next((r.name for r in now.requests.values() if r.unfinished), None)
    if unfinished:
        raise UsageError(f"{unfinished}: was begun and not ended: go on with it first (request --resume)")
    used = {e.get("update") for e in entries} | set(now.requests)
    if name in used:
        raise UsageError(f"{name}: stands in the ledger already: give another id")
    if now.model is not None and parent != now.model["sha256"]:
        raise UsageError(
            f"{source}: began with other weights than the ledger's present ones (entry {now.since}: "
            f"{now.model['name']}): make the run again from those"
        )


def _refuse_taught(folder: Path, source: Path, rows: list[Record]) -> None:
    """Refuse a run that trained on rows that a request named: it taught them again."""
    known = ledger.forgotten(str(folder))
    taught = known.among(rows)
    if taught:
        named = sorted({str(known.request(rows[i])) for i in taught})
        raise InputRefused(
            f"{source}: trained on {len(taught)} row(s) that {', '.join(named)} named: leave them out "
            f"(data.without: {folder}) and train again from the ledger's model"
        )
