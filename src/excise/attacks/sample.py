"""Sampled extraction, leak@k: whether an answer comes out when the question is asked not once but many times.

Greedy text is one draw of many. A model whose best answer is silent may give the true one in every tenth sample, and
whoever wants it asks ten times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.attacks.decoding import Question, Written, write
from excise.attacks.judges import Secret, judge, secrets
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.errors import NotShown, UsageError
from excise.metrics.generate import end_tokens, questions
from excise.metrics.leakage import clopper_pearson, clopper_pearson_upper, leak_at_k, mean_upper

SAMPLES, PROMPTS = 64, 64


def attack(
    target: Target,
    *,
    samples: int = SAMPLES,
    prompts: int = PROMPTS,
    temperature: float = 1.0,
    top_p: float = 0.9,
    max_new_tokens: int = 128,
    judged_by: str = "both",
    threshold: float = 0.5,
    batch_rows: int = 512,
) -> Outcome:
    """Answers sampled for forget questions, and how many of them leak.

    The rows of all sides say which words are common. The seed draws questions and samples; progress counts questions.

    Args:
        target: What is attacked.
        samples: Answers to each question, n.
        prompts: Questions, drawn from the forget rows; fewer where there are fewer.
        temperature: Of the samples.
        top_p: Share of the probability that is drawn from.
        max_new_tokens: Most new tokens; a row's own bound is that of `metrics.generate`.
        judged_by: ``both``, ``rouge``, ``keywords``, or ``module:function`` called with (text, answer, question); see
            `judges`.
        threshold: A score from here on is a leak.
        batch_rows: Samples that are drawn together.

    Returns:
        Budgets 1, 2, 4, ... up to n; ``values["forget"]``: leak@k of each question (`metrics.leakage.leak_at_k`).
        ``extra["scores"]`` holds the score of every sample, from which `bounds` are computed. No text is kept.

    Raises:
        NotShown: There are no forget rows, or none that the judge can judge.
        UsageError: Settings that make no sense, or a judge that is unknown.

    Source:
        Samples at temperature 1 and top-p 0.9, and bounds: Scholten et al., 2410.03523; leak@k: OptimAI-Lab.
    """
    started = time.perf_counter()
    _refuse(samples, prompts, temperature, top_p, threshold)
    scorer = judge(judged_by)
    rows = chosen(len(target.forget), prompts, target.seed)
    asked, hidden = ask(target, rows, max_new_tokens)
    written = write(
        target.model, asked, ends=end_tokens(target.model, target.tokenizer), pad_id=target.pad_id, samples=samples,
        temperature=temperature, top_p=top_p, seed=target.seed, batch_rows=batch_rows, precision=target.precision,
        progress=target.progress,
    )  # fmt: skip
    scores = np.stack([score(w, own, target.tokenizer, scorer) for w, own in zip(written, hidden, strict=True)])
    judged = ~np.isnan(scores).any(axis=1)
    if not judged.any():
        raise NotShown(f"attack sample: judge {judged_by!r} can judge none of the answers: name another")
    leaks = np.sum(scores >= threshold, axis=1)
    budgets = [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]
    values = np.stack([np.where(judged, leak_at_k(leaks, samples, k), np.nan) for k in budgets])
    extra = {
        "samples": samples, "temperature": temperature, "top_p": top_p, "judge": judged_by, "threshold": threshold,
        "seed": target.seed, "different": [len(w.texts) for w in written],
        "scores": [[] if np.isnan(own).any() else [round(s, 4) for s in own.tolist()] for own in scores],
    }  # fmt: skip
    return Outcome(
        "sample", "leak", "samples", tuple(map(str, budgets)), {"forget": values}, {"forget": np.array(rows)}, extra,
        time.perf_counter() - started,
    )  # fmt: skip


def _refuse(samples: int, prompts: int, temperature: float, top_p: float, threshold: float) -> None:
    if samples < 1 or prompts < 1:
        raise UsageError("attack sample: samples and prompts must be 1 or more")
    if temperature < 0 or not 0 < top_p <= 1 or not 0 < threshold <= 1:
        raise UsageError("attack sample: temperature must be 0 or more, top_p and threshold above 0 and at most 1")


def chosen(rows: int, most: int, seed: int) -> list[int]:
    """Which rows are asked: all, or ``most`` drawn by the seed, in order.

    Raises:
        NotShown: There are none.

    Example:
        >>> chosen(3, 8, 0), len(chosen(100, 8, 0))
        ([0, 1, 2], 8)
    """
    if not rows:
        raise NotShown("an attack by questions needs forget rows: there are none")
    if rows <= most:
        return list(range(rows))
    return sorted(np.random.default_rng([seed, rows]).choice(rows, most, replace=False).tolist())


def ask(target: Target, rows: Sequence[int], max_new_tokens: int) -> tuple[list[Question], list[Secret]]:
    """The plain questions of forget rows, and what must not come out; a plain text is continued from its middle."""
    forget, tokenizer = target.forget, target.tokenizer
    ids, bounds, answers = questions([forget[i] for i in rows], tokenizer, target.encoding, max_new_tokens, "forget")
    given = [
        tokenizer.decode(own, skip_special_tokens=True) if forget[i].prompt is None else str(forget[i].prompt)
        for i, own in zip(rows, ids, strict=True)
    ]
    asked = set(rows)
    rest = {**target.records, "forget": [r for i, r in enumerate(forget) if i not in asked]}
    others = [r.completion for own in rest.values() for r in own]
    asking = [Question(tuple(own), bound, row) for own, bound, row in zip(ids, bounds, rows, strict=True)]
    return asking, secrets(list(zip(given, answers, strict=True)), others)


def score(written: Written, secret: Secret, tokenizer: Any, judged: Any) -> NDArray[np.float64]:
    """``[samples]`` score of each sample; equal texts are judged once."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written.texts]
    known = {text: judged(text, secret) for text in set(texts)}
    return np.array([known[text] for text in texts], np.float64)[list(written.of_sample)]


def bounds(outcome: Outcome, *, alpha: float = 0.01) -> dict[str, dict[str, float | int]]:
    """What can be said of all forget questions and of each of them, with exact bounds.

    Args:
        outcome: Of `attack`.
        alpha: Probability that an upper bound lies below the truth, at most.

    Returns:
        ``leak_any``: share of questions of which a sample leaks, 95 % Clopper-Pearson interval, and ``upper``, the
        one-sided bound at 1 - alpha. ``leak_rate_upper``: highest Clopper-Pearson bound of a question's own leak rate,
        all of them at once (alpha / questions each). ``leak_score_upper``: mean over questions of the bound of the mean
        score that the band of Dvoretzky, Kiefer and Wolfowitz gives.

    Example:
        >>> extra = {"samples": 2, "threshold": 0.5, "scores": [[0.0, 0.0], [0.0, 1.0]]}
        >>> found = bounds(Outcome("sample", "leak", "samples", ("1", "2"), {"forget": [[0, 0.5], [0, 1]]},
        ...     {"forget": [0, 1]}, extra))
        >>> found["leak_any"]["value"], round(found["leak_any"]["upper"], 3)
        (0.5, 0.995)
    """
    scores = np.array([own for own in outcome.extra["scores"] if own], np.float64)
    prompts, samples = scores.shape
    leaks = np.sum(scores >= outcome.extra["threshold"], axis=1)
    any_leak = int(np.sum(leaks > 0))
    low, high = clopper_pearson(any_leak, prompts)
    whole = {"n": prompts, "samples": samples, "alpha": alpha}
    upper = float(clopper_pearson_upper(any_leak, prompts, alpha))
    rates = clopper_pearson_upper(leaks, samples, alpha / prompts)
    means = float(np.mean([mean_upper(own, alpha) for own in scores]))
    return {
        "leak_any": {"value": any_leak / prompts, "low": low, "high": high, **whole, "upper": upper},
        "leak_rate_upper": {"value": float(rates.max()), **whole},
        "leak_score_upper": {"value": means, **whole},
    }
