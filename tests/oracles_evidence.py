"""Formulas of the evidence again, with loops over plain lists and no shared code."""

from __future__ import annotations

import math

import torch

# --- attacks on weights ---------------------------------------------------------------------------------------------


def answer_probability(model, example, forward=None) -> float:
    """Length-normalised probability of one encoded answer, token by token from the model's own logits."""
    ids = list(example.input_ids)
    with torch.no_grad():
        out = (forward or model)(input_ids=torch.tensor([ids]))
    total = 0.0
    for t in range(example.label_start, len(ids)):
        scores = [float(x) for x in out.logits[0, t - 1].double()]
        top = max(scores)
        total += scores[ids[t]] - top - math.log(sum(math.exp(s - top) for s in scores))
    return math.exp(total / (len(ids) - example.label_start))


def rounded_row(row: list[float], bits: int, group: int) -> list[float]:
    """One output's weights on the nearest points of each group's grid."""
    out = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        low, high = min([0.0, *part]), max([0.0, *part])
        step = (high - low) / (2**bits - 1)
        if step == 0:
            out += part
            continue
        zero = round(-low / step)
        points = [(code - zero) * step for code in range(2**bits)]
        out += [min(points, key=lambda p: abs(p - w)) for w in part]
    return out


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(values: list[float], block: int = 64) -> list[float]:
    """Flattened weights as NF4 holds them (Dettmers et al. 2305.14314, appendix E), a block after the other."""
    out = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        largest = max(abs(v) for v in part)
        out += [largest * min(NF4, key=lambda c: abs(c - v / largest)) if largest else 0.0 for v in part]
    return out


# --- fluency, scores of scores, neighbours --------------------------------------------------------------------------


def witten_bell(texts: list[list[str]], order: int, text: list[str]) -> list[float]:
    """Bits of each symbol of a text, counting every context again for every symbol."""
    symbols = {s for row in texts for s in row}
    marked = [["<"] * order + list(row) for row in texts]  # in front of a text stands nothing
    mine = ["<"] * order + list(text)
    out = []
    for place in range(order, len(mine)):
        p = 1 / (len(symbols) + 1)
        for length in range(order):
            context = mine[place - length : place]
            followed = [row[i] for row in marked for i in range(order, len(row)) if row[i - length : i] == context]
            if followed:
                total, kinds = len(followed), len(set(followed))
                p = (followed.count(mine[place]) + kinds * p) / (total + kinds)
        out.append(-math.log2(p))
    return out


def privacy(mine: list[float], gold: list[float], scales: list[float]) -> float:
    """Harmonic mean over attacks of 1 - |AUC - AUC of the gold| / scale, clipped."""
    shares = [min(1.0, max(0.0, 1 - abs(a - g) / s)) for a, g, s in zip(mine, gold, scales, strict=True)]
    return 0.0 if min(shares) <= 0 else len(shares) / sum(1 / s for s in shares)


def neighbours_of_own(
    a: list[list[float]], b: list[list[float]], people: list[int] | None, others: list[int] | None, k: int
) -> float:
    """Share of own rows among the nearest by cosine, a row at a time; rows of one person never count for each other."""
    rows = [*a, *b]
    middle = [sum(r[i] for r in rows) / len(rows) for i in range(len(a[0]))]
    rows = [[v - m for v, m in zip(r, middle, strict=True)] for r in rows]
    ids = None if people is None else [*people, *(others or [-1] * len(b))]

    def cosine(x: list[float], y: list[float]) -> float:
        dot = sum(u * v for u, v in zip(x, y, strict=True))
        return dot / math.sqrt(sum(u * u for u in x) * sum(v * v for v in y))

    shares = []
    for i in range(len(a)):
        may = [j for j in range(len(rows)) if j != i and (ids is None or ids[j] < 0 or ids[j] != ids[i])]
        near = sorted(may, key=lambda j: -cosine(rows[i], rows[j]))[:k]
        if near:
            shares.append(sum(j < len(a) for j in near) / len(near))
    return sum(shares) / len(shares)


def lens_of_row(model, example, layer: int) -> float:
    """Mean log p of one answer's tokens when norm and head are put on a layer, from the model's own hidden states."""
    ids = list(example.input_ids)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        logits = model.lm_head(model.model.norm(states)).double()
    total = 0.0
    for t in range(example.label_start, len(ids)):
        total += float(torch.log_softmax(logits[t - 1], 0)[ids[t]])
    return total / (len(ids) - example.label_start)


def gradient_norm_of_row(model, example) -> float:
    """Mean over parameters of the norm of the gradient of transformers' own loss on one answer."""
    ids = list(example.input_ids)
    labels = [-100] * example.label_start + ids[example.label_start :]
    model.zero_grad()
    model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
    norms = [math.sqrt(float((p.grad.double() ** 2).sum())) for p in model.parameters()]
    model.zero_grad()
    return sum(norms) / len(norms)


# --- verdict --------------------------------------------------------------------------------------------------------


def grouped_t_bounds(differences: list[float], groups: list[int], quantile: float) -> tuple[float, float]:
    """Bounds of a mean of rows in groups: sums of deviations by group, as in a survey of clusters."""
    centre = sum(differences) / len(differences)
    sums: dict[int, float] = {}
    for value, group in zip(differences, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + (value - centre) / len(differences)
    many = len(sums)
    half = quantile * math.sqrt(many / (many - 1) * sum(v * v for v in sums.values()))
    return centre - half, centre + half


def delong_variance(positive: list[float], negative: list[float]) -> float:
    """Variance of an AUC by DeLong et al. (1988), from every pair."""

    def wins(p: float, q: float) -> float:
        return 1.0 if p > q else 0.5 if p == q else 0.0

    n, m = len(positive), len(negative)
    area = sum(wins(p, q) for p in positive for q in negative) / (n * m)
    of_p = [sum(wins(p, q) for q in negative) / m for p in positive]
    of_q = [sum(wins(p, q) for p in positive) / n for q in negative]
    spread_p = sum((v - area) ** 2 for v in of_p) / (n - 1)
    spread_q = sum((v - area) ** 2 for v in of_q) / (m - 1)
    return spread_p / n + spread_q / m


def binomial_bounds(found: int, n: int, level: float) -> tuple[float, float]:
    """Exact bounds of a share by bisection on the binomial tails."""

    def at_least(p: float) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(found, n + 1))

    def at_most(p: float) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(found + 1))

    def solve(tail, rising: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (tail(middle) < level) == rising else (low, middle)
        return (low + high) / 2

    return (0.0 if found == 0 else solve(at_least, True)), (1.0 if found == n else solve(at_most, False))


# --- MUSE ---------------------------------------------------------------------------------------------------------


def rouge_l_f1(written: str, true: str) -> float:
    """Longest common subsequence of lower-cased words, as F1; no stemmer."""
    import re

    a, b = (re.sub("[^a-z0-9]+", " ", text.lower()).split() for text in (true, written))
    if not a or not b:
        return 0.0
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            best[i + 1][j + 1] = best[i][j] + 1 if a[i] == b[j] else max(best[i][j + 1], best[i + 1][j])
    common = best[-1][-1]
    recall, precision = common / len(a), common / len(b)
    return 2 * recall * precision / (recall + precision) if common else 0.0


def min_k(logp: list[float], share: float = 0.4) -> float:
    """Mean of the least likely tokens' log-probabilities."""
    lowest = sorted(logp)[: max(1, int(share * len(logp)))]
    return sum(lowest) / len(lowest)


def muse_privleak(member: list[float], other: list[float], gold_member: list[float], gold_other: list[float]) -> float:
    """100 (A - A_gold) / A_gold, A the share of pairs in which the text that nobody saw looks more like a member."""

    def area(own: list[float], rest: list[float]) -> float:
        won = sum(1.0 if o > m else 0.5 if o == m else 0.0 for m in own for o in rest)
        return won / (len(own) * len(rest))

    target = area(gold_member, gold_other)
    return 100 * (area(member, other) - target) / target


# --- asking many times ----------------------------------------------------------------------------------------------


def leak_by_enumeration(leaks: int, samples: int, k: int) -> float:
    """Share of all k-subsets of the samples that hold a leak."""
    from itertools import combinations

    subsets = list(combinations([1] * leaks + [0] * (samples - leaks), k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def best_by_enumeration(scores: list[float], k: int) -> float:
    """Mean over all k-subsets of the highest score."""
    from itertools import combinations

    subsets = list(combinations(scores, k))
    return sum(max(subset) for subset in subsets) / len(subsets)


def binomial_upper(successes: int, n: int, alpha: float) -> float:
    """The probability at which as few successes have a chance of alpha, by halving."""
    if successes == n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(80):
        p = (low + high) / 2
        chance = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(successes + 1))
        low, high = (p, high) if chance > alpha else (low, p)
    return low


def mean_bound(scores: list[float], alpha: float, cells: int = 20_000) -> float:
    """The area under min(1, 1 - F + width) by small cells."""
    n = len(scores)
    width = math.sqrt(math.log(1 / alpha) / (2 * n))
    total = 0.0
    for cell in range(cells):
        x = (cell + 0.5) / cells
        total += min(1.0, sum(s > x for s in scores) / n + width) / cells
    return total


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Token -> probability within the smallest set of most likely tokens that holds top_p."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept, mass = {}, 0.0
    for token in sorted(range(len(shares)), key=lambda t: -shares[t]):
        if mass >= top_p:
            break
        kept[token] = shares[token]
        mass += shares[token]
    return {token: share / mass for token, share in kept.items()}


def bootstrap_bounds(values: list[float], draws: list[list[int]]) -> tuple[float, float]:
    """2.5 and 97.5 per cent of the means of drawn rows, rows without a value left out."""
    import numpy as np

    means = []
    for rows in draws:
        seen = [values[i] for i in rows if not math.isnan(values[i])]
        if seen:
            means.append(sum(seen) / len(seen))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))
