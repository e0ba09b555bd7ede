"""Evaluation, timed: a forward pass for each metric against one sweep, and generation one by one against batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from zlib import compress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from excise import models, world
from excise.forward import Anatomy
from excise.metrics import rows
from excise.metrics.measure import generate, sweep
from excise.records import Record
from excise.tasks import causal_lm
from setting import model

VOCABULARY, PEOPLE, ROWS_AT_ONCE, NEW_TOKENS = 4096, 10, 32, 64
ENCODING = causal_lm.Encoding(max_length=256)
MEMORY = ("probability", "perplexity", "exact_memorization", "extraction_strength")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
Result = dict[str, NDArray[np.float64]]


class Reading:
    """A model, its tokenizer, and the question-answer pairs of two sides: 100 rows each of a synthetic world."""

    def __init__(self) -> None:
        made = world.world(seed=0, forget=PEOPLE, never_seen=PEOPLE)
        self.tokenizer = models.new_tokenizer(world.corpus(made), VOCABULARY)
        self.model = model(VOCABULARY).eval()
        self.anatomy = Anatomy.of(self.model)
        self.sides = {
            side: [Record(row["question"], row["answer"]) for row in getattr(made, side)]
            for side in ("forget", "never_seen")
        }

    # --- metrics --------------------------------------------------------------------------------------------------

    def together(self, _: int = 0) -> Result:
        """The engine's way: one sweep over both sides, then every metric from the saved columns."""
        tables = sweep(self.model, self.anatomy, self.tokenizer, self.sides, ENCODING).tables
        forget = tables["forget"]
        nll, tokens = rows.nll_and_tokens(forget)
        found = {
            "probability": rows.probability(forget),
            "perplexity": np.exp(nll / tokens),
            "exact_memorization": rows.exact_memorization(forget),
            "extraction_strength": rows.extraction_strength(forget),
        }
        attacks = {f"{a}/{side}": rows.attack_score(t, a) for side, t in tables.items() for a in ATTACKS}
        return found | attacks

    def apart(self, _: int = 0) -> Result:
        """A pass for each metric: 32 rows at a time in the order of the data, whole logits, the metric from them."""
        found = {name: self._pass(getattr(self, f"_{name}"), "forget") for name in MEMORY}
        for attack in ATTACKS:
            for side in self.sides:
                found[f"{attack}/{side}"] = self._pass(getattr(self, f"_{attack}"), side)
        return found

    @torch.inference_mode()
    def _pass(self, metric: Callable[[Tensor, Tensor, str], float], side: str) -> NDArray[np.float64]:
        values: list[float] = []
        examples = causal_lm.encode_records(self.sides[side], self.tokenizer, ENCODING)
        for start in range(0, len(examples), ROWS_AT_ONCE):
            some = examples[start : start + ROWS_AT_ONCE]
            ids = pad_sequence([torch.tensor(e.input_ids) for e in some], batch_first=True)
            lengths = torch.tensor([len(e.input_ids) for e in some])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            every = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
            for row, example in enumerate(some):
                first, last = example.label_start, len(example.input_ids)
                text = self.sides[side][start + row].completion
                values.append(metric(every[row, first - 1 : last - 1], ids[row, first:last], text))
        return np.array(values)

    @staticmethod
    def _chosen(logp: Tensor, labels: Tensor) -> Tensor:
        return logp.gather(-1, labels[:, None]).squeeze(-1)

    def _probability(self, logp: Tensor, labels: Tensor, _: str) -> float:
        return float(self._chosen(logp, labels).mean().exp())

    def _perplexity(self, logp: Tensor, labels: Tensor, _: str) -> float:
        return float((-self._chosen(logp, labels).mean()).exp())

    def _exact_memorization(self, logp: Tensor, labels: Tensor, _: str) -> float:
        return float((logp.argmax(-1) == labels)[:-1].float().mean())

    def _extraction_strength(self, logp: Tensor, labels: Tensor, _: str) -> float:
        hits = (logp.argmax(-1) == labels)[:-1]
        return float(hits.flip(0).int().cumprod(0).float().mean())

    def _loss(self, logp: Tensor, labels: Tensor, _: str) -> float:
        return float(self._chosen(logp, labels).mean())

    def _zlib(self, logp: Tensor, labels: Tensor, text: str) -> float:
        return float(self._chosen(logp, labels).mean()) / len(compress(text.encode()))

    @staticmethod
    def _lowest(values: Tensor) -> float:
        return float(values.sort().values[: max(1, int(rows.MIN_K * len(values) + 1e-9))].mean())

    def _min_k(self, logp: Tensor, labels: Tensor, _: str) -> float:
        return self._lowest(self._chosen(logp, labels)[:-1])

    def _min_k_plus_plus(self, logp: Tensor, labels: Tensor, _: str) -> float:
        p = logp.exp()
        mu = (p * logp).sum(-1)
        variance = (p * (logp - mu[:, None]).square()).sum(-1)
        return self._lowest(((self._chosen(logp, labels) - mu) / variance.clamp_min(1e-6).sqrt())[:-1])

    # --- generation -----------------------------------------------------------------------------------------------

    def written(self, _: int = 0) -> list[str]:
        """The engine's way: batches of like length."""
        return generate(self.model, self.tokenizer, self._asked, ENCODING, max_new_tokens=NEW_TOKENS)

    @torch.inference_mode()
    def written_singly(self, _: int = 0) -> list[str]:
        """One ``model.generate`` a row, with the same bound on its length and the same end."""
        texts = []
        examples = causal_lm.encode_records(self._asked, self.tokenizer, ENCODING)
        ends = [self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id]
        for example, prompt in zip(examples, causal_lm.prompts(self._asked, self.tokenizer, ENCODING), strict=True):
            bound = min(NEW_TOKENS, int(np.ceil(1.5 * (len(example.input_ids) - example.label_start))) + 8)
            ids = torch.tensor([prompt])
            out: Any = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=bound, do_sample=False,
                eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            texts.append(self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
        return texts

    @property
    def _asked(self) -> Sequence[Record]:
        return [replace(record) for record in self.sides["forget"][:64]]


def agreement(first: Result, second: Result) -> float:
    """Largest difference between two ways of measuring, relative to the size of each metric."""
    assert first.keys() == second.keys()
    return max(float(np.nanmax(np.abs(first[k] - second[k])) / max(np.nanmax(np.abs(first[k])), 1e-9)) for k in first)
