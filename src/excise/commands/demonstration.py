"""`excise demo`: a synthetic world, original, gold, two ways of forgetting, and a report; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise import artifacts, files, models, recipe, reporting, world, world_tagged
from excise.commands import finetuning, folders, running, training
from excise.commands.measuring import evaluation, writing
from excise.commands.measuring.measured import Measured
from excise.commands.progress import Progress
from excise.commands.starting import preparing, sides
from excise.errors import UsageError
from excise.world import World

Tasks = dict[str, tuple[Callable, tuple]]


@dataclass(frozen=True)
class Kind:
    """A demo: its world, the sizes of a whole and a quick one, its recipe by name, and what that is held against.

    ``RECIPE-train`` trains the original and the gold, ``RECIPE-BESIDE`` is the other way of forgetting.
    """

    make: Callable[..., World]
    corpus: Callable[[World], list[str]]
    whole: dict[str, int]
    small: dict[str, int]
    tokens: int
    recipe: str
    beside: str


#: Sections of a recipe that make a method; what the demo does not share between its two ways of forgetting.
METHOD = ("edit", "initialise", "objective", "schedule", "optimiser", "stop")
KINDS: dict[str, Kind] = {
    "qa": Kind(
        world.world, world.corpus, {"never_seen": 16, "stopping": 5},
        {"retain": 12, "untouched": 4, "forget": 2, "never_seen": 6, "stopping": 2}, 2048,
        "demo", "simnpo_clreg",
    ),
    "ner": Kind(
        world_tagged.tagged_world, world_tagged.tagged_corpus, {}, {"retain": 16, "untouched": 4, "forget": 3}, 1024,
        "demo-ner", "reverse_gradient",
    ),
}  # fmt: skip


def demo(
    out: str | Path = "excise-demo",
    *,
    task: str = "qa",
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make a world, train a model on it, make it forget some people, and report; about two minutes on two cores.

    Args:
        out: Folder to write; replaced if an earlier demo made it.
        task: ``qa``: a language model and questions about people; ``ner``: a tagger and sentences by their writers.
        quick: A smaller world.
        seed: Of the world and of every training.
        progress: Where progress is shown.

    Returns:
        The path of the report.

    Raises:
        UsageError: An unknown task, or a folder that holds something else.
        NotShown: The stopping rule found nothing to keep; the report says what was seen.

    Example:
        >>> demo("excise-demo")  # doctest: +SKIP
        PosixPath('excise-demo/report.html')
    """
    if task not in KINDS:
        raise UsageError(f"unknown demo {task!r}: {' or '.join(KINDS)}")
    kind, progress = KINDS[task], progress or Progress()
    run = artifacts.RunFolder(_fresh(Path(out)))
    settings = _settings(run, kind, quick=quick, seed=seed)
    files.write_text(run.recipe, recipe.dump(settings))
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        trained = {name: run.root / name for name in ("original", "gold")}
        recipes = {name: recipe.plain(_trained(settings, kind, name, folder)) for name, folder in trained.items()}
        tasks: Tasks = {name: (_finetune, (values,)) for name, values in recipes.items()}
        _together(pool, progress, "train original and gold", tasks, trained)
        unlearned = {"unlearned": run.root, kind.beside: run.root / kind.beside}
        other = _other(settings, kind, unlearned[kind.beside])
        recipes = {"unlearned": recipe.plain(settings), kind.beside: recipe.plain(other)}
        tasks = {name: (_unlearn, (values,)) for name, values in recipes.items()}
        _together(pool, progress, f"forget, also {kind.beside.replace('_', ' ')}", tasks, unlearned)
        paths = {**{n: f / "model" for n, f in trained.items()}, **{n: f / "model" for n, f in unlearned.items()}}
        order = ("original", "gold", "unlearned", kind.beside)
        tasks = {name: (_measure, (name, str(paths[name]), recipe.plain(settings))) for name in order}
        measured = _together(pool, progress, "measure four models", tasks, {})
    given = sides.of(settings)
    records = evaluation.limited(given.records, settings.evaluate, task=settings.model.task)
    writing.write(run, measured, records, settings, progress, log=artifacts.read_log(run))
    record = dict(artifacts.read_manifest(run))
    kept = ("checkpoints", *trained, kind.beside, "data", "tokenizer")
    artifacts.write_manifest(run, record | {"status": "done", "files": artifacts.hash_files(run, leave_out=kept)})
    with progress.stage("report"):
        report = reporting.build(run.root)
    running.refuse_inadmissible(run)
    return report


def _fresh(folder: Path) -> Path:
    """An empty folder; only an earlier demo is cleared away."""
    import shutil

    if folder.exists() and any(folder.iterdir()):
        if not (folder / ".demo").is_file():
            raise UsageError(f"{folder}: the folder is not empty and no earlier demo; name another with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".demo").touch()
    return folder


def _settings(run: artifacts.RunFolder, kind: Kind, *, quick: bool, seed: int) -> recipe.Recipe:
    """Write the world's rows and tokenizer, and the recipe that reads them."""
    made = kind.make(seed, **(kind.small if quick else kind.whole))
    written = world.write(made, run.root / "data")
    settings = recipe.load(kind.recipe)
    models.new_tokenizer(kind.corpus(made), kind.tokens).save_pretrained(run.root / "tokenizer")
    own: dict[str, Any] = {"stop.calibration": str(written["stopping"])}
    if kind is KINDS["ner"]:  # never-seen writers are what a test set of a tagger is
        own["data.utility"] = {"test": str(written["never_seen"])}
    return recipe.changed(settings, {
        "model.name": str(run.root / "original" / "model"),
        **{f"data.{side}": str(written[side]) for side in ("forget", "retain", "untouched", "never_seen")},
        "evaluate.gold": str(run.root / "gold" / "model"),
        **own,
        "out": str(run.root),
        "seed": seed,
    })  # fmt: skip


def _other(settings: recipe.Recipe, kind: Kind, folder: Path) -> recipe.Recipe:
    """The recipe of the other way to forget, on the same model and rows."""
    method = recipe.load(f"{kind.recipe}-{kind.beside.replace('_', '-')}")
    own = {section: recipe.plain(getattr(method, section)) for section in METHOD}
    calibration = {"stop.calibration": settings.stop.calibration}
    return recipe.changed(settings, {**own, **calibration, "out": str(folder)})


def _trained(settings: recipe.Recipe, kind: Kind, name: str, folder: Path) -> recipe.Recipe:
    """The recipe that trains the original, or the gold: the same without the rows to forget."""
    own = recipe.load(f"{kind.recipe}-train")
    tokenizer = str(Path(str(settings.out)) / "tokenizer")
    return recipe.changed(own, {
        "model.tokenizer": tokenizer,
        "data": recipe.plain(dataclasses.replace(
            settings.data,
            forget=settings.data.forget if name == "original" else "",
            train=(str(settings.data.untouched),),
            untouched=0.0,
        )),
        "out": str(folder),
        "seed": settings.seed,
    })  # fmt: skip


def _together(
    pool: ProcessPoolExecutor, progress: Progress, stage: str, tasks: Tasks, folders: dict[str, Path]
) -> dict[str, Any]:
    """Run tasks side by side, showing how far their logs are."""
    running: dict[str, Future] = {name: pool.submit(call, *arguments) for name, (call, arguments) in tasks.items()}
    with progress.stage(stage, len(tasks)) as advance:
        while not all(f.done() for f in running.values()):
            time.sleep(0.2)
            advance(sum(1.0 if f.done() else _share(folders.get(name)) for name, f in running.items()))
    return {name: future.result() for name, future in running.items()}


def _share(folder: Path | None) -> float:
    """How much of a run is done, from the last line of its log."""
    try:
        line = (folder / "log.jsonl").read_bytes().rstrip().rsplit(b"\n", 1)[-1] if folder else b"{}"
        return float(json.loads(line).get("progress", 0.0))
    except (OSError, ValueError):
        return 0.0


# --- in a worker process ------------------------------------------------------------------------------------------


def _one_thread() -> None:
    """One core for each of two workers: two threads in each would fight over the same cores."""
    import torch

    torch.set_num_threads(1)


def _finetune(values: dict[str, Any]) -> str:
    return str(finetuning.finetune(recipe.build(values), progress=Progress(quiet=True)))


def _unlearn(values: dict[str, Any]) -> str:
    settings = recipe.build(values)
    prepared = preparing.prepare_unlearning(settings, sides.of(settings), resume=False)
    with folders.opened(settings, resume=True) as folder:
        training.train_into(prepared, folder, Progress(quiet=True), stage="unlearn", resume=False)
        artifacts.write_manifest(folder, training.manifest(prepared, "running"))  # with what the stopping rule saw
        return str(folder.model)


def _measure(name: str, path: str, values: dict[str, Any]) -> Measured:
    settings = recipe.build(values)
    given = sides.of(settings)
    records = evaluation.limited(given.records, settings.evaluate, task=settings.model.task)
    asked = evaluation.asked_of(settings)
    return evaluation.measure_named(name, path, records, settings, Progress(quiet=True), asked)
