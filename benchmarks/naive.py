"""The naive way: NPO + CLReg + cross-entropy as separate passes over whole logits, with a live reference model.

What a competent person writes from the papers without an engine: five forward passes a step (forget, reference, two
dropout views of forget, retain), an attention mask, whole logits, ``log_softmax`` over every position that is read.
Nobody reads the logits of the two views: ``views_skip_head`` spares them, for a more careful author. Formulas, batches,
optimizer and precision are the engine's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from excise.forward import Batch
from excise.objectives.forget import npo_rows
from excise.objectives.regularise import clreg_rows
from excise.train import autocast
from setting import LEARNING_RATE

DROPOUT = 0.1


def whole_logp(logits: Tensor, batch: Batch) -> Tensor:
    """``[B, T - 1]`` log-probabilities of the tokens that follow, 0 where they are no labels."""
    every = F.log_softmax(logits[:, :-1].float(), dim=-1)
    chosen = every.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return chosen * batch.label_mask[:, 1:]


def mean_state(states: Tensor, batch: Batch) -> Tensor:
    """``[B, D]`` mean over the attended positions."""
    mask = batch.attention_mask[..., None].float()
    return (states.float() * mask).sum(1) / mask.sum(1)


class NaiveStep:
    """One optimizer step of NPO + CLReg + cross-entropy, each part with a pass of its own."""

    def __init__(
        self,
        base: nn.Module,
        batches: Sequence[Mapping[str, Batch]],
        *,
        precision: str = "fp32",
        views_skip_head: bool = False,
    ) -> None:
        assert isinstance(base, LlamaForCausalLM)
        self.model, self.reference = copy.deepcopy(base), copy.deepcopy(base).eval().requires_grad_(False)
        self.model.train()
        self.precision, self.views_skip_head = precision, views_skip_head
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.batches = batches

    def _pass(self, model: nn.Module, batch: Batch, **more: Any) -> Any:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **more)

    def _view(self, batch: Batch) -> Tensor:
        """A forward pass of its own over dropped-out embeddings, without the head."""
        dropped = F.dropout(self.model.get_input_embeddings()(batch.input_ids), DROPOUT)
        if self.views_skip_head:
            out = self.model.model(inputs_embeds=dropped, attention_mask=batch.attention_mask, use_cache=False)
            return mean_state(out.last_hidden_state, batch)
        out = self.model(
            inputs_embeds=dropped, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
        )
        return mean_state(out.hidden_states[-1], batch)

    def loss(self, number: int) -> Tensor:
        """The loss on batch ``number``."""
        sides = self.batches[number % len(self.batches)]
        forget, retain = sides["forget"], sides["retain"]
        with autocast(self.precision):
            logp = whole_logp(self._pass(self.model, forget).logits, forget).sum(1)
            with torch.no_grad():
                ref_logp = whole_logp(self._pass(self.reference, forget).logits, forget).sum(1)
            anchor, positive = self._view(forget), self._view(forget)
            kept = self._pass(self.model, retain, output_hidden_states=True)
            nll = -whole_logp(kept.logits, retain).sum() / retain.label_mask.sum()
            negative = mean_state(kept.hidden_states[-1], retain)
            contrast = clreg_rows(
                (anchor,), (positive,), (negative,), loss="dpo", temperature=0.5, reduce="all", scale_infonce=True,
                detach_positive=False, detach_negative=False,
            )  # fmt: skip
            return npo_rows(logp, ref_logp, beta=0.1).mean() + nll + contrast.mean()

    def gradient(self, number: int) -> float:
        """Forward and backward pass."""
        loss = self.loss(number)
        loss.backward()
        return float(loss.detach())

    def __call__(self, number: int) -> float:
        """A whole step."""
        loss = self.gradient(number)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss
