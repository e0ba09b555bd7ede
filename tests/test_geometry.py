"""Hidden-state mathematics: against loop-written oracles, closed forms, invariances, and the traps of small samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle_metrics as oracle
from excise import geometry
from excise.metrics import latent


def draw(n: int, d: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(draw(d, d, seed=99)).Q


A, B = draw(7, 3, 1), draw(5, 3, 2, 1.5) * 2


# Pooling


@pytest.mark.parametrize("pooling", ["attended", "answer", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_equal_under_left_and_right_padding(pooling: str, dtype: torch.dtype) -> None:
    lengths, starts, width = [3, 6, 1], [1, 4, 0], 9
    rows = [draw(n, 4, seed=n).to(dtype) for n in lengths]
    found = []
    for left in (False, True):
        states = torch.full((3, width, 4), math.nan, dtype=dtype)  # padding may hold anything
        attended, answer = torch.zeros(3, width, dtype=torch.bool), torch.zeros(3, width, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            begin = width - len(row) if left else 0
            states[i, begin : begin + len(row)] = row
            attended[i, begin : begin + len(row)] = True
            answer[i, begin + start : begin + len(row)] = True
        found.append(geometry.pool(states, attended, answer, pooling))
    expected = {
        "attended": [r.float().mean(0) for r in rows],
        "answer": [r.float()[s:].mean(0) for r, s in zip(rows, starts, strict=True)],
        "last": [r.float()[-1] for r in rows],
    }[pooling]
    for pooled in found:
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, torch.stack(expected))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_pooling_of_an_empty_mask_is_zero_with_finite_gradient() -> None:
    states = draw(2, 3).reshape(1, 2, 3).requires_grad_()
    for pooling in ("attended", "last"):
        pooled = geometry.pool(states, torch.zeros(1, 2, dtype=torch.bool), pooling=pooling)
        assert pooled.abs().sum() == 0
        assert torch.isfinite(torch.autograd.grad(pooled.sum(), states)[0]).all()


def test_unknown_pooling_is_named() -> None:
    with pytest.raises(ValueError, match="'first'"):
        geometry.pool(torch.zeros(1, 1, 1), torch.ones(1, 1), pooling="first")


def test_cosine_is_the_oracle_and_has_a_gradient() -> None:
    a, b = A.clone().requires_grad_(), B
    for i, x in enumerate(A.tolist()):
        for j, y in enumerate(B.tolist()):
            dot = sum(p * q for p, q in zip(x, y, strict=True))
            expected = dot / math.sqrt(oracle.sq(x, [0.0] * 3) * oracle.sq(y, [0.0] * 3))
            assert geometry.cosine(a, b)[i, j].item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(geometry.cosine, (a, b.clone().requires_grad_()))
    assert torch.isfinite(geometry.cosine(torch.zeros(1, 3), B)).all()


# Entanglement


@pytest.mark.parametrize("center", ["class_mean", "pooled"])
def test_entanglement_is_the_oracle(center: str) -> None:
    assert geometry.entanglement(A, B, center=center) == pytest.approx(
        oracle.entanglement(A.tolist(), B.tolist(), center)
    )


def test_entanglement_is_four_times_the_traces_over_the_squared_gap() -> None:
    gap = ((A.mean(0) - B.mean(0)) ** 2).sum()
    traces = A.var(0, correction=0).sum() + B.var(0, correction=0).sum()
    assert geometry.entanglement(A, B) == pytest.approx(float(4 * traces / gap))


@pytest.mark.parametrize("normalize", [False, True])
def test_entanglement_ignores_rotation_and_scale(normalize: bool) -> None:
    value = geometry.entanglement(A, B, normalize=normalize)
    turned = geometry.entanglement(7 * A @ rotation(3), 7 * B @ rotation(3), normalize=normalize)
    assert turned == pytest.approx(value)
    assert geometry.entanglement(B, A, normalize=normalize) == pytest.approx(value)
    if not normalize:
        assert geometry.entanglement(A + 3, B + 3) == pytest.approx(value)


def test_entanglement_of_coinciding_means_is_infinite_and_the_control_is_large() -> None:
    assert geometry.entanglement(A, A) == math.inf
    near, far = draw(60, 8), draw(60, 8, 1, 4.0)
    assert geometry.entanglement_shuffled(near, far) > 20 * geometry.entanglement(near, far)
    assert geometry.entanglement_shuffled(near, far) == geometry.entanglement_shuffled(near, far)


# MMD


@pytest.mark.parametrize("biased", [False, True])
def test_mk_mmd_is_the_oracle(biased: bool) -> None:
    assert geometry.mk_mmd(A, B, biased=biased) == pytest.approx(
        oracle.mk_mmd(A.tolist(), B.tolist(), biased=biased), abs=1e-12
    )


def test_mk_mmd_properties() -> None:
    value = geometry.mk_mmd(A, B)
    assert geometry.mk_mmd(B, A) == pytest.approx(value)
    assert geometry.mk_mmd(5 * A @ rotation(3) + 2, 5 * B @ rotation(3) + 2) == pytest.approx(value)
    assert geometry.mk_mmd(A, A, biased=True) == pytest.approx(0, abs=1e-12)
    assert geometry.mk_mmd(torch.ones(3, 2), torch.ones(4, 2), biased=True) == pytest.approx(0, abs=1e-12)
    null = [geometry.mk_mmd(draw(20, 4, 2 * i), draw(20, 4, 2 * i + 1)) for i in range(100)]
    assert abs(np.mean(null)) < 3 * np.std(null) / 10  # the unbiased form is centred on 0
    assert min(null) < 0


def test_mk_mmd_keeps_small_distances_of_large_states() -> None:
    # The usual expansion |x|^2 - 2xy + |y|^2 in float32 loses them; post-norm states are that large.
    a, b = draw(30, 16), draw(30, 16, 1, 0.5)
    assert geometry.mk_mmd((a + 1e4).float(), (b + 1e4).float()) == pytest.approx(geometry.mk_mmd(a, b), rel=0.02)


def test_mk_mmd_permutation_p() -> None:
    assert geometry.mk_mmd_p(draw(30, 4), draw(30, 4, 1, 1.0), resamples=199) == pytest.approx(1 / 200)
    null = [geometry.mk_mmd_p(draw(15, 3, 2 * i), draw(15, 3, 2 * i + 1), resamples=49) for i in range(60)]
    assert 0.3 < np.mean(null) < 0.7


# Transport


def test_w2_exact_is_the_best_of_all_matchings() -> None:
    a, b = draw(6, 2, 3), draw(6, 2, 4, 1.0)
    assert geometry.w2_exact(a, b) == pytest.approx(oracle.w2_by_trying(a.tolist(), b.tolist()))


def test_transport_of_a_shifted_cloud_is_the_shift() -> None:
    shift = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    assert geometry.w2_exact(A, A + shift) == pytest.approx(5.0)
    assert geometry.w2_gaussian(A, A + shift) == pytest.approx(5.0)
    assert geometry.w2_sliced(A, A + shift, projections=4000) == pytest.approx(5 / math.sqrt(3), rel=0.05)


def test_w2_thinning_is_seeded_and_changes_only_too_large_or_uneven_sets() -> None:
    big, small = draw(40, 2), draw(25, 2, 1)
    assert geometry.w2_exact(big, small, seed=1) == geometry.w2_exact(big, small, seed=1)
    assert geometry.w2_exact(big, small, seed=1) != geometry.w2_exact(big, small, seed=2)
    assert geometry.w2_exact(big, small, limit=10) > 0
    assert geometry.w2_exact(big, big + 1, seed=1) == geometry.w2_exact(big, big + 1, seed=2)


def dense_bures(a: Tensor, b: Tensor, shrinkage: float) -> float:
    """The textbook form with d x d matrix square roots."""
    from scipy.linalg import sqrtm

    d = a.shape[1]
    covs = []
    for x in (a, b):
        c = np.cov(x.numpy().T, bias=True).reshape(d, d)
        covs.append((1 - shrinkage) * c + shrinkage * np.trace(c) / d * np.eye(d))
    root = sqrtm(covs[0])
    cross = np.trace(np.real(sqrtm(root @ covs[1] @ root)))
    gap = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    return math.sqrt(gap + np.trace(covs[0]) + np.trace(covs[1]) - 2 * cross)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 15, 4), (4, 3, 12), (5, 6, 11), (5, 6, 10)])
@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
def test_gaussian_w2_is_the_dense_form_also_with_fewer_rows_than_dimensions(
    n: int, m: int, d: int, shrinkage: float
) -> None:
    a, b = draw(n, d, 5), 2 * draw(m, d, 6, 0.5)
    assert geometry.w2_gaussian(a, b, shrinkage=shrinkage) == pytest.approx(dense_bures(a, b, shrinkage), rel=1e-6)


def test_gaussian_w2_of_two_lines_is_the_textbook_value() -> None:
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [8.0]])
    assert geometry.w2_gaussian(a, b) == pytest.approx(math.hypot(5.0, 2.0))
    assert geometry.w2_gaussian(a, a) == pytest.approx(0.0, abs=1e-6)


def test_sliced_w2_takes_uneven_sets() -> None:
    a = draw(30, 4)
    assert geometry.w2_sliced(a, torch.cat((a, a))) == pytest.approx(0, abs=1e-12)
    assert geometry.w2_sliced(a, a @ rotation(4), projections=16) > 0


def test_distances_refuse_what_is_not_states() -> None:
    for fn in (geometry.w2_exact, geometry.w2_gaussian, geometry.w2_sliced, geometry.entanglement):
        with pytest.raises(ValueError, match="at least one row"):
            fn(A[:0], B)
    with pytest.raises(ValueError, match="two rows"):
        geometry.mk_mmd(A[:1], B)


# Projection and drift


def test_pca_is_fitted_on_one_set_and_applied_to_others() -> None:
    fitted = geometry.fit_pca(A, 2)
    np.testing.assert_allclose(fitted.axes @ fitted.axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(fitted(A).mean(0), 0, atol=1e-12)
    torch.testing.assert_close(fitted(B), (B - A.mean(0)) @ fitted.axes.T)
    full = geometry.fit_pca(A, 3)
    assert float(full.explained.sum()) == pytest.approx(1.0)
    np.testing.assert_allclose(torch.cdist(full(A), full(A)), torch.cdist(A, A), atol=1e-9)
    again = geometry.fit_pca(A[torch.tensor([3, 0, 6, 2, 5, 1, 4])], 2)
    torch.testing.assert_close(again.axes, fitted.axes)  # neither order nor the solver's sign changes the map


def test_drift_is_relative_and_per_row() -> None:
    before = draw(4, 3)
    np.testing.assert_allclose(geometry.relative_drift(1.5 * before, before), [0.5] * 4)
    assert float(geometry.relative_drift(before, before).sum()) == 0.0


# Probes


def persons(n: int, rows: int, d: int, seed: int, spread: float = 3.0) -> tuple[Tensor, list[int]]:
    """Rows of persons that differ strongly from each other but not by set."""
    centres = spread * draw(n, d, seed)
    ids = [1000 * seed + i for i in range(n) for _ in range(rows)]
    return centres.repeat_interleave(rows, 0) + 0.1 * draw(n * rows, d, seed + 50), ids


def test_folds_never_cut_a_group_and_hold_every_set() -> None:
    groups = [[i // 3 for i in range(21)], [i // 4 + 5 for i in range(24)]]  # persons 5 and 6 are on both sides
    folds, how = latent.assign_folds([21, 24], groups, 4, 0)
    assert how == "group"
    home: dict[int, set[int]] = {}
    for fold, ids in zip(folds, groups, strict=True):
        assert set(fold) == {0, 1, 2, 3}
        for f, g in zip(fold, ids, strict=True):
            home.setdefault(g, set()).add(int(f))
    assert all(len(f) == 1 for f in home.values())


@pytest.mark.parametrize("groups", [[None, None], [[0] * 9, [1] * 9], [[0, -1] + [1] * 7, [2] * 4 + [3] * 5]])
def test_folds_by_row_where_groups_cannot_decide(groups: list[list[int] | None]) -> None:
    folds, how = latent.assign_folds([9, 9], groups, 3, 0)
    assert how == "row"
    assert [sorted(np.bincount(f)) for f in folds] == [[3, 3, 3]] * 2


def test_probe_by_group_does_not_take_a_person_for_membership() -> None:
    # Rows of one person lie together: folds by row find the person again, folds by group only what the sets share.
    by_row, by_group = [], []
    for seed in range(6):
        (a, ga), (b, gb) = persons(5, 8, 30, 2 * seed + 1), persons(5, 8, 30, 2 * seed + 2)
        by_row.append(latent.probe_auc(a, b))
        by_group.append(latent.probe_auc(a, b, ga, gb))
    assert min(by_row) > 0.99
    assert 0.3 < np.mean(by_group) < 0.7


def test_probe_finds_a_mark_and_its_control_does_not() -> None:
    (a, ga), (b, gb) = persons(8, 6, 10, 1, 0.5), persons(8, 6, 10, 2, 0.5)
    a[:, 0] += 3
    assert latent.probe_auc(a, b, ga, gb) > 0.95
    control = [latent.probe_auc(a, b, ga, gb, shuffled=True, seed=s) for s in range(8)]
    assert 0.4 < np.mean(control) < 0.6
    assert latent.probe_auc(a, b, ga, gb) == latent.probe_auc(a, b, ga, gb)


def test_projection_is_cross_fitted() -> None:
    # Many dimensions, few rows, no difference: a direction fitted on the rows it ranks would call them members.
    forget, never, retain = draw(30, 400, 1), draw(60, 400, 2), draw(200, 400, 3)
    direction = forget.mean(0) - retain.mean(0)
    fitted_on_itself = oracle.auc((forget @ direction).tolist(), (never @ direction).tolist())
    assert fitted_on_itself > 0.9
    assert 0.35 < latent.projection_auc(forget, never, retain) < 0.65


def test_projection_finds_marked_rows_and_ignores_what_all_new_rows_share() -> None:
    forget, never, retain = draw(40, 10, 1), draw(40, 10, 2), draw(90, 10, 3)
    marked = forget.clone()
    marked[:, 0] += 4
    groups = [i // 5 for i in range(40)]
    assert latent.projection_auc(marked, never, retain, groups) > 0.98
    both_new = 4 * torch.eye(10, dtype=torch.float64)[0]
    assert 0.35 < latent.projection_auc(forget + both_new, never + both_new, retain, groups) < 0.65


def test_probes_refuse_too_few_rows() -> None:
    with pytest.raises(ValueError, match="two rows"):
        latent.probe_auc(A[:1], B)
    with pytest.raises(ValueError, match="two forget rows"):
        latent.projection_auc(A[:1], B, B)
