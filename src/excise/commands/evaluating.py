"""`excise evaluate`: measure any model beside the original and the gold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from excise import __version__, artifacts, files, models, recipe, reporting
from excise.commands import evaluation, sides
from excise.commands.progress import Progress
from excise.errors import UsageError

#: What each suite measures beyond the scores of answers: generations, hidden states, the relearning attack.
SUITES = {
    "tofu": ("generate",),
    "memorisation": (),
    "latent": ("latent",),
    "relearn": ("relearn",),
    "all": ("generate", "latent", "relearn"),
}


def evaluate(
    model: str | Path,
    *,
    suite: str = "tofu",
    against: str | Path | None = None,
    recipe: recipe.Recipe | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Path | dict[str, Any]:
    """Measure a model, or the model of a run folder, beside the original and a gold.

    Args:
        model: Hub id, model folder, or run folder (whose own recipe says which rows are which).
        suite: ``tofu``, ``memorisation``, ``latent``, ``relearn`` or ``all``.
        against: The gold: hub id, model folder or run folder; default the recipe's.
        recipe: Says which rows are which; needed unless ``model`` is a run folder.
        out: Folder to write tables, numbers and a report to.
        progress: Where progress is shown.

    Returns:
        The folder, or without ``out`` the numbers as in ``results.json``.

    Raises:
        UsageError: An unknown suite, or no recipe.
        InputRefused: A model or rows that cannot be used.

    Example:
        >>> evaluate("runs/first", suite="latent", against="runs/gold")  # doctest: +SKIP
        {'format': 1, 'models': {...}}
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    settings = _settings(Path(model), recipe)
    parts = SUITES[suite]
    options = dataclasses.replace(
        settings.evaluate,
        generate=settings.evaluate.generate if "generate" in parts else 0,
        latent="latent" in parts,
        relearn_steps=settings.evaluate.relearn_steps if "relearn" in parts else (),
        gold=str(against) if against else settings.evaluate.gold,
    )
    settings = dataclasses.replace(settings, evaluate=options)
    progress = progress or Progress()
    run = artifacts.RunFolder(Path(out)) if out is not None else None
    if run is not None and run.root.is_dir() and any(run.root.iterdir()):
        raise UsageError(f"{out}: the folder is not empty; name another")
    given = sides.read(settings.data, seed=settings.seed)
    own = settings.model.tokenizer or settings.model.name
    tokenizer = models.load_tokenizer(own or evaluation.weights(str(model)), settings.model.revision if own else None)
    evaluation.refuse_unfit(given, tokenizer, settings)
    records = evaluation.limited(given.records, options)
    names = {"original": settings.model.name, "gold": options.gold, "unlearned": str(model)}
    measured = {}
    for name, place in names.items():
        if place and not (name == "original" and place == str(model)):
            measured[name] = evaluation.measure_named(name, place, records, settings, progress)
    if run is None:
        numbers, _ = evaluation.judge(measured, records, settings)
        return artifacts.finite({"format": artifacts.FORMAT, "models": numbers, "seconds": progress.seconds})
    evaluation.write(run, measured, records, settings, progress)
    files.write_text(run.recipe, _dump(settings))
    record = {
        "status": "done",
        "command": "excise evaluate",
        "seed": settings.seed,
        "versions": {"excise": __version__, **artifacts.environment()},
        "model": {"name": str(model)},
        "data": given.sources,
        "terms": [],
        "warnings": given.warnings,
        "files": artifacts.hash_files(run),
    }
    artifacts.write_manifest(run, record)
    reporting.build(run.root)
    return run.root


def _dump(settings: recipe.Recipe) -> str:
    return recipe.dump(settings)


def _settings(model: Path, given: recipe.Recipe | None) -> recipe.Recipe:
    """The recipe that was passed, or the run folder's own."""
    if given is not None:
        return given
    if (model / "recipe.yaml").is_file():
        return recipe.load(str(model / "recipe.yaml"))
    raise UsageError("say which rows are which: --recipe FILE (a run folder brings its own)")
