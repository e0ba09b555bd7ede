"""Running a recipe's attacks on each model, keeping each outcome as soon as it is there, and judging them together."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from excise import models, recipe
from excise.artifacts import GOLD, ORIGINAL
from excise.attacks import judges, lending, outcome, sample, table
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.commands.measuring import cache
from excise.commands.measuring.measured import Measured, Numbers
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import InputRefused, NotShown, UsageError
from excise.forward import Anatomy
from excise.records import Record, fingerprint

#: Attacks that look at what unlearning changed, or measure by it.
_READ_ORIGINAL = ("quantise", "adapter", "direction")
#: Attacks that split the forget rows between the attacker and the measurement.
_SPLIT = ("relearn", "related", "direction")
#: Numbers of the relearning suite that an attack gives as well: name -> attack.
_SAME = {"relearned_probability": "relearn", "memorisation_savings": "savings"}


@dataclass(frozen=True)
class Attacks:
    """The attacks that a recipe asks for.

    Attributes:
        settings: Name -> all settings.
        original: Gives the original's weights (None where there are none); they are loaded when first asked for.
        name: The original's hub id or folder.
    """

    settings: Mapping[str, Mapping[str, Any]]
    original: Callable[[], lending.Weights | None]
    name: str = ""


def relearning(options: recipe.Evaluate) -> dict[str, dict[str, Any]]:
    """The two attacks that every run makes, by ``relearn_steps`` and ``savings_steps``; without steps none.

    Example:
        >>> relearning(recipe.Evaluate(relearn_steps=(0, 4), savings_steps=8, gold="g"))
        {'relearn': {'steps': [0, 4]}, 'savings': {'steps': [0, 8], 'control': False}}
    """
    if not options.relearn_steps:
        return {}
    again = {"savings": {"steps": [0, options.savings_steps], "control": options.gold is None}}
    return {"relearn": {"steps": list(options.relearn_steps)}, **(again if options.savings_steps else {})}


def settled(settings: recipe.Recipe, asked: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The attacks of a recipe with all settings, every attack where it names none; see `attacks.table.settled`.

    The rate of those that train is the recipe's ``relearn_lr``, else the run's own, unless the attack names one.

    Raises:
        UsageError: An unknown attack or setting, a judge that is not there, or a model that writes no text.
    """
    if settings.model.task != "causal_lm":
        raise UsageError("evaluate.attacks: these attacks are for language models; leave them out")
    asked = settings.evaluate.attacks if asked is None else asked
    found = table.settled(asked)
    rate = settings.evaluate.relearn_lr or settings.optimiser.lr
    for name, own in found.items():
        if "lr" in own and "lr" not in (asked.get(name) or {}):
            own["lr"] = rate
        if "judged_by" in own:
            judges.judge(own["judged_by"])
    # As a recipe file gives them back: an evaluation is resumed only under the very same recipe.
    return recipe.build({"evaluate": {"attacks": recipe.plain(found)}}).evaluate.attacks


def planned(settings: recipe.Recipe, load: Callable[[str], nn.Module]) -> Attacks | None:
    """The attacks that a recipe names, else those of `relearning`; None where there are none.

    Args:
        settings: The recipe.
        load: Gives a model by hub id or folder.

    Raises:
        UsageError: As `settled`.
    """
    text = settings.model.task == "causal_lm"
    asked = settings.evaluate.attacks or (relearning(settings.evaluate) if text else {})
    if not asked:
        return None

    @functools.cache
    def original() -> lending.Weights | None:
        if not settings.model.name:
            return None
        model = load(settings.model.name)
        return None if lending.has_adapter(model) else lending.weights_of(model)

    return Attacks(settled(settings, asked), original, settings.model.name)


def attacked(
    role: str,
    place: str,
    lend: Callable[[], tuple[nn.Module, Any]],
    asked: Attacks,
    records: Mapping[str, Sequence[Record]],
    settings: recipe.Recipe,
    progress: Progress,
    *,
    folders: Sequence[Path] = (),
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Every attack on one model, one after the other; what is kept already is not done again.

    Args:
        role: For the progress display.
        place: Hub id, model folder or run folder: what is attacked, by its files.
        lend: Gives the model and its tokenizer; not called where everything is kept.
        asked: From `planned`.
        records: Rows by side.
        settings: The recipe.
        progress: Where progress is shown, and each attack's seconds.
        folders: Where outcomes are kept: under a name that stands for model, original, rows and settings. Read in this
            order, written to all.

    Returns:
        Name -> outcome, and name -> reason for attacks that could not be made.
    """
    found: dict[str, Outcome] = {}
    reasons: dict[str, str] = {}
    about = _about(place, asked, records, settings) if folders else None
    for name, own in asked.settings.items():
        stage, key = f"attack {name} {role}", _key(about, name, own)
        kept = [folder / f"{name}-{key}.safetensors" for folder in folders]
        known = next((made for path in kept if (made := _load(path)) is not None), None)
        with progress.stage(stage, 100) as advance:
            if known is None:
                try:
                    known = _made(name, own, role, lend, asked, records, settings, advance)
                except NotShown as reason:
                    reasons[name] = str(reason)
                    continue
            else:
                progress.seconds[stage] = progress.seconds.get(stage, 0.0) + known.seconds
        for path in kept:
            if not path.is_file():
                outcome.save(known, path)
        found[name] = known
    return found, reasons


def _made(
    name: str,
    own: Mapping[str, Any],
    role: str,
    lend: Callable[[], tuple[nn.Module, Any]],
    asked: Attacks,
    records: Mapping[str, Sequence[Record]],
    settings: recipe.Recipe,
    advance: Callable[[float], None],
) -> Outcome:
    """One attack on one model.

    Raises:
        NotShown: It cannot be made on this model or these rows.
    """
    if name in _SPLIT and len(records.get("forget", ())) < 2:
        raise NotShown("it needs two forget rows or more, one for the attacker and one to measure")
    model, tokenizer = lend()
    original = asked.original() if name in _READ_ORIGINAL and role != ORIGINAL else None
    if name == "adapter" and original is None and not lending.has_adapter(model):
        reason = "nothing was unlearned in it" if role == ORIGINAL else "it needs the original beside a whole model"
        raise NotShown(f"the {role} model: {reason}")
    target = Target(
        model, Anatomy.of(model), tokenizer, records,
        sides.encoding(settings.data, context=models.context_length(model)), seed=settings.seed, original=original,
        progress=lambda done, total: advance(100 * done / max(total, 1)),
    )  # fmt: skip
    return table.ATTACKS[name](target, **own)


def _about(place: str, asked: Attacks, records: Mapping[str, Sequence[Record]], settings: recipe.Recipe) -> list[Any]:
    """All that decides the outcomes of attacks on a model but their own settings: its weights, the original's, rows."""
    data, revision = recipe.plain(settings.data), settings.model.revision
    return [
        outcome.FORMAT, settings.seed, cache.hashes(place) or [place, revision],
        cache.hashes(asked.name) or [asked.name, revision],
        {side: fingerprint(list(rows)) for side, rows in records.items()},
        {k: data[k] for k in ("template", "chat", "max_length", "truncate")},
    ]  # fmt: skip


def _key(about: Any, name: str, own: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([about, name, dict(own)], sort_keys=True).encode()).hexdigest()[:24]


def _load(path: Path) -> Outcome | None:
    if not path.is_file():
        return None
    try:
        return outcome.load(path)
    except InputRefused:  # torn or of another version: made anew
        return None


# --- together -----------------------------------------------------------------------------------------------------


def judge(measured: Mapping[str, Measured], numbers: Mapping[str, Numbers], pictures: dict[str, Any]) -> None:
    """Add the numbers of all attacks, beside the gold's, and their curves to what was judged.

    Args:
        measured: Models by role.
        numbers: Model -> its numbers; added to.
        pictures: ``pictures.json`` so far; gets ``attacks``, and under ``not_shown`` why an attack is missing.
    """
    gold = measured[GOLD].attacks if GOLD in measured else {}
    reasons = pictures.setdefault("not_shown", {})
    for model, own in measured.items():
        for name, made in own.attacks.items():
            theirs = gold.get(name) if model != GOLD else None
            found = outcome.numbers(made, theirs)
            numbers[model].update(found)
            numbers[model].update(sample.bounds(made) if name == "sample" else {})
            for same, attack in _SAME.items():
                if attack == name:
                    last = found[f"attack/{name}/{made.budgets[-1]}"]
                    numbers[model].setdefault(same, {k: last[k] for k in ("value", "low", "high", "n")})
        for name, reason in own.not_attacked.items():
            if model not in (ORIGINAL, GOLD):
                reasons[f"attack/{name}"] = reason
    for name in {name for own in numbers.values() for name in own}:
        reasons.pop(name, None)
    curves = pictured(measured)
    if curves:
        pictures["attacks"] = curves
    if "relearn" in curves:
        drawn = curves["relearn"]
        models = {model: own["value"] for model, own in drawn["models"].items()}
        pictures["relearning"] = {"steps": [int(step) for step in drawn["budgets"]], "models": models}


def pictured(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The curve of every attack, all models in it that were attacked with the unlearned one's budgets."""
    names = dict.fromkeys(name for own in measured.values() for name in own.attacks)
    out = {}
    for name in names:
        made = {model: own.attacks[name] for model, own in measured.items() if name in own.attacks}
        # The unlearned model comes first: its budgets are the curve's.
        ordered = sorted(made, key=lambda model: model in (ORIGINAL, GOLD))
        out[name] = outcome.picture({model: made[model] for model in ordered})
    return out
