"""Statistics of a run's rows, taken on its model before training: through a cache, on all ranks together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from excise import ranks, recipe
from excise.commands.starting import sides
from excise.files import COMPLETE
from excise.forward import Anatomy, Batch
from excise.initialise import apply, importance, store
from excise.initialise.collect import OFFICIAL_ROWS, collect
from excise.initialise.moments import Moments
from excise.initialise.starts import Statistic

#: Rows of a batch where only moments are taken, which do not depend on it.
BATCH_ROWS = 16
T = TypeVar("T")


def centred(settings: recipe.Statistics) -> bool:
    """Whether moments are used as covariances."""
    return settings.center and settings.preset is None


def directions(side: str, rows: sides.Rows, settings: recipe.Statistics) -> int:
    """Most directions that the observations of a side can span."""
    examples = rows.examples[side][: row_limit(settings)]
    count = len(examples)
    if settings.pooling == "token" and settings.preset is None:
        answers = rows.batch(side, range(count)).label_mask if settings.positions == "answer" else None
        count = sum(len(e.input_ids) for e in examples) if answers is None else int(answers.sum())
    return max(count - centred(settings), 0)


def row_limit(settings: recipe.Statistics) -> int | None:
    """Rows of a side that are read at most."""
    return settings.rows or (OFFICIAL_ROWS if settings.preset else None)


def groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Items in order, ``size`` at a time.

    Example:
        >>> list(groups("abc", 2))
        [('a', 'b'), ('c',)]
    """
    left = iter(items)
    while part := tuple(islice(left, size)):
        yield part


@dataclass(frozen=True)
class Taker:
    """Takes statistics of a model over the rows of a run; from the cache where they were taken before."""

    model: nn.Module
    rows: sides.Rows
    settings: recipe.Statistics
    precision: str
    autocast: Callable[[], AbstractContextManager]
    weights: str  # fingerprint of the base

    def made_from(self, names: Sequence[str], read: Sequence[str], options: Mapping[str, Any]) -> store.MadeFrom:
        """The record of something made from these rows of these sides."""
        s = self.settings
        how = {"pooling": s.pooling, "positions": s.positions, "preset": s.preset, "precision": self.precision}
        tokens = {side: _tokens(self.rows.examples[side][: row_limit(s)]) for side in read}
        return store.MadeFrom(self.weights, tokens, names, {**how, **options})

    def sizes(self, names: Sequence[str]) -> list[tuple[int, float]]:
        """Rank and scale of each layer's adapter."""
        layers = apply.layers(self.model)
        return [(apply.rank_of(layers[name]), apply.scale_of(layers[name])) for name in names]

    def batches(self, side: str, size: int = BATCH_ROWS) -> Iterator[Batch]:
        """Rows of a side, in order."""
        count = len(self.rows.examples[side][: row_limit(self.settings)])
        device = next(self.model.parameters()).device
        for part in groups(range(count), size):
            yield self.rows.batch(side, part).to(device)

    def take(self, statistic: Statistic, names: Sequence[str]) -> dict[str, store.Value]:
        """One statistic of some layers."""
        if self.settings.cache is None:
            return self._taken(statistic, names)
        own = self.sizes(names) if statistic.kind == "adapter_gradient_variance" else []
        options = {"kind": statistic.kind, "adapter": own, **dict(statistic.options)}
        made = self.made_from(names, [statistic.side], options)
        folder = Path(self.settings.cache) / made.key
        if ranks.agreed((folder / COMPLETE).is_file()):
            return store.to_statistic(store.read(folder, "statistics", made)[0])
        values = self._taken(statistic, names)
        if ranks.place()[0] == 0:
            store.write(folder, "statistics", store.of_statistic(values), made)
        return values

    def _taken(self, statistic: Statistic, names: Sequence[str]) -> dict[str, Any]:
        anatomy, options = Anatomy.of(self.model), dict(statistic.options)
        if statistic.kind == "input_moments":
            s = self.settings
            return collect(
                self.model, anatomy, self.batches(statistic.side), pooling="token", positions=s.positions,
                rows=row_limit(s), autocast=self.autocast, side="entering", layers=names,
            )  # fmt: skip
        if statistic.kind == "output_moments":
            return self._moments(statistic.side, names, anatomy)
        layers, loss = apply.layers(self.model), importance.label_loss(self.model, anatomy)
        batches = self.batches(statistic.side, options.pop("batch_rows"))
        with self.autocast():
            if statistic.kind == "adapter_gradient_variance":
                return importance.adapter_variances(
                    self.model, {n: apply.factors_of(self.model)[n] for n in names}, batches, loss, **options
                )
            weights = {n: layers[n].get_base_layer().weight for n in names}
            squares = importance.squared_gradients(self.model, weights, batches, loss)
        return {n: value.T if layers[n].fan_in_fan_out else value for n, value in squares.items()}

    def _moments(self, side: str, names: Sequence[str], anatomy: Anatomy) -> dict[str, Moments]:
        s, layers = self.settings, apply.layers(self.model)
        count = sum(len(e.input_ids) for e in self.rows.examples[side][: row_limit(s)])
        stored = any(apply.quantised(layers[n]) for n in names if n in layers)
        plain = s.pooling == "token" and s.preset is None and not stored
        return collect(
            self.model, anatomy, self.batches(side), pooling=s.pooling, positions=s.positions, rows=row_limit(s),
            autocast=self.autocast, preset=s.preset, layers=names,
            side="cheaper" if plain else "output", vectors=count,
        )  # fmt: skip


def _tokens(examples: Sequence[Any]) -> str:
    return store.fingerprint_of_rows([dataclasses.astuple(e) for e in examples])
