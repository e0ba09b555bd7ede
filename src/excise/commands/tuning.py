"""`excise tune`: search named settings on a validation split; the study is a file, so it resumes and may be shared."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from excise import recipe
from excise.errors import TrainingStopped, UsageError
from excise.metrics.catalogue import METRICS

#: Held while a trial is drawn, so that several processes do not draw one too many.
_turn: Any = threading.Lock()


def tune(
    settings: recipe.Recipe, trials: int, *, study: str | Path | None = None, processes: int = 1
) -> dict[str, Any]:
    """Search ``tune.space`` for the settings whose result is nearest to the gold on a validation split.

    ``tune.data`` replaces entries of ``data`` for the search (another forget set, another gold), so that nothing is
    tuned on the split that is reported. The objective is ``tune.objective``: a metric's name (its distance from the
    gold's value, or where more or less is better by itself, the value), or ``distance``: the sum of |log10 forget
    probability - gold's| and 10 x the loss of retained probability, or, where there is no gold, forget probability plus
    the loss of retained probability. A trial that does not train (a loss that is not finite) counts as the worst.

    Args:
        settings: The recipe; ``tune.space`` maps recipe keys to a list of values or ``{low, high, log}``.
        trials: Trials in all; those that the study already holds count.
        study: SQLite file; default ``OUT/study.sqlite``.
        processes: Trials at a time.

    Returns:
        ``{"best": {key: value}, "value": v, "trials": n}``.

    Raises:
        UsageError: No search space, an unknown objective, or optuna is not installed.
        InputRefused: Rows or a model that cannot be used; nothing was written.

    Example:
        >>> tune(recipe.load("run.yaml"), trials=8)  # doctest: +SKIP
        {'best': {'optimiser.lr': 0.0005}, 'value': 0.21, 'trials': 8}
    """
    try:
        import optuna
    except ImportError:
        raise UsageError("tuning needs optuna: pip install 'excise[tune]'") from None
    _check(settings)
    path = Path(study or Path(settings.out or ".") / "study.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    _open(path)
    if processes > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(context.Lock(), processes)) as pool:
            work = [pool.submit(_work, recipe.plain(settings), str(path), trials) for _ in range(processes)]
            for future in work:
                future.result()
    else:
        _work(recipe.plain(settings), str(path), trials)
    found = _open(path)
    done = [t for t in found.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not any(math.isfinite(t.value) for t in done):
        raise UsageError(
            f"{path}: no trial has a value of {settings.tune.objective!r}: change the space or the objective"
        )
    return {"best": found.best_params, "value": found.best_value, "trials": len(done)}


def _check(settings: recipe.Recipe) -> None:
    """Refuse what no trial could use, before a study is written."""
    from excise.commands.planning import plan

    space = _space(settings.tune.space)
    if not space:
        raise UsageError("tune.space is empty: name recipe keys and their values")
    if settings.tune.objective != "distance" and settings.tune.objective not in METRICS:
        raise UsageError(f"tune.objective: unknown metric {settings.tune.objective!r}")
    first = {key: choice[0] if isinstance(choice, list | tuple) else choice["low"] for key, choice in space.items()}
    plan(recipe.changed(settings, first | _validation(settings)))


def _space(choices: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted recipe keys and their choices; ``--tune.space.optimiser.lr`` nests them.

    Example:
        >>> _space({"optimiser": {"lr": [0.1, 0.2]}, "schedule.epochs": {"low": 1, "high": 5}})
        {'optimiser.lr': [0.1, 0.2], 'schedule.epochs': {'low': 1, 'high': 5}}
    """
    out: dict[str, Any] = {}
    for key, choice in choices.items():
        if isinstance(choice, dict) and "low" not in choice:
            out |= _space(choice, f"{prefix}{key}.")
        elif (isinstance(choice, list | tuple) and choice) or (isinstance(choice, dict) and "high" in choice):
            out[prefix + key] = choice
        else:
            raise UsageError(f"tune.space.{prefix}{key}: give a list of values, or low and high")
    return out


def _validation(settings: recipe.Recipe) -> dict[str, Any]:
    """The validation split: ``tune.data`` in place of ``data``."""
    return {f"data.{k}" if k != "gold" else "evaluate.gold": v for k, v in settings.tune.data.items()}


def _begin(turn: Any, processes: int) -> None:
    """In a worker: take turns at drawing, and share the cores."""
    global _turn
    import torch

    _turn = turn
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _open(path: Path) -> Any:
    """The study, new or as it is."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails is reported by its own exception
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        again = optuna.storages.RetryHeartbeatStaleTrialCallback()  # the same values, so that a grid is still whole
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}", heartbeat_interval=5, grace_period=30, heartbeat_stale_trial_callback=again
        )
    return optuna.create_study(study_name="excise", storage=storage, load_if_exists=True, direction="minimize")


def _work(values: dict[str, Any], path: str, trials: int) -> None:
    """Run trials until the study holds enough; one whose process died is stale after half a minute and is run anew."""
    import optuna

    settings = recipe.build(values)
    study = _open(Path(path))
    state = optuna.trial.TrialState

    def trial(drawn: Any) -> float:
        _turn.release()
        return _trial(drawn, settings)

    while True:
        _turn.acquire()
        states = [t.state for t in study.get_trials(deepcopy=False)]
        done, running = states.count(state.COMPLETE), states.count(state.RUNNING)
        if done + running < trials:
            study.sampler = _sampler(settings, trials, len(states))
            study.optimize(trial, n_trials=1)
            continue
        _turn.release()
        if done >= trials:
            return
        time.sleep(0.5)  # others are at the last ones, or died over them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)


def _sampler(settings: recipe.Recipe, trials: int, number: int) -> Any:
    """The whole grid where the trials reach; otherwise TPE, seeded by how far the study is."""
    import optuna

    space = _space(settings.tune.space)
    if all(isinstance(v, list | tuple) for v in space.values()) and math.prod(len(v) for v in space.values()) <= trials:
        return optuna.samplers.GridSampler({k: list(v) for k, v in space.items()}, seed=settings.seed)
    return optuna.samplers.TPESampler(seed=settings.seed + number, n_startup_trials=5)


def _trial(trial: Any, settings: recipe.Recipe) -> float:
    from excise import artifacts
    from excise.commands.progress import Progress
    from excise.commands.running import run

    changes = {key: _suggest(trial, key, choice) for key, choice in _space(settings.tune.space).items()}
    changes |= _validation(settings)
    folder = Path(settings.out or ".") / f"trial-{trial.number}"
    changes |= {
        "out": str(folder), "evaluate.relearn_steps": [], "evaluate.generate": 0, "evaluate.map": "none",
        "evaluate.cache": settings.evaluate.cache or str(folder.parent / "cache"),
    }  # fmt: skip
    if settings.tune.objective == "distance":  # reads probabilities alone
        changes |= {"evaluate.latent": False, "evaluate.rewordings": False, "data.utility": {}}
    try:
        run(recipe.changed(settings, changes), progress=Progress(quiet=True))
    except TrainingStopped:
        return math.inf
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

    def value(model: str, metric: str) -> float | None:
        return results.number(model, metric).value

    if name != "distance":
        found, target = value("unlearned", name), value("gold", name)
        if found is None:
            return math.inf
        if METRICS[name].direction == "up":
            return -found
        return abs(found - target) if METRICS[name].direction == "gold" and target is not None else found
    forget, retain = value("unlearned", "forget_probability"), value("unlearned", "retain_probability")
    gold, start = value("gold", "forget_probability"), value("original", "retain_probability")
    if forget is None or retain is None or start is None:
        return math.inf
    lost = max(0.0, start - retain) / start
    if gold is None:
        return forget + lost
    return abs(math.log10(max(forget, 1e-9)) - math.log10(max(gold, 1e-9))) + 10 * lost
