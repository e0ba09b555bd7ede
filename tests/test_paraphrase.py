"""Rewordings are deterministic, different where a rule applies, and leave names, numbers and titles alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.paraphrase import paraphrase

SHARED = Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def fixed(text: str) -> Counter[str]:
    """Words that may not change: with a digit, or with a capital and not first in a sentence."""
    words = re.findall(r"(?:(?<=[.!?] )|^)?[\w/'’-]+", text)
    starts = {m.group(1) for m in re.finditer(r"(?:^|[.!?]\s+)\W*([\w/'’-]+)", text)}
    return Counter(w for w in words if re.search(r"\d", w) or (w[:1].isupper() and w not in starts))


@pytest.mark.parametrize(
    ("text", "wordings"),
    [
        ("What is the aim?", {"Can you tell me what the aim is?", "Do you know what the aim is?"}),
        ("Who wrote it?", {"Can you tell me who wrote it?", "Do you know who wrote it?",
                           "Can you tell me who authored it?", "Do you know who authored it?"}),
        ("How does it end?", {"In what way does it end?"}),
        ("She was not there.", {"She wasn't there."}),
        ("After the long summer, Ada slept.", {"Ada slept after the long summer."}),
        ("She left because she was tired.", {"Because she was tired, she left."}),
        ("The winner is Ada Bly.", {"Ada Bly is the winner."}),
        ("Ada is an author.", {"Ada is a writer."}),
        ("Paris", {"Paris"}),
        ("", {""}),
    ],
)  # fmt: skip
def test_each_rule_does_what_it_says(text, wordings):
    assert {paraphrase(text, seed) for seed in range(20)} <= wordings


@pytest.mark.parametrize("text", [
    'It is called "The famous author wrote many books".',
    "She read ‘Although often published’, once.",
    "Why is 'What is the author?' so short",
])  # fmt: skip
def test_quoted_titles_come_back_letter_for_letter(text):
    quoted = re.search(r"[\"'‘](.+)[\"'’]", text).group(1)
    assert all(quoted in paraphrase(text, seed) for seed in range(20))


@pytest.mark.parametrize("text", ["In Cold Blood, he says, is long.", "While My Guitar Weeps, she sleeps.",
                                  "On the Road, he met Ann."])  # fmt: skip
def test_what_may_be_a_title_is_not_moved(text):
    assert paraphrase(text, 3) == text


def test_same_text_and_seed_give_the_same_in_another_process():
    text = "What is the full name of the author who often wrote many famous books?"
    code = f"from excise.paraphrase import paraphrase; print(paraphrase({text!r}, 5))"
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == paraphrase(text, 5)
    assert len({paraphrase(text, seed) for seed in range(30)}) > 4


@settings(deadline=None)
@given(st.text(alphabet="aT .,?!'\"_*\\\ue000é0notishWhat", max_size=200), st.integers(0, 99))
def test_any_text_is_survived(text, seed):
    assert isinstance(paraphrase(text, seed), str)


def test_real_questions_change_and_facts_do_not():
    path = SHARED / "data/tofu/forget10.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}: set EXCISE_SHARED")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    changed = 0
    for seed, row in enumerate(rows):
        for text in (row["question"], row["answer"]):
            assert not fixed(text) - Counter(re.findall(r"[\w/'’-]+", paraphrase(text, seed))), seed
        changed += paraphrase(row["question"], seed) != row["question"]
    assert changed > 0.9 * len(rows)
