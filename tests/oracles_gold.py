"""The formulas that aim at never having seen, again with Python loops over plain numbers; conventions as in `oracles`.

Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from typing import Any

Inputs = dict[str, Any]
Options = dict[str, Any]


def huber(x: float, delta: float) -> float:
    return x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)


def quantile_at(ascending: list[float], level: float) -> float:
    """Piecewise linear through ``((i + 1/2) / m, value i)``, flat beyond the ends."""
    m = len(ascending)
    if level <= 0.5 / m:
        return ascending[0]
    for i in range(m - 1):
        left, right = (i + 0.5) / m, (i + 1.5) / m
        if level <= right + 1e-15:
            share = (level - left) / (right - left)
            return ascending[i] * (1 - share) + ascending[i + 1] * share
    return ascending[-1]


def matched(own: list[float], others: list[float], target: list[float], delta: float) -> list[float]:
    out = []
    for value in own:
        below = sum(1 for v in others if v < value) + 0.5 * sum(1 for v in others if v == value)
        out.append(huber(value - quantile_at(target, below / len(others)), delta))
    return out


def quantile(given: Inputs, options: Options) -> list[float]:
    delta = options["delta"]
    if "kinds" in given:
        return _by_type(given, delta, outside=options["within"] == "outside")
    own, others = given["logp"].tolist(), given["among"].tolist()
    if "count" not in given:
        return matched(own, others, given["target"]["tokens"].tolist(), delta)
    own = [total / n for total, n in zip(own, given["count"].tolist(), strict=True)]
    others = [total / n for total, n in zip(others, given["among_count"].tolist(), strict=True)]
    return matched(own, others, given["target"]["rows"].tolist(), delta)


def _by_type(given: Inputs, delta: float, *, outside: bool) -> list[float]:
    kinds = [int(kind == 0) if outside else kind for kind in given["kinds"].tolist()]
    target = list(zip(given["target"]["tokens"].tolist(), given["target"]["labels"].tolist(), strict=True))
    others = list(zip(given["among"].tolist(), given["among_classes"].tolist(), strict=True))
    out = []
    for value, label in zip(given["logp"].tolist(), given["classes"].tolist(), strict=True):
        kind = kinds[label]
        aim = [v for v, c in target if kinds[c] == kind]
        if kind == 0 or not aim:
            out.append(0.0)
        else:
            out += matched([value], [v for v, c in others if kinds[c] == kind], aim, delta)
    return out


def anchor(given: Inputs, _: Options) -> list[float]:
    out = []
    for row, where in enumerate(given["where"].tolist()):
        shares = []
        for own, before in zip(given["states"], given["ref_states"], strict=True):
            for place, read in enumerate(where):
                if read:
                    h, h0 = own[row][place].tolist(), before[row][place].tolist()
                    moved = sum((x - y) ** 2 for x, y in zip(h, h0, strict=True))
                    shares.append(moved / sum(y * y for y in h0))
        out.append(sum(shares) / len(shares))
    return out


def latent_match(given: Inputs, options: Options) -> list[float]:
    where = given["where"].tolist()
    values = []
    for states, target in zip(given["states"], given["target"], strict=True):
        by_row = [
            [_whitened(states[b][t].tolist(), target) for t, yes in enumerate(row) if yes]
            for b, row in enumerate(where)
        ]
        tokens, rows = [h for row in by_row for h in row], [_mean(row) for row in by_row]
        values.append(sum(_PARTS[part](tokens, rows, target) for part in options["parts"]))
    return [sum(values) / len(values)] * len(where)


def _whitened(state: list[float], target: Any) -> list[float]:
    mean, columns = target["mean"].tolist(), target["whitening"].tolist()
    apart = [x - m for x, m in zip(state, mean, strict=True)]
    return [sum(apart[i] * columns[i][k] for i in range(len(apart))) for k in range(len(columns[0]))]


def _mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def _mean_part(tokens: list[list[float]], _rows: Any, _target: Any) -> float:
    return sum(m * m for m in _mean(tokens))


def _covariance_part(tokens: list[list[float]], _rows: Any, target: Any) -> float:
    centre, spread = _mean(tokens), target["spread"].tolist()
    size = len(centre)
    total = 0.0
    for i in range(size):
        for j in range(size):
            c = sum((t[i] - centre[i]) * (t[j] - centre[j]) for t in tokens) / len(tokens)
            total += (c - (spread[i] if i == j else 0.0)) ** 2
    return total / size


def _energy_part(_tokens: Any, rows: list[list[float]], target: Any) -> float:
    others = target["rows"].tolist()
    across = sum(math.dist(x, y) for x in rows for y in others) / (len(rows) * len(others))
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    inside = sum(math.dist(rows[i], rows[j]) for i, j in pairs) / max(1, len(pairs))
    return 2 * across - inside - float(target["scatter"])


_PARTS = {"mean": _mean_part, "covariance": _covariance_part, "energy": _energy_part}


# --- weights: shapes of updates, rows that are reset, averages ------------------------------------------------------


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots."""
    n = len(right)
    rows = [[*matrix[i], right[i]] for i in range(n)]
    for i in range(n):
        at = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[at] = rows[at], rows[i]
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    out = [0.0] * n
    for i in reversed(range(n)):
        out[i] = (rows[i][n] - sum(rows[i][j] * out[j] for j in range(i + 1, n))) / rows[i][i]
    return out


def second_moment(vectors: list[list[float]]) -> list[list[float]]:
    d = len(vectors[0])
    return [[sum(v[i] * v[j] for v in vectors) / len(vectors) for j in range(d)] for i in range(d)]


def preconditioner(retain: list[list[float]], forget: list[list[float]], ridge: float) -> list[list[float]]:
    """(C_R / mean eigenvalue + ridge)^-1, scaled such that tr(P C_F P) = tr C_F."""
    kept, gone = second_moment(retain), second_moment(forget)
    d = len(kept)
    mean = sum(kept[i][i] for i in range(d)) / d
    shifted = [[kept[i][j] / mean + (ridge if i == j else 0.0) for j in range(d)] for i in range(d)]
    columns = [solve(shifted, [1.0 if i == k else 0.0 for i in range(d)]) for k in range(d)]
    after = 0.0
    for i in range(d):
        for j in range(d):
            for k in range(d):
                after += columns[j][i] * gone[j][k] * columns[i][k]
    c = math.sqrt(sum(gone[i][i] for i in range(d)) / after)
    return [[c * columns[j][i] for j in range(d)] for i in range(d)]


def own_tokens(forget: list[list[int]], kept: list[list[int]], share: float) -> dict[int, float]:
    """Token -> how far its row goes: (s - share) / (1 - share), s being the forget rows' share of its uses."""
    used: dict[int, list[int]] = {}
    for side, rows in enumerate((forget, kept)):
        for row in rows:
            for token in row:
                used.setdefault(token, [0, 0])[side] += 1
    out = {}
    for token, (ours, others) in used.items():
        s = ours / (ours + others)
        if s == 1:
            out[token] = 1.0
        elif s > share:
            out[token] = (s - share) / (1 - share)
    return out


def drawn_row(row: list[float], a: list[float], b: list[float], unused: list[list[float]], way: float) -> list[float]:
    mean = [sum(r[i] for r in unused) / len(unused) for i in range(len(row))]
    new = [m + ((x - m) + (y - m)) / math.sqrt(2) for m, x, y in zip(mean, a, b, strict=True)]
    return [(1 - way) * old + way * n for old, n in zip(row, new, strict=True)]


ORACLES = {"quantile": quantile, "anchor": anchor, "latent_match": latent_match}
