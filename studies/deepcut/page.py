"""From the rows of the DeepCUT study to docs/results/deepcut.md and its JSON twin."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pooled
from rows import METHODS, PROCEDURES
from rows import Row as Planned
from study import TUNING

import twin

DOCS = twin.DOCS
TWIN = DOCS / "deepcut.json"
Row = dict[str, Any]
EQUIVALENT = 0.03
NAMES = {
    "wnut17": "WNUT17", "ncbi": "NCBI-disease", "wnut16": "WNUT16",
    "bc5cdr": "BC5CDR-chem (in place of ChEMU, of which no copy with a stated licence was found)",
    "classics": "Who wrote a passage (text classification)",
}  # fmt: skip
#: What is held against every other method: what came nearest, and DeepCUT.
COMPARED = ("distil-eighths", "distil-quarters", "distil", "reverse-gradient+f1", "deepcut")
ORDER = [*(m for m in METHODS if m not in ("kga", "naive")), "kga", "sisa", "naive", "retrain"]
#: Column -> metric of a tagger; each is read beside the gold's.
COLUMNS = {
    "forget F1": "forget_f1",
    "words outside": "forget_outside_accuracy",
    "retain F1": "retain_f1",
    "never-seen F1": "never_seen_f1",
    "test F1": "test_f1",
    "entity membership AUC": "entity_membership_auc",
    "latent AUC": "latent_membership_auc",
    "same-class neighbours": "same_class_neighbours",
    "cosine to own class": "own_class_cosine",
    "to O": "outside_cosine",
}
OF_TEXTS = {
    "forget accuracy": "forget_accuracy",
    "retain accuracy": "retain_accuracy",
    "never-seen accuracy": "never_seen_accuracy",
    "test accuracy": "test_accuracy",
    "membership AUC": "membership_auc",
    "latent AUC": "latent_membership_auc",
}
GROUPS = {
    "GAMMA": "gamma", "TAU": "tau", "DROPOUT": "dropout", "ENCODER": "encoder", "GRANULARITY": "granularity",
    "COMPOSITION": "composition", "EDGE": "edge",
}  # fmt: skip


def write(
    rows: Sequence[Row], trials: Mapping[str, Row], folder: Path, *, findings: bool, missing: Sequence[Planned]
) -> None:
    """Write the page and its twin: into the docs, or beside the rows and then without the findings."""
    twin.write(folder / TWIN.name, [*rows, {"name": TUNING, **trials}])
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    if not findings:
        head, _, rest = text.partition("<<FINDINGS>>")
        text = head + "_Not the whole study: see the tables._\n" + rest.partition("<<END>>")[2]
    main = [r for r in rows if r["group"] == "main"]
    tables = {
        "FINDINGS": "",
        "END": "",
        "GAPS": gaps(main),
        "SHIPPED": shipped([r for r in rows if r["group"] == "shipped"]),
        "NEARER": comparisons(main),
        "COSTS": costs(main),
        "MAIN": sections([r for r in main if r["data"] != "classics"]),
        "TEXT": sections([r for r in rows if r["group"] == "text"], OF_TEXTS),
        "TUNED": tuned(trials),
        "BATCHES": batches(rows),
        "ENGINE": ", ".join(sorted({r["commit"] for r in rows})),
        "STATUS": status(rows, missing),
        "OTHERS": others([r for r in rows if r["group"] == "others"]),
        "RELEARNED": relearned([r for r in rows if r["group"] == "relearned"]),
    } | {name: varied(rows, group) for name, group in GROUPS.items()}
    for name, table in tables.items():
        text = text.replace(f"<<{name}>>", table if table or name in ("FINDINGS", "END") else "_Not run yet._")
    (folder / "deepcut.md").write_text(text, encoding="utf-8")


# --- numbers ------------------------------------------------------------------------------------------------------


def value(row: Row, metric: str, role: str = "unlearned") -> float | None:
    """A metric of one of a row's models, None where it was not shown."""
    found = (row["metrics"].get(role, {}).get(metric) or {}).get("value")
    return found if found is not None and math.isfinite(found) else None


def _number(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean, and where there are several the standard deviation."""
    found = [v for v in values if v is not None]
    if not found:
        return "not shown"
    spread = f" ± {statistics.stdev(found):.{max(1, digits - 1)}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def _points(found: tuple[float, ...] | None) -> str:
    if found is None:
        return "not shown"
    mean, low, high = (100 * v for v in found[:3])
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _what(split: str) -> str:
    """A split without its draw, in words."""
    if split.startswith("random"):
        return f"{int(split[6:8])} % at random"
    return (
        f"entity type {split.removeprefix('type-')}, 5 %" if split.startswith("type-") else f"{split} of vectors, 5 %"
    )


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Data set and what is forgotten -> method -> its rows, by split and seed."""
    out: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        out.setdefault((row["data"], _what(row["split"])), {}).setdefault(row["method"], []).append(row)
    for own in out.values():
        for found in own.values():
            found.sort(key=lambda r: (r["split"], r["seed"]))
    place = {name: i for i, name in enumerate(NAMES)}
    return dict(sorted(out.items(), key=lambda item: (place[item[0][0]], -_size(item[0][1]))))


def _size(what: str) -> int:
    """5 % first, then 10 % and 1 %, then what is not drawn at random."""
    return {"5": 9, "10": 8, "1": 7}.get(what.split(" ")[0], 0)


def _methods(own: Mapping[str, list[Row]]) -> list[str]:
    return [m for m in ORDER if m in own]


def _title(method: str) -> str:
    titles = {
        "retrain": "retrained again (another seed)", "deepcut": "DeepCUT", "deepcut-full": "DeepCUT, full",
        "deepcut+ascent": "DeepCUT + ascent", "deepcut+halves": "DeepCUT, from halves",
        "deepcut+ascent+halves": "DeepCUT + ascent, from halves",
        "reverse-gradient+halves": "reverse-gradient, from halves", "deepcut+f1": "DeepCUT, by F1 from halves",
        "reverse-gradient+f1": "reverse-gradient, by F1 from halves", "distil": "learning from halves",
        "distil-quarters": "learning from all but a quarter",
        "distil-eighths": "learning from all but an eighth",
        "distil-ten-epochs": "learning from all but a quarter, 10 epochs",
        "distil-twenty-epochs": "learning from all but a quarter, 20 epochs",
        "distil-grouped": "learning from all but a quarter, which holds all forgotten",
    }  # fmt: skip
    return titles.get(method, method)


# --- tables -------------------------------------------------------------------------------------------------------


def gaps(rows: Sequence[Row]) -> str:
    """The score: forget F1 and test F1 minus the gold's, sentences of all runs pooled."""
    body = []
    for (data, what), own in _grouped([r for r in rows if r["data"] != "classics"]).items():
        for method in _methods(own):
            found, test = pooled.gap(own[method]), pooled.gap(own[method], "test")
            inside = found is not None and max(abs(found[1]), abs(found[2])) <= EQUIVALENT
            kept = [r.get("admissible") for r in own[method] if r["kept"] is not None or r.get("checks")]
            stopped = f"{sum(map(bool, kept))}/{len(kept)}" if kept else "no rule"
            body.append([
                NAMES[data].split(" (")[0], what, _title(method), str(len(own[method])), str(found[3]) if found else "",
                _points(found), "yes" if inside else "no", _points(test), stopped,
            ])  # fmt: skip
    head = ["data", "forgotten", "method", "runs", "rows", "forget F1 - gold's", "within 3", "test F1 - gold's", "stop"]
    return _table(head, body) if body else ""


def comparisons(rows: Sequence[Row]) -> str:
    """Whether DeepCUT, or what came nearest, is nearer to the gold than another method, on splits that both ran on."""
    body = []
    for (data, what), own in _grouped([r for r in rows if r["data"] != "classics"]).items():
        for ours, method in itertools.product((m for m in COMPARED if m in own), _methods(own)):
            at = [{(r["split"], r["seed"]): r for r in own[m]} for m in (ours, method)]
            shared = sorted(set(at[0]) & set(at[1]))
            found = pooled.nearer(*([part[key] for key in shared] for part in at)) if ours != method else None
            if found is None or (method in COMPARED and COMPARED.index(method) < COMPARED.index(ours)):
                continue
            verdict = f"{_title(ours)} nearer" if found[2] < 0 else "further" if found[1] > 0 else "not told apart"
            name = NAMES[data].split(" (")[0]
            body.append([name, what, _title(ours), _title(method), str(len(shared)), _points(found), verdict])
    head = ["data", "forgotten", "method", "against", "runs", "difference of absolute gaps, points", ""]
    return _table(head, body) if body else ""


def costs(rows: Sequence[Row]) -> str:
    """Seconds of unlearning beside those of retraining."""
    body = []
    for (data, what), own in _grouped(rows).items():
        for method in _methods(own):
            cells = []
            for kind in ("cpu", "wall"):
                mine = [r["cost"][kind] for r in own[method]]
                share = [r["cost"][kind] / max(r["gold_cost"][kind], 1e-9) for r in own[method]]
                cells += [_number(mine, 0), _number(share, 2)]
            body.append([NAMES[data].split(" (")[0], what, _title(method), *cells])
    head = ["data", "forgotten", "method", "CPU s", "of retraining", "wall s", "of retraining"]
    return _table(head, body) if body else ""


def sections(rows: Sequence[Row], columns: Mapping[str, str] = COLUMNS) -> str:
    """A table for each data set and kind of forget set: original, gold, methods; mean over runs and deviation."""
    parts = []
    for (data, what), own in _grouped(rows).items():
        every = [r for found in own.values() for r in found]
        body = []
        for role in ("original", "gold"):
            first = {(r["split"], r["seed"]): r for r in every}.values()
            body.append([f"**{role}**", str(len(first)), *_cells(list(first), columns, role)])
        body += [[_title(m), str(len(own[m])), *_cells(own[m], columns)] for m in _methods(own)]
        count = statistics.mean(r["forgotten"] for r in every)
        title = f"### {NAMES[data]}: {what} ({count:.0f} rows a run)"
        parts.append(f"{title}\n\n{_table(['model', 'runs', *columns], body)}")
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row], columns: Mapping[str, str], role: str = "unlearned") -> list[str]:
    return [_number(value(r, metric, role) for r in rows) for metric in columns.values()]


def shipped(rows: Sequence[Row]) -> str:
    """The recipe as it ships, between its original and its gold."""
    body = []
    for row in rows:
        own, what = _points(pooled.gap([row])), _what(row["split"])
        original, now = value(row, "retain_f1", "original"), value(row, "retain_f1")
        share = f"{now / original:.3f}" if now is not None and original else "not shown"
        now_is = f"{_title(row['method'])} as shipped"
        for role, name in (("original", "**original**"), ("gold", "**gold**"), ("unlearned", now_is)):
            mine = [own, share] if role == "unlearned" else ["", ""]
            body.append([what, name, *mine, *_cells([row], COLUMNS, role)])
    head = ["forgotten", "model", "forget F1 - gold's", "retain F1 / original's", *COLUMNS]
    return _table(head, body) if body else ""


def relearned(rows: Sequence[Row]) -> str:
    """How fast what was forgotten comes back, beside its original and its gold."""
    columns = {
        "forget F1": "forget_f1",
        "probability, relearned": "relearned_probability",
        "F1, relearned": "relearned_f1",
    }
    body = [[f"**{role}**", *_cells(rows[:1], columns, role)] for role in ("original", "gold") if rows]
    body += [[_title(row["method"]), *_cells([row], columns)] for row in rows]
    return _table(["model", *columns], body) if rows else ""


def others(rows: Sequence[Row]) -> str:
    """The models of all but a part, each made to forget by what the others say of what it alone saw."""
    names = {"original": "**before**", "gold": "**gold of each**", "unlearned": "after"}
    body = []
    for role, name in names.items():
        mine = [_points(pooled.gap(rows, side)) if role == "unlearned" else "" for side in ("forget", "test")]
        body.append([name, str(len(rows)), *mine, *_cells(rows, COLUMNS, role)])
    head = ["models", "runs", "forget F1 - gold's", "test F1 - gold's", *COLUMNS]
    return _table(head, body) if rows else ""


def varied(rows: Sequence[Row], group: str) -> str:
    """A method on WNUT17 at 5 % with one thing changed, beside the gold and the setting that was tuned."""
    found = [r for r in rows if r["group"] == group]
    methods = {r["method"] for r in found}
    tuned = [
        r for r in rows
        if r["group"] == "main" and (r["data"], r["split"], r["seed"]) == ("wnut17", "random05-0", 0)
        and r["method"] in methods
    ]  # fmt: skip
    if not found:
        return ""
    body = [["**gold**", "", "", *_cells(found[:1], COLUMNS, "gold")]]
    for row in sorted([*tuned, *found], key=lambda r: r["method"]):
        step = "no rule" if not row.get("checks") else "none" if row["kept"] is None else str(row["kept"])
        own = _points(pooled.gap([row]))
        body.append([f"{row['method']}: {row['label'] or 'as tuned'}", own, step, *_cells([row], COLUMNS)])
    return _table(["change", "forget F1 - gold's", "kept step", *COLUMNS], body)


def batches(rows: Sequence[Row]) -> str:
    """What the batches of a run held, means over its steps that forget."""
    shown = [r for r in rows if (r.get("monitor") or {}).get("deepcut/anchors") and r["seed"] == 0]
    body = []
    for r in shown:
        if r["group"] not in ("main", "composition") or (r["split"].startswith("random01") and r["split"][-1] != "0"):
            continue
        m = r["monitor"]
        keys = ("anchors", "skipped", "without_same", "without_other")
        cells = [f"{m[f'deepcut/{k}']:.2f}" if f"deepcut/{k}" in m else "not shown" for k in keys]
        name = NAMES[r["data"]].split(" (")[0]
        body.append([name, _what(r["split"]), r["label"] or _title(r["method"]), *cells])
    head = ["data", "forgotten", "run", "anchors", "skipped", "share without same class", "without other class"]
    return _table(head, body) if body else ""


def tuned(trials: Mapping[str, Row]) -> str:
    """What the trials of each method chose."""
    body = []
    for name, found in trials.items():
        best = ", ".join(f"{k.split('.')[-1]} {_setting(v)}" for k, v in found["best"].items())
        body.append([name, best, ", ".join(f"{t['distance']:.3f}" for t in found["trials"]), found["commit"]])
    return _table(["data and method", "chosen", "distances of the trials", "engine"], body) if body else ""


def _setting(value: Any) -> str:
    """A number, or the terms that were tried."""
    return " and ".join(value) if isinstance(value, Mapping) else f"{value:g}"


def status(rows: Sequence[Row], missing: Sequence[Planned]) -> str:
    """How much of the study is in the page."""
    head = f"**Status.** {len(rows)} rows"
    if not missing:
        return f"{head}; none is missing."
    procedures = ", ".join(m for m in PROCEDURES)
    return f"{head}; {len(missing)} are not run yet (they follow in the order of `rows.py`; {procedures} included)."
