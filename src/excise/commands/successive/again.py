"""Earlier requests on the model as it is now: measured again, verified again, and what came back named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from excise import artifacts, ledger, recipe
from excise.commands.evaluating import evaluate
from excise.commands.progress import Progress
from excise.commands.successive import evidence
from excise.commands.successive.evidence import Verifier
from excise.errors import IntegrityFailed

AGAIN = "again"


def verify_earlier(
    folder: Path, suite: str, verify: Verifier | None, progress: Progress
) -> list[ledger.Entry]:  # fmt: skip
    """Verify every request that was carried out on the present model, but the one that made it.

    What was done already for this model is not done again, so that a killed process goes on where it was.

    Returns:
        The entries that were added.
    """
    entries = ledger.read(folder)
    now = ledger.state(entries)
    made: list[ledger.Entry] = []
    if now.model is None:
        return made
    model = evidence.place(now.model["name"], folder)
    if evidence.weights(model, now.model.get("revision")) != now.model["sha256"]:
        raise IntegrityFailed(f"{now.model['name']}: the weights are not those of entry {now.since}: restore them")
    named = max(entry["n"] for entry in entries if entry["event"] in ("received", "opened"))
    for name, earlier in now.requests.items():
        taken = earlier.taken
        if taken is None or taken["n"] == now.since or any(e["on"] == now.since for e in earlier.reverified):
            continue
        out = folder / AGAIN / f"{now.since:04d}" / name
        source = Path(evidence.place(taken["run"], folder))
        settings = _settings(source, f"{folder}@{named}", out)
        # As much as the request's own run was: attacks are the greater part of all, and few runs make them.
        without = ("attack",) if suite == "all" and not (source / "attacks").is_dir() else ()
        evaluate(model, suite=suite, without=without, recipe=settings, out=out, resume=out.exists(), progress=progress)
        carry_thresholds(source, out)
        made.append(_record(folder, name, earlier, now, out, suite, evidence.judged(out, verify)))
    return made


def _record(
    folder: Path, name: str, earlier: ledger.Request, now: ledger.State, out: Path, suite: str, verdict: dict[str, Any]
) -> ledger.Entry:
    assert now.model is not None
    return ledger.append(
        folder, "reverified", request=name, on=now.since, model=now.model["sha256"], suite=suite,
        verdict=verdict, before=earlier.outcome, numbers=evidence.numbers(out),
        **evidence.of_run(out, evidence.shown(out, folder)),
    )  # fmt: skip


def _settings(source: Path, without: str, out: Path) -> recipe.Recipe:
    """The recipe of an earlier run, with what later requests named left out of its kept sides too."""
    settings = recipe.load(str(source / "recipe.yaml"))
    return dataclasses.replace(
        settings, out=str(out), data=dataclasses.replace(settings.data, without=without)
    )  # fmt: skip


def carry_thresholds(source: Path, out: Path) -> None:
    """The thresholds that were fixed before the first run hold for what is measured later: their hash goes along."""
    fixed: dict[str, Any] = dict(artifacts.read_manifest(artifacts.RunFolder(source)))
    run = artifacts.RunFolder(out)
    if "verify" in fixed:
        artifacts.write_manifest(run, {**artifacts.read_manifest(run), "verify": fixed["verify"]})
