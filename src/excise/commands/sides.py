"""From a recipe to rows: every side read, checked against the others, and turned into token sequences."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from excise import forward, paraphrase, recipe
from excise.errors import InputRefused, UsageError
from excise.records import Record, check_sides, fingerprint, read_records, split_untouched
from excise.tasks import causal_lm


@dataclass
class Sides:
    """The rows of a run.

    Attributes:
        records: Rows by side, for evaluation too.
        warnings: What a careful reader should know (near duplicates, short sides).
        sources: Where each side came from, for the manifest.
    """

    records: dict[str, list[Record]]
    warnings: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


def read(data: recipe.Data, *, seed: int, need_forget: bool = True) -> Sides:
    """Read and check every side that a recipe names.

    Raises:
        InputRefused: A missing, empty or broken file, or forget rows that also stand among the retained.
        UsageError: The recipe names no forget or no retain rows.
    """
    if need_forget and not data.forget:
        raise UsageError("data.forget is missing: name the file of records to forget")
    if not data.retain:
        raise UsageError("data.retain is missing: name the file of records to keep")
    sides = Sides({})
    if data.forget:
        sides.records["forget"] = read_records(data.forget, limit=data.limit)
    retain = read_records(data.retain, limit=data.limit)
    if isinstance(data.untouched, str):
        sides.records["retain"] = retain
        sides.records["untouched"] = read_records(data.untouched, limit=data.limit)
    elif data.untouched > 0 and need_forget:
        trained, kept = split_untouched(retain, data.untouched, seed)
        sides.records["retain"] = [retain[i] for i in trained]
        sides.records["untouched"] = [retain[i] for i in kept]
    else:
        sides.records["retain"] = retain
    if data.never_seen:
        sides.records["never_seen"] = read_records(data.never_seen, limit=data.limit)
    for name, source in data.utility.items():
        sides.records[name] = read_records(source, limit=data.limit)
    if need_forget:
        others = {k: v for k, v in sides.records.items() if k in ("retain", "untouched", "never_seen")}
        sides.warnings = check_sides(sides.records["forget"], others)
    sides.sources = {k: {"rows": len(v), "fingerprint": fingerprint(v)} for k, v in sides.records.items()}
    return sides


def encoding(data: recipe.Data, *, context: int | None = None) -> causal_lm.Encoding:
    """How text becomes tokens; no longer than the model's context."""
    length = min(data.max_length, context) if context else data.max_length
    return causal_lm.Encoding(
        template=data.template, max_length=length, chat=data.chat, truncate=data.truncate, text_eos=False
    )


def source_of(side: str, data: recipe.Data) -> str:
    """The file of a side, for messages."""
    if side.startswith("forget_"):  # aligned rows: the line is that of the forget row
        return data.forget
    if side == "untouched":
        return data.untouched if isinstance(data.untouched, str) else data.retain
    return data.utility.get(side) or getattr(data, side, None) or side


def cut(sides: Sides, tokenizer: Any, how: causal_lm.Encoding) -> None:
    """Replace plain text rows that are too long by pieces that fit, in place; a cut is no end, so no piece has one."""
    for side, records in sides.records.items():
        pieces = cut_records(records, tokenizer, how)
        if len(pieces) > len(records):
            sides.warnings.append(f"{side}: {len(records)} texts were cut into {len(pieces)} pieces")
        sides.records[side] = pieces


def cut_records(records: Sequence[Record], tokenizer: Any, how: causal_lm.Encoding) -> list[Record]:
    """The same for one list of rows. A last piece of a single token is left out: nothing predicts it."""
    out: list[Record] = []
    for record in records:
        pieces = (
            [record] if record.prompt is not None else causal_lm.chunk_text_records([record], tokenizer, how.max_length)
        )
        if len(pieces) > 1 and len(tokenizer(pieces[-1].completion)["input_ids"]) < 2:
            pieces.pop()
        out += pieces if len(pieces) > 1 else [record]
    return out


def refuse_unfit(
    records: Mapping[str, Sequence[Record]], tokenizer: Any, data: recipe.Data, how: causal_lm.Encoding
) -> None:
    """Refuse, before anything is written, a row that measuring would stumble over.

    Raises:
        InputRefused: A prompt that fills the context, or an answer, paraphrase or false answer that is too long.
    """
    for side, rows in records.items():
        causal_lm.sequences(rows, tokenizer, how, source=source_of(side, data))


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
            asked = _question(record)
            question = None if asked is None else reword(asked, seed + row)
            answer = reword(record.completion, seed + row)
        out.append(_answering(_asking(record, question), answer))
    return out


def _question(record: Record) -> str | None:
    """What is asked: the last thing the user says; None for plain text."""
    turns = record.messages or ()
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), record.prompt)


def _asking(record: Record, question: str | None) -> Record:
    """The record with another question; in a chat, another last turn of the user."""
    if question is None or record.prompt is None:
        return record
    if not record.messages:
        return replace(record, prompt=question)
    turns = list(record.messages)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[last] = {"role": "user", "content": question}
    return replace(record, prompt="\n".join(turn["content"] for turn in turns), messages=tuple(turns))


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


class Rows:
    """Token sequences of each side, and the batches that the engine asks for.

    Example:
        >>> Rows({"forget": []}, pad_id=0).counts
        {'forget': 0}
    """

    def __init__(self, examples: dict[str, list[causal_lm.Example]], pad_id: int) -> None:
        self.examples, self.pad_id = examples, pad_id

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each side."""
        return {side: len(rows) for side, rows in self.examples.items()}

    def batch(self, side: str, indices: Sequence[int]) -> forward.Batch:
        """The rows of a side as tensors, right-padded."""
        made = causal_lm.collate([self.examples[side][i] for i in indices], pad_id=self.pad_id)
        return forward.Batch(
            made["input_ids"], made["attention_mask"], made["label_mask"].to(torch.bool), tuple(int(i) for i in indices)
        )


def encode(
    sides: Sides, names: Sequence[str], tokenizer: Any, data: recipe.Data, *, seed: int, context: int | None
) -> Rows:
    """Token sequences of the named sides; aligned sides are made from the forget rows."""
    how = encoding(data, context=context)
    examples = {}
    for name in names:
        if name not in sides.records and name.startswith("forget_"):
            records = aligned(name, sides.records["forget"], data, seed)
        elif name in sides.records:
            records = sides.records[name]
        else:
            raise UsageError(f"the objective reads the side {name!r}, which the recipe does not give")
        # A rewording that became too long is cut: refusing the row for it would help nobody.
        own = replace(how, truncate=True) if name == "forget_paraphrase" else how
        examples[name] = causal_lm.encode_records(records, tokenizer, own, source=source_of(name, data))
    return Rows(examples, pad_id=tokenizer.pad_token_id)
