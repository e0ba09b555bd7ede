"""The settings of a run without a recipe file: rows are looked at, `defaults` chooses, and keys that are given win."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from excise import recipe
from excise.commands.starting import aligning, defaults
from excise.commands.starting.aligning import SHUFFLED
from excise.errors import InputRefused, UsageError
from excise.records import Record, split_untouched
from excise.tasks import TASKS

Override = tuple[str, str]


def default_recipe(keys: Sequence[Override]) -> recipe.Recipe:
    """The recipe of a run that names none: the default for the model and the rows that the keys name, the keys on top.

    `recipe.Recipe.chosen` says what was chosen, and why. Keys that name another forget objective name the method: then
    nothing is chosen, and the recipe is the schema's. Rows that cannot be read are left to the run, to refuse.

    Args:
        keys: Recipe keys and values, as `recipe.load` takes them.

    Raises:
        UsageError: A bad key or value.

    Example:
        >>> default_recipe([("model.name", "m"), ("objective.forget.npo.beta", "0.1")]).objective.forget
        {'npo': {'beta': 0.1}}
    """
    own = recipe.load(None, keys)
    found = None if _names_method(keys, own) else look(own)
    if found is None:
        return own
    choice = defaults.choose(found)
    return recipe.load(choice.recipe, keys, {**choice.changes, "chosen": list(choice.why)})


def _names_method(keys: Sequence[Override], own: recipe.Recipe) -> bool:
    """Whether a key names a forget objective that the default does not have; settings of its own terms do not."""
    of_classes = defaults.TAUGHT if own.data.never_saw else defaults.CLASSES
    known = recipe.load(defaults.DEFAULT if own.model.task == "causal_lm" else of_classes).objective.forget
    parts = [key.split(".") for key, _ in keys if key.split(".")[0] == "objective"]
    return any(len(p) == 1 or (p[1] == "forget" and (len(p) == 2 or p[2] not in known)) for p in parts)


def look(settings: recipe.Recipe) -> defaults.Given | None:
    """What a run is given, as far as a default depends on it; None where its rows cannot be read."""
    data, stop, model, seed = settings.data, settings.stop, settings.model, settings.seed
    read = partial(TASKS[model.task].read, limit=data.limit, tag_names=data.tag_names)
    try:
        if not (data.forget and data.retain):
            return None
        forget, retain = read(data.forget), read(data.retain)
        never = read(data.never_seen) if data.never_seen else []
    except (InputRefused, UsageError):
        return None
    rest: Sequence[Record] = never
    trains, source = False, data.never_seen_training
    if model.task == "causal_lm":  # a classifier's default trains on none of them
        if isinstance(source, str):
            trains = source != SHUFFLED
        else:
            left = _without(never, source, seed)
            trains, rest = left is not None, never if left is None else left
    kept = retain if isinstance(data.untouched, str) else _without(retain, data.untouched, seed) or retain
    return defaults.Given(
        task=model.task,
        never_seen=bool(never),
        grouped=all(r.group is not None for r in never),
        trains=trains,
        calibrates=isinstance(stop.calibration, str) or _without(rest, stop.calibration, seed) is not None,
        watches=_without(kept, stop.watch, seed) is not None,
        never_saw=bool(data.never_saw),
        shuffles=_shuffles(forget, settings),
        lora=model.lora is not None,
        unshaped=_unshaped(settings),
        untied=_untied(model),
    )


def _without(records: Sequence[Record], share: float, seed: int) -> list[Record] | None:
    """What is left where a share is set aside, as `sides` does it; None where that takes no row, or is refused."""
    try:
        rest, taken = split_untouched(records, share, seed)
    except (InputRefused, UsageError):
        return None
    return [records[i] for i in rest] if taken else None


def _shuffles(forget: Sequence[Record], settings: recipe.Recipe) -> bool:
    try:
        return bool(aligning.shuffled(forget, settings.data, settings.seed, task=settings.model.task))
    except (InputRefused, UsageError):
        return False


def _unshaped(settings: recipe.Recipe) -> str:
    """Why whole weights are trained by plain steps: what `initialise.preconditioned` would refuse."""
    model = settings.model
    if model.train_only:
        return "model.train_only says what is trained"
    if model.config is not None:
        return "a new model (model.config) has nothing to start from"
    if model.precision == "bf16":
        return "bf16 weights lose small steps (set model.precision to bf16-mixed)"
    if settings.optimiser.name != "adamw":
        return f"{settings.optimiser.name} shapes updates in its own way"
    return ""


def _untied(model: recipe.Model) -> str:
    if model.train_only:
        return "model.train_only says what may change"
    return "a new model (model.config) has nothing to reset" if model.config is not None else ""
