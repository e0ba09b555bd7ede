"""Multiple-choice questions through lm-evaluation-harness: tasks in; accuracy, its interval and chance out.

Files are scored offline, with a task that is made here; other names are tasks of the harness, whose questions come from
the hub. Questions stay in memory: the harness logs no samples, and a file never enters a data-set cache.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from excise.errors import InputRefused, UsageError
from excise.metrics.measure import evaluating
from excise.metrics.statistics import wilson
from excise.records import Question, as_record, fingerprint, read_questions

NAME = "mcq_accuracy"
_FILES = (".jsonl", ".json", ".gz")
_LONG = 512  # tokens that a question is taken to have when the batch is chosen


@dataclass(frozen=True)
class Tasks:
    """Questions that are ready to be asked.

    Attributes:
        members: Task, as it was named -> its parts: the subjects of a file, the leaves of a group of the harness.
        parts: Part -> task object of the harness.
        chance: Part -> accuracy of a guess.
        sources: Task -> rows and fingerprint, for the manifest.
    """

    members: dict[str, tuple[str, ...]]
    parts: dict[str, Any]
    chance: dict[str, float]
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """Right answers of one model to the questions of one part; ``cut`` questions were longer than the context."""

    correct: int
    n: int
    chance: float
    cut: int = 0


def need_harness() -> None:
    """Refuse where the extra is missing.

    Raises:
        UsageError: With how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("multiple choice needs lm-eval: pip install 'excise[mcq]'")


def load(names: Sequence[str]) -> Tasks:
    """Tasks by file (JSON lines with ``question``, ``choices``, ``answer``) or by a name that the harness knows.

    Args:
        names: Files, ``hub:owner/name`` sources, or names such as ``wmdp_bio`` and ``mmlu``. A file's task has its name
            without the ending; its parts are its subjects.

    Raises:
        UsageError: The extra is missing, or a name is unknown, no multiple choice, or given twice.
        InputRefused: A file with a broken row, or a task whose questions cannot be fetched.
    """
    need_harness()
    tasks = Tasks({}, {}, {})
    index: Any = None
    for given in names:
        local = given.startswith("hub:") or given.endswith(_FILES) or Path(given).is_file()
        name = _stem(given) if local else given
        if name in tasks.members:
            raise UsageError(f"two multiple-choice tasks are called {name!r}: rename a file, or leave one out")
        with _quiet():
            if local:
                parts = _of_file(given, name, tasks)
            else:
                index = index or _index()
                parts = _of_harness(given, index, tasks)
        for part, task in parts.items():
            tasks.parts[part] = task
            tasks.chance[part] = _chance(task)
        tasks.members[name] = tuple(parts)
    return tasks


def _stem(source: str) -> str:
    name = Path(source.removeprefix("hub:").replace(":", "-")).name
    for ending in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name


def _of_file(source: str, name: str, tasks: Tasks) -> dict[str, Any]:
    """One task for each subject of a file; one in all where rows have none, or one."""
    questions = read_questions(source)
    subjects = sorted({q.subject for q in questions if q.subject})
    sources = {"rows": len(questions), "fingerprint": fingerprint(as_record(q) for q in questions)}
    tasks.sources[name] = sources
    if len(subjects) < 2:
        return {name: _task(name, questions)}
    by_subject = {s: [q for q in questions if (q.subject or "no subject") == s] for s in (*subjects, "no subject")}
    return {f"{name}/{s}": _task(f"{name}/{s}", own) for s, own in by_subject.items() if own}


def _task(name: str, questions: Sequence[Question]) -> Any:
    """A task object of the harness over questions in memory.

    ``dataset_path: json`` would do as well, and would copy the file into the data-set cache of the machine.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = [{"asked": q.prompt, "letters": q.letters, "right": q.answer} for q in questions]
    return ConfigurableTask(config={
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["asked"],
        "doc_to_choice": lambda doc: doc["letters"],
        "doc_to_target": lambda doc: doc["right"],
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    })  # fmt: skip


def _index() -> Any:
    """All tasks that the harness ships; reading its ten thousand files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _of_harness(name: str, index: Any, tasks: Tasks) -> dict[str, Any]:
    if name not in index.all_tasks:
        near = difflib.get_close_matches(name, index.all_tasks, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; files end with .jsonl or .json"
        raise UsageError(f"no multiple-choice task or file {name!r}{hint}")
    try:
        found = index.load([name])["tasks"]
    except Exception as error:  # the libraries raise dozens of types, some with rows in their text
        kind = type(error).__name__
        raise InputRefused(
            f"{name}: the questions cannot be fetched ({kind}): they come from the hub and need a network once; a file "
            "of questions needs none"
        ) from None
    for task in found.values():
        if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"{name}: a task of another kind than multiple choice")
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=0)
    tasks.sources[name] = {"rows": sum(len(task.eval_docs) for task in found.values())}
    return dict(found)


def _chance(task: Any) -> float:
    """Mean over questions of 1 / choices."""
    sizes = [len(task.doc_to_choice(doc)) for doc in task.eval_docs]
    return sum(1 / size for size in sizes) / len(sizes)


def measure(
    model: nn.Module, tokenizer: Any, tasks: Tasks, *, context: int | None = None, batch_tokens: int = 4096
) -> dict[str, Count]:
    """Ask a model every question: the choice whose letter is most likely after the prompt is its answer.

    No chat template is applied, as in published numbers. A question that does not fit the context loses its beginning
    (the harness cuts there) and is counted as cut.

    Args:
        model: A causal language model; its mode and weights are as before afterwards.
        tokenizer: Its tokenizer.
        tasks: What `load` returned.
        context: Longest input of the model.
        batch_tokens: About how many tokens a batch has.

    Returns:
        Part -> count.

    Raises:
        InputRefused: A task that reports no accuracy.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), evaluating(model):
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=context,
            batch_size=max(1, batch_tokens // _LONG),
        )  # fmt: skip
        found = evaluate(harness, {"tasks": dict(tasks.parts), "groups": {}}, log_samples=False, bootstrap_iters=0)
        counts = {}
        for part, task in tasks.parts.items():
            share, n = found["results"][part].get("acc,none"), found["n-samples"][part]["effective"]
            if share is None:
                raise InputRefused(f"{part}: the task reports no accuracy: name another")
            counts[part] = Count(round(share * n), n, tasks.chance[part], _cut(task, harness))
    return counts


def _cut(task: Any, harness: Any) -> int:
    """Questions whose prompt and letter are longer than the context; the last token is only predicted."""
    texts = ["".join(i.args) for i in task.instances if i.idx == 0]
    return sum(len(harness.tok_encode(text)) > harness.max_length + 1 for text in texts)


def numbers(counts: Mapping[str, Count], members: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Entries of results.json: over all questions, for each task, and for each part of a task that has several.

    Intervals are Wilson's: questions are taken as drawn at random.

    Example:
        >>> found = numbers({"t/a": Count(3, 4, 0.25), "t/b": Count(1, 4, 0.25)}, {"t": ("t/a", "t/b")})
        >>> {name: entry["value"] for name, entry in found.items()}
        {'mcq_accuracy': 0.5, 'mcq_accuracy/t': 0.5, 'mcq_accuracy/t/a': 0.75, 'mcq_accuracy/t/b': 0.25}
    """
    out = {NAME: _entry(list(counts.values()))}
    for task, parts in members.items():
        out[f"{NAME}/{task}"] = _entry([counts[part] for part in parts])
        if len(parts) > 1:
            out |= {f"{NAME}/{task}/{part.removeprefix(f'{task}/')}": _entry([counts[part]]) for part in parts}
    return out


def _entry(counts: Sequence[Count]) -> dict[str, Any]:
    correct, n = sum(c.correct for c in counts), sum(c.n for c in counts)
    low, high = wilson(correct, n)
    chance = sum(c.chance * c.n for c in counts) / n
    entry = {"value": correct / n, "low": low, "high": high, "n": n, "chance": round(chance, 6)}
    cut = sum(c.cut for c in counts)
    return {**entry, "cut": cut} if cut else entry


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own bars, and without its logs and those of the hub, which repeat what is tried."""
    names = ("lm_eval", "huggingface_hub", "datasets", "transformers", "httpx", "urllib3")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
