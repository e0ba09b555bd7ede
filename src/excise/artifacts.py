"""The run folder: where each file lies, and how its JSON is written and read again.

Everything here is plain JSON and paths: no torch, no model. ``run`` writes a folder with these functions and
``report`` reads it with them, so the layout is known in one place. Numbers that are not finite are written as
``null``: they read "not shown" later, never 0.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from excise.errors import InputRefused, UsageError
from excise.files import sha256, write_json, write_text

FORMAT = 1
ORIGINAL = "original"
GOLD = "gold"
UNLEARNED = "unlearned"

#: Distributions whose version changes numbers; absent ones are left out of the record.
PACKAGES = (
    "excise", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
    "numpy", "scipy", "scikit-learn", "rouge-score", "matplotlib",
)  # fmt: skip

#: Files that are no part of the record of a run: the record itself, what is rebuilt from it, and scratch.
_NOT_RECORDED = ("manifest.json", "report.html")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


class Term(TypedDict, total=False):
    """One term of the objective, as the manifest names it."""

    name: str
    weight: Any
    citation: str


class Manifest(TypedDict, total=False):
    """``manifest.json``: what was run, on what, with which versions, and the hash of every file."""

    format: int
    status: str  # running | done | stopped
    command: str
    seed: int
    versions: dict[str, str]
    precision: str
    model: dict[str, str]  # name, sha256
    data: dict[str, dict[str, Any]]  # side -> rows, fingerprint
    terms: list[Term]
    warnings: list[str]
    files: dict[str, str]  # path relative to the run folder -> sha256


@dataclass(frozen=True)
class Number:
    """A metric of one model with its interval; ``value`` is None where the data cannot show it.

    ``extra`` holds what else stands beside the four fields in results.json (``parts`` and ``complete`` of a utility).

    Example:
        >>> Number(0.25, low=0.2, high=0.3, n=60).shown
        True
        >>> Number(None).shown
        False
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether there is a value at all."""
        return self.value is not None


@dataclass(frozen=True)
class Results:
    """``results.json``: every number of every model, and the seconds each stage took.

    Example:
        >>> r = Results({"gold": {"forget_probability": Number(0.001, n=60)}})
        >>> r.number("gold", "forget_probability").n, r.number("gold", "privleak").value
        (60, None)
    """

    models: dict[str, dict[str, Number]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def number(self, model: str, metric: str) -> Number:
        """The number, or an empty one ("not shown") where the folder has none."""
        return self.models.get(model, {}).get(metric, Number(None))

    def unlearned(self) -> list[str]:
        """Names of the models that are neither the original nor the gold, the main one first."""
        names = [name for name in self.models if name not in (ORIGINAL, GOLD)]
        return sorted(names, key=lambda name: name != UNLEARNED)


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
    def tables(self) -> Path:
        """Saved scores, one file per model and side."""
        return self.root / "tables"

    @property
    def model(self) -> Path:
        """The final weights."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        """States to resume from."""
        return self.root / "checkpoints"

    @property
    def examples(self) -> Path:
        """Texts of records and answers: personal data, only there when asked for."""
        return self.root / "examples.json"

    @property
    def report(self) -> Path:
        """The page that people read."""
        return self.root / "report.html"

    def table(self, model: str, side: str) -> Path:
        """Where the scores of ``model`` on ``side`` lie; raises `UsageError` for a name that is no file name."""
        return self.tables / safe_name(model) / f"{safe_name(side)}.safetensors"


def safe_name(name: str) -> str:
    """``name`` if it can name a file on every system, else `UsageError`.

    Example:
        >>> safe_name("without_clreg")
        'without_clreg'
    """
    if not _SAFE_NAME.fullmatch(name) or len(name) > 100:
        raise UsageError("a model or side name must be 1-100 letters, digits, '_', '-' or '.', starting with a letter or digit")
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


# ---------------------------------------------------------------------------------------------------- writing


def write_manifest(run: RunFolder, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` whole, with the format number."""
    write_json(run.manifest, finite({"format": FORMAT, **manifest}))


def write_results(run: RunFolder, results: Results) -> None:
    """Write ``results.json`` whole; values that are not finite become null."""
    models = {m: {k: _entry(v) for k, v in numbers.items()} for m, numbers in results.models.items()}
    write_json(run.results, finite({"format": FORMAT, "models": models, "seconds": results.seconds}))


def write_pictures(run: RunFolder, pictures: Mapping[str, Any]) -> None:
    """Write ``pictures.json`` whole: relearning, entanglement by layer, map, findings, what was not tested."""
    write_json(run.pictures, finite(dict(pictures)))


def append_log(run: RunFolder, row: Mapping[str, Any]) -> None:
    """Add one step to ``log.jsonl``; a kill in the middle costs this line at most, and `read_log` copes with it."""
    line = json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False)
    with open(run.log, "a+b") as handle:  # bytes: the same file on every system
        handle.seek(0, os.SEEK_END)
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":  # a line torn by a kill must not swallow this one
                handle.write(b"\n")
        handle.write(line.encode() + b"\n")


def cut_log(run: RunFolder, after_step: int) -> None:
    """Drop logged steps later than ``after_step``: what a resumed run is about to do again."""
    if not run.log.is_file():
        return
    rows = [row for row in read_log(run) if row["step"] <= after_step]
    write_text(run.log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def changed_files(run: RunFolder, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """Recorded files that are missing or no longer have their recorded hash, by relative path.

    ``names`` limits the check (hashing a large model takes a while); names without a record are not judged.
    """
    recorded = manifest.get("files") or {}
    wanted = recorded if names is None else [name for name in names if name in recorded]
    return sorted(
        name for name in wanted if not (run.root / name).is_file() or sha256(run.root / name) != recorded[name]
    )


# ---------------------------------------------------------------------------------------------------- reading


def read_manifest(run: RunFolder) -> Manifest:
    """Read ``manifest.json``; raises `InputRefused` for another format or broken JSON."""
    content = _read_object(run.manifest)
    _check_format(run.manifest, content)
    return Manifest(**content)  # type: ignore[typeddict-item]


def read_results(run: RunFolder) -> Results:
    """Read ``results.json``; an absent file is an empty result (a run that was stopped before evaluation)."""
    if not run.results.is_file():
        return Results()
    content = _read_object(run.results)
    _check_format(run.results, content)
    models: dict[str, dict[str, Number]] = {}
    for model, numbers in _mapping(run.results, "models", content.get("models", {})).items():
        rows = _mapping(run.results, f"models.{model}", numbers)
        models[model] = {metric: _number(run.results, model, metric, row) for metric, row in rows.items()}
    seconds = _mapping(run.results, "seconds", content.get("seconds", {}))
    return Results(models, {k: float(v) for k, v in seconds.items() if isinstance(v, int | float)})


def read_pictures(run: RunFolder) -> dict[str, Any]:
    """Read ``pictures.json``; an absent file is an empty object."""
    return _read_object(run.pictures) if run.pictures.is_file() else {}


def read_examples(run: RunFolder) -> Any | None:
    """Read ``examples.json`` where the run was told to keep texts, else None."""
    return _load(run.examples) if run.examples.is_file() else None


def read_recipe(run: RunFolder) -> str:
    """The resolved recipe as text, empty where there is none."""
    try:
        return run.recipe.read_text("utf-8") if run.recipe.is_file() else ""
    except UnicodeDecodeError:
        raise InputRefused(f"{run.recipe.as_posix()}: not UTF-8 text: restore the file from the run") from None


def read_log(run: RunFolder) -> list[dict[str, Any]]:
    """The logged steps in order of step.

    The last line may be torn (the run was killed while writing it) and is then left out; a step logged twice (by a
    resumed run) counts once, the later line holds.
    """
    if not run.log.is_file():
        return []
    lines = run.log.read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
            rows[int(row["step"])] = row
        except (UnicodeDecodeError, ValueError, KeyError, TypeError):
            if any(rest.strip() for rest in lines[number:]) and not _torn(lines, number):
                raise InputRefused(f"{run.log.as_posix()}:{number}: no log line with a 'step': remove the line") from None
    return [rows[step] for step in sorted(rows)]


def _torn(lines: list[bytes], number: int) -> bool:
    """Whether line ``number`` (from 1) is the beginning of an object, cut off by a kill before a resume."""
    line = lines[number - 1].strip()
    return line.startswith(b"{") and not line.endswith(b"}")


# ---------------------------------------------------------------------------------------------------- record


def environment() -> dict[str, str]:
    """What the numbers were made with: versions of Python, the system and the packages that matter.

    Nothing here asks git, the network or a package's code: only installed metadata, so it is fast and cannot fail.

    Example:
        >>> sorted(environment())[:2]  # doctest: +SKIP
        ['accelerate', 'cpus']
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


def finite(value: Any) -> Any:
    """``value`` with numbers that are not finite replaced by None and numpy scalars and arrays by plain ones.

    Example:
        >>> finite({"a": float("nan"), "b": [1, float("inf")], "c": (0.5, "x")})
        {'a': None, 'b': [1, None], 'c': [0.5, 'x']}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _entry(value: Number) -> dict[str, Any]:
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n, **value.extra}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=lambda _: None)
    except UnicodeDecodeError:
        raise InputRefused(f"{path.as_posix()}: not UTF-8 text: restore the file from the run") from None
    except json.JSONDecodeError as error:
        raise InputRefused(f"{path.as_posix()}:{error.lineno}: not JSON: restore the file from the run") from None


def _read_object(path: Path) -> dict[str, Any]:
    content = _load(path)
    if not isinstance(content, dict):
        raise InputRefused(f"{path.as_posix()}: not a JSON object: restore the file from the run")
    return content


def _check_format(path: Path, content: Mapping[str, Any]) -> None:
    found = content.get("format")
    if found != FORMAT:
        shown = found if isinstance(found, int) else "missing"
        raise InputRefused(f"{path.as_posix()}: field 'format' is {shown}, this version reads {FORMAT}: use the excise that wrote it")


def _mapping(path: Path, name: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputRefused(f"{path.as_posix()}: field '{name}' is no object: restore the file from the run")
    return content


def _number(path: Path, model: str, metric: str, content: Any) -> Number:
    row = _mapping(path, f"models.{model}.{metric}", content)
    parts: dict[str, float | None] = {}
    for key in ("value", "low", "high", "n"):
        part = row.get(key)
        if part is not None and (isinstance(part, bool) or not isinstance(part, int | float)):
            raise InputRefused(f"{path.as_posix()}: field 'models.{model}.{metric}.{key}' is no number: restore the file from the run")
        parts[key] = part if part is None or math.isfinite(part) else None
    n = parts["n"]
    extra = {key: value for key, value in row.items() if key not in parts}
    return Number(parts["value"], parts["low"], parts["high"], None if n is None else int(n), extra)
