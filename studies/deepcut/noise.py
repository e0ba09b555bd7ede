"""How much chance moves the statistics of the stopping rule where nothing is left to forget.

    python studies/deepcut/noise.py --encoder DIR [--out DIR] [--draws N]

Rows that the original never saw are drawn at random as if they were forgotten, and held against others of them: what a
rule without noise would call 1/2 or 0. ``--encoder`` and ``--out`` as for `run.py`, whose original is used (and made,
if it is not there). Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import scoring
from run import SIZES
from study import Study

from excise import models, recipe
from excise.commands.starting import sides
from excise.metrics import entities
from excise.metrics.class_scores import entity_tokens
from excise.metrics.table import Table
from excise.records import Record
from excise.stopping import matched_auc, matched_gap

#: Sentences that are taken as forgotten, and those that they are held against.
SIZES_OF_DRAWS = ((60, 100), (60, 200), (120, 200))


def standings(
    records: Sequence[Record], retained: Sequence[Record], of: entities.Scheme, classes: Sequence[str]
) -> list[int]:
    """Of each entity token 0 where retained rows hold its word as that type, 1 as something else, 2 not at all."""
    types = {name: int(kind) for name, kind in zip(classes, of.type_of, strict=True)}
    known: dict[str, set[int]] = {}
    for row in retained:
        for word, tag in zip(row.tokens, row.tags, strict=True):
            known.setdefault(word.lower(), set()).add(types[tag])
    found = []
    for row in records:
        for word, tag in zip(row.tokens, row.tags, strict=True):
            if types[tag] >= 0:
                own = known.get(word.lower())
                found.append(2 if own is None else 0 if types[tag] in own else 1)
    return found


def main() -> None:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "deepcut")
    parser.add_argument("--draws", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(given.out, given.encoder, SIZES["whole"])
    place, rows = study.original("wnut17")[0], study.sides("wnut17")
    unseen = {"unseen": [*rows["never_seen"], *rows["calibration"]]}
    names = tuple(models.load(recipe.Model(name=str(place), task="token_classification")).config.id2label.values())
    said = {"unseen": scoring.logits_of(place, unseen["unseen"], "token_classification", sides.encoding(recipe.Data()))}
    table = scoring.tables(said, unseen, names)["unseen"]
    spread(table, standings(unseen["unseen"], rows["train"], entities.scheme(names), names), given.draws)


def spread(table: Table, standing: Sequence[int], draws: int) -> None:
    """Standard deviations over draws, a line for each size and for types whole and taken apart."""
    take, kinds = entity_tokens(table), entities.scheme(table.classes).type_of[table.columns["gold_class"]]
    owner = np.repeat(table.columns["row"], table.lengths)[take]
    logp, hits, types = table.columns["logp"][take], table.columns["hit"][take], kinds[take]
    print("| forgotten | held against | compared within | sd of the hit rate | of auc | of gap |")
    print("|---|---|---|---|---|---|")
    for some, others in SIZES_OF_DRAWS:
        for what, of in (("type", types), ("type and standing", 3 * types + np.asarray(standing))):
            rng, seen = np.random.default_rng(0), []
            for _ in range(draws):
                order = rng.permutation(table.rows)
                a, b = np.isin(owner, order[:some]), np.isin(owner, order[some : some + others])
                both = (logp[a], of[a], logp[b], of[b])
                seen.append((hits[a].mean(), matched_auc(*both), matched_gap(*both)))
            print(f"| {some} | {others} | {what} | " + " | ".join(f"{v:.3f}" for v in np.std(seen, axis=0)) + " |")


if __name__ == "__main__":
    main()
