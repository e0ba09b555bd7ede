"""Which engine ran a row: the studies store it, so that a page can say it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import excise


def commit() -> str:
    """Commit of the engine, marked where its files were changed since; its version where it is no clone."""
    home = Path(excise.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", home, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {excise.__version__}"
