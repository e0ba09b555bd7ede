"""Two ranks do what one does: the same weights, numbers and multipliers, uneven batches and restarts included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import two_ranks

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two gloo ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, str(Path(two_ranks.__file__)), str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_two_ranks_do_what_one_does(ranks: list[Results], tmp_path: Path, case: str) -> None:
    alone = two_ranks.run(tmp_path, case)
    first, second = (rank[case] for rank in ranks)
    assert tiny.apart(first["weights"], second["weights"]) == 0
    assert tiny.apart(first["weights"], alone["weights"]) < 1e-5
    assert tiny.apart(tiny.weights(two_ranks.net(case)), alone["weights"]) > 1e-3
    assert first["duals"] == second["duals"]
    assert first["duals"] == pytest.approx(alone["duals"], rel=1e-5)
    assert len(first["log"]) == len(alone["log"]) == (2 if case == "resumed" else 4)
    for ours, theirs in zip(first["log"], alone["log"], strict=True):
        own, other = ({k: v for k, v in row.items() if not k.startswith("monitor/")} for row in (ours, theirs))
        assert own == pytest.approx(other, rel=1e-4)  # monitors are of a rank's own rows
