"""What an entry of the ledger says of files: hashes of weights, a run's verdict, and its few numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from excise import artifacts, files, recipe
from excise.commands.measuring import evaluation
from excise.errors import InputRefused

#: Writes a run folder's ``verdict.json`` (`excise.verify`); tests put another in its place.
Verifier = Callable[[Path], Any]
VERDICT = "verdict.json"
PASSED, FAILED, NOT_SHOWN = "passed", "failed", "not shown"
#: What `excise ledger show` prints a curve of: the first that a run has, of forgotten and of retained rows.
NUMBERS = (
    ("forget_probability", "forget_f1", "forget_accuracy"),
    ("retain_probability", "untouched_f1", "retain_f1", "untouched_accuracy", "retain_accuracy"),
)
_WEIGHTS = ("*.safetensors", "adapter_config.json")


def weights(name: str, revision: str | None = None) -> str:
    """SHA-256 over the names and bytes of a model's weight files; of a hub model those in the local cache.

    Raises:
        InputRefused: No weights in safetensors there.
    """
    folder = Path(evaluation.weights(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_WEIGHTS)))
        except Exception:
            raise InputRefused(f"{name}: no model folder, and the hub does not give it: check the name") from None
    found = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in found):
        raise InputRefused(f"{name}: holds no weights in safetensors: give the folder of a model")
    lines = "".join(f"{path.name} {files.sha256(path)}\n" for path in found)
    return hashlib.sha256(lines.encode()).hexdigest()


def judged(folder: Path, verify: Verifier | None) -> dict[str, Any]:
    """Verify a run folder: the outcome, and the hash of the verdict that was written."""
    if verify is None:
        import excise

        verify = excise.verify
    found = verify(folder)
    written = folder / VERDICT
    outcome = json.loads(written.read_bytes())["outcome"] if written.is_file() else getattr(found, "outcome", found)
    return {"outcome": str(outcome), **({"sha256": files.sha256(written)} if written.is_file() else {})}


def numbers(folder: Path) -> dict[str, float | None]:
    """The few numbers of the model that a run folder is about."""
    results = artifacts.read_results(artifacts.RunFolder(folder))
    models = results.unlearned()
    own = results.models[models[0]] if models else {}
    chosen = [next((name for name in names if name in own), None) for names in NUMBERS]
    return {name: own[name].value for name in chosen if name}


def of_run(folder: Path, shown: str) -> dict[str, Any]:
    """The hashes of a run folder, and the fingerprints of its rows: of the forgotten ones only how many there were.

    A plain hash of few short rows can be guessed at; what the request named is in the ledger under its secret.
    """
    run = artifacts.RunFolder(folder)
    data: Mapping[str, Any] = artifacts.read_manifest(run).get("data", {})
    sides = {side: dict(own) for side, own in data.items()}
    if "forget" in sides:
        sides["forget"].pop("fingerprint", None)
    return {
        "run": shown, "manifest": files.sha256(run.manifest), "recipe": files.sha256(run.recipe), "data": sides,
    }  # fmt: skip


def recipe_hash(settings: recipe.Recipe) -> str:
    """SHA-256 of a recipe with every default filled in, as a run folder has it."""
    return hashlib.sha256(recipe.dump(settings).encode()).hexdigest()


def shown(path: Path, folder: Path) -> str:
    """A path for the record: below the ledger's folder as seen from there, elsewhere whole."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def place(name: str, folder: Path) -> str:
    """Where a recorded model lies: the inverse of `shown`; a hub id stays what it is."""
    return str(folder / name) if (folder / name).exists() else name
