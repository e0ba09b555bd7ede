"""From a recipe to rows: every side read, checked against the others, and turned into token sequences."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    return causal_lm.Encoding(template=data.template, max_length=length, chat=data.chat, truncate=data.truncate)


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
                raise InputRefused(f"{data.forget}:{record.line}: no paraphrase: give one, or set data.paraphrases: rules")
            question, answer = record.paraphrases[(seed + row) % len(record.paraphrases)]
            out.append(_replaced(record, question or record.prompt, answer))
        else:
            question = None if record.prompt is None else reword(record.prompt, seed + row)
            out.append(_replaced(record, question, reword(record.completion, seed + row)))
    return out


def _alternatives(forget: Sequence[Record], data: recipe.Data, seed: int) -> list[Record]:
    pool = [r.completion for r in read_records(data.alternatives)] if data.alternatives else []
    out = []
    for row, record in enumerate(forget):
        choices = pool or list(record.alternatives)
        if not choices:
            raise InputRefused(
                f"{data.forget}:{record.line}: field 'alternatives' is missing: give other answers in the row, or a file of "
                "refusals as data.alternatives"
            )
        out.append(_replaced(record, record.prompt, random.Random(f"{seed}/{row}").choice(choices)))
    return out


def _replaced(record: Record, prompt: str | None, completion: str) -> Record:
    return Record(prompt=prompt, completion=completion, messages=record.messages, group=record.group, line=record.line)


def _paraphraser(name: str) -> Callable[[str, int], str] | None:
    if name == "data":
        return None
    if name == "rules":
        return paraphrase.paraphrase
    try:
        module, function = name.split(":")
        own = getattr(importlib.import_module(module), function)
    except (ValueError, ImportError, AttributeError):
        raise UsageError(f"data.paraphrases: {name!r} is neither rules, data, nor an importable module:function") from None
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


def encode(sides: Sides, names: Sequence[str], tokenizer: Any, data: recipe.Data, *, seed: int, context: int | None) -> Rows:
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
        examples[name] = causal_lm.encode_records(records, tokenizer, how)
    return Rows(examples, pad_id=tokenizer.pad_token_id)
