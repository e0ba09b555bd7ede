"""Where each file of a run folder lies, what it hashes to, and what the numbers were made with."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from excise.errors import InputRefused, UsageError
from excise.files import sha256

#: Distributions whose version changes numbers; absent ones are left out of the record.
PACKAGES = (
    "excise", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
    "numpy", "scipy", "scikit-learn", "rouge-score", "matplotlib",
)  # fmt: skip

#: Files that are no part of the record of a run: the record itself, and what is rebuilt from it.
_NOT_RECORDED = ("manifest.json", "report.html", "verdict.json")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder; nothing is created by naming them.

    Example:
        >>> RunFolder(Path("runs/a")).table("gold", "forget").as_posix()
        'runs/a/tables/gold/forget.safetensors'
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """What was run; its presence makes a folder a run folder."""
        return self.root / "manifest.json"

    @property
    def recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.root / "recipe.yaml"

    @property
    def results(self) -> Path:
        """The numbers."""
        return self.root / "results.json"

    @property
    def log(self) -> Path:
        """One JSON object per logged step."""
        return self.root / "log.jsonl"

    @property
    def pictures(self) -> Path:
        """What the figures of the report are drawn from, and the findings."""
        return self.root / "pictures.json"

    @property
    def geometry(self) -> Path:
        """Where the update of an adapter acts; ``pictures.json`` takes it over."""
        return self.root / "geometry.json"

    @property
    def tables(self) -> Path:
        """Saved scores, one file per model and side."""
        return self.root / "tables"

    @property
    def attacks(self) -> Path:
        """What attacks did, one file per model and attack."""
        return self.root / "attacks"

    @property
    def model(self) -> Path:
        """The final weights."""
        return self.root / "model"

    @property
    def edit(self) -> Path:
        """How much was changed in the weights before training: counts."""
        return self.root / "edit.json"

    @property
    def stopping(self) -> Path:
        """What the stopping rule saw, and while the run goes on the best weights."""
        return self.root / "stopping"

    @property
    def checkpoints(self) -> Path:
        """States to resume from."""
        return self.root / "checkpoints"

    @property
    def parts(self) -> Path:
        """What an unfinished evaluation has measured so far; removed when it is done."""
        return self.root / "parts"

    @property
    def examples(self) -> Path:
        """Texts of records and answers: personal data, only there when asked for."""
        return self.root / "examples.json"

    @property
    def verdict(self) -> Path:
        """What the tests against thresholds fixed before the run came to; built from the rest."""
        return self.root / "verdict.json"

    @property
    def audit(self) -> Path:
        """The lower bounds that canaries gave, where the run was audited."""
        return self.root / "audit.json"

    @property
    def report(self) -> Path:
        """The page that people read."""
        return self.root / "report.html"

    def table(self, model: str, side: str) -> Path:
        """Where the scores of ``model`` on ``side`` lie; raises `UsageError` for a name that is no file name."""
        return self.tables / safe_name(model) / f"{safe_name(side)}.safetensors"

    def attack(self, model: str, name: str) -> Path:
        """Where the outcome of attack ``name`` on ``model`` lies; raises `UsageError` for no file name."""
        return self.attacks / safe_name(model) / f"{safe_name(name)}.safetensors"


def safe_name(name: str) -> str:
    """``name`` if it can name a file on every system, else `UsageError`.

    Example:
        >>> safe_name("without_clreg")
        'without_clreg'
    """
    if not _SAFE_NAME.fullmatch(name) or len(name) > 100:
        raise UsageError(
            "a model or side name must be 1-100 letters, digits, '_', '-' or '.', starting with a letter or digit"
        )
    return name


def open_run(path: str | Path) -> RunFolder:
    """The run folder at ``path``; raises `InputRefused` when there is none.

    Example:
        >>> open_run("no/such/folder")
        Traceback (most recent call last):
        excise.errors.InputRefused: no/such/folder: no manifest.json here: give the folder that a run wrote
    """
    run = RunFolder(Path(path))
    if not run.manifest.is_file():
        raise InputRefused(f"{run.root.as_posix()}: no manifest.json here: give the folder that a run wrote")
    return run


def hash_files(run: RunFolder, *, leave_out: Iterable[str] = ("checkpoints",)) -> dict[str, str]:
    """SHA-256 of every file of the folder by relative path, for the manifest's ``files``.

    Left out: the manifest and the report (both are built from the rest), hidden files, links, and the top-level
    folders named in ``leave_out``.
    """
    skip = set(leave_out)
    found: dict[str, str] = {}
    for path in sorted(run.root.rglob("*")):
        parts = path.relative_to(run.root).parts
        name = "/".join(parts)
        if path.is_symlink() or not path.is_file() or name in _NOT_RECORDED:
            continue
        if parts[0] in skip or any(part.startswith(".") for part in parts):
            continue
        found[name] = sha256(path)
    return found


def changed_files(run: RunFolder, recorded: Mapping[str, str], names: Iterable[str] | None = None) -> list[str]:
    """Files of ``recorded`` (the manifest's ``files``) that are missing or changed, by relative path.

    ``names`` limits the check (hashing a large model takes a while); names without a record are not judged.
    """
    wanted = recorded if names is None else [name for name in names if name in recorded]
    return sorted(
        name for name in wanted if not (run.root / name).is_file() or sha256(run.root / name) != recorded[name]
    )


def environment() -> dict[str, str]:
    """What the numbers were made with: versions of Python, the system and the packages that matter.

    Nothing here asks git, the network or a package's code: only installed metadata, so it is fast and cannot fail.

    Example:
        >>> {"python", "system", "cpus", "torch"} <= set(environment())
        True
    """
    record = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1),
    }
    for package in PACKAGES:
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return record
