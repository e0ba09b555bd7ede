"""Where an update acts: shares and angles against loops and against spaces whose angles are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles_lora
import tiny
from excise.artifacts import finite
from excise.commands.measuring import diagnostics
from excise.commands.measuring.diagnostics import geometry, layer, update_directions
from excise.initialise.moments import Moments
from excise.initialise.starts import Factors
from excise.reporting import adapter

WIDTH, IN, RANK = 12, 7, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def axes(*places: int) -> Tensor:
    """Columns of the identity."""
    return torch.eye(WIDTH)[:, list(places)]


def rows_along(*scales: float, seed: int = 0, count: int = 40) -> Tensor:
    """Rows whose variance lies on the first axes, in these sizes, and nowhere else."""
    out = torch.zeros(count, WIDTH)
    out[:, : len(scales)] = drawn(count, len(scales), seed=seed) * torch.tensor(scales) + 5.0
    return out


def moments(forget: Tensor, retain: Tensor) -> dict[str, Moments]:
    return {"forget": Moments.of(forget), "retain": Moments.of(retain)}


@pytest.mark.parametrize("count", [8, 40], ids=["fewer rows than the width", "more"])
@pytest.mark.parametrize("center", [True, False])
def test_shares_and_spectrum_agree_with_the_loops(count: int, center: bool) -> None:
    forget, retain = drawn(count, WIDTH, seed=1) + 2, drawn(count, WIDTH, seed=2) * torch.arange(WIDTH)
    seen = moments(forget, retain)
    assert (seen["forget"].second is None) is (count < WIDTH)
    begun = Factors(drawn(RANK, IN, seed=3), drawn(WIDTH, RANK, seed=4))
    trained = Factors(begun.A + 0.1 * drawn(RANK, IN, seed=5), begun.B + 0.1 * drawn(WIDTH, RANK, seed=6))
    found = layer(seen, trained, begun, k=4, beta=0.3, center=center)
    update = (trained.B @ trained.A - begun.B @ begun.A).double()
    written = {"before": begun.B.tolist(), "after": torch.linalg.svd(update).U[:, :RANK].tolist()}
    for when, columns in written.items():
        for side, rows in (("forget", forget), ("retain", retain)):
            expected = oracles_lora.captured_share(rows.tolist(), columns, center=center)
            assert found[when][side]["share"] == pytest.approx(expected, rel=1e-4)
    covariances = [oracles_lora.covariance(rows.tolist(), center) for rows in (forget, retain)]
    contrast = 0.7 * torch.tensor(covariances[0]) - 0.3 * torch.tensor(covariances[1])
    values = torch.linalg.eigvalsh(contrast.double())
    values = values[values.abs() > 1e-6 * values.abs().max()] / values.abs().max()  # those that the rows span
    torch.testing.assert_close(found["spectrum"]["top"], values.flip(0)[:4].tolist(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["spectrum"]["bottom"], values[:4].tolist(), rtol=1e-4, atol=1e-4)


def test_angles_of_known_spaces() -> None:
    """The update writes to one forget direction and to one at 60 degrees from a retain direction."""
    turned = math.cos(math.pi / 3) * axes(3) + math.sin(math.pi / 3) * axes(9)
    retain = torch.zeros(40, WIDTH)
    retain[:, 3:5] = drawn(40, 2, seed=8)
    seen = moments(rows_along(3.0, 2.0), retain)
    trained = Factors(drawn(2, IN), torch.cat((axes(0), turned), dim=1) @ drawn(2, 2, seed=9))
    found = layer(seen, trained, k=2)
    assert found["after"]["forget"]["cosines"] == pytest.approx([1, 0], abs=1e-5)
    assert found["after"]["retain"]["cosines"] == pytest.approx([0.5, 0], abs=1e-5)
    assert found["before"] is None
    assert (found["rank"], found["width"], found["chance"]) == (2, WIDTH, 2 / WIDTH)
    assert found["spectrum"]["top"][0] > 0 > found["spectrum"]["bottom"][0]


def test_only_what_training_changed_counts_as_the_update() -> None:
    """A start that is still there after training moved nothing, however large it is."""
    begun = Factors(drawn(RANK, IN, seed=1), axes(0, 1, 2))
    seen = moments(rows_along(1.0, 1.0, 1.0), drawn(40, WIDTH, seed=3))
    same = layer(seen, begun, begun)
    assert same["after"] is None
    assert same["before"]["forget"]["share"] == pytest.approx(1, abs=1e-5)
    away = begun.B.clone()
    away[7, 0] += 1e-3  # a small change in another direction is the whole update
    moved = layer(seen, Factors(begun.A, away), begun)
    assert moved["after"]["forget"]["share"] == pytest.approx(0, abs=1e-5)
    assert update_directions(Factors(begun.A, away), begun).shape == (WIDTH, 1)  # type: ignore[union-attr]
    both = Factors(begun.A + drawn(RANK, IN, seed=7), begun.B + drawn(WIDTH, RANK, seed=8))
    found = update_directions(both, begun)  # of rank 2r, of which the r leading ones count
    assert found is not None
    u = torch.linalg.svd((both.B @ both.A - begun.B @ begun.A).double()).U[:, :RANK]
    torch.testing.assert_close(found @ found.T, u @ u.T, rtol=1e-5, atol=1e-6)


def test_a_side_without_variance_is_not_shown() -> None:
    seen = moments(torch.ones(20, WIDTH), drawn(20, WIDTH))
    found = layer(seen, Factors(drawn(2, IN), drawn(WIDTH, 2)), k=2)
    assert found["after"]["forget"]["share"] is None
    assert 0 < found["after"]["retain"]["share"] < 1


def test_a_picture_of_a_model(tmp_path: Any) -> None:
    """Layers of a real adapter; the entries are plain JSON and the report draws one panel for each."""
    net = tiny.adapted(tiny.model())
    trained = diagnostics.factors(net)
    assert len(trained) == 7 * tiny.DEPTH
    outs = {name: len(f.B) for name, f in trained.items()}
    sides = {
        side: {name: Moments.of(drawn(30, out, seed=number)) for name, out in outs.items()}
        for number, side in enumerate(("forget", "retain"))
    }
    missing = next(iter(outs))
    del sides["retain"][missing]
    start = {name: Factors(f.A, torch.zeros_like(f.B)) for name, f in trained.items()}
    picture = geometry(sides, trained, start, k=4, taken_for="picture")
    assert [entry["name"] for entry in picture["layers"]] == [name for name in outs if name != missing]
    section = adapter.section(json.loads(json.dumps(finite(picture), allow_nan=False)))
    assert [figure.name for figure in section.figures] == ["captured", "angles"]
    assert len(section.figures[1].panels) == len(section.lines) == len(outs) - 1
    assert "At the start the adapter wrote nothing" in section.said[1]
    assert "for these pictures alone" in section.said[2]
    net.get_parameter(f"{missing}.lora_B.default.weight").data.zero_()
    assert bool(trained[missing].B.any()), "a copy"


def test_chance_is_what_random_directions_hold() -> None:
    seen = {side: Moments.of(drawn(400, 64, seed=number)) for number, side in enumerate(("forget", "retain"))}
    shares = [
        layer(seen, Factors(drawn(8, 20, seed=s), drawn(64, 8, seed=100 + s)))["after"]["forget"]["share"]
        for s in range(20)
    ]
    assert sum(shares) / 20 == pytest.approx(8 / 64, rel=0.1)
