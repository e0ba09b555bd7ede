"""Progress on long work: one bar per stage, and the seconds that each took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Shows stages as bars on a terminal, as single lines elsewhere, not at all when ``quiet``.

    Example:
        >>> progress = Progress(quiet=True)
        >>> with progress.stage("count", 2) as advance:
        ...     advance(1)
        >>> list(progress.seconds)
        ['count']
    """

    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """A stage; yields a function that takes how much of ``total`` is done."""
        start = time.perf_counter()
        try:
            if self.quiet:
                yield lambda done: None
            elif sys.stderr.isatty():
                with _bar(name, total) as update:
                    yield update
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                yield lambda done: None
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken
            if not self.quiet and not sys.stderr.isatty():
                print(f"{name}: {taken:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _bar(name: str, total: float | None) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("/"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=total)
        yield lambda done: bars.update(task, completed=done)
        if total is not None:
            bars.update(task, completed=total)
