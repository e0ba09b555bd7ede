"""The report of a classifier: the gold decides both ways, nothing runs, every picture has words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import excise.reporting
from excise.artifacts import Number, Results
from excise.commands.measuring.findings import findings
from excise.metrics.class_catalogue import CATALOGUES
from excise.reporting import numbers
from excise.reporting.class_checks import CLASS_CHECKS
from excise.reporting.verdict import Statement, Verdict, judge
from fake_tagged_run import HOSTILE, write_fake_tagged_run
from test_report import Page

TASK = "token_classification"


def built(folder: Path, **options: Any) -> Page:
    return Page(excise.reporting.build(write_fake_tagged_run(folder, **options).root).read_text("utf-8"))


def fake_verdict(task: str = TASK, **values: float | None) -> tuple[Verdict, dict[str, Statement]]:
    score = "f1" if task == TASK else "accuracy"
    gold = {
        f"forget_{score}": 0.53, f"retain_{score}": 0.93, f"untouched_{score}": 0.92, f"test_{score}": 0.42,
        "entity_membership_auc": 0.43, "membership_auc": 0.45, "privleak": 0.0, "latent_membership_auc": 0.52,
        "relearned_probability": 0.6, "same_class_neighbours": 0.6,
    }  # fmt: skip
    found = gold | {k.replace("SCORE", score): v for k, v in values.items()}
    numbers_ = {
        "gold": {k: Number(v, n=60) for k, v in gold.items()},
        "unlearned": {k: Number(v, n=60) for k, v in found.items()},
        "original": {
            f"forget_{score}": Number(0.94),
            f"retain_{score}": Number(0.93),
            f"untouched_{score}": Number(0.92),
        },
    }
    for side, half in (("forget", 0.02), ("test", 0.01)):
        mine, target = found.get(f"{side}_{score}"), gold[f"{side}_{score}"]
        if mine is not None:
            gap = mine - target
            numbers_["unlearned"][f"{side}_{score}_gap"] = Number(gap, gap - half, gap + half, 60, {"level": 0.9})
    if task == TASK:
        for model in ("gold", "unlearned"):
            numbers_[model]["forget_outside_accuracy"] = Number(0.98, 0.97, 0.99, 60)
    verdict = judge(Results(numbers_, {}, task), "unlearned")
    return verdict, {s.key: s for s in verdict.statements}


@pytest.mark.parametrize("task", list(CLASS_CHECKS))
def test_a_model_like_the_gold_passes_every_check(task: str) -> None:
    verdict, found = fake_verdict(task)
    assert {s.kind for s in found.values()} == {"like"}
    assert verdict.headline.endswith("No test made here found a trace of the records beyond the gold's.")


@pytest.mark.parametrize("task", list(CLASS_CHECKS))
@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("answers", {"forget_SCORE": 0.60}, "short"),
        ("answers", {"forget_SCORE": 0.555}, "like"),
        ("answers", {"forget_SCORE": 0.30}, "over"),
        ("answers", {"forget_SCORE": 0.0}, "over"),
        ("answers", {"forget_SCORE": None}, "unknown"),
        ("kept", {"retain_SCORE": 0.90}, "harm"),
        ("kept", {"untouched_SCORE": 0.80}, "harm"),
        ("kept", {"retain_SCORE": 0.92}, "like"),
        ("general", {"test_SCORE": 0.38}, "harm"),
        ("general", {"test_SCORE": 0.50}, "like"),
        ("general", {"test_SCORE": None}, "unknown"),
        ("past", {"forget_SCORE": 0.30}, "over"),
        ("past", {"privleak": 35.0}, "over"),
        ("membership", {"privleak": 35.0}, "over"),
        ("membership", {"privleak": -35.0}, "short"),
        ("inside", {"latent_membership_auc": 0.8}, "short"),
        ("relearned", {"relearned_probability": 0.7}, "short"),
        ("relearned", {"relearned_probability": 0.4}, "over"),
        ("alike", {"same_class_neighbours": 0.9}, "short"),
        ("alike", {"same_class_neighbours": 0.3}, "over"),
        ("alike", {"same_class_neighbours": None}, "unknown"),
    ],
)
def test_each_check_looks_both_ways(task: str, key: str, values: dict[str, float | None], kind: str) -> None:
    _, found = fake_verdict(task, **values)
    assert found[key].kind == kind
    assert "gold" in found[key].text or kind == "unknown"


def test_a_lower_score_than_the_golds_is_no_success() -> None:
    verdict, _ = fake_verdict(forget_f1=0.1)
    assert "worse than one that never saw them" in verdict.headline
    assert "went too far" in verdict.headline


def test_rows_that_lie_too_far_off_are_not_called_avoided() -> None:
    verdict, found = fake_verdict(same_class_neighbours=0.3)
    assert found["past"].kind == "like"
    assert "too far inside" in verdict.headline
    assert "avoids" not in verdict.headline


def test_a_wide_interval_is_not_told_apart_and_says_how_few_rows() -> None:
    results = Results(
        {
            "gold": {"forget_f1": Number(0.5)},
            "unlearned": {"forget_f1": Number(0.6), "forget_f1_gap": Number(0.1, -0.05, 0.2, 17)},
        },
        {},
        TASK,
    )
    found = next(s for s in judge(results, "unlearned").statements if s.key == "answers")
    assert found.kind == "like"
    assert "With 17 rows a gap of this size can be chance." in found.text


def test_the_page_is_whole_and_every_figure_has_words(tmp_path: Path) -> None:
    page = built(tmp_path)
    figures = [attrs["id"] for tag, attrs in page.elements if tag == "figure"]
    assert figures == [
        f"figure-{n}" for n in ("scores", "gaps", "classes", "membership", "relearning", "map", "losses")
    ]
    drawings = [attrs["aria-label"] or "" for _, attrs in page.elements if attrs.get("role") == "img"]
    assert len(drawings) == 6 + 2 + 4 + 4 + 1 + 4 + 3
    assert all(len(words) > 40 for words in drawings)
    ids = page.having("id")
    assert len(ids) == len(set(ids))
    for words in ("is better", "erased", "gdpr", "answers that it was asked", "forget quality", "truth ratio"):
        assert words not in page.text.lower(), words
    assert "deepcut: anchors without contrast" in page.text
    assert "F1 of entities on forgotten rows: creative-work" in page.text


def test_hostile_names_come_out_as_text(tmp_path: Path) -> None:
    text = excise.reporting.build(write_fake_tagged_run(tmp_path, hostile=HOSTILE).root).read_text("utf-8")
    page = Page(text)
    assert "<svg onload" not in text
    assert "</script" not in text
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\0", "\\x00").replace("\u202e", "\\u202e")
    for part in ("numbers", "pictures", "findings", "not-tested"):
        section = text[text.index(f'<section id="{part}"') :].split("</section>")[0]
        assert shown in Page(f"{section}</section>").text, part
    assert not [v for v in page.having("style") if re.search(r"https?:|@import|expression", v)]


@pytest.mark.parametrize(
    "pictures",
    [
        {
            "classes": {"models": {"gold": {"forget": [[None, 1.0]]}}},
            "membership": {"edges": [1], "models": {"gold": []}},
        },
        {"classes": [], "membership": {"edges": [0.1, 1.0, 10.0], "models": {"gold": {"forget": [1]}}}},
        {"classes": {"models": {"gold": {"forget": [[0.1, 0.2]]}}}, "membership": None, "map": None},
        {"membership": {"edges": [0.1, 1.0], "models": {"gold": {"forget": [0], "never_seen": [4]}}}},
    ],
)
def test_poor_pictures_do_not_break_the_page(tmp_path: Path, pictures: dict[str, Any]) -> None:
    run = write_fake_tagged_run(tmp_path)
    run.pictures.write_text(json.dumps(pictures), "utf-8")
    Page(excise.reporting.build(tmp_path).read_text("utf-8"))


def test_without_a_gold_no_gap_is_drawn(tmp_path: Path) -> None:
    page = built(tmp_path, gold=False)
    assert "This run has no gold" in page.text
    assert "figure-gaps" not in page.having("id")
    assert "Only a gold says what it would be" in page.text


def test_rows_and_checks_are_of_the_catalogue() -> None:
    for task, checks in CLASS_CHECKS.items():
        assert {check.metric for check in checks} <= CATALOGUES[task].keys()
        assert set(numbers.key_numbers(task)) <= CATALOGUES[task].keys()
        results = Results({m: {k: Number(0.5) for k in CATALOGUES[task]} for m in ("unlearned", "gold")}, {}, task)
        rows = [*numbers.key_rows(results), *(row for group in numbers.groups(results) for row in group.rows)]
        assert sorted(row.name for row in rows) == sorted(CATALOGUES[task])
        assert numbers.missing(results) == {}


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(0.99, 1.0, "short"), (0.97, 0.99, "like"), (0.9, 0.95, "over"), (None, None, "unknown")]
)
def test_words_outside_of_entities_are_held_against_the_gold(low: float | None, high: float | None, kind: str) -> None:
    """Who is never wrong about them has seen them, who is wrong too often shuns them; judged by intervals apart."""
    value = None if low is None or high is None else (low + high) / 2
    like = {k: Number(0.5, low=0.4, high=0.6) for k in CATALOGUES["token_classification"]} | {"privleak": Number(0.0)}
    like |= {k: Number(0.0, low=-0.01, high=0.01) for k in like if k.endswith("_gap")}
    models = {
        "unlearned": {**like, "forget_outside_accuracy": Number(value, low=low, high=high)},
        "gold": {**like, "forget_outside_accuracy": Number(0.978, low=0.966, high=0.988)}, "original": like,
    }  # fmt: skip
    verdict = judge(Results(models, {}, "token_classification"), "unlearned")
    found = next(s for s in verdict.statements if s.key == "outside")
    assert found.kind == kind
    assert ("Traces of the records remain" in verdict.headline) is (kind == "short")
    assert ("went too far" in verdict.headline) is (kind == "over")
    assert kind == "unknown" or "by the gold" in found.text


# --- findings -------------------------------------------------------------------------------------------------------


def contrast(**monitor: float) -> dict[str, Any]:
    return {"step": 1, "monitor": {f"deepcut/{k}": v for k, v in monitor.items()}}


def test_empty_contrast_is_counted() -> None:
    log = [
        contrast(anchors=4, skipped=1, without_same=0.5, without_other=0.25), contrast(anchors=0, skipped=0),
        contrast(anchors=6, skipped=2, without_same=0.0, without_other=0.0),
    ]  # fmt: skip
    found = next(f for f in findings({}, log) if f["code"] == "empty_contrast")
    assert found["severity"] == "warning"
    for words in (
        "Of 10 anchors",
        "3 had no contrast",
        "20% had no kept label",
        "10% none",
        "1 logged steps had no anchor",
    ):
        assert words in found["detail"]
    fine = next(f for f in findings({}, [contrast(anchors=40, skipped=0)]) if f["code"] == "empty_contrast")
    assert (fine["severity"], fine["advice"]) == ("note", "")
    assert [f["code"] for f in findings({}, [contrast(anchors=0, skipped=0)])] == ["no_anchor"]
    assert findings({}, [{"step": 1, "monitor": {"clreg/saturated_share": 0.1}}]) == []


def test_entities_less_likely_than_unseen_ones_are_a_finding() -> None:
    own = {"unlearned": {"entity_membership_auc": {"value": 0.2}}, "gold": {"entity_membership_auc": {"value": 0.43}}}
    found = findings(own, [])
    assert [f["code"] for f in found] == ["over_unlearned"]
    assert found[0]["detail"].startswith("The entities of forgotten rows are less likely")
    own["unlearned"] = {"entity_membership_auc": {"value": 0.42}}
    assert findings(own, []) == []
