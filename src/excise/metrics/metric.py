"""What is said of a number: the shape of a catalogue's entries, and phrases that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "gold"]
Source = Literal["tables", "states", "attack", "choices", "muse"]

NEAR = "near the gold: like a model that never saw the forget rows"


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Args:
        name: key in results.json.
        title: heading, a few words.
        sentence: what it says, for a reader who knows no machine learning.
        unit: "share", "nats", ... with the range, e.g. "share, 0 to 1".
        direction: "up", "down" or "gold".
        citation: paper and arXiv id; "ours" where there is none.
        sides: row sets it reads.
        source: "tables" (from saved scores), "states" (from hidden states), "attack" (from a changed copy of the
            model), "choices" (multiple-choice tasks, named in the recipe or on the command line) or "muse" (what a
            recipe's ``evaluate.muse`` asks).
        needs_gold: the number itself compares with the gold and does not exist without it.
        against_gold: what to say of its distance from the gold.

    Example:
        >>> Metric("f1", "F1", "How much is found.", SHARE, "up", "ours", ("test",)).source
        'tables'
    """

    name: str
    title: str
    sentence: str
    unit: str
    direction: Direction
    citation: str
    sides: tuple[str, ...]
    source: Source = "tables"
    needs_gold: bool = False
    against_gold: str = NEAR


TOFU = "TOFU, arXiv:2401.06121"
MUSE = "MUSE, arXiv:2407.06460"
OU = "OpenUnlearning, arXiv:2506.12618"
CLREG = "CLReg, arXiv:2601.22028"
RETAIN = ("untouched", "retain")
MEMBER = ("forget", "never_seen")
SHARE = "share, 0 to 1"
ABOVE = "above the gold: still remembered; below the gold: pushed further than forgetting needs, which also stands out"
UTILITY = "below the gold: knowledge was lost that should have stayed"
AUC = "0.5 cannot tell, 1 forget rows clearly memorised, 0 reversed"
CLOUDS = "far above the gold: forget rows were moved apart, which an observer of the states can see"
