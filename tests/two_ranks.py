"""What each rank of a distributed run does in `test_ranks.py`; started by torchrun, or called for a single rank."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
from excise.objectives.forget import npo
from excise.objectives.regularise import clreg
from excise.objectives.regularise_class import deepcut
from excise.objectives.regularise_lora import rol
from excise.objectives.retain import nll, primal_dual
from excise.objectives.term import Dual, Term

#: Batches that two ranks cannot share evenly; in the second case one rank has no forget row of its own.
CASES: dict[str, dict[str, Any]] = {
    "uneven": {"schedule": {"steps": 4, "forget_batch": 7, "retain_batch": 5}},
    "lonely": {"schedule": {"steps": 4, "forget_batch": 1, "retain_batch": 3, "accumulate": 2, "retain_steps": 1}},
    "resumed": {"schedule": {"steps": 4, "forget_batch": 3, "retain_batch": 5}, "checkpoint_every": 1},
    "classes": {"schedule": {"steps": 4, "forget_batch": 3, "retain_batch": 3, "contrast_batch": 3, "accumulate": 2}},
    "adapted": {"schedule": {"steps": 4, "forget_batch": 3, "retain_batch": 5, "accumulate": 2, "retain_steps": 1}},
}


def net(case: str) -> Any:
    """The model that a case begins with."""
    return tiny.adapted(tiny.model()) if case == "adapted" else tiny.model()


def terms(case: str) -> list[Term]:
    """Per row, per token with a multiplier, and coupled over the batch with gathered negatives, both ways.

    Or, of an adapter: a term of its weights, with a multiplier; of classes: terms that know what counts beforehand.
    """
    if case == "classes":
        return [nll(), deepcut(form="full", contrast="both"), replace(deepcut(anchors="pooled"), name="rows")]
    if case == "adapted":
        return [npo(), nll(), rol(k=3, weight=Dual(start=0.5, epsilon=0.1, eta=0.2))]
    made = clreg(weight=2.0, dropout=0.2, symmetric=True)
    assert isinstance(made, tuple)
    return [npo(), primal_dual(epsilon=3.0, eta=0.5, warmup=0.3, weight=1.0), *made]


def run(folder: Path, case: str) -> dict[str, Any]:
    """Weights and log of a case; the last one is interrupted after two steps and resumed."""
    rows = {"forget": 7, "retain": 9} | ({"contrast": 9} if case == "classes" else {})
    more: dict[str, Any] = {"data": tiny.Data(rows), "optimiser": {"lr": 1e-3}, **CASES[case]}
    fixed = {"retain_basis/3": tiny.bases(net(case), 3), "class_map/type": torch.arange(tiny.VOCABULARY) % 6 % 5}
    more |= {"net": net(case), "constants": fixed}
    if case == "resumed":
        tiny.Run(folder, terms(case), should_stop=lambda step: step == 2, **more).go()
        made = tiny.Run(folder, terms(case), **more).resume()
    else:
        made = tiny.Run(folder, terms(case), **more).go()
    return {"weights": made.weights, "log": made.log, "duals": made.trainer.duals}


if __name__ == "__main__":
    target, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save({case: run(target / case, case) for case in CASES}, target / f"rank-{rank}.pt")
