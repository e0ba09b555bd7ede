"""Read other people's evaluation logs, and our own run folders, into saved tables: one set of metrics serves all.

TOFU's aggregated log and OpenUnlearning's ``*_EVAL.json`` hold means per sequence, not tokens: metrics that need tokens
are then not shown, except those that the log brings per row (exact memorisation, extraction strength, attack scores).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import InputRefused
from excise.metrics.table import ANSWER, FALSE_ANSWER, PARAPHRASE, Table, check, load

_TOFU_SETS = {
    "eval_log.json": "retain",
    "eval_log_forget.json": "forget",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
_TOFU_LOSSES = {
    "avg_gt_loss": (ANSWER, "num_token_gt"),
    "avg_paraphrased_loss": (PARAPHRASE, "num_token_paraphrased"),
    "average_perturb_loss": (FALSE_ANSWER, "num_token_perturb"),
}
_TOFU_ROUGE = {"rougeL_recall": "rouge_l_recall", "rouge1_recall": "rouge1_recall"}
_OU_SIDES = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
_OU_KINDS = {"Q_A_Prob": ANSWER, "Q_A_PARA_Prob": PARAPHRASE, "Q_A_PERT_Prob": FALSE_ANSWER}
_OU_ROUGE = {"rougeL_recall": "rouge_l_recall", "rougeL_f1": "rouge_l_f1", "rouge1_recall": "rouge1_recall"}
_OU_ATTACKS = {
    "mia_loss": "attack_loss",
    "mia_zlib": "attack_zlib",
    "mia_min_k": "attack_min_k",
    "mia_min_k_plus_plus": "attack_min_k_plus_plus",
    "mia_reference": "attack_reference",
    "mia_gradnorm": "attack_gradient_norm",
}

_AGAIN = "export the log again"


def read(path: str | os.PathLike[str], model: str | None = None) -> dict[str, Table]:
    """Read whatever is at ``path``: a TOFU or OpenUnlearning log, one table, a folder of tables, or a run folder.

    Args:
        path: file or folder.
        model: which model of a run folder ("original", "gold", ...); not needed where there is only one.

    Returns:
        side -> table.

    Raises:
        InputRefused: in one line, without quoting content, when it is none of these or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return read_run(path, model)
    if path.suffix == ".safetensors":
        table = load(path)
        return {table.side: table}
    log = _json(path)
    if _TOFU_SETS.keys() & log.keys():
        return read_tofu_log(path, log)
    if any(_is_ou_entry(entry) for entry in log.values()):
        return read_open_unlearning(path, log)
    raise InputRefused(
        f"{path}: no values per row: give TOFU's eval_log_aggregated.json, OpenUnlearning's *_EVAL.json "
        "(not *_SUMMARY.json) or a run folder"
    )


def read_run(path: str | os.PathLike[str], model: str | None = None) -> dict[str, Table]:
    """Read the tables of one model of a run folder, or of a folder that holds the tables themselves."""
    path = Path(path)
    folder = path
    if (path / "tables").is_dir():
        models = sorted(p.name for p in (path / "tables").iterdir() if p.is_dir())
        if model is None and len(models) == 1:
            model = models[0]
        if model not in models:
            raise InputRefused(f"{path}: say which model's tables to read: {', '.join(models) or 'there are none'}")
        folder = path / "tables" / str(model)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        table = load(file)
        if table.side != file.stem:
            raise InputRefused(f"{file}: holds the side {table.side!r}: do not rename tables")
        found[table.side] = table
    if not found:
        raise InputRefused(f"{folder}: no tables: evaluate the model first")
    return found


def read_tofu_log(path: str | os.PathLike[str], log: Mapping[str, Any] | None = None) -> dict[str, Table]:
    """Read TOFU's ``eval_log_aggregated.json``: losses per sequence, token counts and ROUGE recall."""
    path, log = Path(path), log if log is not None else _json(Path(path))
    tables = {}
    for key, side in _TOFU_SETS.items():
        if key not in log:
            continue
        rows = _Rows(path, side)
        for name, (kind, count) in _TOFU_LOSSES.items():
            # On these two sets the "paraphrase" is the answer itself, which the metrics read anyway.
            if kind == PARAPHRASE and side in ("real_authors", "world_facts"):
                continue
            losses = _mapping(path, key, log[key], name)
            rows.sequences(name, kind, losses, log[key].get(count))
        for name, column in _TOFU_ROUGE.items():
            if name in log[key]:
                rows.per_row(name, column, _mapping(path, key, log[key], name))
        tables[side] = rows.table()
    return tables


def read_open_unlearning(path: str | os.PathLike[str], log: Mapping[str, Any] | None = None) -> dict[str, Table]:
    """Read OpenUnlearning's per-metric log, ``{metric: {"agg_value", "value_by_index": {row: {...}}}}``."""
    path, log = Path(path), log if log is not None else _json(Path(path))
    sides: dict[str, _Rows] = {}

    def rows(side: str) -> _Rows:
        return sides.setdefault(side, _Rows(path, side))

    for metric, entry in log.items():
        prefix, _, rest = metric.partition("_")
        side = _OU_SIDES.get(prefix)
        if side and rest in _OU_KINDS and _is_ou_entry(entry):
            rows(side).sequences(metric, _OU_KINDS[rest], _field(path, metric, entry, "avg_loss"))
        elif side and rest == "Q_A_ROUGE" and _is_ou_entry(entry):
            for name, column in _OU_ROUGE.items():
                rows(side).per_row(metric, column, _field(path, metric, entry, name, optional=True))
        elif metric in ("exact_memorization", "extraction_strength") and _is_ou_entry(entry):
            rows("forget").per_row(metric, metric, _field(path, metric, entry, "score"))
        elif metric in _OU_ATTACKS and isinstance(entry, dict):
            for key, target in (("forget", "forget"), ("holdout", "never_seen")):
                if _is_ou_entry(entry.get(key)):
                    rows(target).per_row(metric, _OU_ATTACKS[metric], _field(path, metric, entry[key], "score"))
    if not sides:
        raise InputRefused(f"{path}: none of its metrics holds values that can be used: give a TOFU_EVAL.json")
    return {side: r.table() for side, r in sides.items()}


class _Rows:
    """Gathers a foreign log's values by its own row keys, and numbers the rows when all keys are known."""

    def __init__(self, path: Path, side: str) -> None:
        self.path, self.side = path, side
        self.keys: set[int] = set()
        self.found: list[tuple[int, int, float, float]] = []  # key, kind, mean NLL, tokens
        self.columns: dict[str, dict[int, float]] = {}

    def sequences(self, name: str, kind: int, losses: Mapping[str, Any], counts: Any = None) -> None:
        for key, value in losses.items():
            k = self._key(name, key)
            values = value if isinstance(value, list) else [value]
            tokens = counts.get(key) if isinstance(counts, dict) else None
            tokens = tokens if isinstance(tokens, list) else [tokens] * len(values)
            if len(tokens) != len(values):
                raise InputRefused(f"{self.path}: field {name!r} and its token counts disagree in row {k}: {_AGAIN}")
            for v, t in zip(values, tokens, strict=True):
                self.found.append((k, kind, self._number(name, v), np.nan if t is None else self._number(name, t)))

    def per_row(self, name: str, column: str, values: Mapping[str, Any]) -> None:
        if values:
            target = self.columns.setdefault(column, {})
            for key, value in values.items():
                number = np.nan if value is None else np.mean([self._number(name, v) for v in _listed(value)])
                target[self._key(name, key)] = float(number)

    def table(self) -> Table:
        places = {key: i for i, key in enumerate(sorted(self.keys))}
        columns: dict[str, NDArray] = {
            "row": np.array([places[f[0]] for f in self.found], np.int32),
            "kind": np.array([f[1] for f in self.found], np.int8),
            "mean_nll": np.array([f[2] for f in self.found], np.float64),
        }
        tokens = np.array([f[3] for f in self.found], np.float64)
        if len(tokens) and not np.isnan(tokens).any():
            columns["tokens"] = tokens.astype(np.int32)
        for name, values in self.columns.items():
            columns[name] = np.array([values.get(key, np.nan) for key in places])
        return check(Table(self.side, len(places), columns), str(self.path))

    def _key(self, name: str, key: str) -> int:
        if not key.isdigit():
            raise InputRefused(f"{self.path}: field {name!r} has a row key that is not a number: {_AGAIN}")
        self.keys.add(int(key))
        return int(key)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputRefused(f"{self.path}: field {name!r} holds something that is not a finite number: {_AGAIN}")
        return float(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _is_ou_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("value_by_index"), dict)


def _field(path: Path, metric: str, entry: Mapping[str, Any], name: str, *, optional: bool = False) -> dict[str, Any]:
    values = {k: v[name] for k, v in entry["value_by_index"].items() if isinstance(v, dict) and name in v}
    if not values and not optional:
        raise InputRefused(f"{path}: metric {metric!r} has no {name!r} per row: evaluate again with values per index")
    return values


def _mapping(path: Path, key: str, log: Any, name: str) -> Mapping[str, Any]:
    values = log.get(name) if isinstance(log, dict) else None
    if not isinstance(values, dict):
        raise InputRefused(f"{path}: field {name!r} of {key!r} is missing or not a mapping of rows: {_AGAIN}")
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        log = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputRefused(f"{path}:{error.lineno}: not valid JSON: copy the file again") from None
    except (OSError, UnicodeDecodeError, RecursionError):
        raise InputRefused(f"{path}: not a readable JSON file: copy the file again") from None
    if not isinstance(log, dict):
        raise InputRefused(f"{path}: not an object of metrics: give an evaluation log")
    return log
