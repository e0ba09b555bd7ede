"""Statistics, bases and factors on disk: safetensors with hashes, and what they were made from, which a reader checks.

A folder holds one ``.safetensors`` file, ``made_from.json`` and ``COMPLETE.json`` (`excise.files`). It is used again
only for the model, rows and settings that it was made from: anything else is refused, never guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excise import files
from excise.errors import IntegrityFailed
from excise.initialise.moments import Moments
from excise.initialise.starts import Factors, Variances

#: A statistic of one layer: of its outputs, squared gradients of its weight, or variances of its adapter's gradients.
Value = Moments | Tensor | Variances

_WORDS = {
    "model": "another model", "forget": "other forget rows", "retain": "other retain rows",
    "targets": "other target layers", "options": "other settings", "format": "another version of excise",
}  # fmt: skip


@dataclass(frozen=True)
class MadeFrom:
    """What a file was made from.

    Attributes:
        model: `fingerprint` of the base weights.
        rows: Side -> fingerprint of its token sequences.
        targets: Names of the layers.
        options: Settings that decide the content.
    """

    model: str
    rows: Mapping[str, str]
    targets: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON reads it back."""
        values = {
            "format": 1, "model": self.model, **self.rows, "targets": list(self.targets), "options": self.options,
        }  # fmt: skip
        return json.loads(json.dumps(values, sort_keys=True))

    @property
    def key(self) -> str:
        """A name for a folder."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base weights of a model, by name; the same with an adapter on it and without.

    Example:
        >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted((_bare(n), v) for n, v in model.state_dict().items() if not _of_adapter(n)):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in name.split("."))


def _bare(name: str) -> str:
    """The name of a weight in the model without its adapter."""
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def fingerprint_of_rows(rows: Sequence[Any]) -> str:
    """SHA-256 over rows of numbers (token ids and where their labels stand), in order.

    Example:
        >>> fingerprint_of_rows([((1, 2), 1)])[:8]
        'ae4ccbcb'
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


# --- folders ------------------------------------------------------------------------------------------------------


def write(
    folder: Path, name: str, tensors: Mapping[str, Tensor], made: MadeFrom, found: Mapping[str, Any] | None = None
) -> None:
    """Write tensors whole, with what they were made from and what else was ``found`` on the way."""
    from safetensors.torch import save_file

    with files.staged(folder) as aside:
        # Tensors may share memory or be views: safetensors wants them by themselves.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, aside / f"{name}.safetensors")
        (aside / "made_from.json").write_text(json.dumps({**made.plain(), "found": dict(found or {})}, indent=1))


def read(folder: Path, name: str, made: MadeFrom) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote, if it was made from the same.

    Raises:
        IntegrityFailed: A file is missing or changed, or it is of another model, other rows or other settings.
    """
    from safetensors.torch import load_file

    files.verify(folder)
    try:
        recorded = json.loads((folder / "made_from.json").read_text())
        found = recorded.pop("found")
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, ValueError, KeyError, AttributeError):
        raise IntegrityFailed(f"{folder}: not the {name} of a run: remove the folder") from None
    wanted = made.plain()
    for key in dict.fromkeys([*wanted, *recorded]):
        if recorded.get(key) != wanted.get(key):
            raise IntegrityFailed(
                f"{folder}: the {name} there were made from {_WORDS.get(key, key)}: use the same as then, or "
                "remove the folder"
            )
    return tensors, found


# --- content ------------------------------------------------------------------------------------------------------


def of_factors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as named tensors."""
    return {f"{which}/{name}": value for name, own in factors.items() for which, value in (("A", own.A), ("B", own.B))}


def to_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors among named tensors."""
    names = [key.removeprefix("A/") for key in tensors if key.startswith("A/")]
    return {name: Factors(tensors[f"A/{name}"], tensors[f"B/{name}"]) for name in names}


def of_statistic(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """One statistic of several layers as named tensors."""
    out: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            parts: dict[str, Tensor | None] = {"value": value}
        elif isinstance(value, Variances):
            parts = {"A": value.A, "B": value.B}
        else:
            parts = {
                "count": torch.tensor(value.count, dtype=torch.float64), "total": value.total, "second": value.second,
                "rows": value.rows, "weights": value.weights,
            }  # fmt: skip
        out |= {f"{part}/{name}": tensor for part, tensor in parts.items() if tensor is not None}
    return out


def to_statistic(tensors: Mapping[str, Tensor]) -> dict[str, Value]:
    """What `of_statistic` named."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        layers.setdefault(name, {})[part] = tensor
    return {name: _value(parts) for name, parts in layers.items()}


def _value(parts: Mapping[str, Tensor]) -> Value:
    if "value" in parts:
        return parts["value"]
    if "A" in parts:
        return Variances(parts["A"], parts["B"])
    return Moments(float(parts["count"]), parts["total"], parts.get("second"), parts.get("rows"), parts.get("weights"))
