"""Everything of a run that is known before weights move: rows encoded, model loaded, precision chosen, adapter on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from excise import models, recipe
from excise.commands import folders
from excise.commands.measuring import diagnostics
from excise.commands.starting import beginning, editing, objective, shaping, sides
from excise.editing import Chosen
from excise.errors import IntegrityFailed
from excise.forward import Anatomy, Step, token_logp
from excise.initialise import store
from excise.objectives.term import Term
from excise.schedule import Plan
from excise.tasks import TASKS


@dataclass
class Prepared:
    """Everything that is known before weights move.

    ``base`` is the fingerprint of the weights that an adapter or a shape is made on, ``counted`` the sides whose tokens
    an edit counts, ``chosen`` the embedding rows that it resets, and ``said`` what models say of every forgotten label
    that never saw it, for terms that read it.
    """

    settings: recipe.Recipe
    given: sides.Sides
    terms: list[Term]
    rows: sides.Rows
    tokenizer: Any
    model: nn.Module
    precision: str
    plan: Plan
    wanted: beginning.Wanted
    base: str | None = None
    classes: tuple[str, ...] = ()
    begun: beginning.Begun = field(default_factory=beginning.Begun)
    counted: tuple[str, ...] = ()
    chosen: Chosen | None = None
    said: dict[str, Tensor] = field(default_factory=dict)


def prepare(
    settings: recipe.Recipe,
    given: sides.Sides,
    terms: list[Term],
    tokenizer: Any,
    *,
    begun: str | None = None,
    pictured: bool = False,
    new: bool = False,
) -> Prepared:
    """Encode the sides that the terms read, load the model, choose the precision and attach the adapter.

    A run that was begun in the folder ``begun`` keeps its precision: a probe might decide otherwise this time.
    ``pictured`` also takes what the report shows of an adapter's update; ``new`` lets a classifier get a new head.
    """
    objective.check_sides(terms, given.records)
    objective.check_task(terms, settings.model.task)
    objective.check_stand_in(terms, settings.data)
    objective.check_never_saw(terms, settings.data)
    wanted = beginning.wanted(settings, terms, pictured=pictured)
    beginning.check_sides(wanted, given.records)
    counted = editing.check(settings, given)
    _same_rows(begun, given)
    names, watched = objective.sides_read(terms), [s for s in (sides.CALIBRATION, sides.WATCH) if s in given.records]
    task, how = settings.model.task, sides.encoding(settings.data, context=context(settings))
    classes = classes_of(settings, given, new=new)
    sides.cut(given, tokenizer, how, task=task, long=settings.data.long)
    rows = sides.encode(
        given, list(dict.fromkeys([*names, *objective.populations_read(terms), *wanted.sides, *watched, *counted])),
        tokenizer, settings.data,
        seed=settings.seed, context=context(settings), task=task, classes=classes,
    )  # fmt: skip
    chosen = editing.chosen(settings, counted, rows, tokenizer)
    model = models.load(settings.model, tokenizer=tokenizer, classes=classes, seed=settings.seed)
    objective.check_layers(terms, Anatomy.of(model).depth)
    precision: str = settings.model.precision
    if precision == "auto":
        precision, attention = _kept(begun) or _probe(settings, model, rows, names)
        if attention:
            model.set_attn_implementation(attention)  # type: ignore[operator]
    plan = Plan(
        {k: v for k, v in rows.counts.items() if k in names}, settings.schedule, settings.seed,
        classes={"retain": rows.classes_of("retain", classes)} if classes else {},
    )  # fmt: skip
    torch.manual_seed(settings.seed)  # an adapter's factors are drawn here
    model = models.prepare(model, settings.model)
    if wanted.shaper:
        shaping.choose(model, settings.model)
    beginning.check(wanted, model, rows, settings.statistics)
    base = store.fingerprint(model) if settings.model.lora is not None or wanted.shaper else None
    _same_base(begun, base)
    return Prepared(
        settings, given, terms, rows, tokenizer, model, precision, plan, wanted, base, classes,
        counted=tuple(counted), chosen=chosen,
    )  # fmt: skip


def _kept(folder: str | None) -> tuple[str, str | None] | None:
    """Precision and attention that a run was begun with."""
    record = folders.record(folder)
    attention: Any = record.get("attention") if record else None
    return (record["precision"], attention) if record else None


def _same_rows(folder: str | None, given: sides.Sides) -> None:
    """Refuse to go on with other rows than those that a run was begun with."""
    record = folders.record(folder)
    for side, source in (record["data"] if record else {}).items():
        if given.sources.get(side) != source:
            raise IntegrityFailed(f"{folder}: begun with other {side} rows; resume with the same, or begin anew")


def _same_base(folder: str | None, base: str | None) -> None:
    """Refuse to train an adapter on with another model below it."""
    record = folders.record(folder)
    was = (record or {}).get("model", {}).get("sha256")
    if was is not None and base is not None and was != base:
        raise IntegrityFailed(f"{folder}: begun with another model; resume with the same, or begin anew")


def context(settings: recipe.Recipe) -> int | None:
    """Longest input of the model, read from its config alone, so that bad rows are refused before weights load."""
    return models.context_of(models.read_config(settings.model, headless=settings.model.task != "causal_lm"))


def classes_of(settings: recipe.Recipe, given: sides.Sides, *, new: bool = False) -> tuple[str, ...]:
    """The classes of a classifier, by number: the model's own, or where a ``new`` head will do those of the rows."""
    task = settings.model.task
    if task == "causal_lm":
        return ()
    config = models.read_config(settings.model, headless=new)
    if settings.model.config is None and models.has_head(config, task):
        return tuple(config.id2label[i] for i in range(config.num_labels))
    return TASKS[task].class_names([r for records in given.records.values() for r in records])


def _probe(settings: recipe.Recipe, model: nn.Module, rows: sides.Rows, names: Sequence[str]) -> tuple[str, str | None]:
    """Time one pass of a real batch in each precision that makes sense on this machine."""
    side = "forget" if "forget" in names else names[0]
    count = min(settings.schedule.forget_batch, rows.counts[side])
    batch = rows.batch(side, range(count))
    anatomy = Anatomy.of(model)

    def sample() -> torch.Tensor:
        return -Step(model, anatomy, {side: batch}).run([token_logp(side)])[token_logp(side)].mean()

    return models.precision(settings.model, model, sample)


def tokenizer_of(settings: recipe.Recipe) -> Any:
    """The tokenizer that a recipe names, or its model's own."""
    name, task = settings.model.tokenizer or settings.model.name, settings.model.task
    return models.load_tokenizer(name, settings.model.revision, task=task)


def prepare_unlearning(settings: recipe.Recipe, given: sides.Sides, *, resume: bool) -> Prepared:
    """Everything of ``excise run`` that can refuse its input, before anything is written."""
    terms = objective.terms(settings.objective)
    tokenizer = tokenizer_of(settings)
    return prepare(
        settings, given, terms, tokenizer, begun=settings.out if resume else None, pictured=diagnostics.wanted(settings)
    )
