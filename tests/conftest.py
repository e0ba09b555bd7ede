"""What every test shares: one thread, no network, the real data where it is, and skips that are not overlooked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from small_world import SmallWorld

ROOT = Path(__file__).resolve().parents[1]

# A busy machine is no defect.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
# Before torch or a hub library is imported. One thread: the models are small, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    NO_COLOR="1",
    COLUMNS="200",
    # Processes that tests start (ranks, killed runs) import the same source as the tests themselves.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models: ``EXCISE_SHARED``, or ``shared`` beside the repository."""
    folder = Path(os.environ.get("EXCISE_SHARED") or ROOT.parent / "shared").resolve()
    if not (folder / "data").is_dir():
        pytest.skip("REAL DATA ABSENT: set EXCISE_SHARED to the folder that holds data/ and models/")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """The smallest whole case, made once: rows, tokenizer, original, gold. Tests read it and never write to it."""
    import small_world

    return small_world.build(tmp_path_factory.mktemp("small"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once more, where it is seen, what this run did not test."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_sep("!", f"{len(skipped)} NOT TESTED: the reasons stand above", yellow=True, bold=True)
