"""Multiple choice again, with loops and no shared code: what lm-evaluation-harness is checked against."""

from __future__ import annotations

from typing import Any

import torch


def prompt(row: dict[str, Any]) -> str:
    """The question and its choices as WMDP and MMLU ask them."""
    text = row["question"].strip()
    for place, choice in enumerate(row["choices"]):
        text += "\n" + "ABCDEFGHIJ"[place] + ". " + choice
    return text + "\nAnswer:"


def letter_logp(model: torch.nn.Module, tokenizer: Any, asked: str, letter: str, context: int) -> float:
    """Log p of " A" after a prompt, token by token, the text cut on the left where it is too long."""
    before = tokenizer(asked)["input_ids"]
    whole = tokenizer(f"{asked} {letter}")["input_ids"]
    labels = len(whole) - len(before)
    ids = whole[-(context + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    total = 0.0
    for back in range(labels, 0, -1):
        scores = logits[len(logits) - back]
        total += float(scores[ids[len(ids) - back]] - torch.logsumexp(scores, dim=0))
    return total


def correct(model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, Any]], context: int) -> list[bool]:
    """Whether the first most likely letter is the right one, row by row."""
    out = []
    for row in rows:
        scores = [
            letter_logp(model, tokenizer, prompt(row), "ABCDEFGHIJ"[i], context) for i in range(len(row["choices"]))
        ]
        best = 0
        for place, score in enumerate(scores):
            if score > scores[best]:
                best = place
        out.append(best == row["answer"])
    return out
