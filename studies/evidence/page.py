"""The page of the evidence study and its JSON twin, written from rows alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import METHODS

import seven

Row = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs" / "results"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- evidence: written by studies/evidence/run.py -->", "<!-- end -->"


def write(rows: Sequence[Row], out: Path, *, docs: bool) -> None:
    """Write the page and its twin: into the documentation, or for a quick study beside its rows."""
    folder = DOCS if docs else out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence.json").write_text(json.dumps(slim(rows), indent=1) + "\n", encoding="utf-8")
    text = (Path(__file__).parent / "page.md.txt").read_text(encoding="utf-8")
    parts = {
        "TABLES": "\n\n".join(tables(rows)) or "_No row has been run._",
        "ATTACKS": attacks(rows) or "_No attack has been run._",
        "VERDICTS": verdicts(rows) or "_No verdict has been given._",
        "COMMITS": ", ".join(sorted({str(r["commit"]) for r in rows})),
        "ROWS": str(len(rows)),
    }
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (folder / "evidence.md").write_text(text, encoding="utf-8")
    if docs:
        _headline(rows)


def _headline(rows: Sequence[Row]) -> None:
    """Put the first split's table of one seed into the README, between its marks."""
    own = [r for r in rows if r["split"] == "forget10" and r["seed"] == 0]
    before, mark, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if mark and end and own:
        table = tables(own)[0].partition("\n\n")[2]
        README.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")


def slim(rows: Sequence[Row]) -> list[Row]:
    """What the page reads and a reader may check: without numbers of every layer and group."""
    wanted = {i.metric for i in seven.INSTRUMENTS} | {"forget_probability", "forget_rouge", "forget_repetition",
                                                      "mia_loss_auc", "model_utility", "entanglement"}  # fmt: skip
    out = []
    for row in rows:
        metrics = {
            role: {k: v for k, v in own.items() if k.partition("/")[0] in wanted}
            for role, own in row["metrics"].items()
        }
        out.append({**row, "metrics": metrics})
    return out


def tables(rows: Sequence[Row]) -> list[str]:
    """One table a split: its models on the seven instruments beside gold and second gold."""
    found, order = [], ["gold2", *reversed(METHODS), "original"]
    for split, share in (("forget10", "10 %"), ("forget05", "5 %"), ("forget01", "1 %")):
        own = [r for r in rows if r["split"] == split and not r["label"]]
        second = next((r["metrics"]["unlearned"] for r in own if r["method"] == "gold2"), None)
        if second is None:
            continue
        gold = own[0]["metrics"]["gold"]
        lines = []
        for row in sorted(own, key=lambda r: (order.index(r["method"]), r["seed"])):
            cells = {"value": [_outcome(row), seven.cost(row)]}
            name = row["method"] + (f" (seed {row['seed']})" if row["seed"] else "")
            lines.append((name, {**row["metrics"]["unlearned"], "cells": cells}))
        found.append(f"### {share} forgotten\n\n" + seven.table(lines, gold, second, ("verdict", seven.COST)))
    return found


def _outcome(row: Row) -> str:
    return str(row.get("outcome", ""))


#: How a test came out, in a table of many.
_SIGNS = {"passed": "+", "failed": "**-**", "not shown": "?"}


def verdicts(rows: Sequence[Row]) -> str:
    """Every test that was made, by model: how it came out."""
    judged = [r for r in rows if r.get("verdict") and r["seed"] == 0]
    tests = [{t["key"]: t for t in row["verdict"]["tests"]} for row in judged]
    keys = [k for k in dict.fromkeys(k for own in tests for k in own) if any(own[k]["measured"] for own in tests)]
    required = {k for own in tests for k, test in own.items() if test["role"] == "required"}
    body = [[key + (" (required)" if key in required else ""), *(_SIGNS[own[key]["outcome"]] for own in tests)]
            for key in keys]  # fmt: skip
    body.append(["**verdict**", *(str(row["outcome"]) for row in judged)])
    return _markdown(["", *(_name(row) for row in judged)], body) if judged else ""


def attacks(rows: Sequence[Row]) -> str:
    """Every attack at the budget that found most: the forgotten rows' value, the gold's under the same in brackets."""
    attacked = [r for r in rows if r.get("attacks") and r["seed"] == 0]
    names = dict.fromkeys(k.rpartition("/")[0] for r in attacked for k in r["attacks"]["unlearned"] if _of_attack(k))
    return _markdown(["attack", *(_name(r) for r in attacked)],
                     [[name.removeprefix("attack/"), *(_worst(r, name) for r in attacked)] for name in names],
                     ) if attacked else ""  # fmt: skip


def _of_attack(name: str) -> bool:
    return name.startswith("attack/")


def _worst(row: Row, attack: str) -> str:
    """The largest value of an attack's budgets, and the gold's at that budget."""
    found = {k: v["value"] for k, v in row["attacks"]["unlearned"].items()
             if k.rpartition("/")[0] == attack and v["value"] is not None}  # fmt: skip
    if not found:
        return ""
    name = max(found, key=lambda k: found[k])
    gold = row["attacks"].get("gold", {}).get(name, {}).get("value")
    budget = name.rpartition("/")[2]
    return f"{found[name]:.3f}" + ("" if gold is None else f" ({gold:.3f})") + f" at {budget}"


def _name(row: Row) -> str:
    return f"{row['method']} {row['split'].removeprefix('forget').lstrip('0')} %"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(head), ["---"] * len(head), *body])
