"""Runs that begin with a start: what is in the folder, resuming, ranks, the cache, the plan, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import excise
import tiny
import two_ranks_started
from excise import cli, files, models, recipe
from excise.commands.measuring import evaluation, writing
from excise.commands.progress import Progress
from excise.commands.starting import beginning, gathering, objective, preparing, sides
from excise.errors import ExciseError, IntegrityFailed, UsageError
from excise.initialise import store
from small_world import SmallWorld

LORA = {"r": 4, "lora_alpha": 8}
FAST = {"evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__map": "none", "evaluate__gold": None}
TERMS = {"forget": {"npo": {}}, "retain": {"nll": {}}, "regularise": {}}


def values(small: SmallWorld, out: Path | None, start: Any = None, **changes: Any) -> dict[str, Any]:
    """A short run with an adapter that begins at ``start``."""
    own: dict[str, Any] = {"model__lora": dict(LORA), "objective": dict(TERMS), **FAST, **changes}
    return small.values(out, **({"initialise": start} if start is not None else {}), **own)


def go(small: SmallWorld, out: Path, start: Any = None, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Run it; the manifest."""
    settings = recipe.build(values(small, out, start, **changes))
    excise.run(settings, resume=resume, progress=Progress(quiet=True))
    return json.loads((out / "manifest.json").read_text())


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def done(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began with RILA and keeps its checkpoints."""
    out = tmp_path_factory.mktemp("started") / "run"
    go(small, out, {"rila": {"beta": 0.6}}, checkpoint_every=2)
    return out


def interrupted(done: Path, out: Path) -> Path:
    """The run as if it had been killed after its fourth step."""
    shutil.copytree(done, out)
    for name in ("model", "tables"):
        shutil.rmtree(out / name)
    for name in ("results.json", "pictures.json", "report.html", "geometry.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "status": "running", "files": {}}))
    # The recipe names the folder, and is held against what a resumed run is given.
    text = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump({**text, "out": str(out)}))
    return out


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_what_a_started_run_leaves(done: Path, small: SmallWorld) -> None:
    assert sorted(files.verify(done / "init")) == ["factors.safetensors", "made_from.json"]
    begun = store.to_factors(load_file(done / "init" / "factors.safetensors"))
    assert len(begun) == 14
    assert {f.A.dtype for f in begun.values()} == {torch.float32}
    saved = adapter(done)
    for name, start in begun.items():
        a, b = saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]
        assert torch.equal(a[4:], start.A)
        assert torch.equal(b[:, 4:], -start.B)
        assert not torch.equal(a[:4], start.A), "it was trained"
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["start"]["name"] == "rila"
    assert manifest["start"]["options"]["beta"] == 0.6
    assert "2604.17396" in manifest["start"]["citation"]
    assert manifest["model"]["sha256"] == store.fingerprint(models.load(recipe.Model(name=str(small.original))))
    assert {"init/factors.safetensors", "model/adapter_model.safetensors"} <= manifest["files"].keys()


def test_what_is_measured_is_what_was_saved(done: Path, small: SmallWorld) -> None:
    """The unlearned model's numbers are those of the saved adapter on the untouched base."""
    settings = recipe.build(values(small, done, {"rila": {"beta": 0.6}}))
    model = models.load_result(done / "model", settings.model)
    tokenizer = models.load_tokenizer(str(small.original))
    given = sides.read(settings.data, seed=0)
    records = evaluation.limited(given.records, settings.evaluate)
    own = evaluation.measure_model("again", model, tokenizer, records, settings, Progress(quiet=True))
    numbers, _ = writing.judge({"unlearned": own}, records, settings)
    kept = json.loads((done / "results.json").read_text())["models"]["unlearned"]
    for metric in ("forget_probability", "retain_probability"):
        assert numbers["unlearned"][metric]["value"] == kept[metric]["value"]


@pytest.mark.parametrize(
    "start",
    [{"pissa": {}}, {"rila": {"base": "kept"}}, {"fila": {}}, {"vila": {"batch_rows": 4}}, {"plain": {}}],
    ids=lambda s: next(iter(s)) + ("-kept" if "base" in next(iter(s.values())) else ""),
)
def test_every_start_runs_and_its_first_loss_is_the_originals(start: Any, small: SmallWorld, tmp_path: Path) -> None:
    """At step 1 NPO sees no difference from the reference: log 2 times 2 / beta, whatever the start."""
    go(small, tmp_path / "run", start, schedule__steps=2, evaluate__latent=False)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["terms"]["npo"] == pytest.approx(2 / 0.1 * 0.6931472, abs=1e-3)
    assert (tmp_path / "run" / "init").is_dir() == (start != {"plain": {}})


def test_the_seed_and_nothing_else_decides(done: Path, small: SmallWorld, tmp_path: Path) -> None:
    go(small, tmp_path / "again", {"rila": {"beta": 0.6}}, checkpoint_every=2)
    assert tiny.apart(adapter(done), adapter(tmp_path / "again")) == 0


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["changed", "kept"])
def test_a_resumed_run_ends_as_if_left_alone(base: str, small: SmallWorld, done: Path, tmp_path: Path) -> None:
    start = {"rila": {"beta": 0.6, "base": base}}
    if base == "kept":
        done = tmp_path / "kept"
        go(small, done, start, checkpoint_every=2)
    else:
        start["rila"].pop("base")
    out = interrupted(done, tmp_path / "torn")
    go(small, out, start, resume=True, checkpoint_every=2)
    assert tiny.apart(adapter(done), adapter(out)) == 0
    left, right = (json.loads((d / "results.json").read_text())["models"] for d in (done, out))
    assert left == right
    assert json.loads((done / "geometry.json").read_text()) == json.loads((out / "geometry.json").read_text())


def test_a_run_killed_before_its_factors_were_written_begins_again(
    small: SmallWorld, done: Path, tmp_path: Path
) -> None:
    out = interrupted(done, tmp_path / "torn")
    shutil.rmtree(out / "init")
    shutil.rmtree(out / "checkpoints")
    go(small, out, {"rila": {"beta": 0.6}}, resume=True, checkpoint_every=2)
    assert tiny.apart(adapter(done), adapter(out)) == 0


def _resumed(small: SmallWorld, out: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The one line with which a resumed run is refused; its code is 6."""
    own = values(small, out, {"rila": {"beta": 0.6}}, checkpoint_every=2, **changes)
    file = out.parent / "r.yaml"
    file.write_text(yaml.safe_dump(own))
    capsys.readouterr()
    assert cli.main(["run", str(file), "--resume"]) == IntegrityFailed.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    return lines[0]


def test_factors_that_changed_are_refused(
    small: SmallWorld, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(done, tmp_path / "flipped")
    path = out / "init" / "factors.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    assert "factors.safetensors' is not what was written" in _resumed(small, out, capsys)


def test_missing_factors_are_refused(
    small: SmallWorld, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(done, tmp_path / "missing")
    shutil.rmtree(out / "init")
    assert "the factors that the run began with are needed" in _resumed(small, out, capsys)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("model", "0" * 64, "another model"), ("forget", "0" * 64, "other forget rows"),
     ("targets", [], "other target layers"), ("options", {"beta": 0.1}, "other settings")],
)  # fmt: skip
def test_factors_of_something_else_are_refused(
    key: str, value: Any, said: str, small: SmallWorld, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole folder with right hashes, put there from elsewhere."""
    out = interrupted(done, tmp_path / "foreign")
    made = json.loads((out / "init" / "made_from.json").read_text())
    with files.staged(out / "init") as aside:
        shutil.copy(done / "init" / "factors.safetensors", aside)
        (aside / "made_from.json").write_text(json.dumps({**made, key: value}))
    assert f"made from {said}" in _resumed(small, out, capsys)


def test_another_base_is_refused(
    small: SmallWorld, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(done, tmp_path / "base")
    other = tmp_path / "model"
    shutil.copytree(small.original, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    text = yaml.safe_load((out / "recipe.yaml").read_text())
    text["model"]["name"] = str(other)
    (out / "recipe.yaml").write_text(yaml.safe_dump(text))
    assert "begun with another model" in _resumed(small, out, capsys, model__name=str(other))


# --- two ranks ----------------------------------------------------------------------------------------------------


def test_two_ranks_begin_and_end_as_one(small: SmallWorld, tmp_path: Path) -> None:
    own = values(small, None, {"rila": {}}, schedule__steps=2, objective={**TERMS, "regularise": {"rol": {"k": 4}}})
    own.pop("out", None)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(own))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*start, str(Path(two_ranks_started.__file__)), str(file), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    alone = subprocess.run(
        [sys.executable, str(Path(two_ranks_started.__file__)), str(file), str(tmp_path / "one")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    first, second = (load_file(f"{tmp_path / 'two'}-{rank}.safetensors") for rank in (0, 1))
    one = load_file(f"{tmp_path / 'one'}-0.safetensors")
    assert tiny.apart(first, second) == 0, "both ranks hold the same bits: factors, bases, changed base, result"
    for name in (k.removeprefix("B/") for k in first if k.startswith("B/")):
        projectors = [x[f"B/{name}"] @ x[f"B/{name}"].T for x in (first, one)]
        assert torch.allclose(*projectors, atol=1e-5), name
        bases = [x[f"retain_basis/4/{name}"] for x in (first, one)]
        assert torch.allclose(bases[0] @ bases[0].T, bases[1] @ bases[1].T, atol=1e-5), name


# --- the cache ----------------------------------------------------------------------------------------------------


def _began(small: SmallWorld, tmp_path: Path, number: int, start: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """The factors that a run begins with, without the training."""
    settings = recipe.build(values(small, tmp_path / f"run-{number}", start, schedule__steps=1, **changes))
    given = sides.read(settings.data, seed=settings.seed)
    prepared = preparing.prepare_unlearning(settings, given, resume=False)
    from excise import artifacts

    taker = gathering.Taker(prepared.model, prepared.rows, settings.statistics, "fp32", _nothing, prepared.base or "")
    begun = beginning.begin(prepared.wanted, taker, artifacts.RunFolder(Path(settings.out or "")), resume=False)
    return store.of_factors(begun.factors)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("start", ["rila", "fila", "vila"])
def test_statistics_are_used_again_when_nothing_changed(start: str, small: SmallWorld, tmp_path: Path) -> None:
    cache = {"statistics__cache": str(tmp_path / "cache"), "evaluate__latent": False}
    plain = _began(small, tmp_path, 0, {start: {}}, evaluate__latent=False)
    first = _began(small, tmp_path, 1, {start: {}}, **cache)
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 2, "one for each side"
    before = {p: p.stat().st_mtime_ns for e in entries for p in e.iterdir()}
    again = _began(small, tmp_path, 2, {start: {}}, **cache)
    assert before == {p: p.stat().st_mtime_ns for e in sorted((tmp_path / "cache").iterdir()) for p in e.iterdir()}
    assert tiny.apart(plain, first) == tiny.apart(first, again) == 0
    _began(small, tmp_path, 3, {start: {}}, data__limit=12, **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 4, "other rows, other statistics"


def test_a_cache_entry_of_something_else_is_refused(small: SmallWorld, tmp_path: Path) -> None:
    cache = {"statistics__cache": str(tmp_path / "cache"), "evaluate__latent": False}
    _began(small, tmp_path, 1, {"rila": {}}, **cache)
    entry = next((tmp_path / "cache").iterdir())
    made = json.loads((entry / "made_from.json").read_text())
    content = (entry / "statistics.safetensors").read_bytes()
    with files.staged(entry) as aside:
        (aside / "statistics.safetensors").write_bytes(content)
        (aside / "made_from.json").write_text(json.dumps({**made, "model": "0" * 64}))
    with pytest.raises(IntegrityFailed, match="made from another model"):
        _began(small, tmp_path, 2, {"rila": {}}, **cache)
    (entry / "statistics.safetensors").write_bytes(content[:-1])
    with pytest.raises(IntegrityFailed, match="not what was written"):
        _began(small, tmp_path, 3, {"rila": {}}, **cache)


def test_groups_of_layers_give_the_same_factors(small: SmallWorld, tmp_path: Path) -> None:
    for number, start in enumerate(("rila", "fila", "vila")):
        whole = _began(small, tmp_path, 2 * number, {start: {}}, evaluate__latent=False)
        parts = _began(
            small, tmp_path, 2 * number + 1, {start: {}}, evaluate__latent=False, statistics__layers_at_once=5
        )
        products = [{k[2:]: x[f"B/{k[2:]}"] @ x[k] for k in x if k.startswith("A/")} for x in (whole, parts)]
        # VILA's factors are drawn for the layers of a group: other draws, other variances.
        assert (tiny.apart(*products) < 1e-5) == (start != "vila")


# --- plan, command line, tune -------------------------------------------------------------------------------------


def test_the_plan_says_what_a_start_costs(
    small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = excise.plan(recipe.build(values(small, tmp_path / "o", {"rila": {}}, statistics__layers_at_once=4)))
    assert plan["start"]["name"] == "rila"
    assert plan["start"]["statistics"] == ["output_moments(forget)", "output_moments(retain)"]
    assert plan["start"]["passes_each"] == 4
    assert plan["start"]["seconds"] > 0
    assert {p["side"] for p in plan["passes"]} == {"forget", "retain"}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values(small, tmp_path / "o")))
    assert cli.main(["plan", str(file), "--initialise.fila.batch_rows", "4", "--evaluate.latent", "false"]) == 0
    assert "squared_gradient(forget)" in capsys.readouterr().out
    assert cli.main(["plan", str(file), "--evaluate.latent", "false"]) == 0
    assert "start" not in capsys.readouterr().out


def test_a_start_is_set_on_the_command_line(small: SmallWorld, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values(small, None)))
    assert recipe.load(str(file), [("initialise.rila.beta", "0.25")]).initialise == {"rila": {"beta": 0.25}}
    assert recipe.load(str(file), [("initialise", "pissa")]).initialise == {"pissa": {}}
    child = tmp_path / "child.yaml"
    file.write_text(yaml.safe_dump(values(small, None, {"rila": {"beta": 0.7}})))
    child.write_text(yaml.safe_dump({"extends": str(file), "initialise": {"pissa": {}}}))
    assert recipe.load(str(child)).initialise == {"pissa": {}}, "naming another start replaces the first"
    assert recipe.load(str(child), [("statistics.pooling", "row")]).statistics.pooling == "row"


def test_a_start_is_tuned(small: SmallWorld, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    own = values(small, tmp_path / "t", {"rila": {}}, schedule__steps=1, evaluate__latent=False)
    own["tune"] = {"space": {"initialise.rila.beta": [0.2, 0.8]}}
    best = excise.tune(recipe.build(own), trials=2)
    assert best["trials"] == 2
    assert best["best"]["initialise.rila.beta"] in (0.2, 0.8)


# --- bases for terms ----------------------------------------------------------------------------------------------


def test_rol_gets_the_basis_of_the_retained_rows(small: SmallWorld, tmp_path: Path) -> None:
    manifest = go(
        small, tmp_path / "run", schedule__steps=2, objective={**TERMS, "regularise": {"rol": {"k": 3, "weight": 0.1}}}
    )
    assert "start" not in manifest
    tensors = load_file(tmp_path / "run" / "init" / "factors.safetensors")
    assert {k.split("/")[0] for k in tensors} == {"P3"}
    for basis in tensors.values():
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    terms = objective.terms(recipe.build({"objective": {"regularise": {"rol": {"k": 3}}}}).objective)
    with pytest.raises(UsageError, match="retain_basis/3"):
        objective.constants(terms, 8, 0)
    assert objective.constants(terms, 8, 0, {"retain_basis/3": {"q": 1}})["retain_basis/3"] == {"q": 1}


# --- refusals -----------------------------------------------------------------------------------------------------

ROL = {**TERMS, "regularise": {"rol": {"k": 33}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no adapter": ({"start": {"rila": {}}, "model__lora": None}, "there is no adapter to start: set model.lora"),
    "two starts": ({"start": {"rila": {}, "pissa": {}}}, "an adapter has one start"),
    "unknown start": ({"start": {"rilla": {}}}, "unknown start 'rilla'; did you mean 'rila'?"),
    "unknown setting": ({"start": {"rila": {"betta": 1}}}, "unknown setting 'betta'; did you mean 'beta'?"),
    "center": ({"start": {"rila": {"center": True}}}, "unknown setting 'center'"),
    "beta": ({"start": {"rila": {"beta": 2}}}, "initialise.rila: beta is 2"),
    "dora": ({"start": {"pissa": {}}, "model__lora__use_dora": True}, "model.lora.use_dora and initialise.pissa"),
    "rslora": ({"start": {"fila": {}}, "model__lora__use_rslora": True}, "model.lora.use_rslora and initialise.fila"),
    "own initialisation": ({"model__lora__init_lora_weights": "pissa"}, "use initialise (pissa)"),
    "no such target": ({"start": {"rila": {}}, "model__lora__target_modules": ["nothing"]}, "model.lora"),
    "tied head": ({"start": {"rila": {}}, "model__lora__target_modules": ["lm_head"]}, "tied to the embedding"),
    "embedding": ({"start": {"vila": {}}, "model__lora__target_modules": ["embed_tokens"]}, "is an embedding"),
    "rank above the layer": ({"start": {"pissa": {}}, "model__lora__r": 40}, "rank 40 is above the 32 directions"),
    "rank above the rows": (
        {"start": {"rila": {}}, "model__lora__r": 24, "statistics": {"pooling": "row", "rows": 8}},
        "rank 24 is above the 14 directions that the rows span",
    ),
    "basis above the layer": ({"objective": ROL}, "retain_basis/33"),
    "basis without adapter": ({"objective": ROL, "model__lora": None}, "there is no adapter: set model.lora"),
    "basis above the rows": (
        {"objective": {**TERMS, "regularise": {"rol": {"k": 9}}}, "statistics": {"pooling": "row", "rows": 5}},
        "retain_basis/9: the retained rows span 4 directions at most",
    ),
    "part of it frozen": ({"start": {"rila": {}}, "model__train_only": "lora_A"}, "model.train_only"),
    "rows": ({"start": {"rila": {}}, "statistics": {"rows": 0}}, "statistics.rows is 0"),
    "pooling": ({"start": {"rila": {}}, "statistics": {"pooling": "mean"}}, "recipe.statistics.pooling"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_written(
    case: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = REFUSED[case]
    own = dict(changes)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values(small, tmp_path / "out", own.pop("start", None), **own)))
    capsys.readouterr()
    assert cli.main(["run", str(file)]) == UsageError.exit_code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    assert said in lines[0], lines[0]
    assert "Traceback" not in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_few_directions_with_positive_contrast_are_a_warning(small: SmallWorld, tmp_path: Path) -> None:
    manifest = go(small, tmp_path / "run", {"rila": {"beta": 0.97}}, schedule__steps=1, evaluate__latent=False)
    found = [w for w in manifest["warnings"] if "fewer directions with positive contrast than their rank" in w]
    assert len(found) == 1
    assert "initialise.rila: 14 of 14 layers" in found[0]


def test_a_side_that_is_not_given_is_refused(small: SmallWorld, tmp_path: Path) -> None:
    own = values(small, tmp_path / "out", {"rila": {}})
    own["data"].pop("forget")
    with pytest.raises(ExciseError, match=r"initialise\.rila reads the side 'forget'"):
        excise.finetune(recipe.build(own), progress=Progress(quiet=True))
    assert not (tmp_path / "out").exists()
