"""The run folder: where each file lies, and how its JSON is written and read again.

Everything here is plain JSON and paths: no torch, no model. Whoever makes a run writes a folder with these functions
and ``report`` reads it with them, so the layout is known in one place.
"""

from __future__ import annotations

from excise.artifacts.content import (
    FORMAT,
    GOLD,
    ORIGINAL,
    UNLEARNED,
    Manifest,
    Number,
    Results,
    Term,
    append_log,
    cut_log,
    finite,
    read_audit,
    read_examples,
    read_log,
    read_manifest,
    read_pictures,
    read_recipe,
    read_results,
    read_verdict,
    shares_of_time,
    write_examples,
    write_manifest,
    write_pictures,
    write_results,
    write_verdict,
)
from excise.artifacts.folder import (
    PACKAGES,
    RunFolder,
    changed_files,
    environment,
    hash_files,
    open_run,
    safe_name,
)

__all__ = [
    "FORMAT",
    "GOLD",
    "ORIGINAL",
    "PACKAGES",
    "UNLEARNED",
    "Manifest",
    "Number",
    "Results",
    "RunFolder",
    "Term",
    "append_log",
    "changed_files",
    "cut_log",
    "environment",
    "finite",
    "hash_files",
    "open_run",
    "read_audit",
    "read_examples",
    "read_log",
    "read_manifest",
    "read_pictures",
    "read_recipe",
    "read_results",
    "read_verdict",
    "safe_name",
    "shares_of_time",
    "write_examples",
    "write_manifest",
    "write_pictures",
    "write_results",
    "write_verdict",
]
