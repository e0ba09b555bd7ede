"""What a model writes when it is asked: greedy generation in batches, and how it compares with the true answer."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excise.metrics.fluency import Fluency
from excise.metrics.table import Table
from excise.records import Record
from excise.tasks import causal_lm

#: A generation may be this much longer than its true answer: enough to see that it rambles, and the slowest row of a
#: batch sets the batch's time.
LONGER, SPARE = 1.5, 8


def generate(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    encoding: causal_lm.Encoding,
    *,
    max_new_tokens: int,
    batch_rows: int = 64,
    batch_tokens: int = 16_384,
    source: str = "",
) -> list[str]:
    """What the model writes, greedily, for each record's prompt.

    Rows of like length share a left-padded batch and one ``model.generate``. A row's text ends at the end of sequence
    or at its own bound, 1.5 x the true answer's tokens + 8 (ours) and at most ``max_new_tokens``: a bound per row, so
    that batch-mates do not change it. Plain text rows are continued from the first half of their tokens (as MUSE's
    verbatim memorisation, 2407.06460). Runs without autocast; the model's own generation settings (sampling,
    penalties) are set aside for the time being, its end-of-sequence tokens are kept.

    Args:
        model: A transformers model, PEFT or not.
        tokenizer: Its tokenizer.
        records: Rows of one side.
        encoding: How text becomes tokens.
        max_new_tokens: Most new tokens.
        batch_rows: Most rows of a batch.
        batch_tokens: Most tokens of a batch, new ones included: bounds the key-value cache.
        source: The side, for messages.

    Returns:
        One text per record, in the given order.

    Raises:
        InputRefused: A prompt fills the context.
    """
    asked, bounds, _ = questions(records, tokenizer, encoding, max_new_tokens, source)
    written = continued(model, tokenizer, asked, bounds, batch_rows=batch_rows, batch_tokens=batch_tokens)
    return [text.strip() for text in written]


def continued(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    bounds: Sequence[int],
    *,
    batch_rows: int = 64,
    batch_tokens: int = 16_384,
) -> list[str]:
    """How the model goes on, greedily, after each sequence of tokens; see `generate`.

    Args:
        model: A transformers model, PEFT or not.
        tokenizer: Its tokenizer.
        asked: Tokens to go on from; an empty sequence gives an empty text.
        bounds: Most new tokens of each.
        batch_rows: Most rows of a batch.
        batch_tokens: Most tokens of a batch, new ones included.

    Returns:
        One text each, as decoded: white space is left as it is.
    """
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    context = getattr(getattr(core, "config", None), "max_position_embeddings", None) or math.inf
    device = next(model.parameters()).device
    ends = end_tokens(core, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = [""] * len(asked)
    lengths = [len(q) + b for q, b in zip(asked, bounds, strict=True)]
    with _plain_generation(core, device.type) as settings:
        for batch in causal_lm.length_batches(lengths, batch_tokens, batch_rows):
            batch = [i for i in batch if asked[i]]
            if not batch:
                continue
            width = max(len(asked[i]) for i in batch)
            # Positions end somewhere: next to the context's end a row may lose part of its own bound.
            new = int(min(max(bounds[i] for i in batch), context - width))
            if new < 1:
                continue
            rows = [causal_lm.Example(tuple(asked[i]), 1) for i in batch]
            made = causal_lm.collate(rows, pad_id=pad_id, pad_side="left")
            out = core.generate(
                input_ids=made["input_ids"].to(device),
                attention_mask=made["attention_mask"].to(device),
                generation_config=settings(max_new_tokens=new, pad_token_id=pad_id, eos_token_id=ends),
            )[:, width:].tolist()
            for i, ids in zip(batch, out, strict=True):
                stop = next((k for k, token in enumerate(ids) if token in ends), len(ids))
                texts[i] = tokenizer.decode(ids[: min(stop, bounds[i])], skip_special_tokens=True)
    return texts


def references(records: Sequence[Record], tokenizer: Any, encoding: causal_lm.Encoding) -> list[str]:
    """What a generation is compared with: the answer, or the second half of a plain text row."""
    return questions(records, tokenizer, encoding, 1, "")[2]


def questions(
    records: Sequence[Record], tokenizer: Any, encoding: causal_lm.Encoding, most: int, source: str
) -> tuple[list[tuple[int, ...]], list[int], list[str]]:
    """Prompt tokens, bound of new tokens, and true answer of each record; of a plain text, its halves."""
    asked = causal_lm.prompts(records, tokenizer, encoding, source=source)
    examples = causal_lm.encode_records(records, tokenizer, encoding, source=source)
    bounds, answers = [], []
    for i, (record, example) in enumerate(zip(records, examples, strict=True)):
        count, answer = len(example.input_ids) - example.label_start, record.completion
        if record.prompt is None:
            half = len(example.input_ids) // 2
            asked[i], count = example.input_ids[:half], len(example.input_ids) - half
            answer = tokenizer.decode(example.input_ids[half:], skip_special_tokens=True)
        answers.append(answer)
        bounds.append(min(most, math.ceil(LONGER * count) + SPARE))
    return asked, bounds, answers


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own settings (chat models have several)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *more})


@contextlib.contextmanager
def _plain_generation(model: Any, device: str) -> Iterator[Any]:
    """Greedy settings, whatever the model came with, without its warnings, gradients or autocast."""
    import transformers

    logging, config = transformers.utils.logging, transformers.GenerationConfig
    own, level = getattr(model, "generation_config", None), logging.get_verbosity()
    modes = [(module, module.training) for module in model.modules()]
    model.generation_config = config()  # what is not set is filled from here: penalties, temperatures, forced tokens
    model.eval()
    logging.set_verbosity_error()
    try:
        with torch.inference_mode(), torch.autocast(device, enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lambda **changes: config(do_sample=False, num_beams=1, use_cache=True, **changes)
    finally:
        logging.set_verbosity(level)
        model.generation_config = own
        for module, training in modes:
            module.training = training


# --- what was written against the true answer ---------------------------------------------------------------------


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def repetition(text: str) -> float:
    """Share of the four-word runs of a text that occurred before in it (Welleck et al., 1908.04319); 0 without any.

    Example:
        >>> repetition("one two three four five"), repetition("na na na na na na na")
        (0.0, 0.75)
    """
    words = text.lower().split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def generation_columns(generated: Sequence[str], answers: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Columns of a table, one value per row: ROUGE (Lin 2004; stemmed, as TOFU does) and repetition.

    ROUGE sees Latin letters and digits alone. An answer without any is not measured (NaN) instead of scored 0.

    Args:
        generated: What the model wrote.
        answers: What is true, aligned.

    Returns:
        ``rouge_l_recall``, ``rouge_l_f1``, ``rouge1_recall``, ``repetition``: ``[rows]`` fp32.

    Example:
        >>> columns = generation_columns(["Ada was born in Rome"], ["Ada was born in Paris"])
        >>> columns["rouge_l_recall"].round(2).tolist()
        [0.800000011920929]
    """
    values = []
    for text, answer in zip(generated, answers, strict=True):
        if re.search("[a-z0-9]", answer.lower()):
            found = _scorer().score(answer, text)
            rouge = (found["rougeL"].recall, found["rougeL"].fmeasure, found["rouge1"].recall)
        else:
            rouge = (math.nan,) * 3
        values.append((*rouge, repetition(text)))
    block = np.array(values, np.float32).reshape(-1, 4)
    names = ("rouge_l_recall", "rouge_l_f1", "rouge1_recall", "repetition")
    return {name: block[:, i].copy() for i, name in enumerate(names)}


def with_generations(
    table: Table,
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    encoding: causal_lm.Encoding,
    *,
    max_new_tokens: int,
    batch_rows: int = 64,
    fluency: Fluency | None = None,
) -> tuple[Table, list[str]]:
    """The table with ROUGE, repetition and fluency of what the model writes for its rows, and the texts themselves.

    The texts may hold what is to be forgotten: keep them only where that was asked for. Fluency is left out without
    a scorer (`fluency.of_answers`).
    """
    texts = generate(
        model, tokenizer, records, encoding, max_new_tokens=max_new_tokens, batch_rows=batch_rows, source=table.side
    )
    columns = generation_columns(texts, references(records, tokenizer, encoding))
    columns |= {} if fluency is None else {"fluency": fluency.column(texts)}
    return replace(table, columns={**table.columns, **columns}), texts
