"""What a start costs before training: seconds of one core and memory, each start in a process of its own."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from excise import recipe
from excise.commands.progress import Progress
from excise.commands.running import run

STAGES = {"unlearn: statistics": "start", "unlearn": "training"}


@dataclass
class Meter(Progress):
    """Processor seconds of each stage, and the memory that it reached above what was resident when it began."""

    found: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """A stage, measured."""
        before, begun, wall = _rewind(), time.process_time(), time.perf_counter()
        with super().stage(name, total) as advance:
            yield advance
        peak = _resident("VmHWM")
        self.found[name] = {
            "cpu_seconds": time.process_time() - begun,
            "seconds": time.perf_counter() - wall,
            "peak_mib": None if peak is None or before is None else peak - before,
        }


def _rewind() -> float | None:
    """Give freed memory back, set the process's high-water mark to what is resident; that, in MiB. Linux alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    return None


def _resident(which: str) -> float | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(which))) / 1024
    return None


def measure(values: dict[str, Any], path: Path, threads: int) -> dict[str, Any]:
    """Costs of a recipe's start, in a new process; kept at ``path``."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder) / "recipe.json"
            given.write_text(json.dumps({"values": values, "out": str(Path(folder) / "run"), "threads": threads}))
            subprocess.run([sys.executable, __file__, str(given), str(path)], check=True)
    return json.loads(path.read_text())


def _child(given: Path, path: Path) -> None:
    import torch

    asked = json.loads(given.read_text())
    torch.set_num_threads(asked["threads"])
    meter = Meter(quiet=True)
    run(recipe.build(asked["values"]), out=asked["out"], progress=meter)
    path.write_text(json.dumps({name: meter.found[stage] for stage, name in STAGES.items() if stage in meter.found}))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
