"""The catalogue for classifiers: what each number of a tagger or text classifier says, and which way it points."""

from __future__ import annotations

from collections.abc import Mapping

from excise.metrics.catalogue import FAMILIES, METRICS, Metric

_DEEPCUT = "DeepCUT, arXiv:2503.14900"
_SEQEVAL = "Nakayama, seqeval 2018 (strict, IOB2)"
_SHARE = "share, 0 to 1"
_RETAIN = ("untouched", "retain")
_MEMBER = ("forget", "never_seen")
_AUC = "0.5 cannot tell, 1 forgotten rows look trained on, 0 reversed; either side of the gold gives them away"
_ABOVE = "above the gold: still remembered; below the gold: pushed further than forgetting needs, which also stands out"
_LOST = "below the gold: something was lost that should have stayed"
_POINTS = "difference of two shares, -1 to 1; interval 90 %, both models on the same drawn rows"
_GAP = "0 is the gold; above: still remembered; below: forgotten beyond what a model that never saw the rows shows"
_SHAPE = "either side of the gold: the words do not lie where a model that never saw them would put them"

#: Sides that every run may have, and what a reader calls them; utility sets go by their own names.
SIDES = {
    "forget": "forgotten rows", "retain": "rows to be kept", "untouched": "kept rows that unlearning did not touch",
    "never_seen": "never-seen rows", "dev": "the set dev", "test": "the set test",
}  # fmt: skip
_FORGETTING = ("forget", "never_seen")


def _score(side: str, name: str, title: str, what: str, citation: str) -> Metric:
    """A score of one side: F1, accuracy."""
    where = SIDES.get(side, f"the set {side}")
    return Metric(
        f"{side}_{name}", f"{title} on {where}", f"{what} on {where}.", _SHARE,
        "gold" if side in _FORGETTING else "up", citation, (side,),
        against_gold=_ABOVE if side == "forget" else _LOST,
    )  # fmt: skip


def _gap(side: str, name: str, title: str) -> Metric:
    where = SIDES.get(side, f"the set {side}")
    return Metric(
        f"{side}_{name}_gap", f"Gap to the gold in {title} on {where}",
        f"{title} on {where} less that of the gold; the sign says which is larger.", _POINTS, "gold", "ours", (side,),
        needs_gold=True, against_gold=_GAP if side == "forget" else _LOST,
    )  # fmt: skip


def _both(right: str) -> dict[str, Metric]:
    """Numbers that taggers and text classifiers share; ``right`` is what a model is asked for."""
    made = (
        Metric(
            "forget_probability", "Probability of forgotten classes",
            f"How likely the model still finds {right} in forgotten rows.", _SHARE, "gold", _DEEPCUT, ("forget",),
            against_gold=_ABOVE),
        Metric(
            "retain_probability", "Probability of kept classes",
            f"How likely the model finds {right} in rows it should keep, those that unlearning did not touch where "
            "there are any.", _SHARE, "up", _DEEPCUT, _RETAIN, against_gold=_LOST),
        Metric(
            "membership_auc", "Membership attack: loss",
            "How well an outsider tells forgotten rows from rows never trained on, by how likely the model finds their "
            "classes. Above the gold they look known, below it they look avoided; both give them away.",
            _AUC, "gold", "Yeom et al., arXiv:1709.01604", _MEMBER, against_gold=_ABOVE),
        Metric(
            "privleak", "Privacy leak (PrivLeak)",
            "How far the membership attack differs from the gold: negative means too little was unlearned, positive "
            "too much.", "per cent, -100 to unbounded; 0 as the gold", "gold", "MUSE, arXiv:2407.06460", _MEMBER,
            needs_gold=True, against_gold="0 is the target; below: too little, above: too much, which is a leak too"),
        Metric(
            "latent_membership_auc", "Membership attack on internal vectors",
            "How well a simple classifier on the internal vectors tells forgotten from never-seen rows, on rows and "
            "persons that it has not met.", _AUC, "gold", "Alain and Bengio, arXiv:1610.01644", _MEMBER, "states",
            against_gold="above the gold: the model still shows inside which rows it once knew"),
        Metric(
            "same_class_neighbours", "Neighbours of the same class",
            "Share of the ten nearest kept vectors that have the same class as the forgotten one, inside the model.",
            _SHARE, "gold", "after DeepCUT, arXiv:2503.14900; measure ours", ("forget", *_RETAIN), "states",
            against_gold=_SHAPE),
        Metric(
            "own_class_cosine", "Nearness to its own class",
            "How near a forgotten vector lies to the middle of the kept vectors of its class: 1 is the same direction.",
            "cosine, -1 to 1", "gold", "ours", ("forget", *_RETAIN), "states", against_gold=_SHAPE),
        Metric(
            "relearned_probability", "Probability after relearning",
            "How likely the classes of forgotten rows become again after a few training steps on other forgotten rows.",
            _SHARE, "gold", "Hu et al., arXiv:2406.13356", ("forget",), "attack",
            against_gold="above the gold: part of it was hidden rather than removed"),
    )  # fmt: skip
    return {metric.name: metric for metric in made}


_F1 = ("f1", "F1 of entities", "How many entities are found with exact borders and type, and how few are made up,")
_ACCURACY = ("accuracy", "Accuracy", "Share of texts that the model gives the right class")
_MACRO = ("macro_f1", "Macro F1", "F1 averaged over the classes, each counting the same,")
_ENTITY_ATTACK = Metric(
    "entity_membership_auc", "Membership attack: loss of entities",
    "How well an outsider tells forgotten rows from rows never trained on, by how likely the model finds the tags of "
    "their entities alone. Either side of the gold gives them away.", _AUC, "gold",
    "Yeom et al., arXiv:1709.01604", _MEMBER, against_gold=_ABOVE)  # fmt: skip
_FALSE_ALARMS = (
    "outside_accuracy",
    "Words outside entities that are left alone",
    "Share of the words outside of entities that the model takes for none,",
)
_OUTSIDE = Metric(
    "outside_cosine", "Nearness to words outside entities",
    "How near a forgotten vector lies to the middle of the vectors of words that are no entity: 1 is the same "
    "direction.", "cosine, -1 to 1", "gold", "ours", ("forget", *_RETAIN), "states", against_gold=_SHAPE)  # fmt: skip
_RELEARNED_F1 = Metric(
    "relearned_f1", "F1 after relearning",
    "F1 on forgotten rows after a few training steps on other forgotten rows.", _SHARE, "gold",
    "Hu et al., arXiv:2406.13356", ("forget",), "attack",
    against_gold="above the gold: part of it was hidden rather than removed")  # fmt: skip


def _tags() -> dict[str, Metric]:
    out = {f"{side}_f1": _score(side, *_F1, _SEQEVAL) for side in SIDES}
    out |= {f"{side}_f1_gap": _gap(side, "f1", _F1[1]) for side in ("forget", "test")}
    out |= {f"{side}_outside_accuracy": _score(side, *_FALSE_ALARMS, "ours") for side in _FORGETTING}
    out |= _both("the right tags of the entities")
    return out | {m.name: m for m in (_ENTITY_ATTACK, _OUTSIDE, _RELEARNED_F1)}


def _texts() -> dict[str, Metric]:
    out: dict[str, Metric] = {}
    for name, title, what in (_ACCURACY, _MACRO):
        out |= {f"{side}_{name}": _score(side, name, title, what, "ours") for side in SIDES}
    out |= {f"{side}_accuracy_gap": _gap(side, "accuracy", "accuracy") for side in ("forget", "test")}
    return out | _both("the right class of the text")


#: Task -> its numbers.
CATALOGUES: Mapping[str, Mapping[str, Metric]] = {
    "causal_lm": METRICS,
    "token_classification": _tags(),
    "sequence_classification": _texts(),
}


def of_task(task: str) -> Mapping[str, Metric]:
    """The numbers of a task; those of language models for a task that is not known.

    Example:
        >>> of_task("token_classification")["forget_f1_gap"].direction, "forget_f1" in of_task("causal_lm")
        ('gold', False)
    """
    return CATALOGUES.get(task, METRICS)


def find(name: str, task: str) -> Metric | None:
    """The metric of a number: with a part (``forget_f1/person``) that of its family; of a utility set that of any set.

    Example:
        >>> find("news_f1", "token_classification").title, find("forget_f1/person", "token_classification").title
        ('F1 of entities on the set news', 'F1 of entities on forgotten rows: person')
    """
    from dataclasses import replace

    metrics = of_task(task)
    family, _, part = name.partition("/")
    metric = metrics.get(family) or METRICS.get(family) or (FAMILIES.get(family) if part else None)
    if metric is None and task != "causal_lm":
        kinds = {"token_classification": (_F1,)}.get(task, (_MACRO, _ACCURACY))
        own = next((kind for kind in kinds if family.endswith(f"_{kind[0]}")), None)
        metric = own and _score(family.removesuffix(f"_{own[0]}"), *own, _SEQEVAL if own is _F1 else "ours")
    if metric is None or not part:
        return metric
    return replace(metric, name=name, title=f"{metric.title}: {part.replace('/', ', ')}")
