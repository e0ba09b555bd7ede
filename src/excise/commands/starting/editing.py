"""The edits of a recipe on a run's rows and model: what is refused, what is counted, and what the record says of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from excise import artifacts, editing, files, ranks, recipe
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError

#: Sides of retained rows, as a recipe with or without a stopping rule has them.
RETAINED = ("retain", "untouched", sides.WATCH)


def check(settings: recipe.Recipe, given: sides.Sides) -> list[str]:
    """The sides whose tokens an edit counts; refuses what needs no model to be refused.

    Raises:
        UsageError: An adapter or a new model, or a side that the recipe does not give.
    """
    own = settings.edit.reset_rows
    if own is None:
        return []
    if settings.model.lora is not None:
        raise UsageError(
            "edit.reset_rows changes the weights below an adapter, which would be wrong on the untouched model: leave "
            "model.lora or the edit out"
        )
    if settings.model.config is not None:
        raise UsageError("edit.reset_rows: a new model (model.config) has nothing to reset: set model.name")
    kept = list(own.kept) or [side for side in RETAINED if side in given.records]
    for side in ("forget", *kept):
        if side not in given.records:
            near = difflib.get_close_matches(side, given.records, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; given: {', '.join(given.records)}"
            raise UsageError(f"edit.reset_rows counts the side {side!r}, which the recipe does not give{hint}")
    if "forget" in kept:
        raise UsageError("edit.reset_rows.kept names forget: name sides that are kept")
    return ["forget", *kept]


def chosen(settings: recipe.Recipe, read: Sequence[str], rows: sides.Rows, tokenizer: Any) -> editing.Chosen | None:
    """The embedding rows to reset, from token counts alone; None where the recipe edits nothing.

    Raises:
        InputRefused: Hardly a token is unused, so that there is nothing to draw new rows from.
    """
    own = settings.edit.reset_rows
    if own is None:
        return None
    size = len(tokenizer)
    forget, *others = (editing.counts((e.input_ids for e in rows.examples[side]), size) for side in read)
    found = editing.choose(
        forget, sum(others[1:], others[0]), share=own.share,
        special=[i for i in tokenizer.all_special_ids if i < size], single=_single(tokenizer),
    )  # fmt: skip
    if len(found.tokens) and len(found.unused) < 2:
        if settings.chosen:  # a default that has no place is left out; what somebody asked for is refused
            return editing.Chosen(found.tokens[:0], found.weights[:0], found.unused)
        raise InputRefused(
            f"edit.reset_rows: {len(found.unused)} tokens of the vocabulary are unused, and new rows are drawn from "
            "two or more: leave the edit out"
        )
    return found


def _single(tokenizer: Any) -> list[int]:
    """Tokens of one byte or one character, however the tokenizer writes them."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [i for i, name in enumerate(names) if len(name) == 1 or (name.startswith("<0x") and len(name) == 6)]


def counted(settings: recipe.Recipe, read: Sequence[str], found: editing.Chosen) -> dict[str, Any]:
    """What may be said of an edit: counts, and never which tokens, which would name those who are forgotten."""
    own = settings.edit.reset_rows
    assert own is not None
    return {
        "reset_rows": {
            "rows": len(found.tokens), "whole": int((found.weights == 1).sum()), "unused": len(found.unused),
            "share": own.share, "kept": list(read[1:]),
        }
    }  # fmt: skip


def apply(
    settings: recipe.Recipe, read: Sequence[str], found: editing.Chosen, model: nn.Module, run: artifacts.RunFolder
) -> None:
    """Reset the rows and write down how many. The same on every rank and when resumed: the seed decides."""
    own = settings.edit.reset_rows
    assert own is not None
    tables = editing.reset_rows(model, found, seed=settings.seed, output=own.output)
    record = counted(settings, read, found)
    record["reset_rows"]["tables"] = tables
    if ranks.place()[0] == 0:
        files.write_json(run.edit, record)
    ranks.wait()


def warnings(run: artifacts.RunFolder) -> list[str]:
    """What a careful reader should know of a run's edits."""
    found = json.loads(run.edit.read_text()) if run.edit.is_file() else {}
    if found.get("reset_rows", {}).get("rows") != 0:
        return []
    if found["reset_rows"]["unused"] < 2:
        return ["edit.reset_rows: no tokens of the vocabulary are unused, to draw new rows from: nothing was reset"]
    return [
        "edit.reset_rows: no token stands in forget rows alone, as with most general vocabularies: nothing was reset "
        "(a share below 1 takes tokens that they nearly have for themselves)"
    ]


def record(folder: str | None) -> dict[str, Any]:
    """What a run's record says of its edits."""
    path = artifacts.RunFolder(Path(folder or "")).edit
    return {"edit": json.loads(path.read_text())} if folder and path.is_file() else {}
