"""A realistic run folder of a tagger without any training, its numbers of the size that trials on WNUT17 gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from excise import artifacts
from excise.artifacts import Number, Results, RunFolder
from excise.commands.measuring.findings import findings
from fake_run import HOSTILE, _log_row, _manifest, _words

__all__ = ["HOSTILE", "write_fake_tagged_run"]

_MODELS = ("original", "gold", "unlearned", "reverse_gradient")
_VALUES: dict[str, tuple[float, ...]] = {
    # metric: original, gold, unlearned, reverse_gradient
    "forget_f1": (0.938, 0.527, 0.585, 0.310),
    "forget_outside_accuracy": (0.999, 0.979, 0.981, 0.971),
    "never_seen_outside_accuracy": (0.985, 0.984, 0.984, 0.98),
    "retain_f1": (0.925, 0.929, 0.922, 0.948),
    "untouched_f1": (0.931, 0.925, 0.915, 0.907),
    "never_seen_f1": (0.610, 0.602, 0.594, 0.588),
    "test_f1": (0.412, 0.419, 0.408, 0.397),
    "dev_f1": (0.581, 0.577, 0.571, 0.560),
    "forget_f1/person": (0.951, 0.612, 0.640, 0.402),
    "forget_f1/creative-work": (0.880, 0.204, 0.301, 0.102),
    "forget_probability": (0.961, 0.551, 0.603, 0.321),
    "retain_probability": (0.948, 0.944, 0.940, 0.951),
    "membership_auc": (0.663, 0.480, 0.470, 0.301),
    "entity_membership_auc": (0.642, 0.429, 0.459, 0.228),
    "privleak": (-37.3, 0.0, -5.3, 35.2),
    "latent_membership_auc": (0.71, 0.52, 0.60, 0.81),
    "same_class_neighbours": (0.93, 0.61, 0.64, 0.30),
    "own_class_cosine": (0.88, 0.63, 0.66, 0.35),
    "outside_cosine": (0.12, 0.34, 0.41, 0.62),
    "relearned_probability": (0.97, 0.66, 0.74, 0.58),
    "relearned_f1": (0.94, 0.58, 0.66, 0.49),
}
_ROWS = {"forget": 60, "never": 394, "retain": 400, "untouched": 180, "test": 400, "dev": 400}


def write_fake_tagged_run(root: Path, *, gold: bool = True, hostile: str | None = None) -> RunFolder:
    """Write a run folder of a tagger; ``hostile`` text stands in every field that takes any."""
    run, words = RunFolder(root), _words(hostile)
    root.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text("model:\n  task: token_classification\n", "utf-8")
    log = [_tagged_row(step, hostile) for step in range(2, 82, 2)]
    for row in log:
        artifacts.append_log(run, row)
    models = {m: _numbers(place) for place, m in enumerate(_MODELS) if gold or m != "gold"}
    if not gold:
        models = {m: {k: v for k, v in own.items() if k != "privleak" and "gap" not in k} for m, own in models.items()}
    if hostile:
        models[hostile] = {hostile: Number(0.5), f"{hostile}_f1": Number(0.4), f"forget_f1/{hostile}": Number(0.2)}
    artifacts.write_results(run, Results(models, {"unlearn": 36.0}, "token_classification"))
    artifacts.write_pictures(run, _pictures([*models], log, words))
    artifacts.write_manifest(run, {**_manifest(words), "files": artifacts.hash_files(run)})
    return run


def _numbers(place: int) -> dict[str, Number]:
    out = {}
    for name, row in _VALUES.items():
        n = next((rows for side, rows in _ROWS.items() if name.startswith(side)), 60)
        half = 0.9 / n**0.5 * (10.0 if name == "privleak" else 0.5)
        out[name] = Number(
            row[place], row[place] - half, min(row[place] + half, 1.0 if name != "privleak" else 99.0), n
        )
    for name in ("forget_f1", "test_f1"):
        gap = _VALUES[name][place] - _VALUES[name][1]
        half = 0.0 if place == 1 else 0.08 if name == "forget_f1" else 0.02
        out[f"{name}_gap"] = Number(gap, gap - half, gap + half, 60, {"level": 0.9})
    return out


def _tagged_row(step: int, hostile: str | None) -> dict[str, Any]:
    monitor = {
        "deepcut/anchors": float(step % 7), "deepcut/skipped": float(step % 3 == 0 and step % 7 > 0),
        "deepcut/without_same": 0.2, "deepcut/without_other": 0.0,
    }  # fmt: skip
    return {**_log_row(step, hostile), "monitor": monitor}


def _pictures(models: list[str], log: list[dict[str, Any]], words: Any) -> dict[str, Any]:
    edges = np.geomspace(1e-3, 10.0, 17)
    rng = np.random.default_rng(0)
    clouds, places, losses = {}, {}, {}
    for name in models:
        moved = {"original": 0.05, "gold": 0.45, "reverse_gradient": 0.9}.get(name, 0.5)
        spread = 0.1 if name in ("original", "gold") else 0.25
        away = (
            (rng.random(60) < moved) if name in ("original", "gold") else np.clip(rng.normal(moved, spread, 60), 0, 1)
        )
        forget = np.stack((0.85 - 0.75 * away, 0.1 + 0.7 * away), 1) + rng.normal(0, 0.06, (60, 2))
        unknown = rng.random(150) < 0.4
        never = np.stack((0.85 - 0.75 * unknown, 0.1 + 0.7 * unknown), 1) + rng.normal(0, 0.06, (150, 2))
        kept = np.array([0.9, 0.08]) + rng.normal(0, 0.05, (150, 2))
        clouds[name] = {s: v.tolist() for s, v in (("forget", forget), ("never_seen", never), ("untouched", kept))}
        outside = np.array([-1.0, 0.9]) + rng.normal(0, 0.2, (150, 2))
        places[name] = {**clouds[name], "outside": outside.tolist()}
        known = np.exp(rng.normal(-5 + 5 * moved, 1.5, 60)), np.exp(rng.normal(-1.8, 1.9, 394))
        losses[name] = {
            side: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
            for side, values in zip(("forget", "never_seen"), known, strict=True)
        }
    numbers = {m: {k: {"value": v[i]} for k, v in _VALUES.items()} for i, m in enumerate(_MODELS) if m in models}
    return {
        "relearning": {
            "steps": [0, 1, 2, 4, 8, 16],
            "models": {m: np.linspace(0.4, 0.7 + 0.05 * i, 6).tolist() for i, m in enumerate(models)},
        },
        "classes": {"models": clouds},
        "membership": {"edges": edges.tolist(), "models": losses},
        "map": {"method": "pca", "models": places, "explained": [0.44, 0.13]},
        "privleak_null_spread": 7.5,
        "findings": [
            {**{k: words(v) for k, v in found.items()}, "model": name}
            for name in ("unlearned", "reverse_gradient")
            for found in findings(numbers, log if name == "unlearned" else (), name=name)
        ],
        "not_shown": {"retain_f1": "no retain rows were evaluated"},
        "not_tested": [words("Layers below the one that the classifier reads.")],
    }
