"""ROL and the terms that count once per step: the value, its gradient, and that no way of cutting a step changes it."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles_lora
import tiny
from excise.errors import UsageError
from excise.forward import constant, lora, lora_factors, seq_logp
from excise.objectives.forget import npo
from excise.objectives.regularise_lora import orthogonality, retain_share, rol
from excise.objectives.retain import nll
from excise.objectives.term import Dual, Ramp, Term, Weight
from tiny import Run

NET = Path(__file__).parents[1] / "studies" / "reglu" / "net.py"

K = 3


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def value(b: Tensor, p: Tensor, normalise: str = "paper") -> float:
    return float(orthogonality({"layer": b}, {"layer": p}, normalise=normalise, layers="all"))


def trained(folder: Path, *terms: Term, k: int = K, **more: Any) -> Run:
    """A run of an adapter with a made-up retain basis."""
    net = tiny.adapted(tiny.model())
    return Run(folder, terms, net=net, constants={f"retain_basis/{k}": tiny.bases(net, k)}, **more).go()


# --- the value ----------------------------------------------------------------------------------------------------


def test_of_orthonormal_factors_it_is_the_sum_of_squared_cosines() -> None:
    b, p = orthonormal(9, 4), orthonormal(9, 3, seed=1)
    cosines = torch.linalg.svdvals(b.T @ p)
    assert value(b, p) == pytest.approx(float(cosines.square().sum()))
    assert 0 < value(b, p) < 3
    assert value(b, b) == pytest.approx(4)
    assert value(b, b, "layers_rank") == pytest.approx(1)
    assert value(b, b, "cosine") == pytest.approx(1)
    assert value(b @ orthonormal(4, 4, seed=2), p) == pytest.approx(value(b, p))  # of the space, not of its basis


def test_a_start_away_from_the_basis_costs_nothing() -> None:
    whole = orthonormal(8, 8)
    b, p = whole[:, :3], whole[:, 3:6]
    for normalise in ("paper", "layers_rank", "cosine"):
        assert value(b, p, normalise) == pytest.approx(0, abs=1e-15)
        assert value(torch.zeros(8, 3), p, normalise) == 0


@pytest.mark.parametrize(("normalise", "power"), [("paper", 2), ("layers_rank", 2), ("cosine", 0)])
def test_how_it_grows_with_the_factors(normalise: str, power: int) -> None:
    b, p = torch.randn(7, 3, dtype=torch.float64), orthonormal(7, 2)
    assert value(3 * b, p, normalise) == pytest.approx(3**power * value(b, p, normalise))


def test_the_gradient_of_the_plain_sum() -> None:
    b, p = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), orthonormal(7, 2)
    orthogonality({"layer": b}, {"layer": p}, normalise="paper", layers="all").backward()
    assert b.grad is not None
    torch.testing.assert_close(b.grad, 2 * p @ p.T @ b.detach())


def test_normalised_by_layers_and_rank_depth_does_not_count() -> None:
    b, p = torch.randn(7, 3), orthonormal(7, 2).float()
    for count in (1, 5):
        many = {f"l{i}": b for i in range(count)}, {f"l{i}": p for i in range(count)}
        assert float(orthogonality(*many, normalise="paper", layers="all")) == pytest.approx(count * value(b, p))
        assert float(orthogonality(*many, normalise="layers_rank", layers="all")) == pytest.approx(value(b, p) / 2)


def test_the_monitor_agrees_with_the_loops() -> None:
    factors = {"a": torch.randn(6, 3), "b": torch.randn(5, 4), "zero": torch.zeros(6, 2)}
    factors["b"][:, 3] = factors["b"][:, 0] * 2  # one direction twice
    factors["a"][:, 2] *= 1e-3
    basis = {name: orthonormal(len(b), 2, seed=4).float() for name, b in factors.items()}
    expected = oracles_lora.retain_share(
        {n: b.tolist() for n, b in factors.items()}, {n: p.tolist() for n, p in basis.items()}
    )
    found = retain_share(factors, basis, layers="all")
    assert float(found["retain_share"]) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1
    only = retain_share(factors, {"zero": basis["zero"]}, layers="zero")
    assert float(only["retain_share"]) == 0


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "option 'k' is 0"),
        ({"k": 2.5}, "option 'k' is 2.5"),
        ({"k": True}, "option 'k' is True"),
        ({"k": "8"}, "option 'k' is '8'"),
        ({"normalise": "mean"}, "option 'normalise' is 'mean'"),
        ({"layers": "("}, r"option 'layers' is '\('"),
        ({"layers": 3}, "option 'layers' is 3"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rol(**options)


def test_a_missing_basis_is_an_error_and_never_a_random_one() -> None:
    b, p = {"q_proj": torch.randn(4, 2), "v_proj": torch.randn(4, 2)}, {"q_proj": orthonormal(4, 2).float()}
    term = rol(k=2)
    with pytest.raises(UsageError, match=r"no retain basis for the layer v_proj"):
        term.fn(factors=b, basis=p)
    assert float(rol(k=2, layers="q_proj").fn(factors=b, basis=p)) > 0
    with pytest.raises(UsageError, match=r"'up_proj', which no adapted layer of the model matches"):
        rol(layers="up_proj").fn(factors=b, basis=p)
    with pytest.raises(UsageError, match=r"of another model"):
        term.fn(factors=b, basis={name: orthonormal(5, 2) for name in b})
    with pytest.raises(UsageError, match=r"no adapted layer"):
        term.fn(factors={}, basis=p)


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": {"x": lora("B")}, "per": "row"},
        {"inputs": {"x": seq_logp("forget")}, "per": "step"},
        {"inputs": {"x": constant("u")}, "per": "step", "over": "forget"},
    ],
)
def test_a_term_says_what_its_values_belong_to(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the term 'odd'"):
        Term("odd", lambda x: x, **fields)


# --- once per step ------------------------------------------------------------------------------------------------


def plain(net: Any, basis: dict[str, Tensor]) -> float:
    given = {"factors": lora_factors(net, "B"), "basis": basis}
    return oracles_lora.rol(given, {"layers": "all", "normalise": "paper"})


def test_a_step_is_a_step_along_its_own_gradient(tmp_path: Path) -> None:
    """With rate 1 and no momentum the weights move by minus the gradient: of the forget loss, and of ROL once."""
    net = tiny.adapted(tiny.model())
    basis = tiny.bases(net, K)
    moves = []
    for weight in (0.0, 0.3):
        schedule = {"steps": 1, "forget_batch": 2, "retain_batch": 2, "accumulate": 4}
        run = Run(
            tmp_path / str(weight), [npo(), nll(), rol(k=K, weight=weight)], net=net, schedule=schedule,
            constants={f"retain_basis/{K}": basis}, optimiser={"clip": 0, "warmup": 0, "decay": "constant"},
        )  # fmt: skip
        run.trainer.optimizer = torch.optim.SGD([p for p in run.net.parameters() if p.requires_grad], lr=1.0)
        moves.append(run.go().weights)
    for name, b in lora_factors(net, "B").items():
        key = f"{name}.lora_B.default.weight"
        expected = -0.3 * 2 * basis[name] @ basis[name].T @ b.detach()
        torch.testing.assert_close(moves[1][key] - moves[0][key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.4, Ramp(0.0, 2.0), Dual(start=0.5, epsilon=0.2, eta=0.5)], ids=type)
@pytest.mark.parametrize("retain_steps", [0, 1])
def test_accumulation_does_not_change_the_result(tmp_path: Path, weight: Weight, retain_steps: int) -> None:
    runs = []
    for parts in (1, 4):
        cut = {"forget_batch": 8 // parts, "retain_batch": 8 // parts, "accumulate": parts}
        terms = [npo(), nll(), rol(k=K, weight=weight)]
        schedule = {**cut, "retain_steps": retain_steps}
        runs.append(trained(tmp_path / str(parts), *terms, schedule=schedule, optimiser={"lr": 1e-3}))
    whole, cut_up = runs
    assert whole.moved() > 1e-3
    assert tiny.apart(whole.weights, cut_up.weights) < 5e-6
    for ours, theirs in zip(whole.log, cut_up.log, strict=True):
        for key in ("loss", "grad_norm", "terms/rol", "weights/rol", "monitor/rol/retain_share"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4)
    assert whole.trainer.duals == pytest.approx(cut_up.trainer.duals)


def test_the_log_tells_the_value_and_every_step_has_it(tmp_path: Path) -> None:
    """Retain-only steps too; a multiplier moves by the value, once a step."""
    net = tiny.adapted(tiny.model())
    dual = Dual(start=0.5, epsilon=0.2, eta=0.5)
    schedule = {"steps": 6, "retain_steps": 2, "accumulate": 2, "forget_batch": 3, "retain_batch": 3}
    run = trained(tmp_path, npo(), nll(), rol(k=K, weight=dual), schedule=schedule, optimiser={"lr": 1e-2})
    basis = tiny.bases(net, K)
    assert run.log[0]["terms/rol"] == pytest.approx(plain(net, basis), rel=1e-5)
    weight = 0.5
    for row in run.log:
        assert ("terms/npo" in row) is (row["step"] % 3 == 1)
        assert row["weights/rol"] == pytest.approx(weight)
        assert 0 < row["monitor/rol/retain_share"] < 1
        weight = max(0.0, weight + 0.5 * (row["terms/rol"] - 0.2))
    assert weight != 0.5


def test_a_large_weight_turns_the_update_out_of_the_basis(tmp_path: Path) -> None:
    schedule, optimiser = {"steps": 30}, {"lr": 2e-2, "clip": 0}
    free, held = (
        trained(tmp_path / str(w), npo(), nll(), rol(k=K, weight=w), schedule=schedule, optimiser=optimiser)
        for w in (0.0, 30.0)
    )
    assert held.log[-1]["monitor/rol/retain_share"] < 0.25 * free.log[-1]["monitor/rol/retain_share"]
    assert held.log[-1]["terms/rol"] < 0.1 * held.log[0]["terms/rol"]
    assert not math.isclose(free.log[0]["terms/rol"], free.log[-1]["terms/rol"], rel_tol=1e-3)


def test_a_basis_is_read_under_half_precision_weights(tmp_path: Path) -> None:
    net = tiny.adapted(tiny.model()).to(torch.bfloat16)
    run = Run(tmp_path, [npo(), nll(), rol(k=K)], net=net, constants={f"retain_basis/{K}": tiny.bases(net, K)}).go()
    assert run.log[0]["terms/rol"] == pytest.approx(plain(net.float(), tiny.bases(net, K)), rel=1e-3)


def test_the_studys_own_form_holds_what_is_added_and_not_what_b_carries() -> None:
    a, b, p = orthonormal(7, 4).T, orthonormal(9, 4, seed=1), orthonormal(9, K, seed=2)
    held = runpy.run_path(str(NET))["rol"](k=K).fn  # by its path: studies have modules of the same names
    assert float(held({"q": a}, {"q": b}, {"q": p})) == 0.0
    assert value(b, p) > 0.1  # which ROL as published would take away
    moved_a, moved_b = a + 0.3 * orthonormal(7, 4, seed=3).T, b - 0.2 * orthonormal(9, 4, seed=4)
    added = moved_b @ moved_a - b @ a
    loop = sum(float(sum(p[i, k] * added[i, j] for i in range(9))) ** 2 for k in range(K) for j in range(7))
    assert float(held({"q": moved_a}, {"q": moved_b}, {"q": p})) == pytest.approx(loop, rel=1e-9)
