"""What the objectives' sources say of them: limits, bounds, identities between losses, and CLReg's wiring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from excise.errors import UsageError
from excise.forward import REFERENCE, View, hidden, passes, pooled, seq_logp
from excise.objectives import FORGET, RETAIN, Dual, Ramp, Term, rmu_direction, source_of
from excise.objectives.forget import (
    altpo,
    dpo,
    dpo_rows,
    ga_tokens,
    npo,
    npo_rows,
    satimp_tokens,
    simnpo_rows,
    wga_tokens,
)
from excise.objectives.forget_wide import ceu_tokens, ihl_tokens, pdu_tokens, undial_tokens
from excise.objectives.regularise import clreg, clreg_monitor, clreg_rows, contrast_rows
from excise.objectives.retain import kl_tokens, primal_dual
from oracles import cosine, log_sigmoid

TAUS = [0.1, 0.3, 0.5, 0.9, 5.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contrast(s_pos: Tensor, s_neg: Tensor, tau: float, *, loss: str = "dpo", reduce: str = "all") -> Tensor:
    return contrast_rows(s_pos, s_neg, loss=loss, temperature=tau, reduce=reduce, scale_infonce=True)


def one(term: Term | tuple[Term, ...]) -> Term:
    assert isinstance(term, Term)
    return term


# --- preference and ascent ----------------------------------------------------------------------------------------


def test_npo_starts_at_two_log_two_over_beta() -> None:
    logp = -normal(5).abs() * 30
    torch.testing.assert_close(npo_rows(logp, logp, beta=0.1), torch.full((5,), 20 * math.log(2), dtype=torch.float64))


def test_npo_has_the_gradient_of_ascent_as_beta_vanishes() -> None:
    ref = -normal(6).abs() * 10
    gaps = []
    for beta in (1e-1, 1e-3, 1e-5):
        logp = (ref + normal(6, seed=1)).requires_grad_()
        (slope,) = grad(npo_rows(logp, ref, beta=beta).sum(), logp)
        gaps.append(float((slope - 1).abs().max()))  # ascent on the summed log-probability has the slope 1
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_npo_slope_is_the_published_weight() -> None:
    ref, logp, beta = -normal(6).abs() * 10, (-normal(6, seed=2).abs() * 10).requires_grad_(), 0.3
    (slope,) = grad(npo_rows(logp, ref, beta=beta).sum(), logp)
    own, old = (beta * logp).exp(), (beta * ref).exp()
    torch.testing.assert_close(slope, (2 * own / (own + old)).detach())


def test_npo_lets_go_of_what_is_forgotten_and_ascent_does_not() -> None:
    logp = torch.tensor([-500.0], requires_grad=True)
    (gentle,) = grad(npo_rows(logp, torch.zeros(1), beta=0.1).sum(), logp)
    (blind,) = grad(ga_tokens(logp).sum(), logp)
    assert float(gentle) < 1e-20
    assert float(blind) == 1.0


def test_simnpo_is_npo_with_a_uniform_reference_and_length_normalisation() -> None:
    count, vocabulary, beta = torch.tensor([3.0, 5.0, 9.0], dtype=torch.float64), 50, 2.5
    logp = -normal(3).abs() * 20
    per_token = logp / count
    uniform = torch.full_like(per_token, -math.log(vocabulary))
    expected = npo_rows(per_token, uniform, beta=beta)
    torch.testing.assert_close(simnpo_rows(logp, count, beta=beta, delta=math.log(vocabulary)), expected)


def test_simnpo_treats_answers_of_any_length_alike() -> None:
    short = simnpo_rows(torch.tensor([-2.0]), torch.tensor([2.0]), beta=4.5, delta=0.0)
    long = simnpo_rows(torch.tensor([-40.0]), torch.tensor([40.0]), beta=4.5, delta=0.0)
    torch.testing.assert_close(short, long)


def test_dpo_with_an_indifferent_winner_is_npo() -> None:
    logp, ref, same = -normal(4).abs() * 9, -normal(4, seed=1).abs() * 9, -normal(4, seed=2).abs()
    torch.testing.assert_close(dpo_rows(same, same, logp, ref, beta=0.1), npo_rows(logp, ref, beta=0.1))


def test_dpo_raises_the_winner_and_lowers_the_loser() -> None:
    winner, loser = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    up, down = grad(dpo_rows(winner, torch.zeros(1), loser, torch.zeros(1), beta=0.1).sum(), (winner, loser))
    assert float(up) == -float(down) < 0


def test_altpo_is_dpo_with_other_data_and_its_own_name_and_default() -> None:
    plain, other = one(dpo(beta=0.2)), one(altpo(beta=0.2))
    assert (plain.inputs, plain.over) == (other.inputs, other.over)
    given = {name: -normal(3, seed=i).abs() for i, name in enumerate(plain.inputs)}
    assert torch.equal(plain.fn(**given), other.fn(**given))
    assert altpo().name == "altpo"
    assert not torch.equal(altpo().fn(**given), dpo().fn(**given))


@pytest.mark.parametrize(
    "weighted", [lambda x: wga_tokens(x, beta=0.0), lambda x: satimp_tokens(x, beta1=0.0, beta2=0.0)]
)
def test_weighted_ascent_without_weights_is_ascent(weighted) -> None:
    logp = (-normal(9).abs()).requires_grad_()
    torch.testing.assert_close(weighted(logp), ga_tokens(logp))
    torch.testing.assert_close(grad(weighted(logp).sum(), logp), grad(ga_tokens(logp).sum(), logp))


def test_weights_of_ascent_carry_no_gradient() -> None:
    logp = (-normal(9).abs()).requires_grad_()
    p = logp.detach().exp()
    torch.testing.assert_close(grad(wga_tokens(logp, beta=2.0).sum(), logp)[0], p**2)
    torch.testing.assert_close(grad(satimp_tokens(logp, beta1=5.0, beta2=1.0).sum(), logp)[0], p**5 * (1 - p))


def test_a_log_probability_a_hair_above_zero_is_no_nan() -> None:
    assert torch.isfinite(satimp_tokens(torch.tensor([1e-7]), beta1=5.0, beta2=0.5)).all()


# --- whole logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_inverted_hinge_lies_between_zero_and_two(scale: float) -> None:
    z = (normal(200, 13) * scale).float()
    values = ihl_tokens(z, torch.arange(200) % 13)
    assert float(values.min()) >= 0.0
    assert float(values.max()) <= 2.0


def test_inverted_hinge_ends() -> None:
    z = torch.zeros(2, 5)
    z[:, 1] = 60.0
    assert ihl_tokens(z, torch.tensor([1, 3])).tolist() == [2.0, 0.0]
    assert float(ihl_tokens(torch.zeros(1, 5), torch.tensor([2]))) == pytest.approx(1.0)  # a tie, label included


def test_inverted_hinge_moves_probability_to_the_runner_up() -> None:
    z = torch.tensor([[3.0, 2.0, 0.0, -1.0]], requires_grad=True)
    (slope,) = grad(ihl_tokens(z, torch.tensor([0])).sum(), z)
    step = ((z - 0.1 * slope).softmax(-1) - z.softmax(-1)).detach()
    assert float(step[0, 0]) < 0 < float(step[0, 1])
    assert float(step[0, 1]) > float(step[0, 2:].abs().max())


def test_ceu_target_gives_the_label_nothing() -> None:
    # The slope of a cross-entropy in the logits is p - target, which lays the target open.
    z, y = normal(6, 8).requires_grad_(), torch.arange(6) % 8
    (slope,) = grad(ceu_tokens(z, y, torch.ones(6, dtype=torch.long), skip=1).sum(), z)
    target = z.detach().softmax(-1) - slope
    own = target.gather(1, y[:, None])
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-12)
    torch.testing.assert_close(target.sum(1), torch.ones(6, dtype=torch.float64))
    others = z.detach().softmax(-1).scatter(1, y[:, None], 0.0)
    torch.testing.assert_close(target, others / others.sum(1, keepdim=True))


def test_ceu_leaves_the_first_answer_token_alone() -> None:
    z = normal(4, 8).requires_grad_()
    place = torch.tensor([0, 1, 0, 1])
    (slope,) = grad(ceu_tokens(z, torch.zeros(4, dtype=torch.long), place, skip=1).sum(), z)
    assert (slope.abs().sum(1) > 0).tolist() == [False, True, False, True]


def test_undial_without_subtraction_stands_still_at_the_teacher() -> None:
    teacher = normal(5, 9)
    z = teacher.clone().requires_grad_()
    values = undial_tokens(z, teacher, torch.arange(5), beta=0.0)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(values.detach(), entropy)
    assert float(grad(values.sum(), z)[0].abs().max()) < 1e-12


def test_undial_lowers_the_label_only() -> None:
    teacher, y = normal(5, 9), torch.arange(5)
    z = teacher.clone().requires_grad_()
    (slope,) = grad(undial_tokens(z, teacher, y, beta=10.0).sum(), z)
    label = torch.zeros(5, 9, dtype=torch.bool).scatter(1, y[:, None], True)
    assert (slope[label] > 0).all()
    assert (slope[~label] < 0).all()


def test_flattening_is_zero_for_a_uniform_prediction_only() -> None:
    assert float(pdu_tokens(torch.full((1, 7), 3.0))) == 0.0
    assert float(pdu_tokens(torch.eye(7)).min()) > 0.0


def test_divergence_is_zero_at_the_reference_and_points_the_stated_way() -> None:
    a, b = normal(6, 9), normal(6, 9, seed=1)
    assert float(kl_tokens(a, a).abs().max()) < 1e-12
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=b), torch.distributions.Categorical(logits=a)
    )
    torch.testing.assert_close(kl_tokens(a, b), expected)
    assert not torch.allclose(kl_tokens(a, b), kl_tokens(b, a))


# --- states -------------------------------------------------------------------------------------------------------


def test_rmu_direction_is_a_seeded_unit_vector_with_positive_entries() -> None:
    u = rmu_direction(512, seed=3)
    assert float(u.norm()) == pytest.approx(1.0)
    assert bool((u >= 0).all())
    assert torch.equal(u, rmu_direction(512, seed=3))
    assert float(u @ rmu_direction(512, seed=4)) == pytest.approx(0.75, abs=0.05)  # all-positive draws lie close
    assert abs(float(rmu_direction(512, seed=3, signed=True) @ rmu_direction(512, seed=4, signed=True))) < 0.15


def test_rmu_and_its_retain_term_read_one_layer_and_no_head() -> None:
    needs = FORGET["rmu"](layer=2).needs() + RETAIN["rmu_retain"](layer=2).needs()
    plan = passes(needs)
    assert hidden("retain", 2, REFERENCE) in needs
    assert all(not wanted.head and wanted.layers == {2} for wanted in plan.values())


# --- weights with state -------------------------------------------------------------------------------------------


def test_primal_dual_is_cross_entropy_under_a_multiplier() -> None:
    term = one(primal_dual(epsilon=0.4, eta=1.0, warmup=0.3, weight=50.0))
    assert term.weight == Dual(start=50.0, epsilon=0.4, eta=1.0, warmup=0.3)
    assert one(primal_dual(weight=Dual(1.0, 0.2, 3.0))).weight == Dual(1.0, 0.2, 3.0)
    with pytest.raises(UsageError, match="primal_dual"):
        primal_dual(weight=Ramp(0.0, 1.0))  # type: ignore[arg-type]


# --- CLReg: the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
def test_clreg_value_slope_and_range(tau: float) -> None:
    gap = torch.linspace(-2, 2, 81, dtype=torch.float64, requires_grad=True)
    values = contrast(gap[:, None], torch.zeros(81, 1, dtype=torch.float64), tau)
    (slope,) = grad(values.sum(), gap)
    assert (values > 0).all()
    torch.testing.assert_close(slope, -2 * torch.sigmoid(-gap / tau).detach())
    assert float(slope[40]) == pytest.approx(-1.0)  # at equal cosines, whatever tau
    assert float(values[40].detach()) == pytest.approx(2 * tau * math.log(2))
    low, high = -2 * tau * log_sigmoid(2 / tau), -2 * tau * log_sigmoid(-2 / tau)
    assert float(values.min()) >= low - 1e-12
    assert float(values.max()) <= high + 1e-12


def test_clreg_limits_in_temperature() -> None:
    gap = torch.linspace(-2, 2, 41, dtype=torch.float64)
    zero = torch.zeros(41, 1, dtype=torch.float64)
    torch.testing.assert_close(contrast(gap[:, None], zero, 1e-4), 2 * (-gap).clamp_min(0), rtol=0, atol=2e-4)
    tau = 1e4
    linear = -gap + 2 * tau * math.log(2)
    torch.testing.assert_close(contrast(gap[:, None], zero, tau), linear, rtol=0, atol=1e-3)


def test_clreg_at_the_papers_temperature_never_saturates() -> None:
    gap = torch.tensor([-2.0, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = grad(contrast(gap[:, None], torch.zeros(2, 1, dtype=torch.float64), 0.9).sum(), gap)
    assert slope.tolist() == pytest.approx([-1.81, -0.19], abs=0.01)


def test_clreg_is_npo_on_the_gap_of_cosines() -> None:
    s_pos, s_neg, tau = normal(8, 1).tanh(), normal(8, 1, seed=1).tanh(), 0.4
    expected = npo_rows((s_neg - s_pos).squeeze(1), torch.zeros(8, dtype=torch.float64), beta=1 / tau)
    torch.testing.assert_close(contrast(s_pos, s_neg, tau), expected)


@pytest.mark.parametrize("tau", TAUS)
def test_infonce_times_two_tau_is_clreg_for_one_negative(tau: float) -> None:
    s_pos, s_neg = normal(20, 2).tanh(), normal(20, 1, seed=1).tanh()
    torch.testing.assert_close(contrast(s_pos, s_neg, tau, loss="infonce"), contrast(s_pos, s_neg, tau))


@pytest.mark.parametrize("tau", TAUS)
def test_mean_similarity_is_a_lower_bound_and_the_hardest_an_upper(tau: float) -> None:
    s_pos, s_neg = normal(50, 2).tanh(), normal(50, 7, seed=1).tanh()
    middle = contrast(s_pos, s_neg, tau)
    assert (contrast(s_pos, s_neg, tau, reduce="mean_sim") <= middle + 1e-12).all()
    assert (contrast(s_pos, s_neg, tau, reduce="hardest") >= middle - 1e-12).all()


def test_a_step_on_clreg_moves_the_anchor_away_from_the_negative() -> None:
    """Proposition 3.2, in its embedding form: it holds where the positive is closer than the negative."""
    generator, tried = torch.Generator().manual_seed(0), 0
    while tried < 300:
        h, pos, neg = torch.randn(3, 5, generator=generator, dtype=torch.float64).unbind()
        s_pos, s_neg = cosine(h.tolist(), pos.tolist()), cosine(h.tolist(), neg.tolist())
        if abs(s_pos) <= abs(s_neg) + 1e-3:
            continue
        tried += 1
        h = h.requires_grad_()
        loss = clreg_rows(
            (h[None],), (pos[None],), (neg[None],), loss="dpo", temperature=0.5, reduce="all",
            scale_infonce=True, detach_positive=False, detach_negative=False,
        )  # fmt: skip
        (slope,) = grad(loss.sum(), h)
        after = cosine((h - 1e-5 * slope).tolist(), neg.tolist())
        assert after < s_neg
        assert abs(float(slope @ h)) < 1e-12  # the cosine has no gradient along the anchor itself


def test_clreg_gradient_falls_with_the_length_of_the_state() -> None:
    def slope(length: float) -> float:
        h = (normal(1, 6) * length).requires_grad_()
        loss = one(clreg()).fn((h,), (normal(1, 6, seed=1),), (normal(3, 6, seed=2),))
        return float(grad(loss.sum(), h)[0].norm())

    assert slope(10.0) == pytest.approx(slope(1.0) / 10)


def test_clreg_detached_parts_receive_nothing() -> None:
    for option, position in (("detach_positive", 1), ("detach_negative", 2)):
        parts = [normal(3, 6, seed=i).requires_grad_() for i in range(3)]
        term = one(clreg(**{option: True}))
        term.fn(*((part,) for part in parts)).sum().backward()
        assert [part.grad is None for part in parts] == [i == position for i in range(3)]


def test_clreg_of_several_layers_is_the_mean_of_single_layers() -> None:
    term, single = one(clreg(layers=3, views="both")), one(clreg(views="both"))
    anchor = tuple(normal(4, 6, seed=i) for i in range(3))
    negative = tuple(normal(5, 6, seed=10 + i) for i in range(3))
    positive = tuple(normal(4, 6, seed=20 + i) for i in range(6))  # three layers of one view, then of the other
    parts = [single.fn((anchor[i],), (positive[i], positive[3 + i]), (negative[i],)) for i in range(3)]
    torch.testing.assert_close(term.fn(anchor, positive, negative), torch.stack(parts).mean(0))


# --- CLReg: the wiring --------------------------------------------------------------------------------------------


def test_clreg_reads_one_pass_per_side_and_runs_only_the_last_block_again() -> None:
    term = one(clreg())
    view = View("forget", from_layer=-1, dropout=0.1)
    assert term.inputs["positive"] == (pooled(view, -1),)
    plan = passes([*term.needs(), *npo().needs()])
    assert sorted(plan) == [("forget", "policy"), ("forget", "reference"), ("retain", "policy")]
    assert plan["forget", "policy"].views == {view: {-1}}
    assert term.batch_coupled
    assert term.gathered == {"negative"}


def test_clreg_last_k_shares_one_view_from_the_lowest_block() -> None:
    term = one(clreg(layers=4, views="both", pooling="answer"))
    view = View("forget", from_layer=-4, dropout=0.1)
    numbers = [-1, -2, -3, -4]
    assert term.inputs["anchor"] == tuple(pooled("forget", j, "answer") for j in numbers)
    of_view = tuple(pooled(view, j, "answer") for j in numbers)
    assert term.inputs["positive"] == of_view + tuple(pooled("forget_paraphrase", j, "answer") for j in numbers)
    assert passes(term.needs())["forget", "policy"].views == {view: set(numbers)}


def test_clreg_layer_numbers_and_the_blocks_that_compute_them() -> None:
    def block(**options) -> int:
        (first, *_) = one(clreg(**options)).inputs["positive"]
        assert isinstance(first.side, View)
        return first.side.from_layer

    assert block(layers=[5]) == 4
    assert block(layers=[3, 5]) == 2
    assert block(layers=[-2]) == -2
    assert block(from_layer=0) == 0
    assert block(layers=[2, -1], from_layer=1) == 1


def test_clreg_symmetric_swaps_roles_at_half_the_weight() -> None:
    forth, back = clreg(symmetric=True, weight=3.0, views="paraphrase")
    assert (forth.over, back.over, forth.weight, back.weight) == ("forget", "retain", 1.5, 1.5)
    assert forth.inputs["anchor"] == back.inputs["negative"]
    assert forth.inputs["negative"] == back.inputs["anchor"]
    assert back.inputs["positive"] == (pooled(View("retain", -1, 0.1), -1),)  # retain rows have no paraphrases
    (ramped, _) = clreg(symmetric=True, weight=Ramp(0.0, 2.0, 0.5))
    assert ramped.weight == Ramp(0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "triplet"},
        {"views": "none"},
        {"pooling": "max"},
        {"reduce": "sum"},
        {"temperature": 0.0},
        {"temperature": "0.5"},
        {"temperature": math.nan},
        {"dropout": 1.0},
        {"layers": "first"},
        {"layers": 0},
        {"layers": []},
        {"layers": [0]},
        {"layers": [-1, -1]},
        {"layers": [2, -1]},
        {"symmetric": True, "weight": Dual(1.0, 0.1, 1.0)},
    ],
    ids=str,
)
def test_clreg_refuses_in_one_line(options: dict) -> None:
    with pytest.raises(UsageError, match=r"\Aclreg: [^\n]+\Z"):
        clreg(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("npo", {"beta": 0.0}),
        ("npo", {"beta": "5e-5"}),
        ("simnpo", {"beta": -1.0}),
        ("dpo", {"beta": math.inf}),
        ("altpo", {"beta": 0}),
        ("wga", {"beta": -0.1}),
        ("satimp", {"beta2": -1.0}),
        ("undial", {"beta": -1.0}),
        ("ceu", {"skip": -1}),
        ("rmu", {"steering": -1.0}),
        ("primal_dual", {"epsilon": -0.1}),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(name: str, options: dict) -> None:
    factory = {**FORGET, **RETAIN}[name]
    with pytest.raises(UsageError, match=rf"\A{name}: option '{next(iter(options))}' [^\n]+\Z"):
        factory(**options)


# --- CLReg: what is watched ---------------------------------------------------------------------------------------


def test_clreg_monitor_agrees_with_loops() -> None:
    a, p, n, tau = normal(4, 6), normal(4, 6, seed=1), normal(3, 6, seed=2), 0.15
    found = clreg_monitor((a,), (p,), (n,), temperature=tau)
    pos = [cosine(x, y) for x, y in zip(a.tolist(), p.tolist(), strict=True)]
    neg = [[cosine(x, y) for y in n.tolist()] for x in a.tolist()]
    shares = [1 / (1 + math.exp((s - t) / tau)) < 0.01 for s, row in zip(pos, neg, strict=True) for t in row]
    own = [cosine(x, y) for i, x in enumerate(a.tolist()) for j, y in enumerate(a.tolist()) if i != j]
    other = [cosine(x, y) for i, x in enumerate(n.tolist()) for j, y in enumerate(n.tolist()) if i != j]
    assert 0 < sum(shares) < len(shares)
    expected = {
        "positive_cosine": sum(pos) / 4,
        "negative_cosine": sum(map(sum, neg)) / 12,
        "saturated_share": sum(shares) / 12,
        "anchor_collapse": sum(own) / 12,
        "negative_collapse": sum(other) / 6,
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


def test_clreg_monitor_sees_saturation_and_collapse() -> None:
    """At a low temperature separated sides give no gradient: the published weight then has no effect at all."""
    a = torch.eye(4)[:1].repeat(3, 1)
    n = torch.eye(4)[1:]
    found = clreg_monitor((a,), (a,), (n,), temperature=0.1)
    assert float(found["saturated_share"]) == 1.0
    assert float(found["anchor_collapse"]) == pytest.approx(1.0)
    assert float(found["negative_collapse"]) == pytest.approx(0.0)
    assert float(clreg_monitor((a,), (a,), (n,), temperature=0.9)["saturated_share"]) == 0.0


@pytest.mark.parametrize(("share", "saturated"), [(0.0099, 1.0), (0.0101, 0.0)])
def test_clreg_pairs_saturate_below_one_percent_of_the_largest_slope(share: float, saturated: float) -> None:
    tau = 0.3
    gap = tau * math.log(1 / share - 1)  # where sigmoid(-gap / tau) is the share
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    negative = torch.tensor([[1 - gap, math.sqrt(1 - (1 - gap) ** 2)]], dtype=torch.float64)
    found = clreg_monitor((anchor,), (anchor,), (negative,), temperature=tau)
    assert float(found["saturated_share"]) == saturated


def test_clreg_monitor_leaves_out_what_one_row_cannot_show() -> None:
    found = clreg_monitor((normal(1, 6),), (normal(1, 6),), (normal(2, 6),), temperature=0.5)
    assert "anchor_collapse" not in found
    assert "negative_collapse" in found
    term = one(clreg())
    assert term.monitor is not None
    assert term.monitor(**{name: (normal(2, 6),) for name in term.inputs}).keys() > {"positive_cosine"}


# --- the rest -----------------------------------------------------------------------------------------------------


def test_terms_share_their_passes() -> None:
    terms = [one(FORGET[name]()) for name in ("ga", "npo", "ihl", "simnpo")]
    assert sorted(passes([p for term in terms for p in term.needs()])) == [
        ("forget", "policy"),
        ("forget", "reference"),
    ]
    assert seq_logp("forget") in terms[1].needs()


def test_source_of_a_strangers_term_is_empty() -> None:
    assert source_of(lambda: one(npo())) == ""
