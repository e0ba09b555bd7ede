"""A run with reset rows and shaped updates, as each rank of a distributed run does it for `test_preconditioned.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny
from excise import recipe
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.starting import preparing, sides


def main(file: str, out: Path) -> None:
    """Train as `excise run` does; keep what this rank holds: shapes and weights."""
    torch.set_num_threads(1)
    settings = recipe.load(file, [("out", str(out))])
    prepared = preparing.prepare_unlearning(settings, sides.of(settings), resume=False)
    with folders.opened(settings, resume=False) as run:
        training.fit(prepared, run, Progress(quiet=True), stage="unlearn")
    own = {f"P/{name}": shape.inputs for name, shape in prepared.begun.shapes.items()}
    own |= {f"Q/{name}": shape.outputs for name, shape in prepared.begun.shapes.items() if shape.outputs is not None}
    own |= {f"W/{name}": value for name, value in tiny.weights(prepared.model).items()}
    rank = os.environ.get("RANK", "0")
    save_file({k: v.contiguous().clone() for k, v in own.items()}, f"{out}-{rank}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
