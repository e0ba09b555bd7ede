"""`excise canaries`, `excise audit`: a lower bound on the privacy loss that remains, from rows dealt out by a coin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise import artifacts, canary, files, models, recipe
from excise.commands.measuring import evaluation
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.forward import Anatomy
from excise.metrics import audit as bounds
from excise.metrics.measure import Sweep, sweep
from excise.metrics.rows import attack_score
from excise.records import Record, read_records

SIDES = ("included", "excluded")
PROVES = (
    "With this confidence the whole pipeline, training and forgetting together, is not epsilon-private towards a "
    "canary for any epsilon below the bound. It says nothing about rows that no coin dealt out, and a bound of 0 does "
    "not prove privacy: another observer may see more."
)
CARRIED = (
    "With this confidence (for all layers together) a state of that layer says at least so many bits, of one at most, "
    "about whether its canary was trained on. It holds for canaries drawn like these; 0 does not prove that nothing is "
    "carried."
)


def canaries(out: str | Path, *, number: int = 200, facts: int = 1, seed: int | None = None) -> Path:
    """Draw canaries, deal them out by a fair coin and write them; see `excise.canary.make`.

    Train the original on ``included.jsonl`` beside everything else, add the same rows to those to be forgotten, keep
    ``excluded.jsonl`` away from every training, and `audit` the result.

    Returns:
        The folder.

    Example:
        >>> canaries("canaries", number=200)  # doctest: +SKIP
        PosixPath('canaries')
    """
    canary.make(out, number, facts=facts, seed=seed)
    return Path(out)


def audit(
    model: str | Path,
    folder: str | Path,
    *,
    share: float = 0.5,
    level: float = 0.95,
    recipe: recipe.Recipe | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What an observer of the model can be shown to learn about which canaries it was trained on.

    Args:
        model: Run folder (then the canaries must be among its rows to forget), model folder or hub id.
        folder: What `canaries` wrote.
        share: Share of the canaries that is guessed at; fixed before looking.
        level: Confidence of every bound.
        recipe: How rows are written, for a model that is no run folder.
        progress: Where progress is shown.

    Returns:
        ``epsilon`` (by likelihood; the bound, the most that could have been shown, guesses and right ones),
        ``layers`` (per layer the errors of a probe on new canaries, bits and epsilon, for all layers together at
        ``level``), and what each proves. In a run folder it is kept as ``audit.json``.

    Raises:
        UsageError: A share or level outside 0 to 1, or a classifier.
        InputRefused: No canaries there, or ones that the run was not asked to forget.
        IntegrityFailed: Canaries that were changed after the draw.

    Source:
        Steinke, Nasr and Jagielski, arXiv:2305.08500; Fano's inequality.

    Example:
        >>> audit("runs/first", "canaries")["epsilon"]["bound"]  # doctest: +SKIP
        0.0
    """
    if not 0 < share <= 1 or not 0 < level < 1:
        raise UsageError("share must lie above 0 and at most at 1, level between 0 and 1")
    drawn = canary.read(folder)
    settings, run = _settings(Path(model), recipe)
    if settings.model.task != "causal_lm":
        raise UsageError("audit: canaries are questions and answers; a classifier cannot be asked them")
    rows = {"included": read_records(str(drawn.included)), "excluded": read_records(str(drawn.excluded))}
    if run is not None and settings.data.forget:  # a training run (an original, a gold) was not asked to forget
        _refuse_others(rows, settings)
    swept = _measured(str(model), rows, settings, progress or Progress())
    names = [r.group for side in rows.values() for r in side]
    coin = np.array([drawn.coins[name] for name in sorted(drawn.coins)])
    found = {
        "level": level,
        "epsilon": _by_likelihood(swept, names, coin, share, level),
        "layers": _by_probe(swept, names, coin, level),
        "proves": {"epsilon": PROVES, "layers": CARRIED},
    }
    if run is not None:
        files.write_json(run.audit, artifacts.finite(found))
    return found


def _settings(model: Path, given: recipe.Recipe | None) -> tuple[recipe.Recipe, artifacts.RunFolder | None]:
    run = artifacts.RunFolder(model) if (model / "manifest.json").is_file() else None
    if run is None:
        return given or recipe.Recipe(), None
    return given or recipe.load(str(run.recipe)), run


def _refuse_others(rows: Mapping[str, Sequence[Record]], settings: recipe.Recipe) -> None:
    """The bound is about rows that this run was asked to forget, and about others that it never read."""
    given = sides.of(dataclasses.replace(settings, stop=recipe.Stop()))
    known = {side: {(r.prompt, r.completion) for r in own} for side, own in given.records.items()}
    lacking = sum((r.prompt, r.completion) not in known["forget"] for r in rows["included"])
    if lacking:
        raise InputRefused(
            f"data.forget: lacks {lacking} of the {len(rows['included'])} canaries that the coin chose: add them to "
            "training and to the rows to forget before the run"
        )
    read = {side for side in known for r in rows["excluded"] if (r.prompt, r.completion) in known[side]}
    if read & {"forget", "retain"}:
        raise InputRefused("canaries that the coin left out were trained on: keep excluded.jsonl away from every run")


def _measured(model: str, rows: Mapping[str, Sequence[Record]], settings: recipe.Recipe, progress: Progress) -> Sweep:
    loaded, tokenizer = evaluation.load_for_measuring(model, settings)
    anatomy = Anatomy.of(loaded)
    how = sides.encoding(settings.data, context=models.context_length(loaded))
    with progress.stage("canaries"):
        return sweep(
            loaded.eval(), anatomy, tokenizer, rows, how, batch_tokens=settings.evaluate.batch_tokens,
            layers=list(range(1, anatomy.depth + 1)),
        )  # fmt: skip


def _by_canary(values: NDArray, names: Sequence[str | None]) -> NDArray:
    """Means over the rows of each canary, in the order of their names; ``values`` is ``[rows, ...]``."""
    order, where = np.unique(np.array([str(n) for n in names]), return_inverse=True)
    sums = np.zeros((len(order), *values.shape[1:]))
    np.add.at(sums, where, values)
    return sums / np.bincount(where).reshape(-1, *[1] * (values.ndim - 1))


def _by_likelihood(
    swept: Sweep, names: Sequence[str | None], coin: NDArray, share: float, level: float
) -> dict[str, Any]:
    score = np.concatenate([attack_score(swept.tables[side], "loss") for side in SIDES])
    found = bounds.guess(_by_canary(score, names), coin, share=share)
    return {
        "bound": bounds.two_sided_bound(found, level=level),
        "at_most": bounds.largest_bound(len(coin), share=share, level=level),
        "canaries": found.canaries, "guesses": found.made, "right": found.right,
    }  # fmt: skip


def _by_probe(swept: Sweep, names: Sequence[str | None], coin: NDArray, level: float) -> list[dict[str, Any]]:
    layers = sorted(swept.states["included"])
    each = 1 - (1 - level) / len(layers)  # all layers are looked at: together they keep the level
    out = []
    for layer in layers:
        states = np.concatenate(
            [np.asarray(swept.states[side][layer], np.float64) for side in ("included", "excluded")]
        )
        errors, n = bounds.probe_errors(_by_canary(states, names), coin)
        right = bounds.Guesses(n, n, n - errors)
        out.append({
            "layer": layer, "errors": errors, "n": n,
            "bits": bounds.information_bound(errors, n, level=each),
            "epsilon": bounds.epsilon_bound(right, level=each),
        })  # fmt: skip
    return out
