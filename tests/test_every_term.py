"""Contracts that every row of the objective tables keeps; a new row is picked up by itself."""

from __future__ import annotations

import inspect
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from excise.forward import AMONG, PER_TOKEN, POLICY, Product, base_side, passes
from excise.objectives import FORGET, REGULARISE, RETAIN, Dual, Ramp, Term, source_of
from oracles import ORACLES as OF_ROWS
from oracles_class import ORACLES as OF_CLASSES
from oracles_gold import ORACLES as OF_MATCHING
from oracles_lora import ORACLES as OF_WEIGHTS

ORACLES: dict[str, Any] = {**OF_ROWS, **OF_WEIGHTS, **OF_CLASSES, **OF_MATCHING}
TABLES = {"forget": FORGET, "retain": RETAIN, "regularise": REGULARISE}
FACTORIES = {name: factory for table in TABLES.values() for name, factory in table.items()}

#: Options beyond the defaults, so that every branch meets every contract.
MORE_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "npo": [{"beta": 2.0}],
    "simnpo": [{"beta": 0.7, "delta": 1.0}],
    "wga": [{"beta": 0.0}, {"beta": 0.5}],
    "satimp": [{"beta1": 0.0, "beta2": 0.0}],
    "undial": [{"beta": 0.0}],
    "ceu": [{"skip": 0}],
    "rmu": [{"layer": 2, "steering": 0.5}],
    "kl": [{"side": "general"}],
    "clreg": [
        {"loss": "infonce"},
        {"loss": "infonce", "scale_infonce": False, "views": "both", "layers": 2},
        {"views": "paraphrase", "reduce": "mean_sim"},
        {"views": "both", "reduce": "hardest", "layers": [-1, -3], "pooling": "answer"},
        {"symmetric": True, "temperature": 0.9, "views": "both", "layers": 2},
        {"loss": "infonce", "reduce": "hardest", "pooling": "last"},
        {"views": "never_seen", "pooling": "answer"},
        {"views": "never_seen", "loss": "infonce", "layers": 2, "symmetric": True},
    ],
    "quantile": [
        {"delta": 0.2, "refresh": 6},
        {"level": "row"},
        {"within": "type", "delta": 3.0},
        {"within": "outside"},
    ],
    "anchor": [{"sides": ["retain"], "layers": "last"}, {"sides": ["never_seen", "general"], "layers": [1, 3]}],
    "latent_match": [
        {"parts": ["mean"], "layers": "last"},
        {"parts": ["covariance"], "refresh": 3},
        {"parts": ["energy"], "layers": [1]},
    ],
    "deepcut": [
        {"form": "full", "outside": False},
        {"views": 1, "classes": "prefixed", "temperature": 0.5, "layer": 2},
        {"form": "full", "views": 1, "anchors": "all", "contrast": "both"},
        {"anchors": "pooled", "contrast": "drawn"},
        {"anchors": "pooled", "views": 1, "form": "full", "outside": False},
    ],
    "relabel": [{"to": "random"}, {"to": "random", "labels": "all"}, {"labels": "all"}],
    "bad_teacher": [{"spread": 0.5}, {"spread": 0.0}],
    "rol": [{"normalise": "layers_rank", "k": 2}, {"normalise": "cosine", "layers": "v_proj$"}, {"layers": "[qv]_"}],
}
#: Adapted layers of the made-up step: rows of the output and rank.
LAYERS = {"blocks.0.q_proj": (6, 3), "blocks.0.v_proj": (5, 3), "blocks.1.v_proj": (5, 2)}
#: Classes that were named for each label, beside all others.
NAMED = 5
CASES = [(name, options) for name in FACTORIES for options in [{}, *MORE_OPTIONS.get(name, [])]]


def identity(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def terms_of(name: str, options: dict[str, Any]) -> tuple[Term, ...]:
    made = FACTORIES[name](**options)
    return made if isinstance(made, tuple) else (made,)


def parametrize_terms(*reading: str, rows: bool = False) -> pytest.MarkDecorator:
    """All terms in all their variants, or those that read one of the products named, or have values of rows."""
    found = [
        pytest.param(name, options, term, id=f"{identity((name, options))}:{term.name}")
        for name, options in CASES
        for term in terms_of(name, options)
        if not reading or any(p.what in reading for p in term.needs())
        if not rows or term.per != "step"
    ]
    return pytest.mark.parametrize(("name", "options", "term"), found)


every_term = parametrize_terms()
every_term_of_rows = parametrize_terms(rows=True)
every_factory = pytest.mark.parametrize("name", FACTORIES)


@dataclass(frozen=True)
class World:
    """Sizes of a made-up step, and tensors for whatever product is asked of it."""

    rows: int = 4
    length: int = 7
    width: int = 6
    vocabulary: int = 11
    dtype: torch.dtype = torch.float64
    scale: float = 1.0

    def label_mask(self) -> Tensor:
        """Answers of 2, 3, 4, ... tokens at the end of each row."""
        where = torch.zeros(self.rows, self.length, dtype=torch.bool)
        for row in range(self.rows):
            where[row, self.length - 2 - row % 4 :] = True
        return where

    def make(self, p: Product) -> Any:
        """A tensor for ``p``, or one for each adapted layer; the same each time."""
        if p.detail == AMONG:
            return self.make(replace(p, detail=None))
        generator = torch.Generator().manual_seed(zlib.crc32(repr(p).encode()))
        where = self.label_mask()
        n = int(where.sum())

        def real(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype) * self.scale

        made = {
            "token_logp": lambda: -real(n).abs(),
            "seq_logp": lambda: -real(self.rows).abs() * 5,
            "logits": lambda: real(n, self.vocabulary) * 3,
            "named_logp": lambda: (real(n, NAMED + 1) * 3).log_softmax(-1),
            "label_count": lambda: where.sum(1).to(self.dtype),
            "token_rows": lambda: where.nonzero()[:, 0],
            "row_numbers": lambda: where.nonzero()[:, 0] * 31 + 5,
            "token_index": lambda: torch.cat([torch.arange(int(c)) for c in where.sum(1)]),
            "labels": lambda: torch.randint(self.vocabulary, (n,), generator=generator),
            "at_labels": lambda: real(n, self.width),
            "hidden": lambda: real(self.rows, self.length, self.width),
            "pooled": lambda: real(self.rows, self.width),
            "mask": lambda: where,
            "lora": lambda: {name: real(*shape) for name, shape in LAYERS.items()},
            "constant": lambda: self.constant(p, real),
        }
        return made[p.what]()

    def constant(self, p: Product, real: Any) -> Any:
        """A direction, an orthonormal basis of each adapted layer, or the contrast class of each label."""
        name, _, size = str(p.detail).partition("/")
        if name == "class_map":
            ids = torch.arange(self.vocabulary)
            return ids if size == "prefixed" else torch.where(ids < 6, ids // 2, ids - 3)
        if name == "seed":
            return torch.tensor(11)
        if name == "never_saw":  # row numbers go up to 98, places to 4
            label = torch.arange(500) % NAMED
            logp = real(500, NAMED + 1).log_softmax(-1)
            return {"logp": logp, "label": label, "starts": torch.arange(99).flip(0) * 5}
        if name == "population":
            return self.population(real, states="/states/" in size)
        if name != "retain_basis":
            return torch.nn.functional.normalize(real(self.width).abs(), dim=0)
        drawn = {layer: real(rows, min(int(size), rows - 1)) for layer, (rows, _) in LAYERS.items()}
        return {layer: torch.linalg.qr(matrix.double()).Q.to(self.dtype) for layer, matrix in drawn.items()}

    def population(self, real: Any, *, states: bool) -> dict[str, Tensor]:
        """What never-seen rows are like together: ascending likelihoods, or whitened states."""
        if not states:
            own = torch.tensor([0, 3, 4, 5, 7, 0, 1, 2, 3])
            return {"tokens": -real(9).abs().sort(descending=True).values, "labels": own, "rows": real(5).sort().values}
        whitened = {"whitening": real(self.width, 4), "spread": real(4).abs(), "scatter": real(1).abs()[0]}
        return {"mean": real(self.width), "rows": real(5, 4), **whitened}

    def inputs(self, term: Term) -> dict[str, Any]:
        """Tensors for the parameters of ``term.fn``."""
        return {
            name: tuple(self.make(p) for p in value) if isinstance(value, tuple) else self.make(value)
            for name, value in term.inputs.items()
        }


def pairs(term: Term, given: dict[str, Any]) -> list[tuple[str, Product, Tensor]]:
    """Parameter, product and tensor, tuples unrolled."""
    out = []
    for name, value in term.inputs.items():
        products = value if isinstance(value, tuple) else (value,)
        tensors = given[name] if isinstance(value, tuple) else (given[name],)
        for p, t in zip(products, tensors, strict=True):
            out += [(name, p, inner) for inner in (t.values() if isinstance(t, dict) else [t])]
    return out


def mapped(term: Term, given: dict[str, Any], change: Any) -> dict[str, Any]:
    """The inputs with ``change(parameter, product, tensor)`` in place of each tensor."""

    def each(name: str, p: Product, t: Any) -> Any:
        return (
            {layer: change(name, p, inner) for layer, inner in t.items()} if isinstance(t, dict) else change(name, p, t)
        )

    out: dict[str, Any] = {}
    for name, value in term.inputs.items():
        if isinstance(value, tuple):
            out[name] = tuple(each(name, p, t) for p, t in zip(value, given[name], strict=True))
        else:
            out[name] = each(name, value, given[name])
    return out


@every_term
def test_parameters_are_the_wiring(name: str, options: dict, term: Term) -> None:
    free = {
        key
        for key, parameter in inspect.signature(term.fn).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    assert free <= set(term.inputs) <= set(inspect.signature(term.fn).parameters)
    assert term.gathered <= set(term.inputs)
    assert term.over in {base_side(p.side) for p in term.needs()}
    assert (term.per == "step") is (term.over is None)
    if term.gathered:
        assert term.batch_coupled


@every_term
def test_one_finite_value_each_and_inputs_left_alone(name: str, options: dict, term: Term) -> None:
    world = World()
    given = world.inputs(term)
    before = mapped(term, given, lambda _n, _p, t: t.clone())
    values = term.fn(**given)
    count = world.rows if term.per == "row" else int(world.label_mask().sum())
    assert values.shape == (() if term.per == "step" else (count,))
    assert torch.isfinite(values).all()
    for (_, _, old), (_, _, new) in zip(pairs(term, before), pairs(term, given), strict=True):
        assert torch.equal(old, new)


@every_term
def test_agrees_with_the_loops(name: str, options: dict, term: Term) -> None:
    given = World().inputs(term)
    defaults = {k: v.default for k, v in inspect.signature(FACTORIES[name]).parameters.items()}
    expected = torch.tensor(ORACLES[name](given, {**defaults, **options}), dtype=torch.float64)
    torch.testing.assert_close(term.fn(**given), expected, rtol=1e-10, atol=1e-12)


@every_term
def test_gradient_reaches_the_policy_and_never_the_reference(name: str, options: dict, term: Term) -> None:
    def track(_name: str, p: Product, t: Tensor) -> Tensor:
        return t.requires_grad_() if t.is_floating_point() and p.what != "label_count" else t

    given = mapped(term, World().inputs(term), track)
    term.fn(**given).sum().backward()
    for parameter, p, tensor in pairs(term, given):
        if not tensor.requires_grad or p.what == "constant" or p.detail == AMONG:
            continue
        if p.what == "lora" and tensor.grad is None:  # a layer that the options leave out
            assert options.get("layers", "all") != "all"
            continue
        if p.model == POLICY:
            assert tensor.grad is not None, parameter
            assert torch.isfinite(tensor.grad).all()
            assert tensor.grad.abs().sum() > 0, parameter
        elif p.what in ("logits", "hidden", "at_labels"):  # to be imitated; scalars come without a graph
            assert tensor.grad is None, parameter


@every_term_of_rows
def test_order_of_rows_does_not_matter(name: str, options: dict, term: Term) -> None:
    given = World().inputs(term)
    values = term.fn(**given)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(3))

    def permute(parameter: str, p: Product, t: Tensor) -> Tensor:
        if p.what == "constant":
            return t
        if parameter in term.gathered:
            return t[torch.randperm(len(t), generator=torch.Generator().manual_seed(4))]
        return t[order]

    torch.testing.assert_close(term.fn(**mapped(term, given, permute)), values[order], rtol=1e-12, atol=1e-12)


@every_term_of_rows
def test_a_row_does_not_read_its_neighbours_unless_it_says_so(name: str, options: dict, term: Term) -> None:
    if term.batch_coupled and not term.gathered:  # a statistic of the whole batch
        return
    given = World().inputs(term)
    values = term.fn(**given)
    half = len(values) // 2 if term.per == "row" else int(World().label_mask()[:2].sum())  # where a row ends

    def cut(part: slice) -> Any:
        def take(parameter: str, p: Product, t: Tensor) -> Tensor:
            return t if p.what == "constant" or parameter in term.gathered else t[part]

        return take

    # An anchor of a coupled term reads the whole other side, which is left whole here; never the other anchors.
    parts = [term.fn(**mapped(term, given, cut(part))) for part in (slice(0, half), slice(half, None))]
    torch.testing.assert_close(torch.cat(parts), values, rtol=1e-12, atol=1e-12)
    if term.batch_coupled:
        fewer = mapped(term, given, lambda n, _p, t: t[:half] if n in term.gathered else t)
        assert not torch.allclose(term.fn(**fewer), values)


@every_term
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_half_precision_is_computed_in_single(name: str, options: dict, term: Term, scale: float) -> None:
    half = World(dtype=torch.bfloat16, scale=scale).inputs(term)

    def widen(_name: str, _product: Product, t: Tensor) -> Tensor:
        return t.float() if t.is_floating_point() else t

    values = term.fn(**half)
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    assert torch.equal(values, term.fn(**mapped(term, half, widen)))
    exact = term.fn(**mapped(term, half, lambda _n, _p, t: t.double() if t.is_floating_point() else t))
    torch.testing.assert_close(values.double(), exact, rtol=2e-4, atol=2e-4)


@every_term
def test_gradients_stay_finite_at_extreme_inputs(name: str, options: dict, term: Term) -> None:
    given = World(dtype=torch.float32, scale=1e4).inputs(term)
    given = mapped(term, given, lambda _n, _p, t: t.requires_grad_() if t.is_floating_point() else t)
    term.fn(**given).sum().backward()
    for parameter, _, tensor in pairs(term, given):
        if tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all(), parameter


@every_term_of_rows
def test_what_counts_is_known_before_the_pass(name: str, options: dict, term: Term) -> None:
    """From labels alone, and what does not count has no value."""
    if term.counts is None:
        return
    given = World().inputs(term)
    free = [k for k, v in term.inputs.items() if not passes(v if isinstance(v, tuple) else (v,))]
    counts = term.counts(**{k: given[k] for k in free})
    values = term.fn(**given)
    assert counts.shape == values.shape
    assert (counts >= 0).all()
    assert int((counts > 0).sum()) > 0
    assert torch.equal(values[counts == 0], torch.zeros(int((counts == 0).sum()), dtype=values.dtype))


@parametrize_terms("logits")
def test_a_shift_of_all_logits_changes_nothing(name: str, options: dict, term: Term) -> None:
    given = World().inputs(term)
    shifted = mapped(term, given, lambda _n, p, t: t + 50.0 if p.what == "logits" else t)
    torch.testing.assert_close(term.fn(**shifted), term.fn(**given), rtol=1e-9, atol=1e-9)


@parametrize_terms("hidden")
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_never_read(name: str, options: dict, term: Term, left: bool) -> None:
    given = World().inputs(term)

    def pad(_name: str, p: Product, t: Tensor) -> Tensor:
        if p.what not in ("hidden", "mask"):
            return t
        filler = t.new_full((t.shape[0], 3, *t.shape[2:]), False if p.what == "mask" else float("nan"))
        return torch.cat([filler, t] if left else [t, filler], dim=1)

    torch.testing.assert_close(term.fn(**mapped(term, given, pad)), term.fn(**given))


@parametrize_terms("logits")
def test_a_term_on_logits_can_be_cut_into_chunks(name: str, options: dict, term: Term) -> None:
    assert term.per == "token"
    # One entry per label token, which is cut with the logits, or a constant, which is not.
    assert {p.what for p in term.needs()} <= {*PER_TOKEN, "constant"}


@every_factory
def test_weight_is_taken(name: str) -> None:
    (term, *_) = terms_of(name, {"weight": 0.25})
    assert (term.weight.start if isinstance(term.weight, Dual) else term.weight) == 0.25
    if name != "primal_dual":
        ramp = Ramp(0.0, 1.0, until=0.5)
        assert terms_of(name, {"weight": ramp})[0].weight == ramp


@every_factory
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        FACTORIES[name](no_such_option=1)


@every_factory
def test_says_where_it_comes_from_and_shows_an_example(name: str) -> None:
    source = source_of(FACTORIES[name])
    assert "arXiv" in source
    assert "Example:" in (inspect.getdoc(FACTORIES[name]) or "")
    fn = terms_of(name, {})[0].fn
    fn = getattr(fn, "func", fn)
    assert "Source:" in (inspect.getdoc(fn) or "")


@every_factory
def test_has_an_oracle_and_a_name_of_its_own(name: str) -> None:
    assert name in ORACLES
    assert terms_of(name, {})[0].name == name
    assert sum(name in table for table in TABLES.values()) == 1


@every_factory
def test_is_in_the_catalogue(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    sections = {part.split("`")[1]: part for part in page.split("\n### ") if part.startswith("`")}
    for heading in ("Inputs", "Relations", "Recommendations", "Citation"):
        assert f"* **{heading}** " in sections[name], heading
    options = set(inspect.signature(FACTORIES[name]).parameters) - {"weight", "side"}
    assert {option for option in options if f"`{option}`" not in sections[name]} == set()
