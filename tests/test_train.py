"""The training loop: the same result however it is cut up, a stop before harm, and a log that says what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from excise import files, train
from excise.errors import IntegrityFailed, TrainingStopped
from excise.forward import (
    Anatomy,
    View,
    column,
    constant,
    hidden,
    label_count,
    lora,
    pooled,
    seq_logp,
    token_logp,
)
from excise.objectives.forget import idk_nll, npo, simnpo
from excise.objectives.forget_wide import pdu, rmu, rmu_direction, undial
from excise.objectives.regularise import clreg
from excise.objectives.retain import kl, nll, primal_dual, rmu_retain
from excise.objectives.term import Dual, Ramp, Term
from tiny import Data, Run


def flattened(*made: Term | tuple[Term, ...]) -> list[Term]:
    return [t for m in made for t in (m if isinstance(m, tuple) else (m,))]


def summed(values: Tensor) -> Tensor:
    return values.square().sum(-1)


def shaky() -> Term:
    """A term of dropout views in which rows do not see each other."""
    return Term("shaky", summed, {"values": pooled(View("forget", -1, 0.3), -1)}, over="forget")


# --- one objective, however the batch is cut up -------------------------------------------------------------------


@pytest.mark.parametrize("forget_batch", [8, 4])  # 8: twelve rows a step do not divide evenly
def test_accumulation_does_not_change_the_result(tmp_path: Path, forget_batch: int) -> None:
    """Rows differ in length, so the mean over tokens is right only if it is taken over the whole window."""
    terms = [npo(), nll(), undial(beta=2.0), kl(weight=Ramp(0.0, 2.0)), shaky()]
    runs = []
    for parts in (1, 2, 4):
        cut = {"forget_batch": forget_batch // parts, "retain_batch": 8 // parts, "accumulate": parts}
        runs.append(Run(tmp_path / str(parts), terms, schedule=cut, optimiser={"lr": 1e-3}).go())
    assert runs[0].moved() > 1e-3
    for run in runs[1:]:
        assert tiny.apart(runs[0].weights, run.weights) < 5e-6
        for ours, theirs in zip(runs[0].log, run.log, strict=True):
            for key in ("loss", "grad_norm", "terms/npo", "terms/nll", "terms/shaky"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4)


def test_one_step_is_a_step_along_the_gradient_of_the_mean(tmp_path: Path) -> None:
    """Against a plain loop: transformers' own logits, means over rows and tokens, one step of AdamW."""
    run = Run(tmp_path, [simnpo(beta=0.5), nll(weight=0.5)], schedule={"steps": 1}, optimiser={"lr": 1e-3, "clip": 0})
    net = tiny.model()
    draw = run.trainer.plan.draw(0)
    logp: dict[str, list[Tensor]] = {}
    for side, rows in draw.items():
        for i in rows.indices:
            ids = run.data.rows[side][i][None]
            scores = net(input_ids=ids).logits[0].log_softmax(-1)
            logp.setdefault(side, []).append(torch.stack([scores[t - 1, ids[0, t]] for t in range(3, ids.shape[1])]))
    forget = torch.stack([-(2 / 0.5) * torch.log(torch.sigmoid(-0.5 * row.mean())) for row in logp["forget"]]).mean()
    loss = forget + 0.5 * -torch.cat(logp["retain"]).mean()
    made = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), float("inf"))
    made.step()
    run.go()
    (row,) = run.log
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["terms/simnpo"] == pytest.approx(float(forget.detach()), rel=1e-5)
    # AdamW's first step is nearly the sign of the gradient: a few entries have none to speak of.
    far = torch.cat([(a - b).abs().flatten() for a, b in zip(net.parameters(), run.net.parameters(), strict=True)])
    assert float((far > 1e-5).float().mean()) < 1e-3


def test_a_step_of_fewer_rows_than_parts(tmp_path: Path) -> None:
    """Micro-batches without a row add nothing and stop nothing."""
    few = Data({"forget": 1})
    cut = Run(tmp_path / "a", [simnpo()], data=few, schedule={"steps": 2, "accumulate": 3}).go()
    whole = Run(tmp_path / "b", [simnpo()], data=few, schedule={"steps": 2}).go()
    assert cut.moved() > 0
    assert tiny.apart(cut.weights, whole.weights) < 1e-6


def test_gradients_are_clipped_at_their_norm(tmp_path: Path) -> None:
    norms = []
    for clip in (0.0, 1e-3, 1e9):
        run = Run(tmp_path / str(clip), [nll()], schedule={"steps": 1}, optimiser={"clip": clip})
        run.trainer.optimizer = torch.optim.SGD(run.net.parameters(), lr=1.0)
        norms.append((run.go().log[0]["grad_norm"], _length(run)))
    (free, length), (same, short), (again, full) = norms
    assert free == pytest.approx(same) == pytest.approx(again)  # the log tells the norm before clipping
    assert length == pytest.approx(full, rel=1e-4) == pytest.approx(free, rel=1e-4)
    assert short == pytest.approx(1e-3, rel=1e-3)


def _length(run: Run) -> float:
    return float(torch.stack([(run.before[n] - p.detach()).norm() for n, p in run.net.named_parameters()]).norm())


# --- stopping before harm -----------------------------------------------------------------------------------------


class Trap(torch.autograd.Function):
    """Leaves values alone and makes gradients infinite."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


def failing(kind: str, at_call: int) -> Term:
    """A term that goes wrong at one of its calls."""
    calls = []

    def fn(logp: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) < at_call:
            return -logp
        return Trap.apply(-logp) if kind == "gradient" else -logp * float(kind)

    return Term("rotten", fn, {"logp": seq_logp("forget")}, over="forget")


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(("kind", "message"), [
    ("nan", r"step 3: the term 'rotten' is not finite; the weights were left as they were"),
    ("inf", r"step 3: the term 'rotten' is not finite"),
    ("gradient", r"step 3: the gradient is not finite \(terms: .*rotten"),
])  # fmt: skip
def test_what_is_not_finite_stops_before_a_weight_changes(tmp_path: Path, kind: str, message: str, clip: float) -> None:
    """The third step is refused, in its second micro-batch: weights are bit for bit those of a run of two steps."""
    cut = {"steps": 5, "accumulate": 2, "forget_batch": 2, "retain_batch": 2}
    more: dict[str, Any] = {"optimiser": {"clip": clip, "decay": "constant", "warmup": 0}, "schedule": cut}
    run = Run(tmp_path / "a", [nll(), failing(kind, at_call=6)], **more)
    with pytest.raises(TrainingStopped, match=message) as caught:
        run.go()
    assert caught.value.exit_code == 4
    good = Run(tmp_path / "b", [nll(), failing(kind, at_call=99)], should_stop=lambda step: step == 2, **more).go()
    assert good.moved() > 0
    assert tiny.apart(run.weights, good.weights) == 0
    assert [row["step"] for row in run.log] == [1, 2]


def test_should_stop_ends_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path, [nll()], should_stop=lambda step: step == 3, schedule={"steps": 9}).go()
    assert run.trainer.state.global_step == 3
    assert len(run.log) == 3


# --- resuming -----------------------------------------------------------------------------------------------------


def resumable(kind: str) -> tuple[list[Term], nn.Module, dict[str, Any]]:
    """Objectives, models and optimizers that keep state of every sort."""
    views = clreg(weight=2.0, views="dropout", dropout=0.2, symmetric=True)
    dual = primal_dual(epsilon=3.0, eta=0.7, warmup=0.2, weight=2.0)
    if kind == "dual":
        return flattened(pdu(), dual, views), tiny.model(), {}
    if kind == "muon":
        return flattened(npo(), nll(weight=Ramp(0.1, 3.0, until=0.7)), views), tiny.model(), {"name": "muon"}
    if kind == "dropout":
        return flattened(npo(), nll()), tiny.model("gpt2", resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.2), {}
    return flattened(npo(), nll(), views), tiny.adapted(tiny.model(), lora_dropout=0.2), {}


@pytest.mark.parametrize("kind", ["dual", "muon", "dropout", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    terms, net, optimiser = resumable(kind)
    more: dict[str, Any] = {
        "net": net, "optimiser": optimiser, "checkpoint_every": 2,
        "schedule": {"steps": 7, "accumulate": 2, "retain_steps": 1, "forget_batch": 3, "retain_batch": 3},
    }  # fmt: skip
    whole = Run(tmp_path / "whole", terms, **more).go()
    begun = Run(tmp_path / "cut", terms, should_stop=lambda step: step == 5, **more).go()
    assert [p.name for p in train.checkpoints(begun.out)] == ["checkpoint-2", "checkpoint-4"]
    torch.manual_seed(12345)  # the state of a new process is another one
    resumed = Run(tmp_path / "cut", terms, **more).resume()
    assert whole.moved() > 1e-3
    assert tiny.apart(whole.weights, resumed.weights) == 0
    assert resumed.log == whole.log[4:]
    assert resumed.trainer.duals == whole.trainer.duals
    if kind == "dual":
        assert len({row["weights/primal_dual"] for row in whole.log}) > 3


def test_resuming_twice_and_from_the_end(tmp_path: Path) -> None:
    terms, more = [npo(), nll()], {"checkpoint_every": 1, "schedule": {"steps": 6}}
    whole = Run(tmp_path / "whole", terms, **more).go()  # type: ignore[arg-type]
    Run(tmp_path / "cut", terms, should_stop=lambda step: step == 2, **more).go()  # type: ignore[arg-type]
    Run(tmp_path / "cut", terms, should_stop=lambda step: step == 4, **more).resume()  # type: ignore[arg-type]
    last = Run(tmp_path / "cut", terms, **more).resume()  # type: ignore[arg-type]
    assert tiny.apart(whole.weights, last.weights) == 0
    again = Run(tmp_path / "cut", terms, **more).resume()  # type: ignore[arg-type]
    assert tiny.apart(whole.weights, again.weights) == 0
    assert again.log == []


def spoil(checkpoint: Path, how: str) -> None:
    """Damage of the kinds that happen: a bit, a torn file, a missing one, one too many, an unfinished folder."""
    target = checkpoint / "optimizer.pt"
    if how == "bit":
        raw = bytearray(target.read_bytes())
        raw[len(raw) // 2] ^= 1
        target.write_bytes(raw)
    elif how == "torn":
        target.write_bytes(target.read_bytes()[:-100])
    elif how == "missing":
        target.unlink()
    elif how == "added":
        (checkpoint / "pickle.bin").write_bytes(b"x")
    else:
        (checkpoint / files.COMPLETE).unlink()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("begun")
    return Run(folder, [npo(), nll()], checkpoint_every=2, schedule={"steps": 4}).go()


@pytest.mark.parametrize("how", ["bit", "torn", "missing", "added", "unfinished"])
def test_a_spoilt_checkpoint_is_not_used(tmp_path: Path, begun: Run, how: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun.out, folder)
    assert [p.name for p in train.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    spoil(folder / "checkpoint-4", how)
    assert [p.name for p in train.checkpoints(folder)] == ["checkpoint-2"]
    run = Run(folder, [npo(), nll()], checkpoint_every=2, schedule={"steps": 4})
    with pytest.raises(IntegrityFailed, match="checkpoint-4"):
        run.trainer.resume(folder / "checkpoint-4")
    assert run.moved() == 0
    assert tiny.apart(run.resume().weights, begun.weights) == 0  # from step 2, to the same end
    assert [p.name for p in train.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_hold_no_pickled_settings_and_the_last_two_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, [nll()], checkpoint_every=1, schedule={"steps": 5}).go()
    found = train.checkpoints(run.out)
    assert [p.name for p in found] == ["checkpoint-4", "checkpoint-5"]
    assert not (found[0] / "training_args.bin").exists()
    assert (found[0] / "model.safetensors").is_file()
    assert sorted(p.name for p in run.out.iterdir() if not p.name.startswith(".")) == ["checkpoint-4", "checkpoint-5"]


def test_what_a_killed_run_left_aside_is_not_taken_along(tmp_path: Path) -> None:
    """A checkpoint that was being written when the process died is written anew, not completed."""
    aside = tmp_path / ".staging" / "checkpoint-2"
    aside.mkdir(parents=True)
    (aside / "rng_state_7.pth").write_bytes(b"torn")
    (aside / "model.safetensors").write_bytes(b"torn")
    run = Run(tmp_path, [nll()], checkpoint_every=2, schedule={"steps": 2}).go()
    (found,) = train.checkpoints(run.out)
    assert not (found / "rng_state_7.pth").exists()


# --- weights of terms ---------------------------------------------------------------------------------------------


def test_a_ramp_weighs_each_step_by_its_place(tmp_path: Path) -> None:
    ramp = Ramp(0.0, 2.0, until=0.5)
    run = Run(tmp_path, [npo(weight=ramp), nll()], schedule={"steps": 6}).go()
    assert [row["weights/npo"] for row in run.log] == pytest.approx([ramp.at(step / 6) for step in range(6)])
    for row in run.log:  # the loss that is logged is the loss that was descended
        assert row["loss"] == pytest.approx(row["weights/npo"] * row["terms/npo"] + row["terms/nll"])


def test_a_weight_of_zero_is_no_gradient(tmp_path: Path) -> None:
    one = Run(tmp_path / "a", [nll(), npo(weight=0.0)]).go()
    other = Run(tmp_path / "b", [nll()]).go()
    assert tiny.apart(one.weights, other.weights) < 1e-7


def test_a_dual_weight_follows_the_constraint(tmp_path: Path) -> None:
    """By hand from the logged means: once a step, from the mean of the whole window, after the warm-up."""
    dual = Dual(start=1.5, epsilon=4.0, eta=3.0, warmup=0.4)
    run = Run(
        tmp_path, [npo(), primal_dual(weight=dual)], schedule={"steps": 8, "accumulate": 2, "forget_batch": 2}
    ).go()
    weight = 1.5
    for row in run.log:
        assert row["weights/primal_dual"] == pytest.approx(weight)
        assert row["loss"] == pytest.approx(row["terms/npo"] + weight * row["terms/primal_dual"], rel=1e-6)
        if row["step"] / 8 >= 0.4:
            weight = max(0.0, weight + 3.0 * (row["terms/primal_dual"] - 4.0))
    assert run.trainer.duals["primal_dual"] == pytest.approx(weight)
    assert weight != 1.5


def test_a_retain_step_descends_the_retain_terms_alone(tmp_path: Path) -> None:
    schedule = {"steps": 6, "retain_steps": 2}
    run = Run(tmp_path, flattened(npo(), nll(), clreg()), schedule=schedule).go()
    for row in run.log:
        named = {key for key in row if key.startswith("terms/")}
        assert named == ({"terms/npo", "terms/nll", "terms/clreg"} if row["step"] % 3 == 1 else {"terms/nll"})
        assert any(key.startswith("monitor/clreg/") for key in row) is (row["step"] % 3 == 1)
    none = Run(tmp_path / "b", [npo(), nll(weight=0.0)], schedule={**schedule, "steps": 3}).go()
    one = Run(tmp_path / "c", [npo(), nll(weight=0.0)], schedule={"steps": 3}, should_stop=lambda s: s == 1).go()
    assert tiny.apart(none.weights, one.weights) < 0.05  # only momentum moves weights in the other two


# --- which weights move -------------------------------------------------------------------------------------------


def frozen(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if not p.requires_grad}


def test_terms_on_a_low_layer_leave_everything_above_alone(tmp_path: Path) -> None:
    terms = [rmu(layer=1), rmu_retain(layer=1)]
    run = Run(tmp_path, terms, constants={"rmu_direction": rmu_direction(tiny.WIDTH)}).go()
    moved = {n for n in run.before if not torch.equal(run.before[n], run.weights[n])}
    assert moved == {n for n in run.before if ".layers.0." in n or "embed_tokens" in n}
    above = {
        n for n in run.before if ".layers.1." in n or ".layers.2." in n or "lm_head" in n or n == "model.norm.weight"
    }
    assert above <= frozen(run.net)


@pytest.mark.parametrize(("tied", "layer"), [(True, -1), (False, -1), (True, 2), (False, 2)])
def test_a_head_that_no_term_reads_is_frozen_unless_it_is_the_embedding(tied: bool, layer: int) -> None:
    net = tiny.model(tie_word_embeddings=tied)
    train.freeze_unread(net, Anatomy.of(net), [hidden("forget", layer)])
    found = frozen(net)
    assert ("lm_head.weight" in found) is not tied
    assert "model.embed_tokens.weight" not in found
    assert ("model.norm.weight" in found) is (layer == 2)
    assert any(".layers.2." in n for n in found) is (layer == 2)
    with_head = tiny.model(tie_word_embeddings=tied)
    train.freeze_unread(with_head, Anatomy.of(with_head), [hidden("forget", 1), token_logp("retain")])
    assert not frozen(with_head)


def test_only_the_policy_counts_as_reading() -> None:
    net = tiny.model()
    train.freeze_unread(net, Anatomy.of(net), [hidden("forget", 1), token_logp("retain", "reference")])
    assert any(".layers.2." in n for n in frozen(net))


@pytest.mark.parametrize("layer", [-1, 1])
def test_freezing_thaws_nothing(layer: int) -> None:
    """What the adapter or `train_only` froze stays frozen, a tied head above all."""
    net = tiny.adapted(tiny.model(tie_word_embeddings=True))
    before = frozen(net)
    train.freeze_unread(net, Anatomy.of(net), [hidden("forget", layer)])
    assert before <= frozen(net)
    assert (before == frozen(net)) is (layer == -1)


def test_adapter_factors_are_read_at_every_depth() -> None:
    net = tiny.adapted(tiny.model())
    before = frozen(net)
    train.freeze_unread(net, Anatomy.of(net), [lora("A"), hidden("forget", 1)])
    assert frozen(net) == before


def test_an_adapter_trains_its_factors_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, flattened(npo(), nll(), clreg()), net=tiny.adapted(tiny.model())).go()
    moved = {n for n in run.before if not torch.equal(run.before[n], run.weights[n])}
    assert moved == {n for n in run.before if "lora_" in n}


# --- the log ------------------------------------------------------------------------------------------------------


def test_a_row_says_what_a_step_did(tmp_path: Path) -> None:
    optimiser = {"lr": 1e-2, "warmup": 0.5, "decay": "linear"}
    run = Run(tmp_path, flattened(npo(weight=2.0), nll(), clreg(weight=0.5)), optimiser=optimiser).go()
    assert [row["step"] for row in run.log] == [1, 2, 3, 4]
    assert [row["progress"] for row in run.log] == [0.25, 0.5, 0.75, 1.0]
    assert [row["lr"] for row in run.log] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])  # the rate of this step
    for row in run.log:
        assert row["loss"] == pytest.approx(
            2 * row["terms/npo"] + row["terms/nll"] + 0.5 * row["terms/clreg"], rel=1e-6
        )
        assert row["grad_norm"] > 0
        assert -1 <= row["monitor/clreg/positive_cosine"] <= 1
        json.dumps(row, allow_nan=False)


def test_log_every_and_the_last_step(tmp_path: Path) -> None:
    run = Run(tmp_path, [nll()], schedule={"steps": 5}, log_every=2).go()
    assert [row["step"] for row in run.log] == [2, 4, 5]


# --- sides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [
    {"forget_alternative": 6}, {"forget_alternative": 6, "retain": 9}, {"retain": 9}, {"general": 5, "forget": 6},
])  # fmt: skip
def test_each_side_that_a_term_reads_is_trained_on(tmp_path: Path, sides: dict[str, int]) -> None:
    known = {"forget_alternative": idk_nll(), "retain": nll(), "general": kl(side="general"), "forget": npo()}
    terms = [known[side] for side in sides]
    run = Run(tmp_path, terms, data=Data(sides)).go()
    assert {k for row in run.log for k in row if k.startswith("terms/")} == {f"terms/{t.name}" for t in terms}
    assert run.moved() > 0


def test_columns_and_constants_reach_the_terms(tmp_path: Path) -> None:
    seen: list[Sequence[int]] = []

    def fn(count: Tensor, weight: Tensor, unit: Tensor, logp: Tensor) -> Tensor:
        seen.append((len(count), len(weight), len(unit)))
        return -logp * unit.sum()

    inputs = {
        "count": label_count("forget"), "weight": column("forget", "row_weight"), "unit": constant("u"),
        "logp": seq_logp("forget"),
    }  # fmt: skip
    Run(tmp_path, [Term("t", fn, inputs, over="forget")], constants={"u": torch.ones(5)}, schedule={"steps": 1}).go()
    assert seen == [(4, 4, 5)]
