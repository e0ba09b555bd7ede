"""The saved scores of one model on one side: what every number in a report is computed from, without the model.

A table holds no text and no token ids, only scores: sequences (the answer, its paraphrases, false answers) belong to
rows, tokens belong to sequences through ``offsets``. Foreign logs that know no tokens give ``mean_nll`` and ``tokens``
instead. Of a classifier the labels stand in the place of tokens, with the class of each and the class that the model
gives; the names of the classes are those in the model's own config.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.errors import InputRefused

FORMAT = "1"
ANSWER, PARAPHRASE, FALSE_ANSWER = 0, 1, 2
#: Prefix of columns that hold each row's mean log p as the head reads it from an inner layer: ``lens_1``, ``lens_2``.
LENS = "lens_"

# name -> (what one entry stands for, stored type)
COLUMNS: dict[str, tuple[str, str]] = {
    "row": ("sequence", "int32"),
    "kind": ("sequence", "int8"),
    "zlib": ("sequence", "int32"),
    "eos": ("sequence", "bool"),
    "mean_nll": ("sequence", "float64"),
    "tokens": ("sequence", "int32"),
    "offsets": ("boundary", "int64"),
    "logp": ("token", "float32"),
    "hit": ("token", "bool"),
    "mu": ("token", "float32"),
    "sigma": ("token", "float32"),
    "gold_class": ("token", "int16"),
    "predicted_class": ("token", "int16"),
    "rouge_l_recall": ("row", "float32"),
    "rouge_l_f1": ("row", "float32"),
    "rouge1_recall": ("row", "float32"),
    "repetition": ("row", "float32"),
    "rouge_l_f1_unstemmed": ("row", "float32"),  # of MUSE's tables
    "shortened": ("row", "bool"),  # the prompt was cut to the model's context
    "fluency": ("row", "float32"),
    "group": ("row", "int32"),
    # attack_*: higher = less like a member. All but the gradient norm come from foreign logs, which hold no tokens.
    "exact_memorization": ("row", "float32"),
    "extraction_strength": ("row", "float32"),
    "attack_loss": ("row", "float64"),
    "attack_zlib": ("row", "float64"),
    "attack_min_k": ("row", "float64"),
    "attack_min_k_plus_plus": ("row", "float64"),
    "attack_reference": ("row", "float64"),
    "attack_gradient_norm": ("row", "float64"),
}


def column(name: str) -> tuple[str, str] | None:
    """What one entry of a column stands for, and its stored type; None for an unknown name.

    Example:
        >>> column("logp"), column("lens_12"), column("lens_x")
        (('token', 'float32'), ('row', 'float32'), None)
    """
    if name.startswith(LENS) and name.removeprefix(LENS).isdecimal():
        return "row", "float32"
    return COLUMNS.get(name)


@dataclass(frozen=True)
class Table:
    """Scores of one side by one model.

    Args:
        side: name of the row set: forget, retain, untouched, never_seen, or a utility set.
        rows: how many rows the side has, including rows without any sequence.
        columns: name -> array, see ``COLUMNS``. Required: ``row`` and ``kind``, and either ``offsets``, ``logp`` and
            ``eos`` or ``mean_nll``. Natural-log probabilities; NaN is allowed only in columns per row and means "not
            measured".
        classes: a classifier's classes, by number; ``gold_class`` and ``predicted_class`` count in them.

    Example:
        >>> import numpy as np
        >>> t = Table("forget", 1, {"row": np.zeros(1, np.int32), "kind": np.zeros(1, np.int8), "eos": np.ones(1, bool),
        ...     "offsets": np.array([0, 2]), "logp": np.log(np.array([0.5, 0.5], np.float32))})
        >>> t.sequences, t.lengths.tolist()
        (1, [2])
    """

    side: str
    rows: int
    columns: dict[str, NDArray] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.columns["row"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[S]`` label tokens of each sequence, the end-of-sequence token included."""
        return np.diff(self.columns["offsets"]).astype(np.int64)

    def has(self, *names: str) -> bool:
        """Whether all the named columns are there."""
        return all(name in self.columns for name in names)


def check(table: Table, where: str = "") -> Table:
    """Return the table with the stored types, or refuse it.

    Args:
        table: what a sweep or a reader built.
        where: file name for the error line.

    Raises:
        InputRefused: unknown or missing columns, lengths that disagree, indices outside the side, non-finite scores.

    Example:
        >>> import numpy as np
        >>> check(Table("forget", 0, {"row": np.zeros(0), "kind": np.zeros(0), "mean_nll": np.zeros(0)})).sequences
        0
    """
    place = f"{where or table.side + ' table'}: "
    columns = {}
    for name, values in table.columns.items():
        known = column(name)
        if known is None:
            raise InputRefused(f"{place}column {name!r} is unknown: was the table written by a newer version?")
        columns[name] = np.asarray(values).astype(known[1], copy=False)
        if columns[name].ndim != 1:
            raise InputRefused(f"{place}column {name!r} has {columns[name].ndim} dimensions: give one")
    missing = [c for c in ("row", "kind") if c not in columns]
    if "mean_nll" not in columns:
        missing += [c for c in ("offsets", "logp", "eos") if c not in columns]
    if missing:
        raise InputRefused(f"{place}column {missing[0]!r} is missing: measure the model again")
    _check_sizes(columns, table.rows, place)
    _check_values(columns, table.rows, place)
    _check_classes(columns, len(table.classes), place)
    return Table(table.side, table.rows, columns, tuple(table.classes))


def _check_sizes(columns: dict[str, NDArray], rows: int, place: str) -> None:
    sequences = len(columns["row"])
    sizes = {"sequence": sequences, "row": rows, "boundary": sequences + 1}
    if "offsets" in columns:
        offsets = columns["offsets"]
        if len(offsets) != sequences + 1 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
            raise InputRefused(f"{place}column 'offsets' does not cut tokens into {sequences} sequences: measure again")
        sizes["token"] = int(offsets[-1])
    for name, values in columns.items():
        expected = sizes.get((column(name) or ("",))[0], -1)
        if len(values) != expected:
            raise InputRefused(f"{place}column {name!r} has {len(values)} entries, not {expected}: measure again")


def _check_values(columns: dict[str, NDArray], rows: int, place: str) -> None:
    row, kind = columns["row"], columns["kind"]
    if len(row) and (row.min() < 0 or row.max() >= rows):
        raise InputRefused(f"{place}column 'row' points outside the {rows} rows: measure again")
    if len(kind) and (kind.min() < ANSWER or kind.max() > FALSE_ANSWER):
        raise InputRefused(f"{place}column 'kind' holds a value other than 0, 1, 2: measure again")
    for name in ("logp", "mean_nll", "mu", "sigma"):
        # A NaN here is a broken model, and a mean would hide it among rows that were not measured.
        if name in columns and not np.isfinite(columns[name]).all():
            raise InputRefused(f"{place}column {name!r} holds a value that is not finite: the model is broken")
    for name in columns:
        if (column(name) or ("",))[0] == "row" and np.isinf(columns[name]).any():
            raise InputRefused(f"{place}column {name!r} holds an infinite value: measure again")


def _check_classes(columns: dict[str, NDArray], number: int, place: str) -> None:
    for name in ("gold_class", "predicted_class"):
        values = columns.get(name)
        if (values is None) != (number == 0):
            raise InputRefused(f"{place}column {name!r} and the names of the classes belong together: measure again")
        if values is not None and len(values) and (values.min() < 0 or values.max() >= number):
            raise InputRefused(f"{place}column {name!r} names none of the {number} classes: measure again")


def save(table: Table, path: str | os.PathLike[str]) -> None:
    """Write a checked table as safetensors, replacing the file in one step.

    Example:
        >>> import tempfile, numpy as np
        >>> t = Table("forget", 1, {"row": np.array([0]), "kind": np.array([0]), "mean_nll": np.array([0.5])})
        >>> with tempfile.TemporaryDirectory() as d:
        ...     save(t, d + "/forget.safetensors"); load(d + "/forget.safetensors").rows
        1
    """
    path = Path(path)
    columns = {name: np.ascontiguousarray(values) for name, values in check(table).columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    named = {"classes": json.dumps(table.classes)} if table.classes else {}
    save_file(columns, staged, metadata={"format": FORMAT, "side": table.side, "rows": str(table.rows), **named})
    os.replace(staged, path)


def load(path: str | os.PathLike[str]) -> Table:
    """Read a table and check it.

    Raises:
        InputRefused: the file is absent, damaged, of another format, or its columns contradict each other.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as f:
            meta = f.metadata() or {}
            columns = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such table: evaluate the model first") from None
    except (SafetensorError, OSError):
        raise InputRefused(f"{path}: not a readable safetensors file: copy it again or evaluate again") from None
    if meta.get("format") != FORMAT or "side" not in meta or not meta.get("rows", "").isdigit():
        raise InputRefused(f"{path}: not a table of format {FORMAT}: evaluate again with this version")
    return check(Table(meta["side"], int(meta["rows"]), columns, _names(meta.get("classes"), path)), str(path))


def _names(text: str | None, path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(text) if text else []
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputRefused(f"{path}: the names of its classes cannot be read: evaluate again")
    return tuple(names)
