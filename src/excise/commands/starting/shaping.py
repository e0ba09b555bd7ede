"""Runs that train whole weights in a shape: what is trained, what is refused, shapes from statistics or disk."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from excise import artifacts, ranks, recipe
from excise.commands.starting import sides
from excise.commands.starting.gathering import Taker, centred, directions, groups
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.files import COMPLETE
from excise.forward import Anatomy
from excise.initialise import store
from excise.initialise.collect import shared_inputs
from excise.initialise.moments import Moments
from excise.initialise.preconditioned import SHAPERS, Shaper
from excise.initialise.starts import Statistic
from excise.initialise.taking import widths
from excise.objectives import source_of
from excise.shaped import Shape


def shaper(name: str, options: Any, settings: recipe.Recipe) -> Shaper:
    """The shaper of a recipe; refuses what needs no model to be refused.

    Raises:
        UsageError: An unknown setting, or a model or an optimiser that it does not go with.

    Example:
        >>> shaper("preconditioned", {"ridge": 1}, recipe.Recipe()).options
        {'ridge': 1.0}
    """
    where, model = f"initialise.{name}", settings.model
    if model.lora is not None:
        raise UsageError(f"{where} shapes the updates of whole weights: leave model.lora out, or use rila to start it")
    if model.config is not None:
        raise UsageError(f"{where}: a new model (model.config) has nothing to start from: set model.name")
    if model.precision == "bf16":
        raise UsageError(f"{where}: bf16 weights lose small steps: set model.precision to bf16-mixed or fp32")
    if settings.optimiser.name != "adamw":
        raise UsageError(f"{where}: {settings.optimiser.name} shapes updates in its own way: set optimiser.name: adamw")
    if not isinstance(options, Mapping):
        raise UsageError(f"{where}: expected settings, found {options!r}")
    known = [key for key in inspect.signature(SHAPERS[name]).parameters if key != "center"]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise UsageError(f"{where}: unknown setting {key!r}{hint}")
    try:
        return SHAPERS[name](**options, center=centred(settings.statistics))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None


def cited(made: Shaper) -> dict[str, Any]:
    """The shaper for the record of a run: name, settings, source."""
    return {"name": made.name, "options": dict(made.options), "citation": source_of(cast(Any, SHAPERS[made.name]))}


def choose(model: nn.Module, settings: recipe.Model) -> None:
    """Train the linear layers' weights in the blocks and nothing else, unless ``train_only`` says what is trained."""
    if settings.train_only:
        return
    ours = {id(m.weight) for m in _linears(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)


def check(made: Shaper, model: nn.Module, rows: sides.Rows, settings: recipe.Statistics) -> None:
    """Refuse a model without a layer to shape, and more directions than a layer or the rows have.

    Raises:
        UsageError: Naming the layer or the number of directions.
    """
    found = trained(model)
    if not found:
        raise UsageError(f"initialise.{made.name}: no linear layer of a block is trained: change model.train_only")
    rank = made.options.get("rank")
    if rank is None:
        return
    narrow = next((name for name, m in found.items() if min(widths(m)) < rank), None)
    if narrow is not None:
        raise UsageError(f"initialise.{made.name}: rank {rank} is above the {min(widths(found[narrow]))} of {narrow}")
    beta = made.options["beta"]
    most = sum(directions(s, rows, settings) for s, share in (("forget", 1 - beta), ("retain", beta)) if share > 0)
    if rank > most:
        raise UsageError(f"initialise.{made.name}: rank {rank} is above the {most} directions that the rows span")


def trained(model: nn.Module) -> dict[str, Any]:
    """The linear layers in the blocks whose weight is trained, by module path."""
    return {name: m for name, m in _linears(model).items() if m.weight.requires_grad}


def _linears(model: nn.Module) -> dict[str, Any]:
    """Linear layers in the blocks: `nn.Linear` and GPT-2's `Conv1D`."""
    inside = {id(m) for m in Anatomy.of(model).blocks.modules()}
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "nf"))
    return {name: m for name, m in linear if id(m) in inside}


# --- a run begins -------------------------------------------------------------------------------------------------


def begin(made: Shaper, taker: Taker, run: artifacts.RunFolder, *, resume: bool) -> dict[str, Shape]:
    """Take the statistics and make the shapes, by parameter's name; a resumed run reads those that it began with.

    Raises:
        IntegrityFailed: ``init/`` is missing, damaged, or of another model, other rows or other settings.
        InputRefused: A layer's inputs are all zero.
        UsageError: The rows span fewer directions of a layer than ``rank``.
    """
    layers, folder = trained(taker.model), run.root / "init"
    record = taker.made_from(list(layers), ["retain", "forget"], {"start": made.name, **made.options})
    there = resume and ranks.agreed((folder / COMPLETE).is_file())
    if resume and not there and any(run.checkpoints.glob("checkpoint-*")):
        raise IntegrityFailed(f"{folder}: missing or broken: the shapes that the run began with are needed to resume")
    if there:
        tensors, found = store.read(folder, "shapes", record)
        shared = found["shared"]
    else:
        shared = {
            name: group[0]
            for group in shared_inputs(taker.model, Anatomy.of(taker.model), list(layers), taker.autocast)
            for name in group
        }
        tensors = _tensors(made, taker, list(layers), shared)
        if ranks.place()[0] == 0:
            store.write(folder, "shapes", tensors, record, {"shared": shared, "warnings": []})
    return {
        f"{name}.weight": Shape(tensors[f"P/{shared[name]}"], tensors.get(f"Q/{name}"), hasattr(layer, "nf"))
        for name, layer in layers.items()
    }


def _tensors(made: Shaper, taker: Taker, names: Sequence[str], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """P of each group of layers that share an input, and Q of each layer, a few layers at a time; of the first rank."""
    size = taker.settings.layers_at_once or len(names)
    out: dict[str, Tensor] = {}
    for part in groups(dict.fromkeys(shared[name] for name in names), size):
        out |= {f"P/{n}": p for n, p in _each(made, made.inputs, "input_moments", taker, part).items()}
    if made.outputs is not None:
        for part in groups(names, size):
            out |= {f"Q/{n}": q for n, q in _each(made, made.outputs, "output_moments", taker, part).items()}
    return {key: ranks.from_first(value) for key, value in out.items()}


def _each(made: Shaper, fn: Any, kind: Any, taker: Taker, names: Sequence[str]) -> dict[str, Tensor]:
    retain, forget = (taker.take(Statistic(kind, side), names) for side in ("retain", "forget"))
    out = {}
    for name in names:
        try:
            out[name] = fn(cast(Moments, retain[name]), cast(Moments, forget[name])).cpu()
        except (UsageError, InputRefused) as error:
            raise type(error)(f"initialise.{made.name}: {name}: {error}") from None
    return out
