"""The audited bound: its formula, its error rate by simulation, and the command on models that know their canaries."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from excise import canary, cli
from excise.errors import IntegrityFailed, UsageError
from excise.metrics import audit
from excise.metrics.audit import Guesses


def looped_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 with loops over every number of right guesses."""
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))

    def mass(k: int) -> float:
        return math.comb(r, k) * rate**k * (1 - rate) ** (r - k)

    tail = sum(mass(k) for k in range(v, r + 1))
    best = max((sum(mass(k) for k in range(v - i, v)) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, tail + 2 * m * delta * best)


@pytest.mark.parametrize(("epsilon", "delta"), product((0.0, 0.3, 1.0, 4.0), (0.0, 1e-5, 1e-2)))
@pytest.mark.parametrize("right", [0, 1, 9, 14, 20])
def test_p_value_is_the_theorem(right: int, epsilon: float, delta: float) -> None:
    ours = audit.p_value(Guesses(30, 20, right), epsilon, delta)
    assert ours == pytest.approx(looped_p_value(30, 20, right, epsilon, delta), abs=1e-12)


def test_bound_sits_where_the_p_value_crosses() -> None:
    found = Guesses(200, 100, 80)
    bound = audit.epsilon_bound(found, level=0.95)
    assert audit.p_value(found, bound - 1e-6) < 0.05 <= audit.p_value(found, bound + 1e-6)
    assert audit.epsilon_bound(found, level=0.95, delta=1e-3) < bound < audit.epsilon_bound(found, level=0.9)
    assert audit.epsilon_bound(Guesses(200, 100, 55)) == 0.0


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.5])
def test_error_rate_is_nominal(epsilon: float) -> None:
    """Randomised response is exactly epsilon-private: its bound exceeds epsilon in at most 1 - level of the runs."""
    rng, runs, m, level = np.random.default_rng(0), 4000, 60, 0.9
    right = rng.binomial(m, 1 / (1 + math.exp(-epsilon)), size=runs)  # a guess lands on the coin's truth so often
    one = [audit.epsilon_bound(Guesses(m, m, k), level=level) > epsilon for k in range(m + 1)]
    both = [audit.two_sided_bound(Guesses(m, m, k), level=level) > epsilon for k in range(m + 1)]
    noise = 3 * math.sqrt(0.1 * 0.9 / runs)
    assert 0.01 < np.mean(np.array(one)[right]) <= 0.1 + noise  # and it is no bound that can never be wrong
    assert np.mean(np.array(both)[right]) <= 0.1 + noise


def test_guesses_at_the_ends_only() -> None:
    score, coin = np.arange(10.0), np.array([0, 1, 0, 0, 0, 0, 0, 1, 1, 1], bool)
    assert audit.guess(score, coin, share=0.4) == Guesses(10, 4, 3)
    assert audit.guess(score, coin, share=1.0) == Guesses(10, 10, 7)
    with pytest.raises(ValueError, match="finite"):
        audit.guess([math.nan, 1.0], [True, False])
    with pytest.raises(ValueError, match="share"):
        audit.guess([0.0, 1.0], [True, False], share=0.0)


def test_clopper_pearson_at_zero_and_by_its_definition() -> None:
    assert audit.clopper_pearson_upper(0, 50, level=0.95) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert audit.clopper_pearson_upper(7, 7) == 1.0
    upper = audit.clopper_pearson_upper(3, 40, level=0.9)
    tail = sum(math.comb(40, k) * upper**k * (1 - upper) ** (40 - k) for k in range(4))
    assert tail == pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize("error", [0.1, 0.3, 0.5])
def test_information_bound_holds_at_its_level(error: float) -> None:
    """For a binary symmetric channel the information is 1 - h(error): the bound exceeds it in at most 10 %."""
    truth = 1 + error * math.log2(error) + (1 - error) * math.log2(1 - error)
    draws = np.random.default_rng(1).binomial(80, error, size=3000)
    over = np.mean([audit.information_bound(int(k), 80, level=0.9) > truth + 1e-12 for k in draws])
    assert over <= 0.1 + 3 * math.sqrt(0.09 / 3000)
    assert audit.information_bound(0, 80) > 0.7


def test_probe_on_shuffled_coins_carries_nothing() -> None:
    rng = np.random.default_rng(0)
    states, coin = rng.normal(size=(300, 8)), rng.random(300) < 0.5
    errors, n = audit.probe_errors(states, coin)
    assert audit.information_bound(errors, n) == 0.0
    states[:, 0] += 6 * coin
    errors, n = audit.probe_errors(states, coin)
    assert audit.information_bound(errors, n) > 0.6


def test_canaries_are_dealt_by_a_fair_coin_and_guarded(tmp_path: Path) -> None:
    made = canary.make(tmp_path / "c", 400, facts=2, seed=3)
    chosen = {json.loads(line)["group"] for line in made.included.read_text().splitlines()}
    others = {json.loads(line)["group"] for line in made.excluded.read_text().splitlines()}
    assert chosen == {name for name, coin in made.coins.items() if coin}
    assert chosen | others == set(made.coins)
    assert not chosen & others
    assert 150 < len(chosen) < 250
    assert len(made.included.read_text().splitlines()) == 2 * len(chosen)
    assert canary.read(tmp_path / "c").coins == made.coins
    again = canary.make(tmp_path / "d", 400, facts=2)
    assert again.coins != made.coins  # no seed: nobody can draw the coins again
    made.excluded.write_text(made.excluded.read_text() + "\n")
    with pytest.raises(IntegrityFailed, match=r"excluded\.jsonl"):
        canary.read(tmp_path / "c")
    with pytest.raises(UsageError, match="fewer than"):
        canary.make(tmp_path / "few", 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Canaries, and a small model trained on those that the coin chose."""
    folder = tmp_path_factory.mktemp("audit")
    made = canary.make(folder / "canaries", 60, seed=0)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    recipe = {
        "model": {"config": config, "tokenizer_size": 600, "precision": "fp32"},
        "data": {"retain": str(made.included), "untouched": 0.0, "max_length": 96},
        "schedule": {"epochs": 40, "retain_batch": 10}, "optimiser": {"name": "muon", "lr": 0.02, "adamw_lr": 3e-3},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli.main(["finetune", str(folder / "recipe.yaml"), "--out", str(folder / "model")]) == 0
    return folder / "canaries", folder / "model"


def test_a_model_that_knows_its_canaries_is_caught(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder, model = trained
    capsys.readouterr()
    assert cli.main(["audit", str(model), "--canaries", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    epsilon = found["epsilon"]
    assert 0.8 * epsilon["at_most"] < epsilon["bound"] <= epsilon["at_most"]
    assert {layer["layer"] for layer in found["layers"]} == {1, 2}
    assert cli.main(["audit", str(model), "--canaries", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "epsilon" in shown
    assert "canar" in shown
    text = folder / "included.jsonl"
    assert json.loads(text.read_text().splitlines()[0])["answer"] not in shown


def test_other_canaries_show_nothing(trained: tuple[Path, Path], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Canaries that the model never met: both halves are strangers."""
    _, model = trained
    canary.make(tmp_path / "others", 60, seed=9)
    capsys.readouterr()
    assert cli.main(["audit", str(model), "--canaries", str(tmp_path / "others"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"]["bound"] == 0.0
    assert all(layer["bits"] == 0.0 for layer in found["layers"])


def test_refusals(tmp_path: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["audit", str(trained[1]), "--canaries", str(tmp_path)]) == 3
    assert "coins.json" in capsys.readouterr().err
    assert cli.main(["canaries", "--out", str(tmp_path / "c"), "--number", "4"]) == 2
    assert not (tmp_path / "c").exists()
