"""Updates with a shape: the preconditioner and its optimizer against other ways to them, and runs that use them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import excise
import oracles_gold
import small_tagger
import tiny
import two_ranks_shaped
from excise import cli, files, models, optimise, recipe
from excise.commands.progress import Progress
from excise.commands.starting import shaping
from excise.errors import ExciseError, InputRefused, IntegrityFailed, UsageError
from excise.forward import Anatomy
from excise.initialise import difference
from excise.initialise.collect import collect, shared_inputs
from excise.initialise.moments import Moments
from excise.initialise.preconditioned import inverse, preconditioned
from excise.shaped import Shape, Shaped
from small_world import SmallWorld

FAST = {
    "evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__map": "none", "evaluate__gold": None,
    "evaluate__latent": False,
}  # fmt: skip
BOTH = {"initialise": {"preconditioned": {}}, "edit": {"reset_rows": {}}, "optimiser__weight_decay": 10.0}


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.2, 3, d)


# --- the preconditioner -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.1, 2.0])
@pytest.mark.parametrize("n", [3, 40], ids=["fewer rows than inputs", "more"])
def test_the_preconditioner_is_the_formula(n: int, ridge: float) -> None:
    retain, forget = vectors(n, 5), vectors(7, 5, seed=1)
    wanted = torch.tensor(oracles_gold.preconditioner(retain.tolist(), forget.tolist(), ridge))
    found = inverse(Moments.of(retain), Moments.of(forget), ridge)
    assert torch.equal(found, found.T)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000), ridge=st.floats(0.01, 10), scale=st.floats(0.1, 30))
def test_a_step_keeps_its_size_on_forget_rows_and_the_unit_of_the_inputs_does_not_matter(
    seed: int, ridge: float, scale: float
) -> None:
    retain, forget = vectors(9, 4, seed), vectors(6, 4, seed + 1).flip(1)
    p = inverse(Moments.of(retain), Moments.of(forget), ridge).double()
    c = Moments.of(forget).covariance(center=False)
    assert float((p @ c @ p).trace()) == pytest.approx(float(c.trace()), rel=1e-4)
    again = inverse(Moments.of(retain * scale), Moments.of(forget), ridge).double()
    assert torch.allclose(p, again, rtol=1e-3, atol=1e-4)
    kept = Moments.of(retain).covariance(center=False)
    felt, plain = float((p @ kept @ p).trace()), float(kept.trace())
    assert felt < plain, "the same step is smaller on retained rows, whose large inputs are not the forget rows'"


def test_a_large_ridge_is_no_preconditioner() -> None:
    found = inverse(Moments.of(vectors(20, 5)), Moments.of(vectors(20, 5, 1)), 1e6)
    assert torch.allclose(found, torch.eye(5), atol=1e-4)


def test_inputs_that_are_zero_are_refused() -> None:
    with pytest.raises(InputRefused, match="all zero"):
        inverse(Moments.of(torch.zeros(3, 2)), Moments.of(torch.ones(3, 2)), 0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ridge": 0}, "above 0"), ({"ridge": "x"}, "give a number"), ({"beta": 2}, "0 to 1"), ({"rank": 0}, "1 or more")],
)
def test_settings_that_make_no_sense_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preconditioned(**options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_moments_of_inputs_are_those_of_what_a_layer_is_given(kind: str) -> None:
    net, data = tiny.model(kind, depth=1), tiny.Data({"retain": 5})
    names = [n for n, m in net.named_modules() if n in shaping.trained(net)]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    batch = data.batch("retain", range(5), extra=2)
    hooks = [
        net.get_submodule(n).register_forward_pre_hook(
            lambda _m, args, n=n: seen[n].append(args[0][batch.attention_mask.bool()])  # type: ignore[misc]
        )
        for n in names
    ]
    with torch.no_grad():
        net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    found = collect(net, Anatomy.of(net), [batch], side="entering", layers=names)
    for name in names:
        x = torch.cat(seen[name]).double()
        assert torch.allclose(found[name].covariance(center=False), x.T @ x / len(x), rtol=1e-4, atol=1e-6), name
    groups = shared_inputs(net, Anatomy.of(net), names)
    assert sorted(n for g in groups for n in g) == sorted(names)
    if kind == "llama":
        assert [[n.rsplit(".")[-1] for n in g] for g in groups] == [
            ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
        ]  # fmt: skip


# --- the optimizer ------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """W0 + Q M P by autograd: what the optimizer does without ever forming it."""

    def __init__(self, start: Tensor, shape: Shape) -> None:
        super().__init__()
        self.start, self.shape = start.clone(), shape
        self.moved = nn.Parameter(torch.zeros(shape.size(start)))

    def weight(self) -> Tensor:
        update = self.moved @ self.shape.inputs
        update = update if self.shape.outputs is None else self.shape.outputs @ update
        return self.start + (update.T if self.shape.transposed else update)


def _shape(rows: int, columns: int, *, rank: int | None, transposed: bool = False) -> Shape:
    p = vectors(30, columns, 3)
    q = None if rank is None else torch.linalg.qr(vectors(rows, rank, 4)).Q
    return Shape(p.T @ p / 30, q, transposed)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("clip", [0.05, None])
def test_it_moves_weights_as_adamw_moves_a_parametrised_model(
    rank: int | None, transposed: bool, clip: float | None
) -> None:
    start, bias = vectors(4, 3, 5), nn.Parameter(torch.zeros(1))
    x, y = vectors(8, 3, 6), vectors(8, 4, 7)
    shape = _shape(4, 3, rank=rank, transposed=transposed)
    stored = start.T.contiguous() if transposed else start
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 3.0}

    weight = nn.Parameter(stored.clone())
    ours = Shaped([weight], [shape], [bias], **settings)
    other, own = _Layer(stored, shape), nn.Parameter(torch.zeros(1))
    theirs = torch.optim.AdamW([{"params": [other.moved]}, {"params": [own], "weight_decay": 0.0}], **settings)
    for _ in range(6):
        for w, b, made, parameters in (
            (weight, bias, ours, [weight, bias]), (other.weight(), own, theirs, [other.moved, own]),
        ):  # fmt: skip
            made.zero_grad()
            weight.grad = None if made is ours else weight.grad
            (((x @ (w if transposed else w.T)) + b - y) ** 2).mean().backward()
            optimise.shape(made)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            made.step()
    assert torch.allclose(weight, other.weight(), atol=2e-6)
    assert torch.allclose(bias, own, atol=1e-6)
    assert float((weight.detach() - stored).abs().max()) > 0.05
    if rank is not None:
        moved = (weight - stored).T if transposed else weight - stored
        assert int(torch.linalg.matrix_rank(moved.detach(), rtol=1e-4)) == rank


def test_decay_pulls_back_to_the_start_and_leaves_others_alone() -> None:
    start = vectors(3, 3)
    weight, bias = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2, 2))
    made = Shaped([weight], [_shape(3, 3, rank=None)], [bias], lr=0.1, weight_decay=2.0)
    weight.grad, bias.grad = torch.ones(3, 3), torch.zeros(2, 2)
    made.step()
    away = [float((weight.detach() - start).norm())]
    for state in made.inner.state.values():  # the running means would go on moving it
        state["exp_avg"].zero_()
    for _ in range(3):
        weight.grad = torch.zeros(3, 3)
        made.step()
        away.append(float((weight.detach() - start).norm()))
    assert away[0] > 0
    assert all(b == pytest.approx(0.8 * a, rel=1e-3) for a, b in itertools.pairwise(away))
    assert torch.equal(bias, torch.ones(2, 2))


def test_it_goes_on_from_its_saved_state() -> None:
    shape, gradients = _shape(4, 3, rank=None), [vectors(4, 3, s) for s in range(6)]

    def go(weight: nn.Parameter, made: Shaped, part: list[Tensor]) -> None:
        for g in part:
            weight.grad = g.clone()
            made.step()

    def fresh(start: Tensor) -> tuple[nn.Parameter, Shaped]:
        weight = nn.Parameter(start.clone())
        return weight, Shaped([weight], [shape], [], lr=0.05, weight_decay=3.0)

    whole, all_steps = fresh(torch.zeros(4, 3))
    go(whole, all_steps, gradients)
    first, half = fresh(torch.zeros(4, 3))
    go(first, half, gradients[:3])
    buffer = io.BytesIO()
    torch.save(half.state_dict(), buffer)
    second, rest = fresh(first.detach())
    buffer.seek(0)
    rest.load_state_dict(torch.load(buffer, weights_only=True))
    go(second, rest, gradients[3:])
    assert torch.equal(whole, second)


def test_shapes_that_are_shared_are_held_once() -> None:
    p = torch.eye(3)
    weights = [nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    made = Shaped(weights, [Shape(p), Shape(p)], [], lr=0.1)
    assert made.shapes[0].inputs is made.shapes[1].inputs


def test_betas_reach_every_optimizer() -> None:
    net = tiny.model()
    for name in ("adamw", "muon"):
        made = optimise.optimizer(net, recipe.Optimiser(name=name, betas=(0.7, 0.8)))  # type: ignore[arg-type]
        assert [g["betas"] for g in made.param_groups if "betas" in g]
        assert {tuple(g["betas"]) for g in made.param_groups if "betas" in g} == {(0.7, 0.8)}


# --- runs ---------------------------------------------------------------------------------------------------------


def go(small: SmallWorld, out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    settings = small.recipe(out, **{**FAST, **BOTH, **changes})
    excise.run(settings, resume=resume, progress=Progress(quiet=True))
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def done(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shaped") / "run"
    go(small, out, checkpoint_every=2)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_trains_linear_layers_alone_and_leaves_a_plain_checkpoint(done: Path, small: SmallWorld) -> None:
    before, after = weights(small.original), weights(done / "model")
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.endswith("proj.weight")} | {"model.embed_tokens.weight"}
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["start"]["name"] == "preconditioned"
    assert manifest["start"]["options"] == {"ridge": 0.1}
    assert manifest["model"]["sha256"]
    assert {"edit.json", "init/shapes.safetensors"} <= manifest["files"].keys()
    held = load_file(done / "init" / "shapes.safetensors")
    assert len(held) == 8, "one for each input of a block, not for each layer"


def interrupted(done: Path, out: Path) -> Path:
    """The run as if it had been killed after its fourth step."""
    shutil.copytree(done, out)
    for name in ("model", "tables", "checkpoints/checkpoint-6"):
        shutil.rmtree(out / name)
    for name in ("results.json", "pictures.json", "report.html"):
        (out / name).unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "status": "running", "files": {}}))
    text = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump({**text, "out": str(out)}))
    return out


def test_a_resumed_run_ends_as_if_left_alone(small: SmallWorld, done: Path, tmp_path: Path) -> None:
    out = interrupted(done, tmp_path / "torn")
    go(small, out, resume=True, checkpoint_every=2)
    assert tiny.apart(weights(done / "model"), weights(out / "model")) == 0
    lost, flipped = (interrupted(done, tmp_path / name) for name in ("lost", "flipped"))
    shutil.rmtree(lost / "init")
    path = flipped / "init" / "shapes.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityFailed, match="needed to resume"):
        go(small, lost, resume=True, checkpoint_every=2)
    with pytest.raises(IntegrityFailed, match=r"shapes\.safetensors"):
        go(small, flipped, resume=True, checkpoint_every=2)


def test_rolling_back_keeps_plain_weights(small: SmallWorld, tmp_path: Path) -> None:
    """Ascent that ruins the retained rows: weights of an earlier step are gone back to."""
    stop = {
        "stop__rule": "two_sided", "stop__band": [-1.0, 1.0], "stop__quality": 0.5, "stop__every": 1,
        "stop__patience": 2, "objective__forget": {"ga": {}}, "objective__regularise": {}, "optimiser__lr": 5e-3,
        "schedule__steps": 8,
    }  # fmt: skip
    seen = go(small, tmp_path / "run", **stop)["stopping"]
    assert seen["kept"] < seen["checks"][-1]["step"]
    again = {**stop, "stop__every": seen["kept"], "stop__near": 0.0, "stop__patience": 0, "schedule__steps": 8}
    go(small, tmp_path / "plain", **again)
    assert tiny.apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "plain" / "model")) == 0


@pytest.mark.slow
def test_two_ranks_begin_and_end_as_one(small: SmallWorld, tmp_path: Path) -> None:
    changes = {**FAST, **BOTH, "initialise": {"preconditioned": {"rank": 8}}, "schedule__steps": 2}
    stop = {"stop__rule": "two_sided", "stop__every": 1, "stop__between": 2, "stop__quality": 0.1}
    file = small.file(tmp_path / "r.yaml", **{**changes, **stop, "stop__band": [0.0, 0.5]})
    script = str(Path(two_ranks_shaped.__file__))
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    for command, name in ((several, "two"), ([sys.executable, script], "one")):
        ran = subprocess.run(
            [*command, str(file), str(tmp_path / name)], capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (load_file(f"{tmp_path / 'two'}-{rank}.safetensors") for rank in (0, 1))
    one = load_file(f"{tmp_path / 'one'}-0.safetensors")
    assert tiny.apart(first, second) == 0, "both ranks hold the same bits: shapes, reset rows, result"
    assert torch.equal(one["W/model.embed_tokens.weight"], first["W/model.embed_tokens.weight"])
    shapes = {n: v for n, v in one.items() if n.startswith("P/")}
    assert tiny.apart(shapes, {n: first[n] for n in shapes}) < 1e-4
    held = {n: v for n, v in one.items() if n.startswith("W/")}
    assert tiny.apart(held, {n: first[n] for n in held}) < 2e-3, "two steps of at most 2e-3 each, of which signs agree"


def test_a_subspace_confines_the_update_and_an_adapter_of_its_rank_loses_nothing(
    small: SmallWorld, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go(small, run, initialise={"preconditioned": {"rank": 4}}, edit={}, schedule__steps=3)
    base = models.load(recipe.Model(name=str(small.original)))
    found = difference.changed(base, models.load_result(run / "model"))
    assert len(found) == 14
    for name, x in found.items():
        assert float(torch.linalg.svdvals(x)[4:].max()) < 1e-3 * float(torch.linalg.svdvals(x)[0]), name
    out = excise.export(run, to="adapter", out=tmp_path / "out", rank=4)
    record = json.loads((out / "export.json").read_text())
    assert record["recompressed"]["error"] < 1e-3
    assert "shaped by `preconditioned`" in (out / "README.md").read_text()
    assert files.verify(out)
    from peft import PeftModel

    ids = torch.randint(5, 500, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = models.load_result(run / "model").eval()(ids).logits
        plain = base.eval()(ids).logits
        served = PeftModel.from_pretrained(base, str(out)).eval()(ids).logits
    assert float((own - served).abs().max()) < 1e-3 * float((own - plain).abs().max()) + 1e-4
    assert float((own - plain).abs().max()) > 0.05


def test_a_full_update_is_cut_with_a_measured_error(small: SmallWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(small, run, edit={}, schedule__steps=3)
    base = models.load(recipe.Model(name=str(small.original)))
    whole = difference.changed(base, models.load_result(run / "model"))
    errors = []
    for rank in (1, 8, 32):
        out = excise.export(run, to="adapter", out=tmp_path / f"rank-{rank}", rank=rank)
        errors.append(json.loads((out / "export.json").read_text())["recompressed"]["error"])
        best = sum(float(torch.linalg.svdvals(x.double())[rank:].square().sum()) for x in whole.values())
        total = sum(float(x.double().square().sum()) for x in whole.values())
        assert errors[-1] == pytest.approx((best / total) ** 0.5, rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(UsageError, match="use --to merged, or give --rank"):
        excise.export(run, to="adapter", out=tmp_path / "none")
    with pytest.raises(UsageError, match="above the 32 directions"):
        excise.export(run, to="adapter", out=tmp_path / "much", rank=33)
    excise.export(run, to="merged", out=tmp_path / "merged")
    assert tiny.apart(weights(run / "model"), weights(tmp_path / "merged")) == 0


def test_what_an_adapter_cannot_hold_is_refused(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight was changed too"):
        excise.export(done, to="adapter", out=tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_train_only_says_what_is_trained_beside(small: SmallWorld, tmp_path: Path) -> None:
    go(small, tmp_path / "run", edit={}, model__train_only=r"mlp\.|norm", schedule__steps=2)
    before, after = weights(small.original), weights(tmp_path / "run" / "model")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if "mlp." in n or "norm" in n}
    held = json.loads((tmp_path / "run" / "init" / "made_from.json").read_text())
    assert {n.rsplit(".", 1)[-1] for n in held["targets"]} == {"gate_proj", "up_proj", "down_proj"}


SHAPED = {"preconditioned": {}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"model__lora": {"r": 4}}, "leave model.lora out"),
    "muon": ({"optimiser__name": "muon"}, "set optimiser.name: adamw"),
    "bf16": ({"model__precision": "bf16"}, "bf16-mixed or fp32"),
    "new": ({"model__config": {"model_type": "llama"}}, "has nothing to start from"),
    "two": ({"initialise": {"preconditioned": {}, "rila": {}}}, "one start"),
    "setting": ({"initialise": {"preconditioned": {"ridg": 1}}}, "did you mean 'ridge'"),
    "value": ({"initialise": {"preconditioned": {"ridge": 0}}}, "above 0"),
    "name": ({"initialise": {"preconditoned": {}}}, "did you mean 'preconditioned'"),
    "rank": ({"initialise": {"preconditioned": {"rank": 33}}}, "rank 33 is above the 32 of"),
    "nothing": ({"model__train_only": "norm"}, "no linear layer of a block is trained"),
    "betas": ({"optimiser__betas": [0.9]}, "optimiser.betas is [0.9]"),
    "beta": ({"optimiser__betas": [0.9, 1.0]}, "from 0 to below 1"),
    "bases": ({"objective__regularise": {"rol": {"k": 2}}}, "there is no adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_where_it_makes_no_sense(
    case: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = REFUSED[case]
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", **{**FAST, "initialise": SHAPED, **changes})
    assert cli.main(["run", str(file)]) == UsageError.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_it_costs(small: SmallWorld, tmp_path: Path) -> None:
    settings = small.recipe(tmp_path / "run", **FAST, **BOTH)
    made = excise.plan(settings)
    assert made["start"]["name"] == "preconditioned"
    assert made["start"]["statistics"] == ["input_moments(retain)", "input_moments(forget)"]
    linears = sum(v.numel() for n, v in weights(small.original).items() if n.endswith("proj.weight"))
    assert made["memory"]["shapes"] == 8 * linears + 4 * 2 * (3 * 64**2 + 128**2)
    plain = excise.plan(dataclasses.replace(settings, initialise={}))
    assert "shapes" not in plain["memory"]
    assert made["memory"]["gradients_and_optimizer"] < plain["memory"]["gradients_and_optimizer"]


def test_finetuning_has_nobody_to_forget(small: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(ExciseError, match="reads the side 'forget'"):
        excise.finetune(small.recipe(tmp_path / "run", initialise=SHAPED), progress=Progress(quiet=True))


def test_a_tagger_is_shaped_and_reset_too(tmp_path: Path) -> None:
    net = small_tagger.taught(small_tagger.model(), small_tagger.sentences(12), steps=5)
    folder = small_tagger.save(net, tmp_path / "original")
    data = {
        side: small_tagger.write_rows(tmp_path / f"{side}.jsonl", small_tagger.sentences(n, seed=seed, groups=4))
        for side, n, seed in (("forget", 8, 1), ("retain", 16, 2), ("never_seen", 8, 3))
    }
    values = {
        "model": {"task": "token_classification", "name": folder, "precision": "fp32"}, "data": data,
        "objective": {"forget": {"npo": {}}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"steps": 2, "forget_batch": 4, "retain_batch": 4}, "optimiser": {"lr": 1e-3},
        "evaluate": {"relearn_steps": [], "latent": False, "map": "none"}, "out": str(tmp_path / "run"),
        "initialise": {"preconditioned": {"rank": 2}}, "edit": {"reset_rows": {"share": 0.3}},
    }  # fmt: skip
    excise.run(recipe.build(values), progress=Progress(quiet=True))
    before, after = weights(Path(folder)), weights(tmp_path / "run" / "model")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    found = json.loads((tmp_path / "run" / "edit.json").read_text())["reset_rows"]
    table = next(n for n in before if "word_embeddings" in n)
    assert int((before[table] != after[table]).any(1).sum()) == found["rows"] > 0
    assert moved - {table} == {n for n in before if ".layer." in n and before[n].ndim == 2}
