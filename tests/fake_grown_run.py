"""A verified run folder whose report has everything: tests, attacks beside the gold, layers, single rows, an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise import artifacts, verify
from excise.artifacts import RunFolder
from excise.attacks import outcome
from excise.files import write_json
from excise.metrics import single_rows
from excise.metrics.table import load
from fake_run import HOSTILE
from fake_verified_run import AS_GOLD, Made, make

MODELS = ("original", "gold", "unlearned")
OVER = Made(forget=-9.0, kept=0.93, repetition=0.4, fluent=0.4, apart=0.95, inside=0.98, savings=0.6, relearned=0.3)


def write_grown_run(root: Path, made: Made = AS_GOLD, *, hostile: bool = False, **options: Any) -> RunFolder:
    """Write a run, verify it (which builds the report), and put what training would have measured beside it.

    Args:
        root: Where to.
        made: What the unlearned model does.
        hostile: Put hostile text into every new field that takes any text.
        options: As `fake_verified_run.make`.
    """
    run = make(root, made, **options)
    pictures = artifacts.read_pictures(run) | measured(run, made) | layers(made)
    artifacts.write_pictures(run, pictures)
    _record(run)
    verify(root)
    write_json(run.audit, audit())
    if hostile:
        artifacts.write_verdict(run, spoiled(artifacts.read_verdict(run)))
        artifacts.write_pictures(run, spoiled(pictures))
        write_json(run.audit, spoiled(audit()))
        _record(run)
    return run


def _record(run: RunFolder) -> None:
    manifest = artifacts.read_manifest(run)
    artifacts.write_manifest(run, {**manifest, "files": artifacts.hash_files(run)})


def measured(run: RunFolder, made: Made) -> dict[str, Any]:
    """Pictures from the saved tables and outcomes, as a run makes them; more attacks than the folder keeps."""
    tables = {m.name: {path.stem: load(path) for path in m.glob("*.safetensors")} for m in run.tables.iterdir()}
    lines = {side: list(range(1, t.rows + 1)) for side, t in tables["unlearned"].items()}
    names = sorted({path.stem for path in run.attacks.glob("*/*.safetensors")})
    found = {name: {m: outcome.load(run.attack(m, name)) for m in reversed(MODELS) if run.attack(m, name).is_file()}
             for name in names}  # fmt: skip
    curves = {name: outcome.picture(own) for name, own in found.items() if own}
    reached = {"original": (0.96, 0.95), "gold": (0.004, 0.01), "unlearned": (0.004, made.relearned)}
    ways = ("none", "moved-1", "apart-1", "random")
    for name, budget, budgets in (("quantise", "bits", ("none", "8", "4", "3")), ("direction", "layer", ways)):
        drawn = {m: [a + (b - a) * i / 3 for i in range(4)] for m, (a, b) in reached.items()}
        curves[name] = {"budget": budget, "budgets": list(budgets), "unit": "probability", "models": {
            m: {"value": v, "low": [x * 0.9 for x in v], "high": [min(1, x * 1.1) for x in v]}
            for m, v in drawn.items()}}  # fmt: skip
    return {"attacks": curves, **single_rows.membership(tables), **single_rows.worst(tables, lines)}


def layers(made: Made) -> dict[str, Any]:
    """Layer by layer: recognised from inside, and answers read from there."""
    at = {"original": 0.97, "gold": AS_GOLD.inside, "unlearned": made.inside}
    names = ("latent_membership_auc", "latent_projection_auc", "neighbours_never_seen")
    rise = {"original": 0.96, "gold": 0.01, "unlearned": 0.02}
    curves = {name: {m: [0.5 + (v - 0.5) * i / 4 for i in (1, 2, 3, 4)] for m, v in at.items()} for name in names}
    read = {m: [v * i / 4 for i in (1, 2, 3, 4)] for m, v in rise.items()}
    return {"latent_by_layer": {"layers": [1, 2, 3, 4], "metrics": curves},
            "lens_by_layer": {"layers": [1, 2, 3, 4], "sides": {"forget": read, "untouched": read}}}  # fmt: skip


def audit() -> dict[str, Any]:
    """What `excise audit` writes."""
    each = [{"layer": i, "errors": 40 - 5 * i, "n": 80, "bits": 0.1 * i, "epsilon": 0.2 * i} for i in (1, 2)]
    return {"level": 0.95, "layers": each, "proves": {"epsilon": "It proves one thing.", "layers": "And another."},
            "epsilon": {"bound": 0.61, "at_most": 2.4, "canaries": 200, "guesses": 100, "right": 71}}  # fmt: skip


#: Fields of the new files whose text decides where something stands; all other text is spoiled.
_KEEP = ("outcome", "group", "direction", "role", "unit", "model", "side", "beside")


def spoiled(content: Any, key: str = "") -> Any:
    """``content`` with hostile text in every text, and as one more name in every object of names."""
    if isinstance(content, dict):
        more = {HOSTILE: next(iter(content.values()))} if key in ("models", "metrics", "sides", "attacks") else {}
        return {k: spoiled(v, k) for k, v in (content | more).items()}
    if isinstance(content, list):
        return [spoiled(v, key) for v in content]
    return f"{content} {HOSTILE}" if isinstance(content, str) and key not in _KEEP else content
