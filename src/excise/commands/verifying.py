"""`excise verify`: a finished run against the thresholds that were fixed before it, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise import artifacts, recipe, reporting, verdict
from excise.attacks import outcome
from excise.errors import InputRefused, IntegrityFailed
from excise.metrics.table import Table
from excise.metrics.table import load as load_table

#: What a verdict reads; every file of these that lies in the folder must be one that the run wrote.
_READ = ("tables/", "attacks/")
_FOLDER = "model/"


def verify(run: str | Path, *, model: str | None = None) -> verdict.Verdict:
    """Test a run folder against its own thresholds, write ``verdict.json``, and rebuild the report.

    Nothing is measured and no model is loaded: the verdict is a function of what the run saved.

    Args:
        run: A folder that a run, or `excise evaluate --out`, wrote.
        model: Which of the folder's models; default the main unlearned one.

    Returns:
        The verdict; ``exit_code`` is what the command line returns: 0 passed, 5 failed, 7 not shown.

    Raises:
        InputRefused: No run folder, an unfinished run, or nothing that was measured.
        IntegrityFailed: Tables, numbers, attacks or thresholds are not those that the run recorded.

    Example:
        >>> verify("runs/first").outcome  # doctest: +SKIP
        'not shown'
    """
    folder = artifacts.open_run(run)
    record = artifacts.read_manifest(folder)
    if record.get("status") != "done":
        raise InputRefused(f"{folder.root}: the run is not finished: resume it, then verify")
    _refuse_changed(folder, record)
    limits, fixed = _thresholds(folder, record)
    evidence = _evidence(folder, limits, model)
    said = artifacts.read_pictures(folder).get("not_tested", ())
    found = verdict.judge(evidence, fixed=fixed, also_not_tested=[str(line) for line in said])
    artifacts.write_verdict(folder, found.plain())
    reporting.build(folder.root)
    return found


def _refuse_changed(folder: artifacts.RunFolder, record: artifacts.Manifest) -> None:
    """Refuse a folder whose files are not those of the manifest. Weights that were deleted since are not missed."""
    recorded = record.get("files") or {}
    changed = [
        name
        for name in artifacts.changed_files(folder, recorded)
        if not name.startswith(_FOLDER) or (folder.root / name).is_file()
    ]
    if changed:
        raise IntegrityFailed(f"{folder.root}: file {changed[0]!r} is missing or not what the run wrote; run it again")
    own = artifacts.hash_files(folder, leave_out=("checkpoints", "model"))
    strange = [name for name in own if name not in recorded and (name.startswith(_READ) or name == "results.json")]
    if strange:
        raise IntegrityFailed(f"{folder.root}: file {strange[0]!r} is none that the run recorded; take it away")


def _thresholds(folder: artifacts.RunFolder, record: artifacts.Manifest) -> tuple[recipe.Verify, bool]:
    """The thresholds of the folder, and whether their hash was recorded before the run."""
    written = recipe.read_yaml(str(folder.recipe)).get("verify") if folder.recipe.is_file() else None
    known = (record.get("verify") or {}).get("sha256")
    if known is not None and (written is None or verdict.digest(written) != known):
        raise IntegrityFailed(f"{folder.root}: the thresholds are not those fixed before the run; restore recipe.yaml")
    return recipe.build({"verify": written or {}}).verify, known is not None


def _evidence(folder: artifacts.RunFolder, limits: recipe.Verify, model: str | None) -> verdict.Evidence:
    results = artifacts.read_results(folder)
    if not results.models:
        raise InputRefused(f"{folder.root}: nothing was measured: excise evaluate RUN --suite all --out FOLDER")
    if model is not None and model not in results.models:
        raise InputRefused(f"{folder.root}: has no model {model!r}: it has {', '.join(results.models)}")
    judged = model or next(iter(results.unlearned()), None)
    if judged is None:
        raise InputRefused(f"{folder.root}: holds no model but the original and the gold")
    roles = [name for name in dict.fromkeys((judged, artifacts.GOLD, artifacts.ORIGINAL)) if name in results.models]
    return verdict.Evidence(
        judged, _found(_tables(folder, name) for name in roles), results, limits,
        _found(_attacks(folder, name) for name in roles),
    )  # fmt: skip


def _found(named: Any) -> dict[str, Any]:
    return {name: own for name, own in named if own}


def _tables(folder: artifacts.RunFolder, name: str) -> tuple[str, Mapping[str, Table]]:
    return name, {path.stem: load_table(path) for path in sorted((folder.tables / name).glob("*.safetensors"))}


def _attacks(folder: artifacts.RunFolder, name: str) -> tuple[str, Mapping[str, outcome.Outcome]]:
    place = folder.root / "attacks" / name
    return name, {path.stem: outcome.load(path) for path in sorted(place.glob("*.safetensors"))}
