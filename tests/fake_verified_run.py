"""A run folder with tables, numbers and attacks, row by row, without any training: what a verdict reads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise import artifacts, recipe, verdict
from excise.artifacts import Number, Results, RunFolder
from excise.attacks.outcome import Outcome
from excise.attacks.outcome import save as save_outcome
from excise.metrics.table import Table
from excise.metrics.table import save as save_table


@dataclasses.dataclass(frozen=True)
class Made:
    """What one model does: means from which rows are drawn, and saved numbers.

    Attributes:
        forget: Mean log-probability per token of forgotten answers; never-seen ones have -5.
        kept: Probability of retained answers.
        rouge: ROUGE-L recall of forgotten answers.
        repetition: Share of repeated four-word runs.
        fluent: Share of answers that read like real ones.
        savings: Probability after all forget rows were trained again.
        inside: AUC of a classifier on hidden states.
        apart: AUC along the direction from retained to forgotten.
        relearned: Probability of the held-out half after relearning.
        leak: Share of rows of which something leaks.
        odd_rows: Rows whose answer is known in full, whatever the mean.
        truth: Shift of the log truth ratio.
    """

    forget: float = -5.0
    kept: float = 0.95
    rouge: float = 0.13
    repetition: float = 0.04
    fluent: float = 0.96
    savings: float = 0.22
    inside: float = 0.58
    apart: float = 0.47
    relearned: float = 0.004
    leak: float = 0.0
    odd_rows: int = 0
    truth: float = 0.0


ORIGINAL = Made(
    forget=-0.04, rouge=0.97, savings=0.97, inside=0.99, apart=0.99, relearned=0.96, leak=0.8, truth=-8.0, kept=0.96
)
AS_GOLD = Made()


def table(side: str, made: Made, rows: int, *, seed: int, groups: bool) -> Table:
    """Rows of a side: what is hard for one model is hard for all (``seed`` of the side), plus little of its own."""
    shared = np.random.default_rng([sum(side.encode()), 5])
    own = np.random.default_rng([seed, sum(side.encode())])
    kept = side in ("untouched", "retain")
    level = np.log(made.kept) if kept else made.forget if side == "forget" else -5.0
    scale = 0.02 if level > -0.5 else 0.5
    hard, noise = shared.normal(size=(2, rows, 3)), own.normal(size=(2, rows, 3))
    logp = level + scale * (0.9 * hard[0, :, 0] + 0.3 * noise[0, :, 0])
    if side == "forget" and made.odd_rows:
        logp[: made.odd_rows] = -0.02
    paraphrase = level + scale * (0.9 * hard[0, :, 1] + 0.3 * noise[0, :, 1])
    shift = made.truth if side == "forget" else 0.0
    false = paraphrase + shift + 0.5 * (0.9 * hard[0, :, 2] + 0.3 * noise[0, :, 2])
    nll = -np.minimum(np.stack((logp, paraphrase, false), 1), -1e-3)
    clip = np.clip
    columns: dict[str, NDArray] = {
        "row": np.repeat(np.arange(rows), 3), "kind": np.tile([0, 1, 2], rows), "zlib": np.full(3 * rows, 60),
        "eos": np.zeros(3 * rows, bool), "offsets": np.arange(0, 6 * rows + 1, 2),
        "logp": -np.repeat(nll.ravel(), 2), "hit": np.repeat(nll.ravel() < 0.7, 2),
        "rouge_l_recall": clip((0.97 if kept else made.rouge) + 0.03 * hard[1, :, 0] + 0.02 * noise[1, :, 0], 0, 1),
        "repetition": clip((made.repetition if side == "forget" else 0.04) + 0.02 * noise[1, :, 1], 0, 1),
    }  # fmt: skip
    places = (np.arange(rows) + 0.5) / rows  # the same rows in every model, so that pairs are paired
    columns["fluency"] = np.where(places < (made.fluent if side == "forget" else 0.96), 0.5, 0.001)
    if groups:
        columns["group"] = np.arange(rows) // max(rows // 12, 1) + {"forget": 0, "never_seen": 100}.get(side, 200)
    return Table(side, rows, columns)


def outcomes(made: Made, rows: int, *, seed: int) -> dict[str, Outcome]:
    """Relearning on half of the rows, training on all of them, and prompts that make something leak."""
    own, held = np.random.default_rng([seed, 3]), np.arange(0, rows, 2)
    hard = np.random.default_rng([sum(b"savings"), 5]).normal(size=rows)
    again = np.clip(made.savings + 0.05 * hard + 0.02 * own.normal(size=rows), 0, 1)[None]
    steps = np.clip(
        np.linspace(0, made.relearned, 4)[:, None] + 0.002 * own.normal(size=(4, len(held))), 0, 1
    )  # fmt: skip
    leaks = np.zeros((1, rows))
    leaks[0, : round(made.leak * rows)] = 1.0
    return {
        "relearn": Outcome("relearn", "probability", "steps", ("0", "2", "8", "16"), {"forget": steps},
                           {"forget": held}),
        "savings": Outcome("savings", "probability", "steps", ("24",), {"forget": again}, {"forget": np.arange(rows)}),
        "prompts": Outcome("prompts", "leak", "prompt", ("prefixed",), {"forget": leaks}, {"forget": np.arange(rows)}),
    }  # fmt: skip


def make(
    root: Path,
    made: Made = AS_GOLD,
    *,
    rows: int = 120,
    never_seen: int = 160,
    gold: bool = True,
    attacks: bool = True,
    groups: bool = False,
    fixed: bool = True,
    limits: Mapping[str, Any] | None = None,
    status: str = "done",
) -> RunFolder:
    """Write a whole run folder; ``made`` is the unlearned model."""
    run = RunFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    settings = recipe.build({"verify": dict(limits or {})})
    run.recipe.write_text(recipe.dump(settings), "utf-8")
    models = {"original": ORIGINAL, **({"gold": AS_GOLD} if gold else {}), "unlearned": made}
    sides = {"forget": rows, "untouched": 150, **({"never_seen": never_seen} if never_seen else {})}
    results: dict[str, dict[str, Number]] = {}
    for seed, (name, own) in enumerate(models.items()):
        for side, n in sides.items():
            path = run.table(name, side)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_table(table(side, own, n, seed=seed, groups=groups), path)
        if attacks:
            for attack, outcome in outcomes(own, rows, seed=seed).items():
                place = root / "attacks" / name / f"{attack}.safetensors"
                place.parent.mkdir(parents=True, exist_ok=True)
                save_outcome(outcome, place)
        half = 0.5 / max(rows, 1) ** 0.5
        results[name] = {
            "latent_membership_auc": Number(own.inside, own.inside - half, min(own.inside + half, 1.0), rows),
            "latent_projection_auc": Number(own.apart, own.apart - half, min(own.apart + half, 1.0), rows),
        }
    artifacts.write_results(run, Results(results, {"unlearn": 12.0}))
    artifacts.write_pictures(run, {"not_tested": ["Quantised or pruned copies of the model."]})
    sides_ = {s: {"rows": n, "fingerprint": hashlib.sha256(s.encode()).hexdigest()} for s, n in sides.items()}
    record: dict[str, Any] = {"status": status, "command": "excise run", "seed": 0, "versions": artifacts.environment(),
                              "model": {"name": "tiny"}, "data": sides_, "terms": [], "warnings": []}  # fmt: skip
    if fixed:
        record["verify"] = {"sha256": verdict.digest(settings.verify)}
    artifacts.write_manifest(run, {**record, "files": artifacts.hash_files(run)})
    return run
