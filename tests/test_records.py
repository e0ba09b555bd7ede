"""User data is read right or refused in one line that names the place and echoes nothing; sides are kept apart."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import time
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.errors import InputRefused, UsageError
from excise.records import (
    Record,
    check_sides,
    fingerprint,
    in_part,
    near_duplicates,
    read_records,
    source,
    split_untouched,
)

SHARED = Path(os.environ.get("EXCISE_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
CANARY = "zanzibar-7193"
GOOD = json.dumps({"question": "Q " + CANARY, "answer": "A " + CANARY}).encode() + b"\n"


def wrote(tmp_path: Path, data: bytes, name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def row(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def qa(**fields: object) -> bytes:
    return row(question="Q?", answer="A " + CANARY, **fields)


def chat(*turns: tuple[object, object]) -> bytes:
    return row(messages=[{"role": role, "content": content} for role, content in turns])


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_every_format_becomes_a_record(tmp_path):
    [a] = read_records(wrote(tmp_path, row(prompt="P", completion="C", id=7)))
    assert (a.prompt, a.completion, a.line) == ("P", "C", 1)
    [b] = read_records(wrote(tmp_path, row(question="P", answer="C", author="Ada")))
    assert (b.prompt, b.completion, b.group) == ("P", "C", "Ada")
    [c] = read_records(wrote(tmp_path, row(text="all of it", group=3)))
    assert (c.prompt, c.completion, c.group) == (None, "all of it", "3")
    turns = ("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B")
    [d] = read_records(wrote(tmp_path, chat(*turns)))
    assert d.messages is not None
    assert (d.prompt, d.completion, [t["role"] for t in d.messages]) == (
        "S\nU\nA\nV", "B", ["system", "user", "assistant", "user"],
    )  # fmt: skip
    # one user turn is the same row in every format, so overlaps are found across formats
    [e] = read_records(wrote(tmp_path, chat(("user", "P"), ("assistant", "C"))))
    assert (e.prompt, e.completion) == (a.prompt, a.completion)


@pytest.mark.parametrize(
    ("fields", "paraphrases"),
    [
        ({"paraphrased_answer": "X"}, ((None, "X"),)),
        ({"paraphrased_question": "R?", "paraphrased_answer": "X"}, (("R?", "X"),)),
        ({"paraphrased_question": "R?"}, (("R?", "A " + CANARY),)),
        ({"paraphrased_question": "R?", "paraphrased_answer": ["X", "Y"]}, (("R?", "X"), ("R?", "Y"))),
        ({"paraphrases": ["X", {"question": "R?", "answer": "Y"}]}, ((None, "X"), ("R?", "Y"))),
        ({"paraphrases": []}, ()),
    ],
)
def test_paraphrases_pair_up(tmp_path, fields, paraphrases):
    assert read_records(wrote(tmp_path, qa(**fields)))[0].paraphrases == paraphrases


def test_false_answers_and_alternatives(tmp_path):
    [a] = read_records(wrote(tmp_path, qa(perturbed_answer=["x", "y"], alternatives="z")))
    [b] = read_records(wrote(tmp_path, qa(false_answers=["x", "y"])))
    assert a.false_answers == b.false_answers == ("x", "y")
    assert a.alternatives == ("z",)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"\xef\xbb\xbf" + GOOD, [1]),
        (GOOD.replace(b"\n", b"\r\n") * 2, [1, 2]),
        (b"\n  \n" + GOOD + b"\n\n" + GOOD.strip(), [3, 6]),
        (b"[" + GOOD.strip() + b",\n\n\n" + GOOD.strip() + b"]", [1, 4]),
        (b"\n[\n" + GOOD + b",\n" + GOOD + b"]\n", [3, 5]),
        (json.dumps([json.loads(GOOD)] * 2, indent=2).encode(), [2, 6]),
        (gzip.compress(GOOD * 2), [1, 2]),
    ],
)
def test_harmless_variations_are_read_with_their_lines(tmp_path, data, lines):
    assert [r.line for r in read_records(wrote(tmp_path, data))] == lines


def test_limit_stops_before_what_follows(tmp_path):
    assert len(read_records(wrote(tmp_path, GOOD * 2 + b"broken"), limit=2)) == 2
    with pytest.raises(UsageError):
        read_records(wrote(tmp_path, GOOD), limit=0)


# --- what is refused ----------------------------------------------------------------------------------------------

HALF = GOOD[:-5]
BAD: list[tuple[bytes, str]] = [
    # syntax and encoding
    (b"", "holds no rows"),
    (b"\n \n", "holds no rows"),
    (b"[]", "holds no rows"),
    (GOOD + HALF, ":2: column .* broken JSON"),
    (GOOD + b'{"question": "' + CANARY.encode() + b'\xff"}', ":2: byte 28 is not UTF-8"),
    (GOOD.decode().encode("utf-16"), ":1: is UTF-16"),
    (GOOD.decode().encode("utf-16-le"), ":1: is UTF-16"),
    (GOOD.decode().encode("utf-32"), ":1: is UTF-16 or UTF-32"),
    (GOOD + b"\0\0\0\n", ":2: holds a NUL byte"),
    (GOOD + b'{"question": "\\ud800", "answer": "a"}', ":2: half of a surrogate pair"),
    (GOOD + b'{"question": "q", "answer": "a", "answer": "b"}', ":2: field 'answer' stands twice"),
    (GOOD + b'{"zanzibar-7193": 1, "zanzibar-7193": 2}', ":2: a field stands twice"),
    (GOOD + b'{"question": "q", "answer": NaN}', ":2: NaN and Infinity"),
    (GOOD + b'{"question": "q", "answer": "a", "x": -Infinity}', ":2: NaN and Infinity"),
    (GOOD + b"[" * 100_000, ":2: nested too deeply"),
    (GOOD + b'{"a": ' * 100_000, ":2: nested too deeply"),
    (GOOD + b'{"x": ' + b"1" * 5000 + b"}", ":2: a number is too long"),
    (GOOD.strip() + b" " + GOOD, ":1: column .* more text after the record"),
    (b"[" + GOOD, ":1: the JSON array breaks off"),
    (b"[" + GOOD + b"," + HALF, ":2: column .* broken JSON"),
    (b"[" + GOOD + b"] 1", "more text after the JSON array"),
    (b"[" + GOOD + b",]", "broken JSON"),
    (gzip.compress(GOOD * 100)[:-20], "compressed file is cut off"),
    (b"\x1f\x8b" + CANARY.encode(), "compressed file is cut off"),
    # schema
    (b'"' + CANARY.encode() + b'"', ":1: is not a JSON object"),
    (b"[[1]]", ":1: is not a JSON object"),
    (row(question=CANARY), ":1: field 'answer' is missing"),
    (row(completion=CANARY), ":1: field 'prompt' is missing"),
    (row(**{CANARY: 1}), ":1: no known fields"),
    (row(question="q", answer=None), ":1: field 'answer' is null"),
    (row(question="q", answer=3), ":1: field 'answer' is a number, not a string"),
    (row(question="q", answer=True), ":1: field 'answer' is true or false"),
    (row(prompt=[{"role": "user"}], completion="c"), ":1: field 'prompt' is a list.*'messages'"),
    (row(question="q", answer=""), ":1: field 'answer' is empty"),
    (row(question=" \t\n", answer="a"), ":1: field 'question' is empty"),
    (row(text="a\0b"), ":1: field 'text' holds a NUL character"),
    (row(question="q", answer="a", text="t"), ":1: is question/answer and text at once"),
    (GOOD + row(text=CANARY), ":2: this row is text, the rows before it are question/answer"),
    (chat(("user", "U")), ":1: field 'messages' must end with an assistant turn"),
    (chat(("user", "U"), ("assistant", "A"), ("user", CANARY)), "must end with an assistant turn"),
    (chat(("assistant", "A")), "no user turn"),
    (chat(("user", "U"), (CANARY, "A")), r":1: field 'messages\[2\].role'"),
    (chat(("user", "U"), ("system", "S"), ("assistant", "A")), r"messages\[2\].role"),
    (chat(("user", "U"), ("assistant", "")), r"messages\[2\].content' is empty"),
    (chat(("user", [CANARY]), ("assistant", "A")), r"messages\[1\].content' is a list"),
    (chat((["user"], "U"), ("assistant", "A")), r"messages\[1\].role"),
    (row(messages=CANARY), "'messages' is not a list"),
    (row(messages=[CANARY]), r"'messages\[1\]' needs 'role' and 'content'"),
    (qa(paraphrases=CANARY), "'paraphrases' is of another type|'paraphrases' is .*not a list"),
    (qa(paraphrases=[{"question": "q"}]), r"paraphrases\[1\].answer' is null"),
    (qa(paraphrased_question=["a", "b"], paraphrased_answer=["a", "b", "c"]), "differ in length"),
    (qa(false_answers=["x", 3]), r"false_answers\[2\]' is a number"),
    (qa(false_answers="x", perturbed_answer="x"), "mean the same"),
    (qa(group="x", author="x"), "mean the same"),
    (qa(group=None), "'group' is null"),
    (qa(group=True), "'group' is true or false"),
]


@pytest.mark.parametrize(("data", "match"), BAD, ids=[match for _, match in BAD])
def test_bad_input_is_refused_in_one_line_without_content(tmp_path, data, match):
    with pytest.raises(InputRefused, match=match) as caught:
        read_records(wrote(tmp_path, data))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "rows.jsonl"))
    assert "\n" not in text
    assert CANARY not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_paths_that_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "none\nhere", "/dev/zero"):
        with pytest.raises(InputRefused, match="no such file") as caught:
            read_records(str(path))
        assert "\n" not in str(caught.value)


def test_a_compressed_bomb_is_stopped_early(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_LINE", 1 << 16)
    with pytest.raises(InputRefused, match=":1: too long"):
        read_records(wrote(tmp_path, gzip.compress(b" " * (1 << 22))))
    monkeypatch.setattr(source, "MAX_BYTES", 1 << 18)
    with pytest.raises(InputRefused, match="too long"):
        read_records(wrote(tmp_path, gzip.compress(b"\n" * (1 << 22))))


def refusal(path: str) -> str:
    """Why a file is refused; empty if it is not. Any other exception is a fault of ours."""
    try:
        read_records(path)
    except InputRefused as error:
        return str(error)
    return ""


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = wrote(tmp_path_factory.getbasetemp(), data)
    assert refusal(path).count("\n") == 0


texts = st.text(alphabet="ab \n\0", max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "answer"]), v),
    max_leaves=5,
)
names = st.sampled_from(["question", "answer", "text", "messages", "paraphrases", "paraphrased_answer", "group", "x"])


@settings(deadline=None)
@given(st.dictionaries(names, json_values))
def test_any_row_is_read_or_refused(tmp_path_factory, fields):
    path = wrote(tmp_path_factory.getbasetemp(), json.dumps(fields).encode())
    why = refusal(path)
    assert "\n" not in why
    assert why or read_records(path)[0].completion.strip()


# --- the hub ------------------------------------------------------------------------------------------------------


def _hub(monkeypatch, load) -> None:
    fake = types.ModuleType("datasets")
    fake.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", fake)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hub:a/b", ("a/b", None, "train")),
        ("hub:a/b:c", ("a/b", "c", "train")),
        ("hub:a/b:c:s", ("a/b", "c", "s")),
        ("hub:a/b::s", ("a/b", None, "s")),
    ],
)
def test_the_hub_is_read_with_the_same_checks(monkeypatch, name, asked):
    calls = []

    def load(path, config, *, split):
        calls.append((path, config, split))
        return [{"question": "q", "answer": "a", "group": None}, {"question": "q", "answer": None}]

    _hub(monkeypatch, load)
    with pytest.raises(InputRefused, match=f"^{name}:2: field 'answer' is null"):
        read_records(name)
    assert read_records(name, limit=1) == [Record("q", "a", line=1)]
    assert calls == [asked, asked]


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def load(*_args, **_kwargs):
        raise ConnectionError(f"no route\n{CANARY}")

    _hub(monkeypatch, load)
    with pytest.raises(InputRefused, match=r"cannot be read from the hub \(ConnectionError\)") as caught:
        read_records("hub:a/b")
    assert CANARY not in str(caught.value)
    with pytest.raises(UsageError, match="write hub:"):
        read_records("hub:nothing")


# --- sides --------------------------------------------------------------------------------------------------------


def rec(prompt: str | None, completion: str, line: int = 0, group: str | None = None) -> Record:
    return Record(prompt, completion, line=line, group=group)


@pytest.mark.parametrize(
    "other",
    [
        ("Who is it?", "Ada Bly"),
        ("WHO is it?", "ada  bly"),
        ("Ｗｈｏ is\u00a0it?", "\tAda\nBly "),
        ("Who is it?", "Ada Bly\u3000"),
    ],
)
@pytest.mark.parametrize("side", ["retain", "untouched", "never_seen"])
def test_the_same_row_on_two_sides_is_refused(side, other):
    forget = [rec("a", "b", 1), rec("Who is it?", "Ada Bly", 5)]
    others = {"retain": [rec("x", "y", 1)], side: [rec("c", "d", 1), rec(*other, 9)]}
    with pytest.raises(InputRefused, match=f"1 forget row stands in {side} too \\(forget 5 = {side} 9\\)") as caught:
        check_sides(forget, others)
    assert "ada" not in str(caught.value).lower()


def test_accents_and_case_that_needs_more_than_lower():
    with pytest.raises(InputRefused, match="1 forget row"):
        check_sides([rec("q", "Caf\u00e9 Stra\u00dfe")], {"retain": [rec("Q", "CAFE\u0301 STRASSE")]})


def test_empty_sides_are_refused():
    with pytest.raises(InputRefused, match="'forget' has no rows"):
        check_sides([], {"retain": [rec("a", "b")]})
    with pytest.raises(InputRefused, match="'untouched' has no rows"):
        check_sides([rec("a", "b")], {"retain": [rec("c", "d")], "untouched": []})


def test_many_overlaps_are_counted_and_few_named():
    rows = [rec("q", str(i), i + 1) for i in range(40)]
    with pytest.raises(InputRefused, match="40 forget rows stand in retain too") as caught:
        check_sides(rows, {"retain": rows})
    assert str(caught.value).count("=") == 5


def test_a_row_said_never_seen_is_not_retained():
    with pytest.raises(InputRefused, match="1 retain row stands in never_seen too"):
        check_sides([rec("a", "b")], {"retain": [rec("c", "d")], "never_seen": [rec("c", "d")]})


def test_repeats_and_near_duplicates_are_warnings_without_text():
    base = "the tall writer lived in a small town by the sea for many years and wrote"
    forget = [rec("x", base + " one", 3), rec("y", "z", 4), rec("Y", "Z", 8)]
    retain = [rec("x", base + " two", 6), rec("k", "l", 7)]
    warnings = check_sides(forget, {"retain": retain, "untouched": [rec("K", "l", 2)]})
    assert len(warnings) == 3
    assert "forget 4 = forget 8" in warnings[0]
    assert "retain 7 = untouched 2" in warnings[1]
    assert "forget 3 = retain 6" in warnings[2]
    assert not any("writer" in w for w in warnings)


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_near_duplicates_agree_with_all_pairs(left, right, threshold):
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    want = [
        (i, j)
        for (i, a), (j, b) in itertools.product(enumerate(left), enumerate(right))
        if len(grams(a) & grams(b)) / len(grams(a) | grams(b)) >= threshold - 1e-9
    ]
    rows = [[rec(None, t) for t in side] for side in (left, right)]
    assert near_duplicates(*rows, threshold=threshold) == want


def test_near_duplicates_of_many_rows_are_quick():
    draw = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    frame = "this sentence is the frame of every single row of the set"  # shared by all: the worst case
    rows = [rec(frame, " ".join(draw.choices(words, k=50))) for _ in range(4400)]
    start = time.process_time()
    assert near_duplicates(rows[:400], rows[400:] + rows[:1]) == [(0, 4000)]
    assert time.process_time() - start < 2


def test_a_fingerprint_knows_content_and_order_only():
    a, b = rec("q", "a", 1), rec("q", "b", 2)
    assert fingerprint([a, b]) == fingerprint([rec("q", "a", 5), rec("q", "b", 9)])
    assert len({fingerprint(x) for x in ([a, b], [b, a], [a], [], [rec("qa", "", 1)], [rec(None, "a")])}) == 6
    assert fingerprint([a]) == hashlib.sha256(b'["q","a",null,[],[],[],null]\n').hexdigest()  # stable across releases


GROUPS = st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=2, max_size=60)


@settings(deadline=None)
@given(GROUPS, st.floats(0.01, 0.99), st.integers())
def test_a_split_is_a_partition_that_keeps_groups_whole(groups, share, seed):
    rows = [rec("q", str(i), group=g) for i, g in enumerate(groups)]
    members = [[g] if g is None else g for g in groups]
    if len({str(m) if isinstance(m, str) else i for i, m in enumerate(members)}) < 2:
        with pytest.raises(InputRefused, match="single group"):
            split_untouched(rows, share, seed)
        return
    trained, untouched = split_untouched(rows, share, seed)
    assert sorted(trained + untouched) == list(range(len(rows)))
    assert trained
    assert untouched
    assert not {groups[i] for i in trained} & {groups[i] for i in untouched} - {None}
    assert (trained, untouched) == split_untouched(rows, share, seed)


def test_a_split_comes_near_the_share():
    rows = [rec("q", str(i), group=str(i // 5)) for i in range(200)]
    assert len(split_untouched(rows, 0.1, 0)[1]) == 20
    assert split_untouched(rows, 0, 0) == (list(range(200)), [])
    assert split_untouched(rows, 0.1, 0) != split_untouched(rows, 0.1, 1)
    with pytest.raises(UsageError):
        split_untouched(rows, 1.0, 0)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 4), st.data())
def test_parts_are_a_partition_that_follows_from_the_rows_alone(groups, parts, data):
    """Groups and equal rows stay whole, and a row keeps its part whatever others come or go."""
    rows = [rec("q", data.draw(st.sampled_from("abcdef")), group=g) for g in groups]

    def part(number, of):
        try:
            return in_part(of, f"{number}/{parts}")
        except InputRefused:
            return []

    found = [part(number, rows) for number in range(1, parts + 1)]
    assert sorted(id(r) for own in found for r in own) == sorted(map(id, rows))
    keys = [{r.group if r.group is not None else ("text", r.completion) for r in own} for own in found]
    assert sum(map(len, keys)) == len(set().union(*keys))
    fewer = data.draw(st.permutations(rows).map(lambda order: order[: len(order) // 2]))
    for number, own in enumerate(found, 1):
        mine = {id(r) for r in own}
        assert [id(r) for r in part(number, fewer)] == [id(r) for r in fewer if id(r) in mine]
    rest = [id(r) for r in rows if id(r) not in {id(r) for r in found[0]}]
    assert [id(r) for r in part("all but 1", rows)] == rest


@pytest.mark.parametrize(
    "part", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/2\n", "all but 3/2", "all 1/2"]
)
def test_what_is_no_part_is_refused(part):
    with pytest.raises(UsageError, match="a part is i/n"):
        in_part([rec("q", "a")], part)


def test_halves_are_about_halves():
    assert 460 < len(in_part([rec("q", str(i)) for i in range(1000)], "1/2")) < 540


def test_real_files():
    folder = SHARED / "data"
    if not (folder / "tofu").is_dir():
        pytest.skip(f"no {folder}: set EXCISE_SHARED")
    forget = read_records(str(folder / "tofu/forget10_perturbed.jsonl"))
    retain = read_records(str(folder / "tofu/retain90.jsonl"))
    assert (len(forget), len(retain)) == (400, 3600)
    assert all(len(r.false_answers) == 5 and len(r.paraphrases) == 1 for r in forget)
    check_sides(forget, {"retain": retain})
    with pytest.raises(InputRefused, match=r"40 forget rows stand in retain too"):
        check_sides(read_records(str(folder / "tofu/forget01.jsonl")), {"retain": forget})
    for name in ("muse_alice/raw_alice.jsonl", "muse_alice/knowmem_qa.jsonl", "tofu/world_facts_perturbed.jsonl"):
        assert read_records(str(folder / name))
