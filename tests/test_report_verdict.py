"""The report of a verified run: the verdict first, what was not tested always, every test, attacks, rows, the audit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import excise.reporting
from excise import artifacts, verdict
from excise.metrics import single_rows
from excise.metrics.table import Table
from excise.reporting import attack_figures, layer_figures, remarks, single, tested
from fake_grown_run import OVER, audit, write_grown_run
from fake_run import HOSTILE, write_fake_run
from fake_verified_run import AS_GOLD
from test_report import Page

SHOWN = HOSTILE.replace("\x1b", "\\x1b").replace("\0", "\\x00").replace("\u202e", "\\u202e")


def read(folder: Path) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has, a layout that does not settle
        return Page(excise.reporting.build(folder).read_text("utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("grown")
    made: dict[str, Any] = {
        "passed": {"made": AS_GOLD, "groups": True}, "failed": {"made": OVER},
        "not shown": {"rows": 20, "never_seen": 0, "gold": False},
    }  # fmt: skip
    return {name: write_grown_run(root / name, **options).root for name, options in made.items()}


# --- the first page -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["passed", "failed", "not shown"])
def test_the_outcome_stands_first_and_the_page_says_what_the_verdict_says(
    folders: dict[str, Path], outcome: str
) -> None:
    found = artifacts.read_verdict(artifacts.RunFolder(folders[outcome]))
    assert found is not None
    assert found["outcome"] == outcome
    page = read(folders[outcome])
    word, sentence = found["headline"].split(": ", 1)
    heading = page.text.index(f"{word} : {sentence[:1].upper()}{sentence[1:]}")
    places = [page.text.index(words) for words in (found["means"], "Is it gone?", "What was not tested", "Every test")]
    assert [heading, *places] == sorted([heading, *places])
    assert bool(found["next"]) == ("What to try next" in page.text)
    assert ("Over-forgetting, a failure of its own:" in page.text) == bool(found["over"])


@pytest.mark.parametrize("outcome", ["passed", "failed", "not shown"])
def test_what_was_not_tested_is_a_table_whatever_the_outcome(folders: dict[str, Path], outcome: str) -> None:
    text = (folders[outcome] / "report.html").read_text("utf-8")
    section = Page(text[text.index('<section id="not-tested"') :].split("</section>")[0] + "</section>")
    found = artifacts.read_verdict(artifacts.RunFolder(folders[outcome]))
    assert found is not None
    for line in (*found["not_tested"], *verdict.verdict.NEVER_TESTED):
        assert line.split(": ")[0].removesuffix(".") in section.text
    assert sum(tag == "tr" for tag, _ in section.elements) == 1 + len(found["not_tested"])


@pytest.mark.parametrize("options", [{}, {"gold": False}, {"evaluated": False}])
def test_without_a_verdict_the_same_page_stands_on_the_checks(tmp_path: Path, options: dict[str, Any]) -> None:
    page = read(write_fake_run(tmp_path, **options).root)
    assert page.text.index("What was found") < page.text.index("What was not tested") < page.text.index("Every test")
    assert "Not shown: this run was not verified." in page.text
    assert "Other copies" in page.text
    assert "Other attacks" in page.text


def test_over_forgetting_is_named(folders: dict[str, Path]) -> None:
    found = artifacts.read_verdict(artifacts.RunFolder(folders["failed"]))
    assert found is not None
    page = read(folders["failed"])
    told = page.text[page.text.index("Over-forgetting, a failure of its own:") :][:700]
    titles = {t["key"]: t["title"] for t in found["tests"]}
    assert len(found["over"]) >= 4
    for key in found["over"]:
        assert f"“{titles[key]}”" in told
    assert "failed: over-forgetting" in page.text


def test_words_that_no_page_may_say(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        words = read(folder).text.lower()
        for word in ("erased", "erasure", "compliant", "gdpr", "guarantee"):
            assert word not in words, word


def one(**fields: Any) -> dict[str, Any]:
    return {"key": "k", "group": "traces", "role": "required", "title": "T", "outcome": "passed", "measured": True,
            "meaning": "M", **fields}  # fmt: skip


@pytest.mark.parametrize(
    ("tests", "kind"),
    [
        ([one()], "like"),
        ([one(), one(outcome="not shown")], "unknown"),
        ([one(), one(outcome="not shown", role="counts")], "like"),
        ([one(), one(outcome="failed", role="beside")], "like"),
        ([one(), one(outcome="failed", direction="short", role="counts")], "short"),
        ([one(outcome="failed", direction="over"), one(outcome="failed", direction="short")], "short"),
        ([one(group="over", outcome="failed", direction=d) for d in ("short", "over")], "over"),
        ([one(group="kept", outcome="failed", direction="harm")], "harm"),
        ([one(outcome="not shown", role="counts")], "unknown"),
    ],
)
def test_a_question_is_answered_by_the_tests_that_decide(tests: list[dict[str, Any]], kind: str) -> None:
    statements = tested.verdict({"outcome": "failed", "tests": tests}).statements
    assert [s.kind for s in statements] == [kind]
    assert [name for name, *_ in statements[0].beside] == ["passed", "failed", "not shown"]
    deciding = [t for t in tests if t["role"] != "beside"]
    assert sum(int(value) for _, value, _ in statements[0].beside) == len(deciding)


def test_advice_that_another_contains_is_said_once() -> None:
    found = tested.verdict({"outcome": "failed", "next": ["Fewer steps.", "Use `stop`.", "Use `stop`. Fewer steps."]})
    assert found.next == ("Use stop. Fewer steps.",)


def test_a_verdict_on_other_thresholds_is_no_verdict_on_this_run(tmp_path: Path) -> None:
    run = write_grown_run(tmp_path)
    assert "Not this run's verdict." not in read(tmp_path).text
    artifacts.write_verdict(run, {**(artifacts.read_verdict(run) or {}), "thresholds_sha256": "0" * 64})
    assert "Not this run's verdict." in read(tmp_path).text


def test_of_two_lines_with_one_name_the_later_holds() -> None:
    lines = ["Copies: some.", "Copies: all.", "Pruned ones."]
    assert remarks.not_tested({"not_tested": lines}, {}, gold=True) == (("Copies", "All."), ("Pruned ones", ""))


# --- for an engineer ------------------------------------------------------------------------------------------------


def test_every_test_has_estimate_bounds_rows_and_threshold(folders: dict[str, Path]) -> None:
    found = artifacts.read_verdict(artifacts.RunFolder(folders["passed"]))
    assert found is not None
    lines = {line.title: line for group in tested.tests(found).groups for line in group.lines}
    assert set(lines) == {t["title"] for t in found["tests"]}
    page = read(folders["passed"])
    for test in found["tests"]:
        line = lines[test["title"]]
        assert test["question"] in page.text
        if test["measured"]:
            assert line.rows == f"{test['n']:,}"
            assert " to " in line.bounds
            assert ("groups" in line.groups) == (test["unit"] == "group")
            assert line.threshold != "not shown"
        else:
            assert (line.word, line.estimate, line.rows) == ("not made", "not shown", "not shown")
    assert any(t["unit"] == "group" for t in found["tests"])
    assert "each at 95 %" in page.text


def test_attacks_and_layers_stand_beside_the_gold_in_words_too(folders: dict[str, Path]) -> None:
    page = read(folders["failed"])
    figures = [attrs["id"] for tag, attrs in page.elements if tag == "figure"]
    assert figures == [f"figure-{name}" for name in ("membership", "attacks", "latent", "lens")]
    labels = [attrs["aria-label"] or "" for _, attrs in page.elements if attrs.get("role") == "img"]
    assert len(labels) == 3 + 5 + 3 + 2
    curve = next(label for label in labels if "training on half of the forgotten" in label)
    assert "gold: from 0" in curve
    assert "unlearned: from 0" in curve
    assert all(len(label) > 40 for label in labels)
    ids = page.having("id")
    assert len(ids) == len(set(ids))


def test_worst_rows_are_numbers_and_lines(folders: dict[str, Path]) -> None:
    page = read(folders["failed"])
    assert "Still known: unlearned" in page.text
    assert "Lost: unlearned" in page.text
    rows = artifacts.read_pictures(artifacts.RunFolder(folders["failed"]))["worst"]["forget"]["models"]["unlearned"]
    assert len(rows) == single_rows.MOST
    shown = single.worst({"forget": {"models": {"unlearned": rows}, "side": "forget"}}, ["unlearned"])[0].lines
    assert [line[0] for line in shown] == [f"{row['row']:,}" for row in rows]
    assert [line[1] for line in shown] == [f"{row['row'] + 1:,}" for row in rows]


def test_the_audit_says_what_it_bounds(folders: dict[str, Path]) -> None:
    page = read(folders["passed"])
    assert "With 95 % confidence the privacy loss (epsilon) that remains of a canary is at least 0.610" in page.text
    assert "of 100 guesses which the model was trained on, 71 were right" in page.text
    assert "It proves one thing." in page.text
    assert single.audit({}) == single.Audit()


# --- hostile and broken folders -------------------------------------------------------------------------------------


def test_hostile_text_comes_out_as_text_in_every_new_field(tmp_path: Path) -> None:
    write_grown_run(tmp_path, OVER, hostile=True)
    page = read(tmp_path)
    text = (tmp_path / "report.html").read_text("utf-8")
    for bad in ("<svg onload", "</script", "\x1b", "\0", "\u202e", "<img"):
        assert bad not in text, bad
    assert "49" not in [word.strip() for word in page.words]
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    for part in ("verdict", "not-tested", "tests", "pictures", "audit"):
        section = text[text.index(f'<section id="{part}"') :].split("</section>")[0]
        assert SHOWN in Page(f"{section}</section>").text, part
    said = Page(text[text.index('<section id="tests"') :].split("</section>")[0] + "</section>").text
    for word in ("Memorisation savings", "probability of forgotten answers, model minus gold", "Passed holds"):
        assert word in said
    drawn = [d for d in page.having("aria-label") if SHOWN in d]
    assert len(drawn) > 5
    svg = "".join(part.split("</svg>")[0] for part in text.split("<svg")[1:])
    assert "onerror" not in svg  # names stand in the page, never in a drawing
    ids = page.having("id")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"outcome": HOSTILE, "headline": None, "tests": "text", "next": {}, "over": 3, "not_tested": []},
        {"outcome": "passed", "tests": [{}, None, "x", {"group": "kept", "estimate": "nan", "n": "many"}]},
        {"outcome": "failed", "tests": [one(outcome="failed", direction=HOSTILE, low=1e400, most=True)]},
        {"thresholds": {"level": "low", "require": []}, "tests": [one(group=HOSTILE)]},
    ],
)
def test_a_poor_verdict_does_not_break_the_page(tmp_path: Path, content: dict[str, Any]) -> None:
    run = write_fake_run(tmp_path)
    run.verdict.write_text(json.dumps(content), "utf-8")
    page = read(tmp_path)
    assert "What was not tested" in page.text
    assert "Other copies" in page.text


@pytest.mark.parametrize(
    "pictures",
    [
        {"attacks": []},
        {"attacks": {"relearn": {"budgets": ["0"], "models": {"gold": {"value": [None]}, "unlearned": {"value": []}}}}},
        {"attacks": {"x": {"budgets": [1, None], "models": {"gold": {"value": [0.1, None], "low": [0.1]}}}}},
        {"attacks": {"prompts": {"budget": "prompt", "budgets": ["\u4e2d$^"], "models": {"gold": {"value": [1.0]}}}}},
        {"latent_by_layer": {"layers": [1], "metrics": {"a": {"gold": [0.5]}, "b": None, "c": {"gold": ["x"]}}}},
        {"lens_by_layer": {"layers": ["$x$", None], "sides": {"forget": {"gold": [0.5, None]}}}},
        {"membership": {"edges": [0, 0], "models": {"gold": {"forget": [1], "never_seen": [1]}}}},
        {"worst": {"forget": {"models": {"unlearned": [None, {}, {"row": "x", "line": True, "value": "y"}]}}}},
    ],
)
def test_poor_pictures_do_not_break_the_page(tmp_path: Path, pictures: dict[str, Any]) -> None:
    run = write_fake_run(tmp_path)
    run.pictures.write_text(json.dumps(pictures), "utf-8")
    run.audit.write_text(json.dumps({"layers": [None, {"layer": "x"}], "epsilon": audit()["epsilon"]}), "utf-8")
    read(tmp_path)


def test_a_budget_may_be_a_sign_or_a_word_but_nothing_else() -> None:
    figure = attack_figures.attacks(
        {"adapter": {"budget": "scale", "budgets": ["-1"], "models": {"gold": {"value": [0.2]}}}}, []
    )
    assert figure is not None
    assert "\N{MINUS SIGN}1" in figure.panels[0].svg
    assert layer_figures.curves({"a": [1.0], "b": [1.0, 2.0], "c": [None]}, [1]) == {"a": [1.0]}


# --- single rows ----------------------------------------------------------------------------------------------------


def table(side: str, nll: list[float]) -> Table:
    n = len(nll)
    columns: dict[str, Any] = {"row": np.arange(n), "kind": np.zeros(n, np.int8), "mean_nll": np.array(nll, np.float64)}
    return Table(side, n, columns)


def test_membership_counts_every_row_once_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    drawn = {m: {s: rng.exponential(3, 37) for s in ("forget", "never_seen")} for m in ("gold", "unlearned")}
    tables = {m: {s: table(s, v.tolist()) for s, v in sides.items()} for m, sides in drawn.items()}
    found = single_rows.membership(tables)["membership"]
    edges = found["edges"]
    assert edges[0] == 0.0
    assert np.allclose(np.diff(edges), edges[1])
    for model, sides in drawn.items():
        for side, values in sides.items():
            counts = [0] * (len(edges) - 1)
            for value in values:
                place = 0
                while place < len(counts) - 1 and value >= edges[place + 1]:
                    place += 1
                counts[place] += 1
            assert found["models"][model][side] == counts
    assert single_rows.membership({"gold": {"forget": table("forget", [1.0])}}) == {}
    empty = {"forget": table("forget", []), "never_seen": table("never_seen", [1.0])}
    assert single_rows.membership({"gold": empty}) == {}


def test_worst_rows_are_those_a_loop_finds() -> None:
    rng = np.random.default_rng(1)
    nll = {m: {s: rng.exponential(1, 30) for s in ("forget", "untouched")} for m in ("original", "gold", "unlearned")}
    tables = {m: {s: table(s, v.tolist()) for s, v in sides.items()} for m, sides in nll.items()}
    found = single_rows.worst(tables, {"forget": list(range(101, 131))})["worst"]
    for name, side, beside, sign in (("forget", "forget", "gold", 1), ("kept", "untouched", "original", -1)):
        p, q = np.exp(-nll["unlearned"][side]), np.exp(-nll[beside][side])
        wanted = sorted(range(30), key=lambda i: -sign * (p[i] - q[i]))[: single_rows.MOST]
        rows = found[name]["models"]["unlearned"]
        assert [row["row"] for row in rows] == wanted
        assert [row["line"] for row in rows] == ([101 + i for i in wanted] if side == "forget" else [None] * 10)
        assert np.allclose([row["value"] for row in rows], p[wanted])
        assert np.allclose([row["beside"] for row in rows], q[wanted])
    alone = single_rows.worst({"unlearned": tables["unlearned"]}, {})["worst"]["forget"]["models"]["unlearned"]
    assert [row["row"] for row in alone] == np.argsort(nll["unlearned"]["forget"])[:10].tolist()
    assert {row["beside"] for row in alone} == {None}
    assert single_rows.worst({"gold": tables["gold"]}, {}) == {}
