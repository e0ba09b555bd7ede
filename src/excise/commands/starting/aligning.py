"""Rows that stand beside the forget rows, one for one: other answers, or the same said in other words."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from excise import paraphrase, recipe
from excise.errors import InputRefused, UsageError
from excise.records import Record, read_records
from excise.tasks import causal_lm

#: Word of ``data.never_seen_training`` for the stand-in.
SHUFFLED = "shuffled"


def aligned(side: str, forget: Sequence[Record], data: recipe.Data, seed: int) -> list[Record]:
    """Rows that stand beside the forget rows: refusals and other answers, or paraphrases; drawn by (seed, row).

    Raises:
        InputRefused: A row has no alternative (or paraphrase) and the recipe names no other source.
        UsageError: The paraphraser cannot be imported.
    """
    if side == "forget_alternative":
        return _alternatives(forget, data, seed)
    reword = _paraphraser(data.paraphrases)
    out = []
    for row, record in enumerate(forget):
        if reword is None:
            if not record.paraphrases:
                where = f"{data.forget}:{record.line}"
                raise InputRefused(f"{where}: no paraphrase: give one, or set data.paraphrases: rules")
            question, answer = record.paraphrases[(seed + row) % len(record.paraphrases)]
        else:
            asked = causal_lm.question_of(record)
            question = None if asked is None else reword(asked, seed + row)
            answer = reword(record.completion, seed + row)
        out.append(_answering(causal_lm.asking(record, question), answer))
    return out


def _alternatives(forget: Sequence[Record], data: recipe.Data, seed: int) -> list[Record]:
    pool = _lines(data.alternatives) if data.alternatives else []
    out = []
    for row, record in enumerate(forget):
        choices = pool or list(record.alternatives)
        if not choices:
            raise InputRefused(
                f"{data.forget}:{record.line}: field 'alternatives' is missing: give other answers in the row, or a "
                "file of refusals as data.alternatives"
            )
        out.append(_answering(record, random.Random(f"{seed}/{row}").choice(choices)))
    return out


def shuffled(forget: Sequence[Record], data: recipe.Data, seed: int, *, task: str = "causal_lm") -> list[Record]:
    """A stand-in for never-seen rows: each answer under the question of a row of another group (ours).

    How likely the model finds them says what it makes of such answers without what it was asked; it knows the wording
    all the same, so real never-seen rows are better.

    Raises:
        UsageError: The task has no answers that could change places.
        InputRefused: A row without a question, or rows of a single group.
    """
    if task != "causal_lm":
        raise UsageError("data.never_seen_training: shuffled needs questions and answers: give never-seen rows instead")
    questions = [causal_lm.question_of(record) for record in forget]
    bare = next((r for r, q in zip(forget, questions, strict=True) if q is None), None)
    if bare is not None:
        raise InputRefused(f"{data.forget}:{bare.line}: no question to shuffle: give data.never_seen rows instead")
    groups: list[object] = [row if r.group is None else f"group {r.group}" for row, r in enumerate(forget)]
    if len(set(groups)) < 2:
        raise InputRefused(f"{data.forget}: one group alone cannot be shuffled: give data.never_seen rows instead")
    out = []
    for row, record in enumerate(forget):
        others = [i for i, group in enumerate(groups) if group != groups[row]]
        question = questions[random.Random(f"{seed}/shuffled/{row}").choice(others)]
        out.append(_answering(causal_lm.asking(record, question), record.completion))
    return out


def _lines(source: str) -> list[str]:
    """Answers of a file: of a text file its lines, of anything else its rows."""
    if not source.endswith(".txt"):
        return [r.completion for r in read_records(source)]
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputRefused(f"{source}: no such file: check the path") from None
    except UnicodeDecodeError:
        raise InputRefused(f"{source}: not UTF-8: save the file as UTF-8") from None
    if not lines:
        raise InputRefused(f"{source}: holds no lines: write one answer per line")
    return lines


def _answering(record: Record, answer: str) -> Record:
    """The record's question with another answer, and nothing else of it."""
    return replace(record, completion=answer, paraphrases=(), false_answers=(), alternatives=())


def _paraphraser(name: str) -> Callable[[str, int], str] | None:
    if name == "data":
        return None
    if name == "rules":
        return paraphrase.paraphrase
    try:
        module, function = name.split(":")
        own = getattr(importlib.import_module(module), function)
    except (ValueError, ImportError, AttributeError):
        what = "neither rules, data, nor an importable module:function"
        raise UsageError(f"data.paraphrases: {name!r} is {what}") from None
    return lambda text, seed: own(text)
