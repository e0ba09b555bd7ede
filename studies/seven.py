"""Seven instruments on which a model that never saw the data can be told from one that forgot it, and the noise floor.

A number is inside the noise when it is no further from the gold's than a second gold's is, or than the gold's own
sampling error reaches (half of its 90 % interval), whichever is larger. Forget quality compares with the gold by
itself: it is inside where its test does not tell the two apart at 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Numbers = Mapping[str, Mapping[str, Any]]
COST = "processor seconds to unlearn"


@dataclass(frozen=True)
class Instrument:
    """What it is called, the number it reads, and how many digits are worth printing."""

    title: str
    metric: str
    digits: int = 3


INSTRUMENTS = (
    Instrument("forget quality (log10 p)", "forget_quality_log10", 1),
    Instrument("PrivLeak", "privleak", 1),
    Instrument("latent membership AUC", "latent_membership_auc", 2),
    Instrument("relearned probability", "relearned_probability"),
    Instrument("kept probability", "retain_probability"),
    Instrument("fluency", "forget_fluency", 2),
    Instrument("savings", "memorisation_savings"),
)
_FROM_90_TO_95 = 1.645 / 1.96


def value(numbers: Numbers, metric: str) -> float | None:
    """A number, or None where it was not shown."""
    found = numbers.get(metric, {}).get("value")
    return None if found is None or not math.isfinite(found) else float(found)


def floor(gold: Numbers, second: Numbers, metric: str) -> float | None:
    """How far two models that never saw the data may lie apart on an instrument; None where that is not known."""
    one, two = value(gold, metric), value(second, metric)
    if metric == "privleak":  # a distance from the gold by itself
        one = 0.0
    apart = [abs(two - one)] if one is not None and two is not None else []
    own = (second if metric == "privleak" else gold).get(metric, {})
    if own.get("low") is not None and own.get("high") is not None:
        apart.append((own["high"] - own["low"]) / 2 * _FROM_90_TO_95)
    return max(apart) if apart else None


def inside(found: Numbers, gold: Numbers, second: Numbers, metric: str) -> bool | None:
    """Whether a number lies inside the noise floor; None where it cannot be said."""
    own = value(found, metric)
    if own is None:
        return None
    if metric == "forget_quality_log10":
        return own >= math.log10(0.05)
    noise, target = floor(gold, second, metric), 0.0 if metric == "privleak" else value(gold, metric)
    return None if noise is None or target is None else abs(own - target) <= noise


def table(rows: Sequence[tuple[str, Numbers]], gold: Numbers, second: Numbers, more: Sequence[str] = ()) -> str:
    """Markdown: one line a model, its numbers inside the noise in bold and how many those are, and the noise itself.

    Args:
        rows: Heading and numbers of each model.
        gold: The gold's numbers.
        second: A second gold's.
        more: Further cells' heads; a row's cells are its numbers' ``cells``. `COST`, the last of them, is left out
            where no row has it.
    """
    head = ["", *(i.title for i in INSTRUMENTS), "inside", *more]
    body = [["gold", *(_shown(gold, i) for i in INSTRUMENTS), "", *[""] * len(more)]]
    for name, own in rows:
        held = [inside(own, gold, second, i.metric) for i in INSTRUMENTS]
        shown = [f"**{_shown(own, i)}**" if ok else _shown(own, i) for i, ok in zip(INSTRUMENTS, held, strict=True)]
        count = f"{sum(h is True for h in held)} of {sum(h is not None for h in held)}"
        body.append([name, *shown, count, *own.get("cells", {}).get("value", [""] * len(more))])
    if COST in more and not any(line[-1] for line in body):  # nowhere taken
        head, body, more = head[:-1], [line[:-1] for line in body], more[:-1]
    noise = [floor(gold, second, i.metric) for i in INSTRUMENTS]
    body.append([
        "_noise floor_",
        *("" if n is None or i.metric == "forget_quality_log10" else f"{n:.{i.digits}f}"
          for n, i in zip(noise, INSTRUMENTS, strict=True)),
        "", *[""] * len(more),
    ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def cost(row: Mapping[str, Any]) -> str:
    """What a row's unlearning cost, measuring left out; nothing where it was not taken."""
    seconds = row.get("unlearn_cpu_seconds")
    return "" if seconds is None else f"{seconds:.0f}"


def _shown(numbers: Numbers, instrument: Instrument) -> str:
    if instrument.metric in ("privleak", "forget_quality_log10") and instrument.metric not in numbers:
        return "0"
    own = value(numbers, instrument.metric)
    return "not shown" if own is None else f"{own:.{instrument.digits}f}"
