"""The gold study: which piece of the default recipe decides which instrument, beside two golds as the noise; resumable.

    python studies/gold/run.py [--out DIR] [--tiny DIR] [--quick] [--only REGEX] [--max-minutes M] [--page]

Rows are run folders below ``--out``; a row whose results are there is not run again. ``--tiny`` is a folder of
tofu-tiny's data and models that another study has trained (default ``OUT/tiny``: trained where they are missing).
``--page`` writes ``docs/results/gold.md`` and its JSON twin from whatever rows exist. ``--quick`` is a first look at a
smaller world; its page lies beside its rows. Rows of the evidence study with the same settings can be shared: give
both the same ``--out``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "evidence"))

import matched
from rowwise import arguments, collect, run_rows
from study import SIZES, STRANGER, Row, Size, Study

import seven

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "results"
_CLREG = {"clreg": {"temperature": 0.5, "weight": 1.0, "dropout": 0.1}}
PUBLISHED = ("simnpo+clreg", "ihl+rila")
_LOOSER = {"optimiser.weight_decay": 3.0, "objective.retain.anchor.weight": 90.0}
#: The row `default` as it was when most leave-outs were made; not run by this command any more.
EARLIER = "default of the earlier engine"
#: What is left out, or put in its place: recipe keys with their values.
PIECES: Mapping[str, Mapping[str, Any]] = {
    "never-seen rows chosen by a small model": {"data.never_saw": STRANGER},
    "less decay, a stronger anchor": _LOOSER,
    "both of these": {"data.never_saw": STRANGER, **_LOOSER},
    "KL on never-seen rows as well": {"objective.retain.kl": {"side": "never_seen", "weight": 4.0}},
    "all never-seen rows at each refresh": {"objective.forget.quantile.refresh_rows": 0},
    "without the reset of embedding rows": {"edit.reset_rows": None},
    "without quantile matching (IHL)": {"objective.forget": {"ihl": {}}},
    "without the anchor": {"objective.retain": {"nll": {"weight": 4.0}}},
    "without latent matching": {"objective.regularise": {}},
    "without the stopping rule": {"stop.rule": "none"},
    "without preconditioning": {"initialise": {}, "optimiser.weight_decay": 0.0},
    "CLReg for latent matching": {"objective.regularise": _CLREG},
    "the rate that it ships with": {"optimiser.lr": 1e-3},
    "updates in RILA's subspace (rank 16)": {"initialise": {"preconditioned": {"ridge": 0.1, "rank": 16}}},
    "an adapter started by RILA": {
        "model.lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "statistics.rows": 200,
        "initialise": {"rila": {"beta": 0.5}},
        "edit.reset_rows": None,
        "optimiser.lr": 3e-3,
        "optimiser.weight_decay": 0.0,
    },
}


def rows(size: Size) -> Iterator[Row]:
    """Every row, the most telling first."""
    yield Row("gold2", size.split)
    yield Row("default", size.split)
    pieces = list(PIECES.items())[:2] if size is SIZES["quick"] else PIECES.items()
    for label, changes in pieces:
        yield Row("default", size.split, label=label, changes=dict(changes))
    if size is SIZES["quick"]:
        return
    for method in PUBLISHED:
        yield Row(method, size.split)
    chosen = list(PIECES.items())[:3]
    for split in ("forget05", "forget01"):
        yield from (Row(method, split) for method in ("gold2", "default", *PUBLISHED))
        yield from (Row("default", split, label=label, changes=dict(changes)) for label, changes in chosen)
    for seed in (1, 2):
        yield Row("default", size.split, seed)
        for label, changes in PIECES.items():
            yield Row("default", size.split, seed, label=label, changes=dict(changes))


def write(found: Sequence[Mapping[str, Any]], out: Path, *, docs: bool) -> None:
    """The page and its JSON twin: one table a split, every piece left out in turn."""
    import page

    wanted = [r for r in found if r["method"] in ("gold2", "default", *PUBLISHED)]
    folder = DOCS if docs else out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gold.json").write_text(json.dumps(page.slim(wanted), indent=1) + "\n", encoding="utf-8")
    text = (HERE / "page.md.txt").read_text(encoding="utf-8")
    parts = {
        "TABLES": "\n\n".join(_tables(wanted)) or "_No row has been run._", "ROWS": str(len(wanted)),
        "MATCHED": matched.table(out), "COMMITS": ", ".join(sorted({str(r["commit"]) for r in wanted})),
    }  # fmt: skip
    for name, part in parts.items():
        text = text.replace(f"<<{name}>>", part)
    (folder / "gold.md").write_text(text, encoding="utf-8")


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    order = ["gold2", "default", EARLIER, *PIECES, *PUBLISHED]
    for split, share in (("forget10", "10 %"), ("forget05", "5 %"), ("forget01", "1 %")):
        own = sorted(
            (r for r in rows if r["split"] == split), key=lambda r: (order.index(r["label"] or r["method"]), r["seed"])
        )
        second = next((r["metrics"]["unlearned"] for r in own if r["method"] == "gold2"), None)
        if second is None:
            continue
        lines = []
        for row in own:
            name = (row["label"] or row["method"]) + (f" (seed {row['seed']})" if row["seed"] else "")
            cells = {"value": [seven.cost(row)]}
            lines.append((name, {**row["metrics"]["unlearned"], "cells": cells}))
        table = seven.table(lines, own[0]["metrics"]["gold"], second, (seven.COST,))
        yield f"### {share} forgotten\n\n{table}"


def main() -> None:
    """Run what is missing, then write the page."""
    given = arguments(__doc__)
    out = given.out or Path("studies-out") / ("gold" if given.size == "tiny" else "gold-quick")
    study = Study(out.resolve(), SIZES[given.size], given.tiny)
    if not given.page:
        run_rows(study, rows(study.size), given)
    write(collect(study.out), study.out, docs=given.size == "tiny")


if __name__ == "__main__":
    main()
