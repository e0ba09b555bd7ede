"""Several numbers in one: forget score, privacy scores, model utility, utility scores, and the aggregates of all.

They are harmonic means, as OpenUnlearning's paper (2506.12618, appendix F.1) and TOFU define them. Two readings of the
privacy score are in use and give different numbers: both are here, under names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics import rows as per_row
from excise.metrics.bench import ORIGINAL, Bench, Entry, Part, Sample, sample, together
from excise.metrics.membership import BY_LIKELIHOOD, auc_sample, scores
from excise.metrics.statistics import harmonic_mean
from excise.metrics.table import PARAPHRASE, Table
from excise.metrics.utility import ROW_SETS, TOFU_SETS, fluent, utility_parts

Floats = NDArray[np.float64]
_LEAST = 1e-6


def _forget_parts(bench: Bench) -> list[Part]:
    table = bench.side("forget")
    values = [
        1 - per_row.exact_memorization(table),
        1 - per_row.extraction_strength(table),
        1 - per_row.probability(table, PARAPHRASE),
        1 - per_row.truth_share(per_row.log_truth_ratio(table, PARAPHRASE, bench.mean)),
    ]
    return [("forget", v) for v in values]


def _forgotten(bench: Bench) -> Sample:
    return sample(bench, _forget_parts(bench), harmonic_mean)


def forget_score(bench: Bench) -> Entry:
    """HM(1 - EM, 1 - ES, 1 - paraphrase probability, 1 - truth share): OpenUnlearning's memorisation score."""
    return _forgotten(bench).entry()


# --- utility ------------------------------------------------------------------------------------------------------


def _utility(bench: Bench) -> tuple[list[Part], Entry]:
    found = utility_parts(bench.tables, mean=bench.mean)
    sets = {side for side, _ in found} - ROW_SETS
    if not sets and not any(name == "rouge" for _, name in found):
        raise NotShown("needs a utility set, or generations on retained rows")
    complete = len(found) == 9 and sets == TOFU_SETS
    return [(side, values) for (side, _), values in found.items()], {"parts": len(found), "complete": complete}


def model_utility(bench: Bench) -> Entry:
    """Harmonic mean of the utility parts; TOFU's nine where all sets are there."""
    parts, extra = _utility(bench)
    return sample(bench, parts, harmonic_mean).entry() | extra


def unlearning_score(bench: Bench) -> Entry:
    """HM(forget score, model utility)."""
    parts, extra = _utility(bench)
    return _harmonic(_forgotten(bench), sample(bench, parts, harmonic_mean)).entry() | extra


def _useful(bench: Bench) -> tuple[Sample, Entry]:
    """HM(model utility, fluency of what is written to forgotten questions), and which utility parts there were."""
    parts, extra = _utility(bench)
    written = sample(bench, [("forget", fluent(bench.side("forget")))])
    return _harmonic(sample(bench, parts, harmonic_mean), written), extra


def utility_score(bench: Bench) -> Entry:
    """HM(model utility, share of fluent answers to forgotten questions)."""
    found, extra = _useful(bench)
    return found.entry() | extra


def _useful_beside_original(bench: Bench) -> tuple[Sample, Entry]:
    mine, extra = _useful(bench)
    theirs, other = _useful(bench.of(_originals(bench)))
    if other != extra:
        raise NotShown("the original was evaluated on other utility sets")
    if theirs.value <= 0:
        raise NotShown("the original has no utility to compare with")
    both = together([mine.draws, theirs.draws])
    draws = np.minimum(1.0, both[:, 0] / np.maximum(both[:, 1], _LEAST))
    return Sample(min(1.0, mine.value / theirs.value), draws, mine.n), extra


def utility_score_relative(bench: Bench) -> Entry:
    """Utility score over the original's, at most 1."""
    found, extra = _useful_beside_original(bench)
    return found.entry() | extra


# --- privacy ------------------------------------------------------------------------------------------------------


def _originals(bench: Bench) -> Mapping[str, Table]:
    if bench.original is None or "forget" not in bench.original:
        raise NotShown(ORIGINAL)
    return bench.original


def _private(bench: Bench, *, relative: bool) -> Sample:
    """HM over four attacks of 1 - |AUC - AUC_gold| / scale, clipped to 0..1.

    The scale is |AUC_original - AUC_gold|, or AUC_gold itself (``relative``).
    """
    gold = bench.golds()
    if "never_seen" not in gold:
        raise NotShown("the gold was not evaluated on never-seen rows")
    before = None if relative else _originals(bench)
    shares = []
    for attack in BY_LIKELIHOOD:
        mine, target = (auc_sample(bench, *scores(tables, attack)) for tables in (bench.tables, gold))
        if before is None:
            scale, spread = target.value, target.draws
        else:
            start = auc_sample(bench, *scores(before, attack))
            scale = abs(start.value - target.value)
            spread = np.abs(np.subtract(*together([start.draws, target.draws]).T))
        if scale < _LEAST:
            what = "the original cannot be told from the gold" if before is not None else "the gold's AUC is 0"
            raise NotShown(f"{what} by attack {attack}: there is no scale to measure on")
        draws = together([mine.draws, target.draws, spread])
        distance = np.abs(draws[:, 0] - draws[:, 1]) / np.maximum(draws[:, 2], _LEAST)
        off = abs(mine.value - target.value) / scale
        shares.append(Sample(1 - min(1.0, off), 1 - np.minimum(1.0, distance), mine.n))
    return _harmonic(*shares)


def privacy_score(bench: Bench) -> Entry:
    """1 = no attack tells more than of the gold, 0 = as much as of the original (or as far beyond the gold)."""
    return _private(bench, relative=False).entry()


def privacy_score_relative(bench: Bench) -> Entry:
    """The same with the gold's AUC as the scale, as PrivLeak: the original is not 0 by construction."""
    return _private(bench, relative=True).entry()


# --- all in one ---------------------------------------------------------------------------------------------------


def aggregate(bench: Bench, *, relative: bool = False) -> Entry:
    """HM(forget score, privacy score, utility over the original's)."""
    private = _private(bench, relative=relative)
    useful, extra = _useful_beside_original(bench)
    return _harmonic(_forgotten(bench), private, useful).entry() | extra


def _harmonic(*parts: Sample) -> Sample:
    value = float(harmonic_mean([p.value for p in parts]))
    return Sample(value, harmonic_mean(together([p.draws for p in parts])), min(p.n for p in parts))
