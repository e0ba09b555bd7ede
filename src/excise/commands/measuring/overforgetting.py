"""Over-forgetting by name: pushed below what no model ever saw, beyond the gold, into babble, or apart inside.

A model that was pushed too far shows what it was told to forget as surely as one that remembers. Each check compares
intervals, not values, so few rows raise no alarm; with a gold the gold sets the level, without one the numbers of
never-seen or retained rows do, with a margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Nats per word piece that forgotten answers may lie below never-seen ones where no gold says how hard they are.
LIKELIHOOD_MARGIN = 0.5
FLUENCY_MARGIN = 0.2
NEIGHBOURS_MARGIN = 0.1

_ATTACKS = {
    "mia_loss_auc": "loss",
    "mia_zlib_auc": "zlib",
    "mia_min_k_auc": "Min-40 %",
    "mia_min_k_plus_plus_auc": "Min-40 %++",
    "mia_gradient_norm_auc": "gradient norm",
}
_WEAKER = "Fewer epochs, a lower learning rate, or a smaller weight of the forget term or the regulariser."

Number = Mapping[str, Any]
Numbers = Mapping[str, Number]


def over_forgotten(own: Numbers, original: Numbers, gold: Numbers) -> list[dict[str, str]]:
    """Findings of over-forgetting, each with severity ``failure``; empty where nothing of it can be shown.

    Args:
        own: Numbers of the unlearned model, as in ``results.json``.
        original: The original's; empty where it was not measured.
        gold: The gold's; empty where there is none.

    Source:
        Ours.

    Example:
        >>> level = {"value": 0.3, "low": 0.25, "high": 0.35}
        >>> [f["code"] for f in over_forgotten({"forget_fluency": level}, {}, {"forget_fluency": {"low": 0.8}})]
        ['gibberish']
    """
    found = (_below_never_seen(own, gold), _beyond_gold(own, gold), _gibberish(own, gold), _apart(own, original, gold))
    return [f for f in found if f is not None]


def _below_never_seen(own: Numbers, gold: Numbers) -> dict[str, str] | None:
    high, level = _bound(own, "never_seen_gap", "high"), _bound(gold, "never_seen_gap", "low")
    if high is None or high >= (-LIKELIHOOD_MARGIN if level is None else min(0.0, level)):
        return None
    gap = own["never_seen_gap"]["value"]
    beside = "" if level is None else f"; the gold's differ by {gold['never_seen_gap'].get('value', level):.2f}"
    return _failure(
        "below_never_seen", "Over-forgotten: forgotten answers are less likely than never-seen ones",
        f"By {-gap:.2f} nats per word piece (at least {-high:.2f}){beside}. Answers below what no model ever saw are "
        "marked by that.",
        _WEAKER,
    )  # fmt: skip


def _beyond_gold(own: Numbers, gold: Numbers) -> dict[str, str] | None:
    """Attacks whose AUC lies on the far side of the gold's: intervals apart."""
    beyond = []
    for name, title in _ATTACKS.items():
        high, low = _bound(own, name, "high"), _bound(gold, name, "low")
        if high is not None and low is not None and high < low:
            beyond.append(f"{title} {own[name]['value']:.2f} (gold {gold[name].get('value', low):.2f})")
    if not beyond:
        return None
    return _failure(
        "beyond_gold", "Over-forgotten: membership attacks point the other way",
        f"AUC below the gold's, intervals apart: {'; '.join(beyond)}. Whoever turns the attack round finds the rows.",
        _WEAKER,
    )  # fmt: skip


def _gibberish(own: Numbers, gold: Numbers) -> dict[str, str] | None:
    high, level = _bound(own, "forget_fluency", "high"), _bound(gold, "forget_fluency", "low")
    beside = "the gold's"
    if level is None:
        kept = _bound(own, "retain_fluency", "low")
        level, beside = None if kept is None else kept - FLUENCY_MARGIN, "its answers to retained questions"
    if high is None or level is None or high >= level:
        return None
    theirs = (gold.get("forget_fluency") or own.get("retain_fluency", {})).get("value", level)
    return _failure(
        "gibberish", "Over-forgotten: answers to forgotten questions are gibberish",
        f"{own['forget_fluency']['value']:.0%} of them read like real answers; {beside}: {theirs:.0%}. A model that "
        "never saw the rows still writes sentences.",
        _WEAKER,
    )  # fmt: skip


def _apart(own: Numbers, original: Numbers, gold: Numbers) -> dict[str, str] | None:
    """Forgotten rows have forgotten rows as neighbours, more than in the gold (or, without one, in the original)."""
    reference, name = (gold, "gold") if gold else (original, "original")
    words = {"neighbours_retain": "retained", "neighbours_never_seen": "never-seen"}
    said = []
    for metric, rows in words.items():
        low, level = _bound(own, metric, "low"), _bound(reference, metric, "high")
        if low is not None and level is not None and low > level + NEIGHBOURS_MARGIN:
            value, theirs = own[metric]["value"], reference[metric].get("value", level)
            said.append(f"beside {rows} rows {value:.0%} of the nearest are forgotten ones ({name} {theirs:.0%})")
    if not said:
        return None
    return _failure(
        "stands_apart", "Over-forgotten: forgotten rows stand apart inside the model",
        f"{'; '.join(said).capitalize()}. Hidden states alone then say which rows were to be forgotten.",
        "A smaller weight of the term that moves hidden states, or one that draws forgotten rows to never-seen ones.",
    )  # fmt: skip


def _bound(numbers: Numbers, metric: str, which: str) -> float | None:
    return numbers.get(metric, {}).get(which)


def _failure(code: str, title: str, detail: str, advice: str) -> dict[str, str]:
    return {"code": code, "severity": "failure", "title": title, "detail": detail, "advice": advice}
