"""Models: load or make one, its precision, adapters, saving; no remote code, no pickles."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from excise import recipe
from excise.errors import InputRefused, UsageError


class _Task(NamedTuple):
    """What transformers and PEFT call a task: the class that loads it, how its models' names end, PEFT's name."""

    auto: str
    endings: tuple[str, ...]
    peft: str
    head: str


TASKS = {
    "causal_lm": _Task("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM", "language-model head"),
    "token_classification": _Task(
        "AutoModelForTokenClassification", ("ForTokenClassification",), "TOKEN_CLS", "token-classification head"
    ),
    "sequence_classification": _Task(
        "AutoModelForSequenceClassification", ("ForSequenceClassification",), "SEQ_CLS", "text-classification head"
    ),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}


def load_tokenizer(name: str, revision: str | None = None, *, task: str = "causal_lm") -> Any:
    """The tokenizer of a folder or hub id, with a padding token (its end-of-sequence token where it has none).

    Raises:
        InputRefused: There is none, or it has no end-of-sequence token, which causal models need.
        UsageError: The name is empty.
    """
    from transformers import AutoTokenizer

    if not name:
        raise UsageError("model.name is missing: a folder or hub id, or model.config and a tokenizer for a new model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise InputRefused(f"{name}: no tokenizer can be loaded ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None and (task == "causal_lm" or tokenizer.pad_token_id is None):
        raise InputRefused(f"{name}: the tokenizer has no end-of-sequence token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(settings: recipe.Model, *, tokenizer: Any = None, classes: Sequence[str] = (), seed: int = 0) -> nn.Module:
    """The model of a recipe: from safetensors in a folder or on the hub, or new from ``config``.

    Args:
        settings: The recipe's model section.
        tokenizer: Whose size a new model's vocabulary takes.
        classes: Names of the classes that a classifier without a head of its own gets a new one for.
        seed: Of new weights.

    Raises:
        InputRefused: No such model, weights that are not safetensors, or a model without the head that its task needs.
        UsageError: Neither ``name`` nor ``config`` is given.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    extra = {"attn_implementation": settings.attention} if settings.attention else {}
    if settings.config is not None:
        return _new(settings, tokenizer, classes, seed, extra)
    config = read_config(settings, headless=bool(classes))
    fresh = bool(classes) and not has_head(config, settings.task)
    extra |= _named(classes) if fresh else {}
    where, safe = settings.name, {"revision": settings.revision, "trust_remote_code": False}
    torch.manual_seed(seed)  # a new head is drawn here
    dtype = _DTYPES.get(settings.precision) or (torch.float32 if settings.lora is None else "auto")
    try:
        model, found = getattr(transformers, TASKS[settings.task].auto).from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe, **extra
        )
    except Exception as error:
        raise InputRefused(f"{where}: the weights cannot be loaded as safetensors ({_first_line(error)})") from None
    missing = sorted(k for k in found["missing_keys"] if not (fresh and not k.startswith(model.base_model_prefix)))
    if missing:  # transformers would draw them at random without a word
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputRefused(
            f"{where}: the weights lack {missing[0]!r}{more}: give a whole model with its {TASKS[settings.task].head}"
        )
    return model


def has_head(config: Any, task: str) -> bool:
    """Whether a model of this config has the head that the task needs."""
    return any(kind.endswith(TASKS[task].endings) for kind in config.architectures or [])


def _named(classes: Sequence[str]) -> dict[str, Any]:
    """Fields of a config that name the classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def read_config(settings: recipe.Model, *, headless: bool = False) -> Any:
    """The transformers config of a recipe's model, without its weights.

    Raises:
        InputRefused: No such model, or (unless ``headless`` ones will do) one without the head that its task needs.
        UsageError: Neither ``name`` nor ``config`` is given, or ``config`` has unknown fields.
    """
    from transformers import AutoConfig

    if settings.config is not None:
        fields = dict(settings.config)
        try:
            return AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"model.config: {_first_line(error)}") from None
    if not settings.name:
        raise UsageError("model.name is missing: a folder or hub id, or model.config for a new model")
    try:
        config = AutoConfig.from_pretrained(settings.name, revision=settings.revision, trust_remote_code=False)
    except Exception as error:
        raise InputRefused(f"{settings.name}: no model can be loaded ({_first_line(error)})") from None
    if not headless and (config.architectures or settings.task != "causal_lm") and not has_head(config, settings.task):
        kind, what = (config.architectures or ["the model"])[0], TASKS[settings.task].head
        hint = "a causal language model is needed" if settings.task == "causal_lm" else "train one with excise finetune"
        raise InputRefused(f"{settings.name}: {kind} has no {what}; {hint}")
    return config


def _new(settings: recipe.Model, tokenizer: Any, classes: Sequence[str], seed: int, extra: dict) -> nn.Module:
    import transformers
    from transformers import AutoConfig

    fields = dict(settings.config or {})
    kind = fields.pop("model_type", "llama")
    tokens = (
        {}
        if tokenizer is None
        else {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    try:
        config = AutoConfig.for_model(kind, **{**tokens, **_named(classes), **fields})
        torch.manual_seed(seed)
        auto = getattr(transformers, TASKS[settings.task].auto)
        return auto.from_config(config, dtype=_DTYPES.get(settings.precision, torch.float32), **extra)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"model.config: {_first_line(error)}") from None


def prepare(model: nn.Module, settings: recipe.Model) -> nn.Module:
    """Attach the adapter and choose what is trained.

    Raises:
        UsageError: Unknown LoRA fields, or ``train_only`` that matches nothing.
    """
    if settings.lora is not None:
        from peft import LoraConfig, get_peft_model

        fields = {"task_type": TASKS[settings.task].peft, "target_modules": "all-linear", **settings.lora}
        try:
            config = LoraConfig(**fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"model.lora: {_first_line(error)}") from None
        try:
            model = get_peft_model(model, config)
        except ValueError as error:  # modules that the model does not have
            raise UsageError(f"model.lora: {_first_line(error)}") from None
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()  # type: ignore[operator]
    if settings.train_only:
        try:
            pattern, matched = re.compile(settings.train_only), 0
        except re.error as error:
            raise UsageError(f"model.train_only: not a regular expression ({error})") from None
        for name, parameter in model.named_parameters():
            chosen = bool(pattern.search(name))
            parameter.requires_grad_(chosen)
            matched += chosen
        if not matched:
            raise UsageError(f"model.train_only: no parameter matches {settings.train_only!r}")
    return model


def precision(settings: recipe.Model, model: nn.Module, sample: Callable[[], Any]) -> tuple[str, str | None]:
    """The precision of a run: the weights' own; on a CPU, the fastest by a short probe.

    bf16 products pay on CPUs with matrix instructions, and only with eager attention; a from-scratch guess is wrong on
    one machine or the other, so both are timed on a real batch.

    Args:
        settings: The recipe's model section.
        model: The loaded model.
        sample: Runs one forward pass that ends in a scalar with a gradient.

    Returns:
        ``fp32``, ``bf16`` or ``bf16-mixed``, and the attention implementation to switch to, if any.
    """
    if torch.cuda.is_available():
        return ("bf16-mixed" if torch.cuda.is_bf16_supported() else "fp32"), None
    if next(model.parameters()).dtype != torch.float32:
        return "bf16", None
    if not _amx():  # without matrix instructions bf16 is slower on every CPU that we measured
        return "fp32", None
    own = getattr(model.config, "_attn_implementation", None)
    switch = settings.attention is None and own not in (None, "eager")
    plain = _seconds(model, sample, mixed=False)
    if switch:
        model.set_attn_implementation("eager")  # type: ignore[operator]
    mixed = _seconds(model, sample, mixed=True)
    if switch:
        model.set_attn_implementation(own)  # type: ignore[operator]
    model.zero_grad(set_to_none=True)
    return ("bf16-mixed", "eager" if switch else None) if mixed < 0.9 * plain else ("fp32", None)


def _seconds(model: nn.Module, sample: Callable[[], Any], *, mixed: bool) -> float:
    best = float("inf")
    for attempt in range(4):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = sample()
        loss.backward()
        if attempt:  # the first run also builds kernels
            best = min(best, time.perf_counter() - start)
    return best


def new_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``, with ``<s>`` (put before every text), ``</s>`` and ``<pad>``.

    Raises:
        UsageError: ``size`` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    if size < 259:
        raise UsageError(f"model.tokenizer_size: {size} is too small; 259 or more (256 bytes, 3 special tokens)")
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer=trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save weights (safetensors), config and tokenizer; an adapter is saved as an adapter."""
    model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_result(folder: Path, base: recipe.Model | None = None) -> nn.Module:
    """A model that `save` wrote: a whole model, or an adapter on its base, merged."""
    if not (folder / "adapter_config.json").is_file():
        own = recipe.Model(name=str(folder))
        if base is not None:
            own = recipe.Model(base.task, str(folder), precision=base.precision, attention=base.attention)
        return load(own)
    if base is None:
        raise InputRefused(f"{folder}: an adapter needs its base model")
    from peft import PeftModel

    whole = load(base)
    return PeftModel.from_pretrained(whole, str(folder)).merge_and_unload()


def context_length(model: nn.Module) -> int | None:
    """Longest input that the model's positions allow."""
    return context_of(getattr(model, "config", None))


def context_of(config: Any) -> int | None:
    """The same, from a config. RoBERTa and its kin count positions from the one after padding's."""
    length = getattr(config, "max_position_embeddings", None)
    offset = "roberta" in getattr(config, "model_type", "") or getattr(config, "model_type", "") == "camembert"
    return length - config.pad_token_id - 1 if length and offset else length


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    counts: Sequence[tuple[int, bool]] = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
