"""Records to tensors, one module per kind of task; their functions have the same names.

Each has ``read`` (a source to records), ``cut`` (rows that are too long in pieces) with ``LONG`` (whether that is done
unasked), ``encode_records`` and ``collate`` (records to tensors), and ``sequences`` (what evaluation scores).
Classifiers take the ``names`` of the classes where records become numbers, and have ``class_names``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from excise.tasks import causal_lm, sequence_classification, token_classification

TASKS: dict[str, ModuleType] = {
    "causal_lm": causal_lm,
    "token_classification": token_classification,
    "sequence_classification": sequence_classification,
}


def class_maps(names: Sequence[str], task: str) -> dict[str, Tensor]:
    """Constants ``class_map/<scheme>``, ``[C]`` int64: what each class counts as in a contrast; 0 is O, no class.

    ``type`` puts B- and I- of an entity type together, ``prefixed`` keeps them apart.

    Example:
        >>> class_maps(["O", "B-a", "I-a", "B-b"], "token_classification")["class_map/type"].tolist()
        [0, 1, 1, 2]
    """
    tags = task == "token_classification"
    kinds = {
        "type": [name[2:] if tags and name != "O" else name for name in names],
        "prefixed": list(names),
    }
    out = {}
    for scheme, own in kinds.items():
        number = {kind: i for i, kind in enumerate(dict.fromkeys(k for k in own if not (tags and k == "O")), 1)}
        out[f"class_map/{scheme}"] = torch.tensor([number.get(kind, 0) for kind in own])
    return out
