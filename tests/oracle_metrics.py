"""The metrics again, with loops over plain lists and no shared code: what the fast versions are checked against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from excise.metrics.table import Table, check


def tokens_of(table: Table, sequence: int) -> range:
    """Places of a sequence's label tokens."""
    return range(int(table.columns["offsets"][sequence]), int(table.columns["offsets"][sequence + 1]))


def body_of(table: Table, sequence: int) -> list[int]:
    """The same without the final end-of-sequence token."""
    places = list(tokens_of(table, sequence))
    return places[:-1] if places and table.columns["eos"][sequence] else places


def mean_nll(table: Table, sequence: int) -> float:
    """Mean negative log-probability of a sequence, end-of-sequence included."""
    places = tokens_of(table, sequence)
    return sum(-float(table.columns["logp"][t]) for t in places) / len(places)


def sequences_of(table: Table, row: int, kind: int) -> list[int]:
    """Sequences of one row and kind."""
    both = zip(table.columns["row"], table.columns["kind"], strict=True)
    return [s for s, (r, k) in enumerate(both) if r == row and k == kind]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, NaN when empty."""
    return sum(values) / len(values) if values else math.nan


def probability(table: Table, kind: int) -> list[float]:
    """Length-normalised probability of each row."""
    return [mean([math.exp(-mean_nll(table, s)) for s in sequences_of(table, row, kind)]) for row in range(table.rows)]


def truth_ratio(table: Table, correct: int, kind_of_mean: str) -> list[float]:
    """Truth ratio R of each row."""
    out = []
    for row in range(table.rows):
        right = math.exp(-mean([mean_nll(table, s) for s in sequences_of(table, row, correct)]))
        wrong = [math.exp(-mean_nll(table, s)) for s in sequences_of(table, row, 2)]
        if kind_of_mean == "geometric":
            out.append(math.prod(wrong) ** (1 / len(wrong)) / right)
        else:
            out.append(mean(wrong) / right)
    return out


def exact_memorization(table: Table) -> list[float]:
    """Share of first choices, end-of-sequence excluded."""
    out = []
    for row in range(table.rows):
        (s,) = sequences_of(table, row, 0)
        out.append(mean([float(table.columns["hit"][t]) for t in body_of(table, s)]))
    return out


def extraction_strength(table: Table, *, ou_compat: bool) -> list[float]:
    """Try every suffix, the longest first."""
    out = []
    for row in range(table.rows):
        (s,) = sequences_of(table, row, 0)
        places = body_of(table, s)
        k = 0
        while k < len(places) and not all(table.columns["hit"][t] for t in places[k:]):
            k += 1
        if ou_compat and places:
            k = min(k, len(places) - 1)
        out.append(1 - k / len(places) if places else (0.0 if ou_compat else math.nan))
    return out


def min_k(table: Table, share: float, *, standardise: bool) -> list[float]:
    """Mean of the lowest share of (standardised) token log-probabilities."""
    out = []
    for row in range(table.rows):
        (s,) = sequences_of(table, row, 0)
        values = []
        for t in body_of(table, s):
            value = float(table.columns["logp"][t])
            if standardise:
                value = (value - float(table.columns["mu"][t])) / math.sqrt(
                    max(float(table.columns["sigma"][t]) ** 2, 1e-6)
                )
            values.append(value)
        out.append(mean(sorted(values)[: max(1, int(share * len(values)))]) if values else math.nan)
    return out


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Every pair, ties half."""
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positive, negative))
    return wins / (len(positive) * len(negative))


def harmonic_mean(parts: Sequence[float]) -> float:
    """0 as soon as a part is."""
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / p for p in parts)


def sq(x: Sequence[float], y: Sequence[float]) -> float:
    """Squared distance."""
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def entanglement(a: list[list[float]], b: list[list[float]], center: str) -> float:
    """Straight from the formula."""
    dims = range(len(a[0]))
    mean_a, mean_b = ([mean([r[i] for r in rows]) for i in dims] for rows in (a, b))
    pooled = [mean([r[i] for r in a + b]) for i in dims]
    middle = [(x + y) / 2 for x, y in zip(mean_a, mean_b, strict=True)] if center == "class_mean" else pooled
    within = mean([sq(r, mean_a) for r in a]) + mean([sq(r, mean_b) for r in b])
    return within / (0.5 * (sq(mean_a, middle) + sq(mean_b, middle)))


def mk_mmd(a: list[list[float]], b: list[list[float]], *, biased: bool) -> float:
    """Every pair, five bandwidths."""
    both = a + b
    pairs = [sq(x, y) for i, x in enumerate(both) for j, y in enumerate(both) if i != j]
    scale = mean(pairs)

    def kernel(x: list[float], y: list[float]) -> float:
        return mean([math.exp(-sq(x, y) / (scale * 2.0**k)) for k in (-2, -1, 0, 1, 2)])

    def within(rows: list[list[float]]) -> float:
        n = len(rows)
        values = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if biased or i != j]
        return sum(values) / (n * n if biased else n * (n - 1))

    return within(a) + within(b) - 2 * mean([kernel(x, y) for x in a for y in b])


def w2_by_trying(a: list[list[float]], b: list[list[float]]) -> float:
    """Every matching of a few points."""
    costs = [sum(sq(x, b[j]) for x, j in zip(a, order, strict=True)) for order in itertools.permutations(range(len(b)))]
    return math.sqrt(min(costs) / len(a))


def make_table(
    side: str, rows: int, *, seed: int = 0, paraphrases: int = 1, false_answers: int = 3, level: float = 1.0
) -> Table:
    """A random table with ragged answers; ``level`` scales the negative log-probabilities (0.01 = memorised)."""
    rng = np.random.default_rng(seed)
    row, kind, lengths = [], [], []
    for r in rng.permutation(rows):  # sequences need not be in row order
        for k, count in ((0, 1), (1, paraphrases), (2, false_answers)):
            for _ in range(count):
                row.append(r)
                kind.append(k)
                lengths.append(int(rng.integers(2, 12)))
    n = sum(lengths)
    logp = -rng.exponential(level, n)
    return check(
        Table(
            side,
            rows,
            {
                "row": np.array(row),
                "kind": np.array(kind),
                "zlib": rng.integers(20, 90, len(row)),
                "eos": rng.random(len(row)) < 0.8,
                "offsets": np.concatenate(([0], np.cumsum(lengths))),
                "logp": logp,
                "hit": np.exp(logp) > 0.4,
                "mu": -rng.exponential(3, n),
                "sigma": rng.choice([0.0, 0.5, 2.0], n),
                "rouge_l_recall": rng.random(rows),
                "repetition": rng.random(rows),
                "fluency": rng.random(rows),
                "group": np.arange(rows) % 4,
                "attack_gradient_norm": rng.exponential(level, rows),
                "lens_1": -rng.exponential(level, rows),
                "lens_2": -rng.exponential(level, rows),
            },
        )
    )
