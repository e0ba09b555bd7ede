"""What the DeepCUT study runs: methods, what is tuned, and every row in the order in which it is worth having."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import splits

Changes = dict[str, Any]
_CUT = "objective.regularise.deepcut."
RATES = [5e-5, 2e-4]
_MATCHED: Changes = {
    "objective.forget": {"quantile": {"within": "type", "level": "token", "refresh": 16, "weight": 1.0}},
    "objective.regularise": {},
}


@dataclass(frozen=True)
class Parts:
    """Models of parts of the data.

    Attributes:
        many: How many parts; each model goes without one of them.
        again: Which division, and the seed of the models.
        as_long: Whether each takes as many steps as a model of all data.
    """

    many: int
    again: int = 0
    as_long: bool = False

    def of(self, rows: int) -> list[np.ndarray]:
        """The rows of each part, as indices."""
        order = np.random.default_rng(23 + self.again).permutation(rows)
        return [order[number :: self.many] for number in range(self.many)]


#: Values of ``data.never_saw`` that stand for models of parts of the data (see `Study.strangers`); of ``grouped`` the
#: part that holds the forgotten rows, all of them.
PARTS = {
    "halves": Parts(2),
    "quarters": Parts(4),
    "eighths": Parts(8),
    "grouped": Parts(4),
    "other-quarters": Parts(4, again=1),
    "longer-quarters": Parts(4, as_long=True),
}
_FROM_HALVES: Changes = {"data.never_saw": "halves"}
_BY_F1: Changes = {**_FROM_HALVES, "stop.statistic": "f1"}
#: DeepCUT leaves words outside of entities alone; ascent on every label of the forgotten rows does not.
_ASCENT: Changes = {"objective.forget": {"ga": {"weight": 0.3}}}


#: Of ``DATA@K``: what the K-th of these models was trained on, which forgets as the model of all data does.
OTHERS = "quarters"


@dataclass(frozen=True)
class Method:
    """A recipe that ships, what is changed in it, and the four settings that are tried, or whose choice it takes."""

    recipe: str
    trials: Sequence[Changes] = ()
    changes: Changes = field(default_factory=dict)
    tuned_as: str = ""


def _grid(key: str, weights: Sequence[float], rates: Sequence[float] = RATES) -> list[Changes]:
    return [{"optimiser.lr": lr, key: weight} for lr in rates for weight in weights]


METHODS: dict[str, Method] = {
    "deepcut": Method("deepcut", _grid(_CUT + "weight", (0.03, 0.1))),
    "deepcut-full": Method("deepcut", _grid(_CUT + "weight", (0.1, 0.3)), {_CUT + "form": "full"}),
    "reverse-gradient": Method("reverse-gradient", _grid("objective.forget.ga.weight", (0.3, 1.0))),
    "relabel": Method("relabel", _grid("objective.forget.relabel.weight", (0.3, 1.0))),
    "random-labels": Method("random-labels", _grid("objective.forget.relabel.weight", (0.3, 1.0))),
    "bad-teacher": Method("bad-teacher", _grid("objective.forget.bad_teacher.weight", (1.0, 5.0), (5e-5, 2e-4))),
    # What is forgotten is a term of the study's own (`kga`); it has a stop of its own too.
    "kga": Method("bad-teacher", _grid("objective.forget.kga:kga.weight", (1.0, 5.0)), {"stop.rule": "none"}),
    # Ours: DeepCUT, and words outside of entities to where those of never-seen sentences lie (see `splits.sides`).
    "outside": Method(
        "deepcut",
        [{_CUT + "weight": cut, "objective.forget.quantile.weight": w} for cut in (0.03, 0.1) for w in (1.0, 3.0)],
        {"objective.forget": {"quantile": {"within": "outside", "level": "token", "refresh": 16, "weight": 3.0}}},
    ),
    # Ours: no contrast, entity tokens to where never-seen ones of their type lie.
    "matching": Method("deepcut", _grid("objective.forget.quantile.weight", (0.3, 1.0)), _MATCHED),
    # Ours: DeepCUT with a little ascent; its stop counts from what models say that never saw the sentences; both.
    "deepcut+ascent": Method("deepcut", changes=_ASCENT, tuned_as="deepcut"),
    "deepcut+halves": Method("deepcut", changes=_FROM_HALVES, tuned_as="deepcut"),
    "deepcut+ascent+halves": Method("deepcut", changes={**_ASCENT, **_FROM_HALVES}, tuned_as="deepcut"),
    "reverse-gradient+halves": Method("reverse-gradient", changes=_FROM_HALVES, tuned_as="reverse-gradient"),
    # Ours: ended where F1 itself is that of never-seen sentences, as far as such models find them alike.
    "deepcut+f1": Method("deepcut", changes=_BY_F1, tuned_as="deepcut"),
    "reverse-gradient+f1": Method("reverse-gradient", changes=_BY_F1, tuned_as="reverse-gradient"),
    # Ours: learns what models of parts of the data say, each of what it never saw: halves, all but a quarter or eighth.
    "distil": Method(
        "gold-like-ner",
        [{"optimiser.lr": lr, "objective.retain": {term: {}}} for lr in (1e-4, 2e-4) for term in ("nll", "kl")],
        _FROM_HALVES,
    ),
    "distil-quarters": Method("gold-like-ner", changes={"data.never_saw": "quarters"}, tuned_as="distil"),
    "distil-eighths": Method("gold-like-ner", changes={"data.never_saw": "eighths"}, tuned_as="distil"),
    # The recipe's own ten epochs where the study gives all methods forty, since there are a dozen sentences alone.
    "distil-ten-epochs": Method(
        "gold-like-ner", changes={"data.never_saw": "quarters", "schedule.epochs": 10.0}, tuned_as="distil"
    ),
    # Twice as long: whether a run has come to where its teachers are.
    "distil-twenty-epochs": Method(
        "gold-like-ner", changes={"data.never_saw": "quarters", "schedule.epochs": 20.0}, tuned_as="distil"
    ),
    "distil-grouped": Method("gold-like-ner", changes={"data.never_saw": "grouped"}, tuned_as="distil"),
    "naive": Method("naive", [{"optimiser.lr": lr} for lr in (5e-5, 1e-4, 2e-4, 5e-4)]),
}
#: What has a procedure of its own and is not tuned.
PROCEDURES = ("retrain", "sisa")
MAIN = (
    "outside", "deepcut", "reverse-gradient", "matching", "relabel", "retrain", "deepcut-full", "random-labels",
    "bad-teacher", "naive",
)  # fmt: skip
#: What is compared on further draws, seeds and data.
COMPARED = ("outside", "deepcut", "reverse-gradient", "matching", "relabel")
#: What came nearest on three draws, on further ones: an interval over three is 5 points wide to either side.
NEAREST, FURTHER = ("reverse-gradient", "outside", "deepcut"), range(3, 5)
#: Additions of ours, on all draws of 5 %: none was chosen by what it does on them.
ADDED, ON = (
    "deepcut+f1", "reverse-gradient+f1", "deepcut+ascent+halves", "deepcut+halves", "deepcut+ascent",
    "reverse-gradient+halves",
), range(5)  # fmt: skip
#: What learns from models of parts, which was made on the tuning split and on draws from 15 on.
TAUGHT, TAUGHT_ON = ("distil", "distil-quarters"), range(15)
#: Draws that nobody had looked at when the rule by F1 was made, with what came nearest on those before and DeepCUT.
FRESH = range(5, 8)
#: What aims at never-seen rows while it trains: it takes half of the stopping rule's, and is stopped by the others.
AIMED = ("matching",)
#: What reads of them how likely words outside of entities are, of which the rule reads nothing: it shares the rule's.
SHARED = ("outside",)
DRAWS = 10
#: Half of the forgotten sentences are trained again, the other half measured: whether it comes back faster.
RELEARNED: Changes = {"evaluate.relearn_steps": [0, 1, 2, 4, 8, 16], "evaluate.relearn_lr": 5e-5}
#: The recipe's own values of what is tuned.
AS_SHIPPED: Changes = {}


@dataclass(frozen=True)
class Row:
    """One run of the study.

    Attributes:
        data: Name of the data set.
        split: Which rows are forgotten; see `splits.chosen`.
        method: Key of ``METHODS``, or one of ``PROCEDURES``.
        seed: Of unlearning and of the gold.
        group: ``main``, or what is varied.
        label: Of a varied row.
        changes: Recipe keys with their values, beside the tuned ones.
    """

    data: str
    split: str
    method: str
    seed: int = 0
    group: str = "main"
    label: str = ""
    changes: Changes = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join(p for p in (self.data, self.split, self.method, self.label, f"s{self.seed}") if p)


def other(data: str) -> tuple[str, int | None]:
    """A data set, and which of its models that go without a part is meant; None: the model of all its rows."""
    whole, _, number = data.partition("@")
    return whole, int(number) if number else None


def quick() -> Iterator[Row]:
    """A first look: one split, four methods."""
    for method in ("deepcut", "reverse-gradient", "kga", "sisa"):
        yield Row("wnut17", "random05-0", method)


def whole() -> Iterator[Row]:
    """Every row, the most telling first."""
    for method in (*MAIN, "kga", "sisa"):
        yield Row("wnut17", "random05-0", method)
    yield _as_shipped("random05-0")
    for draw in ON:
        for method in ADDED:
            yield Row("wnut17", f"random05-{draw}", method, draw)
    for draw in FRESH:
        for method in ("reverse-gradient+f1", "deepcut"):
            yield Row("wnut17", f"random05-{draw}", method, draw)
    yield from _taught()
    for method in ("distil-quarters", "deepcut", "reverse-gradient+f1", "distil"):
        yield Row("wnut17", "random05-0", method, group="relearned", label="relearned", changes=RELEARNED)
    for number in range(PARTS[OTHERS].many):
        yield Row(f"wnut17@{number}", "random05-0", "distil-quarters", group="others")
    yield from _edge()
    yield from _sweeps()
    for split in ("type-person", "cluster"):
        for method in (*COMPARED, *ADDED):
            yield Row("wnut17", split, method)
    for data in ("ncbi", "wnut16", "bc5cdr"):
        for method in COMPARED:
            yield Row(data, "random05-0", method)
    for method in ("deepcut", "reverse-gradient", "random-labels"):
        yield Row("classics", "random05-0", method, group="text")
    for method in (*MAIN, *ADDED):
        yield Row("wnut17", "random10-0", method)
    yield _as_shipped("random10-0")
    for draw in range(DRAWS):
        for method in COMPARED:
            yield Row("wnut17", f"random01-{draw}", method)
    for seed in (1, 2):
        for share in ("05", "10"):
            for method in (*COMPARED, "retrain"):
                yield Row("wnut17", f"random{share}-{seed}", method, seed)
    for draw in FURTHER:
        for method in NEAREST:
            yield Row("wnut17", f"random05-{draw}", method, draw)
    yield from _everywhere()


def _taught() -> Iterator[Row]:
    """What learns from models of parts, wherever there is a gold."""
    for method in TAUGHT:
        for draw in TAUGHT_ON:
            yield Row("wnut17", f"random05-{draw}", method, draw)
        for draw in range(3):
            yield Row("wnut17", f"random10-{draw}", method, draw)
        for draw in range(DRAWS):
            yield Row("wnut17", f"random01-{draw}", method)
        for split in ("type-person", "cluster"):
            yield Row("wnut17", split, method)
        for data in ("ncbi", "wnut16", "bc5cdr"):
            yield Row(data, "random05-0", method)
        yield Row("classics", "random05-0", method, group="text")
    for split in ("cluster", "type-person"):
        yield Row("wnut17", split, "distil-grouped")
    for data in splits.TAGGED:
        yield Row(data, "random05-0", "distil-twenty-epochs")
    for method in ("distil-eighths", "distil-ten-epochs"):
        for draw in range(DRAWS):
            yield Row("wnut17", f"random01-{draw}", method)


def _everywhere() -> Iterator[Row]:
    """Every method at every share, on both data sets and three seeds."""
    for method in MAIN:
        yield Row("ncbi", "random10-0", method)
    for method in MAIN:
        if method not in COMPARED:
            yield Row("ncbi", "random05-0", method)
    for draw in range(DRAWS):
        for method in COMPARED:
            yield Row("ncbi", f"random01-{draw}", method)
    for seed in (1, 2):
        for share in ("05", "10"):
            for method in COMPARED:
                yield Row("ncbi", f"random{share}-{seed}", method, seed)
            for method in ("deepcut-full", "random-labels", "bad-teacher", "naive"):
                yield Row("wnut17", f"random{share}-{seed}", method, seed)
        yield Row("wnut17", f"random05-{seed}", "kga", seed)


def _as_shipped(split: str) -> Row:
    """DeepCUT with the settings of its recipe, whatever the trials chose."""
    return Row("wnut17", split, "deepcut", group="shipped", label="shipped", changes=AS_SHIPPED)


def _varied(group: str, choices: dict[str, Changes]) -> Iterator[Row]:
    for label, changes in choices.items():
        yield Row("wnut17", "random05-0", "deepcut", group=group, label=label, changes=changes)


def _edge() -> Iterator[Row]:
    """What might give DeepCUT an edge, one change each."""
    yield from _varied(
        "edge",
        {
            "not-detached": {_CUT + "detach_retain": False},  # the recipe detaches
            "clreg": {"objective.regularise.clreg": {"weight": 0.1, "temperature": 0.5}},
            "with-relabel": {"objective.forget": {"relabel": {"weight": 0.3}}},
            "layer-4": {_CUT + "layer": 4},
        },
    )
    latent = {"objective.regularise": {"latent_match": {"layers": 2, "weight": 0.1}}}
    yield Row("wnut17", "random05-0", "matching", group="edge", label="latent", changes=latent)


def _sweeps() -> Iterator[Row]:
    """The paper's sweeps and what it leaves open."""
    yield from _varied("gamma", {f"gamma-{w}": {_CUT + "weight": w} for w in (0.1, 0.3, 0.5, 0.7, 0.9)})
    yield from _varied("tau", {f"tau-{t}": {_CUT + "temperature": t} for t in (0.3, 0.5, 0.7)})
    yield from _varied("dropout", {f"dropout-{p}": {_CUT + "dropout": p} for p in (0.0, 0.2, 0.3)})
    yield from _varied(
        "encoder",
        {"frozen": {"model.train_only": "classifier"}, "fine-tuned": {"model.train_only": r"encoder\.|classifier"}},
    )
    yield from _varied("granularity", {f"anchors-{a}": {_CUT + "anchors": a} for a in ("all", "pooled")})
    yield from _varied(
        "composition",
        {
            "no-retain-steps": {"schedule.retain_steps": 0},
            "one-retain-step": {"schedule.retain_steps": 1},
            "mixed": {"schedule.retain_steps": 0, "schedule.mixed": True},
            "balanced": {"schedule.balance": "classes"},
            "drawn": {_CUT + "contrast": "both", "schedule.contrast_batch": 32, "schedule.balance": "contrast"},
            "one-view": {_CUT + "views": 1},
            "no-stop": {"stop.rule": "none"},
        },
    )
