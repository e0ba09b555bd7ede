"""States that take the place of never-seen ones: the population's moments, the three parts, and what training does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from excise import population, train
from excise.errors import UsageError
from excise.forward import Anatomy
from excise.forward import population as named
from excise.objectives.regularise_match import PARTS, latent_match, match_parts
from excise.objectives.retain import nll
from excise.objectives.value import value_of

COUNTS = {"forget": 8, "retain": 8, "never_seen": 9}


def states_by_hand(net: Any, data: tiny.Data, side: str, layer: int) -> list[np.ndarray]:
    """The states of each row, one row at a time."""
    with torch.no_grad():
        made = [net(input_ids=row[None], output_hidden_states=True).hidden_states[layer][0] for row in data.rows[side]]
    return [m.double().numpy() for m in made]


def take(net: Any, data: tiny.Data, layer: int, rows: int = 4) -> dict[str, torch.Tensor]:
    asked = named("states", "never_seen", layer=layer)
    found = population.take(
        net, Anatomy.of(net), [asked], data.counts, data.batch, autocast=lambda: train.autocast("fp32"),
        batch_rows=rows,
    )  # fmt: skip
    return found[str(asked.detail)]


@pytest.mark.parametrize("layer", [1, tiny.DEPTH])
def test_the_population_is_that_of_all_tokens(layer: int) -> None:
    net, data = tiny.model(), tiny.Data(COUNTS)
    found, by_row = take(net, data, layer), states_by_hand(net, data, "never_seen", layer)
    tokens = np.concatenate(by_row)
    covariance = np.cov(tokens.T, bias=True)
    values = np.linalg.eigvalsh(covariance)[::-1]
    floor = population.FLOOR * values.mean()
    np.testing.assert_allclose(found["mean"], tokens.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["spread"], np.clip(values, 0, None) / (values + floor), atol=1e-4)
    whitened = (tokens - tokens.mean(0)) @ found["whitening"].double().numpy()
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.diag(found["spread"].numpy()), atol=1e-4)
    means = np.stack([(r - tokens.mean(0)).mean(0) for r in by_row]) @ found["whitening"].double().numpy()
    np.testing.assert_allclose(found["rows"], means, atol=1e-4)
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[i + 1 :]]
    assert float(found["scatter"]) == pytest.approx(float(np.mean(pairs)), rel=1e-4)
    torch.testing.assert_close(take(net, data, layer, rows=9)["spread"], found["spread"], rtol=1e-4, atol=1e-5)


def test_many_directions_are_cut_to_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = tiny.model(), tiny.Data(COUNTS)
    whole = take(net, data, 2)
    monkeypatch.setattr(population, "DIRECTIONS", 5)
    cut = take(net, data, 2)
    assert cut["whitening"].shape == (tiny.WIDTH, 5)
    torch.testing.assert_close(cut["spread"], whole["spread"][:5])  # the floor is that of all of them


def test_a_side_matches_itself() -> None:
    data, net = tiny.Data(COUNTS), tiny.model()
    data.rows["never_seen"], data.counts["never_seen"] = data.rows["forget"], COUNTS["forget"]
    made = latent_match(layers=[2])
    target = take(net, data, 2)
    constants = {str(p.detail): target for p in made.inputs["target"]}  # type: ignore[union-attr]
    step = tiny.step_of(net, ("forget", data.batch("forget", range(8), extra=2)), constants=constants)
    given = step.run(made.needs())
    states, where = (given[made.inputs[k][0] if k == "states" else made.inputs[k]] for k in ("states", "where"))  # type: ignore[index]
    parts = match_parts(states.detach(), where, target)
    assert float(parts["mean"]) == pytest.approx(0, abs=1e-6)
    assert float(parts["covariance"]) == pytest.approx(0, abs=1e-6)
    # Pairs of different rows on both sides, all between them: with the same rows 2 (n - 1) / n - 2 of the scatter.
    assert float(parts["energy"]) == pytest.approx(-2 / 8 * float(target["scatter"]), rel=1e-3)
    assert value_of(made, given).shape == (8,)


def test_each_part_sees_what_it_is_for() -> None:
    generator = torch.Generator().manual_seed(0)
    never = torch.randn(40, 6, 4, generator=generator)
    where = torch.ones(40, 6, dtype=torch.bool)
    target = population.states([(never, where, never.mean(1))])
    same = torch.randn(40, 6, 4, generator=generator)

    def parts(states: torch.Tensor) -> dict[str, float]:
        return {name: float(value) for name, value in match_parts(states, where, target).items()}

    plain, shifted, wide = parts(same), parts(same + 1.0), parts(same * 2)
    assert shifted["mean"] > 10 * plain["mean"]
    assert shifted["covariance"] == pytest.approx(plain["covariance"], rel=1e-4)
    assert wide["covariance"] > 10 * plain["covariance"]
    # Rows that lie in two heaps with the right mean and the right spread of tokens are seen by the energy alone.
    heaps = never.mean((0, 1)) + (torch.arange(40) % 2 * 2.0 - 1)[:, None, None] * torch.tensor([1.0, 0, 0, 0])
    heaps = heaps + torch.randn(40, 6, 4, generator=generator) * torch.tensor([0.05, 1, 1, 1])
    two = parts(heaps)
    assert two["energy"] > 5 * abs(plain["energy"])
    assert two["mean"] < 0.2
    assert two["covariance"] < 0.3


def test_training_brings_states_to_the_never_seen(tmp_path: Path) -> None:
    data, start = tiny.Data(COUNTS), tiny.model()
    with torch.no_grad():  # one token, that of the forgotten, has an embedding like no other
        for row in data.rows["forget"]:
            row[1] = 63
        start.get_input_embeddings().weight[63] += 2.0
    terms = [latent_match(layers=[1, 2]), nll("retain")]
    how: dict[str, Any] = {"schedule": {"steps": 40, "forget_batch": 8}, "optimiser": {"lr": 5e-3}}
    run = tiny.Run(tmp_path, terms, net=start, data=data, **how).go()
    assert run.log[-1]["terms/latent_match"] < 0.5 * run.log[0]["terms/latent_match"]
    for part in PARTS:
        assert f"monitor/latent_match/{part}" in run.log[0]
    total = sum(run.log[0][f"monitor/latent_match/{part}"] for part in PARTS)
    assert total == pytest.approx(run.log[0]["terms/latent_match"], rel=1e-5)


def test_one_row_is_enough_for_numbers() -> None:
    data, net = tiny.Data({"forget": 1, "never_seen": 3}), tiny.model()
    target = take(net, data, 2)
    made = latent_match(layers=[2])
    constants = {str(p.detail): target for p in made.inputs["target"]}  # type: ignore[union-attr]
    step = tiny.step_of(net, ("forget", data.batch("forget", [0])), constants=constants)
    value = value_of(made, step.run(made.needs()))
    tiny.gradients(net, value.sum())
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("options", [{"parts": []}, {"parts": ["median"]}, {"refresh": -2}, {"layers": "first"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="latent_match"):
        latent_match(**options)
