"""A pass yields what transformers yields, each tensor once, and computes nothing that nobody reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from excise import forward
from excise.forward import (
    REFERENCE,
    Anatomy,
    Batch,
    Pass,
    View,
    hidden,
    label_count,
    labels,
    logits,
    mask,
    passes,
    pooled,
    seq_logp,
    token_index,
    token_logp,
    token_rows,
)
from excise.objectives.term import Term
from excise.objectives.value import value_of

every_architecture = pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
some_architectures = pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
DATA = tiny.Data({"forget": 5, "retain": 4})


def batch() -> Batch:
    return DATA.batch("forget", range(5))


def plain(net: nn.Module, given: Batch) -> Any:
    """What transformers itself says of a batch."""
    return net(
        input_ids=given.input_ids, attention_mask=given.attention_mask, output_hidden_states=True, use_cache=False
    )


def oracle_logp(out: Any, given: Batch) -> list[list[Tensor]]:
    """Label log-probabilities row by row, by loops."""
    scores = out.logits.float().log_softmax(-1)
    return [
        [scores[r, t - 1, given.input_ids[r, t]] for t in range(given.input_ids.shape[1]) if given.label_mask[r, t]]
        for r in range(len(given.input_ids))
    ]


# --- the same numbers as transformers -----------------------------------------------------------------------------


@every_architecture
def test_products_are_those_of_a_plain_pass(kind: str) -> None:
    net, given = tiny.model(kind), batch()
    out = plain(net, given)
    where = given.attention_mask.bool()
    layers = [*range(1, tiny.DEPTH + 1), -1, -2]
    needs = [
        token_logp("forget"), seq_logp("forget"), logits("forget"), *(hidden("forget", j) for j in layers),
        *(pooled("forget", -1, how) for how in ("attended", "answer", "last")),
    ]  # fmt: skip
    made = tiny.step_of(net, ("forget", given)).run(needs)
    expected = oracle_logp(out, given)
    torch.testing.assert_close(made[token_logp("forget")], torch.stack([v for row in expected for v in row]))
    torch.testing.assert_close(made[seq_logp("forget")], torch.stack([torch.stack(row).sum() for row in expected]))
    block, (rows, places) = made[logits("forget")], given.positions()
    torch.testing.assert_close(block.rows(0, len(block)), out.logits[rows, places - 1])
    for j in layers:
        torch.testing.assert_close(made[hidden("forget", j)][where], out.hidden_states[j][where])
    for how, positions in (("attended", where), ("answer", given.label_mask)):
        means = torch.stack([out.hidden_states[-1][r][positions[r]].mean(0) for r in range(5)])
        torch.testing.assert_close(made[pooled("forget", -1, how)], means)
    last = torch.stack([out.hidden_states[-1][r, int(where[r].sum()) - 1] for r in range(5)])
    torch.testing.assert_close(made[pooled("forget", -1, "last")], last)
    if kind == "gemma2":
        assert out.logits.abs().max() <= 1.5  # the cap bends them: without it the products would differ
        assert net.lm_head(out.hidden_states[-1]).abs().max() > 2


@every_architecture
def test_a_pass_that_is_cut_gives_the_same_states(kind: str) -> None:
    net, given = tiny.model(kind), batch()
    states, where = plain(net, given).hidden_states, given.attention_mask.bool()
    for j in range(tiny.DEPTH):
        made = tiny.step_of(net, ("forget", given)).run([hidden("forget", j)])[hidden("forget", j)]
        torch.testing.assert_close(made[where], states[j][where])
    assert len(Anatomy.of(net).blocks) == tiny.DEPTH
    torch.testing.assert_close(plain(net, given).hidden_states[-1], states[-1], rtol=0, atol=0)


@every_architecture
def test_views_without_dropout_repeat_the_pass(kind: str) -> None:
    net, given = tiny.model(kind), batch()
    where = given.attention_mask.bool()
    for first in range(tiny.DEPTH):
        view = View("forget", first - tiny.DEPTH if first else 0, 0.0)
        layers = range(first + 1, tiny.DEPTH + 1)
        needs = [p for j in layers for p in (hidden(view, j), hidden("forget", j))]
        made = tiny.step_of(net, ("forget", given)).run(needs)
        for j in layers:
            torch.testing.assert_close(made[hidden(view, j)][where], made[hidden("forget", j)][where], rtol=0, atol=0)


@every_architecture
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    net, left = tiny.model(kind), tiny.Data({"forget": 5, "retain": 4}, pad="left")
    view = View("forget", -1, 0.3)
    needs = [pooled("forget", -1, how) for how in ("attended", "answer", "last")]
    needs += [seq_logp("forget"), token_logp("forget"), pooled("forget", 1), pooled(view, -1)]
    want = tiny.step_of(net, ("forget", batch())).run(needs)
    for given in (left.batch("forget", range(5)), left.batch("forget", range(5), extra=4)):
        got = tiny.step_of(net, ("forget", given)).run(needs)
        for p in needs:
            torch.testing.assert_close(got[p], want[p], rtol=1e-4, atol=1e-5)


@some_architectures
def test_gradients_are_those_of_a_plain_pass(kind: str) -> None:
    net, given = tiny.model(kind), batch()
    for adapter in (False, True):
        net = tiny.adapted(net) if adapter else net
        want = torch.stack([v for row in oracle_logp(plain(net, given), given) for v in row]).sum()
        expected = tiny.gradients(net, want)
        got = tiny.step_of(net, ("forget", given)).run([token_logp("forget")])[token_logp("forget")].sum()
        found = tiny.gradients(net, got)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert any("lora_A" in n for n in found)


@some_architectures
@pytest.mark.parametrize("adapter", [False, True])
def test_recomputed_activations_give_the_same_gradients(kind: str, adapter: bool) -> None:
    net = tiny.model(kind)
    net = (tiny.adapted(net) if adapter else net).train()
    view, whole = View("forget", -1, 0.3), View("retain", 0, 0.2)
    needs = [seq_logp("forget"), pooled(view, -1), pooled("forget", 2), pooled(whole, -1), pooled("retain", -1)]

    def loss() -> Tensor:
        sides = ("forget", batch()), ("retain", DATA.batch("retain", range(4)))
        made = tiny.step_of(net, *sides, seed=3).run(needs)
        return torch.stack([(made[p] * (i + 1)).square().mean() for i, p in enumerate(needs)]).sum()

    value = loss()
    want = tiny.gradients(net, value)
    if adapter:
        net.enable_input_require_grads()  # type: ignore[operator]
    net.activation_checkpointing_enable()  # type: ignore[operator]
    again = loss()
    got = tiny.gradients(net, again)
    torch.testing.assert_close(again, value, rtol=0, atol=0)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


# --- derived sides ------------------------------------------------------------------------------------------------


def dropped(given: Batch, seed: int, rate: float = 0.4) -> list[Tensor]:
    """The dropout mask of each row, over its own tokens: what a view multiplies the embeddings with."""
    net = tiny.model()
    view = View("forget", 0, rate)
    made = tiny.step_of(net, ("forget", given), seed=seed).run([hidden(view, 0), hidden("forget", 0), hidden(view, 1)])
    ratio = made[hidden(view, 0)] / made[hidden("forget", 0)]
    return [row[where] for row, where in zip(ratio, given.attention_mask.bool(), strict=True)]


def test_the_dropout_of_a_view_depends_on_seed_and_row_alone() -> None:
    together = dropped(batch(), seed=5)
    for i in range(5):
        alone = dropped(DATA.batch("forget", [i]), seed=5)[0]
        torch.testing.assert_close(alone, together[i])
    shuffled = dropped(DATA.batch("forget", [3, 1, 4], extra=3), seed=5)
    left = dropped(tiny.Data({"forget": 5, "retain": 4}, pad="left").batch("forget", [3, 1, 4]), seed=5)
    for i, row in enumerate([3, 1, 4]):
        torch.testing.assert_close(shuffled[i], together[row])
        torch.testing.assert_close(left[i], together[row])
    other = dropped(batch(), seed=6)
    assert all(not torch.equal(a > 0, b > 0) for a, b in zip(together, other, strict=True))
    same_length = min(len(together[0]), len(together[1]))
    assert not torch.equal(together[0][:same_length] > 0, together[1][:same_length] > 0)


def test_dropout_drops_at_its_rate_and_keeps_the_mean() -> None:
    values = torch.cat([row.flatten() for seed in range(20) for row in dropped(batch(), seed=seed)])
    kept = values > 0
    assert abs(float(kept.float().mean()) - 0.6) < 0.01
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / 0.6))


def test_a_view_moves_with_dropout_and_carries_a_gradient() -> None:
    net, view = tiny.model(), View("forget", -1, 0.3)
    made = tiny.step_of(net, ("forget", batch()), seed=1).run([pooled(view, -1), pooled("forget", -1)])
    assert (made[pooled(view, -1)] - made[pooled("forget", -1)]).abs().max() > 1e-2
    assert "model.layers.0.mlp.up_proj.weight" in tiny.gradients(net, made[pooled(view, -1)].sum())


# --- nothing that nobody reads ------------------------------------------------------------------------------------


class Calls:
    """How often each block ran, and how many positions the head turned into logits at a time."""

    def __init__(self) -> None:
        self.blocks, self.head, self.model = [0] * tiny.DEPTH, list[int](), 0


@contextmanager
def counted(net: nn.Module) -> Iterator[Calls]:
    calls, anatomy = Calls(), Anatomy.of(net)

    def on_block(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls.blocks[index] += 1

        return hook

    def on_head(_module: nn.Module, _args: Any, out: Tensor) -> None:
        if out.shape[-1] == tiny.VOCABULARY:
            calls.head.append(out.numel() // tiny.VOCABULARY)

    def on_model(*_: Any) -> None:
        calls.model += 1

    handles = [block.register_forward_hook(on_block(i)) for i, block in enumerate(anatomy.blocks)]
    handles += [anatomy.head.register_forward_hook(on_head), net.register_forward_hook(on_model)]
    yield calls
    for handle in handles:
        handle.remove()


@every_architecture
def test_only_what_is_read_is_computed(kind: str) -> None:
    net = tiny.model(kind)

    def calls_for(*needs: forward.Product) -> Calls:
        with counted(net) as calls:
            tiny.step_of(net, ("forget", batch())).run(needs)
        return calls

    labelled = int(batch().label_mask.sum())
    states = calls_for(hidden("forget", -1), pooled("forget", -1), pooled("forget", -1, "last"))
    assert (states.blocks, states.head, states.model) == ([1, 1, 1], [], 1)
    low = calls_for(hidden("forget", 1), pooled("forget", 1))
    assert (low.blocks, low.head, low.model) == ([1, 0, 0], [], 1)
    assert calls_for(hidden("forget", 0)).blocks == [0, 0, 0]
    scores = calls_for(token_logp("forget"), seq_logp("forget"), hidden("forget", 1))
    assert (scores.blocks, scores.head, scores.model) == ([1, 1, 1], [labelled], 1)  # no logits for prompts or padding
    view = View("forget", -1, 0.1)
    again = calls_for(pooled(view, -1), pooled("forget", -1), hidden(view, -1))
    assert (again.blocks, again.head, again.model) == ([1, 1, 2], [], 1)
    cut = calls_for(pooled(View("forget", 0, 0.1), 2))
    assert cut.blocks == [2, 2, 0]
    nothing = calls_for(label_count("forget"), token_rows("forget"), labels("forget"), mask("forget", "answer"))
    assert (nothing.blocks, nothing.model) == ([0, 0, 0], 0)


def test_the_reference_costs_no_pass_and_products_are_made_once() -> None:
    net, asked = tiny.model(), []

    def stored(p: forward.Product, given: Batch) -> Tensor:
        asked.append(p)
        return torch.zeros(int(given.label_mask.sum()))

    with counted(net) as calls:
        step = tiny.step_of(net, ("forget", batch()), reference=stored)
        made = step.run(
            [seq_logp("forget", REFERENCE), token_logp("forget", REFERENCE), token_logp("forget", REFERENCE)]
        )
    assert calls.model == 0
    assert asked == [token_logp("forget", REFERENCE)]
    assert made[seq_logp("forget", REFERENCE)].shape == (5,)
    with pytest.raises(ValueError, match="token_logp of the reference was not stored"):
        tiny.step_of(net, ("forget", batch())).run([token_logp("forget", REFERENCE)])


def test_the_model_is_left_as_it_was() -> None:
    net = tiny.model()
    before = {name: list(m.__dict__) for name, m in net.named_modules()}
    tiny.step_of(net, ("forget", batch())).run([hidden("forget", 1)])
    with pytest.raises(RuntimeError):
        tiny.step_of(net, ("forget", copy.copy(batch()).to("meta"))).run([hidden("forget", 1)])
    assert {name: list(m.__dict__) for name, m in net.named_modules()} == before
    assert len(Anatomy.of(net).blocks) == tiny.DEPTH
    assert plain(net, batch()).logits.shape[-1] == tiny.VOCABULARY
    hooks = [m._forward_pre_hooks for m in net.modules()]
    assert not any(hooks)


def test_passes_says_what_a_step_costs() -> None:
    view = View("forget", -1, 0.1)
    needs = [
        seq_logp("forget"), token_logp("forget"), pooled("forget", -1), pooled(view, -1), hidden(view, -2),
        hidden("retain", 2), logits("retain", REFERENCE), label_count("forget"), mask("forget", "answer"),
        forward.constant("u"), forward.lora("A"), forward.column("other", "x"),
    ]  # fmt: skip
    assert passes(needs) == {
        ("forget", "policy"): Pass({-1}, head=True, views={view: {-1, -2}}),
        ("retain", "policy"): Pass({2}),
        ("retain", "reference"): Pass(head=True),
    }
    assert passes([label_count("forget"), forward.lora("A")]) == {}


# --- logits in chunks ---------------------------------------------------------------------------------------------


def flat(term_logits: Tensor, targets: Tensor, index: Tensor, by_row: Tensor, rows: Tensor) -> Tensor:
    """A loss of a token from all of its logits, its label, its place, and numbers of its row."""
    own = term_logits.gather(-1, targets[:, None])[:, 0]
    return (term_logits.amax(-1) - own).square() * (index + 1) + by_row[rows] * term_logits.logsumexp(-1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_chunks_change_neither_values_nor_gradients(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = tiny.model(kind), batch()
    inputs = {
        "term_logits": logits("forget"), "targets": labels("forget"), "index": token_index("forget"),
        "by_row": label_count("forget"), "rows": token_rows("forget"),
    }  # fmt: skip
    term = Term("flat", flat, inputs, over="forget", per="token")
    needs = [*term.needs(), token_logp("forget")]

    def values() -> tuple[Tensor, Tensor, list[int]]:
        with counted(net) as calls:
            made = tiny.step_of(net, ("forget", given)).run(needs)
            return made[token_logp("forget")], value_of(term, made), list(calls.head)

    logp, loss, whole = values()
    want = tiny.gradients(net, logp.sum() + loss.sum())
    assert whole == [len(logp)] * 2
    monkeypatch.setattr("excise.forward.head.CHUNK_ELEMENTS", width * tiny.VOCABULARY)
    in_chunks, loss_in_chunks, sizes = values()
    assert max(sizes) == width
    assert sum(sizes) == 2 * len(logp)
    torch.testing.assert_close(in_chunks, logp)
    torch.testing.assert_close(loss_in_chunks, loss)
    got = tiny.gradients(net, in_chunks.sum() + loss_in_chunks.sum())
    scale = max(float(g.abs().max()) for g in want.values())
    assert tiny.apart(got, want) < 1e-5 * scale


def test_a_chunk_cuts_tokens_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments whose first size happens to be the number of tokens are still whole."""
    net, row = tiny.model(), DATA.batch("forget", [0])
    ids, attended = row.input_ids.expand(3, -1), row.attention_mask.expand(3, -1)
    one_each = torch.zeros_like(attended, dtype=torch.bool)
    one_each[:, 4] = True  # three rows with one label each: as many rows as tokens
    given = Batch(ids, attended, one_each, (0, 1, 2), {"number": torch.tensor([1.0, 2.0, 4.0])})
    inputs = {
        "term_logits": logits("forget"),
        "rows": token_rows("forget"),
        "number": forward.column("forget", "number"),
    }

    def weighted(term_logits: Tensor, rows: Tensor, number: Tensor) -> Tensor:
        return number[rows] * term_logits.logsumexp(-1)

    term = Term("weighted", weighted, inputs, over="forget", per="token")
    want = value_of(term, tiny.step_of(net, ("forget", given)).run(term.needs()))
    monkeypatch.setattr("excise.forward.head.CHUNK_ELEMENTS", tiny.VOCABULARY)
    got = value_of(term, tiny.step_of(net, ("forget", given)).run(term.needs()))
    torch.testing.assert_close(got, want)


# --- what a batch says of itself ----------------------------------------------------------------------------------


def test_batch_products_by_loops() -> None:
    given = DATA.batch("forget", [2, 0, 4])
    needs = [
        label_count("forget"),
        token_rows("forget"),
        token_index("forget"),
        labels("forget"),
        mask("forget", "last"),
    ]
    made = tiny.step_of(tiny.model(), ("forget", given)).run(needs)
    rows, index, tokens = [], [], []
    for r in range(3):
        own = [t for t in range(given.input_ids.shape[1]) if given.label_mask[r, t]]
        rows += [r] * len(own)
        index += list(range(len(own)))
        tokens += [int(given.input_ids[r, t]) for t in own]
    assert made[token_rows("forget")].tolist() == rows
    assert made[token_index("forget")].tolist() == index
    assert made[labels("forget")].tolist() == tokens
    assert made[label_count("forget")].tolist() == [rows.count(r) for r in range(3)]
    lengths = given.attention_mask.sum(1) - 1
    assert made[mask("forget", "last")].nonzero()[:, 1].tolist() == lengths.tolist()
    assert made[mask("forget", "last")].sum(1).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="unknown pooling 'first'"):
        given.masks("first")


def test_factors_of_an_adapter_are_read_without_a_pass() -> None:
    net = tiny.adapted(tiny.model())
    with counted(net) as calls:
        made = tiny.step_of(net).run([forward.lora("A"), forward.lora("B")])
    assert calls.model == 0
    found = made[forward.lora("A")]
    assert len(found) == 7 * tiny.DEPTH
    assert found.keys() == made[forward.lora("B")].keys()
    assert all(v.requires_grad and v.shape[0] == 2 for v in found.values())


def test_a_model_without_the_usual_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer blocks"):
        Anatomy.of(nn.Linear(2, 2))
