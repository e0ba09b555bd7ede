"""The report: plain words beside the gold's numbers, nothing that runs or leaks, the same page every time."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import excise.reporting
from excise.artifacts import Number, Results
from excise.errors import InputRefused
from excise.metrics.catalogue import METRICS
from excise.reporting import checks, numbers
from excise.reporting.checks import CHECKS
from excise.reporting.verdict import Statement, Verdict, judge
from fake_run import HOSTILE, write_fake_run

SECTIONS = [
    "verdict", "not-tested", "tests", "numbers", "pictures", "adapter", "findings", "settings", "citations",
]  # fmt: skip
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; complains about elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, name: str) -> list[str]:
        return [value or "" for _, attrs in self.elements for key, value in attrs.items() if key == name]


def built(folder: Path, **options: Any) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, an unsteady layout: nothing of that kind is normal
        path = excise.reporting.build(write_fake_run(folder, **options).root)
    return Page(path.read_text("utf-8"))


# --- the page -------------------------------------------------------------------------------------------------------


def test_sections_are_there_in_order(tmp_path: Path) -> None:
    page = built(tmp_path)
    found = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert found == SECTIONS
    assert page.text.index("What was found") < page.text.index("What was not tested") < page.text.index("Key numbers")
    assert "Contains personal data" not in page.text


def test_nothing_runs_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = built(tmp_path, hostile=HOSTILE, examples=True)
    policy = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    loading = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "foreignobject", "image", "a"}
    found = {tag for tag, _ in page.elements} & loading
    assert found == {"a"}
    assert [attrs["href"] for tag, attrs in page.elements if tag == "a"] == ["#numbers"]
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert all(value.startswith("#") for value in page.having("xlink:href"))
    assert not [value for value in page.having("style") if re.search(r"https?:|@import|expression", value)]


def test_hostile_text_comes_out_as_text_in_every_field(tmp_path: Path) -> None:
    text = excise.reporting.build(write_fake_run(tmp_path, hostile=HOSTILE, examples=True).root).read_text("utf-8")
    page = Page(text)
    assert "<svg onload" not in text
    assert "</script" not in text
    assert "\x1b" not in text
    assert "\0" not in text
    assert "\u202e" not in text
    assert "49" not in [word.strip() for word in page.words]  # {{ 7*7 }} was not evaluated
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\0", "\\x00").replace("\u202e", "\\u202e")
    assert page.text.count(shown) > 25
    for part in ("numbers", "pictures", "adapter", "findings", "examples", "not-tested", "settings", "citations"):
        section = text[text.index(f'<section id="{part}"') :].split("</section>")[0]
        assert shown in Page(f"{section}</section>").text, part


def test_ids_of_the_page_are_unique_and_every_reference_hits(tmp_path: Path) -> None:
    page = built(tmp_path, hostile=HOSTILE)
    ids = page.having("id")
    assert len(ids) == len(set(ids))
    wanted = [value.removeprefix("#") for value in page.having("xlink:href")] + page.having("aria-labelledby")
    wanted += [name for value in page.having("clip-path") for name in re.findall(r"url\(#([^)]+)\)", value)]
    assert len(wanted) > 100
    assert set(wanted) <= set(ids)


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path)
    first = excise.reporting.build(run.root).read_bytes()
    assert excise.reporting.build(run.root).read_bytes() == first


def test_every_figure_has_words_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    page = built(tmp_path)
    assert sum(tag == "figure" for tag, _ in page.elements) == 5 + 2
    assert sum(tag == "figcaption" for tag, _ in page.elements) == 5 + 2
    drawings = [attrs for _, attrs in page.elements if attrs.get("role") == "img"]
    # trade-off, relearning, entanglement; a map of each model; a curve of each term; shares and a layer each
    assert len(drawings) == 3 + 4 + 3 + 1 + 4
    assert all(len(attrs["aria-label"] or "") > 40 for attrs in drawings)
    assert any("gold: forgotten 0.0012, kept 0.954" in (attrs["aria-label"] or "") for attrs in drawings)
    cells = [attrs for tag, attrs in page.elements if tag == "th"]
    assert all("scope" in attrs for attrs in cells)


def test_it_never_claims_erasure_or_lawfulness(tmp_path: Path) -> None:
    for place, options in enumerate(({}, {"gold": False}, {"evaluated": False}, {"values": {"privleak": 60.0}})):
        words = built(tmp_path / str(place), **options).text.lower()
        for word in ("erased", "erasure", "compliant", "gdpr", "guarantee", "lower is better", "higher is better"):
            assert word not in words, word


def test_texts_are_shown_only_with_an_examples_file_and_then_said_first(tmp_path: Path) -> None:
    without = built(tmp_path / "a")
    with_texts = built(tmp_path / "b", examples=True)
    assert "Port Sorrow" not in without.text
    assert "Port Sorrow" in with_texts.text
    assert "generated: gold" in with_texts.text
    assert with_texts.text.index("Contains personal data.") < with_texts.text.index("What was found")


def test_a_folder_without_numbers_says_so(tmp_path: Path) -> None:
    page = built(tmp_path, evaluated=False)
    assert "Nothing has been measured yet." in page.text
    assert "this folder holds no numbers" in page.text
    assert "Training, term by term" in page.text


def test_where_an_adapter_acts_is_said_in_words(tmp_path: Path) -> None:
    text = built(tmp_path / "a").text
    assert "In the middle one of 4 adapted layers, the directions that training changed hold 48 % of" in text
    assert "and 12 % of what differs between those to be kept; directions chosen at random would hold 3 % of" in text
    assert "Those that the adapter started with hold 54 % and 21 %" in text
    assert "layers.1.self_attn.o_proj" in text
    assert "Not shown: this run trained no adapter" in built(tmp_path / "b", adapter=False).text
    run = write_fake_run(tmp_path / "c")
    run.pictures.write_text(json.dumps({"geometry": {"not_shown": "because"}}), "utf-8")
    assert "because" in Page(excise.reporting.build(run.root).read_text("utf-8")).text


def test_a_run_that_did_not_end_says_so(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path)
    manifest = json.loads(run.manifest.read_text("utf-8"))
    for status, words in (("running", "Not finished."), ("stopped", "Stopped.")):
        run.manifest.write_text(json.dumps(manifest | {"status": status}), "utf-8")
        assert words in Page(excise.reporting.build(tmp_path).read_text("utf-8")).text


def test_a_changed_result_is_seen(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path)
    assert "all unchanged" in Page(excise.reporting.build(tmp_path).read_text("utf-8")).text
    run.results.write_text(run.results.read_text("utf-8").replace("0.0862", "0.0012"), "utf-8")
    page = Page(excise.reporting.build(tmp_path).read_text("utf-8"))
    assert "Changed since the run. No longer as their hashes were recorded: results.json." in page.text


def test_an_empty_manifest_is_enough(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1}', "utf-8")
    Page(excise.reporting.build(tmp_path).read_text("utf-8"))


@pytest.mark.parametrize(
    "pictures",
    [
        {"relearning": {"steps": [0, 1], "models": {"gold": [None, None], "unlearned": [0.1]}}},
        {"entanglement_by_layer": {"layers": [1, 2], "models": {"gold": [None, 0.0], "unlearned": [1e9, 1e-3]}}},
        {"map": {"models": {"gold": {"forget": [[0.0, 0.0]], "retain": []}}}},
        {"map": {"models": {"gold": {"forget": [[None, 1.0]]}}}, "findings": ["text"], "not_tested": "text"},
        {"findings": [{}], "relearning": [], "map": None},
        {"geometry": []},
        {"geometry": {"layers": "text"}},
        {"geometry": {"k": "x", "layers": [None, {}, {"after": {"forget": {"share": 0.5}}}]}},
        {"geometry": {"layers": [{"after": {"forget": {"share": 0.5, "cosines": [1.0]}, "retain": None}}]}},
    ],
)
def test_poor_pictures_do_not_break_the_page(tmp_path: Path, pictures: dict[str, Any]) -> None:
    run = write_fake_run(tmp_path)
    run.pictures.write_text(json.dumps(pictures), "utf-8")
    Page(excise.reporting.build(tmp_path).read_text("utf-8"))


def test_reading_a_folder_needs_no_torch(tmp_path: Path) -> None:
    write_fake_run(tmp_path)
    code = (
        f"import sys, excise; excise.report({str(tmp_path)!r})\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    for function in (excise.reporting.build, excise.reporting.summary):
        with pytest.raises(InputRefused, match=r"manifest\.json"):
            function(tmp_path)


# --- the verdict ----------------------------------------------------------------------------------------------------


def fake_verdict(**values: float | None) -> tuple[Verdict, dict[str, Statement]]:
    gold = {
        "forget_probability": 0.002, "retain_probability": 0.95, "forget_perplexity": 500.0, "privleak": 0.0,
        "latent_membership_auc": 0.5, "relearned_probability": 0.004,
    }  # fmt: skip
    found = gold | {"forget_quality_log10": -0.2} | values
    models = {"gold": gold, "unlearned": found, "original": {"retain_probability": 0.96, "forget_probability": 0.97}}
    results = Results({m: {k: Number(v, n=60) for k, v in row.items()} for m, row in models.items()})
    verdict = judge(results, "unlearned")
    return verdict, {s.key: s for s in verdict.statements}


def test_a_model_like_the_gold_passes_every_check() -> None:
    verdict, found = fake_verdict()
    assert {s.kind for s in found.values()} == {"like"}
    assert verdict.headline.endswith("No test made here found a trace of the records beyond the gold's.")
    assert "60 records" in found["alike"].text
    assert "With so few records" in found["alike"].text


@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("answers", {"forget_probability": 0.051}, "short"),
        ("answers", {"forget_probability": 0.049}, "like"),
        ("answers", {"forget_probability": None}, "unknown"),
        ("kept", {"retain_probability": 0.94 * 0.96}, "harm"),
        ("kept", {"retain_probability": 0.951 * 0.96}, "like"),
        ("past", {"forget_perplexity": 1600.0}, "over"),
        ("past", {"privleak": 30.0}, "over"),
        ("membership", {"privleak": 30.0}, "over"),
        ("membership", {"privleak": -30.0}, "short"),
        ("membership", {"privleak": None}, "unknown"),
        ("inside", {"latent_membership_auc": 0.99}, "short"),
        ("inside", {"latent_membership_auc": 0.1}, "short"),
        ("relearned", {"relearned_probability": 0.3}, "short"),
        ("alike", {"forget_quality_log10": -1.5}, "short"),
        ("alike", {"forget_quality_log10": None}, "unknown"),
    ],
)
def test_each_check_stands_beside_the_gold(key: str, values: dict[str, float | None], kind: str) -> None:
    _, found = fake_verdict(**values)
    assert found[key].kind == kind
    assert [whose for whose, *_ in found[key].beside] == ["this model", "gold", "original"]
    if kind != "unknown":
        assert "gold" in found[key].text


def test_over_forgetting_is_a_failure_with_a_name() -> None:
    verdict, found = fake_verdict(privleak=40.0)
    assert "Over-forgetting, a failure" in found["past"].text
    assert "went too far" in verdict.headline
    assert "past the gold (over-forgetting)" in verdict.tally


def test_chance_is_not_taken_for_a_leak() -> None:
    results = Results({"gold": {"privleak": Number(0.0)}, "unlearned": {"privleak": Number(-15.0)}})
    kinds = [
        next(s.kind for s in judge(results, "unlearned", null_spread=spread).statements if s.key == "membership")
        for spread in (None, 4.0, 9.8)
    ]
    assert kinds == ["short", "short", "like"]


def test_without_a_gold_nothing_relative_is_claimed(tmp_path: Path) -> None:
    page = built(tmp_path, gold=False)
    assert "This run has no gold" in page.text
    assert "Comparison with a gold" in page.text
    assert "beside the gold: not shown" not in page.text
    results = Results({"unlearned": {"forget_probability": Number(0.01), "latent_membership_auc": Number(0.9)}})
    kinds = {s.key: s.kind for s in judge(results, "unlearned").statements}
    assert [key for key, kind in kinds.items() if kind != "unknown"] == ["answers"]


# --- the table ------------------------------------------------------------------------------------------------------


def test_direction_is_relative_to_the_gold(tmp_path: Path) -> None:
    results = Results({m: {k: Number(0.5) for k in METRICS} for m in ("unlearned", "gold", "original")})
    rows = [*numbers.key_rows(results), *(row for group in numbers.groups(results) for row in group.rows)]
    assert sorted(row.name for row in rows) == sorted(METRICS)
    for row in rows:
        assert row.aim == {"gold": "the gold's", "up": "higher", "down": "lower"}[METRICS[row.name].direction]
        assert row.reading == "the same as the gold's"


def test_summary_is_plain_strings_with_the_gold(tmp_path: Path) -> None:
    write_fake_run(tmp_path, hostile=HOSTILE)
    rows = excise.reporting.summary(tmp_path)
    assert rows[0][:2] == ["number", "unlearned"]
    assert "gold" in rows[0]
    assert len(rows) == 1 + len(numbers.KEY_NUMBERS)
    assert len({len(row) for row in rows}) == 1
    assert "\x1b" not in str(rows)
    by_name = {row[0]: row for row in rows}
    assert by_name["Forget quality (log10 p)"][rows[0].index("gold")] == "not shown"


def test_an_incomplete_utility_is_not_called_model_utility() -> None:
    found = Number(0.5, extra={"parts": 4, "complete": False})
    titles = [row.title for row in numbers.key_rows(Results({"unlearned": {"model_utility": found}}))]
    assert "Utility over 4 parts (not the nine of TOFU)" in titles
    assert "Model utility" not in titles


def test_checks_read_numbers_of_the_catalogue() -> None:
    assert {check.metric for check in CHECKS} <= set(METRICS)
    assert set(numbers.KEY_NUMBERS) <= set(METRICS)
    assert checks.KEEP_SHARE == 0.95
