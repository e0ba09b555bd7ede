"""How much chance moves the statistics of the stopping rule where nothing is left to forget, and what takes it away.

    python studies/deepcut/noise.py --encoder DIR [--out DIR] [--draws N]

Rows that the original never saw are drawn at random as if they were forgotten, and held against others of them: what a
rule without noise would call 1/2 or 0. Then the same less what other models say that never saw them: two models of half
of the data, each alone or row by row in turn (`data.never_saw`), and a gold. A second table: on the reported draws at
5 %, how far apart each gold finds forgotten sentences and the rule's, and how far the halves do. ``--encoder`` and
``--out`` as for `run.py`, whose models are used (and made, if they are not there). Prints both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import scoring
from rows import ON, PARTS
from run import SIZES
from study import Study

from excise import models, recipe
from excise.commands import kinds, matching, watching
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.matched import matched_auc, matched_gap
from excise.metrics import entities
from excise.metrics.table import Table
from excise.tasks import class_maps, token_classification

TASK = "token_classification"
#: Sentences that are taken as forgotten, and those that they are held against.
SIZES_OF_DRAWS = ((12, 200), (60, 100), (60, 200), (120, 200))


def main() -> None:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "deepcut")
    parser.add_argument("--draws", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study, how = Study(given.out, given.encoder, SIZES["whole"]), sides.encoding(recipe.Data())
    records, halves = study.sides("wnut17"), [place for place, _ in study.strangers("wnut17", PARTS["halves"])]
    places = {"original": study.original("wnut17")[0], "half": halves[0], "other half": halves[1],
              "gold": study.gold("wnut17", "random05-0", 0)[0]}  # fmt: skip
    unseen, tokenizer = (
        [*records["never_seen"], *records["calibration"]],
        models.load_tokenizer(str(halves[0]), task=TASK),
    )
    names = tuple(models.load(recipe.Model(name=str(halves[0]), task=TASK)).config.id2label.values())
    said = {name: scoring.logits_of(place, unseen, TASK, how) for name, place in places.items()}
    tables = scoring.tables(said, dict.fromkeys(said, unseen), names)
    new, old = (
        token_classification.encode_records(own, tokenizer, how, names=names) for own in (unseen, records["train"])
    )
    rows = sides.Rows({"retain": old, "forget": new, sides.CALIBRATION: new}, tokenizer.pad_token_id, TASK)
    spread(tables, rows, kinds.types(class_maps(names, TASK)["class_map/type"].numpy()), given.draws)
    foreseen(study, [str(place) for place in halves], names)


def foreseen(study: Study, halves: list[str], names: tuple[str, ...]) -> None:
    """For each reported draw where the rule begins to count if its gold is asked, and if the halves are."""
    print("\n| draw | gap, gold's | halves' | F1 apart, gold's | halves' |\n|---|---|---|---|---|")
    of = kinds.types(class_maps(names, TASK)["class_map/type"].numpy())
    for draw in ON:
        found = []
        for asked in ([str(study.gold("wnut17", f"random05-{draw}", draw)[0])], halves):
            settings = study.recipe("wnut17", f"random05-{draw}", "deepcut", {"data.never_saw": asked}, seed=draw)
            given, tokenizer = sides.of(settings), models.load_tokenizer(halves[0], task=TASK)
            matching.match(settings, given, Progress(quiet=True))
            rows = sides.encode(
                given, ["forget", sides.CALIBRATION, "retain"], tokenizer, settings.data, seed=draw, context=None,
                task=TASK, classes=names,
            )  # fmt: skip
            chosen = {side: range(rows.counts[side]) for side in ("forget", sides.CALIBRATION)}
            own, strict = kinds.familiar(rows, chosen, of), entities.scheme(names)
            found.append(watching.beginning(rows, chosen, own, given.unseen, strict, names))
        print(
            f"| {draw} | " + " | ".join(f"{own[what]:+.3f}" for what in ("gap", "f1") for own in found) + " |",
            flush=True,
        )


def spread(tables: Mapping[str, Table], rows: sides.Rows, types: kinds.KindsOf, draws: int) -> None:
    """Standard deviations over draws, a line for each size, for types whole and as the rule takes them apart."""
    table = tables["original"]
    owner = np.repeat(table.columns["row"], table.lengths)
    logp = {name: own.columns["logp"] for name, own in tables.items()}
    logp["in turn"] = np.where(owner % 2, logp["other half"], logp["half"])
    others = [name for name in (*tables, "in turn") if name != "original"]
    print("| forgotten | held against | compared within | sd of the hit rate | of auc | of gap | "
          + " | ".join(f"of gap less {name}'s" for name in others) + " |")  # fmt: skip
    print("|---" * (6 + len(others)) + "|")
    for some, many in SIZES_OF_DRAWS:
        for what in ("type", "type and standing"):
            rng, seen = np.random.default_rng(0), []
            for _ in range(draws):
                order = rng.permutation(table.rows).tolist()
                chosen = {"forget": order[:some], sides.CALIBRATION: order[some : some + many]}
                of = types if what == "type" else kinds.familiar(rows, chosen, types)
                kind = np.array([k for example in rows.examples["forget"] for k in of(example)])
                a, b = (np.isin(owner, own) & (kind > 0) for own in chosen.values())
                auc, gap = (how(*_both(logp["original"], kind, a, b)) for how in (matched_auc, matched_gap))
                less = [gap - matched_gap(*_both(logp[name], kind, a, b)) for name in others]
                seen.append((float(table.columns["hit"][a].mean()), auc, gap, *less))
            print(f"| {some} | {many} | {what} | " + " | ".join(f"{v:.3f}" for v in np.std(seen, axis=0)) + " |")


def _both(logp: NDArray, kind: NDArray, a: NDArray, b: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    return logp[a], kind[a], logp[b], kind[b]


if __name__ == "__main__":
    main()
