"""Which recipe a run without a recipe file gets, from what it is given: a choice, and why, in a sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The default of language models, what it falls back on, that of classifiers, and where they can learn from strangers.
DEFAULT, WITHOUT, CLASSES, TAUGHT = "gold-like", "simnpo-clreg", "deepcut", "gold-like-ner"


@dataclass(frozen=True)
class Given:
    """What a run without a recipe is given; rows are divided by whole groups, a row without a group is one by itself.

    Attributes:
        task: Of the model.
        never_seen: Whether there are never-seen rows at all.
        grouped: Whether they all say who they are about.
        trains: Whether some of them can be set aside for terms to read.
        calibrates: Whether of the others some can be set aside for a stopping rule.
        watches: Whether some retained rows can be set aside for it.
        never_saw: Whether models that never saw the forget rows are named.
        shuffles: Whether the forget rows have questions, of two groups or more, to be shuffled as a stand-in.
        lora: Whether an adapter is asked for.
        unshaped: Why updates of whole weights cannot be given a shape; empty where they can.
        untied: Why embedding rows are not to be reset; empty where they may.
    """

    task: str = "causal_lm"
    never_seen: bool = True
    grouped: bool = True
    trains: bool = True
    calibrates: bool = True
    watches: bool = True
    never_saw: bool = False
    shuffles: bool = True
    lora: bool = False
    unshaped: str = ""
    untied: str = ""


@dataclass(frozen=True)
class Choice:
    """A recipe by name, dotted keys laid over it, and why: first the recipe, then each thing that was left out."""

    recipe: str
    changes: Mapping[str, Any]
    why: tuple[str, ...]


def choose(given: Given) -> Choice:
    """The recipe for what is given; what a part of it lacks takes that part away, by name, and nothing else.

    Source: ours.

    Example:
        >>> choose(Given()).recipe, dict(choose(Given()).changes)
        ('gold-like', {})
        >>> choose(Given(never_seen=False, trains=False)).changes["data.never_seen_training"]
        'shuffled'
        >>> choose(Given(never_seen=False, trains=False, shuffles=False)).recipe
        'simnpo-clreg'
    """
    if given.task != "causal_lm" and given.never_saw:
        return _made(TAUGHT, "the default for classifiers with models that never saw the forget rows", [])
    if given.task != "causal_lm":
        return _made(CLASSES, "the default for classifiers", [_stop(given)])
    if given.trains:
        return _made(DEFAULT, _LIKE, [_by_rows(given), _stop(given), _weights(given), _embeddings(given)])
    if given.shuffles:
        return _made(DEFAULT, _LIKE, [_stand_in(given), _weights(given), _embeddings(given)])
    rate = {"optimiser.lr": LORA_RATE} if given.lora else {}
    short = f"{_lacking(given)}, nor questions of two groups to shuffle for a stand-in"
    return _made(WITHOUT, "which needs no never-seen rows", [(rate, f"not {DEFAULT}: {short}: {_REMEDY}")])


Part = tuple[Mapping[str, Any], str]  # keys that change, and why; an empty reason for nothing to say
_LIKE = "the default: forgotten rows become like never-seen ones"
_REMEDY = "give data.never_seen rows of three groups or more"
LORA_RATE, PLAIN_RATE = 1e-4, 1e-5  # as in the recipe `lora`, and the schema's own


def _made(recipe: str, reason: str, parts: list[Part]) -> Choice:
    changes = {key: value for part, _ in parts for key, value in part.items()}
    first = f"no recipe was named: {recipe}, {reason}"
    return Choice(recipe, changes, (first, *(why for _, why in parts if why)))


def _lacking(given: Given) -> str:
    return "the never-seen rows are one group, which cannot be divided" if given.never_seen else "no never-seen rows"


def _by_rows(given: Given) -> Part:
    if not given.never_seen or given.grouped:
        return {}, ""
    return {}, "never-seen rows without a group are divided row by row: whom training read about may be measured too"


def _stop(given: Given) -> Part:
    if not given.never_seen and not given.calibrates:
        why = f"no never-seen rows: {_REMEDY}"
    elif not given.calibrates:
        why = f"the never-seen rows are too few groups to set some aside for it: {_REMEDY}"
    elif not given.watches:
        why = "the retained rows are too few groups to set some aside for it: give data.retain rows of three or more"
    else:
        return {}, ""
    return {"stop.rule": "none"}, f"no stopping rule, the run goes to its end: {why}"


def _stand_in(given: Given) -> Part:
    changes = {
        "data.never_seen_training": "shuffled",
        "objective.forget.quantile.refresh": 0,  # what is shuffled is forgotten too: a moving aim would run away
        "objective.retain.anchor.sides": ["retain"],
        "objective.regularise": {},
        "stop.rule": "none",
    }
    why = (
        f"{_lacking(given)}: forgotten answers under others' questions stand in for them, for likelihoods alone (states"
        f" are held on retained rows only, without latent_match or a stopping rule): {_REMEDY}"
    )
    return changes, why


def _weights(given: Given) -> Part:
    """Plain steps where updates have no shape: its rate and its pull to the start are those of shaped ones."""
    why = "an adapter is asked for (model.lora), which has no shaped updates" if given.lora else given.unshaped
    if not why:
        return {}, ""
    rate = LORA_RATE if given.lora else PLAIN_RATE
    changes = {"initialise": {}, "optimiser.lr": rate, "optimiser.betas": [0.9, 0.999], "optimiser.weight_decay": 0.0}
    return changes, f"no preconditioned start: {why}; the learning rate is {rate:g}"


def _embeddings(given: Given) -> Part:
    why = "they lie below the adapter" if given.lora else given.untied
    return ({"edit": {}}, f"no embedding rows are reset: {why}") if why else ({}, "")
