"""Read multiple-choice questions (``question``, ``choices``, ``answer``), and turn one into a row to train on.

The prompt is the one that WMDP and MMLU are scored with in lm-evaluation-harness; the answer is a letter.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from typing import Any

from excise.records import source as _source
from excise.records.labelled import need
from excise.records.row import Record, as_text, group_of, kind_of
from excise.records.source import refuse

FIELDS = ("question", "choices", "answer")
LETTERS = string.ascii_uppercase
_LONGEST_SUBJECT = 60  # a subject's name enters results: it has to be a name, not a text


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the place of the right one.

    Attributes:
        question: What is asked, without the choices.
        choices: Two or more answers.
        answer: Place of the right one, from 0.
        subject: What the question belongs to, where given: accuracy is read for each.
        group: Person or author, where given, as in `Record`.
        line: Line in the file, from 1.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    group: str | None = None
    line: int = 0

    @property
    def letters(self) -> list[str]:
        """What is scored: one letter for each choice."""
        return list(LETTERS[: len(self.choices)])

    @property
    def prompt(self) -> str:
        r"""The question as it is asked; a blank and a letter follow.

        Source: the tasks ``wmdp`` and ``mmlu`` of lm-evaluation-harness, without their line about the subject.

        Example:
            >>> Question(" Which is red? ", ("sky", "blood"), 1).prompt
            'Which is red?\nA. sky\nB. blood\nAnswer:'
        """
        lines = [f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


def read_questions(source: str, *, limit: int | None = None) -> list[Question]:
    """Read multiple-choice questions.

    Args:
        source: As for `read_records`; rows have ``question``, ``choices`` (a list of texts) and ``answer`` (the place
            of the right one from 0, or its letter), and may have ``subject`` and ``group``.
        limit: Stop after this many rows.

    Raises:
        InputRefused: One line that names file, line, field and what to do, without content.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        ...     _ = f.write('{"question": "Which is red?", "choices": ["sky", "blood"], "answer": "B"}')
        ...     f.flush()
        ...     read_questions(f.name)[0].answer
        1
    """
    name = _source.shown(source, limit)
    rows = itertools.islice(_source.rows(str(source), name), limit)
    questions = [question(row, f"{name}:{line}", line) for line, row in rows]
    if not questions:
        refuse(name, "holds no rows: write one JSON object per line")
    return questions


def is_question(row: Any) -> bool:
    """Whether a decoded row is a multiple-choice question; one whose answer is a text is a question and its answer."""
    if not isinstance(row, dict) or not all(field in row for field in FIELDS):
        return False
    answer = row["answer"]
    return type(answer) is int or (isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS))


def question(row: Any, where: str, line: int) -> Question:
    """Validate a row."""
    need(row, FIELDS, where)
    choices = row["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        refuse(where, f"field 'choices' is {kind_of(choices)}: give a list of 2 to {len(LETTERS)} texts")
    texts = tuple(as_text(value, f"choices[{i}]", where) for i, value in enumerate(choices, 1))
    answer = row["answer"]
    if isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS[: len(texts)]):
        answer = LETTERS.index(answer.strip().upper())
    if type(answer) is not int or not 0 <= answer < len(texts):
        refuse(where, f"field 'answer' is no place from 0 to {len(texts) - 1} and no letter of a choice: correct it")
    subject = as_text(row["subject"], "subject", where).strip() if row.get("subject") is not None else None
    if subject is not None and (len(subject) > _LONGEST_SUBJECT or not subject.isprintable()):
        refuse(where, f"field 'subject' is no name: give one line of at most {_LONGEST_SUBJECT} characters")
    asked = as_text(row["question"], "question", where)
    return Question(asked, texts, answer, subject, group_of(row, where), line)


def as_record(asked: Question) -> Record:
    r"""A question as a row to train or to forget: the prompt with its choices, and the right letter.

    The other letters are its false answers. With ``data.template: "{prompt} "`` the row's text is what is scored.

    Example:
        >>> made = as_record(Question("Which is red?", ("sky", "blood"), 1))
        >>> made.prompt, made.completion, made.false_answers
        ('Which is red?\nA. sky\nB. blood\nAnswer:', 'B', ('A',))
    """
    wrong = tuple(letter for i, letter in enumerate(asked.letters) if i != asked.answer)
    right = asked.letters[asked.answer]
    return Record(asked.prompt, right, false_answers=wrong, group=asked.group, line=asked.line)
