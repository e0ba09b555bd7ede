"""From the ledgers of the study to docs/results/requests.md and its JSON twin."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from study import ARMS, BESIDE, Study

from excise import ledger

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
Curve = dict[str, dict[str, dict[str, Any]]]
NOT_YET = "not run yet"


def curve(study: Study, arm: str) -> Curve:
    """Event -> request -> its numbers on the model as it was then."""
    folder = study.out / "arms" / arm
    found: Curve = {}
    if arm in BESIDE:
        for path in sorted(folder.glob("[0-9]*.json"), key=lambda p: int(p.stem)):
            found["begin" if path.stem == "0" else f"people-{path.stem}"] = json.loads(path.read_text())
        return found
    if not (folder / ledger.NAME).is_file():
        return found
    names: dict[int, str] = {}
    for entry in ledger.read(folder):
        if entry["event"] == "ended" and entry["taken"]:
            names[entry["n"]] = entry["request"]
            found.setdefault(entry["request"], {})[entry["request"]] = entry["numbers"]
        elif entry["event"] == "update":
            names[entry["n"]] = entry["update"]
        elif entry["event"] == "reverified":
            found.setdefault(names[entry["on"]], {})[entry["request"]] = entry["numbers"]
    return found


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def summary(study: Study, arm: str) -> dict[str, Any]:
    """What the headline table says of an arm: forgotten rows at once, at the end, and by how much they rose."""
    found = curve(study, arm)
    key = "forget_probability"
    at_once = {r: own[r][key] for r, own in found.items() if r in own}
    rises: dict[str, list[float]] = {"request": [], "people": []}
    before: dict[str, float] = {}
    for event, own in found.items():
        for request, numbers in own.items():
            if request in before and request != event and event != "begin":
                rises[event.split("-")[0]].append(numbers[key] - before[request])
            before[request] = numbers[key]
    last = list(found.values())[-1] if found else {}
    end = study.out / "arms" / arm / "end.json"
    own = (json.loads(end.read_text()) if end.is_file() else {}) or {}
    model = own.get("unlearned") or own.get("original") or {}
    return {
        "at once": _mean(list(at_once.values())), "at the end": _mean([n[key] for n in last.values()]),
        "rise by a request": _mean(rises["request"]), "rise by new people": _mean(rises["people"]),
        "highest": max((n[key] for part in found.values() for n in part.values()), default=None),
        "kept": _mean([n["retain_probability"] for n in last.values() if n.get("retain_probability") is not None]),
        "relearned": (model.get("relearned_probability") or {}).get("value"),
    }  # fmt: skip


def write(study: Study, *, docs: bool) -> None:
    """Write the page and its twin: into the docs, or beside the ledgers of a quick look."""
    folder = DOCS if docs else study.out
    folder.mkdir(parents=True, exist_ok=True)
    arms = [*BESIDE, *ARMS]
    twin = {"study": json.loads((study.out / "study.json").read_text()),
            "arms": {arm: {"summary": summary(study, arm), "curve": curve(study, arm)} for arm in arms}}  # fmt: skip
    (folder / "requests.json").write_text(json.dumps(twin, indent=1) + "\n", encoding="utf-8")
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    if not docs:
        head, _, rest = text.partition("<<FINDINGS>>")
        text = head + "_Not the whole study: see the tables._\n" + rest.partition("<<END>>")[2]
    tables = {"FINDINGS": "", "END": "", "SUMMARY": _summary(study, arms), "CURVES": _curves(study, arms),
              "COMMIT": twin["study"]["commit"]}  # fmt: skip
    for name, table in tables.items():
        text = text.replace(f"<<{name}>>", table)
    (folder / "requests.md").write_text(text, encoding="utf-8")


def _cell(value: float | None) -> str:
    return NOT_YET if value is None else f"{value:.4f}"


def _summary(study: Study, arms: list[str]) -> str:
    rows = {arm: summary(study, arm) for arm in arms}
    heads = list(next(iter(rows.values())))
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for arm, own in rows.items():  # nothing is forgotten at once where nothing is forgotten
        shown = ["" if v is None and arm in BESIDE and h in ("at once", "rise by a request") else _cell(v)
                 for h, v in own.items()]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _curves(study: Study, arms: list[str]) -> str:
    """After each event: the mean likelihood of the rows of all requests that were carried out by then."""
    curves = {arm: curve(study, arm) for arm in arms}
    lines = [f"| after | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for kind, number in [("begin", 0), *study.events()]:
        event = "begin" if kind == "begin" else f"{kind}-{number}"
        cells = []
        for arm in arms:
            own = curves[arm].get(event, {})
            cells.append(f"{statistics.mean(n['forget_probability'] for n in own.values()):.4f}" if own else "")
        lines.append(f"| {event} | {' | '.join(cells)} |")
    return "\n".join(lines)
