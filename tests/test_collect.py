"""Statistics of layers are those of loops over tokens, whatever the padding, packing, batches, route or ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles_lora as oracles
import tiny
import two_ranks_moments
from excise import initialise
from excise.errors import InputRefused, UsageError
from excise.forward import Anatomy, Batch, rows_seen
from excise.forward.packing import pack
from excise.initialise import Accumulator, Moments, adapted_linears, collect, contrast_directions, shares_input

KINDS = ("llama", "qwen2", "mistral", "phi", "gemma2", "gpt_neox", "gpt2")
FEW, MANY = 3, 14  # rows whose tokens are fewer than any width, and more than most


def network(kind: str = "llama", **fields: Any) -> nn.Module:
    """An adapted model with an adapter that does something, and biases that do too."""
    net = tiny.model(kind, depth=2, **fields)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return tiny.adapted(net).eval()


def batches(count: int, size: int, *, pad: str = "right", extra: int = 0) -> list[Batch]:
    data = tiny.Data({"forget": count}, pad=pad)
    return [data.batch("forget", range(i, min(i + size, count)), extra=extra) for i in range(0, count, size)]


def taken(net: nn.Module, given: Sequence[Batch], **options: Any) -> dict[str, Moments]:
    return collect(net, Anatomy.of(net), given, **options)


@torch.no_grad()
def read_alone(net: nn.Module, count: int, positions: str) -> dict[str, list[list[list[float]]]]:
    """Outputs of every adapted layer at the positions, of one unpadded row after the other."""
    outputs: dict[str, list[Tensor]] = {}
    for name, module in net.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            kept = outputs.setdefault(name, [])
            module.base_layer.register_forward_hook(lambda _m, _a, y, kept=kept: kept.append(y[0]))  # type: ignore[operator, union-attr]
    given = batches(count, 1)
    for batch in given:
        net(input_ids=batch.input_ids)
    where = [(b.label_mask if positions == "answer" else b.attention_mask.bool())[0] for b in given]
    return {
        name: [y[chosen].double().tolist() for y, chosen in zip(rows, where, strict=True)]
        for name, rows in outputs.items()
    }


def assert_same(got: dict[str, Moments], want: dict[str, Moments], rel: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].count == pytest.approx(want[name].count), name
        for center in (True, False):
            a, b = got[name].covariance(center), want[name].covariance(center)
            assert float((a - b).abs().max()) <= rel * float(b.abs().max()), (name, center)
        scale = float(want[name].mean.abs().max())
        torch.testing.assert_close(got[name].mean, want[name].mean, rtol=0, atol=rel * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_every_architecture_against_loops(kind: str) -> None:
    net = network(kind)
    got = taken(net, batches(MANY, 5), positions="answer")
    want = read_alone(net, MANY, "answer")
    assert got.keys() == want.keys() == adapted_linears(net).keys()
    assert len(got) == {"gpt_neox": 4, "gpt2": 4, "phi": 6}.get(kind, 7) * 2
    for name, rows in want.items():
        vectors = torch.tensor(oracles.pooled_vectors(rows, "token"), dtype=torch.float64)
        expected = Moments.of(vectors)
        assert_same({name: got[name]}, {name: expected}, rel=2e-5)
    name = next(iter(want))  # loops are slow: the covariance itself of one layer
    loops = torch.tensor(oracles.covariance(oracles.pooled_vectors(want[name], "token"), True), dtype=torch.float64)
    torch.testing.assert_close(got[name].covariance(), loops, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["attended", "answer"])
@pytest.mark.parametrize("pooling", ["token", "row", "sum"])
@pytest.mark.parametrize("count", [FEW, MANY])
def test_poolings_and_positions_against_loops(count: int, pooling: str, positions: str) -> None:
    net = network()
    got = taken(net, batches(count, 4), pooling=pooling, positions=positions)
    for name, rows in read_alone(net, count, positions).items():
        want = Moments.of(torch.tensor(oracles.pooled_vectors(rows, pooling), dtype=torch.float64))
        assert_same({name: got[name]}, {name: want}, rel=2e-5)
        assert (got[name].rows is None) == (want.rows is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["token", "row"])
def test_padding_packing_and_batches_do_not_matter(kind: str, pooling: str) -> None:
    net = network(kind, **({} if kind == "gemma2" else {"attn_implementation": "sdpa"}))
    want = taken(net, batches(MANY, 1), pooling=pooling)
    for given in (
        batches(MANY, 4),
        batches(MANY, MANY),
        batches(MANY, 5, extra=3),
        batches(MANY, 5, pad="left", extra=2),
    ):
        assert_same(taken(net, given, pooling=pooling), want, rel=5e-5)


def test_packed_positions_are_known() -> None:
    net = network()
    given = batches(MANY, MANY, extra=4)[0]
    packing = pack(given.attention_mask, width=tiny.WIDTH)
    assert packing is not None
    owner = rows_seen(Anatomy.of(net), given, given.label_mask)
    assert owner.shape == packing.position_ids.shape != given.input_ids.shape
    counts = torch.bincount(owner[owner >= 0], minlength=MANY)
    assert torch.equal(counts, given.label_mask.sum(1))
    laid = packing.lay(given.input_ids)
    for row in range(MANY):
        assert torch.equal(laid[owner == row], given.input_ids[row][given.label_mask[row]])
    unpacked = rows_seen(Anatomy.of(net), batches(2, 2, pad="left")[0], batches(2, 2, pad="left")[0].label_mask)
    assert unpacked[0].tolist() == [0 if m else -1 for m in batches(2, 2, pad="left")[0].label_mask[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["token", "row", "sum"])
@pytest.mark.parametrize("count", [FEW, MANY])
def test_the_input_route_gives_the_outputs_moments(
    kind: str, pooling: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, given = network(kind), batches(count, 5)
    want = taken(net, given, pooling=pooling)
    assert_same(taken(net, given, pooling=pooling, side="input"), want)


def test_layers_that_read_the_same_input_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Accumulator):
        def __init__(self, width: int, **options: Any) -> None:
            made.append(width)
            super().__init__(width, **options)

    monkeypatch.setattr(initialise.taking, "Accumulator", Counted)
    taken(network("llama"), batches(6, 3), side="input")
    # Of each of two blocks: query, key and value; output; gate and up; down. One more than the width, for biases.
    assert sorted(made) == sorted([33, 33, 33, 49] * 2)
    made.clear()
    taken(network("phi"), batches(6, 3), side="input")  # its first MLP layer reads what query, key and value read
    assert sorted(made) == sorted([33, 33, 49] * 2)
    made.clear()
    want = taken(network("phi"), batches(MANY, 5))
    made.clear()
    assert_same(taken(network("phi"), batches(MANY, 5), side="cheaper", vectors=10**6), want)
    # Shared where it pays: not for "dense", which is as wide as its input, nor for "fc2", which is narrower.
    assert sorted(made) == sorted([33, 32, 32] * 2)
    made.clear()
    taken(network("phi"), batches(6, 3), side="cheaper", vectors=6)
    assert sorted(made) == sorted([32, 32, 32, 32, 48, 32] * 2)


def test_rows_limits_the_first_rows() -> None:
    net = network()
    assert_same(taken(net, batches(MANY, 4), rows=6), taken(net, batches(MANY, 6)[:1]))
    assert taken(net, batches(MANY, 4), pooling="row", rows=6)["base_model.model.model.layers.0.mlp.up_proj"].count == 6


@torch.no_grad()
def test_official_sums_over_padding_and_is_not_centred() -> None:
    """Per row the sum over all positions of the padded batch, then H'H / n."""
    net, given = network(), batches(6, 3, extra=2)
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    got = taken(net, given, preset="official", rows=5)[name]
    sums: list[Tensor] = []
    layer = net.get_submodule(name).base_layer
    hook = layer.register_forward_hook(lambda _m, _a, y: sums.extend(y.double().sum(1)))  # type: ignore[operator, union-attr]
    for batch in given:
        net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    h = torch.stack(sums[:5])
    torch.testing.assert_close(got.covariance(center=False), h.T @ h / 5, rtol=1e-6, atol=1e-6)
    assert got.rows is not None
    assert got.rows.dtype == torch.float64
    masked = taken(net, given, pooling="sum", rows=5)[name]
    assert float((masked.mean - got.mean).abs().max()) > 0.1
    derived = taken(net, given, preset="official", rows=5, side="input")[name]
    torch.testing.assert_close(derived.covariance(), got.covariance(), rtol=1e-5, atol=1e-5)


def test_official_reads_256_rows() -> None:
    net = network()
    given = batches(2, 2) * 150
    assert {m.count for m in taken(net, given, preset="official").values()} == {256}


def test_plain_layers_by_name_and_modes_left_alone() -> None:
    for kind, name in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")):
        net, adapted = tiny.model(kind, depth=2).train(), tiny.adapted(tiny.model(kind, depth=2))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.zero_()
        got = taken(net, batches(6, 3), layers=[name])
        assert net.training
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
        want = taken(adapted, batches(6, 3), layers=[f"base_model.model.{name}"])
        assert_same(got, {name: want[f"base_model.model.{name}"]})
        assert got[name].width == {"llama": 48, "gpt2": 4 * tiny.WIDTH}[kind]


def test_precision_of_the_pass_is_the_callers() -> None:
    def half() -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    net = network()
    full, mixed = (taken(net, batches(MANY, 5), **o) for o in ({}, {"autocast": half}))
    name = next(iter(full))
    difference = (full[name].covariance() - mixed[name].covariance()).abs().max() / full[name].covariance().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("side", ["output", "input"])
def test_refusals(side: str) -> None:
    net, given = network(), batches(4, 2)
    for options in ({"pooling": "mean"}, {"positions": "prompt"}, {"side": "left"}, {"preset": "offical"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            taken(net, given, **options)
    with pytest.raises(UsageError, match="no layer has a LoRA adapter"):
        taken(tiny.model(), given, side=side)
    with pytest.raises(UsageError, match="not a linear layer"):
        taken(tiny.model(), given, layers=["model.norm"], side=side)
    with pytest.raises(InputRefused, match="no position"):
        taken(net, [], side=side)
    silent = [Batch(b.input_ids, b.attention_mask, torch.zeros_like(b.label_mask)) for b in given]
    with pytest.raises(InputRefused, match="no position"):
        taken(net, silent, positions="answer", side=side)
    with torch.no_grad():
        net.get_input_embeddings().weight[5:9] = float("nan")  # type: ignore[operator]
    with pytest.raises(InputRefused, match=r"q_proj: NaN or inf"):
        taken(net, given, side=side)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_when_sharing_pays() -> None:
    """Three outputs as wide as the input: above six times the width in vectors. Narrow outputs: never."""
    assert not shares_input(6 * 512, 512)
    assert shares_input(6 * 512 + 1, 512)
    assert not shares_input(10**9, 4096, [1024])
    assert not shares_input(10**9, 4096, [4096])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, two_ranks_moments.__file__, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(Path(folder) / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", two_ranks_moments.CASES)
def test_two_ranks_take_what_one_takes(ranks: list[dict[str, Any]], case: str) -> None:
    alone = two_ranks_moments.run(case)
    for name, want in alone.items():
        first, second = (rank[case][name] for rank in ranks)
        for key in want:
            assert torch.equal(first[key], second[key]), (name, key)
        for key in ("count", "mean", "covariance"):
            scale = float(want[key].abs().max())
            torch.testing.assert_close(first[key], want[key], rtol=0, atol=1e-9 * scale)
        projectors = [made["basis"] @ made["basis"].T for made in (first, want)]
        assert float((projectors[0] - projectors[1]).abs().max()) < 1e-5


def test_a_rank_that_meets_nan_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert all("NaN or inf" in rank["refused"] for rank in ranks)


def test_rank_of_directions_follows_from_rows() -> None:
    net = network()
    sides = [taken(net, batches(count, 4), pooling="row") for count in (3, 4)]
    found = contrast_directions(*(side[next(iter(side))] for side in sides), 0.5, 8, center=True)
    assert found.supported == 3  # four different rows in all, centred: three of them are the first side's too
