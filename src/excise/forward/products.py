"""What can be asked of a forward pass, and which passes that costs: nothing here computes anything.

Layers are numbered as in ``hidden_states`` of transformers: ``j < L`` is the input of block ``j``, ``L`` the normed
state that the head reads. Negative numbers count from the end (``-1`` is ``L``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

POLICY = "policy"
REFERENCE = "reference"
#: Detail of a product that is read as a backdrop, without gradient.
AMONG = "among"


@dataclass(frozen=True)
class View:
    """A second view of a side: the blocks from ``from_layer`` up run again on ``dropout`` of their input (ours).

    ``from_layer`` is a block index and may be negative (``-1`` is the last block); 0 is SimCSE's whole second pass.

    Example:
        >>> View("forget", from_layer=-1, dropout=0.1).of
        'forget'
    """

    of: str
    from_layer: int
    dropout: float = 0.1


Side = str | View


@dataclass(frozen=True)
class Product:
    """A tensor that can be asked for: what it is, on which side, by which model, at which layer.

    Example:
        >>> seq_logp("forget").what
        'seq_logp'
    """

    what: str
    side: Side | None = None
    model: str = POLICY
    layer: int | None = None
    detail: str | None = None


def token_logp(side: Side, model: str = POLICY) -> Product:
    """``[n]`` fp32: log-probability of each label token, rows one after the other."""
    return Product("token_logp", side, model)


def seq_logp(side: Side, model: str = POLICY) -> Product:
    """``[B]`` fp32: sum of the label log-probabilities of each row."""
    return Product("seq_logp", side, model)


def logits(side: Side, model: str = POLICY) -> Product:
    """``[n, V]`` logits at label positions; only for terms ``per="token"``, which the engine may chunk over ``n``."""
    return Product("logits", side, model)


def named_logp(side: Side, said: str) -> Product:
    """``[n, K]`` fp32: log-probabilities of the classes that a constant names for each label; all others as one more.

    The constant ``said`` has ``classes [N, K]``, those of every label of the side, rows one after the other, and
    ``starts [rows]``, where each row begins. ``[n, K + 1]`` where the model tells more than K classes apart.
    """
    return Product("named_logp", side, detail=said)


def label_count(side: Side) -> Product:
    """``[B]`` fp32: label tokens of each row."""
    return Product("label_count", side)


def token_rows(side: Side) -> Product:
    """``[n]`` int64: the row of each label token."""
    return Product("token_rows", side)


def row_numbers(side: Side) -> Product:
    """``[n]`` int64: the number of each label token's row within its side, whatever batch it stands in."""
    return Product("row_numbers", side)


def token_index(side: Side) -> Product:
    """``[n]`` int64: the place of each label token in its answer, from 0."""
    return Product("token_index", side)


def labels(side: Side) -> Product:
    """``[n]`` int64: the label tokens, or a classifier's classes."""
    return Product("labels", side)


def hidden(side: Side, layer: int, model: str = POLICY) -> Product:
    """``[B, T, D]`` hidden states at ``layer``."""
    return Product("hidden", side, model, layer)


def at_labels(side: Side, layer: int, model: str = POLICY) -> Product:
    """``[n, D]`` states at ``layer`` that predict each label, rows one after the other."""
    return Product("at_labels", side, model, layer)


def pooled(side: Side, layer: int, pooling: str = "attended", model: str = POLICY) -> Product:
    """``[B, D]`` fp32: mean of the states over ``"attended"``, ``"answer"`` or ``"last"`` positions."""
    return Product("pooled", side, model, layer, pooling)


def mask(side: Side, which: str) -> Product:
    """``[B, T]`` bool: ``"attended"``, ``"answer"`` (positions that hold a label token) or ``"last"`` positions."""
    return Product("mask", side, detail=which)


def column(side: Side, name: str) -> Product:
    """``[B]``: a column of the batch."""
    return Product("column", side, detail=name)


def constant(name: str) -> Product:
    """A tensor that is fixed for the run: RMU's direction, a basis."""
    return Product("constant", detail=name)


def population(kind: str, side: str, *, layer: int | None = None, every: int = 0, rows: int = 0) -> Product:
    """``{name: tensor}``: what all rows of a side are like together, by the model as it is when training begins.

    ``kind`` is ``"likelihood"`` or ``"states"`` (of a layer), see `excise.population`. With ``every`` it is taken again
    after so many steps, of so many ``rows`` (0: all) that take turns. It costs no pass in a step.

    Example:
        >>> population("likelihood", "never_seen", every=6, rows=128).detail
        'population/never_seen/likelihood//6/128'
    """
    where = "" if layer is None else layer
    return Product("constant", None, layer=layer, detail=f"population/{side}/{kind}/{where}/{every}/{rows}")


def among(product: Product) -> Product:
    """The same tensor without gradient, for a term that reads where a value stands among those of all rows.

    A product of its own, so that it can be gathered from all ranks while each rank's own values are not.
    """
    return replace(product, detail=AMONG)


def lora(which: str) -> Product:
    """``{module name: matrix}``: the adapter factors ``"A"`` or ``"B"``, read off the weights without a pass."""
    return Product("lora", detail=which)


FROM_HEAD = {"token_logp", "seq_logp", "logits", "named_logp"}
FROM_STATES = {"hidden", "pooled", "at_labels"}
FROM_BATCH = {"label_count", "token_rows", "row_numbers", "token_index", "labels", "mask", "column"}
#: Products with one entry per label token, rows one after the other.
PER_TOKEN = frozenset(
    {"token_logp", "logits", "named_logp", "token_rows", "row_numbers", "token_index", "labels", "at_labels"}
)


def base_side(side: Side | None) -> str | None:
    """The side whose rows a derived side repeats."""
    return side.of if isinstance(side, View) else side


@dataclass
class Pass:
    """What one forward pass has to yield: layers read, whether the head is, and views that run again."""

    layers: set[int] = field(default_factory=set)
    head: bool = False
    views: dict[View, set[int]] = field(default_factory=dict)


def passes(needs: Iterable[Product]) -> dict[tuple[str, str], Pass]:
    """The forward passes that a set of products costs: ``{(side, model): Pass}``.

    Args:
        needs: Products of all terms or columns of a step.

    Returns:
        One entry per (side, model), whatever the number of products that share it.

    Example:
        >>> sorted(passes([seq_logp("forget"), pooled("forget", -1), token_logp("retain")]))
        [('forget', 'policy'), ('retain', 'policy')]
    """
    plan: dict[tuple[str, str], Pass] = {}
    for p in needs:
        if p.what not in FROM_HEAD | FROM_STATES:
            continue
        side = base_side(p.side)
        assert side is not None
        entry = plan.setdefault((side, p.model), Pass())
        if isinstance(p.side, View):
            layers = entry.views.setdefault(p.side, set())
            layers.add(-1 if p.layer is None else p.layer)
        elif p.what in FROM_HEAD:
            entry.head = True
        elif p.layer is not None:
            entry.layers.add(p.layer)
    return plan
