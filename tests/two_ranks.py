"""What each rank of a distributed run does in `test_ranks.py`; started by torchrun, or called for a single rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

import tiny
from excise.objectives.forget import npo
from excise.objectives.regularise import clreg
from excise.objectives.retain import primal_dual
from excise.objectives.term import Term

#: Batches that two ranks cannot share evenly; in the second case one rank has no forget row of its own.
CASES: dict[str, dict[str, Any]] = {
    "uneven": {"schedule": {"steps": 4, "forget_batch": 7, "retain_batch": 5}},
    "lonely": {"schedule": {"steps": 4, "forget_batch": 1, "retain_batch": 3, "accumulate": 2, "retain_steps": 1}},
    "resumed": {"schedule": {"steps": 4, "forget_batch": 3, "retain_batch": 5}, "checkpoint_every": 1},
}


def terms() -> list[Term]:
    """Per row, per token with a multiplier, and coupled over the batch with gathered negatives, both ways."""
    made = clreg(weight=2.0, dropout=0.2, symmetric=True)
    assert isinstance(made, tuple)
    return [npo(), primal_dual(epsilon=3.0, eta=0.5, warmup=0.3, weight=1.0), *made]


def run(folder: Path, case: str) -> dict[str, Any]:
    """Weights and log of a case; the last one is interrupted after two steps and resumed."""
    more: dict[str, Any] = {"data": tiny.Data({"forget": 7, "retain": 9}), "optimiser": {"lr": 1e-3}, **CASES[case]}
    if case == "resumed":
        tiny.Run(folder, terms(), should_stop=lambda step: step == 2, **more).go()
        made = tiny.Run(folder, terms(), **more).resume()
    else:
        made = tiny.Run(folder, terms(), **more).go()
    return {"weights": made.weights, "log": made.log, "duals": made.trainer.duals}


if __name__ == "__main__":
    target, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save({case: run(target / case, case) for case in CASES}, target / f"rank-{rank}.pt")
