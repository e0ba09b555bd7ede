"""The page of the Alice study and its JSON twin, written from rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Column -> what is read of a row, and its decimals.
COLUMNS = {
    "loss on passages": ("forget_loss", 2),
    "ROUGE-L f1": ("forget_rouge_f1", 2),
    "extraction strength": ("extraction_strength", 3),
    "exact memorisation": ("exact_memorization", 2),
    "loss AUC": ("mia_loss_auc", 2),
    "min-40 % AUC": ("mia_min_k_auc", 2),
    "relearned p": ("relearned_probability", 3),
    "loss on other Alice": ("other_alice_loss", 2),
    "loss on stories": ("untouched_loss", 3),
    "entanglement": ("entanglement", 1),
}
MODELS = {"base": "as it came", "original": "**original** (learned them)", "gold": "**gold** (never saw them)"}


def write(target: Path, done: Mapping[str, Row], methods: Sequence[str], *, quick: bool, missing: int) -> None:
    """Write ``alice.md`` and ``alice.json`` into ``target``.

    Args:
        target: Folder.
        done: Finished rows by name.
        methods: Methods in the order of the table.
        quick: Whether this is the quick study; the page says so and leaves the findings out.
        missing: Rows that are not there yet.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "alice.json").write_text(json.dumps(list(done.values()), indent=1) + "\n", encoding="utf-8")
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    if quick or missing:
        head, _, rest = text.partition("<<FINDINGS>>")
        text = head + "_A quick or unfinished study: see the table._\n" + rest.partition("<<END>>")[2]
    parts = {
        "FINDINGS": "",
        "END": "",
        "TABLE": table(done, methods),
        "TRIALS": trials(done, methods),
        "MINUTES": f"{sum(row['cpu_seconds'] for row in done.values()) / 60:.1f}",
        "SIZES": sizes(done),
        "ENGINE": ", ".join(sorted({row["commit"] for row in done.values()})),
        "STATE": f"{missing} rows are missing." if missing else "",
    }
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (target / "alice.md").write_text(text, encoding="utf-8")


def _seeds(done: Mapping[str, Row], method: str) -> list[Row]:
    return [row for row in done.values() if row.get("method") == method and "seed" in row]


def _cells(rows: Sequence[Row]) -> list[str]:
    """Mean over seeds, with the lowest and highest behind it where there are several."""
    cells = []
    for key, digits in COLUMNS.values():
        found = [row["measured"][key] for row in rows if key in row["measured"]]
        text = f"{statistics.mean(found):.{digits}f}" if found else "not shown"
        if len(found) > 1:
            text += f" ({min(found):.{digits}f}-{max(found):.{digits}f})"
        cells.append(text)
    return cells


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(done: Mapping[str, Row], methods: Sequence[str]) -> str:
    """Every model beside the gold."""
    body = [[title, *_cells([done[name]])] for name, title in MODELS.items() if name in done]
    body += [[method, *_cells(rows)] for method in methods if (rows := _seeds(done, method))]
    return _lines(["", *COLUMNS], body)


def trials(done: Mapping[str, Row], methods: Sequence[str]) -> str:
    """All trials of each method: settings and distance, the best in bold."""
    body = []
    for method in methods:
        tried = [row for row in done.values() if row.get("method") == method and "distance" in row]
        if not tried:
            continue
        second = next(k for k in tried[0]["changes"] if k != "optimiser.lr")
        best = min(tried, key=lambda row: row["distance"])
        cells = []
        for row in tried:
            text = f"{row['changes']['optimiser.lr']:g}, {row['changes'][second]:g}: {row['distance']:.2f}"
            cells.append(f"**{text}**" if row is best else text)
        body.append([method, f"`{second.removeprefix('objective.')}`", "; ".join(cells)])
    return _lines(["method", "tuned beside the rate", "rate, value: distance"], body)


def sizes(done: Mapping[str, Row]) -> str:
    """Passages of each side that is measured."""
    rows = done["base"]["measured"]["rows"]
    return ", ".join(f"{count} {role.replace('_', ' ')}" for role, count in rows.items())
