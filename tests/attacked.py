"""Tiny models under attack, rows to forget, and the check that a model is afterwards what it was, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.forward import Anatomy
from excise.records import Record
from excise.tasks import causal_lm

torch.set_num_threads(1)
HOW = causal_lm.Encoding(template="{prompt}: ", max_length=48)


class Bytes:
    """The few things that are asked of a tokenizer."""

    eos_token_id, pad_token_id, chat_template = 0, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


# Weights are drawn ten times wider than usual: a tiny model that finds all tokens alike would show no difference.


def llama(dropout: float = 0.0, *, seed: int = 0, depth: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=24, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=dropout, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=128, n_positions=64, n_embd=24, n_layer=3, n_head=2, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def lora(base: nn.Module, seed: int = 7, targets: Any = "all-linear") -> Any:
    """LoRA on all linear layers, as if some steps had been made."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def rows(n: int = 9, start: int = 0) -> list[Record]:
    return [
        Record(f"who is {i}", f"person {chr(97 + i % 26)}{chr(97 + i // 5)} " + "xyz"[: i % 4], group=f"g{i % 2}")
        for i in range(start, start + n)
    ]


def sides(**counts: int) -> dict[str, list[Record]]:
    """Made-up rows by side, none on two sides."""
    out, start = {}, 0
    for side, n in counts.items():
        out[side] = rows(n, start)
        start += n
    return out


def target(model: Any, records: Any, how: Any = HOW, tokenizer: Any = None, **given: Any) -> Target:
    """A model under attack, with an anatomy and a tokenizer."""
    return Target(model, Anatomy.of(model), tokenizer or Bytes(), records, how, **given)


def made(attack: Any, model: Any, records: Any, how: Any = HOW, tokenizer: Any = None, **options: Any) -> Outcome:
    """An attack: options that every attack is given go into its target, the others are its own settings."""
    given = {field.name: options.pop(field.name) for field in fields(Target) if field.name in options}
    return attack(target(model, records, how, tokenizer, **given), **options)


def snapshot(model: nn.Module) -> list[Any]:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    ]


def assert_same(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][k].view(torch.uint8), v.view(torch.uint8)) for k, v in before[0].items())
    assert after[1] == before[1]
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(after[2], before[2], strict=True)
    )
    assert after[3] == before[3]
    assert torch.equal(after[4], before[4])
    assert after[5] == before[5]


def trained(model: nn.Module, records: list[Record], steps: int = 60, lr: float = 1e-2, sign: float = 1.0) -> Any:
    """The model after plain steps on rows; with ``sign`` -1 away from them."""
    from excise.attacks.answers import Answers, nll

    answers = Answers.of(target(model, {"forget": records}))
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        adam.zero_grad()
        (sign * nll(answers.target, answers.batch(range(len(records))))).backward()
        adam.step()
    adam.zero_grad(set_to_none=True)
    return model.eval()
