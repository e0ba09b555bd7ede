"""How easy the forgotten rows are beside the never-seen ones that training and the stopping rule read.

    python studies/gold/matched.py [--out DIR] [--tiny DIR]

A model that never saw either finds a forgotten row the likelier one in some share of pairs; one half would mean that
the never-seen rows show where unlearning should end. Here that share is read by the gold and by a second gold, with all
never-seen rows and with those that `data.never_saw` leaves when a small model (`stranger-SPLIT`) chooses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "evidence"))

from methods import METHODS
from study import SIZES, STRANGER, Study

from excise import models
from excise.alike import alike
from excise.commands.measuring.evaluation import load_for_measuring
from excise.commands.starting import sides
from excise.commands.watching import row_likelihoods
from excise.metrics.statistics import auc

SPLITS = {"tune05": "five (86-90)", "forget05": "five (196-200)", "forget10": "ten (191-200)"}
READ = {sides.CALIBRATION: "the stopping rule's", sides.TRAINING: "the objective's"}
#: The forgotten rows take turns in an order that is drawn: how much depends on it.
ORDERS = range(5)


def measure(study: Study) -> list[dict[str, Any]]:
    """One object for each split and side; kept below the study's folder."""
    done = study.out / "matched.json"
    if not done.is_file():
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps([found for split in SPLITS for found in _of(study, split)], indent=1) + "\n")
    return list(json.loads(done.read_text()))


def _of(study: Study, split: str) -> Iterator[dict[str, Any]]:
    likelihoods = {kind: _likelihoods(study, kind, split) for kind in ("gold", "gold2", STRANGER)}
    for side in READ:
        small = likelihoods[STRANGER]
        chosen = [alike(small["forget"], small[side], seed=seed) for seed in ORDERS]
        yield {
            "split": split, "side": side, "rows": len(small[side]), "chosen": [len(rows) for rows in chosen],
            **{
                kind: {
                    "all": float(auc(own["forget"], own[side])),
                    "chosen": [float(auc(own["forget"], own[side][rows])) for rows in chosen],
                }
                for kind, own in likelihoods.items()
            },
        }  # fmt: skip


def _likelihoods(study: Study, kind: str, split: str) -> Mapping[str, Any]:
    settings = study.recipe(METHODS["default"], split)
    given = sides.of(settings)
    model, tokenizer = load_for_measuring(study.model(f"{kind}-{split}"), settings)
    wanted = ["forget", *READ]
    rows = sides.encode(
        given, wanted, tokenizer, settings.data, seed=settings.seed, context=models.context_length(model)
    )
    return {side: row_likelihoods(model, rows, side) for side in wanted}


def table(out: Path) -> str:
    """Markdown: the share of pairs by the gold and a second gold, before and after the choice."""
    if not (out / "matched.json").is_file():
        return "_Not run._"
    head = ["authors", "rows", "all: n", "gold", "second gold", "chosen: n", "gold", "second gold", "the small model"]
    body = [head, ["---"] * len(head)]
    for found in json.loads((out / "matched.json").read_text()):
        kinds = ("gold", "gold2")
        body.append([
            SPLITS[found["split"]], READ[found["side"]], str(found["rows"]), *(f"{found[k]['all']:.3f}" for k in kinds),
            _span(found["chosen"], 0), *(_span(found[k]["chosen"], 3) for k in kinds),
            f"{found[STRANGER]['all']:.3f} -> {_span(found[STRANGER]['chosen'], 3)}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "gold", help="the study's folder")
    parser.add_argument("--tiny", type=Path, help="folder of tofu-tiny's data and models (default OUT/tiny)")
    given = parser.parse_args()
    measure(Study(given.out.resolve(), SIZES["tiny"], given.tiny))
    print(table(given.out))


if __name__ == "__main__":
    main()
