"""`excise ledger DIR request`: one request to forget after the others, on the model that they left."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excise import artifacts, files, ledger, recipe
from excise.commands.exporting import export
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import limits, sides
from excise.commands.successive import again, evidence
from excise.commands.successive.evidence import Verifier
from excise.errors import InputRefused, IntegrityFailed, NotShown, TrainingStopped, UsageError
from excise.records import Record

REQUESTS, MERGED = "requests", "merged"


def request(
    folder: str | Path,
    settings: recipe.Recipe,
    *,
    name: str | None = None,
    received: str | None = None,
    accept: bool = False,
    resume: bool = False,
    suite: str = "all",
    verify: Verifier | None = None,
    progress: Progress | None = None,
) -> list[ledger.Entry]:
    """Carry out a request to forget on the model that earlier requests left, and verify those again.

    The rows that earlier requests named are left out of every side that is kept or compared with (`data.without`), so
    that nothing teaches them again. The model is the ledger's; the recipe's own is used by the first request only. The
    new weights are taken over if the verdict is ``passed`` (or with ``accept``), else the model stays what it was and
    the same request can be tried again.

    Args:
        folder: The ledger's folder; a new one is begun.
        settings: The recipe; ``out`` and, after the first request, ``model.name`` are the ledger's to say.
        name: Id of the request, a case number rather than a name: it is written to the record as it is.
        received: Day of receipt (``2026-03-31``); default today.
        accept: Take the weights over whatever the verdict is; the record says so.
        resume: Go on with the request that was begun and not ended.
        suite: What earlier requests are measured with, as for `evaluate`.
        verify: In place of `excise.verify`.
        progress: Where progress is shown.

    Returns:
        The entries that were added; the verdicts are in them.

    Raises:
        UsageError: An id that was used, another model, or a request that was begun and not ended.
        InputRefused: Rows or a model that cannot be used.
        TrainingStopped: As for `run`; the record says so.
        IntegrityFailed: The ledger, or what it points to, is not what was written.

    Example:
        >>> request("ledger", recipe.load("case-7.yaml"), name="case-7")  # doctest: +SKIP
        [{'event': 'received', ...}, ...]
    """
    folder, progress = Path(folder), progress or Progress()
    limits.check(settings)
    day = day_of(received)
    if name is not None:
        artifacts.safe_name(name)
    if not (folder / ledger.NAME).is_file():  # all that can be refused is refused before a ledger is begun
        sides.of(settings)
        evidence.weights(settings.model.name, settings.model.revision)
    with opened(folder, begin=True):
        made: list[ledger.Entry] = []
        now = ledger.state(ledger.read(folder))
        case = _case(folder, now, settings, name, resume=resume)
        given = sides.of(case.settings)
        _receive(folder, case, given.records["forget"], day, made)
        if not case.begun:
            begun = {"recipe": evidence.recipe_hash(case.settings), "parent": case.parent, "without": case.without}
            made.append(ledger.append(folder, "begun", request=case.name, attempt=case.attempt, **begun))
        try:
            made.append(_carry_out(folder, case, given, resume, accept, verify, progress))
        except (TrainingStopped, InputRefused, UsageError) as error:
            _end(folder, case, "stopped", code=error.exit_code)
            raise
        return made + again.verify_earlier(folder, suite, verify, progress)


@dataclasses.dataclass(frozen=True)
class _Case:
    """An attempt at a request: its id, its folder's name, the recipe as it is run, and whether it was begun before."""

    name: str
    attempt: str
    settings: recipe.Recipe
    parent: dict[str, Any]
    without: int
    begun: bool
    known: ledger.Request | None


def _case(folder: Path, now: ledger.State, settings: recipe.Recipe, name: str | None, *, resume: bool) -> _Case:
    """Which attempt at which request this is, or why it cannot be."""
    unfinished = next((r for r in now.requests.values() if r.unfinished), None)
    name = name or (unfinished.name if unfinished and resume else f"request-{len(now.requests) + 1}")
    known = now.requests.get(name)
    if known and known.taken:
        raise UsageError(f"{name}: was carried out before (entry {known.taken['n']}): give another id")
    if unfinished and unfinished.name != name:
        how = f"go on with it (--resume), or begin it anew (request --id {unfinished.name})"
        raise UsageError(f"{unfinished.name}: was begun and not ended: {how}")
    going_on = unfinished.unfinished if unfinished and resume else None
    if unfinished and not resume:
        _end(folder, _Case(name, unfinished.begun[-1]["attempt"], settings, {}, 0, True, known), "given up")
    number = len(known.begun) + (0 if going_on else 1) if known else 1
    attempt = name if number == 1 else f"{name}-{number}"
    without = going_on["without"] if going_on else sum(1 for _ in ledger.read(folder))
    out, parent = folder / REQUESTS / attempt, _parent(folder, now, settings)
    without_rows = f"{folder}@{without}" if now.requests.keys() - {name} else None
    own = dataclasses.replace(
        settings,
        out=str(out),
        data=dataclasses.replace(settings.data, without=without_rows),
        model=_model(folder, now, settings.model),
    )
    if going_on and evidence.recipe_hash(own) != going_on["recipe"]:
        raise IntegrityFailed(f"{name}: begun with another recipe (entry {going_on['n']}): resume with the same one")
    return _Case(name, attempt, own, parent, without, going_on is not None, known)


def _model(folder: Path, now: ledger.State, given: recipe.Model) -> recipe.Model:
    """The model section of a run: the recipe's, and from the second request on what the ledger says it is now."""
    if now.model is None:
        return given
    name = evidence.place(now.model["name"], folder)
    return dataclasses.replace(given, name=name, revision=now.model.get("revision"), config=None)


def _parent(folder: Path, now: ledger.State, settings: recipe.Recipe) -> dict[str, Any]:
    """The weights that a run begins with, and their hash.

    Raises:
        IntegrityFailed: They are not those that the last entry recorded.
        UsageError: The recipe makes a model of its own.
    """
    model = settings.model
    if now.model is None:
        if not model.name:
            raise UsageError("model.name is missing: a request needs a trained model to begin with")
        hub = {"revision": model.revision} if model.revision and not Path(model.name).exists() else {}
        name = evidence.shown(Path(model.name), folder) if Path(model.name).exists() else model.name
        return {"name": name, **hub, "sha256": evidence.weights(model.name, model.revision)}
    found = evidence.weights(evidence.place(now.model["name"], folder), now.model.get("revision"))
    if found != now.model["sha256"]:
        raise IntegrityFailed(f"{now.model['name']}: the weights are not those of entry {now.since}: restore them")
    return dict(now.model)


def _receive(folder: Path, case: _Case, rows: list[Record], day: str, made: list[ledger.Entry]) -> None:
    """Record that the request came in, by ids of its rows; a later attempt must name the same rows."""
    key = ledger.secret(folder, ledger.read(folder))
    ids = [ledger.row_id(key, row) for row in rows]
    if case.known is None:
        made.append(ledger.append(folder, "received", request=case.name, received=day, rows=ids))
    elif sorted(case.known.received["rows"]) != sorted(ids):
        raise UsageError(f"{case.name}: names other rows than those that were received: give it an id of its own")


def _carry_out(
    folder: Path, case: _Case, given: sides.Sides, resume: bool, accept: bool, verify: Verifier | None,
    progress: Progress,
) -> ledger.Entry:  # fmt: skip
    """Run, verify, and record what came of it."""
    out = Path(str(case.settings.out))
    status = "done"
    try:
        run(case.settings, resume=resume and out.exists(), progress=progress)
    except NotShown:  # no weights were admissible, those of the last step are there and are measured
        status = evidence.NOT_SHOWN
    with progress.stage("verify"):
        verdict = evidence.judged(out, verify)
    if status == evidence.NOT_SHOWN and verdict["outcome"] == evidence.PASSED:
        verdict["outcome"] = evidence.NOT_SHOWN
    taken = accept or verdict["outcome"] == evidence.PASSED
    return _end(
        folder, case, status, verdict=verdict, taken=taken, accepted=accept, left_out=given.left_out,
        child=child(folder, out, case.attempt) if taken else None, numbers=evidence.numbers(out),
        **evidence.of_run(out, evidence.shown(out, folder)),
    )  # fmt: skip


def _end(folder: Path, case: _Case, status: str, **fields: Any) -> ledger.Entry:
    own = {"verdict": {"outcome": status}, "taken": False, "child": None, **fields}
    return ledger.append(folder, "ended", request=case.name, attempt=case.attempt, status=status, **own)


def child(folder: Path, out: Path, name: str) -> dict[str, Any]:
    """The weights that a run made, as the next one begins with them: an adapter is merged into a model of its own."""
    model = out / "model"
    if (model / "adapter_config.json").is_file():
        model = folder / MERGED / name
        if not (model / files.COMPLETE).is_file():
            export(out, to="merged", out=model)
        files.verify(model)
    return {"name": evidence.shown(model, folder), "sha256": evidence.weights(str(model))}


@contextlib.contextmanager
def opened(folder: Path, *, begin: bool = False) -> Iterator[None]:
    """The ledger, for one process at a time; ``begin`` starts one where there is none.

    Raises:
        InputRefused: There is none.
        UsageError: Another process is at it.
    """
    if not begin:
        ledger.read(folder)
    with files.locked(folder):
        if not (folder / ledger.NAME).is_file():
            ledger.start(folder)
        yield


def day_of(given: str | None) -> str:
    """A day as ISO 8601 writes it."""
    if given is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.date.fromisoformat(given).isoformat()
    except ValueError:
        raise UsageError(f"--received {given}: give a day such as 2026-03-31") from None
