"""Training from a start, as each rank of a distributed run does it for `test_initialise_run.py`; run by torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from excise import recipe
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.starting import preparing, sides
from excise.initialise import apply, store


def main(file: str, out: Path) -> None:
    """Train as `excise run` does; keep what this rank began with and what it ended with."""
    torch.set_num_threads(1)
    settings = recipe.load(file, [("out", str(out))])
    given = sides.read(settings.data, seed=settings.seed)
    prepared = preparing.prepare_unlearning(settings, given, resume=False)
    with folders.opened(settings, resume=False) as run:
        training.fit(prepared, run, Progress(quiet=True), stage="unlearn")
    own = store.of_factors(prepared.begun.factors)
    for detail, basis in prepared.begun.constants.items():
        own |= {f"{detail}/{name}": p for name, p in basis.items()}
    ended = {
        f"ended/{which}/{n}": pair[i]
        for n, pair in apply.factors_of(prepared.model).items()
        for i, which in enumerate("AB")
    }
    base = {f"base/{n}": x.get_base_layer().weight for n, x in apply.layers(prepared.model).items()}
    rank = os.environ.get("RANK", "0")
    save_file(
        {k: v.detach().contiguous().clone() for k, v in (own | ended | base).items()}, f"{out}-{rank}.safetensors"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
