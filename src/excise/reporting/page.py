"""Everything that the page says, gathered from the run folder; the template only sets it.

First what a manager needs: the verdict, what it means, what to try, what was not tested. Then what an engineer needs.
Every string that comes from the folder passes `excise.reporting.words.visible` once (nothing in it acts on a terminal)
and Jinja2's escaping later (nothing in it acts on a page).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from excise import artifacts
from excise.artifacts import GOLD, Manifest, Results, RunFolder
from excise.reporting import adapter, drawing, figures, numbers, record, remarks, single, tested
from excise.reporting.record import as_list, as_map
from excise.reporting.style import model_title
from excise.reporting.verdict import Verdict, judge
from excise.reporting.words import seconds, visible

CAUTION = "These are findings of tests, not a proof: they say what was seen, with the methods and the data named below."
GLYPHS = {
    "like": "\N{CHECK MARK}",
    "short": "\N{WHITE DOWN-POINTING TRIANGLE}",
    "over": "\N{WHITE UP-POINTING TRIANGLE}",
    "harm": "\N{MULTIPLICATION SIGN}",
    "unknown": "\N{EM DASH}",
}
_NOTHING = "Nothing has been measured yet."


@dataclass(frozen=True)
class Page:
    """The data of the page, in the order in which it is read."""

    style: Any
    model_name: str
    banners: tuple[remarks.Banner, ...]
    asked: str
    verdict: Verdict
    gold_note: str
    not_tested: tuple[tuple[str, str], ...]
    tests: tested.Tests
    columns: tuple[str, ...]
    reading_title: str
    key_rows: tuple[numbers.Row, ...]
    groups: tuple[numbers.Group, ...]
    not_shown: tuple[str, ...]
    figures: tuple[figures.Figure, ...]
    worst: tuple[single.Listing, ...]
    audit: single.Audit
    adapter: adapter.Section
    findings: tuple[remarks.Finding, ...]
    warnings: tuple[str, ...]
    examples: tuple[tuple[tuple[str, str], ...], ...]
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
    verified = visible(artifacts.read_verdict(run))
    examples = remarks.examples(visible(artifacts.read_examples(run)))
    changed = artifacts.changed_files(run, artifacts.read_manifest(run).get("files") or {}, record.READ)
    findings = tuple(remarks.finding(f) for f in as_list(pictures.get("findings")) if isinstance(f, Mapping))
    others, has_gold = results.unlearned(), GOLD in results.models
    return Page(
        style=style,
        model_name=record.model_name(manifest),
        banners=remarks.banners(manifest, examples=bool(examples), changed=changed, verdict=verified),
        asked=remarks.asked(manifest),
        verdict=_checked(results, pictures, findings) if verified is None else tested.verdict(verified),
        gold_note="" if has_gold else "This run has no gold: whatever needs one reads “not shown”.",
        not_tested=remarks.not_tested(verified, pictures, gold=has_gold),
        tests=tested.tests(verified or {}),
        columns=tuple(model_title(name) for name in numbers.columns(results)),
        reading_title="Beside the gold"
        if len(others) < 2
        else f"{model_title(others[0])}, beside the gold".capitalize(),
        key_rows=tuple(numbers.key_rows(results)),
        groups=tuple(numbers.groups(results)),
        not_shown=remarks.not_shown(results, pictures),
        figures=drawing.drawn(run, manifest, results, pictures),
        worst=single.worst(as_map(pictures.get("worst")), others),
        audit=single.audit(visible(artifacts.read_audit(run))),
        adapter=adapter.section(pictures.get("geometry")),
        findings=findings,
        warnings=tuple(str(w) for w in as_list(manifest.get("warnings"))),
        examples=examples,
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


def _checked(results: Results, pictures: Mapping[str, Any], findings: tuple[remarks.Finding, ...]) -> Verdict:
    """The report's own checks, for a run that nobody has verified."""
    model = next(iter(results.unlearned()), None)
    if model is None:
        return Verdict("", _NOTHING, "", ())
    spread = pictures.get("privleak_null_spread")
    return judge(
        results,
        model,
        null_spread=spread if isinstance(spread, int | float) else None,
        finding_codes=[f.code for f in findings if f.model in ("", model_title(model))],
    )


def _visible_results(results: Results) -> Results:
    models = {visible(m): {visible(k): v for k, v in numbers.items()} for m, numbers in results.models.items()}
    return Results(models, {visible(k): v for k, v in results.seconds.items()}, results.task)
