"""Everything that the page says, gathered from the run folder; the template only sets it.

Every string that comes from the folder passes `excise.reporting.words.visible` once (nothing in it acts on a terminal)
and Jinja2's escaping later (nothing in it acts on a page).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise import artifacts
from excise.artifacts import GOLD, ORIGINAL, Manifest, Results, RunFolder
from excise.reporting import adapter, class_figures, figures, numbers, record, stopping
from excise.reporting.checks import KEEP_SHARE, forget_limit
from excise.reporting.record import as_list, as_map
from excise.reporting.style import model_title
from excise.reporting.verdict import Statement, judge
from excise.reporting.words import seconds, visible

CAUTION = "These are findings of tests, not a proof: they say what was seen, with the methods and the data named below."
GLYPHS = {
    "like": "\N{CHECK MARK}",
    "short": "\N{WHITE DOWN-POINTING TRIANGLE}",
    "over": "\N{WHITE UP-POINTING TRIANGLE}",
    "harm": "\N{MULTIPLICATION SIGN}",
    "unknown": "\N{EM DASH}",
}
_ALWAYS_UNTESTED = (
    "Other copies. The original model, checkpoints, caches, backups and earlier releases hold what was trained into "
    "them; this report is about the weights of this run only.",
    "Other attacks. Only the attacks whose numbers stand above were tried; more data, more steps or other prompts "
    "may find more.",
)
_SEVERITIES = {"error": "error", "failure": "error", "warning": "warning", "warn": "warning"}


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


@dataclass(frozen=True)
class Page:
    """The data of the page, in the order in which it is read."""

    style: Any
    model_name: str
    banners: tuple[Banner, ...]
    headline: str
    asked: str
    tally: str
    statements: tuple[Statement, ...]
    gold_note: str
    columns: tuple[str, ...]
    reading_title: str
    key_rows: tuple[numbers.Row, ...]
    groups: tuple[numbers.Group, ...]
    figures: tuple[figures.Figure, ...]
    adapter: adapter.Section
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    examples: tuple[tuple[tuple[str, str], ...], ...]
    not_tested: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    terms: tuple[dict[str, str], ...]
    data: tuple[dict[str, str], ...]
    seconds: tuple[tuple[str, str], ...]
    recipe: str
    versions: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]
    integrity: str
    citations: tuple[dict[str, str], ...]
    excise_version: str
    caution: str = CAUTION
    glyphs: Any = None


def gather(run: RunFolder, style: Any) -> Page:
    """Read a run folder and say what its page says.

    Args:
        run: The folder; only the manifest must be there.
        style: The style sheet, marked safe.

    Raises:
        InputRefused: A file of the folder cannot be read.
    """
    manifest: Manifest = visible(artifacts.read_manifest(run))
    results = _visible_results(artifacts.read_results(run))
    pictures = visible(artifacts.read_pictures(run))
    examples = _examples(visible(artifacts.read_examples(run)))
    changed = artifacts.changed_files(run, artifacts.read_manifest(run).get("files") or {}, record.READ)
    model = (results.unlearned() or [""])[0]
    found = tuple(_finding(f) for f in as_list(pictures.get("findings")) if isinstance(f, Mapping))
    spread = pictures.get("privleak_null_spread")
    verdict = judge(
        results,
        model,
        null_spread=spread if isinstance(spread, int | float) else None,
        finding_codes=[f.code for f in found if f.model in ("", model_title(model))],
    )
    has_gold = GOLD in results.models
    return Page(
        style=style,
        model_name=record.model_name(manifest),
        banners=_banners(manifest, bool(examples), changed),
        headline=verdict.headline if model else "Nothing has been measured yet.",
        asked=_asked(manifest),
        tally=verdict.tally if model else "",
        statements=verdict.statements if model else (),
        gold_note="" if has_gold else "This run has no gold: whatever needs one reads “not shown”.",
        columns=tuple(model_title(name) for name in numbers.columns(results)),
        reading_title="Beside the gold"
        if len(results.unlearned()) < 2
        else f"{model_title(model)}, beside the gold".capitalize(),
        key_rows=tuple(numbers.key_rows(results)),
        groups=tuple(numbers.groups(results)),
        figures=tuple(_figures(run, manifest, results, pictures)),
        adapter=adapter.section(pictures.get("geometry")),
        findings=found,
        warnings=tuple(str(w) for w in as_list(manifest.get("warnings"))),
        examples=examples,
        not_tested=_not_tested(results, pictures, has_gold),
        facts=record.facts(manifest),
        terms=tuple(record.term(term) for term in as_list(manifest.get("terms")) if isinstance(term, Mapping)),
        data=record.data(manifest),
        seconds=tuple((str(k).replace("_", " "), seconds(v)) for k, v in results.seconds.items()),
        recipe=visible(artifacts.read_recipe(run)).strip(),
        versions=tuple((str(k), str(v)) for k, v in as_map(manifest.get("versions")).items()),
        files=tuple((str(k), str(v)) for k, v in sorted(as_map(manifest.get("files")).items())),
        integrity=record.integrity(manifest, changed),
        citations=record.citations(manifest, results),
        excise_version=str(as_map(manifest.get("versions")).get("excise", "")),
        glyphs=GLYPHS,
    )


def _figures(run: RunFolder, manifest: Manifest, results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure]:
    own = _of_language if results.task == "causal_lm" else _of_classes
    losses = figures.losses(visible(artifacts.read_log(run)))
    drawn = [*own(results, pictures), stopping.figure(manifest.get("stopping")), losses]
    return [figure for figure in drawn if figure is not None]


def _of_classes(results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure | None]:
    others, relearning = results.unlearned(), as_map(pictures.get("relearning"))
    mark = "entity" if results.task == "token_classification" else "record"
    return [
        class_figures.scores(results),
        class_figures.gaps(results),
        class_figures.classes(as_map(pictures.get("classes")), others),
        class_figures.membership(as_map(pictures.get("membership")), others),
        figures.relearning(_curves(relearning), as_list(relearning.get("steps")), others, "classes"),
        figures.state_map(as_map(pictures.get("map")), others, mark),
    ]


def _of_language(results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure | None]:
    others = results.unlearned()
    order = [ORIGINAL, GOLD, *others]
    points = {m: (results.number(m, "forget_probability"), results.number(m, "retain_probability")) for m in order}
    original = results.number(ORIGINAL, "retain_probability").value
    relearning, layers, places = (as_map(pictures.get(key)) for key in ("relearning", "entanglement_by_layer", "map"))
    return [
        figures.trade_off(
            points,
            others,
            forget_bar=forget_limit(results.number(GOLD, "forget_probability")),
            retain_bar=None if original is None else KEEP_SHARE * original,
        ),
        figures.relearning(_curves(relearning), as_list(relearning.get("steps")), others),
        figures.entanglement(_curves(layers), as_list(layers.get("layers")), others),
        figures.state_map(places, others),
    ]


def _curves(picture: Mapping[str, Any]) -> dict[str, list[float | None]]:
    models = as_map(picture.get("models"))
    return {
        name: [v if isinstance(v, int | float) else None for v in as_list(values)] for name, values in models.items()
    }


def _banners(manifest: Manifest, examples: bool, changed: Sequence[str]) -> tuple[Banner, ...]:
    banners = []
    status = manifest.get("status")
    if status == "running":
        banners.append(
            Banner("status", "Not finished.", "This run was still going on, or was cut off, when the report was made.")
        )
    elif status == "stopped":
        banners.append(
            Banner("status", "Stopped.", "This run ended before its last step; the numbers are of the last good state.")
        )
    if stopping.nothing_kept(manifest.get("stopping")):
        banners.append(Banner("status", "Not admissible.", stopping.NOTHING_KEPT))
    if changed:
        text = f"No longer as their hashes were recorded: {', '.join(changed)}. Do not rely on this page."
        banners.append(Banner("changed", "Changed since the run.", text))
    if examples:
        text = "This report quotes texts of the records. Handle it as you handle the records, and delete it with them."
        banners.append(Banner("personal", "Contains personal data.", text))
    return tuple(banners)


def _asked(manifest: Manifest) -> str:
    data = as_map(manifest.get("data"))
    rows = {side: entry.get("rows") for side, entry in data.items() if isinstance(entry, Mapping)}
    forget, retain = rows.get("forget"), rows.get("retain")
    text = f"What was asked: make a model forget {_count(forget)} and keep {_count(retain)}."
    if rows.get("untouched"):
        text += f" Another {_count(rows['untouched'])} were kept out of the work, to measure what is left of the rest."
    return text


def _count(rows: Any) -> str:
    if not isinstance(rows, int):
        return "its records"
    return "1 record" if rows == 1 else f"{rows:,} records"


def _finding(found: Mapping[str, Any]) -> Finding:
    severity = str(found.get("severity") or "note")
    kind = _SEVERITIES.get(severity.lower(), "info")
    title = str(found.get("title") or found.get("code") or "Finding")
    return Finding(
        code=str(found.get("code") or ""),
        kind=kind,
        glyph={"error": GLYPHS["harm"], "warning": "!"}.get(kind, "i"),
        severity=severity,
        model=model_title(str(found.get("model") or "")),
        title=title,
        detail=str(found.get("detail") or ""),
        advice=str(found.get("advice") or ""),
    )


def _examples(content: Any) -> tuple[tuple[tuple[str, str], ...], ...]:
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


def _not_tested(results: Results, pictures: Mapping[str, Any], has_gold: bool) -> tuple[str, ...]:
    lines = [str(line) for line in as_list(pictures.get("not_tested"))]
    if results.models and not has_gold:
        lines.append(
            "Comparison with a gold: there is none, so nothing says what the model would be without the records."
        )
    reasons = as_map(pictures.get("not_shown"))
    by_reason: dict[str, list[str]] = {}
    for name, title in numbers.missing(results).items() if results.models else ():
        by_reason.setdefault(str(reasons.get(name) or ""), []).append(title)
    for reason, titles in by_reason.items():
        lines.append(f"Not shown{f' ({reason})' if reason else ''}: {'; '.join(titles)}.")
    return (*lines, *(_ALWAYS_UNTESTED if not lines else _ALWAYS_UNTESTED[:1] if not _says_copies(lines) else ()))


def _says_copies(lines: Sequence[str]) -> bool:
    return any("copies" in line.lower() and "checkpoints" in line.lower() for line in lines)


def _visible_results(results: Results) -> Results:
    models = {visible(m): {visible(k): v for k, v in numbers.items()} for m, numbers in results.models.items()}
    return Results(models, {visible(k): v for k, v in results.seconds.items()}, results.task)
