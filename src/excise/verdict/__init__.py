"""A verdict on a run: tests with thresholds that were fixed before it, and three outcomes. Numpy only, no model.

`judge` asks every question of the task (`QUESTIONS`) of the `Evidence` and gives a `Verdict`: passed, failed or not
shown. Equivalence is shown by two one-sided tests (`equivalence`), never by a test that sees no difference.
"""

from excise.verdict.evidence import Evidence
from excise.verdict.question import Tested
from excise.verdict.thresholds import check, digest
from excise.verdict.verdict import EXIT, NAMES, QUESTIONS, Verdict, judge

__all__ = ["EXIT", "NAMES", "QUESTIONS", "Evidence", "Tested", "Verdict", "check", "digest", "judge"]
