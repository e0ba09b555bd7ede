"""A tiny tagger, a tiny classifier of texts and made-up rows for them; nothing is downloaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from excise.records import Record
from tokenizers_tiny import word_piece

torch.set_num_threads(1)
TAGS = ("O", "B-place", "I-place", "B-work-of-art", "I-work-of-art")
LABELS = ("dull", "fine", "odd")
WORDS = ("Ada", "Bly", "wrote", "the", "long", "book", "in", "1987", "theatre", "then", "there", "slept", "sleeper")


def model(classes: Sequence[str] = TAGS, *, seed: int = 0, width: int = 16) -> Any:
    """A new BERT with weights large enough to tell rows apart, in evaluation mode."""
    tokenizer = word_piece()
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)},
        attn_implementation="eager",
    )  # fmt: skip
    auto = AutoModelForTokenClassification if "O" in classes else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(config, dtype=torch.float32).eval()


def sentences(n: int, *, seed: int = 0, groups: int = 0) -> list[Record]:
    """Tagged sentences of three to nine words, no two alike; ``groups`` deals them to so many persons."""
    draw = torch.Generator().manual_seed(seed)

    def pick(most: int) -> int:
        return int(torch.randint(most, (1,), generator=draw))

    out = []
    for row in range(n):
        tokens = [WORDS[pick(len(WORDS))] for _ in range(3 + pick(7))] + [f"{seed}{row}"]
        tags = ["O"] * len(tokens)
        start, kind = pick(len(tokens) - 1), ("place", "work-of-art")[pick(2)]
        tags[start] = f"B-{kind}"
        if pick(2):
            tags[start + 1] = f"I-{kind}"
        group = f"p{seed}-{row % groups}" if groups else None
        out.append(Record(None, " ".join(tokens), tokens=tuple(tokens), tags=tuple(tags), group=group, line=row + 1))
    return out


def texts(n: int, *, seed: int = 0) -> list[Record]:
    """The same sentences as texts with one label each."""
    made = sentences(n, seed=seed)
    return [
        Record(None, r.completion, tags=(LABELS[(row + len(r.tokens)) % 3],), line=r.line) for row, r in enumerate(made)
    ]


def write_rows(path: Path, records: Sequence[Record]) -> str:
    """Rows as JSON lines."""
    rows = [
        {"tokens": r.tokens, "ner_tags": r.tags} if r.tokens else {"text": r.completion, "label": r.tags[0]}
        for r in records
    ]
    groups = [{} if r.group is None else {"group": r.group} for r in records]
    lines = [json.dumps(row | group) for row, group in zip(rows, groups, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def taught(net: nn.Module, records: Sequence[Record], steps: int = 60) -> nn.Module:
    """The model after some steps on the rows, so that it knows them."""
    from excise.tasks import TASKS, causal_lm

    task = "token_classification" if records[0].tokens else "sequence_classification"
    names = tuple(net.config.id2label[i] for i in range(net.config.num_labels))  # type: ignore[union-attr,index]
    examples = TASKS[task].encode_records(records, word_piece(), causal_lm.Encoding(), names=names)
    made = TASKS[task].collate(examples, pad_id=0)
    adam = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    wanted = made["classes"][made["label_mask"]]
    for _ in range(steps):
        out = net(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
        loss = nn.functional.cross_entropy(out[made["label_mask"]] if out.ndim == 3 else out, wanted)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net


def save(net: Any, folder: Path) -> str:
    """Weights and tokenizer in a folder."""
    net.save_pretrained(folder, safe_serialization=True)
    word_piece().save_pretrained(folder)
    return str(folder)
