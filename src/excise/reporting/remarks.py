"""What a page says beside numbers and pictures: banners, what was asked, findings, texts, and what was not tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise.artifacts import Manifest, Results
from excise.reporting import numbers, stopping
from excise.reporting.record import as_list, as_map
from excise.reporting.style import model_title

_ALWAYS_UNTESTED = (
    "Other copies: the original model, checkpoints, caches, backups and earlier releases hold what was trained into "
    "them; this report is about the weights of this run only.",
    "Other attacks: only the attacks whose numbers stand below were tried; more data, more steps or other prompts may "
    "find more.",
)
_NO_GOLD = "Comparison with a gold: there is none, so nothing says what the model would be without the records."
_SEVERITIES = {"error": "error", "failure": "error", "warning": "warning", "warn": "warning"}
_GLYPHS = {"error": "\N{MULTIPLICATION SIGN}", "warning": "!", "info": "i"}


@dataclass(frozen=True)
class Banner:
    """A line above everything else."""

    kind: str
    title: str
    text: str


@dataclass(frozen=True)
class Finding:
    """A failure signature that the run reported, with what to change."""

    code: str
    kind: str
    glyph: str
    severity: str
    model: str
    title: str
    detail: str
    advice: str


def banners(
    manifest: Manifest, *, examples: bool, changed: Sequence[str], verdict: Mapping[str, Any] | None
) -> tuple[Banner, ...]:
    """What a reader must see first.

    Args:
        manifest: The record of the run.
        examples: Whether texts are shown.
        changed: Files that are not as they were recorded.
        verdict: ``verdict.json``, if there is one.
    """
    found = []
    status = manifest.get("status")
    if status == "running":
        text = "This run was still going on, or was cut off, when the report was made."
        found.append(Banner("status", "Not finished.", text))
    elif status == "stopped":
        text = "This run ended before its last step; the numbers are of the last good state."
        found.append(Banner("status", "Stopped.", text))
    if stopping.nothing_kept(manifest.get("stopping")):
        found.append(Banner("status", "Not admissible.", stopping.NOTHING_KEPT))
    if changed:
        text = f"No longer as their hashes were recorded: {', '.join(changed)}. Do not rely on this page."
        found.append(Banner("changed", "Changed since the run.", text))
    fixed = as_map(manifest.get("verify")).get("sha256")
    if verdict is not None and verdict.get("fixed") and verdict.get("thresholds_sha256") != fixed:
        text = "The verdict used other thresholds than those recorded before this run. Verify again."
        found.append(Banner("changed", "Not this run's verdict.", text))
    if examples:
        text = "This report quotes texts of the records. Handle it as you handle the records, and delete it with them."
        found.append(Banner("personal", "Contains personal data.", text))
    return tuple(found)


def asked(manifest: Manifest) -> str:
    """What the run was to do, in a sentence."""
    data = as_map(manifest.get("data"))
    rows = {side: entry.get("rows") for side, entry in data.items() if isinstance(entry, Mapping)}
    forget, retain = rows.get("forget"), rows.get("retain")
    keep = f"keep {_count(retain)}" if retain else "keep the rest"
    text = f"What was asked: make a model forget {_count(forget)} and {keep}."
    if rows.get("untouched"):
        text += f" Another {_count(rows['untouched'])} were kept out of the work, to measure what is left of the rest."
    return text


def _count(rows: Any) -> str:
    if not isinstance(rows, int):
        return "its records"
    return "1 record" if rows == 1 else f"{rows:,} records"


def finding(found: Mapping[str, Any]) -> Finding:
    """A failure signature of ``pictures.json`` as the page shows it."""
    severity = str(found.get("severity") or "note")
    kind = _SEVERITIES.get(severity.lower(), "info")
    return Finding(
        code=str(found.get("code") or ""),
        kind=kind,
        glyph=_GLYPHS[kind],
        severity=severity,
        model=model_title(str(found.get("model") or "")),
        title=str(found.get("title") or found.get("code") or "Finding"),
        detail=str(found.get("detail") or ""),
        advice=str(found.get("advice") or ""),
    )


def examples(content: Any) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Examples in whatever fields the run gave them; an object of texts (an answer by each model) becomes fields."""
    shown = []
    for example in as_list(content):
        fields: list[tuple[str, str]] = []
        for key, value in (example if isinstance(example, Mapping) else {"text": example}).items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            for name, text in inner:
                heading = f"{key}: {name}" if name else str(key)
                fields.append((heading.replace("_", " "), text if isinstance(text, str) else str(text)))
        shown.append(tuple(fields))
    return tuple(shown)


def not_tested(
    verdict: Mapping[str, Any] | None, pictures: Mapping[str, Any], *, gold: bool
) -> tuple[tuple[str, str], ...]:
    """What was not tested, each with the reason or what belongs to it; never empty.

    A verdict has the list whole; else it is what the evaluation said and what no report looks at.
    """
    lines = [str(line) for line in as_list((verdict or {}).get("not_tested"))]
    if not lines:
        lines = [str(line) for line in as_list(pictures.get("not_tested"))]
        lines += [] if gold else [_NO_GOLD]
        heads = {_parts(line)[0][:12] for line in lines}
        lines += [line for line in _ALWAYS_UNTESTED if line[:12] not in heads]
    return tuple({what: (what, why) for what, why in map(_parts, lines)}.values())  # the last of the same name holds


def _parts(line: str) -> tuple[str, str]:
    """A line before and after its colon.

    Example:
        >>> _parts("Relearning: it needs two rows."), _parts("Pruned copies.")
        (('Relearning', 'It needs two rows.'), ('Pruned copies', ''))
    """
    what, _, why = line.partition(": ")
    return what.removesuffix("."), why[:1].upper() + why[1:]


def not_shown(results: Results, pictures: Mapping[str, Any]) -> tuple[str, ...]:
    """Numbers of the catalogue that the run does not have, by the reason that it gave."""
    reasons = as_map(pictures.get("not_shown"))
    by_reason: dict[str, list[str]] = {}
    for name, title in numbers.missing(results).items() if results.models else ():
        by_reason.setdefault(str(reasons.get(name) or ""), []).append(title)
    return tuple(
        f"Not shown{f' ({reason})' if reason else ''}: {'; '.join(titles)}." for reason, titles in by_reason.items()
    )
