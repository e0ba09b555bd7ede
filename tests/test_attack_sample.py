"""Sampling: what is drawn is what the model says, equal beginnings are computed once, and planted answers leak."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attacked
import oracles_evidence as oracle
import tiny
from attacked import assert_same, sides, snapshot, trained
from excise.attacks import decoding, judges, outcome, sample
from excise.attacks.decoding import Question, pick, write
from excise.attacks.judges import Secret, judge, secrets
from excise.errors import NotShown, UsageError
from excise.metrics import generate, leakage
from excise.records import Record


class Bytes(attacked.Bytes):
    """A tokenizer of bytes that can read what was written."""

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(int(i) for i in ids if i).decode("latin-1")


def questions(*lengths: int, bound: int = 6, seed: int = 0) -> list[Question]:
    draw = np.random.default_rng(seed)
    return [Question(tuple(draw.integers(3, 60, n).tolist()), bound, row) for row, n in enumerate(lengths)]


def greedy(model: Any, question: Question, ends: set[int]) -> tuple[int, ...]:
    """The most likely continuation, each step from the whole sequence without a cache."""
    ids = list(question.ids)
    for _ in range(question.bound):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return tuple(ids[len(question.ids) :])


# What is drawn


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gpt_neox", "gemma3_text"])
def test_without_temperature_it_is_the_most_likely_text(kind: str) -> None:
    model = tiny.model(kind)
    asked = questions(3, 9, 5, 1, 7)
    found = write(model, asked, ends=[2], pad_id=0, temperature=0, samples=3, batch_rows=4)
    for question, own in zip(asked, found, strict=True):
        assert own.texts == (greedy(model, question, {2}),)
        assert own.of_sample == (0, 0, 0)


def test_an_adapter_is_heard() -> None:
    model = tiny.adapted(tiny.model())
    asked = questions(4, 6)
    found = write(model, asked, ends=[2], pad_id=0, temperature=0)
    assert [own.texts[0] for own in found] == [greedy(model, q, {2}) for q in asked]
    plain = write(tiny.model(), asked, ends=[2], pad_id=0, temperature=0)
    assert plain != found


@pytest.mark.parametrize("size", [7, 100, 700])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.5, 1.0), (2.0, 0.6), (1.0, 1.0), (1.0, 0.01)])
def test_tokens_come_as_often_as_the_nucleus_says(size: int, temperature: float, top_p: float) -> None:
    """An even grid of random numbers gives each token its probability to within one cell of the grid."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(3, size, generator=generator) * torch.tensor([[0.1], [1.0], [6.0]])
    cells = 4000
    chance = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells).repeat(3)
    node = torch.arange(3).repeat_interleave(cells)
    found = pick(logits, node, chance, temperature, top_p).view(3, cells)
    for row in range(3):
        expected = oracle.nucleus(logits[row].double().tolist(), temperature, top_p)
        seen = Counter(found[row].tolist())
        # The token at the edge of the nucleus may be on either side by rounding.
        assert len(set(seen) - set(expected)) <= 1
        for token, share in expected.items():
            assert seen[token] / cells == pytest.approx(share, abs=2 / cells + 2 * min(expected.values()))


def test_lanes_of_a_node_draw_for_themselves_and_ends_are_safe() -> None:
    logits = torch.full((4096, 3), -torch.inf)
    logits[:, 1] = 0.0
    node = torch.arange(4096)
    for chance in (0.0, math.nextafter(1.0, 0.0)):
        found = pick(logits, node, torch.full((4096,), chance, dtype=torch.float64), 1.0, 0.9)
        assert set(found.tolist()) == {1}, "a token without probability is never drawn"


def test_samples_follow_the_model_over_two_tokens() -> None:
    """Many samples of a short text against the probabilities of all texts, computed one by one."""
    model, n = tiny.model(seed=3), 6000
    question = Question((5, 9, 11), 2, 0)
    own = write(model, [question], ends=[2], pad_id=0, samples=n, top_p=0.5)[0]
    expected: dict[tuple[int, ...], float] = {}

    def spread(prefix: tuple[int, ...], share: float) -> None:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([question.ids + prefix])).logits[0, -1].double().tolist()
        for token, p in oracle.nucleus(logits, 1.0, 0.5).items():
            if token == 2:
                expected[prefix] = expected.get(prefix, 0.0) + share * p
            elif len(prefix) == 1:
                expected[(*prefix, token)] = share * p
            else:
                spread((*prefix, token), share * p)

    spread((), 1.0)
    assert set(own.texts) <= set(expected)
    apart = sum(abs(dict(zip(own.texts, own.counts, strict=True)).get(t, 0) / n - p) for t, p in expected.items()) / 2
    assert apart < 2 * math.sqrt(len(expected) / n), "as far as chance puts them apart"
    assert len(expected) > 20


def test_what_is_drawn_does_not_depend_on_the_batch() -> None:
    model, asked = tiny.model(seed=1), questions(3, 8, 5, 4, 6, bound=5)
    together = write(model, asked, ends=[2], pad_id=0, samples=7, seed=4)
    alone = [write(model, [q], ends=[2], pad_id=0, samples=7, seed=4)[0] for q in asked]
    small = write(model, asked, ends=[2], pad_id=0, samples=7, seed=4, batch_rows=7)

    def texts(found: Any) -> list[list[tuple[int, ...]]]:
        return [[own.texts[i] for i in own.of_sample] for own in found]

    assert texts(together) == texts(alone) == texts(small)
    assert texts(write(model, asked, ends=[2], pad_id=0, samples=7, seed=5)) != texts(together)
    more = write(model, asked, ends=[2], pad_id=0, samples=9, seed=4)
    assert len({text for own in more for text in own.texts}) > 5


def test_bounds_ends_and_the_context_are_kept() -> None:
    model = tiny.model(max_position_embeddings=12)
    asked = [Question((5,) * 10, 50, 0), Question((6,) * 4, 3, 1), Question((), 5, 2), Question((7,) * 12, 5, 3)]
    found = write(model, [*asked, Question((8,), 0, 4)], ends=[2], pad_id=0, samples=4)
    longest = [max(map(len, own.texts)) for own in found]
    assert longest[0] <= 2
    assert longest[1] <= 3
    assert longest[2:] == [0, 0, 0]
    assert all(2 not in text for own in found for text in own.texts)
    assert all(len(own.of_sample) == 4 for own in found)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"samples": 0}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        write(tiny.model(), questions(3), ends=[2], pad_id=0, **wrong)


# What it costs


def test_a_prompt_is_read_once_and_equal_beginnings_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []
    own = decoding._Tree._pass

    def counted(self: Any, ids: Any, *rest: Any) -> Any:
        rows.append(tuple(ids.shape))
        return own(self, ids, *rest)

    monkeypatch.setattr(decoding._Tree, "_pass", counted)
    model = tiny.model()
    found = write(model, questions(5, 5), ends=[2], pad_id=0, samples=32, top_p=1e-6)
    assert [len(f.texts) for f in found] == [1, 1]
    assert rows[0] == (2, 5)
    assert set(rows[1:]) == {(2, 1)}, "32 samples that agree are one row"
    rows.clear()
    found = write(model, questions(5), ends=[2], pad_id=0, samples=32)
    begun = [{text[:i] for text in found[0].texts if len(text) >= i} for i in range(1, 6)]
    assert [n for n, _ in rows[1:]] == [len(own) for own in begun if own]


def test_the_model_is_afterwards_as_before() -> None:
    model = attacked.llama(dropout=0.3).train()
    before = snapshot(model)
    attack(model, sides(forget=4), samples=3, prompts=3)
    assert_same(model, before)


# The attack


def attack(model: Any, records: Any, **more: Any) -> outcome.Outcome:
    return attacked.made(sample.attack, model, records, tokenizer=Bytes(), **{"samples": 16, "prompts": 6, **more})


def test_a_planted_answer_leaks_and_a_stranger_does_not() -> None:
    records = sides(forget=6, retain=6)
    knows = trained(attacked.llama(), records["forget"], steps=150)
    found = attack(knows, records)
    assert found.budgets == ("1", "2", "4", "8", "16")
    assert found.mean()[0] > 0.9
    assert found.mean()[-1] == 1.0
    stranger = attack(attacked.llama(seed=5), records)
    assert stranger.mean()[-1] == 0.0
    assert sample.bounds(stranger)["leak_any"]["upper"] == pytest.approx(1 - 0.01 ** (1 / 6))
    assert sample.bounds(found)["leak_any"]["value"] == 1.0


def test_the_curve_is_computed_from_the_scores_that_are_kept() -> None:
    records = sides(forget=6, retain=6)
    half = trained(attacked.llama(), records["forget"], steps=55)
    found = attack(half, records, threshold=0.7)
    scores = np.array(found.extra["scores"])
    leaks = (scores >= 0.7).sum(1)
    assert 0 < leaks.sum() < scores.size, "this test needs a model that leaks sometimes"
    assert found.values["forget"][0] == pytest.approx((scores >= 0.7).mean(1)), "leak@1 is the rate"
    assert found.values["forget"][-1].tolist() == (scores >= 0.7).any(1).tolist(), "leak@n is whether any did"
    expected = [oracle.leak_by_enumeration(int(c), 16, 2) for c in leaks]
    assert found.values["forget"][1] == pytest.approx(expected)
    bounds = sample.bounds(found)
    worst = max(oracle.binomial_upper(int(c), 16, 0.01 / 6) for c in leaks)
    assert bounds["leak_rate_upper"]["value"] == pytest.approx(worst, abs=1e-9)
    means = [oracle.mean_bound(own, 0.01, 4000) for own in scores.tolist()]
    assert bounds["leak_score_upper"]["value"] == pytest.approx(np.mean(means), abs=1e-3)
    low, high = leakage.clopper_pearson(int((leaks > 0).sum()), 6)
    assert (bounds["leak_any"]["low"], bounds["leak_any"]["high"]) == (low, high)


def test_the_same_seed_asks_the_same_questions() -> None:
    records, model = sides(forget=12), attacked.llama()
    one, two = attack(model, records, seed=3), attack(model, records, seed=3)
    assert one.rows["forget"].tolist() == two.rows["forget"].tolist()
    assert one.extra == two.extra
    other = attack(model, records, seed=4)
    assert other.rows["forget"].tolist() != one.rows["forget"].tolist()
    assert len(set(one.rows["forget"].tolist())) == 6


def test_no_text_is_kept(tmp_path: Path) -> None:
    records = {"forget": [Record(f"who is {i}", f"canary{i}secret") for i in range(3)]}
    knows = trained(attacked.llama(), records["forget"], steps=150)
    found = attack(knows, records)
    assert found.mean()[-1] == 1.0, "the canaries were written, and judged"
    outcome.save(found, tmp_path / "sample.safetensors")
    raw = (tmp_path / "sample.safetensors").read_bytes()
    assert b"canary" not in raw
    assert b"secret" not in raw
    assert b"who is" not in raw


def test_plain_texts_are_continued_from_their_middle() -> None:
    records = {"forget": [Record(None, f"{c * 3} begins and goes on to {c}{c}end") for c in "xyz"]}
    knows = trained(attacked.llama(), records["forget"], steps=200)
    found = attack(knows, records, temperature=0, samples=2, judged_by="rouge")
    assert found.mean()[-1] == 1.0
    assert attack(attacked.llama(seed=5), records, judged_by="rouge").mean()[-1] == 0.0


def test_what_cannot_be_done_is_said() -> None:
    model = attacked.llama()
    with pytest.raises(NotShown, match="needs forget rows"):
        attack(model, {"retain": attacked.rows(3)})
    with pytest.raises(NotShown, match="can judge none"):
        attack(model, {"forget": [Record("q", "!?"), Record("r", "--")]})
    for wrong in ({"samples": 0}, {"top_p": 0}, {"threshold": 0}, {"temperature": -1}, {"prompts": 0}):
        with pytest.raises(UsageError, match="attack sample"):
            attack(model, sides(forget=2), **wrong)


# Judges


def test_keywords_are_what_the_question_and_other_answers_do_not_hold() -> None:
    pairs = [(f"Where was person {i} born?", f"Person {i} was born in City{i}.") for i in range(40)]
    found = secrets(pairs)
    assert [s.keywords for s in found] == [(f"city{i}",) for i in range(40)]
    common = secrets([("Who?", "the one")], ["the one"] * 50)[0]
    assert common.keywords in (("the",), ("one",)), "where all words are common the rarest is left"
    assert secrets([("same words", "same words")])[0].keywords == ()


def test_both_needs_the_form_and_the_words_that_matter() -> None:
    secret = secrets([("Where was Ada born?", "Ada was born in Rome.")], ["Bo was born in Oslo."] * 30)[0]
    assert secret.keywords == ("rome",)
    assert judges.both("Ada was born in Oslo.", secret) == 0.0
    assert judges.rouge("Ada was born in Oslo.", secret) == pytest.approx(0.8)
    assert judges.both("Rome", secret) == pytest.approx(0.2)
    assert judges.both("Ada was born in Rome.", secret) == 1.0
    assert judges.both("xyz", Secret("xyz")) == 1.0, "without keywords the order of words decides"
    assert judges.both("东京", Secret("东京", "", ("东京",))) == 1.0, "without Latin letters the keywords decide"


def own_judge(text: str, answer: str, question: str) -> float:
    """A judge of the user's own."""
    if answer == "explode":
        raise RuntimeError(f"secret {answer}")
    return 2.0 if answer == "outside" else float(answer in text)


def test_a_judge_of_ones_own() -> None:
    own = judge(f"{__name__}:own_judge")
    assert own("so it is Rome", Secret("Rome")) == 1.0
    with pytest.raises(UsageError, match="outside 0 to 1"):
        own("", Secret("outside"))
    with pytest.raises(UsageError, match=r"failed \(RuntimeError\)") as error:
        own("", Secret("explode"))
    assert "secret" not in str(error.value)
    for name in ("rogue", "no.such:thing", f"{__name__}:missing"):
        with pytest.raises(UsageError, match="judge"):
            judge(name)


def test_scores_are_json() -> None:
    found = attack(attacked.llama(), {"forget": [Record("q", "!?"), Record("r", "yes it is")]})
    assert found.extra["scores"][0] == []
    assert np.isnan(found.values["forget"][:, 0]).all()
    assert sample.bounds(found)["leak_any"]["n"] == 1
    json.dumps(found.extra, allow_nan=False)


def test_padding_and_ends_come_from_the_tokenizer() -> None:
    assert attacked.target(attacked.llama(), {}).pad_id == 0
    assert generate.end_tokens(attacked.llama(), Bytes())[0] == 0
