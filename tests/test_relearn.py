"""The relearning attack against a loop on a copy, and that the model is afterwards what it was, bit for bit."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from attacked import HOW, Bytes, assert_same, llama, made, rows, snapshot
from excise.attacks import relearn, training
from excise.records import Record
from excise.tasks import causal_lm


def run(model: torch.nn.Module, records: list[Record] | None = None, **options: Any) -> list[float]:
    options = {"steps": (0, 1, 2, 4), "lr": 3e-3, "batch_rows": 3} | options
    return made(relearn.attack, model, {"forget": records or rows()}, **options).mean().tolist()


def test_the_curve_is_that_of_a_loop_on_a_copy() -> None:
    model, records = llama(), rows()
    found = run(model, records)
    clone = copy.deepcopy(model).eval()
    examples = causal_lm.encode_records(records, Bytes(), HOW)
    trained, held = training.halves([r.group for r in records], 0)
    order = training.order(trained, 3, 0)

    def logp(i: int) -> torch.Tensor:
        ids, start = examples[i].input_ids, examples[i].label_start
        scores = clone(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([scores[t - 1, ids[t]] for t in range(start, len(ids))])

    optimizer, expected = torch.optim.AdamW(clone.parameters(), lr=3e-3, weight_decay=0.0), []
    for step in range(5):
        if step in (0, 1, 2, 4):
            with torch.no_grad():
                expected.append(sum(float(logp(i).mean().exp()) for i in held) / len(held))
        optimizer.zero_grad()
        (-torch.cat([logp(i) for i in next(order)]).mean()).backward()
        optimizer.step()
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[-1] > found[0]
    assert run(model, records) == found  # the same again: nothing was left behind
    assert run(model, records, seed=5) != found


@pytest.mark.parametrize("kind", ["full", "frozen", "lora", "frozen lora"])
def test_everything_is_put_back(kind: str) -> None:
    model: Any = llama(dropout=0.3).train()
    model.model.layers[0].eval()
    if kind == "frozen":
        model.model.embed_tokens.requires_grad_(False)
    if "lora" in kind:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.4))
        if kind == "frozen lora":
            model.requires_grad_(False)
    chosen = next(p for p in model.parameters() if p.requires_grad or kind == "frozen lora")
    chosen.grad = torch.ones_like(chosen)
    before = snapshot(model)
    curve = run(model)
    assert_same(model, before)
    assert curve[-1] != curve[0]


def test_put_back_after_an_error_too() -> None:
    model, passes = llama(), []

    @contextmanager
    def failing() -> Any:
        passes.append(1)
        if len(passes) > 5:
            raise KeyboardInterrupt
        yield

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, precision=failing)
    assert_same(model, before)


def test_an_adapter_is_what_the_attacker_trains() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    base = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    changed: set[str] = set()

    def look(_done: int, _total: int) -> None:
        changed.update(n for n, p in model.named_parameters() if n in base and not torch.equal(p, base[n]))

    run(model, progress=look)
    assert not changed


def test_works_in_mixed_precision_and_half_weights() -> None:
    def mixed() -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    model = llama()
    before = snapshot(model)
    assert run(model, precision=mixed) == pytest.approx(run(model), rel=0.1)
    assert_same(model, before)
    half = llama().to(torch.bfloat16)
    before = snapshot(half)
    assert all(math.isfinite(v) for v in run(half))
    assert_same(half, before)


def test_divergence_is_not_a_number_and_leaves_no_trace() -> None:
    model = llama()
    before = snapshot(model)
    found = run(model, lr=1e30)
    assert math.isfinite(found[0])
    assert len(found) == 4
    assert math.isnan(found[-1])
    assert_same(model, before)


def test_halves_cut_every_group() -> None:
    groups = ["a"] * 5 + ["b"] * 4 + ["c"] + [None] * 3
    trained, held = training.halves(groups, 3)
    assert sorted(trained + held) == list(range(13))
    assert abs(len(trained) - len(held)) <= 1
    for name, size in (("a", 5), ("b", 4), (None, 3)):
        assert sum(groups[i] == name for i in trained) in (size // 2, size - size // 2)
    assert training.halves(groups, 3) == (trained, held)
    assert training.halves(groups, 4) != (trained, held)
    assert all(len(half) == 1 for half in training.halves(["a", "b"]))


def test_batches_are_full_and_every_row_comes_round() -> None:
    order = training.order(list(range(7)), 3, 0)
    drawn = [next(order) for _ in range(14)]
    assert all(len(b) == 3 for b in drawn)
    assert np.bincount(np.concatenate(drawn)).tolist() == [6] * 7
    assert len(next(training.order([4, 5], 16, 0))) == 2


def test_refuses_what_cannot_be_attacked() -> None:
    with pytest.raises(ValueError, match="two rows"):
        run(llama(), rows(1))
    with pytest.raises(ValueError, match="ascend"):
        run(llama(), steps=(2, 1))
