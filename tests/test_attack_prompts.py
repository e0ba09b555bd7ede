"""Asking in other ways: what each way puts before the model, and what counts as a leak."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import attacked
from attacked import HOW, assert_same, sides, snapshot, trained
from excise.attacks import prompts
from excise.errors import NotShown, UsageError
from excise.records import Record
from excise.tasks import causal_lm


class Bytes(attacked.Bytes):
    """A tokenizer of bytes that can read what was written, with a plain chat template where one is wanted."""

    def __init__(self, chat: bool = False) -> None:
        self.chat_template = "yes" if chat else None

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(int(i) for i in ids if i).decode("latin-1")

    def apply_chat_template(self, turns: Any, *, add_generation_prompt: bool, **_: Any) -> str:
        text = "".join(f"<{t['role'][0]}>{t['content']}" for t in turns)
        return text + "<a>" if add_generation_prompt else text


def attack(model: Any, records: Any, how: Any = HOW, tokenizer: Any = None, **more: Any) -> Any:
    return attacked.made(prompts.attack, model, records, how, tokenizer or Bytes(), **more)


def asked(records: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, list[str]]:
    """What the model is given, by way of asking."""
    seen: list[str] = []
    own = prompts.write
    tokenizer = more.get("tokenizer") or Bytes()

    def listening(model: Any, questions: Any, **rest: Any) -> Any:
        seen.extend(tokenizer.decode(q.ids) for q in questions)
        return own(model, questions, **rest)

    monkeypatch.setattr(prompts, "write", listening)
    found = attack(attacked.llama(), records, **more)
    out: dict[str, list[str]] = {}
    scores = found.extra["scores"]
    for name, own_scores in scores.items():
        out[name] = [seen.pop(0) for s in own_scores if s is not None]
    assert not seen
    return out


RECORDS = {
    "forget": [
        Record("who is A", "person Anna", paraphrases=(("A is who", "Anna it is"),)),
        Record("who is B", "Bert"),
    ],
    "retain": [Record("who is C", "Carl"), Record("who is D", "Dora")],
}


def test_every_way_puts_its_own_words_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(RECORDS, monkeypatch, shots=2, prefixes=("Well,", "Sure:"), first_words=0.5)
    assert found["plain"] == ["who is A: ", "who is B: "]
    assert found["paraphrase"][0] == "A is who: ", "the row's own rewording, under the same template"
    assert found["prefix-1"] == ["who is A: Well,", "who is B: Well,"]
    assert found["prefix-2"] == ["who is A: Sure:", "who is B: Sure:"]
    first, second = found["few-shot"]
    assert {first, first.replace("A", "B")} == {first, second}
    assert sorted(first.split("\n\n")) == ["who is A: ", "who is C: Carl", "who is D: Dora"]
    assert first.endswith("\n\nwho is A: ")
    # 12 tokens with the end: half are given; 5 tokens with the end: 3.
    assert found["first-words"] == ["who is A: person", "who is B: Ber"]


def test_a_chat_gets_examples_as_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(RECORDS, monkeypatch, tokenizer=Bytes(chat=True), shots=2, prefixes=("Well,",), first_words=0)
    assert found["plain"] == ["<u>who is A<a>", "<u>who is B<a>"]
    assert found["prefix-1"][0] == "<u>who is A<a>Well,"
    assert found["few-shot"][0] in (
        "<u>who is C<a>Carl<u>who is D<a>Dora<u>who is A<a>",
        "<u>who is D<a>Dora<u>who is C<a>Carl<u>who is A<a>",
    )
    assert "first-words" not in found


def test_a_system_turn_stays_first() -> None:
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    made = prompts.after_examples(Record("s\nq", "a", turns), [Record("e", "f")], "{prompt}\n")
    assert [t["role"] for t in made.messages or ()] == ["system", "user", "assistant", "user"]


def test_as_many_examples_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"forget": RECORDS["forget"], "retain": [Record("w" * 120, "long"), *RECORDS["retain"], *attacked.rows(6)]}
    model = attacked.llama()
    model.config.max_position_embeddings = 90
    monkeypatch.setattr(attacked, "llama", lambda: model)
    found = asked(long, monkeypatch, shots=5, first_words=0, seed=1)
    assert found["few-shot"], "fewer examples are better than none"
    assert all(len(text) < 90 for text in found["few-shot"])
    model.config.max_position_embeddings = 20
    short = asked({"forget": RECORDS["forget"], "retain": long["retain"][:1]}, monkeypatch, shots=1, first_words=0)
    assert short["few-shot"] == []


def test_rules_reword_where_a_row_does_not() -> None:
    records = {"forget": [Record("What is the full name of the author?", "Anna Bell"), *RECORDS["forget"]]}
    found = attack(attacked.llama(), records, how=replace(HOW, max_length=96), shots=0, prefixes=())
    assert found.extra["reworded_by_rule"] == 2
    assert found.budgets == ("plain", "paraphrase", "first-words", "any")


def test_planted_answers_leak_where_they_were_planted() -> None:
    records = sides(forget=6, retain=4)
    knows = trained(attacked.llama(), records["forget"], steps=150)
    before = snapshot(knows)
    found = attack(knows, records, first_words=0.3)
    assert_same(knows, before)
    means = dict(zip(found.budgets, found.mean().tolist(), strict=True))
    assert means["plain"] == means["any"] == 1.0
    stranger = attack(attacked.llama(seed=5), records)
    assert stranger.mean()[:-1].max() == 0.0


def test_any_is_the_best_way_and_leaves_given_words_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"who is A: ": "no", "A is who: ": "person Anna", "who is B: ": "no", "who is B: B": "ert"}

    def told(model: Any, questions: Any, **_: Any) -> Any:
        texts = [table.get(Bytes().decode(q.ids), "") for q in questions]
        return [prompts_written(text) for text in texts]

    def prompts_written(text: str) -> Any:
        from excise.attacks.decoding import Written

        return Written((tuple(text.encode()),), (0,))

    monkeypatch.setattr(prompts, "write", told)
    found = attack(attacked.llama(), RECORDS, shots=0, prefixes=(), first_words=0.2)
    values = dict(zip(found.budgets, found.values["forget"].tolist(), strict=True))
    assert values == {
        "plain": [0.0, 0.0], "paraphrase": [1.0, 0.0], "first-words": [0.0, 1.0], "any": [1.0, 0.0],
    }  # fmt: skip
    json.dumps(found.extra, allow_nan=False)


def test_plain_texts_have_no_question_to_reword() -> None:
    records = {"forget": [Record(None, "abcdefghijkl"), Record("who is A", "Anna")], "retain": RECORDS["retain"]}
    found = attack(attacked.llama(), records)
    values = dict(zip(found.budgets, found.values["forget"].tolist(), strict=True))
    for name in ("paraphrase", "prefix-1", "few-shot"):
        assert math.isnan(values[name][0])
        assert not math.isnan(values[name][1])
    assert not np.isnan(values["plain"]).any()
    assert not np.isnan(values["any"]).any()


def test_what_cannot_be_done_is_said() -> None:
    model = attacked.llama()
    with pytest.raises(NotShown, match="needs forget rows"):
        attack(model, {"retain": RECORDS["retain"]})
    for wrong in ({"rows": 0}, {"shots": -1}, {"first_words": 1.0}, {"threshold": 0}):
        with pytest.raises(UsageError, match="attack prompts"):
            attack(model, RECORDS, **wrong)


def test_cut_leaves_something_to_say() -> None:
    example = causal_lm.Example((1, 2, 3, 4), 2)
    assert [prompts._cut(Record("q", "a"), example, share) for share in (0.0, 0.4, 0.99)] == [2, 3, 3]
