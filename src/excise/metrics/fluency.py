"""Does a text read like a real one? Letters, order of words and repetition, each beside real answers of like length.

No hub model: what is normal is learnt from the retained answers at hand, in any language. Nothing of a text is kept,
only how odd it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from excise.errors import NotShown

Floats = NDArray[np.float64]
LETTERS, WORDS, WINDOW = 6, 2, 12
#: A text reads like a real one unless it is odder than all but this share of real ones.
ODD = 0.05
#: Three tests of n real answers cannot find anything odder than 3 / (n + 1).
FEWEST = 60
#: Real answers that are enough to compare with; more cost time and tell nothing new.
ENOUGH = 800
#: Characters of a text that are looked at.
LONGEST = 2000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: contexts become 64-bit keys, and collisions are rare


@dataclass(frozen=True)
class _Level:
    """Counts of one context length: how often each context stood, how many symbols followed it, and which."""

    contexts: NDArray[np.uint64]
    total: Floats
    different: Floats
    pairs: NDArray[np.uint64]
    count: Floats


@dataclass(frozen=True)
class Ngrams:
    """How surprising each symbol of a sequence is after those before it; symbols are letters or words.

    Source:
        Interpolation of Witten and Bell (1991), method C, down to a uniform guess over the known symbols and one more.

    Example:
        >>> model = Ngrams.fit(["the cat sat", "the hat sat"] * 5, 3)
        >>> known, strange = model.bits(["the cat", "tca hte"])
        >>> float(known.mean()) < float(strange.mean())
        True
    """

    symbols: dict[str, int]
    levels: tuple[_Level, ...]

    @staticmethod
    def fit(sequences: Sequence[Sequence[str]], order: int) -> Ngrams:
        """Count runs of up to ``order`` symbols."""
        symbols = {s: i for i, s in enumerate(sorted({s for row in sequences for s in row}), start=1)}
        line, real = _in_one_line(sequences, symbols, order)
        numbers, levels = line[real], []
        for length in range(order):
            keys = _keys(line, length)[real]
            pairs, first, count = np.unique(_paired(keys, numbers), return_index=True, return_counts=True)
            contexts, where, total = np.unique(keys, return_inverse=True, return_counts=True)
            different = np.bincount(where[first], minlength=len(contexts))
            levels.append(_Level(contexts, total.astype(float), different.astype(float), pairs, count.astype(float)))
        return Ngrams(symbols, tuple(levels))

    def bits(self, sequences: Sequence[Sequence[str]], order: int | None = None) -> list[Floats]:
        """For each sequence ``[symbols]``: the surprise of each in bits, by contexts of up to ``order - 1`` symbols."""
        line, real = _in_one_line(sequences, self.symbols, len(self.levels))
        p = np.full(len(line), 1.0 / (len(self.symbols) + 1))
        for length, level in enumerate(self.levels[:order]):
            keys = _keys(line, length)
            total, different = (_look_up(level.contexts, v, keys) for v in (level.total, level.different))
            seen = _look_up(level.pairs, level.count, _paired(keys, line))
            p = np.where(total > 0, (seen + different * p) / np.maximum(total + different, 1.0), p)
        ends = np.cumsum([len(row) for row in sequences])[:-1]
        return np.split(-np.log2(p[real]), ends) if len(sequences) else []


def _in_one_line(
    sequences: Sequence[Sequence[str]], symbols: Mapping[str, int], order: int
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """All symbols as numbers in one line, what is unknown as one more; before each sequence stand ``order`` zeros."""
    unknown, line = len(symbols) + 1, []
    for row in sequences:
        line += [0] * order + [symbols.get(s, unknown) for s in row]
    numbers = np.array(line, np.uint64)
    return numbers, numbers > 0


def _keys(numbers: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """One key for the ``length`` numbers before each number."""
    padded = np.concatenate((np.zeros(length, np.uint64), numbers))
    out = np.zeros(len(numbers), np.uint64)
    with np.errstate(over="ignore"):
        for k in range(length):
            out = (out + padded[k : k + len(numbers)] + np.uint64(1)) * _MULTIPLIER
    return out


def _paired(keys: NDArray[np.uint64], numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        return (keys ^ (keys >> np.uint64(29))) * _MULTIPLIER + numbers


def _look_up(known: NDArray[np.uint64], values: Floats, wanted: NDArray[np.uint64]) -> Floats:
    if not len(known):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, values[at], 0.0)


def echoes(text: str, window: int = WINDOW) -> Floats:
    """``[windows]`` 1 where the ``window`` characters occurred before in the text, without regard to case.

    Example:
        >>> echoes("abcabcabc", 3).tolist(), float(echoes("no echo here", 4).sum())
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 0.0)
    """
    plain = " ".join(text.lower().split())
    seen: set[str] = set()
    out = []
    for i in range(len(plain) - window + 1):
        piece = plain[i : i + window]
        out.append(float(piece in seen))
        seen.add(piece)
    return np.array(out, np.float64)


@dataclass(frozen=True)
class Fluency:
    """How odd texts are beside real ones, by three tests: strange letters, words in no order, repetition.

    Attributes:
        letters: Fitted on real texts other than those that are compared with.
        words: The same of words.
        compared: For each test ``[n, texts]``: the mean of the first n values of the real texts to compare with.
    """

    letters: Ngrams
    words: Ngrams
    compared: tuple[Floats, ...]

    @staticmethod
    def fit(real: Sequence[str], compared: Sequence[str]) -> Fluency:
        """A scorer from real texts to learn from and others to compare with.

        Args:
            real: Real texts whose letters and words are counted.
            compared: Other real texts of the same kind, which say how odd a real one is; the first 800 are used.

        Raises:
            NotShown: Nothing to learn from, or fewer than 60 texts to compare with.

        Source:
            Ours; comparing with real texts of the same kind is a conformal p-value (Vovk et al. 2005).
        """
        texts = [t for t in compared if t.split()][:ENOUGH]
        if len(texts) < FEWEST or not any(t.split() for t in real):
            raise NotShown(f"needs retained answers to learn from, and {FEWEST} other answers to compare with")
        letters = Ngrams.fit([_letters(t) for t in real], LETTERS)
        words = Ngrams.fit([_words(t) for t in real], WORDS)
        return Fluency(letters, words, tuple(map(_running_means, _oddities(letters, words, texts))))

    def score(self, text: str) -> float:
        """Share of real texts at least as odd as this one, 0 to 1: three times that of the worst of three tests.

        Texts are compared over as many letters, words or windows as the text has, so that one cut short is not odd
        for being short. Real texts of the same kind score below x in at most a share x of cases. No text scores 0.

        Example:
            >>> names = [f"{a}{b}" for a in "bdfglmnprt" for b in ("ada", "ilo", "una", "oni", "era", "emi")]
            >>> texts = [f"{x} was born in {y}ville and wrote books." for x, y in zip(names, names[7:] + names[:7])]
            >>> scorer = Fluency.fit(texts, texts[::-1])
            >>> scorer.score("bada was born in bunaville"), scorer.score("bor bor bor bor bor bor bor") < ODD
            (0.7868852615356445, True)
        """
        return float(self.column([text])[0])

    def column(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``[rows]`` fp32 scores."""
        tests = zip(self.compared, _oddities(self.letters, self.words, texts), strict=True)
        shares = [[_share(real, own) for own in rows] for real, rows in tests]
        worst = np.minimum(1.0, len(shares) * np.min(np.array(shares).reshape(len(shares), -1), axis=0))
        return np.where([bool(t.split()) for t in texts], worst, 0.0).astype(np.float32)


def of_answers(kept: Sequence[str], other: Sequence[str]) -> Fluency | None:
    """The scorer of an evaluation; None where there are too few answers.

    Args:
        kept: True retained answers, to learn letters and words from.
        other: True answers to forgotten and never-seen questions. They only set the scale, and never count as normal
            letters or words. Where they are too few, half of the retained answers join them.

    Example:
        >>> of_answers(["Bob"], ["Ada"]) is None
        True
    """
    learnt, compared = list(kept), list(other)
    if len(compared) < FEWEST:
        half = len(learnt) // 2  # rows of one person stand together: halves share fewer people than every second row
        learnt, compared = learnt[:half], compared + learnt[half:]
    try:
        return Fluency.fit(learnt, compared)
    except NotShown:
        return None


def _letters(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _whole_words(text: str) -> list[str]:
    own = _words(text)
    return own[:-1] if own and own[-1][-1].isalnum() else own  # the last one may be cut in two


def _oddities(letters: Ngrams, words: Ngrams, texts: Sequence[str]) -> tuple[list[Floats], list[Floats], list[Floats]]:
    """Values whose means are high for an odd text: surprise by letter, what order does not tell by word, echoes."""
    texts = [t[:LONGEST] for t in texts]
    own = [_whole_words(t) for t in texts]
    # Words in no order lose what the word before tells of the next.
    order = [told - alone for told, alone in zip(words.bits(own), words.bits(own, 1), strict=True)]
    return letters.bits([_letters(t) for t in texts]), order, [echoes(t) for t in texts]


def _running_means(rows: Sequence[Floats]) -> Floats:
    """``[longest + 1, texts]`` means of the first n values of each text (of all where it has fewer), ascending by n."""
    out = np.zeros((len(rows), max(map(len, rows)) + 1))
    for mean, values in zip(out, rows, strict=True):
        if len(values):
            mean[1 : len(values) + 1] = np.cumsum(values) / np.arange(1, len(values) + 1)
            mean[len(values) + 1 :] = mean[len(values)]
    return np.sort(out.T, axis=1)


def _share(compared: Floats, values: Floats) -> float:
    """Share of texts whose mean over as many values is at least as large, the text itself counted."""
    if not len(values):
        return 1.0
    real = compared[min(len(values), len(compared) - 1)]
    return float(1 + len(real) - np.searchsorted(real, values.mean() - 1e-9)) / (1 + len(real))
