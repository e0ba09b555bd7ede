"""From the rows of the CLReg study to docs/results/clreg.md and its JSON twin."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
Row = dict[str, Any]

#: Column -> metric; the last number of each cell group is read beside the gold's.
COLUMNS = {
    "forget p": "forget_probability",
    "untouched p": "retain_probability",
    "utility": "model_utility",
    "log10 FQ": "forget_quality_log10",
    "PrivLeak": "privleak",
    "latent AUC": "latent_membership_auc",
    "relearned": "relearned_probability",
    "entanglement": "entanglement",
    "UnlearningScore": "unlearning_score",
    "repetition": "forget_repetition",
}


def value(row: Row, metric: str) -> float | None:
    """A metric of a row, None where it was not shown."""
    return (row["metrics"].get(metric) or {}).get("value")


def write(rows: Sequence[Row], out: Path, *, quick: bool) -> None:
    """Write the page and its twin; a quick study writes beside its rows and leaves the docs alone."""
    folder = out if quick else DOCS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clreg.json").write_text(json.dumps([_plain(r) for r in rows], indent=1) + "\n")
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    tables = {
        "MAIN10": main_table(rows, "forget10"),
        "MAIN05": main_table(rows, "forget05"),
        "MAIN01": main_table(rows, "forget01"),
        "ABLATIONS": ablations(rows),
        "RATIOS": ratios(rows),
        "TUNED": tuned(out),
        "STATUS": status(rows),
    }
    for name, table in tables.items():
        text = text.replace(f"<<{name}>>", table or "_Not run yet._")
    (folder / "clreg.md").write_text(text, encoding="utf-8")


def _plain(row: Row) -> Row:
    kept = {k: v for k, v in row.items() if k not in ("metrics", "seconds", "monitor", "changes")}
    numbers = {m: {k: v for k, v in n.items() if v is not None} for m, n in row["metrics"].items()}
    return kept | {"changes": row.get("changes", {}), "metrics": numbers}


def _cells(rows: Sequence[Row]) -> list[str]:
    out = []
    for metric in COLUMNS.values():
        values = [v for r in rows if (v := value(r, metric)) is not None and math.isfinite(v)]
        if not values:
            out.append("not shown")
            continue
        text = f"{statistics.mean(values):.3g}"
        out.append(f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text)
    return out


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def main_table(rows: Sequence[Row], split: str) -> str:
    """Original, gold, and each base with and without CLReg: mean over seeds and standard deviation."""
    own = [r for r in rows if r["split"] == split]
    if not any(r["group"] == "main" for r in own):
        return ""
    body = []
    for role in ("original", "gold"):
        found = [r for r in own if r["name"] == role]
        if found:
            body.append([f"**{role}**", "", *_cells(found)])
    for name in sorted({(r["base"], r["changes"]["clreg"]) for r in own if r["group"] == "main"}):
        found = [r for r in own if r["group"] == "main" and (r["base"], r["changes"]["clreg"]) == name]
        seeds = str(len(found))
        body.append([f"{name[0]}{' + CLReg' if name[1] else ''}", seeds, *_cells(found)])
    return _table(["run", "seeds", *COLUMNS], body)


def ablations(rows: Sequence[Row]) -> str:
    """SimNPO + CLReg with one thing changed, at 10 %, one seed."""
    found = [r for r in rows if r["group"] not in ("main", "original", "gold")]
    start = [r for r in rows if r["name"] == "simnpo+clreg-forget10-s0"]
    if not found:
        return ""
    body = [["as tuned", *_cells(start)]] if start else []
    body += [[r["name"], *_cells([r])] for r in sorted(found, key=lambda r: (r["group"], r["name"]))]
    return _table(["change", *COLUMNS], body)


def ratios(rows: Sequence[Row]) -> str:
    """How many times lower entanglement is with CLReg, and who is nearer to the gold, per base at 10 %."""
    own = [r for r in rows if r["split"] == "forget10"]
    gold = next((r for r in own if r["name"] == "gold"), None)
    if gold is None:
        return ""
    body = []
    for base in dict.fromkeys(r["base"] for r in own if r["group"] == "main"):
        pair = [
            [r for r in own if r["group"] == "main" and r["base"] == base and r["changes"]["clreg"] is flag]
            for flag in (False, True)
        ]
        if not all(pair):
            continue
        cells = [base]
        low, high = (_mean(p, "entanglement") for p in (pair[1], pair[0]))
        cells.append(f"{high / low:.2f}" if low and high else "not shown")
        for metric in ("unlearning_score",):
            a, b = (_mean(p, metric) for p in pair)
            cells.append("not shown" if a is None or b is None else f"{b - a:+.3f}")
        for metric in (
            "forget_quality_log10",
            "privleak",
            "latent_membership_auc",
            "relearned_probability",
            "entanglement",
        ):
            a, b, g = _mean(pair[0], metric), _mean(pair[1], metric), value(gold, metric)
            cells.append("not shown" if None in (a, b, g) else f"{abs(a - g):.3g} -> {abs(b - g):.3g}")  # type: ignore[operator]
        body.append(cells)
    head = ["base", "entanglement without / with", "UnlearningScore change", "distance to gold: log10 FQ", "PrivLeak",
            "latent AUC", "relearned", "entanglement"]  # fmt: skip
    return _table(head, body) if body else ""


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    values = [v for r in rows if (v := value(r, metric)) is not None]
    return statistics.mean(values) if values else None


def status(rows: Sequence[Row]) -> str:
    """Which part of the study has been run."""
    done = {
        s: len([r for r in rows if r["split"] == s and r["group"] == "main"])
        for s in ("forget10", "forget05", "forget01")
    }
    other = len([r for r in rows if r["group"] not in ("main", "original", "gold")])
    cells = ", ".join(f"{n} of 30 rows at {s[-2:].lstrip('0')} %" for s, n in done.items())
    return f"**Run so far:** {cells}; {other} of 9 rows with one thing changed. The command goes on where it stopped."


def tuned(out: Path) -> str:
    """What four trials at 5 % on authors 86-90 chose."""
    body = []
    for path in sorted((out / "tuned").glob("*.json")):
        found = json.loads(path.read_text())
        best = ", ".join(f"{k.rsplit('.', 1)[-1]} {v:g}" for k, v in found["best"].items())
        body.append([path.stem, best, f"{found['value']:.3g}", str(found["trials"])])
    return _table(["row", "chosen", "distance", "trials"], body) if body else ""
