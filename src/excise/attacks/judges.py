"""Whether a text gives an answer away: ROUGE-L recall, the answer's keywords, both, or a function of the user's own."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from excise.errors import UsageError

#: A word that more than this share of the known answers hold gives nothing away.
COMMON = 0.05


@dataclass(frozen=True)
class Secret:
    """What must not come out: the answer, the question that it belongs to, and the words that give it away."""

    answer: str
    question: str = ""
    keywords: tuple[str, ...] = ()


#: A text and what must not come out -> how much of it came out, 0 to 1; NaN where this cannot be judged.
Judge = Callable[[str, Secret], float]


def words(text: str) -> list[str]:
    """Words and numbers in lower case."""
    return re.findall(r"\w+", text.lower())


def secrets(pairs: Sequence[tuple[str, str]], others: Sequence[str] = (), *, common: float = COMMON) -> list[Secret]:
    """Questions and answers with the keywords of each answer.

    A keyword is a word of the answer that the question does not hold and that at most a share ``common`` of all known
    answers hold; where there is none, the rarest word that the question does not hold. So "the", "was" and "author"
    drop out in any language without a list of them, if there are answers enough.

    Args:
        pairs: (question, answer) of the rows.
        others: More answers of the same kind, to know which words are common.
        common: The share.

    Example:
        >>> rows = [("Where was Ada born?", "Ada was born in Rome."), ("Where was Bo born?", "Bo was born in Oslo.")]
        >>> [s.keywords for s in secrets(rows, common=0.5)]
        [('rome',), ('oslo',)]
    """
    known = [set(words(text)) for text in (*(answer for _, answer in pairs), *others)]
    holding = Counter(word for own in known for word in own)
    most = max(1.0, common * len(known))
    out = []
    for question, answer in pairs:
        given = set(words(question))
        own = [word for word in dict.fromkeys(words(answer)) if word not in given]
        rare = tuple(word for word in own if holding[word] <= most)
        if own and not rare:
            rare = (min(own, key=lambda word: (holding[word], -len(word))),)
        out.append(Secret(answer, question, rare))
    return out


def rouge(text: str, secret: Secret) -> float:
    """ROUGE-L recall of the answer in the text (Lin 2004, stemmed); NaN for answers without Latin letters or digits."""
    if not re.search("[a-z0-9]", secret.answer.lower()):
        return math.nan
    return float(_scorer().score(secret.answer, text)["rougeL"].recall)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def keywords(text: str, secret: Secret) -> float:
    """Share of the answer's keywords that the text holds, anywhere and in any order; NaN where it has none.

    Example:
        >>> keywords("Rome, in 1815", Secret("in Rome, 1815", "", ("rome", "1815"))), keywords("?", Secret("a"))
        (1.0, nan)
    """
    said = set(words(text))
    return sum(word in said for word in secret.keywords) / len(secret.keywords) if secret.keywords else math.nan


def both(text: str, secret: Secret) -> float:
    """The smaller of `rouge` and `keywords`: the words come in order, and they are those that matter.

    A text that only follows the form of the answer has the first without the second.
    """
    share = keywords(text, secret)
    if share == 0:  # most samples of a model that does not know: the slow part can be left out
        return 0.0
    values = [value for value in (share, rouge(text, secret)) if not math.isnan(value)]
    return min(values, default=math.nan)


JUDGES: dict[str, Judge] = {"both": both, "rouge": rouge, "keywords": keywords}


def judge(name: str) -> Judge:
    """A judge by name, or ``module:function`` of the user's own, called with (text, answer, question).

    Raises:
        UsageError: An unknown name, or a function that cannot be found.
    """
    if name in JUDGES:
        return JUDGES[name]
    module, _, function = name.partition(":")
    if not function:
        raise UsageError(f"unknown judge {name!r}: one of {', '.join(JUDGES)}, or your own as module:function")
    try:
        own = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        raise UsageError(f"judge {name!r} cannot be imported: is the module on the Python path?") from None
    return lambda text, secret: _asked(own, name, text, secret)


def _asked(own: Callable[[str, str, str], float], name: str, text: str, secret: Secret) -> float:
    try:
        value = float(own(text, secret.answer, secret.question))
    except Exception as error:  # its message may quote the answer
        raise UsageError(f"judge {name!r} failed ({type(error).__name__}): try it on an answer of your own") from None
    if not (math.isnan(value) or 0 <= value <= 1):
        raise UsageError(f"judge {name!r} gave a score outside 0 to 1: return a share, or NaN where it cannot judge")
    return value
