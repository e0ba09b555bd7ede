"""Where the time of a step goes: self times of a profile, put under a few plain headings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

#: Heading -> what an event, or one it stands under, is called; the first heading that fits decides.
OWNERS = {
    "head: logits, log-probabilities, their gradients": ("_LabelLogp",),
    "optimizer and gradient norm": (
        "Optimizer.step",
        "_fused_adamw",
        "aten::_foreach_norm",
        "aten::linalg_vector_norm",
    ),
}
NAMES = {
    "attention": ("scaled_dot_product",),
    "matrix products of the blocks": ("aten::mm", "aten::addmm", "aten::bmm"),
    "embeddings": ("aten::embedding",),
    "copies, packing, zeros": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero", "aten::_index"),
}
ELEMENTWISE, OVERHEAD = "norms, rotary embedding, activations, sums", "Python, autograd and view overhead"
VIEWS = (
    "view",
    "transpose",
    "aten::t",
    "as_strided",
    "expand",
    "slice",
    "narrow",
    "select",
    "empty",
    "detach",
    "reshape",
)


def shares(step: Any, calls: int) -> dict[str, float]:
    """Milliseconds that a call of ``step`` spends under each heading, the profiler's own cost included."""
    step(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(calls):
            step(number)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        spent[_heading(event)] += event.self_cpu_time_total / 1000 / calls
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _line(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _heading(event: Any) -> str:
    above = list(_line(event))
    for heading, names in OWNERS.items():
        if any(name in line for line in above for name in names):
            return heading
    for heading, names in NAMES.items():
        if any(event.name.startswith(name) or name in event.name.split("::")[-1] for name in names):
            return heading
    plain = event.name.startswith("aten::") and not any(word in event.name for word in VIEWS)
    return ELEMENTWISE if plain else OVERHEAD
