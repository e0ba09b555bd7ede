"""Failure signatures: what went wrong in a run, by which threshold, and what to change; functions of its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from excise.commands.measuring.overforgetting import over_forgotten
from excise.metrics.statistics import wilson

#: Thresholds, in one place. Collapse, no effect and saturation follow the advice of CLReg's description; the numbers
#: are ours.
COLLAPSE_COSINE = 0.98
SATURATED_SHARE = 0.9
NO_EFFECT_CHANGE = 0.05
OVER_UNLEARNED_AUC = 0.35
DEGENERATE_REPETITION = 0.5
EMPTY_CONTRAST = 0.1

#: The attacks by likelihood that a task may have, and whose likelihood it is.
_ATTACKED = {
    "mia_loss_auc": "The forgotten answers",
    "entity_membership_auc": "The entities of forgotten rows",
    "membership_auc": "The classes of forgotten rows",
}
_ATTACKS = tuple(_ATTACKED)

Number = Mapping[str, Any]


def findings(
    numbers: Mapping[str, Mapping[str, Number]], log: Sequence[Mapping[str, Any]], *, name: str = "unlearned"
) -> list[dict[str, str]]:
    """What a careful reader should be told about a run.

    Args:
        numbers: Metrics by model (``results.json``'s ``models``).
        log: Rows of ``log.jsonl``.
        name: The unlearned model.

    Returns:
        Findings ``{"code", "severity", "title", "detail", "advice"}``; severity is ``failure``, ``warning`` or
        ``note``.
    """
    return [*_of_training(log), *_of_result(numbers, name)]


def _of_training(log: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    tail = list(log)[-max(1, len(log) // 4) :] if log else []
    monitors = [row["monitor"] for row in tail if row.get("monitor")]
    out = []
    for term in sorted({key.split("/")[0] for m in monitors for key in m}):
        collapse = _mean(monitors, f"{term}/anchor_collapse")
        if collapse is not None and collapse > COLLAPSE_COSINE:
            out.append(_finding(
                "collapse", "failure", "The hidden states collapsed",
                f"Mean pairwise cosine {collapse:.3f} in the last quarter of the run; above {COLLAPSE_COSINE} all rows "
                "look alike.",
                f"Lower the weight of {term} or raise its temperature; check that retain rows differ from each other.",
            ))  # fmt: skip
        saturated = _mean(monitors, f"{term}/saturated_share")
        if saturated is not None and saturated > SATURATED_SHARE:
            out.append(_finding(
                "saturation", "note", f"{term} no longer pushes",
                f"{saturated:.0%} of its pairs have less than 1 % of the full gradient in the last quarter of the run.",
                "If entanglement is still at the original's level, raise the temperature (0.5 to 0.9).",
            ))  # fmt: skip
    out += _contrast(log)
    fell = [b["monitor"][k] < a["monitor"][k] for k in _negative_keys(log) for a, b in _pairs(log, k)]
    if fell:
        out.append(_finding(
            "negative_cosine", "note", "Cosine of forget and retain states, step by step",
            f"It fell in {sum(fell) / len(fell):.0%} of the steps (Proposition 3.2 of CLReg says that it falls under "
            "the regulariser alone; other terms and other rows move it too).",
            "",
        ))  # fmt: skip
    return out


def _contrast(log: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """How many anchors DeepCUT had, and how many of them had nothing to be compared with."""
    rows = [row["monitor"] for row in log if row.get("monitor")]
    out = []
    for term in sorted({k.split("/")[0] for row in rows for k in row if k.endswith("/skipped")}):
        anchors, skipped = (sum(row.get(f"{term}/{what}") or 0.0 for row in rows) for what in ("anchors", "skipped"))
        if not anchors:
            out.append(_finding(
                "no_anchor", "failure", f"{term} found nothing to forget",
                "No label of a forgotten row was an anchor in any logged step.",
                "Check that the forget rows hold entities, or set anchors: all.",
            ))  # fmt: skip
            continue
        same, other = (_share_without(rows, term, what) for what in ("same", "other"))
        empty = sum(not row.get(f"{term}/anchors") for row in rows if f"{term}/anchors" in row)
        often = skipped > EMPTY_CONTRAST * anchors
        out.append(_finding(
            "empty_contrast", "warning" if often else "note", f"{term}: anchors without contrast",
            f"Of {anchors:,.0f} anchors in the logged steps, {skipped:,.0f} had no contrast at all and were left out; "
            f"{same:.0%} had no kept label of their own class in the batch, {other:.0%} none of another class. "
            f"{empty} logged steps had no anchor.",
            "Draw kept rows class by class (schedule.balance: classes), or more of them." if often else "",
        ))  # fmt: skip
    return out


def _share_without(rows: Sequence[Mapping[str, float]], term: str, what: str) -> float:
    """Share of all anchors that lacked one kind of contrast, from the shares of each step."""
    pairs = [(row.get(f"{term}/anchors") or 0.0, row.get(f"{term}/without_{what}") or 0.0) for row in rows]
    total = sum(number for number, _ in pairs)
    return sum(number * share for number, share in pairs) / total if total else 0.0


def _negative_keys(log: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({k for row in log for k in row.get("monitor", {}) if k.endswith("/negative_cosine")})


def _pairs(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[Mapping, Mapping]]:
    rows = [row for row in log if key in row.get("monitor", {})]
    return list(itertools.pairwise(rows))


def _of_result(numbers: Mapping[str, Mapping[str, Number]], name: str) -> list[dict[str, str]]:
    own, original, gold = numbers.get(name, {}), numbers.get("original", {}), numbers.get("gold", {})
    out = []
    attack = next((name for name in _ATTACKS if name in own), _ATTACKS[0])
    auc, target = _value(own, attack), _value(gold, attack)
    low = min(OVER_UNLEARNED_AUC, target - 0.15) if target is not None else OVER_UNLEARNED_AUC
    if auc is not None and auc < low:
        out.append(_finding(
            "over_unlearned", "failure", "Over-forgotten: less likely than text that was never seen",
            f"{_ATTACKED[attack]} are less likely than never-seen ones (AUC {auc:.2f}, below {low:.2f}"
            + (f"; the gold has {target:.2f}" if target is not None else "")
            + "). That difference gives them away as surely as memory does.",
            "Fewer epochs, a lower learning rate, or a smaller weight of the forget term or the regulariser.",
        ))  # fmt: skip
    before, after = _value(original, "entanglement"), _value(own, "entanglement")
    if before and after is not None and abs(after - before) < NO_EFFECT_CHANGE * before:
        out.append(_finding(
            "no_effect", "warning", "The hidden states did not move apart",
            f"Entanglement {after:.2f}, the original's is {before:.2f}.",
            "Raise the temperature or the weight of the regulariser, or look at its augmentations.",
        ))  # fmt: skip
    latent, latent_gold = _value(own, "latent_membership_auc"), _value(gold, "latent_membership_auc")
    if latent is not None and latent > max(0.75, (latent_gold or 0.5) + 0.15):
        out.append(_finding(
            "latent_membership", "warning", "Forgotten rows are still recognisable inside the model",
            f"From hidden states alone they are told from never-seen rows with AUC {latent:.2f}"
            + (f"; the gold has {latent_gold:.2f}." if latent_gold is not None else "; 0.5 would be chance."),
            "The output is silenced, the knowledge is not removed. No method of the papers avoids this at the sizes "
            "that we measured.",
        ))  # fmt: skip
    out += over_forgotten(own, original, gold)
    out += _below_chance(own, gold)
    repeated, repeated_gold = _value(own, "forget_repetition"), _value(gold, "forget_repetition")
    if repeated is not None and repeated > DEGENERATE_REPETITION and repeated > (repeated_gold or 0) + 0.2:
        out.append(_finding(
            "degenerate_text", "warning", "Answers to forgotten questions are degenerate",
            f"{repeated:.0%} of their 4-grams repeat"
            + (f"; the gold's {repeated_gold:.0%}." if repeated_gold is not None else "."),
            "Fewer epochs or a lower rate; a model that never saw the data still writes sentences.",
        ))  # fmt: skip
    return out


def _below_chance(own: Mapping[str, Number], gold: Mapping[str, Number]) -> list[dict[str, str]]:
    """Multiple-choice numbers below a guess; the interval is widened for how many numbers are looked at."""
    looked_at = {k: v for k, v in own.items() if k.startswith("mcq_accuracy/")}
    below = []
    for name, entry in looked_at.items():
        value, n = entry["value"], entry["n"]
        _, high = wilson(round(value * n), n, 1 - 0.05 / len(looked_at))
        if high < min(entry["chance"], _value(gold, name) or 1):
            below.append(f"{name.partition('/')[2]} {value:.2f} (chance {entry['chance']:.2f}, n {n})")
    if not below:
        return []
    return [_finding(
        "below_chance", "failure", "Over-forgotten: right answers are avoided",
        f"Accuracy is below a guess: {'; '.join(below)}. Whoever inverts the answers reads the knowledge off.",
        "Fewer steps or a lower rate: stop where accuracy reaches the gold's, or chance.",
    )]  # fmt: skip


def _finding(code: str, severity: str, title: str, detail: str, advice: str) -> dict[str, str]:
    return {"code": code, "severity": severity, "title": title, "detail": detail, "advice": advice}


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def _value(numbers: Mapping[str, Number], metric: str) -> float | None:
    return numbers.get(metric, {}).get("value")
