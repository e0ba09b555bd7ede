"""Everything that the page says, gathered from the run folder; the template only sets it.

Every string that comes from the folder passes `excise.report.words.visible` once (nothing in it acts on a terminal)
and Jinja2's escaping later (nothing in it acts on a page).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise import artifacts
from excise.artifacts import GOLD, ORIGINAL, Manifest, Results, RunFolder
from excise.report import figures, numbers
from excise.report.style import model_title, side_title
from excise.report.verdict import KEEP_SHARE, Statement, forget_bar, judge
from excise.report.words import NOT_SHOWN, number, seconds, visible

CAUTION = "These are findings of tests, not a proof: they say what was seen, with the methods and the data named below."
GLYPHS = {"like": "\N{CHECK MARK}", "short": "\N{WHITE DOWN-POINTING TRIANGLE}", "over": "\N{WHITE UP-POINTING TRIANGLE}",
          "harm": "\N{MULTIPLICATION SIGN}", "unknown": "\N{EM DASH}"}  # fmt: skip
_ALWAYS_UNTESTED = (
    "Other copies. The original model, checkpoints, caches, backups and earlier releases hold what was trained into them; "
    "this report is about the weights of this run only.",
    "Other attacks. Only the attacks whose numbers stand above were tried; more data, more steps or other prompts may find more.",
)
_READ = ("recipe.yaml", "results.json", "pictures.json", "log.jsonl", "examples.json")
_SEVERITIES = {"error": "error", "failure": "error", "critical": "error", "warning": "warning", "warn": "warning"}


@dataclass(frozen=True)
class Banner:
    """A line above everything else."""

    kind: str
    title: str
    text: str


@dataclass(frozen=True)
class Finding:
    """A failure signature that the run reported, with what to change."""

    kind: str
    glyph: str
    severity: str
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
    groups: tuple[numbers.Group, ...]
    figures: tuple[figures.Figure, ...]
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
    changed = artifacts.changed_files(run, artifacts.read_manifest(run), _READ)
    model = (results.unlearned() or [""])[0]
    found = tuple(_finding(f) for f in _list(pictures.get("findings")) if isinstance(f, Mapping))
    spread = pictures.get("privleak_null_spread")
    verdict = judge(
        results,
        model,
        null_spread=spread if isinstance(spread, int | float) else None,
        finding_codes=[str(f.get("code", "")) for f in _list(pictures.get("findings")) if isinstance(f, Mapping)],
    )
    has_gold = GOLD in results.models
    return Page(
        style=style,
        model_name=str(_map(manifest.get("model")).get("name") or "a model"),
        banners=_banners(manifest, bool(examples), changed),
        headline=verdict.headline if model else "Nothing has been measured yet.",
        asked=_asked(manifest),
        tally=verdict.tally if model else "",
        statements=verdict.statements if model else (),
        gold_note="" if has_gold else "This run has no gold: whatever needs one reads “not shown”.",
        columns=tuple(model_title(name) for name in numbers.columns(results)),
        reading_title="Beside the gold" if len(results.unlearned()) < 2 else f"{model_title(model)}, beside the gold".capitalize(),
        groups=tuple(numbers.groups(results)),
        figures=tuple(_figures(run, results, pictures)),
        findings=found,
        warnings=tuple(str(w) for w in _list(manifest.get("warnings"))),
        examples=examples,
        not_tested=_not_tested(results, pictures, has_gold),
        facts=_facts(manifest),
        terms=tuple(_term(term) for term in _list(manifest.get("terms")) if isinstance(term, Mapping)),
        data=_data(manifest),
        seconds=tuple((str(k).replace("_", " "), seconds(v)) for k, v in results.seconds.items()),
        recipe=visible(artifacts.read_recipe(run)).strip(),
        versions=tuple((str(k), str(v)) for k, v in _map(manifest.get("versions")).items()),
        files=tuple((str(k), str(v)) for k, v in sorted(_map(manifest.get("files")).items())),
        integrity=_integrity(manifest, changed),
        citations=_citations(manifest, results),
        excise_version=str(_map(manifest.get("versions")).get("excise", "")),
        glyphs=GLYPHS,
    )


def _figures(run: RunFolder, results: Results, pictures: Mapping[str, Any]) -> list[figures.Figure]:
    others = results.unlearned()
    order = [ORIGINAL, GOLD, *others]
    points = {m: (results.number(m, "forget_probability"), results.number(m, "retain_probability")) for m in order}
    original = results.number(ORIGINAL, "retain_probability").value
    relearning, layers, places = (_map(pictures.get(key)) for key in ("relearning", "entanglement_by_layer", "map"))
    drawn = [
        figures.trade_off(
            points,
            others,
            forget_bar=forget_bar(results.number(GOLD, "forget_probability")),
            retain_bar=None if original is None else KEEP_SHARE * original,
        ),
        figures.relearning(_curves(relearning), _list(relearning.get("steps")), others),
        figures.entanglement(_curves(layers), _list(layers.get("layers")), others),
        figures.state_map(places, others),
        figures.losses(visible(artifacts.read_log(run))),
    ]
    return [figure for figure in drawn if figure is not None]


def _curves(picture: Mapping[str, Any]) -> dict[str, list[float | None]]:
    models = _map(picture.get("models"))
    return {name: [v if isinstance(v, int | float) else None for v in _list(values)] for name, values in models.items()}


def _banners(manifest: Manifest, examples: bool, changed: Sequence[str]) -> tuple[Banner, ...]:
    banners = []
    status = manifest.get("status")
    if status == "running":
        banners.append(Banner("status", "Not finished.", "This run was still going on, or was cut off, when the report was made."))
    elif status == "stopped":
        banners.append(Banner("status", "Stopped.", "This run ended before its last step; the numbers are of the last good state."))
    if changed:
        text = f"Files of this folder no longer match their recorded hashes: {', '.join(changed)}. Do not rely on this page."
        banners.append(Banner("changed", "Changed since the run.", text))
    if examples:
        text = "This report quotes texts of the records. Handle it as you handle the records, and delete it with them."
        banners.append(Banner("personal", "Contains personal data.", text))
    return tuple(banners)


def _asked(manifest: Manifest) -> str:
    data = _map(manifest.get("data"))
    rows = {side: entry.get("rows") for side, entry in data.items() if isinstance(entry, Mapping)}
    name = _map(manifest.get("model")).get("name") or "the model"
    forget, retain = rows.get("forget"), rows.get("retain")
    text = f"What was asked: make {name} forget {_count(forget)} and keep {_count(retain)}."
    if rows.get("untouched"):
        text += f" Another {_count(rows['untouched'])} were kept out of the work, to measure what is left of the rest."
    return text


def _count(rows: Any) -> str:
    if not isinstance(rows, int):
        return "its records"
    return "1 record" if rows == 1 else f"{rows:,} records"


def _finding(found: Mapping[str, Any]) -> Finding:
    severity = str(found.get("severity") or "note")
    kind = _SEVERITIES.get(severity.lower(), "note")
    glyph = {"error": GLYPHS["harm"], "warning": "!"}.get(kind, "i")
    title = str(found.get("title") or found.get("code") or "Finding")
    return Finding(kind, glyph, severity, title, str(found.get("detail") or ""), str(found.get("advice") or ""))


def _examples(content: Any) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Examples in whatever fields the run gave them: a list of objects, or an object that holds such a list."""
    if isinstance(content, Mapping):
        content = next((value for value in content.values() if isinstance(value, list)), [content])
    shown = []
    for example in _list(content):
        fields = example if isinstance(example, Mapping) else {"text": example}
        shown.append(tuple((str(k).replace("_", " "), v if isinstance(v, str) else str(v)) for k, v in fields.items() if v is not None))
    return tuple(shown)


def _not_tested(results: Results, pictures: Mapping[str, Any], has_gold: bool) -> tuple[str, ...]:
    lines = [str(line) for line in _list(pictures.get("not_tested"))]
    if results.models and not has_gold:
        lines.append("Comparison with a gold: this run has none, so nothing here says what the model would be like without the records.")
    absent = numbers.missing(results)
    if absent:
        lines.append(f"Numbers that this run's data or settings could not show: {', '.join(absent)}.")
    return (*lines, *_ALWAYS_UNTESTED)


def _facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    model = _map(manifest.get("model"))
    pairs = [
        ("model", model.get("name")),
        ("weights (SHA-256)", model.get("sha256")),
        ("command", manifest.get("command")),
        ("seed", manifest.get("seed")),
        ("precision", manifest.get("precision")),
        ("status", manifest.get("status")),
    ]
    return tuple((key, str(value)) for key, value in pairs if value not in (None, ""))


def _term(term: Mapping[str, Any]) -> dict[str, str]:
    weight = term.get("weight")
    if isinstance(weight, Mapping):
        weight = ", ".join(f"{k} {v}" for k, v in weight.items())
    elif isinstance(weight, int | float):
        weight = f"{weight:g}"
    return {"name": str(term.get("name", "")), "weight": str(weight if weight is not None else ""), "citation": str(term.get("citation") or "")}


def _data(manifest: Manifest) -> tuple[dict[str, str], ...]:
    rows = []
    for side, entry in _map(manifest.get("data")).items():
        given = _map(entry)
        rows.append({
            "side": side_title(str(side)),
            "rows": str(given.get("rows", NOT_SHOWN)),
            "fingerprint": str(given.get("fingerprint") or NOT_SHOWN),
        })  # fmt: skip
    return tuple(rows)


def _integrity(manifest: Manifest, changed: Sequence[str]) -> str:
    if changed:
        return f"Checked when this page was made: {number(float(len(changed))).split('.')[0]} of the files it was made from differ."
    recorded = [name for name in _READ if name in _map(manifest.get("files"))]
    return f"Checked when this page was made, all unchanged: {', '.join(recorded)}." if recorded else "Not checked: no record of the files it was made from."


def _citations(manifest: Manifest, results: Results) -> tuple[dict[str, str], ...]:
    sources: dict[str, list[str]] = {}
    for term in _list(manifest.get("terms")):
        given = _map(term)
        if given.get("citation") and given["citation"] != "ours":
            sources.setdefault(str(given["citation"]), []).append(f"term {given.get('name', '')}")
    for source, titles in numbers.cited(results).items():
        sources.setdefault(source, []).extend(titles)
    return tuple({"source": source, "used": "; ".join(used)} for source, used in sources.items())


def _visible_results(results: Results) -> Results:
    models = {visible(m): {visible(k): v for k, v in numbers.items()} for m, numbers in results.models.items()}
    return Results(models, {visible(k): v for k, v in results.seconds.items()})


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
