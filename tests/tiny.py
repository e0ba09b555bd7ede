"""Tiny models, rows and training runs that the tests of the engine share."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from excise import population, recipe, reference, train
from excise.forward import REFERENCE, Anatomy, Batch, Step, lora_factors
from excise.objectives.term import Term
from excise.schedule import Plan

torch.set_num_threads(1)
VOCABULARY, WIDTH, DEPTH = 64, 32, 3

#: Fields of a config for each architecture, beyond the sizes that all share.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    # A cap far below the usual 30, so that it bends the logits of a tiny model too.
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 1.5, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
}


def model(kind: str = "llama", *, seed: int = 0, depth: int = DEPTH, **fields: Any) -> Any:
    """A new model of an architecture, fp32, in evaluation mode, with weights large enough to tell layers apart."""
    names = ("n_embd", "n_layer", "n_head") if kind == "gpt2" else (
        "hidden_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    sizes = dict(zip(names, (WIDTH, depth, 4), strict=True))
    inner = {} if kind == "gpt2" else {"intermediate_size": 48}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    own = {**special, **sizes, **inner, **ARCHITECTURES[kind], **fields}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, initializer_range=0.1, **own)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    """A model with LoRA on all linear layers, as if some steps had been made: ``B`` is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    out = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return out


def bases(net: nn.Module, k: int, seed: int = 3) -> dict[str, Tensor]:
    """``k`` orthonormal directions for each adapted layer of a model, drawn at random; none without an adapter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(len(b), k, generator=generator)).Q
        for name, b in lora_factors(net, "B").items()
    }


class Data:
    """Made-up rows of several sides, each of a prompt of three tokens and an answer of three to eight."""

    def __init__(self, counts: Mapping[str, int], *, pad: str = "right", seed: int = 1) -> None:
        self.counts, self.pad = dict(counts), pad
        generator = torch.Generator().manual_seed(seed)

        def row() -> Tensor:
            length = int(torch.randint(6, 12, (1,), generator=generator))
            return torch.randint(1, VOCABULARY, (length,), generator=generator)

        self.rows = {side: [row() for _ in range(count)] for side, count in self.counts.items()}

    def batch(self, side: str, indices: Sequence[int], *, extra: int = 0) -> Batch:
        """Rows as tensors, with ``extra`` more columns of padding than needed."""
        rows = [self.rows[side][i] for i in indices]
        length = max(map(len, rows)) + extra
        ids, attended = (
            torch.zeros(len(rows), length, dtype=torch.long),
            torch.zeros(len(rows), length, dtype=torch.long),
        )
        labelled = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = 0 if self.pad == "right" else length - len(row)
            ids[i, start : start + len(row)] = row
            attended[i, start : start + len(row)] = 1
            labelled[i, start + 3 : start + len(row)] = True
        return Batch(ids, attended, labelled, tuple(int(i) for i in indices))


def step_of(net: nn.Module, *batches: tuple[str, Batch], **more: Any) -> Step:
    """A micro-batch of some sides."""
    return Step(net, Anatomy.of(net), dict(batches), **more)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the trained parameters that the loss reaches; the model keeps none."""
    net.zero_grad(set_to_none=True)
    loss.backward()
    out = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return out


def weights(net: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def apart(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest difference of two sets of tensors with the same names."""
    assert left.keys() == right.keys()
    return max(float((left[k].float() - right[k].float()).abs().max()) for k in left)


class Logged(TrainerCallback):
    """Keeps what a run logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep a row of a step; the Trainer's closing row is none."""
        if logs and "loss" in logs:
            self.rows.append({"step": state.global_step, **logs})


class Run:
    """One training run of terms on made-up rows: ``Run(...).go()`` trains, ``.log`` is what it logged."""

    def __init__(
        self,
        out: Path | str,
        terms: Sequence[Term],
        *,
        net: nn.Module | None = None,
        data: Data | None = None,
        schedule: Mapping[str, Any] | None = None,
        optimiser: Mapping[str, Any] | None = None,
        should_stop: Callable[[int], bool] | None = None,
        constants: Mapping[str, Any] | None = None,
        **recipe_fields: Any,
    ) -> None:
        self.net = copy.deepcopy(net) if net is not None else model()
        self.data = data or Data({"forget": 12, "retain": 20})
        self.settings = recipe.build(
            {
                "schedule": {"steps": 4, "forget_batch": 4, "retain_batch": 4, **(schedule or {})},
                "optimiser": {"lr": 1e-2, **(optimiser or {})},
                **recipe_fields,
            }
        )
        self.out, self.logged = Path(out), Logged()
        needs = [p for t in terms for p in t.needs() if p.model == REFERENCE]
        stored = reference.store(
            self.net, Anatomy.of(self.net), needs, self.data.counts, self.data.batch,
            autocast=lambda: train.autocast("fp32"),
        )  # fmt: skip
        self.before = weights(self.net)
        read = [p for t in terms for p in t.needs()]

        def retake(step: int | None) -> dict[str, Any]:
            """What terms read of all rows of a side: at the start, or what is due after a step."""
            return population.take(
                self.net, Anatomy.of(self.net), population.wanted(read, step=step), self.data.counts, self.data.batch,
                autocast=lambda: train.autocast("fp32"), step=step,
            )  # fmt: skip

        self.trainer = train.UnlearnTrainer(
            self.net, terms, Plan(self.data.counts, self.settings.schedule, self.settings.seed), self.data.batch,
            self.settings, self.out, reference=stored, constants={**(constants or {}), **retake(None)},
            should_stop=should_stop, retake=retake, callbacks=[self.logged],
        )  # fmt: skip

    def go(self) -> Run:
        """Train to the end."""
        self.trainer.train()
        return self

    def resume(self) -> Run:
        """Train on from the newest whole checkpoint."""
        self.trainer.resume(train.checkpoints(self.out)[-1])
        return self

    @property
    def log(self) -> list[dict[str, Any]]:
        """Logged rows."""
        return self.logged.rows

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights now."""
        return weights(self.net)

    def moved(self) -> float:
        """Largest change of a weight so far."""
        return apart(self.before, self.weights)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
