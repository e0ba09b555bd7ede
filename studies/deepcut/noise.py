"""How much chance moves the statistics of the stopping rule where nothing is left to forget.

    python studies/deepcut/noise.py --encoder DIR [--out DIR] [--draws N]

Rows that the original never saw are drawn at random as if they were forgotten, and held against others of them: what a
rule without noise would call 1/2 or 0. ``--encoder`` and ``--out`` as for `run.py`, whose original is used (and made,
if it is not there). Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import scoring
from run import SIZES
from study import Study

from excise import models, recipe
from excise.commands import watching
from excise.commands.starting import sides
from excise.matched import matched_auc, matched_gap
from excise.metrics.table import Table
from excise.tasks import class_maps, token_classification

TASK = "token_classification"
#: Sentences that are taken as forgotten, and those that they are held against.
SIZES_OF_DRAWS = ((60, 100), (60, 200), (120, 200))


def main() -> None:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "deepcut")
    parser.add_argument("--draws", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study, how = Study(given.out, given.encoder, SIZES["whole"]), sides.encoding(recipe.Data())
    place, records = study.original("wnut17")[0], study.sides("wnut17")
    unseen, tokenizer = [*records["never_seen"], *records["calibration"]], models.load_tokenizer(str(place), task=TASK)
    names = tuple(models.load(recipe.Model(name=str(place), task=TASK)).config.id2label.values())
    said = {"unseen": scoring.logits_of(place, unseen, TASK, how)}
    table = scoring.tables(said, {"unseen": unseen}, names)["unseen"]
    new, old = (
        token_classification.encode_records(own, tokenizer, how, names=names) for own in (unseen, records["train"])
    )
    rows = sides.Rows({"retain": old, "forget": new, sides.CALIBRATION: new}, tokenizer.pad_token_id, TASK)
    spread(table, rows, watching.types(class_maps(names, TASK)["class_map/type"].numpy()), given.draws)


def spread(table: Table, rows: sides.Rows, types: watching.KindsOf, draws: int) -> None:
    """Standard deviations over draws, a line for each size, for types whole and as the rule takes them apart."""
    print("| forgotten | held against | compared within | sd of the hit rate | of auc | of gap |")
    print("|---|---|---|---|---|---|")
    for some, others in SIZES_OF_DRAWS:
        for what in ("type", "type and standing"):
            rng, seen = np.random.default_rng(0), []
            for _ in range(draws):
                order = rng.permutation(table.rows).tolist()
                chosen = {"forget": order[:some], sides.CALIBRATION: order[some : some + others]}
                of = types if what == "type" else watching.familiar(rows, chosen, types)
                seen.append(statistics(table, rows, chosen, of))
            print(f"| {some} | {others} | {what} | " + " | ".join(f"{v:.3f}" for v in np.std(seen, axis=0)) + " |")


def statistics(
    table: Table, rows: sides.Rows, chosen: dict[str, list[int]], of: Callable
) -> tuple[float, float, float]:
    """Hit rate of the drawn entity tokens, and both statistics of the rule."""
    kinds = np.array([k for example in rows.examples["forget"] for k in of(example)])
    owner = np.repeat(table.columns["row"], table.lengths)
    a, b = (np.isin(owner, own) & (kinds > 0) for own in (chosen["forget"], chosen[sides.CALIBRATION]))
    logp = table.columns["logp"]
    both = (logp[a], kinds[a], logp[b], kinds[b])
    return float(table.columns["hit"][a].mean()), matched_auc(*both), matched_gap(*both)


if __name__ == "__main__":
    main()
