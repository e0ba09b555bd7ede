"""One value per row from a saved table: probabilities, truth ratios, memorisation, membership scores. Pure numpy.

Every function returns ``[rows]`` float64 with NaN where the row has nothing to measure, and raises ``NotShown`` when
the table lacks a column altogether. Rows with several sequences of a kind (two paraphrases, five false answers) are
averaged first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown
from excise.metrics.table import ANSWER, FALSE_ANSWER, LENS, PARAPHRASE, Table

Floats = NDArray[np.float64]
MIN_K = 0.4
_KINDS = {ANSWER: "answers", PARAPHRASE: "paraphrases", FALSE_ANSWER: "false answers"}


def _need(table: Table, *names: str) -> None:
    absent = [name for name in names if not table.has(name)]
    if absent:
        raise NotShown(f"the {table.side} table has no column {absent[0]!r}")


def _segment_sum(values: NDArray, offsets: NDArray) -> Floats:
    """Sums over ``offsets``; unlike ``np.add.reduceat`` it gives 0 for an empty segment."""
    return np.diff(np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))[offsets])


def _ratio(top: NDArray, bottom: NDArray) -> Floats:
    """``top / bottom`` with NaN where nothing was counted."""
    out = np.full(len(top), np.nan)
    np.divide(top, bottom, out=out, where=np.asarray(bottom) > 0)
    return out


def row_mean(table: Table, values: NDArray, kind: int = ANSWER) -> Floats:
    """Mean of a per-sequence value ``[S]`` over the sequences of one kind, ``[rows]``.

    Example:
        >>> nll = np.array([1.0, 3.0])
        >>> t = Table("forget", 2, {"row": np.array([0, 0]), "kind": np.array([2, 2]), "mean_nll": nll})
        >>> row_mean(t, t.columns["mean_nll"], FALSE_ANSWER)
        array([ 2., nan])
    """
    take = (table.columns["kind"] == kind) & ~np.isnan(values)
    row = table.columns["row"][take]
    sums = np.bincount(row, weights=np.asarray(values, np.float64)[take], minlength=table.rows)
    return _ratio(sums, np.bincount(row, minlength=table.rows))


def sequence_nll(table: Table) -> Floats:
    """``[S]`` mean negative log-probability per label token in nats, end-of-sequence included; NaN when empty."""
    if table.has("logp", "offsets"):
        sums = _segment_sum(table.columns["logp"], table.columns["offsets"])
        return _ratio(-sums, table.lengths)
    return np.asarray(table.columns["mean_nll"], np.float64)


def _of_kind(table: Table, kind: int) -> None:
    if not np.any(table.columns["kind"] == kind):
        raise NotShown(f"the {table.side} rows have no {_KINDS[kind]}")


def probability(table: Table, kind: int = ANSWER) -> Floats:
    """Length-normalised probability exp(mean log p), in [0, 1] (TOFU, 2401.06121, section 2.2.1).

    Example:
        >>> t = Table("forget", 1, {"row": np.array([0]), "kind": np.array([0]), "mean_nll": np.array([np.log(2)])})
        >>> probability(t)
        array([0.5])
    """
    _of_kind(table, kind)
    return row_mean(table, np.exp(-sequence_nll(table)), kind)


def normalised_probability(table: Table) -> Floats:
    """p(answer) / (p(answer) + sum p(false answers)), each length-normalised (TOFU, real authors and world facts)."""
    _of_kind(table, FALSE_ANSWER)
    p = np.exp(-sequence_nll(table))
    false = row_mean(table, p, FALSE_ANSWER)
    wrong = table.columns["row"][(table.columns["kind"] == FALSE_ANSWER) & ~np.isnan(p)]
    correct = probability(table)
    total = correct + false * np.bincount(wrong, minlength=table.rows)
    # All probabilities can underflow to 0 together; then the answer is no likelier than the others, which is 0
    # information.
    return np.where(total == 0, 0.0, _ratio(correct, np.where(total == 0, 1.0, total)))


def log_truth_ratio(table: Table, correct: int = PARAPHRASE, mean: str = "geometric") -> Floats:
    """Log of the truth ratio R = mean_j p(false answer j) / p(correct answer), p length-normalised.

    Kept as a logarithm because R over- and underflows on models that were pushed far; KS and AUC do not see the
    difference.

    Args:
        table: needs false answers, and paraphrases unless ``correct`` is ``ANSWER``.
        correct: ``PARAPHRASE`` for forget and retain rows; ``ANSWER`` for sets without paraphrases (real authors, world
            facts).
        mean: "geometric" as in TOFU's released code; "arithmetic" as in other re-implementations.

    Source:
        TOFU (2401.06121), equation 1 with the aggregation of its released evaluation.

    Example:
        >>> nll = np.array([2.0, 1.0, 3.0])
        >>> t = Table("wf", 1, {"row": np.zeros(3, int), "kind": np.array([0, 2, 2]), "mean_nll": nll})
        >>> log_truth_ratio(t, ANSWER), log_truth_ratio(t, ANSWER, "arithmetic").round(3)
        (array([0.]), array([0.434]))
    """
    _of_kind(table, correct)
    _of_kind(table, FALSE_ANSWER)
    nll = sequence_nll(table)
    if mean == "geometric":
        return row_mean(table, nll, correct) - row_mean(table, nll, FALSE_ANSWER)
    if mean != "arithmetic":
        raise ValueError(f"unknown mean {mean!r}: geometric or arithmetic")
    # Shift by the row's best false answer before the exponential, so that no row underflows to log 0.
    best = np.full(table.rows, np.inf)
    false = table.columns["kind"] == FALSE_ANSWER
    np.minimum.at(best, table.columns["row"][false], nll[false])
    shifted = np.exp(np.where(false, best[table.columns["row"]] - nll, 0.0))
    return np.log(row_mean(table, shifted, FALSE_ANSWER)) - best + row_mean(table, nll, correct)


def closeness_to_one(log_ratio: Floats) -> Floats:
    """min(R, 1/R): 1 when false and true answers are equally likely (TOFU's forget aggregation)."""
    return np.exp(-np.abs(log_ratio))


def truthfulness(log_ratio: Floats) -> Floats:
    """max(0, 1 - R): 1 when the true answer is far likelier (TOFU's aggregation for retained knowledge)."""
    return np.maximum(0.0, -np.expm1(np.minimum(log_ratio, 0.0)))


def truth_share(log_ratio: Floats) -> Floats:
    """p(correct) / (p(correct) + p(false)) = 1 / (1 + R), the form named "prob_mean" in OpenUnlearning."""
    return 0.5 * (1.0 - np.tanh(0.5 * log_ratio))


def _body(table: Table) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which tokens are not the final end-of-sequence token, and the offsets of what is left."""
    _need(table, "offsets", "eos")
    offsets, lengths = table.columns["offsets"], table.lengths
    drop = table.columns["eos"] & (lengths > 0)
    keep = np.ones(int(offsets[-1]), bool)
    keep[offsets[1:][drop] - 1] = False
    return keep, np.concatenate(([0], np.cumsum(lengths - drop))).astype(np.int64)


def exact_memorization(table: Table) -> Floats:
    """Share of answer tokens that are the model's first choice given the true prefix, end-of-sequence excluded.

    Source:
        Tirumala et al., 2205.10770; as measured by OpenUnlearning. Rows without a token besides the end are NaN.
    """
    if not table.has("hit") and table.has("exact_memorization"):
        return table.columns["exact_memorization"].astype(np.float64)
    _need(table, "hit")
    keep, offsets = _body(table)
    return row_mean(table, _ratio(_segment_sum(table.columns["hit"][keep], offsets), np.diff(offsets)))


def extraction_strength(table: Table, *, ou_compat: bool = False) -> Floats:
    """Length of the answer's longest suffix of first choices only, as a share of the answer; end-of-sequence excluded.

    Args:
        table: needs ``hit``, ``offsets`` and ``eos``.
        ou_compat: OpenUnlearning's loop gives 1/n instead of 0 when not even the last token matches, and 0 to an empty
            answer.

    Source:
        Carlini et al., 2012.07805, in the one-pass form of OpenUnlearning, with its no-match case corrected.
    """
    if not table.has("hit") and table.has("extraction_strength"):
        return table.columns["extraction_strength"].astype(np.float64)
    _need(table, "hit")
    keep, offsets = _body(table)
    lengths = np.diff(offsets)
    miss = np.flatnonzero(~table.columns["hit"][keep])
    owner = np.repeat(np.arange(table.sequences), lengths)
    first = np.zeros(table.sequences, np.int64)  # first token of the matching suffix = one past the last miss
    np.maximum.at(first, owner[miss], miss - offsets[:-1][owner[miss]] + 1)
    strength = _ratio(lengths - first, lengths)
    if ou_compat:
        strength = np.where(lengths > 0, np.maximum(strength, 1 / np.maximum(lengths, 1)), 0.0)
    return row_mean(table, strength)


def nll_and_tokens(table: Table) -> tuple[Floats, Floats]:
    """Summed negative log-probability and token count of each row's answer; their totals give the perplexity."""
    nll = sequence_nll(table)
    if table.has("offsets"):
        tokens = table.lengths.astype(np.float64)
    else:
        _need(table, "tokens")
        tokens = table.columns["tokens"].astype(np.float64)
    return row_mean(table, nll * tokens), row_mean(table, np.where(np.isnan(nll), np.nan, tokens))


def _lowest_mean(values: Floats, offsets: NDArray[np.int64], share: float) -> Floats:
    """Mean of the lowest ``max(1, floor(share * n))`` values of each segment; NaN for an empty one."""
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((values, owner))
    place = np.arange(len(values)) - offsets[:-1][owner]  # segments stay contiguous, so ranks are positions
    count = np.minimum(np.maximum(1, np.floor(share * lengths + 1e-9)), lengths)
    taken = np.where(place < count[owner], values[order], 0.0)
    return _ratio(_segment_sum(taken, offsets), count)


def attack_score(table: Table, attack: str, *, k: float = MIN_K) -> Floats:
    """Membership score of each row's answer: higher = looks more like training data.

    Args:
        table: the answers of one side.
        attack: "loss" (mean log p), "zlib" (that per byte of the zlib-compressed answer), "min_k" (mean of the lowest
            share ``k`` of token log-probabilities), "min_k_plus_plus" (the same on log p standardised by the mean and
            deviation of log p over the vocabulary; variance floored at 1e-6) or "gradient_norm" (minus the mean norm of
            the gradients, where they were taken). The two with ``k`` leave the final end-of-sequence token out.
        k: share of tokens for "min_k" and "min_k_plus_plus".

    Source:
        Yeom et al. 1709.01604; Carlini et al. 2012.07805; Shi et al. 2310.16789; Zhang et al. 2404.02936; Wang et al.
        2402.17012 (gradient norm); details as OpenUnlearning.
    """
    stored = f"attack_{attack}"
    if table.has(stored):
        return -table.columns[stored].astype(np.float64)
    if attack == "loss":
        return row_mean(table, -sequence_nll(table))
    if attack == "zlib":
        _need(table, "zlib")
        return row_mean(table, _ratio(-sequence_nll(table), table.columns["zlib"]))
    if attack == "gradient_norm":
        raise NotShown("no gradients were taken: they cost a backward pass per row (evaluate.gradient_norms: true)")
    if attack not in ("min_k", "min_k_plus_plus"):
        raise ValueError(f"unknown attack {attack!r}: loss, zlib, min_k, min_k_plus_plus or gradient_norm")
    _need(table, "logp")
    keep, offsets = _body(table)
    values = table.columns["logp"][keep].astype(np.float64)
    if attack == "min_k_plus_plus":
        _need(table, "mu", "sigma")
        sigma = np.sqrt(np.maximum(table.columns["sigma"][keep].astype(np.float64) ** 2, 1e-6))
        values = (values - table.columns["mu"][keep]) / sigma
    return row_mean(table, _lowest_mean(values, offsets, k))


def lens(table: Table) -> dict[int, Floats]:
    """Layer -> ``[rows]`` probability of the answers as the head reads them from that layer, lowest layer first.

    Source:
        Logit lens: nostalgebraist 2020; length-normalised as TOFU's probability (ours).

    Example:
        >>> columns = {"row": np.zeros(0), "kind": np.zeros(0), "mean_nll": np.zeros(0), "lens_1": np.log([0.5])}
        >>> lens(Table("forget", 1, columns))
        {1: array([0.5])}
    """
    layers = sorted(int(name.removeprefix(LENS)) for name in table.columns if name.startswith(LENS))
    if not layers:
        raise NotShown("inner layers were not read (evaluate.latent), or there is only one")
    return {layer: np.exp(table.columns[f"{LENS}{layer}"].astype(np.float64)) for layer in layers}
