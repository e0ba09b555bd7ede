"""Each word has its class at its first token, for several tokenizers; splitting and padding change nothing."""

from __future__ import annotations

import functools
import inspect
import typing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tokenizers_tiny as tiny
from excise import recipe
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.records import Record, fingerprint
from excise.tasks import TASKS, token_classification
from excise.tasks.causal_lm import Encoding
from excise.tasks.token_classification import ClassExample, class_names, collate, cut, encode_records, sequences

NAMES = ("O", "B-per", "I-per", "B-x-y", "I-x-y")
TOKENIZERS = [
    pytest.param(tiny.word_piece, id="word-piece"),
    pytest.param(functools.partial(tiny.byte_level, True), id="byte-level-with-prefix"),
    pytest.param(functools.partial(tiny.byte_level, False), id="byte-level"),
    pytest.param(functools.partial(tiny.byte_level, False, frame=False), id="byte-level-decoder"),
    pytest.param(tiny.split_first, id="splits-first"),
]
BLANKED = [p for p in TOKENIZERS if p.id in ("byte-level", "byte-level-decoder", "splits-first")]


def sentence(text: str, tags: str = "", line: int = 3) -> Record:
    """A record from ``Ada Bly`` and tags, all O unless given."""
    tokens = tuple(text.split(" "))
    return Record(None, text, line=line, tokens=tokens, tags=tuple(tags.split()) or ("O",) * len(tokens))


def tagged(parts) -> Record:
    """A record from plain words and (type, words of an entity)."""
    tokens: list[str] = []
    tags: list[str] = []
    for part in parts:
        kind, words = ("", [part]) if isinstance(part, str) else part
        tokens += words
        tags += [f"{'I' if i else 'B'}-{kind}" if kind else "O" for i in range(len(words))]
    return Record(None, " ".join(tokens), group="g", line=7, tokens=tuple(tokens), tags=tuple(tags))


words = st.text(alphabet="abslé日,.'#\u200b", min_size=1, max_size=7)
records = st.lists(
    st.one_of(words, st.tuples(st.sampled_from(["per", "x-y"]), st.lists(words, min_size=1, max_size=4))),
    min_size=1, max_size=9,
).map(tagged)  # fmt: skip


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(record=records)
def test_every_word_has_its_class_at_its_first_token(make, record):
    tokenizer = make()
    [row] = encode_records([record], tokenizer, Encoding(max_length=999), names=NAMES)
    assert [NAMES[c] for c in row.classes] == list(record.tags)
    assert sorted(set(row.places)) == list(row.places)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & {row.input_ids[p] for p in row.places}
    ends = [*row.places[1:], len(row.input_ids)]
    for word, start, end in zip(record.tokens, row.places, ends, strict=True):
        ids = [i for i in row.input_ids[start:end] if i not in special]
        if tokenizer.unk_token_id not in ids:
            visible = word.replace("\u200b", "") if make is tiny.word_piece else word
            assert tokenizer.decode(ids).replace(" ", "") == visible


def test_words_in_pieces_by_hand():
    tokenizer = tiny.word_piece()
    [row] = encode_records([sentence("Ada sleept", "B-per O")], tokenizer, Encoding(), names=NAMES)
    pieces = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert pieces == ["[CLS]", "Ada", "sleep", "##t", "[SEP]"]
    assert row.places == (1, 2)
    assert row.classes == (1, 0)


@pytest.mark.parametrize("make", BLANKED)
def test_byte_level_words_are_read_as_in_a_text(make):
    """Without a blank before it a word would get the tokens of a word's inside, which no model saw at its beginning."""
    tokenizer = make()
    [row] = encode_records([sentence("Ada wrote the book")], tokenizer, Encoding(), names=NAMES)
    inner = [i for i in row.input_ids if i not in tokenizer.all_special_ids]
    assert inner == tokenizer(" Ada wrote the book", add_special_tokens=False)["input_ids"]
    glued = tokenizer(["Ada", "wrote", "the", "book"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert inner != glued


def test_a_tokenizer_that_adds_blanks_gets_none():
    [row] = encode_records([sentence("Ada wrote")], tiny.byte_level(True), Encoding(), names=NAMES)
    assert tiny.byte_level(True).decode(row.input_ids[1:-1]) == " Ada wrote"


def test_a_word_that_vanishes_is_unknown():
    tokenizer = tiny.word_piece()
    row, plain = encode_records(
        [sentence("a \u200b b", "O B-per O"), sentence("a")], tokenizer, Encoding(), names=NAMES
    )
    assert row.input_ids[row.places[1]] == tokenizer.unk_token_id
    assert row.classes == (0, 1, 0)
    assert plain.places == (1,)


def test_a_word_that_vanishes_without_an_unknown_token_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny.word_piece().backend_tokenizer)
    with pytest.raises(InputRefused, match=r"^f:3: the tokenizer leaves nothing of word 2: remove it"):
        encode_records([sentence("a \u200b b")], bare, Encoding(), names=NAMES, source="f")


@pytest.mark.parametrize("make", TOKENIZERS)
def test_neighbours_and_order_change_nothing(make):
    rows = [sentence("Ada"), sentence("Bly slept in the theatre", "B-per O O O B-x-y"), sentence("\u200b , 日本")]
    spec = Encoding()
    together = encode_records(rows, make(), spec, names=NAMES)
    assert together == [encode_records([r], make(), spec, names=NAMES)[0] for r in rows]
    assert encode_records(rows[::-1], make(), spec, names=NAMES) == together[::-1]
    assert encode_records([], make(), spec, names=NAMES) == []
    assert sequences(rows, make(), spec, names=NAMES) == [(i, 0, e) for i, e in enumerate(together)]


def test_a_tokenizer_that_pads_and_truncates_by_itself_does_neither_here():
    inner = type(tiny.word_piece().backend_tokenizer).from_str(tiny.word_piece().backend_tokenizer.to_str())
    inner.enable_truncation(4)
    inner.enable_padding(length=50, pad_token="[PAD]", pad_id=0)
    own = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    rows = [sentence("Ada wrote the long book"), sentence("Ada")]
    want = encode_records(rows, tiny.word_piece(), Encoding(), names=NAMES)
    assert encode_records(rows, own, Encoding(), names=NAMES) == want
    assert cut(rows, own, 8) == cut(rows, tiny.word_piece(), 8)


def test_names_of_classes():
    rows = [sentence("a b c", "B-x B-x O"), sentence("a", "B-c-d")]
    assert class_names(rows) == ("O", "B-c-d", "B-x", "I-c-d", "I-x")
    assert class_names([sentence("a")]) == ("O",)


def test_classes_follow_the_names_that_are_given():
    [row] = encode_records([sentence("a b", "B-per O")], tiny.word_piece(), Encoding(), names=["I-per", "B-per", "O"])
    assert row.classes == (1, 2)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_tag_that_the_model_does_not_have():
    rows = [sentence("a"), sentence("Ada canary", "O B-canary", line=8)]
    with pytest.raises(InputRefused, match=r"^dev:8: tag 2 is none of the 5 classes of the model") as caught:
        encode_records(rows, tiny.word_piece(), Encoding(), names=NAMES, source="dev")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("truncate", [False, True])
def test_a_long_sentence_is_refused_and_never_truncated(truncate):
    rows = [sentence("the " * 20 + "canary")]
    with pytest.raises(InputRefused, match=r"^f:3: \d+ tokens, more than max_length 12: set data.long") as caught:
        encode_records(rows, tiny.word_piece(), Encoding(max_length=12, truncate=truncate), names=NAMES, source="f")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("call", [cut, encode_records])
def test_a_slow_tokenizer_is_refused(call):
    slow = SimpleNamespace(is_fast=False)
    arguments = (12,) if call is cut else (Encoding(),)
    with pytest.raises(InputRefused, match="the tokenizer is a slow one") as caught:
        call([sentence("a")], slow, *arguments, **({} if call is cut else {"names": NAMES}))
    assert "\n" not in str(caught.value)


# --- splitting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(record=records, max_length=st.integers(4, 30))
def test_pieces_keep_every_word_and_tag_once_in_order(make, record, max_length):
    tokenizer = make()
    alone = [Record(None, w, tokens=(w,), tags=("O",)) for w in record.tokens]
    longest = max(len(e.input_ids) for e in encode_records(alone, tokenizer, Encoding(max_length=999), names=NAMES))
    assume(longest <= max_length)
    pieces = cut([record], tokenizer, max_length)
    assert tuple(w for p in pieces for w in p.tokens) == record.tokens
    assert [t[2:] for p in pieces for t in p.tags] == [t[2:] for t in record.tags]
    at = 0
    for piece in pieces:
        assert (piece.completion, piece.line, piece.group) == (" ".join(piece.tokens), 7, "g")
        within = record.tags[at][0] == "I"
        assert piece.tags[0] == ("B" + record.tags[at][1:] if within else record.tags[at])
        assert piece.tags[1:] == record.tags[at + 1 : at + len(piece.tags)]
        at += len(piece.tags)
    encoded = encode_records(pieces, tokenizer, Encoding(max_length=max_length), names=NAMES)  # so all of them fit
    if len(pieces) == 1:
        assert pieces == [record]
        return
    assert len(encode_records([record], tokenizer, Encoding(max_length=999), names=NAMES)[0].input_ids) > max_length
    # A split within an entity only where the entity, from the beginning of the piece before it, fills that piece.
    for before, start in zip(pieces, _starts(pieces)[:-1], strict=False):
        if record.tags[start][0] == "I":
            assert all(tag[0] == "I" for tag in before.tags[1:])
    assert sum(len(e.places) for e in encoded) == len(record.tokens)


def _starts(pieces: list[Record]) -> list[int]:
    """The word at which each piece but the first begins."""
    out = [0]
    for piece in pieces:
        out.append(out[-1] + len(piece.tokens))
    return out[1:]


def test_pieces_are_of_like_length_and_end_before_entities():
    tokenizer = tiny.word_piece()
    record = sentence("the " * 9 + "the the", "O " * 4 + "B-per I-per I-per I-per O O O")
    assert len(encode_records([record], tokenizer, Encoding(), names=NAMES)[0].input_ids) == 13
    assert [len(p.tokens) for p in cut([record], tokenizer, 12)] == [4, 7]  # 6 + 5 would cut the entity
    plain = sentence("the " * 10 + "the")
    assert [len(p.tokens) for p in cut([plain], tokenizer, 12)] == [5, 6]
    assert cut([plain], tokenizer, 13) == [plain]
    assert [len(p.tokens) for p in cut([plain], tokenizer, 3)] == [1] * 11


def test_an_entity_longer_than_a_piece_goes_on_as_an_entity():
    record = sentence("the " * 6 + "the", "O B-per" + " I-per" * 5)
    pieces = cut([record], tiny.word_piece(), 5)
    assert [p.tags for p in pieces] == [("O",), ("B-per", "I-per", "I-per"), ("B-per", "I-per", "I-per")]


def test_a_word_longer_than_a_piece_is_refused():
    with pytest.raises(InputRefused, match=r"^f:3: word 2 has \d+ tokens, max_length 8 has room for 6") as caught:
        cut([sentence("the canarycanarycanary" + "z" * 30)], tiny.byte_level(True), 8, source="f")
    assert "canary" not in str(caught.value)


# --- tensors ------------------------------------------------------------------------------------------------------

example = st.integers(1, 9).flatmap(
    lambda n: st.builds(
        lambda ids, places, kind: ClassExample(tuple(ids), tuple(sorted(places)), tuple(kind[: len(places)])),
        st.lists(st.integers(0, 5), min_size=n, max_size=n), st.sets(st.integers(0, n - 1), min_size=1),
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
    )
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(example, min_size=1, max_size=6), st.integers(0, 5))
def test_padding_side_and_neighbours_do_not_matter(examples, pad_id):
    right, left = collate(examples, pad_id=pad_id), collate(examples, pad_id=pad_id, pad_side="left")
    for made in (right, left):
        for row, e in enumerate(examples):
            attended = made["attention_mask"][row].bool()
            assert made["input_ids"][row][attended].tolist() == list(e.input_ids)
            label = made["label_mask"][row]
            assert label[attended].nonzero().flatten().tolist() == list(e.places)
            assert made["classes"][row][label].tolist() == list(e.classes)
            assert set(made["classes"][row][~label].tolist()) <= {-100}
            assert not (label & ~attended).any()
    assert torch.equal(right["classes"][right["label_mask"]], left["classes"][left["label_mask"]])
    assert {k: v.dtype for k, v in right.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "label_mask": torch.bool, "classes": torch.int64,
    }  # fmt: skip


def test_collate_refuses_nonsense():
    with pytest.raises(ValueError, match="nothing"):
        collate([], pad_id=0)
    with pytest.raises(ValueError, match="pad_side"):
        collate([ClassExample((1,), (0,), (0,))], pad_id=0, pad_side="middle")


# --- the dispatch -------------------------------------------------------------------------------------------------


def test_tasks_have_the_same_functions():
    """A caller that knows one task knows them all; classifiers take names on top."""
    wanted = TASKS["causal_lm"]
    for name, task in TASKS.items():
        assert task.LONG in ("split", "refuse")
        for function in ("read", "cut", "encode_records", "sequences", "collate"):
            own = inspect.signature(getattr(task, function)).parameters
            shared = [p for p in inspect.signature(getattr(wanted, function)).parameters if p != "ask"]
            assert set(shared) <= set(own), f"{name}.{function}"
        assert (name == "causal_lm") != hasattr(task, "class_names")
    assert list(TASKS) == list(typing.get_args(typing.get_type_hints(recipe.Model)["task"]))


def given_sides() -> sides.Sides:
    long = sentence("the " * 15 + "the", "O " * 15 + "B-per", line=2)
    return sides.Sides({"forget": [sentence("Ada slept", "B-per O", line=1), long], "retain": [sentence("the book")]})


def test_sides_become_batches_with_classes():
    given, tokenizer = given_sides(), tiny.word_piece()
    data = recipe.Data(forget="forget.conll", retain="retain.conll", max_length=12, long="split")
    task = {"task": "token_classification"}
    sides.cut(given, tokenizer, sides.encoding(data), long=data.long, **task)
    assert {k: len(v) for k, v in given.records.items()} == {"forget": 3, "retain": 1}
    assert given.warnings == ["forget: 2 texts were cut into 3 pieces"]
    sides.refuse_unfit(given.records, tokenizer, data, sides.encoding(data), classes=NAMES, **task)
    rows = sides.encode(given, ["forget", "retain"], tokenizer, data, seed=0, context=None, classes=NAMES, **task)
    assert rows.counts == {"forget": 3, "retain": 1}
    batch = rows.batch("forget", [2, 0])
    assert batch.indices == (2, 0)
    assert batch.classes is not None
    assert batch.classes[batch.label_mask].tolist() == [0] * 7 + [1] + [1, 0]
    assert torch.equal(batch.targets(), batch.classes[batch.label_mask])


def test_long_rows_are_refused_unless_the_recipe_says():
    given, tokenizer = given_sides(), tiny.word_piece()
    data = recipe.Data(forget="forget.conll", retain="retain.conll", max_length=12)
    before = fingerprint(given.records["forget"])
    sides.cut(given, tokenizer, sides.encoding(data), task="token_classification", long=data.long)
    assert fingerprint(given.records["forget"]) == before
    for call in (
        lambda **task: sides.encode(given, ["forget"], tokenizer, data, seed=0, context=None, **task),
        lambda **task: sides.refuse_unfit(given.records, tokenizer, data, sides.encoding(data), **task),
    ):
        with pytest.raises(InputRefused, match=r"^forget\.conll:2: 18 tokens, more than max_length 12"):
            call(task="token_classification", classes=NAMES)


def test_sides_of_other_answers_are_a_matter_of_text():
    with pytest.raises(UsageError, match="'forget_paraphrase', which the recipe does not give"):
        sides.encode(given_sides(), ["forget_paraphrase"], tiny.word_piece(), recipe.Data(), seed=0, context=None,
                     task="token_classification", classes=NAMES)  # fmt: skip


def test_a_language_model_reads_as_before():
    given = sides.Sides({"forget": [Record("Who?", "Ada", line=1), Record(None, "the " * 40, line=2)]})
    tokenizer, data = tiny.byte_level(False, frame=False), recipe.Data(max_length=16)
    sides.cut(given, tokenizer, sides.encoding(data))
    assert len(given.records["forget"]) > 2
    batch = sides.encode(given, ["forget"], tokenizer, data, seed=0, context=None).batch("forget", [0])
    assert batch.classes is None
    refused = sides.Sides({"forget": [Record(None, "the " * 40, line=2)]})
    sides.cut(refused, tokenizer, sides.encoding(data), long="refuse")
    with pytest.raises(InputRefused, match=r":2: .* more than max_length 16"):
        sides.encode(refused, ["forget"], tokenizer, data, seed=0, context=None)


def test_recipes_name_what_becomes_of_long_rows():
    built = recipe.build({"data": {"long": "split", "tag_names": ["O", "B-x"]}})
    assert (built.data.long, built.data.tag_names) == ("split", ("O", "B-x"))
    with pytest.raises(UsageError, match=r"data\.long"):
        recipe.build({"data": {"long": "cut"}})


def test_the_module_does_not_reach_for_text_offsets():
    """Words are known from the tokenizer's own account; text that is searched for words finds the wrong one."""
    assert "offset" not in inspect.getsource(token_classification)
