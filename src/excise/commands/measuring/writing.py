"""Judging models that were measured, and writing tables, numbers and pictures into a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from excise import artifacts, recipe
from excise.attacks.outcome import save as save_outcome
from excise.commands.measuring import attacking, evaluation, findings
from excise.commands.measuring.measured import Measured, Numbers
from excise.commands.progress import Progress
from excise.metrics import muse_scores
from excise.metrics.table import save as save_table
from excise.records import Record


def judge(
    measured: Mapping[str, Measured], records: Mapping[str, list[Record]], settings: recipe.Recipe
) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Numbers of every model and what the pictures are drawn from; the gold and the original stand beside each.

    Returns:
        ``results.json``'s ``models``, and ``pictures.json`` without its findings.
    """
    numbers, pictures = evaluation.TASKS[settings.model.task].judge(measured, records, settings)
    if any(own.muse for own in measured.values()):
        gold = measured["gold"].tables | measured["gold"].muse if "gold" in measured else None
        for name, own in measured.items():
            found, not_shown = muse_scores.numbers(
                own.tables | own.muse, gold, reference_auc=settings.evaluate.muse.reference_auc
            )
            numbers[name] |= found
            pictures["not_shown"] = pictures["not_shown"] | not_shown
    attacking.judge(measured, numbers, pictures)
    return numbers, pictures


def write(
    run: artifacts.RunFolder,
    measured: Mapping[str, Measured],
    records: Mapping[str, list[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    log: Sequence[Mapping[str, Any]] = (),
    geometry: Mapping[str, Any] | None = None,
) -> artifacts.Results:
    """Judge the models and write tables, numbers and pictures into a run folder."""
    with progress.stage("judge"):
        numbers, pictures = judge(measured, records, settings)
        pictures |= {} if geometry is None else {"geometry": geometry}
        names = [n for n in measured if n not in (artifacts.ORIGINAL, artifacts.GOLD)]
        logs = {name: log if name == artifacts.UNLEARNED else () for name in names}
        pictures["findings"] = [
            {**found, "model": name} for name in names for found in findings.findings(numbers, logs[name], name=name)
        ]
        for name, own in measured.items():
            for side, table in {**own.tables, **own.muse}.items():
                path = run.table(name, side)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_table(table, path)
            for attack, made in own.attacks.items():
                save_outcome(made, run.attack(name, attack))
        if settings.evaluate.include_text and records:
            artifacts.write_examples(run, _examples(measured, records))
        shown = {model: {k: artifacts.Number.of(v) for k, v in own.items()} for model, own in numbers.items()}
    results = artifacts.Results(shown, progress.seconds, settings.model.task)
    artifacts.write_pictures(run, pictures)
    artifacts.write_results(run, results)
    return results


def _examples(measured: Mapping[str, Measured], records: Mapping[str, list[Record]]) -> list[dict[str, Any]]:
    rows = records["forget"][:20]
    return [
        {
            "side": "forget", "question": r.prompt or "", "answer": r.completion,
            "generated": {name: m.texts["forget"][i] for name, m in measured.items() if "forget" in m.texts},
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip
