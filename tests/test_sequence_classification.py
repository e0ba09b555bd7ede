"""A text has its class at [CLS], or at its last token where there is none; long texts are refused, cut or split."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizers_tiny as tiny
from excise import recipe
from excise.commands.starting import sides
from excise.errors import InputRefused
from excise.records import Record
from excise.tasks.causal_lm import Encoding
from excise.tasks.sequence_classification import class_names, collate, cut, encode_records, sequences

NAMES = ("bad", "good")
FIRST = [tiny.word_piece, functools.partial(tiny.byte_level, True)]
LAST = [functools.partial(tiny.byte_level, False, frame=False), tiny.split_first]
TOKENIZERS = [
    pytest.param(m, id=name) for m, name in zip([*FIRST, *LAST], ("bert", "roberta", "gpt2", "llama"), strict=True)
]
texts = st.text(alphabet="abslé日, .[]\n", min_size=1, max_size=40).filter(str.strip)


def text(content: str, label: str = "good", line: int = 3) -> Record:
    return Record(None, content, group="g", line=line, tags=(label,))


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(content=texts, label=st.sampled_from(NAMES))
def test_one_class_at_the_position_that_the_model_reads(make, content, label):
    tokenizer = make()
    [row] = encode_records([text(content, label)], tokenizer, Encoding(max_length=999), names=NAMES)
    assert list(row.input_ids) == tokenizer(content)["input_ids"]
    assert row.classes == (NAMES.index(label),)
    if make in FIRST:
        assert row.places == (0,)
        assert row.input_ids[0] == tokenizer.cls_token_id
    else:
        assert row.places == (len(row.input_ids) - 1,)


def test_a_cls_token_in_the_text_of_a_decoder_moves_nothing():
    [row] = encode_records([text("[CLS] a")], LAST[0](), Encoding(), names=NAMES)
    assert row.places == (len(row.input_ids) - 1,)


def test_the_position_can_be_said():
    for at, want in (("first", 0), ("last", None)):
        for make in (tiny.word_piece, LAST[0]):
            [row] = encode_records([text("Ada slept")], make(), Encoding(), names=NAMES, at=at)
            assert row.places == (len(row.input_ids) - 1 if want is None else want,)


def test_names_of_classes():
    assert class_names([text("a", "x"), text("b", "c"), text("c", "x")]) == ("c", "x")


@pytest.mark.parametrize("make", TOKENIZERS)
def test_padding_side_does_not_matter(make):
    rows = encode_records([text("Ada"), text("Ada wrote the long book", "bad")], make(), Encoding(), names=NAMES)
    for side in ("right", "left"):
        made = collate(rows, pad_id=make().pad_token_id, pad_side=side)
        assert made["label_mask"].sum(1).tolist() == [1, 1]
        assert made["classes"][made["label_mask"]].tolist() == [1, 0]
        held = made["input_ids"][made["label_mask"]].tolist()
        assert held == [e.input_ids[e.places[0]] for e in rows]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_long_text_is_refused_or_truncated(make):
    rows = [text("the long canary " * 20)]
    with pytest.raises(InputRefused, match=r"^f:3: \d+ tokens, more than max_length 10: set data.long") as caught:
        encode_records(rows, make(), Encoding(max_length=10), names=NAMES, source="f")
    assert "canary" not in str(caught.value)
    [row] = encode_records(rows, make(), Encoding(max_length=10, truncate=True), names=NAMES)
    assert len(row.input_ids) == 10
    if make in FIRST:  # what the tokenizer adds stays
        assert (row.input_ids[0], row.input_ids[-1]) == (make().cls_token_id, make().sep_token_id)
    assert encode_records([text("Ada")], make(), Encoding(), names=NAMES)  # the tokenizer keeps no truncation


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=30)
@given(content=st.text(alphabet="abslé日 .\n", max_size=200).filter(str.strip), max_length=st.integers(12, 30))
def test_pieces_fit_lose_nothing_and_have_the_label(make, content, max_length):
    pieces = cut([text(content)], make(), max_length)
    assert "".join("".join(p.completion for p in pieces).split()) == "".join(content.split())
    assert {(p.tags, p.line, p.group) for p in pieces} == {(("good",), 3, "g")}
    assert len(encode_records(pieces, make(), Encoding(max_length=max_length), names=NAMES)) == len(pieces)
    if len(make()(content)["input_ids"]) <= max_length:
        assert pieces == [text(content)]


def test_a_text_that_just_fits_is_whole():
    tokenizer = tiny.word_piece()
    record = text("Ada wrote the long book")
    length = len(tokenizer(record.completion)["input_ids"])
    assert cut([record], tokenizer, length) == [record]
    assert len(cut([record], tokenizer, length - 1)) == 2


def test_refusals():
    with pytest.raises(InputRefused, match=r"^f:3: the label is none of the 2 classes of the model") as caught:
        encode_records([text("a", "canary")], tiny.word_piece(), Encoding(), names=NAMES, source="f")
    assert "canary" not in str(caught.value)

    class Nothing:
        cls_token_id = None

        def __call__(self, *_args: object, **_more: object) -> dict:
            return {"input_ids": []}

    with pytest.raises(InputRefused, match=r"^line 3: the tokenizer leaves nothing of the text"):
        encode_records([text("a")], Nothing(), Encoding(), names=NAMES)


def test_sides_become_batches_with_classes():
    given = sides.Sides({"forget": [text("Ada slept", "bad"), text("the book")], "retain": [text("the long book")]})
    data = recipe.Data(forget="f", retain="r")
    rows = sides.encode(given, ["forget"], tiny.word_piece(), data, seed=0, context=None,
                        task="sequence_classification", classes=NAMES)  # fmt: skip
    batch = rows.batch("forget", [0, 1])
    assert batch.targets().tolist() == [0, 1]
    assert batch.label_mask[:, 0].tolist() == [True, True]
    rows_of = sequences(given.records["forget"], tiny.word_piece(), Encoding(), names=NAMES)
    assert [(row, kind) for row, kind, _ in rows_of] == [(0, 0), (1, 0)]
