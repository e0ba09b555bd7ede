"""What a model writes when it is asked many times: sampled continuations, where equal beginnings are computed once.

A set of samples is a tree. The prompt is its root, and samples that have agreed so far stand at one node, so a step of
the model costs one row per node, not one per sample: the prompt is read once, a model that is sure of itself costs
hardly more than one greedy answer, and finished samples cost nothing. Each sample has random numbers of its own, fixed
by (seed, row, sample), so that what is drawn does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from excise.metrics import measure
from excise.tasks import causal_lm

#: Most likely tokens that are sorted at first, and then; only where they hold too little is a whole vocabulary sorted.
_SORTED = (64, 512)
#: Tokens in a batch. Every step copies the key-value cache: on a CPU a batch of 32,000 tokens takes 2.5 times as long.
_TOKENS, _TOKENS_CPU = 65_536, 16_384
#: Most numbers in a block of logits (fp32: 128 MB).
_LOGITS = 2**25


@dataclass(frozen=True)
class Question:
    """What is continued: tokens of the prompt, most new tokens, and the row whose random numbers are used."""

    ids: tuple[int, ...]
    bound: int
    row: int


@dataclass(frozen=True)
class Written:
    """What was drawn for one question: the different continuations, without an end, and which one each sample is.

    Example:
        >>> Written(((5, 6), (7,)), (0, 0, 1)).counts
        (2, 1)
    """

    texts: tuple[tuple[int, ...], ...]
    of_sample: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many samples each continuation stands for."""
        return tuple(np.bincount(self.of_sample, minlength=len(self.texts)).tolist())


def write(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    ends: Sequence[int],
    pad_id: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int = 512,
    batch_tokens: int | None = None,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Continuations of each question, drawn independently.

    Args:
        model: A causal transformers model, PEFT or not; its modes are as before afterwards.
        questions: What is continued; a question without tokens, or with a bound below 1, gets empty continuations.
        ends: Tokens that end a continuation.
        pad_id: Any valid token.
        samples: Continuations of each question.
        temperature: Of the softmax; 0 takes the most likely token.
        top_p: The smallest set of most likely tokens that holds this much probability is drawn from (Holtzman et al.,
            1904.09751); 1: all.
        seed: Of the draws.
        batch_rows: Most samples of a batch (one question's samples stay together).
        batch_tokens: Most tokens of a batch, new ones included: bounds the key-value cache. Default: what a processor's
            own cache takes of a small model, or 65,536 on an accelerator.
        precision: Makes the context of a pass.
        progress: Called with (questions done, all questions).

    Returns:
        One entry per question, in order.

    Raises:
        ValueError: A temperature below 0, a ``top_p`` outside (0, 1], or no samples.
    """
    if temperature < 0 or not 0 < top_p <= 1 or samples < 1:
        raise ValueError("temperature must be 0 or more, top_p in (0, 1], samples at least 1")
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    context = getattr(getattr(core, "config", None), "max_position_embeddings", None) or math.inf
    samples_drawn = samples if temperature else 1  # the most likely token is the same each time
    blank = Written(((),), (0,) * samples)
    out = [blank] * len(questions)
    lengths = [(len(q.ids) + q.bound) * samples_drawn for q in questions]
    rows = max(1, min(batch_rows, _LOGITS // core.get_input_embeddings().num_embeddings) // samples_drawn)
    batch_tokens = batch_tokens or (_TOKENS_CPU if next(core.parameters()).device.type == "cpu" else _TOKENS)
    done = 0
    with measure.evaluating(model), precision():
        for batch in causal_lm.length_batches(lengths, batch_tokens, rows):
            asked = [
                i for i in batch if questions[i].ids and questions[i].bound > 0 and len(questions[i].ids) < context
            ]
            if asked:
                tree = _Tree(core, [questions[i] for i in asked], samples_drawn, seed, pad_id, context)
                tree.grow(set(ends), temperature, top_p)
                for i, found in zip(asked, tree.written(), strict=True):
                    out[i] = found if temperature else Written(found.texts, found.of_sample * samples)
            done += len(batch)
            if progress is not None:
                progress(done, len(questions))
    return out


class _Tree:
    """The samples of a batch of questions while they grow: a lane is a sample, a node a beginning that lanes share."""

    def __init__(
        self, core: Any, questions: Sequence[Question], samples: int, seed: int, pad_id: int, context: float
    ) -> None:
        self.core, self.questions, self.samples = core, questions, samples
        self.device = next(core.parameters()).device
        made = causal_lm.collate([causal_lm.Example(q.ids, 1) for q in questions], pad_id=pad_id, pad_side="left")
        self.ids, self.mask = made["input_ids"].to(self.device), made["attention_mask"].to(self.device)
        self.padded = not bool(self.mask.all())
        width = self.ids.shape[1]
        self.bounds = [int(min(q.bound, context - width)) for q in questions]
        most = max(self.bounds)
        drawn = [np.random.default_rng([seed, q.row]).random((samples, most)) for q in questions]
        self.chance = torch.from_numpy(np.concatenate(drawn)).to(self.device)  # [lanes, steps]
        self.lane = torch.arange(len(questions) * samples, device=self.device)  # lanes still growing
        self.node = self.lane // samples  # the node of each growing lane
        self.asked = torch.arange(len(questions), device=self.device)  # the question of each node
        self.tokens = torch.zeros((len(questions), 0), dtype=torch.int64, device=self.device)  # [nodes, steps]
        self.texts: list[dict[tuple[int, ...], int]] = [{} for _ in questions]
        self.of_lane = [0] * (len(questions) * samples)

    def grow(self, ends: set[int], temperature: float, top_p: float) -> None:
        """Draw tokens until every lane has ended."""
        bound = torch.tensor(self.bounds, device=self.device)
        stops = torch.tensor(sorted(ends), device=self.device)
        short = [lane for lane in self.lane.tolist() if self.bounds[lane // self.samples] < 1]
        self._finish(short, [()] * len(short))
        self._keep(~torch.isin(self.lane, torch.tensor(short, device=self.device)))
        positions = (self.mask.cumsum(1) - 1).clamp_(min=0)
        logits, cache = self._pass(self.ids, positions, None)
        place = self.mask.sum(1)  # [nodes] position of the next token
        for step in range(max(self.bounds)):
            if not len(self.lane):
                break
            drawn = pick(logits, self.node, self.chance[self.lane, step], temperature, top_p)
            ended = torch.isin(drawn, stops)
            last = bound[self.asked[self.node]] == step + 1
            self._record(drawn, ended, last & ~ended)
            going = ~(ended | last)
            if not bool(going.any()):
                break
            parents, token = self._branch(drawn, going, logits.shape[1])
            if len(parents) != len(place) or not torch.equal(parents, torch.arange(len(place), device=self.device)):
                cache.reorder_cache(parents)
                place, self.mask = place[parents], self.mask[parents]
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(parents), 1)), 1)
            logits, cache = self._pass(token[:, None], place[:, None], cache)
            place = place + 1

    def _pass(self, ids: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        more = {"attention_mask": self.mask} if self.padded else {}
        out = self.core(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1, **more
        )
        return out.logits[:, -1], out.past_key_values

    def _branch(self, drawn: Tensor, going: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Lanes that agree share a node: the parent and the token of each new node, and the lanes moved there."""
        key, where = torch.unique(self.node[going] * size + drawn[going], return_inverse=True)
        parents, token = key // size, key % size
        self.lane, self.node = self.lane[going], where
        self.asked = self.asked[parents]
        self.tokens = torch.cat((self.tokens[parents], token[:, None]), 1)
        return parents, token

    def _record(self, drawn: Tensor, ended: Tensor, cut: Tensor) -> None:
        for chosen, whole in ((ended, False), (cut, True)):
            if bool(chosen.any()):
                texts = self.tokens[self.node[chosen]]
                texts = torch.cat((texts, drawn[chosen, None]), 1) if whole else texts
                self._finish(self.lane[chosen].tolist(), [tuple(text) for text in texts.tolist()])

    def _finish(self, lanes: Sequence[int], texts: Sequence[tuple[int, ...]]) -> None:
        for lane, text in zip(lanes, texts, strict=True):
            known = self.texts[lane // self.samples]
            self.of_lane[lane] = known.setdefault(text, len(known))

    def _keep(self, lanes: Tensor) -> None:
        self.lane, self.node = self.lane[lanes], self.node[lanes]

    def written(self) -> list[Written]:
        """What was drawn for each question."""
        n = self.samples
        return [Written(tuple(own), tuple(self.of_lane[i * n : (i + 1) * n])) for i, own in enumerate(self.texts)]


def pick(logits: Tensor, node: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token for each lane, by inverting the distribution function of its node's nucleus at the lane's random number.

    Args:
        logits: ``[nodes, V]``.
        node: ``[lanes]`` the node of each lane.
        chance: ``[lanes]`` uniform numbers in [0, 1), float64.
        temperature: Of the softmax; 0: the most likely token.
        top_p: Probability that the nucleus holds at least.

    Returns:
        ``[lanes]`` int64. A number below p(first) gives the most likely token, and so on downwards.

    Example:
        >>> half = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> at = torch.tensor([0.1, 0.6, 0.95], dtype=torch.float64)
        >>> pick(half, torch.zeros(3, dtype=torch.int64), at, 1.0, 1.0).tolist()
        [0, 1, 2]
        >>> pick(half, torch.zeros(3, dtype=torch.int64), at, 1.0, 0.75).tolist()  # the nucleus is the first two
        [0, 0, 1]
    """
    if temperature == 0:
        return logits.argmax(-1)[node]
    logp = torch.log_softmax(logits.float() / temperature, -1)
    out = torch.empty_like(node)
    rows = torch.arange(len(logp), device=logp.device)
    for size in (*(size for size in _SORTED if size < logp.shape[1]), logp.shape[1]):
        own = logp[rows] if len(rows) < len(logp) else logp
        top, order = own.topk(size) if size < logp.shape[1] else own.sort(descending=True)
        mass = top.double().exp().cumsum(-1)
        enough = (mass[:, -1] >= top_p) | (size == logp.shape[1])
        place = torch.full((len(logp),), -1, device=logp.device)
        place[rows[enough]] = torch.arange(int(enough.sum()), device=logp.device)
        lanes = (place[node] >= 0).nonzero().squeeze(1)
        at = place[node[lanes]]
        out[lanes] = order[enough][at, _invert(mass[enough], at, chance[lanes], top_p)]
        rows = rows[~enough]
        if not len(rows):
            break
    return out


def _invert(mass: Tensor, row: Tensor, chance: Tensor, top_p: float) -> Tensor:
    """``[lanes]`` places in ``mass`` ``[rows, K]`` (cumulated, descending order) at which the random numbers fall."""
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), 1)
    kept = (before < top_p).sum(1)  # the nucleus: everything up to the token that reaches top_p
    total = mass.gather(1, kept[:, None] - 1)
    # One sorted line for all rows: row r lies between r and r + 1, so that one search serves every lane.
    line = (mass / total).clamp_(max=1.0) + torch.arange(len(mass), device=mass.device)[:, None]
    found = torch.searchsorted(line.flatten(), row + chance, right=True) - row * mass.shape[1]
    return torch.minimum(found.clamp_(min=0), kept[row] - 1)
