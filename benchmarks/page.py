"""What `bench.py` found, as lines, as a table, and as docs/results/speed.md with its JSON twin."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    Attributes:
        measure: What is divided by what.
        setting: On what.
        value: The ratio; of times, the median.
        low: Smallest ratio of a single pair; None for bytes.
        high: Largest ratio of a single pair.
        n: Pairs.
        bound: ``("at most" | "at least", number)`` where the ratio is a gate.
        detail: Both sides in ms or MB.
    """

    measure: str
    setting: str
    value: float
    low: float | None
    high: float | None
    n: int
    bound: tuple[str, float] | None
    detail: str

    @property
    def passed(self) -> bool | None:
        """Whether the gate holds; None where there is none."""
        if self.bound is None:
            return None
        return self.value <= self.bound[1] if self.bound[0] == "at most" else self.value >= self.bound[1]

    def cells(self) -> tuple[str, ...]:
        """Text of the table's columns."""
        spread = "" if self.low is None or self.high is None else f"{self.low:.2f} - {self.high:.2f}"
        gate = "" if self.bound is None else f"{self.bound[0]} {self.bound[1]:g}"
        verdict = {True: "holds", False: "MISSED", None: ""}[self.passed]
        return (self.measure, self.setting, f"{self.value:.3f}", spread, str(self.n), gate, verdict, self.detail)

    def line(self) -> str:
        """All in one line."""
        return " | ".join(cell for cell in self.cells() if cell)


@dataclass(frozen=True)
class Profile:
    """A heading of the profile: its share of the SimNPO + CLReg step, and what it adds to the plain step."""

    heading: str
    share: float
    added: float


HEAD = ("measure", "setting", "ratio", "pairs from - to", "n", "gate", "verdict", "medians")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(folder: Path, rows: Sequence[Row], profile: Sequence[Profile]) -> None:
    """Write speed.md and speed.json."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": _cpu(), "threads": 1, "torch": version("torch"), "transformers": version("transformers")}
    twin: list[dict[str, Any]] = [
        {
            "kind": "ratio", "measure": r.measure, "setting": r.setting, "value": r.value, "low": r.low, "high": r.high,
            "n": r.n, "bound": r.bound and {"direction": r.bound[0], "value": r.bound[1]}, "passed": r.passed,
            "medians": r.detail, **machine,
        }
        for r in rows
    ]  # fmt: skip
    twin += [{"kind": "profile", "heading": p.heading, "share": p.share, "added": p.added, **machine} for p in profile]
    (folder / "speed.json").write_text(json.dumps(twin, indent=1) + "\n", encoding="utf-8")
    (folder / "speed.md").write_text(_page(rows, profile, machine), encoding="utf-8")


def merged(folder: Path, rows: Sequence[Row]) -> tuple[list[Row], list[Profile]]:
    """What stands in speed.json with these rows in place of those of the same name; new ones come last.

    Raises:
        SystemExit: The others were measured on another processor.
    """
    entries = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    if others := {e["cpu"] for e in entries} - {_cpu()}:
        raise SystemExit(f"{folder / 'speed.json'} was measured on {', '.join(others)}: run without --only")
    mine = {(row.measure, row.setting): row for row in rows}
    out = [
        mine.pop((e["measure"], e["setting"]), None)
        or Row(
            e["measure"], e["setting"], e["value"], e["low"], e["high"], e["n"],
            (e["bound"]["direction"], e["bound"]["value"]) if e["bound"] else None, e["medians"],
        )
        for e in entries if e["kind"] == "ratio"
    ]  # fmt: skip
    profile = [Profile(e["heading"], e["share"], e["added"]) for e in entries if e["kind"] == "profile"]
    return [*out, *mine.values()], profile


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name + (", AMX" if "amx_bf16" in flags else "")


def _page(rows: Sequence[Row], profile: Sequence[Profile], machine: dict[str, Any]) -> str:
    missed = [r for r in rows if r.passed is False]
    verdict = "All gates hold." if not missed else f"{len(missed)} gates are missed: see the table."
    where = ", ".join(f"{k} {v}" if k != "cpu" else str(v) for k, v in machine.items())
    shares = "\n".join(f"| {p.heading} | {100 * p.share:.1f} % | {100 * p.added:+.1f} % |" for p in profile)
    total = 100 * sum(p.added for p in profile)
    return PAGE.format(verdict=verdict, where=where, table=table(rows), shares=shares, total=f"{total:+.1f} %")


PAGE = """# Speed and memory

Written by `make bench` ({where}). {verdict}

Ratios compare two ways of doing the same within one process. CPU time is taken (another process on the machine does not
enter it), the two ways take turns, and the order within a pair alternates; parts may be measured on different days
(`make bench ARGS="--only PART"`). A ratio is the median of three repeats with
new models, each the median over its pairs; "from - to" is the range of single pairs. Bytes do not vary.

{table}

## What is compared

* The model is a Llama of 4 blocks, width 256, tied embeddings, all weights trained, AdamW. A batch is 16 forget and 16
  retain rows whose lengths were drawn from TOFU once and are pinned (`benchmarks/setting.py`).
* **Plain step**: this engine's cross-entropy on the same rows, optimizer step included.
* **Naive way** (`benchmarks/naive.py`): what a competent person writes without an engine: a pass each for forget, a
  live deep-copied reference, two dropout views and retain; attention mask, whole logits, `log_softmax` over every
  position that is read. "Views without head" spares the logits of the two views, which nobody reads. Same formulas,
  batches, optimizer and precision. bf16-mixed uses eager attention on both sides.
* **Bytes along the vocabulary**: peak bytes of live tensors with an axis of the vocabulary's length, or of the length
  of the tiles that the engine cuts it into; weights and their gradients are left out on both sides.
* **Peak memory**: weights, optimizer state, and the most that torch's allocator handed out during a step.
* **A pass each**: probability, perplexity, exact memorisation and extraction strength of the forget rows, and four
  membership attacks on two sides, each with a forward pass of its own, 32 rows at a time in the order of the data. The
  sweep's time includes tokenisation and all metrics; both ways give the same numbers to five digits.
* **DeepCUT**: an encoder of six blocks of width 384 (the size of MiniLM-L6), 16 forget and 16 retain sentences with
  lengths as in WNUT17 (`benchmarks/tagging.py`); the plain step is cross-entropy on the same sentences. The naive step
  is transformers' own loss on padded rows; the engine packs them.
* **distil** (and **likelihood**): what strangers say of each label is given: all classes of a tagger, 128 tokens and
  all others together of a language model. Hearing them, one pass over the forgotten rows each, is not in a step.
* **Full decomposition**: `torch.linalg.eigh` of the whole contrast, of which the leading columns are kept; Krylov
  builds only the space that they lie in and checks its residual. The covariance is given to both (of 5,000 made-up
  vectors, variances that fall as 1/i, eight directions of the forget side alone); both make the layer's factors.
* **Start / epoch**: what a run with LoRA on all linear layers does before its first step (statistics of both sides, the
  factors of all layers) beside training on the same rows once. FILA takes gradients of every adapted weight, VILA of
  the adapter alone. The decompositions cost the same for few rows as for many.

## Where the saving comes from

* One pass per side serves every term; the second view runs one block again; the reference is a stored number a row.
* Rows are packed: of a shuffled batch a third of the positions is padding otherwise. The plain step gains as much.
* Log-probabilities are made tile by tile along the vocabulary, only where labels are. A tile fits the cache; up to
  80 MB of exponentials a pass are kept for the backward pass, the others are made again.

## What the time is spent on

The profile of SimNPO + NLL + CLReg at a vocabulary of 4,096: share of its own step, and what each part adds to the
plain step (in per cent of the plain step). The profiler's own cost is in it, and the two profiles are taken one after
the other, so differences of a few per cent are noise; the table above has the paired ratio.

| part | share of the step | added to the plain step |
| --- | --- | --- |
{shares}
| together | 100 % | {total} |

What CLReg adds is the second view: of four blocks the last runs again on the forget rows, and once more in the backward
pass, which keeps memory near that of the plain step (by arithmetic 17 % of the blocks' work; a model of 32 blocks pays
an eighth of that). The rest is what any step of this model costs: matrix products of the blocks and of the head. Those
are bound by the processor; only fewer positions, a lower precision (bf16-mixed above) or fewer trained weights make
them cheaper.
"""
