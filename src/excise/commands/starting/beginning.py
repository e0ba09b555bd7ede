"""What a run begins with: statistics of both sides, the start of the adapter made from them, and bases for the terms.

The order is that of a run: the adapter is attached and changes nothing yet, the reference is stored (so it is the
original), statistics are taken, and then the start is applied. A resumed run reads its factors from ``init/``.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from excise import artifacts, ranks, recipe
from excise.commands.starting import objective, shaping, sides
from excise.commands.starting.gathering import Taker, centred, directions, groups
from excise.errors import IntegrityFailed, UsageError
from excise.files import COMPLETE
from excise.initialise import apply, store
from excise.initialise.moments import Moments, leading_directions
from excise.initialise.preconditioned import SHAPERS, Shaper
from excise.initialise.starts import STARTS, Factors, Start, Statistic
from excise.objectives import source_of
from excise.objectives.term import Term
from excise.shaped import Shape

#: Bytes of moments up to which they are held through training for the picture of what the update does.
HELD = 2 * 2**30
_RETAIN = Statistic("output_moments", "retain")


@dataclass(frozen=True)
class Wanted:
    """What a recipe begins with.

    Attributes:
        start: The start; ``plain`` where none is named.
        bases: Sizes k of the retain bases that terms read (``retain_basis/<k>``).
        pictured: Moments of both sides are to be kept for the report as well.
        shaper: Instead of a start, for whole weights: what their updates look like.
    """

    start: Start
    bases: tuple[int, ...] = ()
    pictured: bool = False
    shaper: Shaper | None = None

    @property
    def statistics(self) -> list[Statistic]:
        """Every statistic that is taken, each once."""
        moments = [Statistic("output_moments", side) for side in ("forget", "retain")] if self.pictured else []
        shaped = self.shaper.statistics if self.shaper else []
        return list(dict.fromkeys([*self.start.needs.values(), *([_RETAIN] if self.bases else []), *moments, *shaped]))

    @property
    def needed(self) -> bool:
        """Whether statistics are taken for the run itself, and not for the picture alone."""
        return bool(self.start.needs or self.bases)

    @property
    def sides(self) -> list[str]:
        """The sides whose rows are read."""
        return list(dict.fromkeys(s.side for s in self.statistics))


@dataclass
class Begun:
    """What a run began with: factors as they stand in the model, bases by constant, moments, warnings, shapes."""

    factors: dict[str, Factors] = field(default_factory=dict)
    constants: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    moments: dict[str, dict[str, Moments]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)


# --- what is asked, and what is refused ---------------------------------------------------------------------------


def wanted(settings: recipe.Recipe, terms: Sequence[Term], *, pictured: bool = False) -> Wanted:
    """The start and the bases of a recipe; refuses what needs no model to be refused.

    Raises:
        UsageError: More than one start, an unknown one, an unknown or wrong option, or LoRA settings that it has no
            place for.

    Example:
        >>> found = wanted(recipe.build({"initialise": {"rila": {"beta": 0.7}}, "model": {"lora": {"r": 4}}}), [])
        >>> found.start.name, found.sides
        ('rila', ['forget', 'retain'])
    """
    named = settings.initialise or {"plain": {}}
    if len(named) > 1:
        raise UsageError(f"initialise names {' and '.join(named)}: an adapter has one start")
    ((name, options),) = named.items()
    if name in SHAPERS:
        shaper = shaping.shaper(name, options or {}, settings)
        return replace(wanted(replace(settings, initialise={}), terms), shaper=shaper)
    start = _start(name, options or {}, settings)
    apply.check_config(start, settings.model.lora)
    details = [str(p.detail) for p in objective.needs(terms) if p.what == "constant"]
    sizes = sorted({_size(d) for d in details if d.startswith("retain_basis/")})
    if (start.moves or sizes) and settings.model.lora is None:
        raise UsageError(f"the objective reads retain_basis/{sizes[0]}: there is no adapter: set model.lora")
    if start.moves and settings.model.config is not None:
        raise UsageError(
            f"initialise.{start.name}: a new model (model.config) has nothing to start from: set model.name"
        )
    if start.moves and settings.model.train_only:
        raise UsageError(
            f"initialise.{start.name}: model.train_only would train part of a start: leave one of them out"
        )
    return Wanted(start, tuple(sizes), pictured)


def check_sides(want: Wanted, given: Collection[str]) -> None:
    """Refuse, before anything loads, a start whose side the recipe does not give."""
    for side in want.sides:
        if side not in given:
            raise UsageError(
                f"initialise.{(want.shaper or want.start).name} reads the side {side!r}, which the recipe does not give"
            )


def cited(want: Wanted) -> dict[str, Any]:
    """The start for the record of a run: name, settings, source."""
    if want.shaper is not None:
        return shaping.cited(want.shaper)
    start = want.start
    source = source_of(cast(Any, STARTS[start.name]))
    return {"name": start.name, "base": start.base, "options": dict(start.options), "citation": source}


def _start(name: str, options: Any, settings: recipe.Recipe) -> Start:
    factory = STARTS.get(name)
    if factory is None:
        near = difflib.get_close_matches(name, [*STARTS, *SHAPERS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join([*STARTS, *SHAPERS])}"
        raise UsageError(f"initialise: unknown start {name!r}{hint}")
    if not isinstance(options, Mapping):
        raise UsageError(f"initialise.{name}: expected settings, found {options!r}")
    found = inspect.signature(factory).parameters
    known = [key for key in found if key != "center"]  # that one is a setting of all statistics
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
            raise UsageError(f"initialise.{name}: unknown setting {key!r}{hint}")
    try:
        return factory(**options, **({"center": centred(settings.statistics)} if "center" in found else {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"initialise.{name}: {error}") from None


def _size(detail: str) -> int:
    return int(detail.removeprefix("retain_basis/"))


def check(want: Wanted, model: nn.Module, rows: sides.Rows, settings: recipe.Statistics) -> None:
    """Refuse, before anything is written, targets, ranks and bases that the model or the rows have no place for.

    Raises:
        UsageError: Naming the layer, or the number of directions.
    """
    if want.shaper is not None:
        shaping.check(want.shaper, model, rows, settings)
        return
    apply.check_layers(model, want.start)
    layers = apply.layers(model)
    ranks = [apply.rank_of(layer) for layer in layers.values()]
    if want.start.name == "rila":
        beta = want.start.options["beta"]
        read = [side for side, share in (("forget", 1 - beta), ("retain", beta)) if share > 0]
        most = sum(directions(side, rows, settings) for side in read)
        if max(ranks) > most:
            raise UsageError(
                f"initialise.rila: rank {max(ranks)} is above the {most} directions that the rows span: lower "
                "model.lora.r, give more rows, or set statistics.pooling: token"
            )
    for k in want.bases:
        narrow = next((n for n, layer in layers.items() if layer.out_features < k), None)
        most = directions("retain", rows, settings)
        if narrow is not None:
            raise UsageError(f"retain_basis/{k}: {narrow} has only {layers[narrow].out_features} outputs: lower k")
        if k > most:
            raise UsageError(f"retain_basis/{k}: the retained rows span {most} directions at most: lower k")


# --- a run begins -------------------------------------------------------------------------------------------------


def begin(want: Wanted, taker: Taker, run: artifacts.RunFolder, *, resume: bool) -> Begun:
    """Take what is wanted and apply the start; a resumed run applies the factors that it began with.

    Raises:
        IntegrityFailed: ``init/`` is missing, damaged, or of another model, other rows or other settings.
        UsageError: The rows of a layer span fewer directions than its rank.
    """
    if want.shaper is not None:
        return Begun(shapes=shaping.begin(want.shaper, taker, run, resume=resume))
    layers = apply.layers(taker.model)
    made = _made(want, taker, list(layers))
    folder, kept = run.root / "init", want.start.moves or bool(want.bases)
    there = kept and resume and ranks.agreed((folder / COMPLETE).is_file())
    if kept and resume and not there and any(run.checkpoints.glob("checkpoint-*")):
        raise IntegrityFailed(
            f"{folder}: missing or broken: the factors that the run began with are needed to resume it"
        )
    begun = Begun()
    if there:
        tensors, found = store.read(folder, "factors", made)
        begun = Begun(store.to_factors(tensors), _bases(tensors, want.bases), {}, list(found["warnings"]))
    if want.pictured or (kept and not there):
        _compute(want, taker, begun, missing=not there)
    if kept and not there:
        _same_on_all_ranks(begun)
        if ranks.place()[0] == 0:
            tensors = store.of_factors(begun.factors) | _flat(begun.constants)
            store.write(folder, "factors", tensors, made, {"warnings": begun.warnings})
    if want.start.moves:
        begun.factors = apply.start(taker.model, begun.factors, base=want.start.base)
    return begun


def warnings(run: artifacts.RunFolder) -> list[str]:
    """What was found when a run began that is now done."""
    path = run.root / "init" / "made_from.json"
    return list(json.loads(path.read_text())["found"]["warnings"]) if path.is_file() else []


def _made(want: Wanted, taker: Taker, names: list[str]) -> store.MadeFrom:
    start = want.start
    read = dict.fromkeys([*(s.side for s in start.needs.values()), *(["retain"] if want.bases else [])])
    options = {"start": start.name, **start.options, "base": start.base, "bases": list(want.bases)}
    options["adapter"] = taker.sizes(names)
    return taker.made_from(names, list(read), {**options, "center": centred(taker.settings)})


def _compute(want: Wanted, taker: Taker, begun: Begun, *, missing: bool) -> None:
    """Factors and bases (where ``missing``) and moments, a group of layers at a time."""
    layers = apply.layers(taker.model)
    pictured = want.pictured and _held(taker, layers) <= HELD
    if want.pictured and not pictured:
        begun.warnings.append("geometry of the update: not drawn, its statistics are too large to be held in training")
    for names in groups(layers, taker.settings.layers_at_once or len(layers)):
        needed = [s for s in want.statistics if missing or (pictured and s.kind == "output_moments")]
        taken = {statistic: taker.take(statistic, names) for statistic in needed}
        for name in names if missing else ():
            if want.start.moves:
                given = {key: taken[s][name] for key, s in want.start.needs.items()}
                begun.factors[name] = _factors(want.start, name, layers[name], given)
            for k in want.bases:
                basis = _basis(cast(Moments, taken[_RETAIN][name]), k, name, taker.settings)
                begun.constants.setdefault(f"retain_basis/{k}", {})[name] = basis
        for statistic in taken if pictured else ():
            if statistic.kind == "output_moments":
                held = {n: cast(Moments, v).to("cpu") for n, v in taken[statistic].items()}
                begun.moments.setdefault(statistic.side, {}).update(held)
    if missing:
        begun.warnings += _lacking(want.start, begun.factors)


def _lacking(start: Start, factors: Mapping[str, Factors]) -> list[str]:
    """A warning where layers have fewer directions with positive contrast than their rank."""
    few = {name: f for name, f in factors.items() if f.positive is not None and f.positive < len(f.A)}
    if not few:
        return []
    name, least = min(few.items(), key=lambda pair: pair[1].positive or 0)
    return [
        f"initialise.{start.name}: {len(few)} of {len(factors)} layers have fewer directions with positive contrast "
        f"than their rank ({name}: {least.positive} of {len(least.A)}): more forget rows, a lower rank or beta"
    ]


def _basis(retained: Moments, k: int, name: str, settings: recipe.Statistics) -> Tensor:
    """``[out, k]`` the leading directions of the retained rows' outputs."""
    found = leading_directions(retained, k, center=centred(settings)).vectors.float().cpu()
    if found.shape[1] < k:
        raise UsageError(f"retain_basis/{k}: the retained rows span {found.shape[1]} directions of {name}: lower k")
    return found


def _factors(start: Start, name: str, layer: Any, given: Mapping[str, Any]) -> Factors:
    assert start.fn is not None
    try:
        made = start.fn(apply.weight_of(layer), apply.rank_of(layer), apply.scale_of(layer), **given)
    except UsageError as error:
        raise UsageError(f"initialise.{start.name}: {name}: {error}") from None
    return Factors(made.A.float().cpu(), made.B.float().cpu(), made.positive)


def _held(taker: Taker, layers: Mapping[str, Any]) -> int:
    """Bytes of the moments of both sides of all layers."""
    count = {side: directions(side, taker.rows, taker.settings) + 1 for side in ("forget", "retain")}
    return sum(min(n, x.out_features) * x.out_features * 8 for n in count.values() for x in layers.values())


def _flat(constants: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"P{_size(detail)}/{name}": p for detail, basis in constants.items() for name, p in basis.items()}


def _bases(tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, dict[str, Tensor]]:
    return {
        f"retain_basis/{k}": {key.removeprefix(f"P{k}/"): p for key, p in tensors.items() if key.startswith(f"P{k}/")}
        for k in sizes
    }


def _same_on_all_ranks(begun: Begun) -> None:
    """Every rank holds the first one's factors and bases, bit by bit."""
    begun.factors = {
        n: Factors(ranks.from_first(f.A), ranks.from_first(f.B), f.positive) for n, f in begun.factors.items()
    }
    for basis in begun.constants.values():
        basis.update({name: ranks.from_first(p) for name, p in basis.items()})
