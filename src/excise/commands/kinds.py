"""What a classifier's labels are compared within: types, each taken apart by what the retained rows say of the word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION
from excise.tasks.token_classification import ClassExample

#: Never-seen tokens that each part of a type must have, for the type to be taken apart.
LEAST = 5
#: What the units of a row are compared within, 0 for labels that are none (O).
KindsOf = Callable[[Any], list[int]]


def types(kinds: NDArray[np.int64]) -> KindsOf:
    """Each label by the type of its class, ``kinds [C]``; 0 for none (O).

    Example:
        >>> types(np.array([0, 1, 1]))(ClassExample((5, 6), (0, 1), (0, 2)))
        [0, 1]
    """
    return lambda example: [int(kinds[c]) for c in example.classes]


def _counts(rows: sides.Rows, side: str, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> Counter[int]:
    """How many units of each kind a side has."""
    return Counter(k for i in chosen[side] for k in of(rows.examples[side][i]) if k)


def shared(rows: sides.Rows, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> set[int]:
    """The kinds that forgotten and calibration rows both have."""
    return set(_counts(rows, "forget", chosen, of)) & set(_counts(rows, CALIBRATION, chosen, of))


def familiar(rows: sides.Rows, chosen: Mapping[str, Sequence[int]], of: KindsOf) -> KindsOf:
    """Types, each taken apart by what the retained rows say of the word: it is one of this type, another, or not there.

    A model that never saw the forgotten rows still knows the words that the retained ones hold: never-seen words are
    fair company only for forgotten ones of the same standing. A type that has too few never-seen words of a standing
    stays whole.

    Args:
        rows: Encoded rows, those of ``retain`` among them.
        chosen: Which forgotten and calibration rows are compared.
        of: The types, as `types` gives them.

    Source: ours; poststratification.

    Example:
        >>> known, new = ClassExample((5,), (0,), (1,)), ClassExample((6,), (0,), (1,))
        >>> given = sides.Rows({"retain": [known], "forget": [known, new], "calibration": [known, new] * LEAST}, 0)
        >>> apart = familiar(given, {"forget": [0, 1], "calibration": range(2 * LEAST)}, types(np.array([0, 1])))
        >>> apart(known), apart(new)
        ([3], [5])
    """
    known: dict[tuple[int, ...], set[int]] = {}
    for example in rows.examples["retain"]:
        for word, kind in zip(_words(example), of(example), strict=True):
            known.setdefault(word, set()).add(kind)

    def apart(example: ClassExample) -> list[int]:
        return [kind and 3 * kind + _standing(kind, known.get(word))
                for word, kind in zip(_words(example), of(example), strict=True)]  # fmt: skip

    own, others = (_counts(rows, side, chosen, apart) for side in ("forget", CALIBRATION))
    whole = {part // 3 for part in own if others[part] < LEAST}
    return lambda example: [3 * (k // 3) if k // 3 in whole else k for k in apart(example)]


def _standing(kind: int, known: set[int] | None) -> int:
    return 2 if known is None else 0 if kind in known else 1


def _words(example: ClassExample) -> list[tuple[int, ...]]:
    """The tokens of each word with a label: up to the next, the last without the special token at the end."""
    ends = (*example.places[1:], max(len(example.input_ids) - 1, example.places[-1] + 1)) if example.places else ()
    return [example.input_ids[a:b] for a, b in zip(example.places, ends, strict=True)]
