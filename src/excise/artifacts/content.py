"""What stands in the JSON files of a run folder: written whole, read with checks.

Numbers that are not finite are written as ``null``: they read "not shown" later, never 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from excise.artifacts.folder import RunFolder
from excise.errors import InputRefused
from excise.files import write_json, write_text

FORMAT = 1
ORIGINAL = "original"
GOLD = "gold"
UNLEARNED = "unlearned"


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
    stopping: dict[str, Any]  # checks of the stopping rule, and the step whose weights were kept (None: none)
    verify: dict[str, Any]  # sha256 of the thresholds, written before the first step
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

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Number:
        """A number from an object of results.json's shape; what is beside the four fields goes to ``extra``.

        Example:
            >>> Number.of({"value": 0.5, "n": 9, "parts": 4}).extra
            {'parts': 4}
        """
        extra = {key: value for key, value in entry.items() if key not in ("value", "low", "high", "n")}
        return cls(entry.get("value"), entry.get("low"), entry.get("high"), entry.get("n"), extra)


@dataclass(frozen=True)
class Results:
    """``results.json``: every number of every model, the seconds each stage took, and the models' task.

    Example:
        >>> r = Results({"gold": {"forget_probability": Number(0.001, n=60)}})
        >>> r.number("gold", "forget_probability").n, r.number("gold", "privleak").value
        (60, None)
    """

    models: dict[str, dict[str, Number]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    task: str = "causal_lm"

    def number(self, model: str, metric: str) -> Number:
        """The number, or an empty one ("not shown") where the folder has none."""
        return self.models.get(model, {}).get(metric, Number(None))

    def unlearned(self) -> list[str]:
        """Names of the models that are neither the original nor the gold, the main one first."""
        names = [name for name in self.models if name not in (ORIGINAL, GOLD)]
        return sorted(names, key=lambda name: name != UNLEARNED)


def write_manifest(run: RunFolder, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` whole, with the format number."""
    write_json(run.manifest, finite({"format": FORMAT, **manifest}))


def write_results(run: RunFolder, results: Results) -> None:
    """Write ``results.json`` whole; values that are not finite become null."""
    models = {m: {k: _entry(v) for k, v in numbers.items()} for m, numbers in results.models.items()}
    shares = shares_of_time(results.seconds, results.models)
    content = {
        "format": FORMAT, "task": results.task, "models": models, "seconds": results.seconds, "shares": shares,
    }  # fmt: skip
    write_json(run.results, finite(content))


def shares_of_time(seconds: Mapping[str, float], models: Iterable[str]) -> dict[str, float]:
    """Each instrument's share of the time, over all models, the largest first.

    Args:
        seconds: By stage; ``generate gold`` is instrument ``generate`` and model ``gold``.
        models: Names of the models.

    Example:
        >>> shares_of_time({"generate gold": 2.0, "generate original": 1.0, "judge": 1.0}, ["gold", "original"])
        {'generate': 0.75, 'judge': 0.25}
    """
    names, spent = set(models), dict[str, float]()
    for stage, taken in seconds.items():
        head, _, last = stage.rpartition(" ")
        instrument = head if last in names and head else stage
        spent[instrument] = spent.get(instrument, 0.0) + taken
    total = sum(spent.values())
    return {k: v / total for k, v in sorted(spent.items(), key=lambda item: -item[1])} if total > 0 else {}


def write_pictures(run: RunFolder, pictures: Mapping[str, Any]) -> None:
    """Write ``pictures.json`` whole: relearning, entanglement by layer, map, findings, what was not tested."""
    write_json(run.pictures, finite(dict(pictures)))


def write_examples(run: RunFolder, examples: Sequence[Mapping[str, Any]]) -> None:
    """Write ``examples.json`` whole. It holds personal data: only for runs that were told to keep texts.

    Args:
        run: The folder.
        examples: One object an example; values are texts, or objects of texts (an answer by each model).
    """
    write_json(run.examples, finite(list(examples)))


def write_verdict(run: RunFolder, verdict: Mapping[str, Any]) -> None:
    """Write ``verdict.json`` whole."""
    write_json(run.verdict, finite(dict(verdict)))


def read_verdict(run: RunFolder) -> dict[str, Any] | None:
    """Read ``verdict.json``; None where nobody has verified the run."""
    return _read_object(run.verdict) if run.verdict.is_file() else None


def read_audit(run: RunFolder) -> dict[str, Any]:
    """Read ``audit.json``; an absent file is an empty object."""
    return _read_object(run.audit) if run.audit.is_file() else {}


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
    task = content.get("task", "causal_lm")
    if not isinstance(task, str):
        raise InputRefused(f"{run.results.as_posix()}: field 'task' is no text: restore the file from the run")
    return Results(models, {k: float(v) for k, v in seconds.items() if isinstance(v, int | float)}, task)


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
                raise InputRefused(
                    f"{run.log.as_posix()}:{number}: no log line with a 'step': remove the line"
                ) from None
    return [rows[step] for step in sorted(rows)]


def _torn(lines: list[bytes], number: int) -> bool:
    """Whether line ``number`` (from 1) is the beginning of an object, cut off by a kill before a resume."""
    line = lines[number - 1].strip()
    return line.startswith(b"{") and not line.endswith(b"}")


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
        raise InputRefused(
            f"{path.as_posix()}: field 'format' is {shown}, this version reads {FORMAT}: use the excise that wrote it"
        )


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
            raise InputRefused(
                f"{path.as_posix()}: field 'models.{model}.{metric}.{key}' is no number: restore the file from the run"
            )
        parts[key] = part if part is None or math.isfinite(part) else None
    n = parts["n"]
    extra = {key: value for key, value in row.items() if key not in parts}
    return Number(parts["value"], parts["low"], parts["high"], None if n is None else int(n), extra)
