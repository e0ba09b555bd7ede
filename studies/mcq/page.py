"""The page of the multiple-choice study and its JSON twin, written from rows alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Column -> name of the number.
COLUMNS = {
    "forgotten": "mcq_accuracy/forget",
    "kept": "mcq_accuracy/retain",
    "untouched": "mcq_accuracy/untouched",
    "never asked": "mcq_accuracy/never_asked",
}
TITLES = {"original": "**original** (knows all)", "gold": "**gold** (never saw the subject)"}


def write(target: Path, done: Sequence[Row], *, whole: bool) -> None:
    """Write ``mcq.md`` and ``mcq.json`` into ``target``; a quick or unfinished study leaves the findings out."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "mcq.json").write_text(json.dumps(list(done), indent=1) + "\n", encoding="utf-8")
    folder = Path(__file__).parent
    findings = (folder / "findings.md.txt").read_text(encoding="utf-8") + "\n" if whole else ""
    text = (folder / "page.md.txt").read_text(encoding="utf-8")
    parts = {
        "TABLE": table(done),
        "FINDINGS": findings,
        "CHANCE": ", ".join(
            sorted({f"{row['measured'][key]['chance']:.2f}" for row in done for key in COLUMNS.values()})
        ),
        "SECONDS": f"{sum(row['cpu_seconds'] for row in done):.0f}",
        "STATE": "" if whole else " _A quick or unfinished study._",
    }
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (target / "mcq.md").write_text(text, encoding="utf-8")


def table(done: Sequence[Row]) -> str:
    """Every model, accuracy with its interval; the number of questions stands in the head."""
    sizes = {key: done[0]["measured"][key]["n"] for key in COLUMNS.values()} if done else {}
    head = ["", *(f"{title} (n {sizes.get(key)})" for title, key in COLUMNS.items())]
    body = [
        [TITLES.get(row["row"], row.get("method", row["row"])), *(_cell(row["measured"][k]) for k in COLUMNS.values())]
        for row in done
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
