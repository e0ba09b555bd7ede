"""What can be refused or can go wrong, each with the exit code that the command line returns for it."""

from __future__ import annotations


class ExciseError(Exception):
    """Anything that `excise` reports in one line instead of a traceback.

    Example:
        >>> InputRefused("forget.jsonl:3: field 'answer' is empty: give the text to forget").exit_code
        3
    """

    exit_code = 1


class UsageError(ExciseError):
    """The command, a recipe key or an option is wrong."""

    exit_code = 2


class InputRefused(ExciseError):
    """Data or a model that cannot be used; nothing was written."""

    exit_code = 3


class TrainingStopped(ExciseError):
    """Training was stopped before the weights could be harmed, a non-finite loss for instance."""

    exit_code = 4


class VerificationFailed(ExciseError):
    """A test of the result failed against a threshold that was fixed before the run."""

    exit_code = 5


class IntegrityFailed(ExciseError):
    """A file is not what its recorded hash says."""

    exit_code = 6


class NotShown(ExciseError):
    """The data cannot show what was asked."""

    exit_code = 7
