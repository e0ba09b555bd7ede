"""In mixed precision the whole step is mixed: the head and the views as well, and policy and reference agree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from excise import recipe, reference, train
from excise.forward import REFERENCE, Anatomy, Batch, logits, masked_mean
from excise.objectives import clreg
from excise.objectives.forget import npo
from excise.objectives.retain import kl, nll
from excise.objectives.term import Term
from excise.schedule import Plan

COUNTS = {"forget": 8, "retain": 8}


def first_step(terms: list[Term], out: Path, precision: str) -> tuple[dict[str, float], set[torch.dtype]]:
    """What the terms say at the first step, and the precisions of the blocks' inner products."""
    net, data = tiny.model(), tiny.Data(COUNTS)
    settings = recipe.build({"schedule": {"steps": 1, "forget_batch": 8, "retain_batch": 8}})
    anatomy = Anatomy.of(net)
    needs = [p for t in terms for p in t.needs() if p.model == REFERENCE]
    stored = reference.store(
        net, anatomy, needs, COUNTS, data.batch, autocast=lambda: train.autocast(precision), batch_rows=3
    )
    seen: set[torch.dtype] = set()
    for block in anatomy.blocks:
        block.mlp.down_proj.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    trainer = train.UnlearnTrainer(
        net, terms, Plan(COUNTS, settings.schedule, 0), data.batch, settings, out, reference=stored, precision=precision
    )
    logged: dict[str, float] = {}
    trainer.log = lambda record, *_: logged.update(record)  # type: ignore[method-assign]
    trainer.train()
    return logged, seen


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_policy_and_reference_agree_before_the_first_step(precision: str, tmp_path: Path) -> None:
    """At the start NPO's ratio is 1 and the divergence is 0, up to the rounding that batches of other sizes bring."""
    logged, seen = first_step([npo(beta=0.1), kl(), clreg(), nll()], tmp_path, precision)
    assert logged["terms/npo"] == pytest.approx(20 * math.log(2), rel=1e-4)
    assert logged["terms/kl"] == pytest.approx(0.0, abs=1e-5)
    assert seen == {torch.float32 if precision == "fp32" else torch.bfloat16}  # the view's block among them


def test_means_of_states_are_made_in_full_precision() -> None:
    states, where = torch.randn(3, 50, 8) + 10, torch.rand(3, 50) > 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = masked_mean(states, where)
    want = torch.stack([s[w].mean(0) for s, w in zip(states, where, strict=True)])
    torch.testing.assert_close(got, want)


def test_logits_are_made_in_the_precision_of_their_pass() -> None:
    net, data = tiny.model(), tiny.Data({"forget": 4})
    batch: Batch = data.batch("forget", range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block = tiny.step_of(net, ("forget", batch)).run([logits("forget")])[logits("forget")]
        inside: Tensor = block.rows(0, 5)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(block.rows(0, 5), inside)
