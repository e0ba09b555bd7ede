"""What the demo must show: its folder, outcome, time and memory; also a command, `python tests/demo_gates.py DIR`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("original", "gold", "unlearned", "simnpo_clreg")
BESIDE_THE_GOLD = ("entanglement", "privleak", "latent_membership_auc", "relearned_probability")


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def check_shape(folder: Path) -> None:
    """Four models, each number of interest beside the gold's, relearning curves, and a page."""
    models = _json(folder, "results.json")["models"]
    assert set(models) == set(MODELS)
    for model in MODELS:
        for name in BESIDE_THE_GOLD:
            assert isinstance(models[model][name]["value"], float | int), (model, name)
    curves = _json(folder, "pictures.json")["relearning"]
    assert curves["steps"] == [0, 1, 2, 4, 8, 16]
    assert {name: len(curve) for name, curve in curves["models"].items()} == dict.fromkeys(MODELS, 6)
    assert _json(folder, "manifest.json")["status"] == "done"
    assert (folder / "report.html").stat().st_size > 20_000


def failures(folder: Path) -> list[str]:
    """What the outcome lacks: forget probability near the gold's, untouched people kept."""
    models = _json(folder, "results.json")["models"]

    def value(model: str, metric: str) -> float:
        return models[model][metric]["value"]

    found = []
    bound = max(5 * value("gold", "forget_probability"), 0.05)
    if value("unlearned", "forget_probability") > bound:
        found.append(f"forget_probability {value('unlearned', 'forget_probability'):.4f} is above {bound:.4f}")
    kept = value("unlearned", "retain_probability") / value("original", "retain_probability")
    if kept < 0.95:
        found.append(f"retain_probability is {kept:.1%} of the original's, below 95 %")
    return found


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the largest sum of resident memory over it and its children, in bytes (Linux)."""
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(0.2)
    assert process.returncode == 0
    return time.monotonic() - start, peak


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in _family(int(child)))]


def _resident(pid: int) -> float:
    """Proportional set size: pages that processes share are counted once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0.0


if __name__ == "__main__":
    place = Path(sys.argv[1])
    check_shape(place)
    problems = failures(place)
    print("\n".join(problems) or "the demo forgets and keeps")
    raise SystemExit(bool(problems))
