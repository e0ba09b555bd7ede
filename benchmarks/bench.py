"""`make bench`: speed and memory beside the plain step and the naive way, as ratios within this one process.

Writes docs/results/speed.md and speed.json, prints the table, and ends with exit code 1 where a gate is missed.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch

import tagging
from excise import models
from excise.objectives.term import Term
from measuring import Step, VocabularyBytes, allocated, held, paired
from naive import NaiveStep
from page import Profile, Row, merged, table, write
from profiling import shares
from reading import Reading, agreement
from setting import EngineStep, Rows, model
from starting import RANK, Beginning, Layer

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Effort:
    """How long to measure: fresh repeats, and pairs in each."""

    repeats: int
    pairs: int
    quick: bool = False


Make = Callable[[], tuple[Step, Step]]


def timed(measure: str, setting: str, make: Make, effort: Effort, bound: tuple[str, float] | None = None) -> Row:
    """A ratio of CPU times: the median of the repeats' medians over pairs taken in turns; models are new in each."""
    medians, ratios, first, second = [], [], [], []
    for _ in range(effort.repeats):
        result = paired(*make(), effort.pairs, warm=1 if effort.pairs < 5 else 2)
        medians.append(result.ratio)
        ratios += result.ratios
        first += result.first
        second += result.second
        gc.collect()
    detail = f"{1e3 * median(first):.0f} ms against {1e3 * median(second):.0f} ms"
    row = Row(measure, setting, median(medians), min(ratios), max(ratios), len(ratios), bound, detail)
    print(row.line(), flush=True)
    return row


def counted(measure: str, setting: str, first: float, second: float, bound: tuple[str, float] | None = None) -> Row:
    """A ratio of bytes, which do not vary."""
    detail = f"{first / 2**20:.0f} MB against {second / 2**20:.0f} MB"
    row = Row(measure, setting, first / second, None, None, 1, bound, detail)
    print(row.line(), flush=True)
    return row


def beside_the_plain_step(effort: Effort) -> list[Row]:
    """What the objectives cost beyond cross-entropy on the same rows through the same engine."""
    base, rows = model(4096), Rows.drawn(4096)
    found = []
    for objective, name, most in (
        ("npo", "NPO + NLL", 1.10),
        ("simnpo+clreg", "SimNPO + NLL + CLReg", 1.30),
        ("strangers", "distil + likelihood + NLL", 1.20),
    ):

        def make(objective: str = objective) -> tuple[Step, Step]:
            return EngineStep(base, rows, objective, constants=rows.told(4096)), EngineStep(base, rows, "plain")

        found.append(timed("step time / plain step", f"{name}, vocabulary 4096", make, effort, ("at most", most)))
        step, plain = make()
        found.append(
            counted(
                "peak memory / plain step", f"{name}, vocabulary 4096", _peak(step), _peak(plain), ("at most", 1.10)
            )
        )
    return found


def _peak(step: EngineStep) -> int:
    """Weights, optimizer state and the most that a step needs beside them."""
    step(0)
    return allocated(step) + held(step.model, step.optimizer)


def beside_the_naive_way(effort: Effort) -> list[Row]:
    """NPO + CLReg + NLL against separate passes, a live reference and whole logits."""
    found = []
    few = Effort(effort.repeats, max(2, effort.pairs // 3), effort.quick)
    mixed = () if effort.quick or not models._amx() else ("bf16-mixed",)  # without matrix instructions nobody would
    for precision, (vocabulary, least) in product(("fp32", *mixed), ((4096, 2.0), (32000, 3.5))):
        base = model(vocabulary, attention="sdpa" if precision == "fp32" else "eager")
        rows = Rows.drawn(vocabulary)

        def make(careful: bool = False, base=base, rows=rows, precision=precision) -> tuple[Step, Step]:
            engine = EngineStep(base, rows, "npo+clreg", precision=precision)
            return NaiveStep(base, engine.batches, precision=precision, views_skip_head=careful), engine

        where, bound = f"vocabulary {vocabulary}, {precision}", ("at least", least)
        found.append(timed("naive step / engine step", where, make, few, bound))
        if not effort.quick and precision == "fp32":
            one = Effort(1, few.pairs)
            found.append(timed("naive step, views without head / engine step", where, lambda: make(True), one))
    return found


def bytes_along_the_vocabulary(effort: Effort) -> list[Row]:
    """Tensors with a vocabulary axis, and all that the allocator hands out, of one step of either way."""
    found = []
    for vocabulary in (32000,) if effort.quick else (32000, 128256):
        base = model(vocabulary)
        engine = EngineStep(base, Rows.drawn(vocabulary), "npo+clreg")
        naive = NaiveStep(base, engine.batches)
        peaks, totals = [], []
        for step in (engine, naive):
            with VocabularyBytes(engine.vocabulary_axes, step.model) as counter:
                step.gradient(0)
            peaks.append(counter.peak)
            step.model.zero_grad()
            others = [step.reference] if isinstance(step, NaiveStep) else []
            totals.append(allocated(step) + held(step.model, step.optimizer, others))
        setting = f"NPO + CLReg + NLL, vocabulary {vocabulary}"
        found.append(counted("bytes along the vocabulary / naive", setting, *peaks, ("at most", 0.25)))
        found.append(counted("peak memory / naive", setting, *totals))
        gc.collect()
    return found


def evaluation(effort: Effort) -> list[Row]:
    """Metrics from one sweep against a pass each, and batched generation against one by one."""
    reading = Reading()
    off = agreement(reading.apart(), reading.together())
    same = sum(a == b for a, b in zip(reading.written(), reading.written_singly(), strict=True))
    if off > 1e-4 or same < 60:
        raise SystemExit(f"the two ways of evaluating disagree: by {off:.1e}, {same} of 64 texts equal")
    few = Effort(effort.repeats, 2)
    passes = "12 metrics of 2 sides of 100 question-answer pairs"
    written = f"64 answers of up to 64 tokens, {same} of 64 texts equal"
    return [
        timed("a pass each / one sweep", passes, lambda: (reading.apart, reading.together), few, ("at least", 5.0)),
        timed(
            "one by one / batches", written, lambda: (reading.written_singly, reading.written), few, ("at least", 5.0)
        ),
    ]


def starts(effort: Effort) -> list[Row]:
    """What the starts of an adapter cost: the decomposition of one layer, and whole starts beside an epoch."""
    few, found = Effort(effort.repeats, 2), []
    for width in (2048,) if effort.quick else (2048, 4096):
        layer, where = Layer(width), f"one layer, width {width}, rank {RANK}, fp32, covariance given"
        found.append(
            timed("full decomposition / Krylov", where, lambda own=layer: (own.eigh, own.krylov), few, ("at least", 15))
        )
        trace, exact = layer.trace(layer.krylov()), layer.trace(layer.eigh())
        near = ("at least", 1 - 1e-4)
        found.append(Row("captured trace / full one's", where, trace / exact, None, None, 1, near, ""))
        print(found[-1].line(), flush=True)
    for name, how, statistics, times, bound in (
        ("rila", "RILA, each token", {}, 4, ("at most", 1.0)),
        ("rila", "RILA, mean of each row", {"pooling": "row"}, 4, ("at most", 1.0)),
        ("rila", "RILA, each token", {}, 1, None),  # few rows: the decompositions do not get fewer
        ("fila", "FILA", {}, 4, None),
        ("vila", "VILA", {}, 4, None),
    ):
        own = Beginning(times)
        where = f"{how}; {len(own.examples['forget'])} rows of each side"

        def make(own: Beginning = own, name: str = name, statistics: dict = statistics) -> tuple[Step, Step]:
            return own.start(name, **statistics), own.epoch()

        found.append(timed("start / epoch of training", where, make, few, bound))
    return found


def classifiers(effort: Effort) -> list[Row]:
    """What DeepCUT and `distil` cost beyond cross-entropy on the same sentences, and that beside padded rows."""
    base, rows, found = tagging.model(), tagging.Rows.drawn(), []
    for name in ("DeepCUT + NLL, two views", "DeepCUT + NLL, one view", "distil + NLL"):

        def make(terms: list[Term] = tagging.OBJECTIVES[name]) -> tuple[Step, Step]:
            return EngineStep(base, rows, terms, constants=tagging.constants(rows)), EngineStep(base, rows, "plain")

        found.append(timed("step time / plain step", f"{name}, encoder 6 x 384", make, effort, ("at most", 1.5)))

    def both() -> tuple[Step, Step]:
        own = EngineStep(base, rows, "plain")
        return tagging.PaddedStep(base, own.batches), own

    found.append(timed("naive step / engine step", "NLL, encoder 6 x 384", both, effort, ("at least", 1.2)))
    return found


def profiled(effort: Effort) -> list[Profile]:
    """Where the time of the plain step and of SimNPO + CLReg goes."""
    base, rows = model(4096), Rows.drawn(4096)
    calls = 3 if effort.quick else 10
    plain, step = (shares(EngineStep(base, rows, name), calls) for name in ("plain", "simnpo+clreg"))
    total, base_total = sum(step.values()), sum(plain.values())
    return [Profile(k, v / total, (v - plain.get(k, 0.0)) / base_total) for k, v in step.items()]


PARTS: dict[str, Callable[[Effort], list[Row]]] = {
    "plain": beside_the_plain_step,
    "naive": beside_the_naive_way,
    "bytes": bytes_along_the_vocabulary,
    "evaluation": evaluation,
    "starts": starts,
    "classifiers": classifiers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few pairs, no bf16, no 128k; writes nothing without --out"
    )
    parser.add_argument("--only", choices=PARTS, help="one part; the page's other rows stay as they are")
    parser.add_argument("--out", type=Path, help=f"folder of speed.md and speed.json (default: {RESULTS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    effort = Effort(1, 4, quick=True) if options.quick else Effort(3, 10)
    found = [row for name, part in PARTS.items() if options.only in (None, name) for row in part(effort)]
    print("\n" + table(found))
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        write(out, *(merged(out, found) if options.only else (found, profiled(effort))))
    missed = [row for row in found if row.passed is False]
    for row in missed:
        print(f"gate missed: {row.line()}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
        tempfile.tempdir = folder
        code = main()
    sys.exit(code)
