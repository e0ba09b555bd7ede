"""Looks for traces of rows in everything that was written: their words, their token ids, and their hidden states."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

#: Cosine from which on two vectors count as one: a state rounded to 16 bits is found too.
SAME = 1 - 1e-4
_TEXT = (".json", ".jsonl", ".yaml", ".html", ".md", ".txt", ".log")


@dataclass(frozen=True)
class Traces:
    """What is looked for.

    Attributes:
        words: In lower case.
        ids: By word its token ids, which stand nowhere else.
        states: ``[n, D]`` hidden states, of length one.
    """

    words: Sequence[str]
    ids: dict[str, Sequence[int]] = field(default_factory=dict)
    states: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 1)))

    def in_text(self, text: str | bytes) -> set[str]:
        """Words that stand in a text or in bytes, in either common encoding."""
        data = (text.encode() if isinstance(text, str) else text).lower()
        return {f"word {w}" for w in self.words if w.encode() in data or w.encode("utf-16-le") in data}

    def in_file(self, path: Path) -> set[str]:
        """Everything that a file gives away: as bytes, unpacked, and as the arrays that it holds."""
        data = path.read_bytes()
        found = set[str]().union(*(self.in_text(part) | self._packed(part) for part in _unpacked(path, data)))
        if path.suffix in _TEXT:
            found |= self._written(data)
        for array in _arrays(path, data):
            found |= self._in_array(array)
        return found

    def below(self, *folders: Path) -> dict[str, set[str]]:
        """File -> what it gives away, its name included; files that give nothing away are left out."""
        out: dict[str, set[str]] = {}
        for root in folders:
            for path in sorted(root.rglob("*")):
                named = {f"{w} (name)" for w in self.in_text(path.relative_to(root).as_posix())}
                found = named | (self.in_file(path) if path.is_file() else set())
                if found:
                    out[str(path)] = found
        return out

    def _packed(self, data: bytes) -> set[str]:
        """Token ids as integers of two, four or eight bytes."""
        return {
            f"ids of {word}" for word, ids in self.ids.items()
            if any(np.array(ids, kind).tobytes() in data for kind in (np.int16, np.int32, np.int64))
        }  # fmt: skip

    def _written(self, data: bytes) -> set[str]:
        """Token ids as decimal numbers, one after the other."""
        between = {word: rb"\D{1,20}".join(str(i).encode() for i in ids) for word, ids in self.ids.items()}
        return {f"ids of {word}" for word, p in between.items() if re.search(rb"(?<!\d)" + p + rb"(?!\d)", data)}

    def _in_array(self, values: NDArray) -> set[str]:
        flat, found = values.reshape(-1), set()
        for word, ids in self.ids.items():
            starts = np.flatnonzero(flat[: max(0, len(flat) - len(ids) + 1)] == ids[0])
            if any(np.array_equal(flat[s : s + len(ids)], ids) for s in starts):
                found.add(f"ids of {word}")
        width = self.states.shape[1]
        turned = [values, values.T] if values.ndim == 2 else [values]
        for block in (t.reshape(-1, width) for t in turned if len(self.states) and t.size and t.size % width == 0):
            lengths = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
            kept = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 1e-6)
            if kept.any() and np.max(np.abs(block[kept] / lengths[kept] @ self.states.T)) > SAME:
                found.add("a hidden state")
        return found


def _unpacked(path: Path, data: bytes) -> Iterator[bytes]:
    """The bytes of a file and, of an archive, of what is in it."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def _arrays(path: Path, data: bytes) -> Iterator[NDArray]:
    """Every array of a file: of a format by its name, of any other as plain numbers from its first byte on."""
    if path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        yield from _lists([json.loads(line) for line in lines if line.strip()])
    elif path.suffix in (".pt", ".bin", ".pth"):
        yield from _tensors(torch.load(path, map_location="cpu", weights_only=False))
    elif path.suffix == ".npy":
        yield np.load(path)
    elif path.suffix == ".npz":
        yield from dict(np.load(path)).values()
    elif path.suffix not in _TEXT:
        try:
            with safe_open(path, framework="pt") as f:
                yield from (f.get_tensor(name).double().numpy() for name in f.keys())  # noqa: SIM118 - not a dict
        except SafetensorError:
            with np.errstate(all="ignore"):
                yield from (np.frombuffer(data[: len(data) // 4 * 4], np.float32), _half(data))


def _half(data: bytes) -> NDArray:
    return np.frombuffer(data[: len(data) // 2 * 2], np.float16).astype(np.float32)


def _tensors(value: Any) -> Iterator[NDArray]:
    if isinstance(value, torch.Tensor):
        yield value.detach().double().cpu().numpy()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        yield value
    elif isinstance(value, dict):
        yield from (a for v in value.values() for a in _tensors(v))
    elif isinstance(value, (list, tuple)):
        yield from _lists(value)
        yield from (a for v in value for a in _tensors(v) if not isinstance(v, (list, tuple)))


def _lists(value: Any) -> Iterator[NDArray]:
    """Lists of numbers, however deep, in what JSON or a pickle holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        numbers = [v for v in value if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if numbers and len(numbers) == len(value):
            yield np.array([float(min(abs(n), 1e300)) * (1 if n >= 0 else -1) for n in numbers])
        else:
            yield from (a for v in value for a in _lists(v))


def states_of(model: Any, rows: Iterable[Sequence[int]]) -> NDArray[np.float64]:
    """Hidden states of rows behind every block, each token's but the first's, and their means, of length one."""
    found = []
    with torch.no_grad():
        for row in rows:
            seen = model.eval()(input_ids=torch.tensor([list(row)]), output_hidden_states=True).hidden_states
            for layer in seen[1:]:
                own = layer[0].double()
                found += [own[1:], own.mean(0, keepdim=True), own[1:].mean(0, keepdim=True)]
                found += [
                    own[s:e].mean(0, keepdim=True) for s in range(2, len(own) - 1) for e in (len(own), len(own) - 1)
                ]
    block = torch.cat(found).numpy()
    return block / np.linalg.norm(block, axis=1, keepdims=True)
