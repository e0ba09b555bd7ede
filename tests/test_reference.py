"""What is stored of the model before the run is what it says live, for every product and any later batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from excise import forward, reference, train
from excise.forward import (
    REFERENCE,
    Anatomy,
    Batch,
    Logits,
    Product,
    at_labels,
    hidden,
    logits,
    pooled,
    seq_logp,
    token_logp,
)
from excise.objectives.forget import npo
from excise.objectives.forget_wide import undial
from excise.objectives.retain import kl, rmu_retain
from excise.objectives.value import value_of

DATA = tiny.Data({"forget": 7, "retain": 5})
HOWS = ("attended", "answer", "last")


def kinds(side: str, model: str) -> list[Product]:
    """Every product that takes a pass."""
    return [
        token_logp(side, model), seq_logp(side, model), logits(side, model), hidden(side, 1, model),
        hidden(side, -1, model), at_labels(side, 2, model), pooled(side, -1, "attended", model),
        *(pooled(side, 2, how, model) for how in HOWS),
    ]  # fmt: skip


def store(net: nn.Module, needs: list[Product], rows: int = 3, data: tiny.Data = DATA) -> reference.Reference:
    anatomy = Anatomy.of(net)
    return reference.store(
        net, anatomy, needs, data.counts, data.batch, autocast=lambda: train.autocast("fp32"), batch_rows=rows
    )


def check(stored: reference.Reference, net: nn.Module, side: str, given: Batch) -> None:
    """Every stored product of a batch against the model itself."""
    live = tiny.step_of(net, (side, given)).run(kinds(side, "policy"))
    made = forward.Step(net, Anatomy.of(net), {side: given}, reference=stored).run(kinds(side, REFERENCE))
    where = given.attention_mask.bool()
    for policy, of_reference in zip(kinds(side, "policy"), kinds(side, REFERENCE), strict=True):
        want, got = live[policy], made[of_reference]
        if isinstance(want, Logits):
            assert isinstance(got, Logits)
            assert len(got) == len(want)
            want, got = want.rows(1, len(want)), got.rows(1, len(got))
        elif want.ndim == 3:
            assert got.shape == want.shape
            assert not got[~where].any()
            want, got = want[where], got[where]
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_stored_is_live_for_any_batch_and_stays_so(kind: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(reference, "IN_MEMORY", 0)
    net = tiny.model(kind)
    before = tiny.model(kind)
    stored = store(net, kinds("forget", REFERENCE) + kinds("retain", REFERENCE))
    assert bool(stored._files) is not in_memory
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    for side, rows in (("forget", [6, 0, 3]), ("forget", [2, 2]), ("forget", range(7)), ("retain", [4, 1])):
        check(stored, before, side, DATA.batch(side, rows, extra=2))
    left = tiny.Data(DATA.counts, pad="left")
    check(stored, before, "forget", left.batch("forget", [5, 1, 2]))


def test_one_pass_a_side_and_one_tensor_for_what_shares_it() -> None:
    net = tiny.model().train()
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(net.training))
    stored = store(
        net, [seq_logp("forget", REFERENCE), token_logp("forget", REFERENCE), token_logp("retain", REFERENCE)]
    )
    handle.remove()
    assert calls == [False] * 5  # 7 and 5 rows, three at a time; without dropout
    assert net.training
    assert list(stored.stored) == [token_logp("forget", REFERENCE), token_logp("retain", REFERENCE)]
    assert stored.head is None


def test_nothing_is_run_when_nothing_is_read() -> None:
    net, calls = tiny.model(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    assert store(net, [hidden("forget", 1), seq_logp("retain")]).stored == {}  # products of the policy only
    assert not calls


def test_logits_cost_states_not_vocabularies() -> None:
    net = tiny.model()
    stored = store(net, [logits("forget", REFERENCE)])
    kept = stored.stored[logits("forget", REFERENCE)].values
    assert kept.shape == (int(DATA.batch("forget", range(7)).label_mask.sum()), tiny.WIDTH)
    assert net.lm_head.weight.requires_grad


def test_memory_mapped_numbers_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    net, needs = tiny.model(), [*kinds("forget", REFERENCE)]
    plain = store(net, needs)
    monkeypatch.setattr(reference, "IN_MEMORY", 0)
    mapped = store(net, needs)
    for p, kept in plain.stored.items():
        assert torch.equal(kept.values, mapped.stored[p].values)
        assert torch.equal(kept.offsets, mapped.stored[p].offsets)
    names = [Path(file.name) for file in mapped._files]
    assert len(names) == len(plain.stored)
    del mapped
    assert not any(name.exists() for name in names)  # states of forget rows do not outlive the run


def test_terms_start_at_their_reference_values() -> None:
    """At the first step policy and reference are one model, so these losses are known."""
    net = tiny.model()
    terms = [npo(beta=0.3), kl(), rmu_retain(layer=2), undial(beta=0.0)]
    needs = [p for t in terms for p in t.needs()]
    stored = store(net, [p for p in needs if p.model == REFERENCE])
    sides = {"forget": DATA.batch("forget", [1, 4]), "retain": DATA.batch("retain", [0, 3, 2])}
    made = forward.Step(net, Anatomy.of(net), sides, reference=stored).run(needs)
    npo_value, kl_value, held, distilled = (value_of(t, made).detach() for t in terms)
    torch.testing.assert_close(npo_value, torch.full((2,), 2 / 0.3 * 0.6931472), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl_value, torch.zeros_like(kl_value), rtol=0, atol=1e-5)
    torch.testing.assert_close(held, torch.zeros(3), rtol=0, atol=1e-8)
    own = made[logits("forget")]
    scores = own.rows(0, len(own)).log_softmax(-1)
    torch.testing.assert_close(distilled, -(scores.exp() * scores).sum(-1).detach(), rtol=1e-4, atol=1e-5)
