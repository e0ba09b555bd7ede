"""MUSE: its prompts, its reader, its numbers against loops, its signs on planted members, and successive requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import oracles_evidence as oracles
from excise import models, recipe
from excise.commands.measuring import muse as asking
from excise.errors import InputRefused, UsageError
from excise.metrics import muse, muse_scores
from excise.metrics.catalogue import METRICS
from excise.metrics.scores import score
from excise.metrics.table import Table, load, save
from excise.metrics.utility import utility_parts
from excise.records import Record, read_records

# --- prompts and readers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["news", "books"])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_the_real_questions_are_read_and_asked_after_ten_examples(shared: Path, name: str, side: str) -> None:
    folder = shared / "data" / f"muse_{name}_knowmem"
    questions = read_records(str(folder / f"{side}_qa.jsonl"))
    examples = read_records(str(folder / f"{side}_qa_icl.jsonl"))
    assert (len(questions), len(examples)) == (100, 10)
    rows = [json.loads(line) for line in (folder / f"{side}_qa.jsonl").read_text().splitlines()]
    solved = [json.loads(line) for line in (folder / f"{side}_qa_icl.jsonl").read_text().splitlines()]
    for record, row in zip(questions, rows, strict=True):
        prompt = muse.question_prompt(record.prompt or "", [(r.prompt or "", r.completion) for r in examples])
        want = ""
        for r in solved:
            want += "Question: " + r["question"] + "\nAnswer: " + r["answer"] + "\n\n"
        assert prompt == want + "Question: " + row["question"] + "\nAnswer: "
        assert record.completion == row["answer"]


def test_passages_are_read_as_the_benchmark_names_them(shared: Path) -> None:
    path = shared / "data" / "muse_alice" / "verbmem.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r.prompt, r.completion) for r in read_records(str(path))] == [(r["prompt"], r["gt"]) for r in rows]


def test_a_row_with_gt_is_refused_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "gt": ""}\n')
    with pytest.raises(InputRefused, match="field 'gt' is empty"):
        read_records(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "gt": "g", "completion": "c"}\n')
    with pytest.raises(InputRefused, match="at once"):
        read_records(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Rome\nQuestion: Who?", " Rome"), ("Rome\n\nParis", "Rome"), ("Rome Question: x", "Rome "), ("Rome", "Rome"),
        ("\n\nRome", ""), ("Rome\nParis", "Rome\nParis"), ("question: Rome", "question: Rome"),
    ],
)  # fmt: skip
def test_an_answer_ends_at_the_stop_strings(text: str, kept: str) -> None:
    assert muse.until(text) == kept


WORDS = st.lists(st.sampled_from(["mill", "mills", "blue", "Blue,", "1987", "-", "sea"]), max_size=9).map(" ".join)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_rouge_against_a_loop(written: str, true: str) -> None:
    found = muse.rouge_f1(written, true)
    if any(c.isalnum() for c in true):
        assert found == pytest.approx(oracles.rouge_l_f1(written, true))
    else:
        assert np.isnan(found)


def test_words_are_not_stemmed() -> None:
    assert muse.rouge_f1("the mills", "the mill") == 0.5


# --- a small model ------------------------------------------------------------------------------------------------


class Lent:
    """A small model and its tokenizer, ``context`` tokens long."""

    def __init__(self, texts: Sequence[str], context: int = 256, seed: int = 0) -> None:
        self.tokenizer = models.new_tokenizer(list(texts), 300)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3,
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(config).eval()

    def goes_on(self, text: str, new: int, keep: int | None = None) -> str:
        """One token at a time, without a cache."""
        ids = self.tokenizer(text)["input_ids"]
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        ids = ids[-keep:] if keep else ids
        written: list[int] = []
        for _ in range(new):
            with torch.no_grad():
                token = int(self.model(torch.tensor([ids + written])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            written.append(token)
        return self.tokenizer.decode(written, skip_special_tokens=True)


QUESTIONS = [Record("Where is the mill?", "By the blue sea."), Record("Who is Bo?", "A glass cutter, no more.")]
SOLVED = [Record("Who is Ada?", "A miller."), Record("Where is Orrin?", "In the north.")]
TEXTS = [str(part) for r in (*QUESTIONS, *SOLVED) for part in (r.prompt, r.completion)] * 3 + ["Question: Answer: "]


def test_answers_against_one_token_at_a_time() -> None:
    lent = Lent(TEXTS)
    table = muse.answers("muse_forget_questions", lent.model, lent.tokenizer, QUESTIONS, SOLVED, new=12)
    solved = [(r.prompt or "", r.completion) for r in SOLVED]
    want = []
    for r in QUESTIONS:
        text = lent.goes_on(muse.question_prompt(r.prompt or "", solved), 12)
        want.append(
            oracles.rouge_l_f1(text.split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0], r.completion)
        )
    assert table.columns["rouge_l_f1_unstemmed"].tolist() == pytest.approx(want)
    assert table.rows == 2
    assert not table.columns["shortened"].any()


def test_passages_against_one_token_at_a_time() -> None:
    lent = Lent(TEXTS)
    rows = [
        Record("Where is the", "mill by the blue sea. Who is Bo? A glass cutter, no more."),
        Record("Who", "is Ada?"),
    ]
    table = muse.passages("muse_passages", lent.model, lent.tokenizer, rows, new=9)
    want = []
    for r in rows:
        true = lent.tokenizer.decode(lent.tokenizer(r.completion)["input_ids"][:9], skip_special_tokens=True)
        want.append(oracles.rouge_l_f1(lent.goes_on(r.prompt or "", 9), true))
    assert table.columns["rouge_l_f1_unstemmed"].tolist() == pytest.approx(want)


def test_a_planted_passage_is_found_and_one_never_seen_is_not() -> None:
    lent = Lent(TEXTS)
    known, strange = Record("Who is Bo?", " A glass cutter, no more."), Record("Where is the", " mill by the blue sea.")
    ids = torch.tensor([lent.tokenizer(f"{known.prompt}{known.completion}")["input_ids"]])
    optimiser = torch.optim.AdamW(lent.model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        lent.model(ids, labels=ids).loss.backward()
        optimiser.step()
    lent.model.eval()
    table = muse.passages("muse_passages", lent.model, lent.tokenizer, [known, strange], new=8)
    found = table.columns["rouge_l_f1_unstemmed"]
    assert found[0] == 1
    assert found[1] < 0.4


def test_what_the_context_has_no_room_for_is_shortened_and_counted() -> None:
    long = Record("Where is the mill? " * 12, "By the sea.")
    lent = Lent(TEXTS, context=64)
    table = muse.passages("muse_passages", lent.model, lent.tokenizer, [long, QUESTIONS[0]], new=16)
    assert table.columns["shortened"].tolist() == [True, False]
    want = oracles.rouge_l_f1(lent.goes_on(long.prompt or "", 16, keep=64 - 16), "By the sea.")
    assert table.columns["rouge_l_f1_unstemmed"][0] == pytest.approx(want)
    many = SOLVED * 5
    short = muse.answers("muse_retain_questions", lent.model, lent.tokenizer, QUESTIONS, many, new=16)
    assert short.columns["shortened"].all()
    values, _ = muse_scores.numbers({"muse_retain_questions": short})
    assert values["muse_knowledge_retain"]["shortened"] == 2
    # The last examples stay: as many as fit.
    solved = [(r.prompt or "", r.completion) for r in many]
    fits = max(
        k for k in range(11)
        if len(lent.tokenizer(muse.question_prompt("Who is Bo?", solved[10 - k :]))["input_ids"]) <= 48
    )  # fmt: skip
    own = muse.answers("x", lent.model, lent.tokenizer, QUESTIONS[1:], many[10 - fits :], new=16)
    assert not own.columns["shortened"].any()
    assert own.columns["rouge_l_f1_unstemmed"][0] == short.columns["rouge_l_f1_unstemmed"][1]
    with pytest.raises(InputRefused, match=r"muse_forget_questions:1: the question leaves no room"):
        muse.answers("muse_forget_questions", lent.model, lent.tokenizer, [long], new=16)
    with pytest.raises(InputRefused, match="no room for 64 new"):
        muse.passages("muse_passages", lent.model, lent.tokenizer, [long], new=64)


# --- numbers ------------------------------------------------------------------------------------------------------


def texts_table(side: str, rows: Sequence[Sequence[float]]) -> Table:
    """Plain texts by their tokens' log-probabilities."""
    offsets = np.concatenate(([0], np.cumsum([len(r) for r in rows]))).astype(np.int64)
    columns: dict[str, Any] = {
        "row": np.arange(len(rows), dtype=np.int32), "kind": np.zeros(len(rows), np.int8),
        "offsets": offsets, "logp": np.concatenate([np.asarray(r, np.float32) for r in rows]),
        "eos": np.zeros(len(rows), bool),
    }  # fmt: skip
    return Table(side, len(rows), columns)


def drawn(seed: int, member: float, other: float, n: int = 40) -> dict[str, Table]:
    rng = np.random.default_rng(seed)
    texts = {
        side: [list(np.minimum(rng.normal(mean, 0.5, rng.integers(5, 9)), -1e-3)) for _ in range(n)]
        for side, mean in ((muse_scores.MEMBERS, member), (muse_scores.NON_MEMBERS, other))
    }
    return {side: texts_table(side, rows) for side, rows in texts.items()}


def lists(tables: dict[str, Table], side: str) -> list[float]:
    table = tables[side]
    cuts = table.columns["offsets"]
    return [oracles.min_k([float(v) for v in table.columns["logp"][a:b]]) for a, b in pairwise(cuts)]


def test_privleak_against_a_loop_with_the_signs_of_planted_members() -> None:
    gold = drawn(1, -2.0, -2.0)
    planted = {"remembered": -0.5, "forgotten": -2.0, "overdone": -5.0}
    found = {}
    for name, mean in planted.items():
        tables = drawn(2, mean, -2.0)
        value = muse_scores.numbers(tables, gold)[0]["muse_privleak"]
        want = oracles.muse_privleak(
            *(lists(tables, side) for side in (muse_scores.MEMBERS, muse_scores.NON_MEMBERS)),
            *(lists(gold, side) for side in (muse_scores.MEMBERS, muse_scores.NON_MEMBERS)),
        )
        assert value["value"] == pytest.approx(want)
        assert value["low"] <= value["value"] <= value["high"]
        found[name] = value["value"]
    assert found["remembered"] < -90
    assert abs(found["forgotten"]) < 40
    assert found["overdone"] > 60
    assert muse_scores.numbers(gold, gold)[0]["muse_privleak"]["value"] == 0


def test_the_published_auc_stands_in_for_a_gold() -> None:
    tables, reference = drawn(2, -0.5, -2.0), muse_scores.REFERENCE_AUC["news"]
    values, not_shown = muse_scores.numbers(tables, reference_auc=reference)
    member, other = (lists(tables, side) for side in (muse_scores.MEMBERS, muse_scores.NON_MEMBERS))
    area = sum(o > m for m in member for o in other) / (len(member) * len(other))
    assert values["muse_privleak"]["value"] == pytest.approx(100 * (area - reference) / reference)
    assert "muse_privleak" not in not_shown
    assert "gold" in muse_scores.numbers(tables)[1]["muse_privleak"]


def test_forget_and_never_seen_rows_stand_in_for_named_texts() -> None:
    gold, tables = drawn(1, -2.0, -2.0), drawn(2, -1.0, -2.0)
    names = dict(zip((muse_scores.MEMBERS, muse_scores.NON_MEMBERS), ("forget", "never_seen"), strict=True))
    renamed = [{names[k]: v for k, v in t.items()} for t in (tables, gold)]
    assert muse_scores.numbers(*renamed)[0] == muse_scores.numbers(tables, gold)[0]


def scored(side: str, values: Sequence[float]) -> Table:
    empty = {name: np.zeros(0) for name in ("row", "kind", "mean_nll")}
    return Table(side, len(values), {**empty, "rouge_l_f1_unstemmed": np.array(values, np.float32)})


def test_means_leave_out_rows_that_cannot_be_measured() -> None:
    values, not_shown = muse_scores.numbers({"muse_passages": scored("muse_passages", [0.5, float("nan"), 1.0])})
    assert values["muse_verbatim"]["value"] == 0.75
    assert values["muse_verbatim"]["n"] == 2
    assert set(not_shown) == {"muse_knowledge_forget", "muse_knowledge_retain", "muse_privleak"}
    assert set(values) | set(not_shown) == {name for name, m in METRICS.items() if m.source == "muse"}


def test_tables_are_saved_and_are_no_part_of_utility(tmp_path: Path) -> None:
    table = scored("muse_passages", [0.5, 1.0])
    save(table, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").columns["rouge_l_f1_unstemmed"].tolist() == [0.5, 1.0]
    tables = drawn(2, -1.0, -2.0) | {"muse_passages": table}
    assert not utility_parts(tables)
    assert not {name for name in score(tables).values if name.startswith("muse")}


# --- what a recipe asks -------------------------------------------------------------------------------------------


def asked(tmp_path: Path, **sources: str) -> recipe.Recipe:
    """A recipe; sources are rows, written to files."""
    for name, text in sources.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return recipe.build({"evaluate": {"muse": {k: str(tmp_path / f"{k}.jsonl") for k in sources}}})


TEXT, QUESTION = '{"text": "once upon a time"}\n', '{"question": "Who?", "answer": "Ada"}\n'


def test_a_recipe_is_read(tmp_path: Path) -> None:
    found = asking.read(asked(tmp_path, forget_questions=QUESTION, forget_examples=QUESTION * 3, members=TEXT * 2,
                              non_members=TEXT))  # fmt: skip
    assert found is not None
    assert {k: len(v) for k, v in found.records.items()} == {
        "muse_forget_questions": 1, muse_scores.MEMBERS: 2, muse_scores.NON_MEMBERS: 1,
    }  # fmt: skip
    assert len(found.examples["muse_forget_questions"]) == 3
    assert found.sources["muse_forget_questions_examples"]["rows"] == 3
    assert asking.read(recipe.Recipe()) is None


@pytest.mark.parametrize(
    ("sources", "error", "says"),
    [
        ({"members": TEXT}, UsageError, "members and non_members"),
        ({"passages": QUESTION, "retain_examples": QUESTION}, UsageError, "without retain_questions"),
        ({"passages": TEXT}, InputRefused, "passages needs rows of a prompt"),
        ({"members": QUESTION, "non_members": TEXT}, InputRefused, "members needs rows of plain texts"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, sources: dict[str, str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        asking.read(asked(tmp_path, **sources))
    with pytest.raises(UsageError, match="did you mean 'passages'"):
        recipe.build({"evaluate": {"muse": {"passage": "x"}}})


# --- successive requests ------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12))
def test_folds(rows: int, count: int) -> None:
    if count > rows:
        with pytest.raises(UsageError, match="cannot be divided"):
            muse_scores.folds(rows, count, "scalability")
        return
    grown, apart = (muse_scores.folds(rows, count, kind) for kind in ("scalability", "sustainability"))
    assert sorted(row for fold in apart for row in fold) == list(range(rows))
    seen: list[int] = []
    for larger, own in zip(grown, apart, strict=True):
        seen += own
        assert larger == seen
        assert own


def test_the_course_over_requests() -> None:
    steps = [{"muse_verbatim": {"value": v}, "muse_knowledge_retain": {"value": 1 - v}} for v in (0.5, 0.25)]
    found = muse_scores.course(steps)
    assert found["muse_verbatim"] == [0.5, 0.25]
    assert found["muse_knowledge_retain"] == [0.5, 0.75]
    assert found["muse_privleak"] == [None, None]
