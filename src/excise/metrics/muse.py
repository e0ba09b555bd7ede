"""What MUSE asks a model: passages to go on with, and questions after solved examples; scored row by row.

Shi et al., 2407.06460. The tables of this file hold one score per row and no text; their numbers are `muse_scores`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from excise.errors import InputRefused
from excise.metrics.generate import continued
from excise.metrics.table import Table, check
from excise.records import Record
from excise.tasks.chunks import token_ids

#: New tokens for a passage and for an answer, and what ends an answer.
PASSAGE, ANSWER = 128, 32
STOPS = ("\n\n", "\nQuestion", "Question:")


def question_prompt(question: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    r"""The question after solved examples, as MUSE writes them, the blank after ``Answer:`` included.

    Example:
        >>> question_prompt("Who?", [("Where?", "Here")])
        'Question: Where?\nAnswer: Here\n\nQuestion: Who?\nAnswer: '
    """
    solved = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples)
    return f"{solved}Question: {question}\nAnswer: "


def until(text: str, stops: Sequence[str] = STOPS) -> str:
    r"""The text before the first of the stop strings.

    Example:
        >>> until("Rome\nQuestion: Who?")
        'Rome'
    """
    for stop in stops:
        text = text.split(stop)[0]
    return text


def rouge_f1(written: str, true: str) -> float:
    """ROUGE-L F1 (Lin 2004) without a stemmer, 0 to 1; NaN where the true text has no Latin letter or digit.

    Example:
        >>> rouge_f1("the cats sat", "the cat sat") < rouge_f1("the cat sat", "the cat sat")
        True
    """
    if not re.search("[a-z0-9]", true.lower()):
        return math.nan
    return float(_scorer().score(true, written)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def passages(side: str, model: nn.Module, tokenizer: Any, records: Sequence[Record], *, new: int = PASSAGE) -> Table:
    """VerbMem: the model goes on after each prompt, greedily, and is held against the true text's first tokens.

    A prompt that leaves no room for ``new`` tokens in the model's context keeps its end (ours: the benchmark's models
    have room).

    Args:
        side: The table's name.
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Rows whose prompt is the text so far, and whose completion is how it goes on.
        new: Tokens that are written, and of the true text that are compared.

    Returns:
        A table with ``rouge_l_f1_unstemmed`` and ``shortened`` per row.

    Source:
        MUSE, 2407.06460, section 3.1 (VerbMem) and its released evaluation.
    """
    room = _room(model, new)
    whole = [_prompt_ids(tokenizer, r.prompt or "") for r in records]
    asked = [ids[-room:] if len(ids) > room else ids for ids in whole]
    written = continued(model, tokenizer, asked, [new] * len(asked))
    true = [tokenizer.decode(token_ids(tokenizer, r.completion)[:new], skip_special_tokens=True) for r in records]
    return _table(side, written, true, [len(a) < len(w) for a, w in zip(asked, whole, strict=True)])


def answers(
    side: str,
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    examples: Sequence[Record] = (),
    *,
    new: int = ANSWER,
) -> Table:
    """KnowMem: each question after the solved examples, answered greedily, cut at `STOPS`, against the true answer.

    Where the context has no room for all examples the first ones are left out (ours).

    Args:
        side: The table's name.
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Questions and answers.
        examples: Solved questions, written before each one.
        new: Most tokens of an answer.

    Returns:
        A table with ``rouge_l_f1_unstemmed`` and ``shortened`` per row.

    Raises:
        InputRefused: A question that fills the context without any example.

    Source:
        MUSE, 2407.06460, section 3.1 (KnowMem) and its released evaluation.
    """
    room = _room(model, new)
    solved = [(r.prompt or "", r.completion) for r in examples]
    asked, shortened = [], []
    for row, record in enumerate(records):
        for left_out in range(len(solved) + 1):
            ids = _prompt_ids(tokenizer, question_prompt(record.prompt or "", solved[left_out:]))
            if len(ids) <= room:
                break
        else:
            where = f"{side}:{record.line or row + 1}"
            raise InputRefused(f"{where}: the question leaves no room for an answer of {new} tokens: shorten it")
        asked.append(ids)
        shortened.append(left_out > 0)
    written = [until(text) for text in continued(model, tokenizer, asked, [new] * len(asked))]
    return _table(side, written, [r.completion for r in records], shortened)


def _room(model: nn.Module, new: int) -> int:
    """Most tokens of a prompt that is gone on with for ``new`` tokens."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context and context <= new:
        raise InputRefused(f"the model's context of {context} tokens has no room for {new} new ones")
    return context - new if context else 1 << 30


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt, without an end that nobody wrote."""
    ids = token_ids(tokenizer, text)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _table(side: str, written: Sequence[str], true: Sequence[str], shortened: Sequence[bool]) -> Table:
    scores = [rouge_f1(w, t) for w, t in zip(written, true, strict=True)]
    columns: dict[str, np.ndarray] = {
        "row": np.zeros(0), "kind": np.zeros(0), "mean_nll": np.zeros(0),  # nothing was scored token by token
        "rouge_l_f1_unstemmed": np.array(scores, np.float32), "shortened": np.array(shortened, bool),
    }  # fmt: skip
    return check(Table(side, len(scores), columns))
