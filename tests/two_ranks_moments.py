"""What each of two ranks collects in `test_collect.py`; started by torchrun, or called for a single rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tiny
from excise.errors import InputRefused
from excise.forward import Anatomy
from excise.initialise import collect, contrast_directions

#: Rows of each side, how many share a batch, and options. "gathered" stays below every width; "condensed" passes it
#: only together; in "lonely" the second rank has no batch of its own.
CASES: dict[str, dict[str, Any]] = {
    "gathered": {"rows": (7, 9), "size": 2, "pooling": "row"},
    "condensed": {"rows": (6, 5), "size": 2},
    "many": {"rows": (40, 40), "size": 3},
    "shared": {"rows": (40, 40), "size": 3, "side": "input"},
    "lonely": {"rows": (7, 9), "size": 16, "side": "input", "pooling": "row"},
    "official": {"rows": (9, 9), "size": 2, "preset": "official"},
}


def run(case: str) -> dict[str, dict[str, Tensor]]:
    """Statistics of the forget side and the basis, for every layer."""
    options = dict(CASES[case])
    counts, size = options.pop("rows"), options.pop("size")
    net = tiny.adapted(tiny.model(depth=1))
    data = tiny.Data(dict(zip(("forget", "retain"), counts, strict=True)))
    sides = {}
    for side, count in data.counts.items():
        batches = [data.batch(side, range(i, min(i + size, count))) for i in range(0, count, size)]
        sides[side] = collect(net, Anatomy.of(net), batches, **options)
    center, out = case != "official", {}
    for name, forget in sides["forget"].items():
        found = contrast_directions(forget, sides["retain"][name], 0.5, 4, center=center)
        out[name] = {
            "count": torch.tensor(forget.count),
            "mean": forget.mean,
            "covariance": forget.covariance(center),
            "basis": found.vectors,
        }
    return out


def refused() -> str:
    """Only the second rank's batch leads to NaN."""
    net, data = tiny.adapted(tiny.model(depth=1)), tiny.Data({"forget": 2})
    only = set(data.rows["forget"][1].tolist()) - set(data.rows["forget"][0].tolist())
    with torch.no_grad():
        net.get_input_embeddings().weight[list(only)] = float("nan")  # type: ignore[operator]
    try:
        collect(net, Anatomy.of(net), [data.batch("forget", [i]) for i in (0, 1)])
    except InputRefused as error:
        return str(error)
    return ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    target, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save({"refused": refused(), **{case: run(case) for case in CASES}}, target / f"rank-{rank}.pt")
    dist.destroy_process_group()
