"""The verdict: all tests together, one of three outcomes, what it means, what to try, and what nobody tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from excise.verdict import attacked, classes, language, thresholds
from excise.verdict.equivalence import Outcome
from excise.verdict.evidence import Evidence
from excise.verdict.question import Question, Tested, put

FORMAT = 1
#: Exit code of each outcome.
EXIT = {"passed": 0, "failed": 5, "not shown": 7}
#: Task -> its questions, in the order of a page.
QUESTIONS: dict[str, tuple[Question, ...]] = {
    "causal_lm": (*language.QUESTIONS, *attacked.QUESTIONS),
    "token_classification": (*classes.QUESTIONS, *attacked.QUESTIONS[:1]),
    "sequence_classification": (*classes.OF_TEXTS, *attacked.QUESTIONS[:1]),
}
#: Keys of all tests.
NAMES = tuple(dict.fromkeys(question.key for questions in QUESTIONS.values() for question in questions))
#: What no run of this program looks at, whatever was measured.
NEVER_TESTED = (
    "Other copies that hold the data: the original weights, checkpoints, caches, backups and the training files.",
    "Attacks that nobody has thought of yet, or with more steps, samples or data than the ones made here.",
    "Conversations of several turns, other languages, and prompts that an adversary optimises.",
    "Models that others derive from this one by further training or merging.",
    "Records about the same persons or things that are not among the rows to forget.",
)
_ONE_GOLD = "How much two golds differ: the gold here is one training with one seed, and a second would lie elsewhere."


@dataclass(frozen=True)
class Verdict:
    """What a run's evidence says.

    Args:
        model: The model that was judged.
        outcome: ``passed``: every required test passed and none failed; ``failed``: one that decides failed;
            ``not shown``: neither.
        headline: The outcome in a sentence.
        means: What it means, in two or three sentences.
        basis: What the model was compared with: ``gold``, ``never-seen rows`` or ``nothing``.
        over: Keys of the tests that failed by over-forgetting.
        next: What to try next; empty after a pass.
        tests: The results, in the order of a page.
        not_tested: What was not tested; never empty.
        cautions: What a reader must know to read the intervals.
        thresholds: The thresholds, every one.
        thresholds_sha256: Their hash.
        fixed: Whether that hash was recorded before the run.

    Example:
        >>> from excise import recipe
        >>> from excise.artifacts import Results
        >>> found = judge(Evidence("unlearned", {}, Results(), recipe.Verify()))
        >>> found.outcome, found.exit_code, len(found.not_tested) > 5
        ('not shown', 7, True)
    """

    model: str
    outcome: Outcome
    headline: str
    means: str
    basis: str
    over: tuple[str, ...]
    next: tuple[str, ...]
    tests: tuple[Tested, ...]
    not_tested: tuple[str, ...]
    cautions: tuple[str, ...]
    thresholds: dict[str, Any]
    thresholds_sha256: str
    fixed: bool

    @property
    def exit_code(self) -> int:
        """What the command line returns."""
        return EXIT[self.outcome]

    def test(self, key: str) -> Tested:
        """The result of one test.

        Raises:
            KeyError: There is no such test for this task.
        """
        return {test.key: test for test in self.tests}[key]

    def plain(self) -> dict[str, Any]:
        """As ``verdict.json`` has it: plain values, no text of any row."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT, **values, "tests": [test.plain() for test in self.tests]}


def judge(evidence: Evidence, *, fixed: bool = True, also_not_tested: Sequence[str] = ()) -> Verdict:
    """Ask every question of the task and say what follows.

    Args:
        evidence: Tables, numbers, attacks and thresholds.
        fixed: Whether the thresholds' hash was recorded before the run; without it nothing is ever ``passed``.
        also_not_tested: What the evaluation already said that nobody looked at.

    Raises:
        UsageError: Thresholds that no test could use.
    """
    limits = evidence.limits
    thresholds.check(limits, NAMES)
    tests = tuple(put(q, evidence) for q in QUESTIONS.get(evidence.results.task, QUESTIONS["causal_lm"]))
    outcome = _outcome(tests, fixed)
    return Verdict(
        evidence.model, outcome, _headline(outcome, tests, fixed), _means(outcome, tests, evidence), evidence.basis,
        tuple(t.key for t in tests if t.outcome == "failed" and t.direction == "over" and t.role != "beside"),
        _next(outcome, tests, fixed), tests, _not_tested(tests, evidence, also_not_tested), _cautions(tests, evidence),
        thresholds.plain(limits), thresholds.digest(limits), fixed,
    )  # fmt: skip


def _outcome(tests: Sequence[Tested], fixed: bool) -> Outcome:
    deciding = [t for t in tests if t.role != "beside"]
    required = [t for t in deciding if t.role == "required"]
    if any(t.outcome == "failed" for t in deciding):
        return "failed"
    if fixed and required and all(t.outcome == "passed" for t in required):
        return "passed"
    return "not shown"


def _failed(tests: Sequence[Tested]) -> list[Tested]:
    return [t for t in tests if t.outcome == "failed" and t.role != "beside"]


def _open(tests: Sequence[Tested]) -> list[Tested]:
    return [t for t in tests if t.outcome == "not shown" and t.role == "required"]


def _headline(outcome: Outcome, tests: Sequence[Tested], fixed: bool) -> str:
    if outcome == "passed":
        return "Passed: every required test lies within the thresholds that were fixed before the run, and none failed."
    if outcome == "failed":
        failed = _failed(tests)
        said = []
        if any(t.group == "forgotten" and t.direction == "short" for t in failed):
            said.append("the model still knows what it was asked to forget")
        if any(t.group == "traces" and t.direction == "short" for t in failed):
            said.append("traces of the records remain")
        if any(t.direction == "over" for t in failed):
            said.append("it went too far, which is over-forgetting and a failure of its own")
        if any(t.direction == "harm" for t in failed):
            said.append("it lost knowledge that it was asked to keep")
        return f"Failed: {'; '.join(said) or 'a test lies beyond its threshold'}."
    still = len(_open(tests))
    if not fixed:
        return "Not shown: the thresholds were not recorded before the run, so nothing can pass against them."
    many = f"{still} of the required tests are" if still != 1 else "one of the required tests is"
    return f"Not shown: no test failed, but {many} undecided or not made."


def _means(outcome: Outcome, tests: Sequence[Tested], evidence: Evidence) -> str:
    counted = [t for t in tests if t.role != "beside"]
    counts = {o: sum(t.outcome == o and t.measured for t in counted) for o in ("passed", "failed", "not shown")}
    missing = sum(not t.measured for t in counted)
    tally = (
        f"Of {len(counted)} tests {counts['passed']} passed, {counts['failed']} failed, {counts['not shown']} could "
        f"not decide, {missing} were not made."
    )
    beside = {
        "gold": "Compared was a model that was trained without the records.",
        "never-seen rows": "There is no gold: compared were rows of the same kind that no model saw, so differences "
        "between the two sets of rows count as well.",
        "nothing": "There was neither a gold nor never-seen rows to compare with.",
    }[evidence.basis]
    last = {
        "passed": "With these rows, attacks and margins the differences are shown to be small. Tests see what they "
        "look for: the list of what was not tested belongs to this verdict.",
        "failed": "At least one difference is larger than its margin, and chance alone does not explain it.",
        "not shown": "That is no pass: the data neither show that the differences are small nor that they are large.",
    }[outcome]
    return f"{tally} {beside} {last}"


def _next(outcome: Outcome, tests: Sequence[Tested], fixed: bool) -> tuple[str, ...]:
    if outcome == "passed":
        return ()
    concerned = _failed(tests) if outcome == "failed" else _open(tests)
    first = () if fixed else ("Run again with this version: it records the thresholds before the first step.",)
    return (*first, *dict.fromkeys(t.next for t in concerned if t.next))


def _not_tested(tests: Sequence[Tested], evidence: Evidence, also: Sequence[str]) -> tuple[str, ...]:
    """Tests that were not made with the reason, what the evaluation said, and what never is."""
    made = [f"{t.title}: {t.meaning.removeprefix('Not measured: ')}" for t in tests if not t.measured]
    gold = (_ONE_GOLD,) if evidence.has_gold else ("What the model would be without the records: there is no gold.",)
    told = {t.key for t in tests if t.measured}
    # What the evaluation lists may have been made good by an attack since.
    stale = {"quantise": "Quantised", "sample": "Sampled", "relearn": "Relearning"}
    rest = [x for x in also if not any(key in told and x.startswith(word) for key, word in stale.items())]
    rest = [x for x in rest if not x.startswith(("Other copies", "Records about"))]  # said below in any case
    return tuple(dict.fromkeys((*made, *rest, *gold, *NEVER_TESTED)))


def _cautions(tests: Sequence[Tested], evidence: Evidence) -> tuple[str, ...]:
    said = [
        f"Passed holds for all tests together at the level of {evidence.limits.level:g} (each must pass); failed holds "
        "for each test by itself, so among many on the margin one may fail by chance."
    ]
    if any(t.measured and t.unit == "row" for t in tests):
        said.append(
            "Where rows carry no group, or fewer than five groups, intervals count rows: they speak of more rows of "
            "the same persons or works, not of others."
        )
    if evidence.basis == "never-seen rows":
        said.append("Never-seen rows stand in for a gold only as far as they are of the same kind and difficulty.")
    if any(t.measured and t.key in ("inside", "apart") for t in tests):
        said.append("Tests on hidden states work with saved numbers, model and gold taken as independent: too wide.")
    if any(t.outcome == "failed" and t.role == "beside" for t in tests):
        names = ", ".join(t.title for t in tests if t.outcome == "failed" and t.role == "beside")
        said.append(f"Beyond its threshold, but by the recipe not deciding: {names}.")
    return tuple(said)
