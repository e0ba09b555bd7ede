"""Removing, scaling and negating what unlearning added: an adapter delivered alone hides, it does not remove.

Whoever holds an adapter and its base can leave it out. Of a whole model the same is done to its difference from the
original, which an attacker can do who has both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from excise.attacks.answers import Gauge
from excise.attacks.lending import Difference, lent
from excise.attacks.outcome import Outcome
from excise.attacks.target import Target
from excise.errors import UsageError

#: As delivered, half of it, removed, negated.
SCALES = (1.0, 0.5, 0.0, -1.0)


def attack(target: Target, *, scales: Sequence[float] | None = None, kept_rows: int = 64) -> Outcome:
    """Forget rows by a model at origin + scale (model - origin).

    With an adapter attached the origin is the base without it (where the original is given, the original itself,
    since a start may have taken something out of the base). Otherwise it is the original, which a whole model needs.
    Progress counts scales; nothing is drawn.

    Args:
        target: What is attacked.
        scales: Points of the curve; default 1, 0.5, 0, -1, and for a whole model no 0: that is the original, which
            its holder has anyway.
        kept_rows: Kept rows that are measured; 0 for none.

    Returns:
        Budgets are the scales; ``extra["delivered"]`` is "adapter" or "whole model", and only of an adapter does 0
        say what anyone can do who was given the delivery.

    Raises:
        UsageError: A whole model without its original, an adapter that cannot be scaled, or scales that are not
            finite numbers, each once.
        InputRefused: An original of other shapes.
        NotShown: There are no forget rows.

    Source:
        Ilharco et al. 2212.04089 (task vectors); leaving the adapter out: ours.
    """
    started = time.perf_counter()
    difference = Difference(target.model, target.original)
    if scales is None:
        scales = SCALES if difference.adapter else tuple(s for s in SCALES if s)
    scales = [float(s) for s in scales]
    if not scales or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise UsageError(f"attack adapter: scales {scales}: give finite numbers, each once")
    gauge = Gauge.of(target, kept=kept_rows)
    found = []
    with torch.no_grad(), lent(target.model, difference.changed) as before:
        for done, scale in enumerate(scales):
            difference.at(scale, before)
            found.append(gauge.read())
            target.tell(done + 1, len(scales))
    extra = {"delivered": "adapter" if difference.adapter else "whole model", "weights": len(difference.changed)}
    return gauge.outcome("adapter", "scale", [f"{s:g}" for s in scales], found, extra=extra, started=started)
