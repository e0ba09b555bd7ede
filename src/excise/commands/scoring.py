"""`excise score` and `excise report`: numbers and a page from what lies on disk; no model, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise import artifacts, reporting
from excise.errors import InputRefused
from excise.metrics import class_scores, logs
from excise.metrics.scores import score as score_tables
from excise.metrics.table import Table


def score(log: str | Path, against: str | Path | None = None) -> dict[str, Any]:
    """Metrics from saved tables alone, no model: ours, TOFU's ``eval_log_aggregated.json``, OpenUnlearning's logs.

    Args:
        log: A run folder, a folder of tables, or a log file. What is relative to the original is shown where its tables
            lie in the same run folder.
        against: The gold's; of a run folder its gold is read.

    Returns:
        Metric -> ``{"value", "low", "high", "n"}``.

    Raises:
        InputRefused: Not a log, or a damaged one.

    Example:
        >>> score("phi_full.json", against="phi_retain90.json")["forget_quality_log10"]  # doctest: +SKIP
        {'value': -15.659, 'low': None, 'high': None, 'n': 300}
    """
    own = logs.read(log, _role(Path(log), "unlearned"))
    gold = logs.read(against, _role(Path(against), "gold")) if against else None
    if class_scores.task_of(own) is not None:
        return dict(artifacts.finite(dict(class_scores.score(own, gold).values)))
    found = score_tables(own, gold, original=_original(Path(log)))
    return dict(artifacts.finite(dict(found.values)))


def _original(log: Path) -> dict[str, Table] | None:
    """The original's tables of the run folder that ``log`` is, or is a folder of tables in."""
    tables = log / "tables" if (log / "tables").is_dir() else log.parent
    folder = tables / "original"
    return logs.read(folder) if tables.name == "tables" and folder.is_dir() else None


def _role(path: Path, wanted: str) -> str | None:
    """Which model's tables of a run folder are meant; None for anything else."""
    if not (path / "tables").is_dir():
        return None
    names = sorted(p.name for p in (path / "tables").iterdir() if p.is_dir())
    for name in (wanted, "unlearned", "original"):
        if name in names:
            return name
    return names[0] if names else None


def report(run: str | Path) -> Path:
    """Rebuild ``report.html`` of a run folder from what lies in it.

    Raises:
        InputRefused: No run folder.

    Example:
        >>> report("runs/first")  # doctest: +SKIP
        PosixPath('runs/first/report.html')
    """
    if not Path(run).is_dir():
        raise InputRefused(f"{run}: no such folder: give the folder that a run wrote")
    return reporting.build(run)
