"""The synthetic world: same seed same rows, sides apart, facts that neither a template nor another fact gives away."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from excise import world as world_module
from excise.errors import UsageError
from excise.models import new_tokenizer as tokenizer
from excise.world import FACTS, FALSE_ANSWERS, POOLS, SIDES, World, corpus, world, write


@pytest.fixture(scope="module")
def made() -> World:
    return world()


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def coined(answer: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]\w+", answer))


def every_row(made: World) -> list[dict]:
    return [row for rows in made.sides().values() for row in rows]


def wording_of(question: str) -> tuple[str, int]:
    for fact, wordings in FACTS.items():
        for number, (asked, _) in enumerate(wordings):
            before, after = asked.split("{name}")
            if question.startswith(before) and question.endswith(after):
                return fact, number
    raise AssertionError("a question without a wording")


def test_default_sizes(made: World) -> None:
    assert tuple(made.sides()) == SIDES
    assert {side: len(rows) for side, rows in made.sides().items()} == {
        "forget": 60,
        "retain": 360,
        "untouched": 100,
        "never_seen": 60,
        "stopping": 40,
    }


def test_a_seed_gives_one_world_in_every_process(made: World) -> None:
    code = "import json; from excise.world import world; print(json.dumps(world().sides()))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(world_module.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == made.sides()
    assert world(seed=1).forget[0]["question"] != made.forget[0]["question"]


def test_people_stand_on_one_side_only(made: World) -> None:
    seen: set[str] = set()
    for rows in made.sides().values():
        groups = {row["group"] for row in rows}
        assert not groups & seen
        seen |= groups
        assert set(Counter(row["group"] for row in rows).values()) == {len(FACTS)}
    questions = [row["question"] for row in every_row(made)]
    assert len(set(questions)) == len(questions)


def test_rows_have_the_fields_of_the_reader(made: World) -> None:
    for row in every_row(made):
        assert set(row) == {
            "question",
            "answer",
            "paraphrased_question",
            "paraphrased_answer",
            "false_answers",
            "group",
        }
        texts = [row["question"], row["answer"], row["paraphrased_question"], row["paraphrased_answer"]]
        texts += row["false_answers"]
        assert all(text and text == text.strip() and "{" not in text for text in texts)
        assert row["paraphrased_question"] != row["question"]
        assert row["paraphrased_answer"] != row["answer"]
        assert len(set(row["false_answers"])) == FALSE_ANSWERS >= 3


def test_wordings_of_a_fact_hold_the_same_values_in_the_same_order() -> None:
    for wordings in FACTS.values():
        assert len({tuple(re.findall(r"{(\w+)}", answer)) for _, answer in wordings}) == 1
        assert len({question for question, _ in wordings}) == len(wordings) >= 2
        assert all(question.count("{name}") == 1 for question, _ in wordings)


def test_paraphrase_keeps_every_value_and_a_false_answer_changes_every_value(made: World) -> None:
    for row in every_row(made):
        fact, number = wording_of(row["question"])
        again_fact, again = wording_of(row["paraphrased_question"])
        assert again_fact == fact
        carriers = [re.sub(r"{\w+}", "([A-Za-z]+)", FACTS[fact][n][1]) for n in (number, again)]
        truth = re.fullmatch(carriers[0], row["answer"])
        retold = re.fullmatch(carriers[1], row["paraphrased_answer"])
        assert truth is not None
        assert retold is not None
        assert truth.groups() == retold.groups()
        for false in row["false_answers"]:
            lie = re.fullmatch(carriers[1], false)
            assert lie is not None
            assert all(a != b for a, b in zip(truth.groups(), lie.groups(), strict=True))


def test_every_fact_has_a_large_space_of_values() -> None:
    coins = len(world_module._ONSETS) ** 2 * len(world_module._VOWELS) ** 2 * len(world_module._CODAS)
    for wordings in FACTS.values():
        slots = [slot.rstrip("0123456789") for slot in re.findall(r"{(\w+)}", wordings[0][1])]
        assert math.prod(coins if slot == "coin" else len(POOLS[slot]) for slot in slots) > 1e6
    for pool in POOLS.values():
        assert len(set(pool)) == len(pool) >= 34
        assert not any(word[0] in "aeiou" for word in pool)  # "a" before a value tells nothing about it


def test_no_fact_gives_another_away(made: World) -> None:
    tellers: dict[str, set[int]] = defaultdict(set)
    for index, row in enumerate(every_row(made)):
        name = re.findall(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b", row["question"].split(" ", 1)[1])
        for word in coined(row["answer"]) | {part for full in name for part in full.split()}:
            tellers[word].add(index if word in coined(row["answer"]) else -1 - int(row["group"].split("-")[1]))
    # A coined word belongs to one answer, or to the name of one person, and never to both.
    assert all(len(places) == 1 for places in tellers.values())
    pool = set().union(*POOLS.values())
    # A pool word that occurs in two answers of one person does so by chance: independent draws, compared across people.
    by_person = defaultdict(list)
    for row in every_row(made):
        by_person[row["group"]].append(set(words(row["answer"])) & pool)
    people = list(by_person.values())

    def shared(first: list[set[str]], second: list[set[str]]) -> int:
        return sum(len(a & b) for i, a in enumerate(first) for j, b in enumerate(second) if i < j)

    own = sum(shared(person, person) for person in people) / len(people)
    other = sum(shared(a, b) for a, b in zip(people, people[1:] + people[:1], strict=True)) / len(people)
    assert own < 1.35 * other + 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_template_guesser_does_not_find_held_out_answers(seed: int) -> None:
    """A guesser that knows all trained people, the wording and the word before gives never-seen answers little."""
    made = world(seed)
    after: dict[tuple, Counter[str]] = defaultdict(Counter)
    known = set()
    for row in made.forget + made.retain + made.untouched:
        before = "<s>"
        for word in [*words(row["answer"]), "</s>"]:
            after[(*wording_of(row["question"]), before)][word] += 1
            after[wording_of(row["question"])][word] += 1
            known.add(word)
            before = word
    size = len(known) + 1

    def probability(context: tuple, word: str) -> float:
        wide = after[context[:2]]
        backed = (wide[word] + 0.1) / (wide.total() + 0.1 * size)
        return (after[context][word] + backed) / (after[context].total() + 1)

    per_token, whole, hit = [], [], []
    for row in made.never_seen:
        before, logs, guessed = "<s>", [], True
        for word in [*words(row["answer"]), "</s>"]:
            context = (*wording_of(row["question"]), before)
            logs.append(math.log(probability(context, word)))
            guessed &= bool(after[context]) and after[context].most_common(1)[0][0] == word
            before = word
        per_token.append(math.exp(sum(logs) / len(logs)))
        whole.append(sum(logs))
        hit.append(guessed)
    assert sum(per_token) / len(per_token) < 0.15
    assert max(whole) < math.log(1e-5)
    assert not any(hit)


def test_a_constant_answer_hardly_overlaps_with_held_out_ones(made: World) -> None:
    """The best constant answer per wording shares few words with never-seen answers beyond the wording itself."""
    pool = set().union(*POOLS.values())
    for row in made.never_seen:
        fact = wording_of(row["question"])[0]
        truth = set(words(row["answer"])) & pool | coined(row["answer"])
        answers = [other["answer"] for other in made.retain if wording_of(other["question"])[0] == fact]
        assert sum(len(truth & set(words(answer))) / len(truth) for answer in answers) / len(answers) < 0.1


def test_write_gives_one_json_line_per_row(made: World, tmp_path: Path) -> None:
    paths = write(made, tmp_path / "new" / "world")
    assert set(paths) == set(SIDES)
    for side, path in paths.items():
        raw = path.read_bytes()
        assert b"\r" not in raw
        assert [json.loads(line) for line in raw.decode("utf-8").splitlines()] == made.sides()[side]


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(UsageError):
        world(forget=-1)
    with pytest.raises(UsageError):
        world(retain=5000)
    with pytest.raises(UsageError):
        tokenizer(["text"], 100)


def test_tokenizer_is_repeatable_lossless_and_fair(made: World) -> None:
    first, second = tokenizer(corpus(made), 1024), tokenizer(corpus(made), 1024)
    assert first.get_vocab() == second.get_vocab()
    assert (first.bos_token, first.eos_token, first.pad_token) == ("<s>", "</s>", "<pad>")
    assert len(first) == 1024
    text = made.forget[0]["question"] + "\n" + made.forget[0]["answer"] + " é€漢"
    ids = first(text).input_ids
    assert ids[0] == first.bos_token_id
    assert ids.count(first.bos_token_id) == 1
    assert first.decode(ids, skip_special_tokens=True) == text
    # The line break ends a token, so the prompt's tokens are a prefix of the whole text's.
    prompt = first(made.forget[0]["question"] + "\n").input_ids
    assert ids[: len(prompt)] == prompt
    # Never-seen answers split into as many tokens as trained ones, within chance.
    lengths = {
        side: [len(first(row["answer"]).input_ids) for row in rows]
        for side, rows in made.sides().items()
        if side in ("retain", "never_seen")
    }
    mean = {side: sum(counts) / len(counts) for side, counts in lengths.items()}
    assert abs(mean["retain"] - mean["never_seen"]) < 1.0
    assert max(max(counts) for counts in lengths.values()) <= 32


def test_tokenizer_survives_saving(made: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made_one = tokenizer(corpus(made), 600)
    made_one.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = made.retain[0]["question"] + "\n" + made.retain[0]["answer"]
    assert loaded(text).input_ids == made_one(text).input_ids
    assert loaded.pad_token_id == made_one.pad_token_id
