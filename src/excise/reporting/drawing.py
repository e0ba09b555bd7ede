"""Which figures a page has: each is drawn from what the folder holds, and left out where it holds nothing for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from excise import artifacts
from excise.artifacts import GOLD, ORIGINAL, Manifest, Results, RunFolder
from excise.reporting import attack_figures, class_figures, figures, layer_figures, stopping
from excise.reporting.checks import KEEP_SHARE, forget_limit
from excise.reporting.record import as_list, as_map
from excise.reporting.words import visible


def drawn(
    run: RunFolder, manifest: Manifest, results: Results, pictures: Mapping[str, Any]
) -> tuple[figures.Figure, ...]:
    """All figures of a page in their order."""
    own = _of_language if results.task == "causal_lm" else _of_classes
    losses = figures.losses(visible(artifacts.read_log(run)))
    found = [*own(results, pictures), stopping.figure(manifest.get("stopping")), losses]
    return tuple(figure for figure in found if figure is not None)


def _of_classes(results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure | None]:
    others = results.unlearned()
    mark = "entity" if results.task == "token_classification" else "record"
    return [
        class_figures.scores(results),
        class_figures.gaps(results),
        class_figures.classes(as_map(pictures.get("classes")), others),
        class_figures.membership(as_map(pictures.get("membership")), others),
        _relearning(pictures, others, "classes"),
        figures.state_map(as_map(pictures.get("map")), others, mark),
    ]


def _of_language(results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure | None]:
    others = results.unlearned()
    order = [ORIGINAL, GOLD, *others]
    points = {m: (results.number(m, "forget_probability"), results.number(m, "retain_probability")) for m in order}
    original = results.number(ORIGINAL, "retain_probability").value
    attacks = as_map(pictures.get("attacks"))
    return [
        figures.trade_off(
            points,
            others,
            forget_bar=forget_limit(results.number(GOLD, "forget_probability")),
            retain_bar=None if original is None else KEEP_SHARE * original,
        ),
        class_figures.membership(as_map(pictures.get("membership")), others, "the answer to a row"),
        attack_figures.attacks(attacks, others),
        layer_figures.latent(as_map(pictures.get("latent_by_layer")), others),
        layer_figures.lens(as_map(pictures.get("lens_by_layer")), others),
        figures.state_map(as_map(pictures.get("map")), others),
        None if "relearn" in attacks else _relearning(pictures, others, "answers"),
        layer_figures.entanglement(as_map(pictures.get("entanglement_by_layer")), others),
    ]


def _relearning(pictures: Mapping[str, Any], others: list[str], what: str) -> figures.Figure | None:
    given = as_map(pictures.get("relearning"))
    steps = as_list(given.get("steps"))
    return figures.relearning(layer_figures.curves(as_map(given.get("models")), steps), steps, others, what)
