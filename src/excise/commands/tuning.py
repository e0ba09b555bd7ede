"""`excise tune`: search named settings on a validation split; the study is a file, so it resumes and may be shared."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from excise import recipe
from excise.errors import UsageError


def tune(
    settings: recipe.Recipe, trials: int, *, study: str | Path | None = None, processes: int = 1
) -> dict[str, Any]:
    """Search ``tune.space`` for the settings whose result is nearest to the gold on a validation split.

    ``tune.data`` replaces entries of ``data`` for the search (another forget set, another gold), so that nothing is
    tuned on the split that is reported. The objective is ``tune.objective``: a metric's name, or ``distance``: the sum
    of |log10 forget probability - gold's| and 10 x the loss of retained probability, or, where there is no gold,
    forget probability plus the loss of retained probability.

    Args:
        settings: The recipe; ``tune.space`` maps recipe keys to a list of values or ``{low, high, log}``.
        trials: Trials in all; those that the study already holds count.
        study: SQLite file; default ``OUT/study.sqlite``.
        processes: Trials at a time.

    Returns:
        ``{"best": {key: value}, "value": v, "trials": n}``.

    Raises:
        UsageError: No search space, or optuna is not installed.

    Example:
        >>> tune(recipe.load("run.yaml"), trials=8)  # doctest: +SKIP
        {'best': {'optimiser.lr': 0.0005}, 'value': 0.21, 'trials': 8}
    """
    try:
        import optuna
    except ImportError:
        raise UsageError("tuning needs optuna: pip install 'excise[tune]'") from None
    if not settings.tune.space:
        raise UsageError("tune.space is empty: name recipe keys and their values")
    path = Path(study or Path(settings.out or ".") / "study.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    _open(path)
    if processes > 1:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work, args=(recipe.plain(settings), str(path), trials)) for _ in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        _work(recipe.plain(settings), str(path), trials)
    found = _open(path)
    done = [t for t in found.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        raise UsageError(f"{path}: no trial finished")
    return {"best": found.best_params, "value": found.best_value, "trials": len(done)}


def _open(path: Path) -> Any:
    """The study, new or as it is."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{path}"
    storage = optuna.storages.RDBStorage(url, heartbeat_interval=5, grace_period=30)
    return optuna.create_study(study_name="excise", storage=storage, load_if_exists=True, direction="minimize")


def _work(values: dict[str, Any], path: str, trials: int) -> None:
    import optuna

    settings = recipe.build(values)
    study = _open(Path(path))
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING)
    while len([t for t in study.get_trials(deepcopy=False) if t.state in finished]) < trials:
        number = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(settings, trials, number)
        study.optimize(lambda trial: _trial(trial, settings), n_trials=1, catch=(Exception,))


def _sampler(settings: recipe.Recipe, trials: int, number: int) -> Any:
    """The whole grid where the trials reach; otherwise TPE, seeded by how far the study is."""
    import math

    import optuna

    space = settings.tune.space
    if all(isinstance(v, list | tuple) for v in space.values()) and math.prod(len(v) for v in space.values()) <= trials:
        return optuna.samplers.GridSampler({k: list(v) for k, v in space.items()}, seed=settings.seed)
    return optuna.samplers.TPESampler(seed=settings.seed + number, n_startup_trials=5)


def _trial(trial: Any, settings: recipe.Recipe) -> float:
    from excise import artifacts
    from excise.commands.progress import Progress
    from excise.commands.running import run

    changes = {key: _suggest(trial, key, choice) for key, choice in settings.tune.space.items()}
    changes |= {f"data.{k}" if k != "gold" else "evaluate.gold": v for k, v in settings.tune.data.items()}
    folder = Path(settings.out or ".") / f"trial-{trial.number}"
    changes |= {
        "out": str(folder), "evaluate.relearn_steps": [], "evaluate.generate": 0, "evaluate.map": "none",
        "evaluate.cache": settings.evaluate.cache or str(folder.parent / "cache"),
    }  # fmt: skip
    if settings.tune.objective == "distance":  # reads probabilities alone
        changes |= {"evaluate.latent": False, "evaluate.rewordings": False, "data.utility": {}}
    run(recipe.changed(settings, changes), progress=Progress(quiet=True))
    results = artifacts.read_results(artifacts.open_run(folder))
    trial.set_user_attr("folder", str(folder))
    return objective(results, settings.tune.objective)


def _suggest(trial: Any, key: str, choice: Any) -> Any:
    if isinstance(choice, dict) and "low" in choice:
        return trial.suggest_float(key, float(choice["low"]), float(choice["high"]), log=bool(choice.get("log")))
    if isinstance(choice, list | tuple):
        return trial.suggest_categorical(key, list(choice))
    raise UsageError(f"tune.space.{key}: give a list of values, or low and high")


def objective(results: Any, name: str) -> float:
    """What a trial is worth; lower is better.

    Example:
        >>> from excise.artifacts import Number, Results
        >>> own = {"forget_probability": Number(0.1), "retain_probability": Number(0.9)}
        >>> start = {"retain_probability": Number(1.0)}
        >>> round(objective(Results({"unlearned": own, "original": start}), "distance"), 2)
        0.2
    """
    import math

    def value(model: str, metric: str) -> float | None:
        return results.number(model, metric).value

    if name != "distance":
        found = value("unlearned", name)
        return math.inf if found is None else found
    forget, retain = value("unlearned", "forget_probability"), value("unlearned", "retain_probability")
    gold, start = value("gold", "forget_probability"), value("original", "retain_probability")
    if forget is None or retain is None or start is None:
        return math.inf
    lost = max(0.0, start - retain) / start
    if gold is None:
        return forget + lost
    return abs(math.log10(max(forget, 1e-9)) - math.log10(max(gold, 1e-9))) + 10 * lost
