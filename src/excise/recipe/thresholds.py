"""The thresholds of a verdict with their defaults, and the reason for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verify:
    """Thresholds of `excise verify`, fixed before a run: their hash is in its manifest from the first moment on.

    Differences are model minus gold; where there is no gold, forgotten rows minus never-seen rows of the same kind.

    Attributes:
        level: Level of each one-sided test; intervals have ``1 - 2 level``.
        rows: Fewer rows than this never pass a test.
        require: Tests that must pass; any other that was made must not fail. `excise.verdict` has their names.
        beside: Tests that are shown and do not decide.
        answers: Largest difference of the probability of forgotten answers, either way; reworded ones too.
        came_back: Largest share of rows that came back.
        recalled: A row came back if its answer is this much likelier than by the gold.
        written: Largest difference of ROUGE-L recall of forgotten answers, either way.
        truth: Largest distance from 0.5 of the chance that a truth ratio is above the gold's, either way.
        membership: Largest difference of a membership AUC, either way.
        inside: Largest amount by which an AUC on hidden states may be above the gold's (0.5 where there is none).
        below: Largest amount by which the AUC by likelihood may be below the gold's (0.5): over-forgetting.
        perplexity: Largest factor of the forgotten answers' perplexity over the gold's: over-forgetting.
        babble: Largest excess of repeated four-word runs, and largest loss of answers that read like real ones, as
            shares: over-forgetting.
        attacks: Largest excess of a forgotten answer's probability after an attack.
        savings: Largest excess of the probability after all forgotten rows were trained again.
        leak: Largest excess of what leaks from prompts and samples; without a gold, largest share of rows that leak.
        classes: Largest difference of F1 (or accuracy) on forgotten rows, either way.
        outside: Largest difference of the share of a tagger's words outside of entities that are taken for none.
        choices: Largest difference of accuracy on multiple-choice questions, either way.
        kept: Least share of the original's score that is left on retained rows and utility sets.
    """

    # One-sided 5 %, as equivalence is tested in medicine (Schuirmann 1987); GAP_LEVEL of classifiers is the same.
    level: float = 0.05
    # At 20 to 40 rows chance alone moves PrivLeak by 10 points and more; intervals say so by themselves, but below 30
    # rows they lean on the shape of the values. Attacks measure half of the forget rows: 60 are enough for all tests.
    rows: int = 30
    # The instruments on which methods were told from a second gold, by trial; truth ratios need false answers, which
    # few data have.
    require: tuple[str, ...] = (
        "answers", "came_back", "membership", "inside", "apart", "below_never_seen", "repetition", "relearn",
        "savings", "kept",
    )  # fmt: skip
    # Without its adapter a model is the original: true of every adapter, and no fault of merged weights.
    beside: tuple[str, ...] = ("adapter",)
    # Two golds differ by less than 0.001, methods that were silenced but not emptied by 0.08 to 0.15.
    answers: float = 0.05
    # Exact bound: 59 rows with none back are needed to show it. A mean of 0.05 may hide one row in twenty in full.
    came_back: float = 0.05
    # Golds give these answers 0.001 to 0.135 on average (ours; TOFU's phi-1.5): a quarter more is no guess any longer.
    recalled: float = 0.25
    # Two golds differ by 0.01 to 0.02, methods that babble or still quote by 0.06 and more.
    written: float = 0.05
    # 0.10 is a shift of 0.36 SD; Kolmogorov-Smirnov at 40 rows does not see 0.4 SD half of the time.
    truth: float = 0.10
    # A second gold lies up to 0.04 off at 60 rows (8 points of PrivLeak), methods that fail by 0.15 to 0.5.
    membership: float = 0.10
    # A second gold lies up to 0.07 above, methods that fail by 0.25 to 0.5; an AUC of 60 rows has an SE of 0.05.
    inside: float = 0.15
    # 0.35 where the gold is at 0.5: the level from which a finding calls it over-forgotten.
    below: float = 0.15
    # Ours: one nat per token and a little. The check of the report's first page has the same limit.
    perplexity: float = 3.0
    # Golds: 0.04 and 0.06; unlearned models that still write sentences 0.02 to 0.08; degenerate ones 0.48 to 0.97.
    babble: float = 0.10
    # After relearning two golds reach 0.003, the best methods 0.003 to 0.02, most others 0.04 to 0.7.
    attacks: float = 0.05
    # Two golds: 0.22 and 0.24; the best method 0.45 to 0.49, the others 0.65 and more.
    savings: float = 0.10
    # As for answers: what leaks is a share of an answer, or of samples.
    leak: float = 0.05
    # The forget F1 of a tagger moves by about 0.06 between seeds at 5 % of the rows; half of that cannot be shown.
    classes: float = 0.06
    # Golds take 2 in 100 for an entity, methods that forget entities alone none; of 60 sentences the SE is half of it.
    outside: float = 0.01
    # About twice the standard error of 400 questions at chance level.
    choices: float = 0.05
    # A second gold keeps 0.99 and more, good methods 0.97 to 1.0; peers discard models that lose more than 0.2.
    kept: float = 0.95
