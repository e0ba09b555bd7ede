"""From the names in a recipe to terms: look them up, check their settings, and see that their sides are there."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from excise import population, recipe
from excise.commands.starting.aligning import SHUFFLED
from excise.errors import UsageError
from excise.forward import Product, base_side
from excise.objectives import FORGET, NEVER_SAW, REGULARISE, RETAIN, deepcut_cautions, rmu_direction, source_of
from excise.objectives.term import Dual, Ramp, Term
from excise.schedule import NEVER_SEEN

#: Sides that are made from those that a recipe gives.
MADE = ("forget_alternative", "forget_paraphrase", "contrast")
TABLES: Mapping[str, Mapping[str, Callable]] = {"forget": FORGET, "retain": RETAIN, "regularise": REGULARISE}


def terms(objective: recipe.Objective) -> list[Term]:
    """The terms of an objective, in the order forget, retain, regularise.

    Raises:
        UsageError: An unknown name or setting (with the nearest known one), or a setting that the term refuses.

    Example:
        >>> [t.name for t in terms(recipe.Objective({"npo": {}}, {"nll": {}}, {}))]
        ['npo', 'nll']
    """
    made: list[Term] = []
    for kind, table in TABLES.items():
        for name, settings in getattr(objective, kind).items():
            found = _build(kind, table, name, settings or {})
            made += found if isinstance(found, tuple) else [found]
    if not made:
        raise UsageError("the objective has no term: name at least one under objective.forget or objective.retain")
    return made


def _build(kind: str, table: Mapping[str, Callable], name: str, settings: Any) -> Term | tuple[Term, ...]:
    factory = table.get(name) or _imported(name)
    if factory is None:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(table)}"
        raise UsageError(f"objective.{kind}: unknown term {name!r}{hint}")
    if not isinstance(settings, Mapping):
        raise UsageError(f"objective.{kind}.{name}: expected settings, found {settings!r}")
    known = inspect.signature(factory).parameters
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise UsageError(f"objective.{kind}.{name}: unknown setting {key!r}{hint}")
    values = {k: _weight(v) if k == "weight" else v for k, v in settings.items()}
    try:
        return factory(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"objective.{kind}.{name}: {error}") from None


def _weight(value: Any) -> Any:
    """A number, ``{start, end, until}`` for a ramp, or ``{start, epsilon, eta, warmup}`` for a dual weight."""
    if not isinstance(value, Mapping):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"weight: {value!r} is no number")
        return value
    try:
        return Dual(**value) if "epsilon" in value else Ramp(**value)
    except TypeError as error:
        raise UsageError(f"weight: {error}") from None


def _imported(name: str) -> Callable | None:
    """``package.module:function``: the door for terms of one's own."""
    if ":" not in name:
        return None
    module, function = name.split(":", 1)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        raise UsageError(f"objective: {name!r} cannot be imported") from None


def cited(objective: recipe.Objective, made: Sequence[Term]) -> list[dict[str, str]]:
    """Name, weight and source of each term, for the record of a run."""
    sources = {n: source_of(t[n]) for k, t in TABLES.items() for n in getattr(objective, k) if n in t}
    return [
        {"name": t.name, "weight": str(t.weight), "citation": sources.get(t.name) or sources.get(t.name[:5], "")}
        for t in made
    ]


def cautions(objective: recipe.Objective) -> list[str]:
    """What is known to go wrong with the settings chosen, for the warnings of a plan and a run.

    Example:
        >>> cautions(recipe.Objective())
        []
    """
    return deepcut_cautions(objective.regularise["deepcut"] or {}) if "deepcut" in objective.regularise else []


def needs(made: Sequence[Term]) -> list[Product]:
    """Every product that the terms read, each once."""
    return list(dict.fromkeys(p for term in made for p in term.needs()))


def sides_read(made: Sequence[Term]) -> list[str]:
    """The sides that the terms read, a batch at a time."""
    return list(dict.fromkeys(str(base_side(p.side)) for p in needs(made) if p.side is not None))


def populations_read(made: Sequence[Term]) -> list[str]:
    """The sides of which the terms read all rows at once."""
    return list(dict.fromkeys(population.named(p).side for p in population.wanted(needs(made))))


def reads_never_seen(made: Sequence[Term]) -> bool:
    """Whether a term reads rows that no model was trained on."""
    return NEVER_SEEN in (*sides_read(made), *populations_read(made))


def trains_never_seen(objective: recipe.Objective) -> bool:
    """`reads_never_seen` of an objective by names; one that cannot be built is refused by `terms`."""
    try:
        return reads_never_seen(terms(objective))
    except UsageError:
        return False


def check_stand_in(made: Sequence[Term], data: recipe.Data) -> None:
    """Refuse a stand-in for never-seen rows where their states are read: those would hold what is to be forgotten."""
    for term in made if data.never_seen_training == SHUFFLED else ():
        whole = [population.named(p) for p in population.wanted(term.needs())]
        if NEVER_SEEN in sides_read([term]) or any(w.kind == "states" and w.side == NEVER_SEEN for w in whole):
            raise UsageError(
                f"the term {term.name!r} reads states of never-seen rows, for which data.never_seen_training: shuffled "
                "is no stand-in: leave it out (anchor: sides: [retain]), or give never-seen rows"
            )


def check_sides(made: Sequence[Term], given: Collection[str]) -> None:
    """Refuse, before anything loads, a term whose side the recipe does not give."""
    for term in made:
        for p in term.needs():
            side = base_side(p.side)
            if side is not None and side not in given and side not in (*MADE, NEVER_SEEN):
                raise UsageError(f"the term {term.name!r} reads the side {side!r}, which the recipe does not give")
    for side in populations_read(made):
        if side not in given and side != NEVER_SEEN:
            raise UsageError(f"the objective reads all rows of the side {side!r}, which the recipe does not give")
    if reads_never_seen(made) and not {"never_seen", "never_seen_training"} & set(given):
        raise UsageError("the objective reads never-seen rows, which the recipe does not give: name data.never_seen")


def reads_never_saw(made: Sequence[Term]) -> bool:
    """Whether a term learns from models that never saw the forget rows."""
    return any(p.what == "constant" and p.detail == NEVER_SAW for p in needs(made))


def check_never_saw(made: Sequence[Term], data: recipe.Data) -> None:
    """Refuse, before anything loads, to learn from models that the recipe does not name."""
    if reads_never_saw(made) and not data.never_saw:
        raise UsageError(
            "the objective learns from models that never saw the forget rows: name them as data.never_saw (of parts of "
            "the rows, trained once, they serve every request: see data.part)"
        )


def check_task(made: Sequence[Term], task: str) -> None:
    """Refuse a term that tells classes apart where the model has none."""
    for term in made if task == "causal_lm" else ():
        if any(p.what == "constant" and str(p.detail).startswith("class_map/") for p in term.needs()):
            raise UsageError(f"the term {term.name!r} is for classifiers: set model.task, to token_classification say")


def check_layers(made: Sequence[Term], depth: int) -> None:
    """Refuse a layer that the model does not have."""
    for term in made:
        for p in term.needs():
            if p.layer is not None and not -depth - 1 <= p.layer <= depth:
                raise UsageError(f"the term {term.name!r} reads layer {p.layer}; the model has layers 0 to {depth}")


def constants(made: Sequence[Term], width: int, seed: int, provided: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is fixed for the run: drawn from the seed, or ``provided`` (bases of the retained rows, by layer).

    Raises:
        UsageError: A term asks for a constant that nobody provides; there is no stand-in.
    """
    out: dict[str, Any] = {}
    for p in needs(made):
        if p.what != "constant":
            continue
        detail = str(p.detail)
        if detail in (provided or {}):
            out[detail] = (provided or {})[detail]
        elif detail == "rmu_direction":
            out[detail] = rmu_direction(width, seed=seed)
        elif detail == "seed":
            out[detail] = torch.tensor(seed)
        else:
            raise UsageError(f"the objective reads the constant {detail!r}, which nothing provides")
    return out
