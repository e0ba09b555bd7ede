"""From a recipe to rows: every side read, checked against the others, and turned into token sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from excise import forward, ledger, recipe
from excise.commands.starting import aligning, objective
from excise.commands.starting.aligning import SHUFFLED
from excise.errors import InputRefused, UsageError
from excise.records import Record, check_sides, fingerprint, in_part, split_untouched
from excise.schedule import NEVER_SEEN
from excise.tasks import TASKS, causal_lm

#: Rows that a stopping rule reads, and nothing else does.
CALIBRATION, WATCH = "calibration", "watch"
#: Never-seen rows that terms read as ``never_seen``; those of that name in `Sides` are the evaluation's.
TRAINING = "never_seen_training"
SET_ASIDE = (CALIBRATION, WATCH, TRAINING)
KEPT = ("retain", "untouched", "never_seen")


@dataclass
class Sides:
    """The rows of a run.

    Attributes:
        records: Rows by side, for evaluation too.
        warnings: What a careful reader should know (near duplicates, short sides).
        sources: Where each side came from, for the manifest.
        left_out: How many rows of a side an earlier request had named.
        unseen: Of forget rows and the never-seen ones of a rule, row by row: what a model that never saw it says of its
            labels (`watching.Said`). Empty where none was asked.
    """

    records: dict[str, list[Record]]
    warnings: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, list[Any]] = field(default_factory=dict)


def read(
    data: recipe.Data,
    *,
    seed: int,
    need_forget: bool = True,
    task: str = "causal_lm",
    stop: recipe.Stop = recipe.Stop(),  # noqa: B008 - frozen
    trains_never_seen: bool = False,
) -> Sides:
    """Read and check every side that a recipe names, as rows of its task; a stopping rule's rows are set aside.

    Where terms read never-seen rows (``trains_never_seen``), theirs are set aside first: training, stopping and
    evaluation never share a group.

    Raises:
        InputRefused: A missing, empty or broken file, forget rows that also stand among the retained, none of a part.
        UsageError: The recipe names no forget or no retain rows, or no never-seen rows for a rule that needs them.
    """
    if need_forget and not data.forget:
        raise UsageError("data.forget is missing: name the file of records to forget")
    if not data.retain:
        raise UsageError("data.retain is missing: name the file of records to keep")
    rows = partial(TASKS[task].read, limit=data.limit, tag_names=data.tag_names)
    sides = Sides({})
    if data.forget:
        sides.records["forget"] = rows(data.forget)
    retain = rows(data.retain)
    if isinstance(data.untouched, str):
        sides.records["retain"] = retain
        sides.records["untouched"] = rows(data.untouched)
    elif data.untouched > 0 and need_forget:
        trained, kept = split_untouched(retain, data.untouched, seed)
        sides.records["retain"] = [retain[i] for i in trained]
        sides.records["untouched"] = [retain[i] for i in kept]
    else:
        sides.records["retain"] = retain
    if need_forget and data.part:
        _take_part(sides, data.part)
    if data.never_seen:
        sides.records["never_seen"] = rows(data.never_seen)
    for name, source in data.utility.items():
        sides.records[name] = rows(source)
    if need_forget and trains_never_seen:
        _set_training_aside(sides, data, rows, seed, task)
    if need_forget and stop.rule != "none":
        _set_aside(sides, stop, rows, seed)
    if data.without:  # after every split, so that a split is the same before and after a request
        for name in [side for side in sides.records if side != "forget"]:
            sides.records[name] = leave_out(sides, name, sides.records[name], data.without)
    if need_forget:
        compared = (*KEPT, CALIBRATION) if data.never_seen_training == SHUFFLED else (*KEPT, CALIBRATION, TRAINING)
        others = {k: v for k, v in sides.records.items() if k in compared}
        sides.warnings += check_sides(sides.records["forget"], others)
    sides.sources = {k: {"rows": len(v), "fingerprint": fingerprint(v)} for k, v in sides.records.items()}
    return sides


def _take_part(sides: Sides, part: str) -> None:
    """Leave the rows that a model of a part was trained on: the others it never saw."""
    for side, whole in sides.records.items():
        try:
            sides.records[side] = own = in_part(whole, part)
        except InputRefused:
            raise InputRefused(f"data.{side}: no row is of {part}: a model of that part never saw them") from None
        if side == "forget" and len(own) < len(whole):
            left = f"{len(whole) - len(own)} of {len(whole)} row(s)"
            sides.warnings.append(f"forget: {left} are not of {part}: this model never saw them")


def leave_out(sides: Sides, side: str, records: Sequence[Record], without: str) -> list[Record]:
    """The rows of a side that no request of a ledger named; how many were left out becomes a warning.

    Raises:
        InputRefused: None is left.
    """
    named = set(ledger.forgotten(without).among(records))
    if len(named) == len(records):
        raise InputRefused(f"data.{side}: every row was named by an earlier request: give rows that are to be kept")
    if named:
        sides.warnings.append(f"{side}: {len(named)} row(s) were left out, which earlier requests named")
        sides.left_out[side] = len(named)
    return [r for i, r in enumerate(records) if i not in named]


def of(settings: recipe.Recipe) -> Sides:
    """`read` for a recipe that forgets."""
    return read(
        settings.data, seed=settings.seed, task=settings.model.task, stop=settings.stop,
        trains_never_seen=objective.trains_never_seen(settings.objective),
    )  # fmt: skip


def _set_training_aside(
    sides: Sides, data: recipe.Data, rows: Callable[[str], list[Record]], seed: int, task: str
) -> None:
    """The never-seen rows that terms read: whole groups of them, a source of their own, or a stand-in that says so."""
    source = data.never_seen_training
    if source == SHUFFLED:
        sides.records[TRAINING] = aligning.shuffled(sides.records["forget"], data, seed, task=task)
        sides.warnings.append(
            "never-seen rows for training: a stand-in, forgotten answers under the questions of other forgotten rows"
        )
    elif isinstance(source, str):
        sides.records[TRAINING] = rows(source)
        check_sides(sides.records[TRAINING], {k: v for k, v in sides.records.items() if k in KEPT})
    elif "never_seen" in sides.records:
        _divide(sides, "never_seen", TRAINING, source, seed)
    else:
        raise UsageError(
            "the objective reads never-seen rows: name data.never_seen, or a file as data.never_seen_training (for "
            "quantile alone also its stand-in, shuffled)"
        )


def _set_aside(sides: Sides, stop: recipe.Stop, rows: Callable[[str], list[Record]], seed: int) -> None:
    """Take the rows of a stopping rule out of the never-seen and the retained ones, whole groups.

    The evaluation's never-seen rows are then none of the rule's by construction: a rule that read them would flatter
    every number that compares with them.
    """
    if isinstance(stop.calibration, str):
        sides.records[CALIBRATION] = rows(stop.calibration)
        check_sides(sides.records[CALIBRATION], {k: v for k, v in sides.records.items() if k in KEPT})
    elif "never_seen" in sides.records:
        _divide(sides, "never_seen", CALIBRATION, stop.calibration, seed)
    else:
        raise UsageError("stop.rule needs rows that the model never saw: name data.never_seen or stop.calibration")
    _divide(sides, "retain", WATCH, stop.watch, seed)


def _divide(sides: Sides, side: str, new: str, share: float, seed: int) -> None:
    whole = sides.records[side]
    try:
        rest, taken = split_untouched(whole, share, seed)
    except InputRefused:
        raise InputRefused(f"data.{side}: a single group is left, which cannot be divided for {new}") from None
    if not taken:
        key = "data.never_seen_training" if new == TRAINING else "stop"
        raise UsageError(f"{key}: a share of {share:g} sets no rows of {side} aside: give more than 0")
    sides.records[side], sides.records[new] = [whole[i] for i in rest], [whole[i] for i in taken]


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
    if side == "contrast":
        return data.retain
    if side in (NEVER_SEEN, TRAINING):
        own = data.never_seen_training
        return data.forget if own == SHUFFLED else own if isinstance(own, str) else data.never_seen or side
    if side == "untouched":
        return data.untouched if isinstance(data.untouched, str) else data.retain
    return data.utility.get(side) or getattr(data, side, None) or side


def cut(
    sides: Sides, tokenizer: Any, how: causal_lm.Encoding, *, task: str = "causal_lm", long: str | None = None
) -> None:
    """Replace rows that are too long by pieces that fit, in place, where task or recipe say so."""
    for side, records in sides.records.items():
        pieces = cut_records(records, tokenizer, how, task=task, long=long, source=side)
        if len(pieces) > len(records):
            sides.warnings.append(f"{side}: {len(records)} texts were cut into {len(pieces)} pieces")
        sides.records[side] = pieces


def cut_records(
    records: Sequence[Record],
    tokenizer: Any,
    how: causal_lm.Encoding,
    *,
    task: str = "causal_lm",
    long: str | None = None,
    source: str = "",
) -> list[Record]:
    """The same for one list of rows; ``long`` is ``split``, ``refuse`` (encoding them does that) or the task's own."""
    if (long or TASKS[task].LONG) == "refuse":
        return list(records)
    return TASKS[task].cut(records, tokenizer, how.max_length, source=source)


def refuse_unfit(
    records: Mapping[str, Sequence[Record]],
    tokenizer: Any,
    data: recipe.Data,
    how: causal_lm.Encoding,
    *,
    task: str = "causal_lm",
    classes: Sequence[str] = (),
) -> None:
    """Refuse, before anything is written, a row that measuring would stumble over.

    Raises:
        InputRefused: A prompt that fills the context, an answer, paraphrase or false answer that is too long, or a
            class that the model does not have.
    """
    for side, rows in records.items():
        TASKS[task].sequences(rows, tokenizer, how, source=source_of(side, data), **_names(classes))


def _names(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The class names as the functions of a task take them: classifiers need them, language models have none."""
    return {"names": tuple(classes)} if classes else {}


class Rows:
    """Token sequences of each side, and the batches that the engine asks for.

    Example:
        >>> Rows({"forget": []}, pad_id=0).counts
        {'forget': 0}
    """

    def __init__(self, examples: dict[str, list[Any]], pad_id: int, task: str = "causal_lm") -> None:
        self.examples, self.pad_id, self.task = examples, pad_id, task

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each side."""
        return {side: len(rows) for side, rows in self.examples.items()}

    def labels_of(self, side: str) -> list[tuple[int, ...]]:
        """The labels of each row: classes, or the tokens of its answer."""
        of_tokens = self.task == "causal_lm"
        return [e.input_ids[e.label_start :] if of_tokens else e.classes for e in self.examples.get(side, [])]

    def classes_of(self, side: str, names: Sequence[str]) -> list[tuple[int, ...]]:
        """The classes of each row, O left out."""
        return [tuple(c for c in e.classes if names[c] != "O") for e in self.examples.get(side, [])]

    def batch(self, side: str, indices: Sequence[int]) -> forward.Batch:
        """The rows of a side as tensors, right-padded."""
        made = TASKS[self.task].collate([self.examples[side][i] for i in indices], pad_id=self.pad_id)
        return forward.Batch(**made, indices=tuple(int(i) for i in indices))


def encode(
    sides: Sides,
    names: Sequence[str],
    tokenizer: Any,
    data: recipe.Data,
    *,
    seed: int,
    context: int | None,
    task: str = "causal_lm",
    classes: Sequence[str] = (),
) -> Rows:
    """Token sequences of the named sides; aligned sides are made from the forget rows.

    Args:
        sides: From `read`.
        names: The sides that the objective reads.
        tokenizer: Of transformers.
        data: Of the recipe.
        seed: For aligned sides.
        context: Longest sequence of the model, where it has one.
        task: Of the recipe.
        classes: The names of the classes by number, where the task has classes.
    """
    how = encoding(data, context=context)
    examples = {}
    for name in names:
        if name == NEVER_SEEN and TRAINING in sides.records:  # what is trained on is never what is measured
            records = sides.records[TRAINING]
        elif name in sides.records:
            records = sides.records[name]
        elif name == "contrast":  # the retained rows again, drawn apart from those that are trained on
            records = sides.records["retain"]
        elif name.startswith("forget_") and task == "causal_lm":  # other answers are a matter of text
            records = aligning.aligned(name, sides.records["forget"], data, seed)
        else:
            raise UsageError(f"the objective reads the side {name!r}, which the recipe does not give")
        # A rewording that became too long is cut: refusing the row for it would help nobody. So is a stand-in.
        made = name == "forget_paraphrase" or (name == NEVER_SEEN and data.never_seen_training == SHUFFLED)
        own = replace(how, truncate=True) if made else how
        source = source_of(name, data)
        examples[name] = TASKS[task].encode_records(records, tokenizer, own, source=source, **_names(classes))
    return Rows(examples, pad_id=tokenizer.pad_token_id, task=task)
