"""Formulas of low-rank unlearning again, with loops over plain numbers: what the vectorised ones must agree with.

Nothing here is shared with the package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Matrix = list[list[float]]


def column(matrix: Matrix, j: int) -> list[float]:
    return [row[j] for row in matrix]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def gram_schmidt(matrix: Matrix, tolerance: float = 1e-9) -> list[list[float]]:
    """Orthonormal vectors with the span of the columns, one per independent column."""
    found: list[list[float]] = []
    for j in range(len(matrix[0])):
        rest = column(matrix, j)
        size = math.sqrt(dot(rest, rest))
        for _ in range(2):
            for other in found:
                share = dot(rest, other)
                rest = [x - share * y for x, y in zip(rest, other, strict=True)]
        length = math.sqrt(dot(rest, rest))
        if length > tolerance * size and length > 0:
            found.append([x / length for x in rest])
    return found


def rol(given: dict[str, Any], options: dict[str, Any]) -> float:
    """Orthogonality of the output factors to the retain basis: sum, or mean of one of its two normalised forms."""
    values = []
    for name, factor in given["factors"].items():
        if options["layers"] != "all" and not re.search(options["layers"], name):
            continue
        b, p = factor.tolist(), given["basis"][name].tolist()
        r, k = len(b[0]), len(p[0])
        inside = sum(dot(column(b, i), column(p, j)) ** 2 for i in range(r) for j in range(k))
        if options["normalise"] == "cosine":
            inside /= sum(x * x for row in b for x in row)
        if options["normalise"] == "layers_rank":
            inside /= min(r, k)
        values.append(inside)
    return sum(values) if options["normalise"] == "paper" else sum(values) / len(values)


def retain_share(factors: dict[str, Matrix], basis: dict[str, Matrix]) -> float:
    """Mean over layers of the squared length of the basis's part of each output direction."""
    shares = []
    for name, b in factors.items():
        own = gram_schmidt(b)
        columns = [column(basis[name], j) for j in range(len(basis[name][0]))]
        shares.append(sum(dot(q, p) ** 2 for q in own for p in columns) / max(len(own), 1))
    return sum(shares) / len(shares)


def captured_share(rows: Matrix, columns: Matrix, *, center: bool) -> float:
    """Share of the rows' squared lengths that is left when they are projected on the span of the columns."""
    n, d = len(rows), len(rows[0])
    mean = [sum(column(rows, j)) / n if center else 0.0 for j in range(d)]
    kept = [[row[j] - mean[j] for j in range(d)] for row in rows]
    inside = sum(dot(row, q) ** 2 for row in kept for q in gram_schmidt(columns))
    return inside / sum(dot(row, row) for row in kept)


ORACLES: dict[str, Callable[[dict[str, Any], dict[str, Any]], float]] = {"rol": rol}


def pooled_vectors(rows: list[list[list[float]]], pooling: str) -> list[list[float]]:
    """The vectors of rows of tokens: each token, or the mean or the sum of each row that has one."""
    if pooling == "token":
        return [token for row in rows for token in row]
    out = []
    for row in rows:
        if row:
            total = [sum(token[k] for token in row) for k in range(len(row[0]))]
            out.append([v / len(row) for v in total] if pooling == "row" else total)
    return out


def covariance(vectors: list[list[float]], center: bool, weights: list[float] | None = None) -> Matrix:
    """Weighted mean of outer products, of the vectors or of their distances from the mean."""
    w, width = weights or [1.0] * len(vectors), len(vectors[0])
    count = math.fsum(w)
    mean = [math.fsum(w[n] * v[k] for n, v in enumerate(vectors)) / count if center else 0.0 for k in range(width)]
    out = [[0.0] * width for _ in range(width)]
    for i in range(width):
        for j in range(width):
            terms = (w[n] * (v[i] - mean[i]) * (v[j] - mean[j]) for n, v in enumerate(vectors))
            out[i][j] = math.fsum(terms) / count
    return out


def contrast(forget: Matrix, retain: Matrix, beta: float, trace_normalised: bool = False) -> Matrix:
    """(1 - beta) F - beta R, each by its trace where asked."""
    width = len(forget)
    f, r = (sum(m[k][k] for k in range(width)) if trace_normalised else 1.0 for m in (forget, retain))
    return [[(1 - beta) * forget[i][j] / f - beta * retain[i][j] / r for j in range(width)] for i in range(width)]


# --- starts ---------------------------------------------------------------------------------------------------------


def contrast_matrix(forget: Matrix, retain: Matrix, beta: float, *, center: bool, normalised: bool) -> Matrix:
    """(1 - beta) Cov_F - beta Cov_R, entry by entry."""
    size = len(forget[0])
    covs = []
    for rows in (forget, retain):
        mean = [sum(column(rows, j)) / len(rows) if center else 0.0 for j in range(size)]
        cov = [
            [sum((x[i] - mean[i]) * (x[j] - mean[j]) for x in rows) / len(rows) for j in range(size)]
            for i in range(size)
        ]
        trace = sum(cov[i][i] for i in range(size)) if normalised else 1.0
        covs.append([[value / trace for value in row] for row in cov])
    return [[(1 - beta) * covs[0][i][j] - beta * covs[1][i][j] for j in range(size)] for i in range(size)]


def importance_rows(forget: Matrix, retain: Matrix, epsilon: float) -> list[float]:
    """FILA's weight of each row: the root of the summed ratio of both sides' importance."""
    return [
        math.sqrt(sum(f / (epsilon + r) for f, r in zip(own, other, strict=True)))
        for own, other in zip(forget, retain, strict=True)
    ]


def mean_square(gradients: list[Matrix], tokens: list[int]) -> Matrix:
    """Token-weighted mean of the squares of one weight's gradients over batches."""
    rows, columns = len(gradients[0]), len(gradients[0][0])
    return [
        [sum(n * g[i][j] ** 2 for g, n in zip(gradients, tokens, strict=True)) / sum(tokens) for j in range(columns)]
        for i in range(rows)
    ]


def variance(gradients: list[Matrix], tokens: list[int]) -> Matrix:
    """Token-weighted variance of one factor's gradients over batches."""
    square = mean_square(gradients, tokens)
    return [
        [
            max(0.0, value - (sum(n * g[i][j] for g, n in zip(gradients, tokens, strict=True)) / sum(tokens)) ** 2)
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(square)
    ]
