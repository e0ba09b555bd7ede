"""Tagged sentences and labelled texts are read right, or refused in one line that names the place and the scheme."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise import recipe
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.records import Record, check_sides, fingerprint, read_labelled, read_tagged

SHARED = Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
CANARY = "zanzibar-7193"
GOOD = f"{CANARY}\tB-per\nBly\tI-per\nslept\tO\n\n"


def wrote(tmp_path: Path, data: bytes | str, name: str = "rows.conll") -> str:
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(tmp_path / name)


def row(**fields: object) -> str:
    return json.dumps(fields) + "\n"


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_a_sentence_is_one_record(tmp_path):
    first, second = read_tagged(wrote(tmp_path, "\n" + GOOD + "Rain\tO\n"))
    assert first == Record(
        None, f"{CANARY} Bly slept", line=2, tokens=(CANARY, "Bly", "slept"), tags=("B-per", "I-per", "O")
    )
    assert (second.tokens, second.line) == (("Rain",), 6)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (GOOD.replace("\t", " "), [1]),
        (GOOD.replace("\t", "   "), [1]),
        (GOOD.replace("\t", "\tNNP\tB-NP\t"), [1]),
        (GOOD.replace("\t", " NNP B-NP "), [1]),
        (GOOD.replace("\n", "\r\n") * 2, [1, 5]),
        (GOOD.replace("\n\n", "\n \t\n\n\n") * 2, [1, 7]),
        ("-DOCSTART- -X- -X- O\n\n" + GOOD + "-DOCSTART-\n" + GOOD + "-DOCSTART-\n", [3, 8]),
        (GOOD + "-DOCSTART-\tO\n" + GOOD, [1, 6]),
        ("\ufeff" + GOOD, [1]),
        (gzip.compress(GOOD.encode() * 2), [1, 5]),
        (GOOD.strip(), [1]),
    ],
)
def test_harmless_variations_are_read_with_their_lines(tmp_path, data, lines):
    records = read_tagged(wrote(tmp_path, data))
    assert [r.line for r in records] == lines
    assert {(r.tokens, r.tags) for r in records} == {((CANARY, "Bly", "slept"), ("B-per", "I-per", "O"))}


@pytest.mark.parametrize(
    "name", ["a.conll", "a.TXT", "a.tsv", "a.bio", "a.iob", "a.iob2", "a.conll.gz", "a.conll.v2.txt"]
)
def test_names_that_hold_lines_of_words(tmp_path, name):
    assert len(read_tagged(wrote(tmp_path, GOOD, name))) == 1


def test_a_tag_is_the_last_column_and_a_tab_lets_a_word_hold_blanks(tmp_path):
    [record] = read_tagged(wrote(tmp_path, "New York\tB-place\n#tag\tO\n"))
    assert (record.tokens, record.tags) == (("New York", "#tag"), ("B-place", "O"))


def test_adjacent_and_hyphened_types(tmp_path):
    [record] = read_tagged(wrote(tmp_path, "a\tB-x-y\nb\tI-x-y\nc\tB-x-y\nd\tB-x\ne\tI-x\n"))
    assert record.tags == ("B-x-y", "I-x-y", "B-x-y", "B-x", "I-x")


@pytest.mark.parametrize("field", ["ner_tags", "tags"])
def test_json_rows(tmp_path, field):
    data = row(id=3, tokens=["Ada", "slept"], **{field: ["B-per", "O"]}, author="A")
    [record] = read_tagged(wrote(tmp_path, data, "rows.jsonl"))
    assert record == Record(None, "Ada slept", group="A", line=1, tokens=("Ada", "slept"), tags=("B-per", "O"))
    assert read_tagged(wrote(tmp_path, f"[{data}]", "rows.json")) == [record]
    assert read_tagged(wrote(tmp_path, gzip.compress(data.encode()), "rows.jsonl.gz")) == [record]


def test_numbers_are_read_where_they_have_names(tmp_path):
    path = wrote(tmp_path, row(tokens=["Ada", "slept"], ner_tags=[1, 0]), "rows.jsonl")
    assert read_tagged(path, names=["O", "B-per"])[0].tags == ("B-per", "O")
    labelled = wrote(tmp_path, row(text="t", label=1), "texts.jsonl")
    assert read_labelled(labelled, names=["bad", "good"])[0].tags == ("good",)


def test_labelled_texts(tmp_path):
    [record] = read_labelled(wrote(tmp_path, row(text="It rained.", label="weather", group=7), "rows.jsonl"))
    assert record == Record(None, "It rained.", group="7", line=1, tags=("weather",))


def test_limit_stops_before_what_follows(tmp_path):
    assert len(read_tagged(wrote(tmp_path, GOOD * 2 + "broken\n"), limit=2)) == 2
    for read in (read_tagged, read_labelled):
        with pytest.raises(UsageError, match="limit"):
            read(wrote(tmp_path, GOOD), limit=0)


words = st.text(alphabet="abé日#'-{", min_size=1, max_size=5).filter(lambda w: w != "-DOCSTART-")
entity = st.tuples(st.sampled_from(["per", "x-y"]), st.lists(words, min_size=1, max_size=3))
spans = st.lists(st.one_of(entity, words), min_size=1, max_size=8)


def tagged(parts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and IOB2 tags of a sentence from plain words and entities."""
    pairs: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, str):
            pairs.append((part, "O"))
        else:
            pairs += [(word, f"{'I' if i else 'B'}-{part[0]}") for i, word in enumerate(part[1])]
    tokens, tags = zip(*pairs, strict=True)
    return tokens, tags


@settings(deadline=None)
@given(st.lists(spans.map(tagged), min_size=1, max_size=5), st.sampled_from(["\t", " ", "\tNN\t"]))
def test_what_is_written_is_read_back_in_every_format(tmp_path_factory, sentences, blank):
    folder = tmp_path_factory.getbasetemp()
    conll = "".join("".join(f"{w}{blank}{t}\n" for w, t in zip(*s, strict=True)) + "\n" for s in sentences)
    as_rows = "".join(row(tokens=list(w), ner_tags=list(t)) for w, t in sentences)
    for path in (wrote(folder, conll, "a.conll"), wrote(folder, as_rows, "a.jsonl")):
        records = read_tagged(path)
        assert [(r.tokens, r.tags) for r in records] == sentences
        assert all(r.completion == " ".join(r.tokens) and r.prompt is None for r in records)


# --- what is refused ----------------------------------------------------------------------------------------------

BAD_LINES: list[tuple[bytes | str, str]] = [
    ("", "holds no sentences"),
    ("\n \n-DOCSTART- O\n", "holds no sentences"),
    (GOOD + CANARY + "\n", ":5: has one column"),
    (GOOD + "O\n", ":5: has one column"),
    (CANARY + "\nBly\n", ":1: has one column"),
    (GOOD + f"{CANARY}\tNN\tO\n", ":5: has 3 columns, the lines before it 2"),
    (GOOD + "\tO\n", ":5: the word is empty"),
    (GOOD + " \u00a0\tO\n", ":5: the word is empty"),
    (GOOD + f"{CANARY}\t\n", ":5: the tag is empty"),
    (GOOD + f"x\t{CANARY}\n", ":5: the last column is no IOB2 tag: write O"),
    (GOOD + "x\tB\n", ":5: the last column is no IOB2 tag"),
    (GOOD + "x\tB-\n", ":5: the last column is no IOB2 tag"),
    (GOOD + "x\tB_per\n", ":5: the last column is no IOB2 tag"),
    (GOOD + "x\to\n", ":5: the last column is no IOB2 tag"),
    (GOOD + "x\tB-creative work\n", ":5: the last column is no IOB2 tag"),
    (GOOD + "x\t3\n", ":5: the last column is no IOB2 tag"),
    (GOOD + f"{CANARY}\tS-per\n", ":5: .*looks like BIOES: convert it to IOB2"),
    (GOOD.replace("I-", "E-"), ":2: .*looks like BIOES"),
    (GOOD.replace("I-", "L-"), ":2: .*looks like BILOU"),
    (GOOD.replace("B-", "U-"), ":1: .*looks like BILOU"),
    (GOOD.replace("I-", "M-"), ":2: .*looks like BMES"),
    (GOOD + f"a\tO\n{CANARY}\tI-per\n", ":6: the tag is I- without a B- before it: begin"),
    (GOOD + f"{CANARY}\tI-per\n", ":5: the tag is I- without a B- before it: begin"),
    (GOOD + "a\tB-org\nb\tI-per\n", ":6: the tag is I- after a tag of another type: begin"),
    (GOOD + "a\tB-x-y\nb\tI-x\n", ":6: the tag is I- after a tag of another type"),
    ("a\tO\n\n" + GOOD.replace("B-", "I-"), ":3: .*looks like IOB1 .*convert it to IOB2"),
    ("a\tI-per\nb\tB-per\nc\tI-per\n", ":1: .*looks like IOB1"),
    (row(tokens=[CANARY], ner_tags=["O"]), ":1: looks like JSON: name the file .jsonl"),
    (b"a\tO\nb\xff\tO\n", ":2: byte 2 is not UTF-8"),
    (b"a\tO\n\0\tO\n", ":2: holds a NUL byte"),
    (GOOD.encode("utf-16"), ":1: is UTF-16"),
    (gzip.compress(GOOD.encode() * 100)[:-20], "compressed file is cut off"),
]
BAD_ROWS: list[tuple[str, str]] = [
    ("", "holds no sentences"),
    ("[]", "holds no sentences"),
    (GOOD, ":1: is not JSON: name a file of words and tags .conll or .txt"),
    ('{"tokens": ["' + CANARY, ":1: column .* broken JSON"),
    ("[3]", ":1: is not a JSON object"),
    (row(question="q", answer=CANARY), ":1: field 'tokens' is missing: this task reads 'tokens' and 'ner_tags'"),
    (row(tokens=[CANARY]), ":1: field 'ner_tags' is missing"),
    (row(tokens=["a"], ner_tags=["O"], tags=["O"]), ":1: fields 'ner_tags' and 'tags' mean the same"),
    (row(tokens=CANARY, tags=["O"]), ":1: field 'tokens' is of another type, not a list"),
    (row(tokens=["a"], tags="O"), ":1: field 'tags' is of another type, not a list"),
    (row(tokens=["a"], tags=None), ":1: field 'tags' is of another type, not a list"),
    (row(tokens=[], ner_tags=[]), ":1: field 'tokens' is empty"),
    (row(tokens=["a", CANARY], ner_tags=["O"]), r":1: .*differ in length \(2 and 1\): give one tag per word"),
    (row(tokens=["a", ""], ner_tags=["O", "O"]), r":1: field 'tokens\[2\]' is empty"),
    (row(tokens=["a", " "], ner_tags=["O", "O"]), r":1: field 'tokens\[2\]' is empty"),
    (row(tokens=["a", 3], ner_tags=["O", "O"]), r":1: field 'tokens\[2\]' is a number"),
    (row(tokens=["a"], ner_tags=[None]), r":1: field 'ner_tags\[1\]' is null"),
    (row(tokens=["a"], ner_tags=[0]), r":1: field 'ner_tags\[1\]' is a number: .*data.tag_names"),
    (row(tokens=["a"], ner_tags=[True]), r":1: field 'ner_tags\[1\]' is true or false"),
    (row(tokens=["a"], ner_tags=["O "]), r":1: field 'ner_tags\[1\]' begins or ends with white space"),
    (row(tokens=["a"], tags=[CANARY]), r":1: field 'tags\[1\]' is no IOB2 tag"),
    (row(tokens=["a"], tags=["S-per"]), r":1: field 'tags\[1\]' .*looks like BIOES"),
    (row(tokens=["a"], tags=["I-per"]), ":1: tag 1 is I- without .*looks like IOB1"),
    (row(tokens=["a"], tags=["B-per"]) + row(tokens=["a", "b"], tags=["O", "I-per"]), ":2: tag 2 is I- without a B-"),
    (row(tokens=["a"], tags=["O"], group=None), ":1: field 'group' is null"),
    ('{"tokens": ["a"], "tags": ["O"], "tags": ["O"]}', ":1: field 'tags' stands twice"),
]
BAD_LABELS: list[tuple[str, str]] = [
    ("", "holds no rows"),
    (row(text=CANARY), ":1: field 'label' is missing: this task reads 'text' and 'label'"),
    (row(question=CANARY, label="a"), ":1: field 'text' is missing"),
    (row(text="", label="a"), ":1: field 'text' is empty"),
    (row(text="t", label=""), ":1: field 'label' is empty"),
    (row(text="t", label=" " + CANARY), ":1: field 'label' begins or ends with white space"),
    (row(text="t", label=1), ":1: field 'label' is a number: .*data.tag_names"),
    (row(text="t", label=0.5), ":1: field 'label' is a number, not a string"),
    (row(text="t", label=["a"]), ":1: field 'label' is a list"),
    (row(text="t", label="a") + "3", ":2: is not a JSON object"),
]
BAD = [
    *((read_tagged, data, "rows.conll", match) for data, match in BAD_LINES),
    *((read_tagged, data, "rows.jsonl", match) for data, match in BAD_ROWS),
    *((read_labelled, data, "rows.jsonl", match) for data, match in BAD_LABELS),
]


@pytest.mark.parametrize(("read", "data", "name", "match"), BAD, ids=[f"{b[2]}-{b[3]}" for b in BAD])
def test_bad_input_is_refused_in_one_line_without_content(tmp_path, read, data, name, match):
    with pytest.raises(InputRefused, match=match) as caught:
        read(wrote(tmp_path, data, name))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / name))
    assert "\n" not in text
    assert CANARY not in text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_without_a_name(tmp_path, number):
    with pytest.raises(InputRefused, match=r":1: field 'ner_tags\[1\]' is a number without a name: .* has 2"):
        read_tagged(wrote(tmp_path, row(tokens=["a"], ner_tags=[number]), "rows.jsonl"), names=["O", "B-x"])


@pytest.mark.parametrize("read", [read_tagged, read_labelled])
def test_a_missing_file(tmp_path, read):
    for name in ("none.conll", "none.jsonl", ""):
        with pytest.raises(InputRefused, match="no such file"):
            read(str(tmp_path / name))


def outcome(path: str) -> tuple[list[Record], str]:
    """The sentences of a file, or why it is refused. Any other exception is a fault of ours."""
    try:
        return read_tagged(path), ""
    except InputRefused as error:
        return [], str(error)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text("aOBI-per \t\n", max_size=60).map(str.encode)))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    for name in ("any.conll", "any.jsonl"):
        records, why = outcome(wrote(tmp_path_factory.getbasetemp(), data, name))
        assert "\n" not in why
        assert bool(records) != bool(why)
        assert all(len(r.tokens) == len(r.tags) > 0 for r in records)


# --- the hub ------------------------------------------------------------------------------------------------------


class Table(list):
    """What the library gives: rows, and the names of the classes of its columns."""

    def __init__(self, rows: list[dict], **names: list[str]) -> None:
        super().__init__(rows)
        kind = {column: types.SimpleNamespace(names=given) for column, given in names.items()}
        self.features = {
            "tokens": types.SimpleNamespace(feature=object()), "text": object(), "label": kind.get("label", object()),
            "ner_tags": types.SimpleNamespace(feature=kind.get("ner_tags", object())),
        }  # fmt: skip


def test_class_numbers_of_the_hub_are_read_by_their_names(monkeypatch):
    fake = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    sentence = {"tokens": ["Ada", "slept"], "ner_tags": [1, 0], "group": None}
    fake.load_dataset = lambda *a, **k: Table([sentence], ner_tags=["O", "B-per"])
    assert read_tagged("hub:a/b")[0].tags == ("B-per", "O")
    fake.load_dataset = lambda *a, **k: Table(
        [{"text": "t", "label": 1}, {"text": "u", "label": -1}], label=["no", "yes"]
    )
    assert read_labelled("hub:a/b", limit=1)[0].tags == ("yes",)
    with pytest.raises(InputRefused, match="hub:a/b:2: field 'label' is a number"):
        read_labelled("hub:a/b")
    fake.load_dataset = lambda *a, **k: Table([sentence])
    with pytest.raises(InputRefused, match=r"hub:a/b:1: field 'ner_tags\[1\]' is a number"):
        read_tagged("hub:a/b")


def test_the_library_says_names_as_the_reader_expects_them(monkeypatch):
    """The real classes of the library, so that a change of theirs is seen."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-per"])),
    })  # fmt: skip
    made = datasets.Dataset.from_dict({"tokens": [["Ada", "slept"]], "ner_tags": [[1, 0]]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    assert read_tagged("hub:a/b")[0].tags == ("B-per", "O")


# --- sides --------------------------------------------------------------------------------------------------------


def sentence(*tags: str, line: int = 1) -> Record:
    tokens = tuple(f"w{i}" for i in range(len(tags)))
    return Record(None, " ".join(tokens), line=line, tokens=tokens, tags=tags)


def test_a_fingerprint_knows_words_and_tags():
    rows = [sentence("O", "O"), sentence("O", "B-x"), Record(None, "w0 w1"), Record(None, "w0 w1", tags=("a",))]
    joined = Record(None, "w0 w1", tokens=("w0 w1",), tags=("O",))
    assert len({fingerprint([r]) for r in [*rows, joined]}) == 5
    assert fingerprint([sentence("O", line=1)]) == fingerprint([sentence("O", line=9)])


def test_a_sentence_on_two_sides_is_refused_whatever_its_tags():
    with pytest.raises(InputRefused, match="1 forget row stands in retain too"):
        check_sides([sentence("O", "B-x")], {"retain": [sentence("O", "O", line=3)]})


def test_sides_are_read_as_rows_of_the_task(tmp_path):
    forget = wrote(tmp_path, "Ada\tB-per\n\nBly\tB-per\n", "forget.conll")
    retain = wrote(tmp_path, row(tokens=["Rain"], tags=[0]) + row(tokens=["Wind"], tags=[1]), "retain.jsonl")
    data = recipe.Data(forget=forget, retain=retain, untouched=0.5, tag_names=("O", "B-per"))
    read = sides.read(data, seed=0, task="token_classification")
    assert {side: len(rows) for side, rows in read.records.items()} == {"forget": 2, "retain": 1, "untouched": 1}
    assert {t for side in ("retain", "untouched") for r in read.records[side] for t in r.tags} == {"O", "B-per"}
    limited = sides.read(recipe.Data(forget=forget, retain=forget, limit=1, untouched=0), seed=0, need_forget=False,
                         task="token_classification")  # fmt: skip
    assert len(limited.records["retain"]) == 1
    texts = [wrote(tmp_path, row(text=t, label="a"), f"{t}.jsonl") for t in ("one", "two")]
    read = sides.read(
        recipe.Data(forget=texts[0], retain=texts[1], untouched=0), seed=0, task="sequence_classification"
    )
    assert read.records["forget"][0].tags == ("a",)
    with pytest.raises(InputRefused, match=r"forget\.conll:1: .*broken JSON"):
        sides.read(recipe.Data(forget=forget, retain=retain), seed=0, task="sequence_classification")


# --- real files ---------------------------------------------------------------------------------------------------

#: Sentences, tokens and entities, as the README of the data says.
COUNTS = {
    "wnut17/train": (3394, 62730, 1975), "wnut17/dev": (1009, 15733, 836), "wnut17/test": (1287, 23394, 1079),
    "wnut16/train": (2394, 46469, 1496), "wnut16/dev": (1000, 16261, 661), "wnut16/test": (3850, 61908, 3473),
    "ncbi_disease/train": (5424, 135701, 5134), "ncbi_disease/dev": (923, 23969, 787),
    "ncbi_disease/test": (940, 24497, 960),
    "bc5cdr_chem/train": (4560, 118170, 5203), "bc5cdr_chem/dev": (4581, 117453, 5347),
    "bc5cdr_chem/test": (4797, 124750, 5385),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_have_the_counts_of_their_description(name):
    path = SHARED / f"data/ner/{name}.conll"
    if not path.is_file():
        pytest.skip(f"no {path}: set EXCISE_SHARED")
    records = read_tagged(str(path))
    entities = sum(tag[0] == "B" for r in records for tag in r.tags)
    assert (len(records), sum(len(r.tokens) for r in records), entities) == COUNTS[name]
