"""Contrast by class again, with loops over plain numbers: what DeepCUT's vectorised functions must agree with.

Nothing here is shared with the package. A label's value is 0 where it is no anchor or lacks its contrast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]
Options = dict[str, Any]
Vector = list[float]
#: A state and its contrast class; the class is None where the label does not count.
Labelled = tuple[Vector, int | None]


def cosine(a: Vector, b: Vector) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def anchor_value(
    z: Vector, own: int | None, view: Vector | None, retained: list[Labelled], options: Options
) -> float | None:
    """DeepCUT of one label; None where it does not count."""
    if own is None or (own == 0 and options["anchors"] != "all"):
        return None
    tau = options["temperature"]
    same, other = [], []
    for state, theirs in retained:
        if theirs is None:
            continue
        if theirs == own:
            same.append(cosine(z, state) / tau)
        elif theirs != 0 or options["outside"]:
            other.append(cosine(z, state) / tau)
    if not same and view is not None:
        same = [cosine(z, view) / tau]
    if not other or (options["form"] == "ratio" and not same):
        return None
    total = 0.0
    for s in other:
        if options["form"] == "ratio":
            total -= s - math.log(sum(math.exp(p) for p in same))
        else:
            total -= math.log(math.exp(s) / sum(math.exp(k) for k in same + other))
    return total / len(other)


def class_of(label: int, class_map: list[int]) -> int | None:
    return class_map[label] if label >= 0 else None


def labelled(states: Any, labels: Any, class_map: list[int]) -> list[Labelled]:
    return [(z, class_of(y, class_map)) for z, y in zip(states.tolist(), labels.tolist(), strict=True)]


def by_row(tokens: list[Labelled], rows: list[int]) -> dict[int, Labelled]:
    """One vector and one class for each row: the mean over what counts, and the entity that most labels have."""
    out: dict[int, Labelled] = {}
    for row in set(rows):
        own = [(z, c) for (z, c), r in zip(tokens, rows, strict=True) if r == row and c is not None]
        if not own:
            out[row] = ([1.0] * len(tokens[0][0]), None)
            continue
        mean = [sum(z[d] for z, _ in own) / len(own) for d in range(len(own[0][0]))]
        entities = [c for _, c in own if c]
        best = max(sorted(set(entities)), key=entities.count) if entities else 0
        out[row] = (mean, best)
    return out


def anchors(given: Inputs, options: Options) -> list[float | None]:
    """DeepCUT of each label of the forget rows; None where it does not count."""
    class_map = given["class_map"].tolist()
    tokens = labelled(given["anchor"], given["labels"], class_map)
    views = given.get("own_view")
    seconds = [None] * len(tokens) if views is None else views.tolist()
    sides = [
        labelled(states, labels, class_map)
        for states, labels in zip(given["contrast"], given["contrast_labels"], strict=True)
    ]
    if options["anchors"] != "pooled":
        retained = [pair for side in sides for pair in side]
        return [anchor_value(z, c, v, retained, options) for (z, c), v in zip(tokens, seconds, strict=True)]
    rows = given["rows"].tolist()
    retained = [
        pair
        for side, numbers in zip(sides, given["contrast_rows"], strict=True)
        for pair in by_row(side, numbers.tolist()).values()
    ]
    own = by_row(tokens, rows)
    again = {} if views is None else by_row([(v, c) for v, (_, c) in zip(seconds, tokens, strict=True)], rows)
    value = {
        row: anchor_value(z, c, again[row][0] if again else None, retained, options) for row, (z, c) in own.items()
    }
    return [value[row] for row in rows]


def deepcut(given: Inputs, options: Options) -> list[float]:
    return [0.0 if value is None else value for value in anchors(given, options)]


def log_softmax(z: Vector) -> Vector:
    top = max(z)
    normaliser = top + math.log(sum(math.exp(v - top) for v in z))
    return [v - normaliser for v in z]


def split_mix(x: int) -> int:
    """The finaliser of SplitMix64 on unsigned numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def other_class(label: int, row: int, place: int, seed: int, classes: int) -> int:
    mixed = seed % 2**64
    for part in (row, place):
        mixed = split_mix((mixed + (part + 1) * 0x9E3779B97F4A7C15) % 2**64)
    others = [(label + step) % classes for step in range(1, classes)]
    return others[mixed % 2**63 % (classes - 1)]


def relabel(given: Inputs, options: Options) -> list[float]:
    labels = given["labels"].tolist()
    class_map = given["class_map"].tolist() if "class_map" in given else None
    out = []
    for i, (z, label) in enumerate(zip(given["logits"].tolist(), labels, strict=True)):
        if options["labels"] == "entity" and class_map is not None and class_map[label] == 0:
            out.append(0.0)
        elif options["to"] == "outside" and class_map is not None:
            out.append(-log_softmax(z)[class_map.index(0)])
        else:
            row, place = int(given["rows"][i]), int(given["places"][i])
            out.append(-log_softmax(z)[other_class(label, row, place, int(given["seed"]), len(z))])
    return out


def bad_teacher(given: Inputs, options: Options) -> list[float]:
    z, states = given["logits"].tolist(), given["states"].tolist()
    generator = torch.Generator().manual_seed(int(given["seed"]))
    head = torch.randn(len(z[0]), len(states[0]), generator=generator, dtype=torch.float64).tolist()
    out = []
    for own, h in zip(z, states, strict=True):
        said = [options["spread"] * sum(w * x for w, x in zip(weights, h, strict=True)) for weights in head]
        out.append(divergence(log_softmax(said), log_softmax(own)))
    return out


def divergence(of: list[float], to: list[float]) -> float:
    return sum(math.exp(t) * (t - p) for t, p in zip(of, to, strict=True))


def _told(given: Inputs, what: str) -> list[Any]:
    """What was said of each label of a batch, by its row's number and its place."""
    told, starts = (given["said"][name].tolist() for name in (what, "starts"))
    places = zip(given["rows"].tolist(), given["places"].tolist(), strict=True)
    return [told[starts[row] + place] for row, place in places]


def distil(given: Inputs, options: Options) -> list[float]:
    return [divergence(said, own) for said, own in zip(_told(given, "logp"), given["logp"].tolist(), strict=True)]


def likelihood(given: Inputs, options: Options) -> list[float]:
    delta, out = options.get("delta", 1.0), []
    for own, said, label in zip(given["logp"].tolist(), _told(given, "logp"), _told(given, "label"), strict=True):
        apart = abs(own[label] - said[label])
        out.append(apart**2 / 2 if apart <= delta else delta * (apart - delta / 2))
    return out


ORACLES: dict[str, Callable[[Inputs, Options], list[float]]] = {
    "deepcut": deepcut,
    "relabel": relabel,
    "bad_teacher": bad_teacher,
    "distil": distil,
    "likelihood": likelihood,
}


# --- what classifiers are measured by -----------------------------------------------------------------------------


def entities(tags: list[str]) -> list[tuple[int, int, str]]:
    """Entities of one sentence, IOB2 and strict: first word, the one after the last, type."""
    found, at = [], 0
    while at < len(tags):
        if not tags[at].startswith("B-"):
            at += 1
            continue
        end = at + 1
        while end < len(tags) and tags[end] == "I-" + tags[at][2:]:
            end += 1
        found.append((at, end, tags[at][2:]))
        at = end
    return found


def strict_f1(gold: list[list[str]], given: list[list[str]], only: str | None = None) -> float:
    """Micro F1 of the entities of all sentences, of one type alone where it is named."""
    right = found = there = 0
    for true, answer in zip(gold, given, strict=True):
        a, b = ({e for e in entities(tags) if only in (None, e[2])} for tags in (true, answer))
        right, found, there = right + len(a & b), found + len(b), there + len(a)
    return 2 * right / (found + there) if found + there else 0.0


def auc(a: list[float], b: list[float]) -> float:
    return sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))


def neighbours(z: Vector, own: int, among: list[tuple[Vector, int]], k: int) -> float:
    """Share of the k nearest by cosine that have the class ``own``."""
    near = sorted(among, key=lambda pair: -cosine(z, pair[0]))[:k]
    return sum(kind == own for _, kind in near) / len(near)


def middle_cosine(z: Vector, kind: int, among: list[tuple[Vector, int]]) -> float:
    """Cosine to the mean of the directions of one class."""
    members = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v, own in among if own == kind]
    return cosine(z, [sum(v[d] for v in members) / len(members) for d in range(len(z))])
