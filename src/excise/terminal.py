"""What the commands print: the summary of a run, a table of metrics, a plan. It reads plain values, never a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.errors import NotShown, VerificationFailed

# The numbers of the terminal's summary, in reading order; the report has all of them.
SUMMARY = (
    "forget_probability",
    "retain_probability",
    "forget_quality_log10",
    "model_utility",
    "unlearning_score",
    "entanglement",
    "privleak",
    "latent_membership_auc",
    "relearned_probability",
)
_OF_CLASSES = ("retain_{}", "untouched_{}", "test_{}", "never_seen_{}", "privleak", "latent_membership_auc")
SUMMARIES = {
    task: (
        "forget_" + score,
        f"forget_{score}_gap",
        *(name.format(score) for name in _OF_CLASSES),
        "relearned_probability",
    )
    for task, score in (("token_classification", "f1"), ("sequence_classification", "accuracy"))
}


def run(folder: Path) -> None:
    """The summary table of a run folder and the path of its report."""
    results = folder / "results.json"
    if results.is_file():
        found = json.loads(results.read_text(encoding="utf-8"))
        scores(found, names=_summary(found))
        print(time_spent(found))
    print(f"report: {folder / 'report.html'}" if (folder / "report.html").is_file() else f"folder: {folder}")


def audit(found: Mapping[str, Any]) -> None:
    """What an audit by canaries showed, and what it proves."""
    own, level = found["epsilon"], f"{found['level']:.0%}"
    print(f"by likelihood: epsilon at least {own['bound']:.2f}, confidence {level}")
    most = f"{own['canaries']} canaries show {own['at_most']:.2f} at most"
    print(f"{own['right']} of {own['guesses']} guesses right; {most}")
    rows = [
        [str(x["layer"]), f"{x['errors']} of {x['n']}", f"{x['bits']:.3f}", f"{x['epsilon']:.2f}"]
        for x in found["layers"]
    ]
    _table(["layer", "errors of a probe", "bits at least", "epsilon at least"], rows)
    for text in found["proves"].values():
        print(text)


def ledger(found: Mapping[str, Any]) -> None:
    """Where the requests of a ledger stand: verdict and likelihood of the forgotten rows then and now."""
    head = ["request", "received", "rows", "verdict", "now", "likelihood", "now"]
    rows = []
    for own in found["requests"]:
        then, now = (next(iter(numbers.values()), None) for numbers in own["numbers"])
        latest = (own["now"] or "") if own["current"] else "not verified"
        said = (own["then"] or "not ended", latest if own["carried_out"] else "not taken over")
        rows.append([own["request"], own["received"], str(own["rows"]), *said,
                     *("" if n is None else f"{n:.4g}" for n in (then, now))])  # fmt: skip
    _table(head, rows)
    print("verdict and likelihood of the forgotten rows: after the request, and on the present model")
    print(f"model: {found['model']}\nhead of {found['entries']} entries, to be noted elsewhere: {found['head']}")


def verdicts(entries: Sequence[Mapping[str, Any]]) -> int:
    """What the verdicts of a ledger's new entries come to, in lines, and as an exit code: 0, 5 (failed), 7 (not shown).

    Example:
        >>> verdicts([{"event": "reverified", "request": "a", "before": "passed", "verdict": {"outcome": "failed"}}])
        failed: a
        came back: a (had passed and no longer passes)
        5
    """
    judged = [e for e in entries if e["event"] in ("ended", "reverified")]
    failed = [e["request"] for e in judged if e["verdict"]["outcome"] == "failed"]
    unclear = [e["request"] for e in judged if e["verdict"]["outcome"] not in ("passed", "failed")]
    back = [f"{e['request']} (had passed and no longer passes)" for e in judged
            if e.get("before") == "passed" and e["verdict"]["outcome"] != "passed"]  # fmt: skip
    for what, names in (("failed", failed), ("not shown", unclear), ("came back", back)):
        if names:
            print(f"{what}: {', '.join(names)}")
    if failed:
        return VerificationFailed.exit_code
    return NotShown.exit_code if unclear else 0


def time_spent(results: Mapping[str, Any]) -> str:
    """How long a run or an evaluation took, and each instrument's share of it.

    Example:
        >>> time_spent({"seconds": {"generate gold": 9.0, "judge": 1.0}, "shares": {"generate": 0.9, "judge": 0.1}})
        'time: 10 s; generate 90 %, judge 10 %'
    """
    total = sum(v for v in results.get("seconds", {}).values() if isinstance(v, int | float))
    shares = [f"{name} {share:.0%}".replace("%", " %") for name, share in results.get("shares", {}).items()]
    return f"time: {total:,.0f} s" + (f"; {', '.join(shares)}" if shares else "")


def _summary(results: Mapping[str, Any]) -> list[str]:
    """Names of the summary: the short list where a model has any of it, and every multiple-choice number."""
    present = list(dict.fromkeys(name for numbers in results.get("models", {}).values() for name in numbers))
    choices = [name for name in present if name.startswith("mcq_accuracy")]
    short = SUMMARIES.get(str(results.get("task")), SUMMARY)
    return choices if choices and not set(short) & set(present) else [*short, *choices]


def scores(results: Mapping[str, Any], *, as_json: bool = False, names: Sequence[str] | None = None) -> None:
    """Metrics as a table: a column for each model of a run, or one for a single log; all of them, or those named."""
    if as_json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    models = results.get("models")
    if models is None:  # the metrics of one log: all of them
        models = {"value": {k: v for k, v in results.items() if isinstance(v, Mapping | int | float) and k != "format"}}
    if names is None:
        names = list(dict.fromkeys(name for metrics in models.values() for name in metrics))
    head = ["metric", *models]
    rows = [[_named(name, models), *(_number(metrics.get(name)) for metrics in models.values())] for name in names]
    if not _fits(head, rows):  # the values are what a narrow window has room for; the report has the intervals
        rows = [[name, *(text.partition(" [")[0] for text in numbers)] for name, *numbers in rows]
    _table(head, rows)


def _named(name: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """A number's name; with the chance level and the number of questions where it has a chance level.

    Example:
        >>> _named("mcq_accuracy", {"gold": {"mcq_accuracy": {"value": 0.25, "n": 152, "chance": 0.25}}})
        'mcq_accuracy (n 152, chance 0.25)'
    """
    entry: Mapping[str, Any] = next((m[name] for m in models.values() if isinstance(m.get(name), Mapping)), {})
    return name if "chance" not in entry else f"{name} (n {entry.get('n')}, chance {entry['chance']:.3g})"


def _fits(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table stands in the terminal without broken words."""
    from rich.console import Console

    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return sum(widths) + 3 * len(widths) + 1 <= Console().width


def _number(metric: Any) -> str:
    """A value with its interval; what the data cannot show is said, not left out.

    Example:
        >>> _number({"value": 0.5, "low": 0.25, "high": 0.75, "n": 40})
        '0.5 [0.25, 0.75]'
        >>> _number(None)
        'not shown'
    """
    entry = metric if isinstance(metric, Mapping) else {"value": metric}
    value, low, high = (entry.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "not shown"
    return f"{value:.4g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


def plan(plan: Mapping[str, Any]) -> None:
    """The forward passes of a step as a table, then what they cost, a line each."""
    rows = [[str(p.get(key)) for key in ("side", "model", "layers")] for p in plan.get("passes", ())]
    _table(["forward pass over", "model", "layers"], rows)
    for key, value in plan.items():
        if key != "passes" and value not in (None, [], {}):
            print(f"{key}: {_line(value, bytes_=key == 'memory')}")


def _line(value: Any, *, bytes_: bool = False) -> str:
    """A nested value in one line.

    Example:
        >>> _line({"weights": 4_200_000, "reference": 0}, bytes_=True)
        'weights 4.2 MB, reference 0.0 MB'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(part, bytes_=bytes_)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(str(part) for part in value)
    return f"{value / 1e6:,.1f} MB" if bytes_ and isinstance(value, int | float) else str(value)


def verdict(found: Mapping[str, Any]) -> None:
    """A verdict: the tests as a table, then what they come to, what to try next, and what nobody tested."""
    rows = []
    for test in found["tests"]:
        said = f"{test['outcome']} ({test['direction']})" if test["direction"] else test["outcome"]
        value = {"value": test["estimate"], "low": test["low"], "high": test["high"]} if test["measured"] else None
        role = {"required": "", "counts": " (not required)", "beside": " (beside)"}[test["role"]]
        rows.append([test["title"] + role, said, _number(value), _bounds(test), str(test["n"] or "")])
    _table(["test", "outcome", "estimate", "threshold", "n"], rows)
    print(f"{found['headline']}\n{found['means']}")
    for head, lines in (("Next", found["next"]), ("Not tested", found["not_tested"])):
        if lines:
            print("\n".join([f"{head}:", *(f"- {line}" for line in lines)]))


def _bounds(test: Mapping[str, Any]) -> str:
    """Between which thresholds an estimate should lie.

    Example:
        >>> _bounds({"least": -0.05, "most": 0.05}), _bounds({"least": 0.95, "most": None})
        ('-0.05 to 0.05', 'at least 0.95')
    """
    least, most = test["least"], test["most"]
    if least is not None and most is not None:
        return f"{least:.3g} to {most:.3g}"
    return f"at least {least:.3g}" if least is not None else f"at most {most:.3g}" if most is not None else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with [brackets] is shown, not read as a style
    Console().print(table)
