"""Requests one after the other: what is left out, whose weights are taken, what is verified again and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import excise
import small_world
from excise import artifacts, cli, files, ledger, recipe
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.commands.successive import evidence
from excise.errors import InputRefused, IntegrityFailed, TrainingStopped, UsageError
from excise.records import fingerprint, read_records
from small_world import SmallWorld

QUIET = Progress(quiet=True)


@dataclass
class Fake:
    """Stands in for `excise.verify`: writes a verdict as it was told to, and notes what it was asked about."""

    outcomes: list[str] = field(default_factory=list)
    asked: list[Path] = field(default_factory=list)

    def __call__(self, folder: Path) -> None:
        self.asked.append(folder)
        outcome = self.outcomes.pop(0) if self.outcomes else "passed"
        if outcome == "killed":
            raise KeyboardInterrupt
        files.write_json(folder / "verdict.json", {"outcome": outcome, "asked": len(self.asked)})


@dataclass(frozen=True)
class Cases:
    """Two people to forget, one after the other, and a careless file of rows to keep that still holds the first."""

    small: SmallWorld
    folder: Path
    first: list[dict[str, Any]]
    second: list[dict[str, Any]]

    def settings(self, which: str, *, careless: bool = False, **changes: Any) -> recipe.Recipe:
        rows = self.first if which == "first" else self.second
        kept = small_world.rows(self.small.sides["retain"]) + (self.first if careless else [])
        name = f"{which}-{careless}"
        changes = {
            "data__forget": str(small_world.write(self.folder / f"forget-{name}.jsonl", rows)),
            "data__retain": str(small_world.write(self.folder / f"retain-{name}.jsonl", kept)),
            "schedule__steps": 2, "evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__map": "none",
            "evaluate__latent": False, "evaluate__gold": None, "evaluate__rewordings": False, **changes,
        }  # fmt: skip
        return self.small.recipe(**changes)


@pytest.fixture(scope="module")
def cases(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    rows = small_world.rows(small.sides["forget"])
    one, two = dict.fromkeys(row["group"] for row in rows)
    parts = [[row for row in rows if row["group"] == group] for group in (one, two)]
    return Cases(small, tmp_path_factory.mktemp("cases"), *parts)


@pytest.fixture(scope="module")
def after_two(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fake]:
    """A ledger with two requests carried out: copied by tests that change it."""
    folder, fake = tmp_path_factory.mktemp("ledger") / "l", Fake()
    common: dict[str, Any] = {"suite": "memorisation", "verify": fake, "progress": QUIET}
    excise.request(folder, cases.settings("first"), name="case-1", received="2026-03-01", **common)
    excise.request(folder, cases.settings("second", careless=True), name="case-2", **common)
    return folder, fake


@pytest.fixture
def own(after_two: tuple[Path, Fake], tmp_path: Path) -> Path:
    """A ledger of a test's own; recipes in it still name the first one's files, which are the same."""
    return Path(shutil.copytree(after_two[0], tmp_path / "l"))


def events(folder: Path) -> list[str]:
    return [e["event"] for e in ledger.read(folder)]


def test_two_requests_make_a_chain_of_weights(after_two: tuple[Path, Fake], cases: Cases) -> None:
    folder, fake = after_two
    assert events(folder) == ["opened", "received", "begun", "ended", "received", "begun", "ended", "reverified"]
    first, second = [e for e in ledger.read(folder) if e["event"] == "ended"]
    begun = [e for e in ledger.read(folder) if e["event"] == "begun"]
    assert begun[0]["parent"]["sha256"] == evidence.weights(str(cases.small.original))
    assert begun[1]["parent"] == first["child"]
    assert first["child"]["sha256"] == evidence.weights(str(folder / "requests/case-1/model"))
    assert second["child"]["name"] == "requests/case-2/model"
    assert [e["recipe"] for e in begun] == [first["recipe"], second["recipe"]], "fixed before the run, and what was run"
    assert recipe.load(str(folder / "requests/case-2/recipe.yaml")).model.name == str(folder / "requests/case-1/model")
    assert [p.relative_to(folder).as_posix() for p in fake.asked] == [
        "requests/case-1", "requests/case-2", "again/0007/case-1"
    ]  # fmt: skip
    again = ledger.read(folder)[-1]
    assert (again["request"], again["on"], again["model"]) == ("case-1", 7, second["child"]["sha256"])
    assert again["numbers"]["forget_probability"] > 0


def test_what_was_forgotten_is_left_out_of_what_is_kept(after_two: tuple[Path, Fake], cases: Cases) -> None:
    """The careless file holds ten rows of the first request; the second run must not have read them."""
    folder, _ = after_two
    ended = [e for e in ledger.read(folder) if e["event"] == "ended"]
    assert ended[0]["left_out"] == {}
    assert sum(ended[1]["left_out"].values()) == len(cases.first) == 10
    run = artifacts.RunFolder(folder / "requests/case-2")
    settings = recipe.load(str(run.recipe))
    assert settings.data.without == f"{folder}@4"
    given = sides.of(settings)
    assert given.sources == artifacts.read_manifest(run)["data"]
    texts = {r["answer"] for r in cases.first}
    assert not [s for s, rows in given.records.items() if texts & {r.completion for r in rows}]
    assert any("were left out" in warning for warning in artifacts.read_manifest(run)["warnings"])
    without = sides.of(recipe.changed(settings, {"data.without": None}))
    careless = [r for side in ("retain", "untouched") for r in without.records[side]]
    assert len([r for r in careless if r.completion in texts]) == 10, "the test would see it"
    kept = {side: [r for r in without.records[side] if r.completion not in texts] for side in ("retain", "untouched")}
    assert {s: fingerprint(rows) for s, rows in kept.items()} == {s: given.sources[s]["fingerprint"] for s in kept}, (
        "the split is that of all rows: a row that no step read before the request is read by none after it"
    )


def test_an_earlier_request_is_measured_again_with_its_own_rows(after_two: tuple[Path, Fake], cases: Cases) -> None:
    folder, _ = after_two
    out = artifacts.RunFolder(folder / "again/0007/case-1")
    settings = recipe.load(str(out.recipe))
    assert settings.data.without == f"{folder}@5"
    rows = read_records(settings.data.forget)
    assert [r.completion for r in rows] == [r["answer"] for r in cases.first]
    assert artifacts.read_results(out).models.keys() >= {"unlearned", "original"}
    own = artifacts.read_results(out).number("unlearned", "forget_probability").value
    direct = excise.evaluate(folder / "requests/case-2/model", suite="memorisation", recipe=settings, progress=QUIET)
    assert own == pytest.approx(direct["models"]["unlearned"]["forget_probability"]["value"], rel=1e-6)


def test_no_text_of_a_row_is_in_the_record(after_two: tuple[Path, Fake], cases: Cases) -> None:
    folder, _ = after_two
    text = (folder / ledger.NAME).read_text().casefold()
    words = {w.casefold() for row in cases.first + cases.second for w in (row["question"] + row["answer"]).split()}
    assert not [w for w in words if len(w) > 5 and w in text and w != "forget"]  # which is the name of a side
    ended = [e for e in ledger.read(folder) if e["event"] == "ended"]
    assert all("fingerprint" not in e["data"]["forget"] for e in ended), "a plain hash of few rows can be guessed at"


def test_weights_are_taken_over_when_the_verdict_is_passed(cases: Cases, tmp_path: Path) -> None:
    folder, fake = tmp_path / "l", Fake(["failed", "not shown", "not shown"])
    common: dict[str, Any] = {"suite": "memorisation", "verify": fake, "progress": QUIET}
    made = excise.request(folder, cases.settings("first"), name="a", **common)
    assert [e["event"] for e in made] == ["received", "begun", "ended"]
    assert (made[-1]["taken"], made[-1]["child"]) == (False, None)
    found = excise.show_ledger(folder)
    assert (found["model"], found["requests"][0]["carried_out"]) == (None, False)
    with pytest.raises(UsageError, match="other rows"):
        excise.request(folder, cases.settings("second"), name="a", **common)
    made = excise.request(folder, cases.settings("first", schedule__steps=3), name="a", accept=True, **common)
    assert [e["event"] for e in made] == ["begun", "ended"], "received once"
    assert (made[-1]["taken"], made[-1]["accepted"], made[-1]["attempt"]) == (True, True, "a-2")
    assert excise.show_ledger(folder)["model"] == str(folder / "requests/a-2/model")
    with pytest.raises(UsageError, match="carried out before"):
        excise.request(folder, cases.settings("first"), name="a", **common)


def test_a_killed_request_goes_on_where_it_was(cases: Cases, tmp_path: Path) -> None:
    folder, fake = tmp_path / "l", Fake(["killed", "passed", "passed", "killed"])
    common: dict[str, Any] = {"suite": "memorisation", "verify": fake, "progress": QUIET}
    with pytest.raises(KeyboardInterrupt):
        excise.request(folder, cases.settings("first"), name="a", **common)
    assert events(folder) == ["opened", "received", "begun"]
    with pytest.raises(UsageError, match="a: was begun and not ended"):
        excise.request(folder, cases.settings("second"), name="b", **common)
    with pytest.raises(IntegrityFailed, match="another recipe"):
        excise.request(folder, cases.settings("first", schedule__steps=5), resume=True, **common)
    weights = evidence.weights(str(folder / "requests/a/model"))
    made = excise.request(folder, cases.settings("first"), resume=True, **common)
    assert [e["event"] for e in made] == ["ended"]
    assert made[0]["child"]["sha256"] == weights, "nothing was trained twice"
    with pytest.raises(KeyboardInterrupt):  # while the first request is verified on the second's model
        excise.request(folder, cases.settings("second"), name="b", **common)
    assert events(folder)[-1] == "ended"
    assert not excise.show_ledger(folder)["requests"][0]["current"]
    assert [e["event"] for e in excise.reverify(folder, suite="memorisation", verify=fake, progress=QUIET)] == [
        "reverified"
    ]
    assert excise.reverify(folder, verify=fake, progress=QUIET) == [], "once for each model"
    assert all(row["current"] for row in excise.show_ledger(folder)["requests"])


def test_a_request_that_is_begun_anew(cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fake = tmp_path / "l", Fake(["killed"])
    common: dict[str, Any] = {"suite": "memorisation", "verify": fake, "progress": QUIET}
    with pytest.raises(KeyboardInterrupt):
        excise.request(folder, cases.settings("first"), name="a", **common)
    from excise.commands.successive import requests

    def stopped(*_: Any, **__: Any) -> None:
        raise TrainingStopped("a loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(requests, "run", stopped)
        with pytest.raises(TrainingStopped):
            excise.request(folder, cases.settings("first"), name="a", **common)
    assert [(e["status"], e["attempt"], e["taken"]) for e in ledger.read(folder) if e["event"] == "ended"] == [
        ("given up", "a", False), ("stopped", "a-2", False)
    ]  # fmt: skip
    made = excise.request(folder, cases.settings("first"), name="a", **common)
    assert (made[-1]["attempt"], made[-1]["taken"]) == ("a-3", True)


def test_an_adapter_becomes_a_whole_model_for_the_next(cases: Cases, tmp_path: Path) -> None:
    folder = tmp_path / "l"
    common: dict[str, Any] = {"suite": "memorisation", "verify": Fake(), "progress": QUIET}
    made = excise.request(folder, cases.settings("first", model__lora={"r": 4}), name="a", **common)
    assert made[-1]["child"]["name"] == "merged/a"
    assert not (folder / "merged/a/adapter_config.json").exists()
    excise.request(folder, cases.settings("second", model__lora={"r": 4}), name="b", **common)
    assert recipe.load(str(folder / "requests/b/recipe.yaml")).model.name == str(folder / "merged/a")
    assert excise.check_ledger(folder)["gone"] == []


# --- what is made elsewhere ---------------------------------------------------------------------------------------


def finetuned(cases: Cases, model: str, rows: list[dict[str, Any]], out: Path, **data: Any) -> Path:
    file = small_world.write(out.with_suffix(".jsonl"), rows)
    excise.finetune(
        recipe.build({
            "model": {"name": model, "precision": "fp32"},
            "data": {"retain": str(file), "untouched": 0, **data},
            "schedule": {"steps": 2, "retain_batch": 8}, "optimiser": {"lr": 1e-3}, "out": str(out),
        }),
        progress=QUIET,
    )  # fmt: skip
    return out


def test_other_training_is_entered_and_all_is_verified_on_it(own: Path, cases: Cases, tmp_path: Path) -> None:
    present = excise.show_ledger(own)["model"]
    new = small_world.rows(cases.small.sides["never_seen"])
    out = finetuned(cases, present, new, tmp_path / "new-people")
    fake = Fake(["failed", "passed"])
    made = excise.add_run(own, out, suite="memorisation", verify=fake, progress=QUIET)
    assert [(e["event"], e.get("request", e.get("update"))) for e in made] == [
        ("update", "new-people"), ("reverified", "case-1"), ("reverified", "case-2")
    ]  # fmt: skip
    assert [(e["before"], e["verdict"]["outcome"]) for e in made[1:]] == [("passed", "failed"), ("passed", "passed")]
    found = excise.show_ledger(own)
    assert found["model"] == str(out / "model")
    assert [row["now"] for row in found["requests"]] == ["failed", "passed"]


def test_training_that_taught_a_forgotten_row_again_is_refused(own: Path, cases: Cases, tmp_path: Path) -> None:
    present = excise.show_ledger(own)["model"]
    new = small_world.rows(cases.small.sides["never_seen"])
    before = (own / ledger.NAME).read_bytes()
    out = finetuned(cases, present, new + cases.second[:3], tmp_path / "taught")
    with pytest.raises(InputRefused, match=r"trained on 3 row\(s\) that case-2 named"):
        excise.add_run(own, out, verify=Fake(), progress=QUIET)
    out = finetuned(cases, str(cases.small.original), new, tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="other weights"):
        excise.add_run(own, out, verify=Fake(), progress=QUIET)
    assert (own / ledger.NAME).read_bytes() == before
    more = str(small_world.write(tmp_path / "more.jsonl", cases.first + new))
    out = finetuned(cases, present, new + cases.second[:3], tmp_path / "kept", without=str(own), train=[more])
    data = artifacts.read_manifest(artifacts.RunFolder(out))["data"]
    assert (data["retain"]["rows"], data["train-1"]["rows"]) == (len(new), len(new)), "left out where it was asked for"
    assert excise.add_run(own, out, suite="memorisation", verify=Fake(), progress=QUIET)[0]["event"] == "update"


def test_a_request_that_was_run_elsewhere(cases: Cases, tmp_path: Path) -> None:
    settings = cases.settings("first")
    excise.run(settings, out=tmp_path / "case-9", progress=QUIET)
    folder = tmp_path / "l"
    made = excise.add_run(folder, tmp_path / "case-9", received="2026-02-03", verify=Fake(), progress=QUIET)
    assert [e["event"] for e in made] == ["received", "begun", "ended"]
    assert made[-1]["taken"]
    assert made[0]["received"] == "2026-02-03"
    assert len(made[0]["rows"]) == 10
    file = Path(settings.data.forget)
    kept = file.read_bytes()
    try:
        small_world.write(file, cases.first[:5])
        with pytest.raises(IntegrityFailed, match="rows of forget are not those"):
            excise.add_run(tmp_path / "m", tmp_path / "case-9", verify=Fake(), progress=QUIET)
    finally:
        file.write_bytes(kept)
    assert not (tmp_path / "m").exists()


# --- the record held against the files ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["manifest.json", "recipe.yaml", "verdict.json", "model/model.safetensors"])
def test_a_changed_file_is_named_with_its_entry(what: str, own: Path) -> None:
    found = excise.check_ledger(own)
    assert (found["entries"], found["gone"]) == (8, [])
    assert found["head"] == ledger.read(own)[-1]["hash"]
    path = own / "requests/case-1" / what
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityFailed, match="not what entry 4 of the ledger recorded"):
        excise.check_ledger(own)


def test_old_folders_may_go_and_the_present_model_may_not(own: Path, cases: Cases) -> None:
    shutil.rmtree(own / "requests/case-1")
    assert excise.check_ledger(own)["gone"][0] == "requests/case-1/manifest.json"
    shutil.rmtree(own / "requests/case-2/model")
    with pytest.raises((IntegrityFailed, InputRefused)):
        excise.check_ledger(own)


def test_present_weights_that_were_changed_are_not_built_upon(own: Path, cases: Cases) -> None:
    path = own / "requests/case-2/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    rows = cases.settings("first", data__forget=str(cases.small.sides["never_seen"]), data__never_seen=None)
    with pytest.raises(IntegrityFailed, match="not those of entry 7"):
        excise.request(own, rows, name="c", verify=Fake(), progress=QUIET)
    assert len(ledger.read(own)) == 8


# --- refusals and the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"name": "../x"}, UsageError, "must be 1-100 letters"),
        ({"received": "yesterday"}, UsageError, "2026-03-31"),
    ],
)
def test_refusals_write_nothing(
    settings: dict[str, Any], error: type[Exception], match: str, cases: Cases, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        excise.request(tmp_path / "l", cases.settings("first"), verify=Fake(), progress=QUIET, **settings)
    assert not (tmp_path / "l").exists()


def test_bad_rows_begin_no_ledger(cases: Cases, tmp_path: Path) -> None:
    with pytest.raises(InputRefused):
        excise.request(tmp_path / "l", cases.settings("first", data__forget="no-such.jsonl"), verify=Fake())
    with pytest.raises(InputRefused):
        excise.request(tmp_path / "l", cases.settings("first", model__name=str(tmp_path)), verify=Fake())
    assert not (tmp_path / "l").exists()
    with files.locked(tmp_path / "m"):
        ledger.start(tmp_path / "m")
        with pytest.raises(UsageError, match="in use"):
            excise.request(tmp_path / "m", cases.settings("first"), verify=Fake(), progress=QUIET)


def test_the_command_line(own: Path, cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ledger", str(own), "show"]) == 0
    said = capsys.readouterr().out
    assert "case-1" in said
    assert "passed" in said
    assert cli.main(["ledger", str(own), "show", "--json"]) == 0
    head = json.loads(capsys.readouterr().out)["head"]
    assert cli.main(["ledger", str(own), "check", "--head", head]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 8
    assert cli.main(["ledger", str(own), "check", "--head", "0" * 64]) == 6
    for wrong in (["add"], ["show", "x"], ["show", "--seed", "3"], ["reverify", "--head", head], ["burn"]):
        assert cli.main(["ledger", str(own), *wrong]) == 2, wrong
    assert cli.main(["ledger", str(own / "requests"), "show"]) == 3


@pytest.mark.parametrize(("outcome", "code"), [("passed", 0), ("failed", 5), ("not shown", 7)])
def test_exit_codes_say_what_the_verdicts_were(
    outcome: str, code: int, own: Path, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finetuned(cases, excise.show_ledger(own)["model"], small_world.rows(cases.small.sides["never_seen"]),
                    tmp_path / "new")  # fmt: skip
    verify: Callable[[Path], None] = Fake(["passed", outcome])
    monkeypatch.setitem(vars(excise), "verify", verify)
    assert cli.main(["ledger", str(own), "add", str(out), "--suite", "memorisation", "--id", "u"]) == code
    assert cli.main(["ledger", str(own), "reverify"]) == 0
