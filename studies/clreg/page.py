"""From the rows of the CLReg study to docs/results/clreg.md and its JSON twin."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hardness
from rows import Row as Planned

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
Row = dict[str, Any]

#: Column -> metric; each is read beside the gold's.
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
#: Whose distance to the gold is compared.
DISTANCES = {
    "log10 FQ": "forget_quality_log10",
    "PrivLeak": "privleak",
    "latent AUC": "latent_membership_auc",
    "relearned": "relearned_probability",
    "entanglement": "entanglement",
}
SPLITS = {"forget10": "10 %", "forget05": "5 %", "forget01": "1 %"}
NOT_ROWS = ("original", "gold", "aligned start")


def write(rows: Sequence[Row], out: Path, *, docs: bool, missing: Sequence[Planned]) -> None:
    """Write the page and its twin: into the docs, or beside the rows and then without the findings."""
    folder = DOCS if docs else out
    folder.mkdir(parents=True, exist_ok=True)
    hard = hardness.split(out)
    before: list[Row] = json.loads(Path(__file__).with_name("earlier.json").read_text(encoding="utf-8")) if docs else []
    twin = [_plain(r) for r in rows] + ([{"name": "easy and hard facts", **hard}] if hard else []) + before
    lines = ",\n".join(json.dumps(r) for r in twin)
    (folder / "clreg.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    if not docs:
        head, _, rest = text.partition("<<FINDINGS>>")
        text = head + "_Not the whole study: see the tables._\n" + rest.partition("<<END>>")[2]
    tables = {
        "FINDINGS": "",
        "END": "",
        "MAIN10": main_table(rows, "forget10"),
        "MAIN05": main_table(rows, "forget05"),
        "MAIN01": main_table(rows, "forget01"),
        "CHANGES": one_change(rows),
        "RATIOS": ratios(rows),
        "ALIGNED": preferences(rows),
        "HARDNESS": by_hardness(hard),
        "TUNED": tuned(out),
        "EARLIER": main_table(before, "forget10"),
        "EARLIERCHANGES": one_change(before),
        "ENGINE": ", ".join(sorted({r["commit"] for r in rows if "commit" in r})),
        "STATUS": status(rows, missing),
    }
    for name, table in tables.items():
        text = text.replace(f"<<{name}>>", table if table or name in ("FINDINGS", "END") else "_Not run._")
    (folder / "clreg.md").write_text(text, encoding="utf-8")


def value(row: Row, metric: str) -> float | None:
    """A metric of a row, None where it was not shown."""
    found = (row["metrics"].get(metric) or {}).get("value")
    return found if found is not None and math.isfinite(found) else None


def _plain(row: Row) -> Row:
    kept = {k: v for k, v in row.items() if k not in ("metrics", "seconds", "monitor")}
    return kept | {"metrics": {m: {k: v for k, v in n.items() if v is not None} for m, n in row["metrics"].items()}}


def _number(values: Iterable[float | None]) -> str:
    """Mean, and where there are several the standard deviation."""
    found = [v for v in values if v is not None]
    if not found:
        return "not shown"
    spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3g}{spread}"


def _cells(rows: Sequence[Row]) -> list[str]:
    return [_number(value(r, metric) for r in rows) for metric in COLUMNS.values()]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def main_table(rows: Sequence[Row], split: str) -> str:
    """Original, gold, and each base with and without CLReg: mean over seeds and standard deviation."""
    own = [r for r in rows if r["split"] == split]
    main = [r for r in own if r["group"] == "main"]
    if not main:
        return ""
    body = []
    for role in ("original", "gold"):
        body += [[f"**{role}**", "", *_cells([r])] for r in own if r["name"] == role]
    for base, clreg in sorted({(r["base"], r["clreg"]) for r in main}):
        found = [r for r in main if (r["base"], r["clreg"]) == (base, clreg)]
        body.append([f"{base}{' + CLReg' if clreg else ''}", str(len(found)), *_cells(found)])
    return _table(["run", "seeds", *COLUMNS], body)


def one_change(rows: Sequence[Row]) -> str:
    """SimNPO + CLReg with one thing changed, at 10 %, one seed."""
    start = [r for r in rows if r["name"] == "simnpo+clreg-forget10-s0"]
    found = [r for r in rows if r["group"] not in ("main", "aligned", *NOT_ROWS)]
    if not found:
        return ""
    body = [["as tuned", *_cells(start)]] if start else []
    body += [[r["name"], *_cells([r])] for r in sorted(found, key=lambda r: (r["group"], r["name"]))]
    return _table(["change", *COLUMNS], body)


def ratios(rows: Sequence[Row]) -> str:
    """How many times lower entanglement is with CLReg, and who is nearer to the gold, by split and base."""
    body = []
    for split, title in SPLITS.items():
        gold = next((r for r in rows if r["name"] == "gold" and r["split"] == split), None)
        main = [r for r in rows if r["group"] == "main" and r["split"] == split]
        for base in dict.fromkeys(r["base"] for r in main):
            seeds = [{r["seed"] for r in main if r["base"] == base and r["clreg"] is flag} for flag in (False, True)]
            both = seeds[0] & seeds[1]  # a seed without its twin is not compared
            pair = [
                [r for r in main if r["base"] == base and r["clreg"] is flag and r["seed"] in both]
                for flag in (False, True)
            ]
            if both and gold is not None:
                body.append([title, base, str(len(both)), *_beside(pair[0], pair[1], gold)])
    arrows = [f"distance: {name}" for name in DISTANCES]
    head = ["forgotten", "base", "seeds", "entanglement without / with", "UnlearningScore change", *arrows]
    return _table(head, body) if body else ""


def _beside(plain: Sequence[Row], clreg: Sequence[Row], gold: Row) -> list[str]:
    """Cells of one base: the ratio, the change of the score, and both distances to the gold."""
    high, low = _mean(plain, "entanglement"), _mean(clreg, "entanglement")
    before, after = _mean(plain, "unlearning_score"), _mean(clreg, "unlearning_score")
    cells = [f"{high / low:.2f}" if low and high else "not shown"]
    cells.append("not shown" if before is None or after is None else f"{after - before:+.3f}")
    for metric in DISTANCES.values():
        a, b, target = _mean(plain, metric), _mean(clreg, metric), value(gold, metric)
        shown = a is not None and b is not None and target is not None
        cells.append(f"{abs(a - target):.3g} -> {abs(b - target):.3g}" if shown else "not shown")  # type: ignore[operator]
    return cells


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    values = [v for r in rows if (v := value(r, metric)) is not None]
    return statistics.mean(values) if values else None


def preferences(rows: Sequence[Row]) -> str:
    """Whether the preference that was taught before survives forgetting."""
    own = [r for r in rows if r["group"] == "aligned"]
    if not own:
        return ""
    start = [r for r in rows if r["name"] == "aligned"]
    original = [r for r in rows if r["name"] == "original" and r["split"] == "forget10"]
    body = [
        ["original", "", *_preferred([own[0]["preference"]["original"]], original)],
        ["aligned by DPO", "", *_preferred([own[0]["preference"]["aligned"]], start)],
    ]
    for kind in dict.fromkeys(_kind(r) for r in own):
        found = [r for r in own if _kind(r) == kind]
        cells = _preferred([r["preference"]["after"] for r in found], found)
        body.append([f"then {kind}", str(len(found)), *cells])
    head = ["model", "seeds", "accuracy, aligned", "accuracy, held out", "margin, aligned", "margin, held out",
            "facts p, aligned", "facts p, held out", "forget p", "untouched p"]  # fmt: skip
    return _table(head, body)


def _kind(row: Row) -> str:
    return row["name"].removeprefix("aligned-").rsplit("-", 1)[0].replace("+clreg", " + CLReg").replace("-", " ")


def _preferred(found: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    cells = [
        _number(p[part][key] for p in found)
        for key in ("accuracy", "margin", "probability")
        for part in ("aligned", "held_out")
    ]
    return cells + [_number(value(r, metric) for r in rows) for metric in ("forget_probability", "retain_probability")]


def by_hardness(found: Mapping[str, Any] | None) -> str:
    """What each layer setting does to easy and to hard facts."""
    if found is None:
        return ""
    parts = ("easy", "hard", "difference")
    body = []
    for name, own in found["settings"].items():
        cells = [_interval(own["level"][p]) for p in parts]
        change = own.get("change") if name != "without CLReg" else None
        body.append([name, *cells, *(_interval(change[p]) if change else "" for p in parts)])
    for name, own in found["settings"].items():
        if "beside" in own:
            body.append([f"{name} less Last-1", *(_interval(own["beside"][p]) for p in parts), "", "", ""])
    head = ["setting", "easy", "hard", "easy - hard", "change: easy", "change: hard", "change: easy - hard"]
    note = (
        f"\n\n{found['n'][0]} easy and {found['n'][1]} hard questions; their answers have probability "
        f"{found['early'][0]:.2f} and {found['early'][1]:.2f} in the short original."
    )
    return _table(head, body) + note


def _interval(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:.2f} ({numbers[1]:.2f} to {numbers[2]:.2f})"


def status(rows: Sequence[Row], missing: Sequence[Planned]) -> str:
    """Which rows there are, and the names of those that were not run."""
    done = len([r for r in rows if r["group"] not in NOT_ROWS])
    text = f"**Rows run: {done} of {done + len(missing)}.**"
    if not missing:
        return text
    groups: dict[str, list[str]] = {}
    for row in missing:
        if row.group == "main":
            groups.setdefault(f"{SPLITS[row.split]}, seed {row.seed}", []).append(row.name.rsplit("-", 2)[0])
        else:
            groups.setdefault(row.group, []).append(row.name)
    named = "; ".join(f"{title}: {'all ten' if len(own) == 10 else ', '.join(own)}" for title, own in groups.items())
    return f"{text} Not run: {named}. The command goes on where it stopped."


def tuned(out: Path) -> str:
    """What four trials at 5 % on authors 86-90 chose."""
    body = []
    for path in sorted((out / "tuned").glob("*.json")):
        found = json.loads(path.read_text())
        best = ", ".join(f"{k.rsplit('.', 1)[-1]} {v:g}" for k, v in found["best"].items())
        body.append([path.stem, best, f"{found['value']:.3g}", str(found["trials"]), found["commit"]])
    return _table(["row", "chosen", "distance", "trials", "engine"], body) if body else ""
