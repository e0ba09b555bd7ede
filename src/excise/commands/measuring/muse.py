"""Suite ``muse``: what a recipe asks, read and checked, and a model measured on it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from excise import models, recipe
from excise.commands.measuring.parts import Part, Parts, of_tables, tables_of
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.forward import Anatomy
from excise.metrics import measure, muse, muse_scores
from excise.metrics.table import Table
from excise.records import Record, fingerprint, read_records

#: Table -> the key of ``evaluate.muse`` that names its rows.
TABLES = {
    "muse_passages": "passages",
    "muse_forget_questions": "forget_questions",
    "muse_retain_questions": "retain_questions",
    muse_scores.MEMBERS: "members",
    muse_scores.NON_MEMBERS: "non_members",
}
_EXAMPLES = {"muse_forget_questions": "forget_examples", "muse_retain_questions": "retain_examples"}


@dataclass(frozen=True)
class Asked:
    """Rows by table, and the solved examples that stand before the questions of a table."""

    records: Mapping[str, list[Record]]
    examples: Mapping[str, list[Record]]

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """What was asked, for the manifest."""
        named = {**self.records, **{f"{side}_examples": rows for side, rows in self.examples.items()}}
        return {side: {"rows": len(rows), "fingerprint": fingerprint(rows)} for side, rows in named.items()}


def read(settings: recipe.Recipe) -> Asked | None:
    """What a recipe asks of MUSE; None where it asks nothing.

    Raises:
        UsageError: Members without non-members, examples without questions, or a model that writes no text.
        InputRefused: Rows that cannot be read, or of the wrong kind.
    """
    own = settings.evaluate.muse
    given = {side: getattr(own, key) for side, key in TABLES.items() if getattr(own, key)}
    if not given:
        return None
    if settings.model.task != "causal_lm":
        raise UsageError("evaluate.muse: MUSE is for language models; leave it out")
    if (muse_scores.MEMBERS in given) != (muse_scores.NON_MEMBERS in given):
        raise UsageError("evaluate.muse: name members and non_members, or neither (forget and never-seen rows then)")
    for side, key in _EXAMPLES.items():
        if getattr(own, key) and side not in given:
            raise UsageError(f"evaluate.muse.{key}: without {TABLES[side]} nothing is asked after these examples")
    most = settings.evaluate.max_rows
    records = {side: read_records(source, limit=most) for side, source in given.items()}
    for side, rows in records.items():
        texts = side in (muse_scores.MEMBERS, muse_scores.NON_MEMBERS)
        if any((r.prompt is None) != texts for r in rows):
            kind = "plain texts (text)" if texts else "a prompt and how it goes on (prompt, gt) or question and answer"
            raise InputRefused(f"{given[side]}: evaluate.muse.{TABLES[side]} needs rows of {kind}")
    named = {side: getattr(own, key) for side, key in _EXAMPLES.items() if getattr(own, key)}
    return Asked(records, {side: read_records(source) for side, source in named.items()})


def measured(
    role: str,
    lend: Callable[[], tuple[nn.Module, Any]],
    asked: Asked,
    settings: recipe.Recipe,
    progress: Progress,
    parts: Parts,
) -> dict[str, Table]:
    """MUSE's tables of one model; ``lend`` loads it, and is only called for what is not kept yet."""
    stage, found = f"muse {role}", dict[str, Table]()
    with progress.stage(stage, len(asked.records)) as advance:
        for done, (side, rows) in enumerate(asked.records.items()):

            def make(side: str = side, rows: list[Record] = rows) -> Part:
                return of_tables({side: _table(side, rows, *lend(), asked, settings)})

            found |= tables_of(parts.kept(f"{side}-{_key(rows, asked.examples.get(side, []))}", stage, progress, make))
            advance(done + 1)
    return found


def _key(*rows: list[Record]) -> str:
    return hashlib.sha256("".join(fingerprint(r) for r in rows).encode()).hexdigest()[:12]


def _table(
    side: str, rows: list[Record], model: nn.Module, tokenizer: Any, asked: Asked, settings: recipe.Recipe
) -> Table:
    model.eval()
    if side == "muse_passages":
        return muse.passages(side, model, tokenizer, rows)
    if side in _EXAMPLES:
        return muse.answers(side, model, tokenizer, rows, asked.examples.get(side, []))
    # PrivLeak reads whole texts; one that is longer than the context is cut, as the benchmark's evaluation does.
    how = dataclasses.replace(sides.encoding(settings.data, context=models.context_length(model)), truncate=True)
    options = settings.evaluate
    swept = measure.sweep(
        model, Anatomy.of(model), tokenizer, {side: rows}, how, batch_tokens=options.batch_tokens
    )  # fmt: skip
    return swept.tables[side]
