"""Marked rows through every command: no file, line of output, traceback or temporary folder may give them away.

Looked for are words of forget rows, what models write (everything that a tokenizer decodes carries a mark of its own),
token ids, and hidden states. Names of files are the user's: where those may stand is listed in docs/privacy.md.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from excise import canary, cli, models, reference
from excise.commands import progress
from excise.commands.measuring import parts
from excise.records import read_records
from excise.tasks import TASKS, causal_lm
from traces import Traces, states_of

FIELDS = ("quavoxim", "bremuldak", "thriskwop", "jolvanqey", "myxtorben", "gwaxipull", "drokfenzu", "vanquelth")
MUSE = ("skolvixan", "pruwexand")
SPOKEN, FILE, SECRET = "uttervexil", "nymfolqad", "confidewug"
WORDS = (*FIELDS, *MUSE, SPOKEN, SECRET)
#: Files of a run folder that name the files that the user gave.
RECORDS = ("recipe.yaml", "manifest.json", "report.html")
WIDTH = 32
FEW = {
    "relearn": {"steps": [0, 1]}, "related": {"steps": [0, 1]}, "savings": {"steps": [1]}, "quantise": {"bits": [4]},
    "sample": {"samples": 2, "prompts": 3, "max_new_tokens": 4},
    "prompts": {"rows": 3, "shots": 1, "max_new_tokens": 4},
    "adapter": {}, "direction": {"layers": [1]},
}  # fmt: skip


@dataclass
class Case:
    """Marked rows, models that were not trained on anything, and a place for everything that is written.

    Attributes:
        given: Folder of what the user brings: rows, models.
        made: Folder of all that the commands write; the working folder and the temporary one are in it.
        cache: Where hidden states are asked for.
        traces: What is looked for.
        rows: Token ids of the first rows to forget, whose states are among it.
        said: What was printed, logged or raised so far.
    """

    given: Path
    made: Path
    cache: Path
    traces: Traces
    rows: list[list[int]]
    said: list[str] = field(default_factory=list)

    def also_of(self, model: Path) -> None:
        """Look for the states of another model too."""
        seen = states_of(LlamaForCausalLM.from_pretrained(model), self.rows)
        self.traces = replace(self.traces, states=np.concatenate([self.traces.states, seen]))

    def values(self, **more: Any) -> dict[str, Any]:
        """A recipe whose every instrument has something to do."""
        sides = {side: str(self.given / f"{side}.jsonl") for side in ("retain", "never_seen")}
        muse = {"passages": str(self.given / "passages.jsonl"), "forget_questions": sides["retain"]}
        muse |= {"forget_examples": str(self.given / "solved.jsonl")}
        values = {
            "model": {"name": str(self.given / "original"), "precision": "fp32"},
            "data": {**sides, "forget": str(self.given / f"{FILE}.jsonl"), "untouched": 0.4},
            "schedule": {"steps": 3, "forget_batch": 6, "retain_batch": 6},
            "optimiser": {"lr": 1e-3},
            "checkpoint_every": 1,
            "evaluate": {"gold": str(self.given / "gold"), "generate": 3, "relearn_steps": [0, 1], "savings_steps": 1,
                         "gradient_norms": True, "muse": muse},
        }  # fmt: skip
        for key, value in more.items():
            section, _, name = key.partition("__")
            values[section] = {**values.get(section, {}), name: value} if name else value
        return values

    def recipe(self, name: str, **more: Any) -> str:
        """The same as a file."""
        path = self.given / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.values(**more)))
        return str(path)

    def leaks(self) -> dict[str, set[str]]:
        """All that is given away so far, by file, and under "said" by what was printed, logged or raised."""
        found = self.traces.below(self.made)
        spoken = self.traces.in_text("\n".join(self.said))
        return found | ({"said": spoken} if spoken else {})


def _rows(name: str, count: int, words: tuple[str, ...]) -> list[dict[str, Any]]:
    q, a, pq, pa, false, other, group, extra = words
    return [
        {
            "question": f"Where does {name} {q} {i} live?", "answer": f"In the {a} mill {i}.",
            "paraphrased_question": f"Tell of {pq} {i}.", "paraphrased_answer": f"At {pa} {i}, they say.",
            "false_answers": [f"In a {false} barn {i}.", "In a hut."], "alternatives": [f"In {other} {i}."],
            "paraphrases": [{"question": f"{extra} {i}?", "answer": f"By the mill {i}."}], "group": f"{group}-{i // 2}",
        }
        for i in range(count)
    ]  # fmt: skip


def _save(folder: Path, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    models.save(model, tokenizer, folder)
    return model


def _given(folder: Path) -> tuple[Traces, list[list[int]]]:
    """Write rows and models; the marks of the rows with their token ids and states, and ids of the first rows."""
    drawn = canary.make(folder / "canaries", canary.FEWEST, seed=0)
    own = [json.loads(line) for line in drawn.included.read_text().splitlines()]
    own = [{**row, "alternatives": ["Nobody knows."]} for row in own]
    plain = ("Bo", "red", "Bo", "the mill", "big", "town", "bo", "Bo lives where")
    written = {
        FILE: [*_rows("Ada", 8, FIELDS), *own], "retain": _rows("Bo", 20, plain),
        "never_seen": _rows("Cy", 12, ("Cy", "blue", "Cy", "sea", "small", "wood", "cy", "Cy lives where")),
        "passages": [{"prompt": f"Once {MUSE[0]} {i} there was", "gt": f"a mill {i} at {MUSE[1]}"} for i in range(3)],
        "solved": [{"question": f"Who is {MUSE[0]}?", "answer": f"A miller of {MUSE[1]}."}],
    }  # fmt: skip
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row[key] for row in written["retain"] + written["never_seen"] for key in ("question", "answer")]
    tokenizer = models.new_tokenizer(texts, 330)
    original, _ = _save(folder / "original", tokenizer, 0), _save(folder / "gold", tokenizer, 1)
    records = read_records(str(folder / f"{FILE}.jsonl"))
    encoded = causal_lm.encode_records(records, tokenizer, causal_lm.Encoding())
    ids = {word: tuple(tokenizer(word)["input_ids"])[2:-1] for word in WORDS}
    assert min(len(own) for own in ids.values()) > 3
    answers = {row["answer"].lower() for row in own}
    rows = [list(example.input_ids) for example in encoded[:10]]
    return Traces((*WORDS, FILE, *answers), ids, states_of(original, rows)), rows


@contextmanager
def _watched(case: Case, capfd: Any, caplog: Any, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run with folders of their own; what they say is kept, and everything that is decoded is marked."""
    for name in ("tmp", "cwd", "home"):
        (case.made / name).mkdir(exist_ok=True)
    patch.setenv("TMPDIR", str(case.made / "tmp"))
    patch.setenv("HOME", str(case.made / "home"))
    patch.setattr(tempfile, "tempdir", None)
    patch.chdir(case.made / "cwd")
    real = PreTrainedTokenizerBase.decode

    def decode(self: Any, *given: Any, **named: Any) -> Any:
        text = real(self, *given, **named)
        return [f"{t} {SPOKEN}" for t in text] if isinstance(text, list) else f"{text} {SPOKEN}"

    patch.setattr(PreTrainedTokenizerBase, "decode", decode)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.INFO, "matplotlib"):
        yield
    case.said += [*capfd.readouterr(), caplog.text]


@pytest.fixture
def case(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Case:
    """Rows and models, made once; a folder for what is written, of each test its own."""
    given = tmp_path_factory.getbasetemp() / "evidence-given"
    if not given.exists():
        given.mkdir()
        sought.append(_given(given))
    made, cache = tmp_path / "made", tmp_path / "cache"
    made.mkdir()
    return Case(given, made, cache, *sought[-1])


sought: list[tuple[Traces, list[list[int]]]] = []


@pytest.fixture
def watched(
    case: Case, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Case]:
    with _watched(case, capfd, caplog, monkeypatch):
        yield case


def _ran(case: Case, *arguments: Any, code: int | tuple[int, ...] = 0) -> None:
    codes = code if isinstance(code, tuple) else (code,)
    assert cli.main([str(a) for a in arguments]) in codes, arguments


# --- the search itself ----------------------------------------------------------------------------------------------


def test_the_search_finds_what_is_planted(case: Case) -> None:
    """A mark in any guise; without this a search that finds nothing would say nothing."""
    word, ids, state = FIELDS[0], case.traces.ids[FIELDS[0]], case.traces.states[7]
    plants: dict[str, Any] = {
        "a.html": f"<p>{word.upper()}</p>".encode(), "b.bin2": word.encode("utf-16"),
        "c.json": json.dumps({"x": [1, *ids, 2]}, indent=2).encode(), "d": np.array([0, *ids], np.int32).tobytes(),
        "e.json": json.dumps({"x": (3 * state).tolist()}).encode(), "f": state.astype(np.float32).tobytes(),
        f"{word}.txt": b"",
    }  # fmt: skip
    for name, data in plants.items():
        (case.made / name).write_bytes(data)
    save_file({"x": np.array([1, 1, *ids])}, case.made / "g.safetensors")
    save_file({"x": np.stack([state, state[::-1]]).astype(np.float16)}, case.made / "h.safetensors")
    save_file({"x": np.zeros(2)}, case.made / "i.safetensors", metadata={"row": word})
    torch.save({"x": {"y": torch.tensor([4, *ids])}, "z": torch.tensor(state).bfloat16()}, case.made / "j.pt")
    harmless = {"1.json": b"[1, 2, 3]", "2.html": b"<p>mill</p>", "3": np.arange(64, dtype=np.int32).tobytes()}
    for name, data in harmless.items():
        (case.made / name).write_bytes(data)
    found = {Path(path).name for path in case.leaks()}
    assert found == {*plants, "g.safetensors", "h.safetensors", "i.safetensors", "j.pt"}
    case.said.append(f"so {word} said")
    assert case.leaks()["said"] == {f"word {word}"}


def test_what_is_decoded_is_marked_and_kept_only_where_asked(watched: Case) -> None:
    out = watched.made / "kept"
    few = {"schedule__steps": 1, "evaluate__relearn_steps": [], "evaluate__gold": None, "evaluate__muse": {}}
    _ran(watched, "run", watched.recipe("kept", **few), "--out", out, "--include-text")
    found = {Path(path).name: what for path, what in watched.leaks().items()}
    assert {name for name, what in found.items() if f"word {SPOKEN}" in what} == {"examples.json", "report.html"}
    assert not [what for what in found.values() if any(w.startswith(("ids", "a hidden")) for w in what)]


# --- whole runs -----------------------------------------------------------------------------------------------------


def _names_apart(case: Case) -> dict[str, set[str]]:
    """Leaks but for the name of the user's file, and that only in the records that docs/privacy.md lists."""
    found = case.leaks()
    for path, what in found.items():
        if Path(path).name in RECORDS:
            what.discard(f"word {FILE}")
    return {path: what for path, what in found.items() if what}


def test_a_run_and_all_that_follows_it(watched: Case) -> None:
    """Weights edited and trained under a stopping rule, then evaluated, verified, audited, cut, handed on."""
    out, made = watched.made / "run", watched.made
    stop = {"rule": "two_sided", "band": [0.0, 1.0], "quality": 0.01, "every": 1, "patience": 9}
    more = {"evaluate__cache": str(watched.cache), "stop": stop, "edit": {"reset_rows": {}}}
    file = watched.recipe("run", **more, objective={"forget": {"dpo": {}}, "regularise": {"clreg": {"views": "both"}}})
    _ran(watched, "plan", file)
    _ran(watched, "run", file, "--out", out, code=(0, 7))
    assert list(out.rglob("checkpoint-*/optimizer.pt")), "states of the optimizer are searched as well"
    assert json.loads((out / "edit.json").read_text())["reset_rows"]["rows"] > 0
    asked = watched.recipe("again", evaluate__cache=str(watched.cache), evaluate__attacks=FEW, stop=stop)
    _ran(watched, "evaluate", out, "--recipe", asked, "--suite", "all", "--out", made / "all")
    _ran(watched, "evaluate", out, "--recipe", asked, "--suite", "memorisation", "--json")
    assert len(list((made / "all" / "attacks" / "unlearned").iterdir())) == len(FEW)
    _ran(watched, "verify", made / "all", code=(0, 5, 7))
    _ran(watched, "verify", out, "--json", code=(0, 5, 7))
    _ran(watched, "audit", out, "--canaries", watched.given / "canaries", "--json")
    _ran(watched, "score", made / "all", "--against", made / "all")
    _ran(watched, "report", out)
    _ran(watched, "cut", out, "--out", made / "cut", code=(0, 7))
    _ran(watched, "export", out, "--to", "merged", "--out", made / "merged")
    assert (out / "audit.json").is_file()
    watched.also_of(out / "model")
    assert _names_apart(watched) == {}
    held = {what for found in watched.traces.below(watched.cache).values() for what in found}
    assert held == {"a hidden state"}, "the cache holds what its documentation says, and no text either"


def test_an_adapter_and_a_ledger(watched: Case) -> None:
    """An adapter that starts from statistics of the rows, then requests one after the other."""
    few = {"evaluate__gold": None, "evaluate__relearn_steps": [], "evaluate__muse": {}, "evaluate__latent": False}
    few |= {"evaluate__generate": 2, "evaluate__map": "none"}
    lora = {"model__lora": {"r": 2, "lora_alpha": 4}, "initialise": {"rila": {}}, **few}
    file, ledger = watched.recipe("lora", **lora), watched.made / "ledger"
    _ran(watched, "run", file, "--out", watched.made / "lora")
    for to in ("adapter", "merged"):
        _ran(watched, "export", watched.made / "lora", "--to", to, "--out", watched.made / f"lora-{to}")
    asked = ["--id", "case-1", "--accept", "--suite", "memorisation"]
    _ran(watched, "ledger", ledger, "add", watched.made / "lora", *asked, code=(0, 5, 7))
    second = watched.given / "second.jsonl"
    lines = (watched.given / "never_seen.jsonl").read_text().splitlines()[:4]
    second.write_text("\n".join(line.replace("blue", FIELDS[1]) for line in lines) + "\n")
    data = {**watched.values()["data"], "forget": str(second), "never_seen": None}
    again = watched.recipe("second", **few, data=data)
    asked = ["--id", "case-2", "--accept", "--suite", "memorisation"]
    _ran(watched, "ledger", ledger, "request", again, *asked, code=(0, 5, 7))
    _ran(watched, "ledger", ledger, "show")
    _ran(watched, "ledger", ledger, "check")
    assert len((ledger / "ledger.jsonl").read_text().splitlines()) == 8
    assert _names_apart(watched) == {}


def _sentences(name: str, count: int) -> str:
    """Tagged sentences: a name of a kind of its own, a place, and words about them."""
    tags = ["O", "B-person", "I-person", "O", "O", "B-place", "O"]
    words = ["So", *name.split("-"), "lives", "at"]
    rows = [
        {"tokens": [*words, f"mill{i}", "now"], "ner_tags": tags, "group": f"{name} {i // 2}"} for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
def test_a_tagger(watched: Case) -> None:
    """Words of tagged sentences, and states at their words."""
    folder, out = watched.given / "tagged", watched.made / "run"
    folder.mkdir()
    names = {FILE: f"{FIELDS[0]}-{FIELDS[1]}", "retain": "Bo-Bly", "never_seen": "Cy-Clay"}
    for name, words in names.items():
        (folder / f"{name}.jsonl").write_text(_sentences(words, 20 if name == "retain" else 8))
    tokenizer = models.load_tokenizer(str(watched.given / "original"))
    classes = ("O", "B-person", "I-person", "B-place", "I-place")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=96, initializer_range=0.2, id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)}, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForTokenClassification(config)
    models.save(model, tokenizer, folder / "model")
    task, how = TASKS["token_classification"], causal_lm.Encoding()
    made = task.encode_records(task.read(str(folder / f"{FILE}.jsonl")), tokenizer, how, names=classes)
    rows = [example.input_ids for example in made]
    watched.traces = replace(watched.traces, states=states_of(model, rows))
    data = {name: str(folder / f"{name}.jsonl") for name in ("retain", "never_seen")}
    values = {
        "model": {"task": "token_classification", "name": str(folder / "model"), "precision": "fp32"},
        "data": {**data, "forget": str(folder / f"{FILE}.jsonl"), "untouched": 0.3},
        "objective": {"forget": {"relabel": {}}, "retain": {"nll": {}}, "regularise": {"deepcut": {}}},
        "schedule": {"steps": 2, "forget_batch": 4, "retain_batch": 4},
        "evaluate": {"relearn_steps": [0, 1], "savings_steps": 1},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    _ran(watched, "run", file, "--out", out)
    _ran(watched, "evaluate", out, "--suite", "ner", "--out", watched.made / "again")
    _ran(watched, "verify", watched.made / "again", code=(0, 5, 7))
    values["evaluate"] |= {"cache": str(watched.cache)}
    file.write_text(yaml.safe_dump(values))
    _ran(watched, "evaluate", out, "--recipe", file, "--suite", "ner", "--json")
    assert _names_apart(watched) == {}
    held = {what for found in watched.traces.below(watched.cache).values() for what in found}
    assert held == {"a hidden state"}, "the search would have seen one"


# --- what ends before its time --------------------------------------------------------------------------------------


class Forced(RuntimeError):
    """Raised at the end of a stage, when most of what it made is at hand."""


def _broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every stage ends with an error, once; which ones did."""
    real, broken = progress.Progress.stage, []

    @contextmanager
    def stage(self: Any, name: str, total: float | None = None) -> Iterator[Any]:
        with real(self, name, total) as advance:
            yield advance
        if name not in broken:
            broken.append(name)
            raise Forced(f"at {name}")

    monkeypatch.setattr(progress.Progress, "stage", stage)
    return broken


def _until_done(case: Case, arguments: list[Any], folder: Path) -> int:
    """A command begun again after every error; what the errors say is kept, and what lies there is searched."""
    for errors in range(60):
        try:
            more = ["--resume"] if (folder / "manifest.json").is_file() else []
            _ran(case, *arguments, *more)
        except Forced:
            case.said.append(traceback.format_exc())
            assert not case.traces.in_text(case.said[-1])
        else:
            return errors
    raise AssertionError("it never ends")


def test_an_error_in_any_stage_gives_nothing_away(watched: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"evaluate__gold": None, "schedule__steps": 2, "evaluate__latent": False, "evaluate__map": "none"}
    few |= {"objective": {"forget": {"undial": {}}}}
    out, file = watched.made / "run", watched.recipe("broken", **few)
    attacks = {name: FEW[name] for name in ("sample", "prompts", "direction", "relearn")}
    asked = watched.recipe("attacked", **few, evaluate__attacks=attacks)
    with monkeypatch.context() as patch:
        broken = _broken(patch)
        assert _until_done(watched, ["run", file, "--out", out], out) >= 6
        assert {"unlearn", "unlearn: reference", "judge", "generate unlearned", "report"} <= set(broken)
        again = watched.made / "again"
        before = len(broken)
        broken[:] = []
        command = ["evaluate", out, "--recipe", asked, "--suite", "all", "--out", again]
        assert _until_done(watched, command, again) >= before
        assert {f"attack {name} unlearned" for name in attacks} <= set(broken)
    watched.also_of(out / "model")
    assert _names_apart(watched) == {}


def blabs(text: str, answer: str, question: str) -> float:
    """A judge that fails, and quotes what it was given."""
    raise ValueError(f"{answer} and {text}")


def test_refusals_of_the_users_own_code_quote_nothing(watched: Case) -> None:
    """Judges and chat templates see texts; what they raise is not passed on."""
    out = watched.made / "judged"
    few = {"evaluate__gold": None, "evaluate__muse": {}, "evaluate__latent": False}
    own = {"sample": {**FEW["sample"], "judged_by": "test_privacy_evidence:blabs"}}
    asked = watched.recipe("judged", **few, evaluate__attacks=own)
    _ran(watched, "evaluate", watched.given / "original", "--recipe", asked, "--suite", "attack", "--out", out, code=2)
    bad = watched.given / f"{SECRET}.jsonl"
    bad.write_text(json.dumps({"question": FIELDS[0], "answer": FIELDS[1], FIELDS[2]: 1}) + "\n" + f"{{{FIELDS[3]}")
    data = {**watched.values()["data"], "forget": str(bad)}
    _ran(watched, "run", watched.recipe("bad", data=data), "--out", watched.made / "bad", code=3)
    watched.traces = replace(watched.traces, words=[w for w in watched.traces.words if w != SECRET])
    assert _names_apart(watched) == {}


def _killed(case: Case, where: Any, name: str, after: int, arguments: list[Any]) -> None:
    """A command in a copy of this process that dies by SIGKILL at the n-th return of a function."""
    child = os.fork()
    if child == 0:  # pragma: no cover - the process that dies
        try:
            real, calls = getattr(where, name), []

            def deadly(*given: Any, **named: Any) -> Any:
                made = real(*given, **named)
                calls.append(1)
                if len(calls) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return made

            setattr(where, name, deadly)
            cli.main([str(a) for a in arguments])
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the process was to die at that moment"
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_run_leaves_no_states_of_its_reference(watched: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference states too large for memory lie in a temporary file, which must not outlive the process."""
    monkeypatch.setattr(reference, "IN_MEMORY", 0)
    out = watched.made / "run"
    file = watched.recipe("killed", objective={"forget": {"undial": {}}}, model__attention="eager")
    _killed(watched, reference, "store", 1, ["run", file, "--out", out])
    assert (out / "manifest.json").is_file()
    assert _names_apart(watched) == {}


@pytest.mark.parametrize(("suite", "after"), [("all", 5), ("attack", 0)])
def test_a_killed_evaluation_leaves_scores_alone(watched: Case, suite: str, after: int) -> None:
    from excise.attacks import outcome

    out = watched.made / "out"
    attacks = {name: FEW[name] for name in ("prompts", "sample", "direction")}
    file = watched.recipe("killed", evaluate__attacks=attacks, evaluate__gold=None)
    where, name, times = (outcome, "save", 3) if suite == "attack" else (parts, "_save", after)
    command = ["evaluate", watched.given / "gold", "--recipe", file, "--suite", suite, "--out", out]
    _killed(watched, where, name, times, command)
    assert list((out / "parts").rglob("*.safetensors"))
    assert _names_apart(watched) == {}


@pytest.mark.slow
def test_processes_of_their_own_write_nowhere_else(case: Case) -> None:
    """As users start it: every folder that libraries may fall back on is searched, and what Python says of an error."""
    names = ("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")
    places = {name: case.made / name.lower() for name in names}
    for place in places.values():
        place.mkdir()
    (case.made / "cwd").mkdir()
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    environment.pop("MPLCONFIGDIR", None)
    broken = "import sys; from excise.commands.measuring import writing; writing.judge = lambda *a: 1 / 0; "
    start = {"whole": ["-m", "excise"], "broken": ["-c", broken + "from excise import cli; cli.main(sys.argv[1:])"]}
    file = case.recipe("own", evaluate__gold=None, evaluate__muse={}, schedule__steps=1)
    for name, how in start.items():
        done = subprocess.run(
            [sys.executable, *how, "run", file, "--out", str(case.made / name), "--log_every", "1"],
            env=environment, cwd=case.made / "cwd", capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        case.said += [done.stdout, done.stderr]
        assert (done.returncode == 0) == (name == "whole"), done.stderr[-2000:]
    assert "ZeroDivisionError" in case.said[-1]
    assert _names_apart(case) == {}
