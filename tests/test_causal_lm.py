"""Labels are the answer and nothing else, for several tokenizers; masks come from lengths; nothing is cut unasked."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from excise.errors import InputRefused, UsageError
from excise.records import Record
from excise.tasks import causal_lm
from excise.tasks.causal_lm import Encoding, Example, collate, encode, encode_records, length_batches, sequences
from excise.tasks.chunks import chunk_text_records

SHARED = Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
TEXTS = ["Who wrote the long book?", "Ada Bly wrote it in 1987.", "the theatre, then there", "naïve café, 日本", "\n\n"]

# One turn end, a line break after it, and a beginning of sequence that the template writes by itself.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PICKY = "{{ raise_exception('roles: ' + messages[0]['content']) }}"


@functools.cache
def byte_level(bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, optionally one that adds its own beginning and end."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<e>", "<b>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(TEXTS * 20, trainer)
    if bos or eos:
        single = f"{'<b> ' if bos else ''}$A{' <e>' if eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<e>", 0), ("<b>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>", bos_token="<b>")


@functools.cache
def greedy_merges() -> PreTrainedTokenizerFast:
    """A BPE without pre-tokenizer: tokens run across the end of the prompt, which is the trap."""
    inner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"])
    inner.train_from_iterator(["Q?\nA one", "Q?\nA two", "abc\nA one?", "xyz \n A 1 2 3"] * 10, trainer)
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")


@functools.cache
def chatty() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level(True).backend_tokenizer.to_str()),
        eos_token="<e>", bos_token="<b>", pad_token="<e>",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@functools.cache
def stories() -> PreTrainedTokenizerFast:
    folder = SHARED / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set EXCISE_SHARED")
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS = [
    pytest.param(stories, id="stories260K"),
    pytest.param(byte_level, id="byte-level"),
    pytest.param(functools.partial(byte_level, True), id="adds-bos"),
    pytest.param(functools.partial(byte_level, True, True), id="adds-bos-and-eos"),
]
text = st.text(alphabet="Qabé日 .?\n{}1", min_size=1, max_size=40).filter(str.strip)


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(prompt=text.map(str.rstrip), completion=text.map(str.lstrip))  # white space at the boundary: next test
def test_labels_decode_to_the_completion_and_an_end(make, prompt, completion):
    tokenizer = make()
    row = encode(prompt, completion, tokenizer, max_length=512)
    labels = row.input_ids[row.label_start :]
    assert labels[-1] == tokenizer.eos_token_id
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(labels[:-1]) == completion
    if tokenizer is not byte_level():  # these write a beginning: exactly one
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.input_ids.count(tokenizer.bos_token_id) == 1


@settings(deadline=None, max_examples=60)
@given(prompt=st.text("Qabcxyz?", min_size=1, max_size=8), completion=st.text("A one two", min_size=1, max_size=12))
def test_a_token_across_the_boundary_is_a_label_whole(prompt, completion):
    tokenizer = greedy_merges()
    row = encode(prompt, completion, tokenizer, max_length=99)
    head, labels = row.input_ids[: row.label_start], row.input_ids[row.label_start : -1]
    # Where the very first token holds part of the answer, nothing stands before it that could predict it.
    assume(tokenizer(prompt + "\n")["input_ids"][0] == row.input_ids[0])
    decoded = tokenizer.decode(labels)
    assert decoded.endswith(completion)
    assert tokenizer.decode(head) + decoded == prompt + "\n" + completion


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(prompt=text, completion=text)
def test_at_worst_white_space_of_the_prompt_is_a_label(make, prompt, completion):
    row = encode(prompt, completion, make(), max_length=512)
    before = make().decode(row.input_ids[row.label_start : -1]).removesuffix(completion.lstrip(" "))
    assert not before.strip()


def test_the_boundary_trap_is_real():
    """With labels from len(tok(prompt)), the first token of an answer would be no label."""
    tokenizer = greedy_merges()
    row = encode("Q?", "A one", tokenizer, max_length=99)
    naive = len(tokenizer("Q?\n")["input_ids"])
    assert row.label_start < naive


def test_templates_are_filled_once_and_braces_are_text():
    row = encode("{prompt} {0}", "a", byte_level(), template="Q: {prompt}\nA: ", max_length=99)
    assert byte_level().decode(row.input_ids[:-1]) == "Q: {prompt} {0}\nA: a"
    for template in ("", "Question", "{prompt}{prompt}"):
        with pytest.raises(UsageError, match="exactly once"):
            Encoding(template=template)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_text_rows_are_all_label(make):
    row = encode(None, "Ada Bly wrote it.", make(), max_length=99)
    assert row.label_start == 1
    assert row.input_ids[-1] == make().eos_token_id
    open_end = encode(None, "Ada Bly wrote it.", make(), max_length=99, text_eos=False)
    assert open_end.input_ids in (row.input_ids[:-1], row.input_ids)  # some tokenizers write the end themselves


def test_an_end_token_within_user_text_cuts_nothing():
    row = encode("q", "one<e> two", byte_level(), max_length=99)
    assert byte_level().decode(row.input_ids[row.label_start :]) == "one<e> two<e>"


# --- chat ---------------------------------------------------------------------------------------------------------


def test_a_chat_template_makes_a_pair_with_one_beginning_and_one_end():
    tokenizer = chatty()
    row = encode("Who?", "Ada Bly", tokenizer, max_length=99)
    assert tokenizer.decode(row.input_ids) == "<b><|user|>Who?<e>\n<|assistant|>Ada Bly<e>"
    assert tokenizer.decode(row.input_ids[row.label_start :]) == "Ada Bly<e>"
    assert row == encode(
        "Who?", "Ada Bly", tokenizer, max_length=99, messages=[{"role": "user", "content": "Who?"}], chat="always"
    )


def test_all_turns_before_the_answer_are_prompt():
    turns = [{"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "I?"), ("user", "Yes"))]
    row = encode("", "Ada", chatty(), max_length=99, messages=turns)
    assert chatty().decode(row.input_ids[row.label_start :]) == "Ada<e>"
    assert "I?<e>" in chatty().decode(row.input_ids[: row.label_start])


def test_chat_never_and_always():
    assert encode("Who?", "Ada", chatty(), max_length=99, chat="never") == encode(
        "Who?", "Ada", byte_level(True), max_length=99
    )
    assert encode(None, "Ada", chatty(), max_length=99) == encode(None, "Ada", byte_level(True), max_length=99)
    with pytest.raises(InputRefused, match="no chat template"):
        encode("Who?", "Ada", byte_level(), max_length=99, chat="always")


def test_a_template_that_refuses_is_one_line_without_content():
    tokenizer = chatty()
    tokenizer.chat_template = PICKY
    try:
        with pytest.raises(InputRefused, match=r"f:3: the chat template refuses .* \(TemplateError\)") as caught:
            encode("canary", "a", tokenizer, max_length=99, where="f:3")
        assert "canary" not in str(caught.value)
    finally:
        tokenizer.chat_template = TEMPLATE


# --- lengths ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused():
    records = [Record("q", "a", line=1), Record("word " * 30 + "canary", "a", line=4)]
    for call in (encode_records, sequences, causal_lm.prompts):
        with pytest.raises(InputRefused, match=r"forget\.jsonl:4: the prompt has \d+ tokens") as caught:
            call(records, byte_level(), Encoding(max_length=10, truncate=True), source="forget.jsonl")
        assert "canary" not in str(caught.value)


@given(st.integers(2, 40))
@settings(deadline=None)
def test_every_length_is_whole_cut_or_refused(max_length):
    whole = encode("Who?", "Ada Bly wrote it", byte_level(), max_length=99)
    if max_length <= whole.label_start:
        with pytest.raises(InputRefused, match="leaves no room"):
            encode("Who?", "Ada Bly wrote it", byte_level(), max_length=max_length, truncate=True)
    elif max_length < len(whole.input_ids):
        with pytest.raises(InputRefused, match=f"more than max_length {max_length}: shorten"):
            encode("Who?", "Ada Bly wrote it", byte_level(), max_length=max_length)
        cut = encode("Who?", "Ada Bly wrote it", byte_level(), max_length=max_length, truncate=True)
        assert cut.input_ids == whole.input_ids[:max_length]
        assert cut.label_start == whole.label_start
    else:
        assert encode("Who?", "Ada Bly wrote it", byte_level(), max_length=max_length) == whole


def test_a_text_of_one_token_predicts_nothing():
    with pytest.raises(InputRefused, match="single token"):
        encode(None, "a", byte_level(), max_length=9, text_eos=False)
    assert encode(None, "a", byte_level(), max_length=9).label_start == 1


def test_a_tokenizer_without_an_end_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(InputRefused, match="no end-of-sequence"):
        encode("q", "a", bare, max_length=9)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=30)
@given(content=st.text(alphabet="abé日 .\n", max_size=300), max_length=st.integers(12, 40))
def test_pieces_of_a_text_fit_lose_nothing_and_are_never_empty(make, content, max_length):
    pieces = chunk_text_records([Record(None, content, line=7, group="g")], make(), max_length)
    assert "".join("".join(p.completion for p in pieces).split()) == "".join(content.split())
    for piece in pieces:
        assert piece.completion.strip()
        assert (piece.line, piece.group) == (7, "g")
        assert len(encode(None, piece.completion, make(), max_length=max_length).input_ids) <= max_length


def test_pieces_are_nearly_full_and_end_between_words():
    words = [f"word{i}" for i in range(400)]
    pieces = chunk_text_records([Record(None, " ".join(words))], byte_level(), 50)
    assert [w for p in pieces for w in p.completion.split()] == words
    assert all(len(byte_level()(p.completion)["input_ids"]) > 40 for p in pieces[:-1])
    assert chunk_text_records([Record("q", "a " * 900)], byte_level(), 9) == [Record("q", "a " * 900)]
    with pytest.raises(UsageError, match="no room"):
        chunk_text_records([Record(None, "abc")], byte_level(), 1)


# --- evaluation sequences -----------------------------------------------------------------------------------------


def test_sequences_ask_one_question_unless_told():
    tokenizer = byte_level()
    record = Record("Who?", "Ada", paraphrases=(("Which?", "It is Ada"), (None, "Ada!")), false_answers=("Bob", "Cy"))
    rows = sequences([Record("x", "y"), record], tokenizer, Encoding())
    assert [(row, kind) for row, kind, _ in rows] == [(0, 0), (1, 0), (1, 1), (1, 1), (1, 2), (1, 2)]
    assert [tokenizer.decode(e.input_ids[:-1]) for _, _, e in rows[1:]] == [
        "Who?\nAda", "Who?\nIt is Ada", "Who?\nAda!", "Who?\nBob", "Who?\nCy",
    ]  # fmt: skip
    own = sequences([record], tokenizer, Encoding(), ask="own")
    assert tokenizer.decode(own[1][2].input_ids) == "Which?\nIt is Ada<e>"
    chat = Record("S\nWho?", "Ada", ({"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}),
                  paraphrases=(("Which?", "B"),))  # fmt: skip
    asked = sequences([chat], chatty(), Encoding(), ask="own")[1][2]
    assert chatty().decode(asked.input_ids) == "<b><|system|>S<e>\n<|user|>Which?<e>\n<|assistant|>B<e>"


@pytest.mark.parametrize("make", [*TOKENIZERS, pytest.param(chatty, id="chat")])
def test_prompts_are_what_stands_before_the_labels(make):
    records = [Record("Who wrote it?", "Ada"), Record(None, "text")]
    [head, none] = causal_lm.prompts(records, make(), Encoding())
    row = encode_records(records[:1], make(), Encoding())[0]
    assert head == row.input_ids[: row.label_start]
    assert none == ()


def test_reworded_questions_keep_their_answers():
    chat = Record("What is the aim?", "B", ({"role": "user", "content": "What is the aim?"},))
    before = [Record("What is the aim?", "Ada", line=3), Record(None, "t"), chat]
    after = causal_lm.reworded(before, seed=1)
    assert [(r.completion, r.line) for r in after] == [(r.completion, r.line) for r in before]
    assert after[0].prompt in ("Can you tell me what the aim is?", "Do you know what the aim is?")
    assert after[1] == before[1]
    assert after[2].messages == ({"role": "user", "content": after[2].prompt},)


# --- tensors ------------------------------------------------------------------------------------------------------

example = st.integers(2, 12).flatmap(
    lambda n: st.builds(
        lambda ids, start: Example(tuple(ids), start), st.lists(st.integers(0, 9), min_size=n, max_size=n),
        st.integers(1, n - 1),
    )
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(example, min_size=1, max_size=6), st.integers(0, 9))
def test_masks_come_from_lengths_and_both_sides_agree(examples, pad_id):
    """Padding is a token that also stands in the rows: ids cannot tell."""
    right, left = collate(examples, pad_id=pad_id), collate(examples, pad_id=pad_id, pad_side="left")
    for made in (right, left):
        assert made["attention_mask"].sum(1).tolist() == [len(e.input_ids) for e in examples]
        for row, e in enumerate(examples):
            attended, label = made["attention_mask"][row].bool(), made["label_mask"][row]
            assert made["input_ids"][row][attended].tolist() == list(e.input_ids)
            assert made["input_ids"][row][label].tolist() == list(e.input_ids[e.label_start :])
            assert not (label & ~attended).any()
            assert set(made["input_ids"][row][~attended].tolist()) <= {pad_id}
    assert torch.equal(right["input_ids"][right["label_mask"]], left["input_ids"][left["label_mask"]])
    assert {k: v.dtype for k, v in right.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "label_mask": torch.bool,
    }  # fmt: skip


def test_a_real_end_is_attended_when_padding_is_the_same_token():
    tokenizer = byte_level()
    rows = encode_records([Record("Who?", "Ada"), Record("Who wrote the long book?", "Bly")], tokenizer, Encoding())
    made = collate(rows, pad_id=tokenizer.pad_token_id)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    last = made["attention_mask"][0].sum() - 1
    assert made["input_ids"][0, last] == tokenizer.eos_token_id
    assert made["label_mask"][0, last]


def test_collate_refuses_nonsense():
    with pytest.raises(ValueError, match="nothing"):
        collate([], pad_id=0)
    with pytest.raises(ValueError, match="pad_side"):
        collate([Example((1, 2), 1)], pad_id=0, pad_side="middle")


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 120), st.integers(1, 9))
def test_batches_hold_every_row_once_within_limits(lengths, max_tokens, max_rows):
    batches = length_batches(lengths, max_tokens, max_rows)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    flat = [lengths[i] for b in batches for i in b]
    assert flat == sorted(flat, reverse=True)


def test_real_rows_fit_and_decode():
    path = SHARED / "data/tofu/forget01.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}: set EXCISE_SHARED")
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        row = encode(raw["question"], raw["answer"], stories(), max_length=512)
        assert stories().decode(row.input_ids[row.label_start : -1]) == raw["answer"]
