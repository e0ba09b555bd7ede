"""Cross-fitted classifiers on hidden states: can forgotten rows unknown to the classifier be told from others?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FOLDS = 5
Groups = Sequence[int] | NDArray | None


def _array(x: Tensor) -> NDArray[np.float64]:
    return x.detach().to("cpu").double().numpy()


def _row_folds(sizes: Sequence[int], folds: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    return [rng.permutation(np.arange(n) % folds) for n in sizes]


def _known(groups: Groups) -> NDArray | None:
    """Group ids, or None when any row has none: a partly grouped set cannot be cut by group."""
    if groups is None:
        return None
    ids = np.asarray(groups)
    return ids if len(ids) and np.all(ids >= 0) else None


def assign_folds(
    sizes: Sequence[int], groups: Sequence[Groups], folds: int = FOLDS, seed: int = 0
) -> tuple[list[NDArray], str]:
    """Fold of every row of several sets: a group is never in two folds, and every fold holds rows of every set.

    Args:
        sizes: rows of each set.
        groups: for each set the group id of each row (-1 or None: unknown). The same id in two sets is the same group.
        folds: at most this many; fewer when a set has fewer groups or rows.
        seed: of the deal.

    Returns:
        (one array per set, "group" | "row"); by row when groups are unknown or a set has only one.

    Example:
        >>> assign_folds([4, 2], [[7, 7, 8, 8], [5, 6]])[1], assign_folds([4, 2], [None, None])[1]
        ('group', 'row')
    """
    rng = np.random.default_rng(seed)
    by_rows = _row_folds(sizes, max(2, min(folds, *sizes)), rng)
    known = [ids for ids in (_known(g) for g in groups) if ids is not None]
    if len(known) != len(sizes):
        return by_rows, "row"
    cut = min(folds, *(len(np.unique(ids)) for ids in known))
    if cut < 2:
        return by_rows, "row"
    where: dict[int, int] = {}
    for ids in known:
        load = np.bincount([where[g] for g in np.unique(ids) if g in where], minlength=cut)
        for g in rng.permutation([g for g in np.unique(ids) if g not in where]):
            where[g] = int(load.argmin())  # the fold with the fewest groups of this set so far
            load[where[g]] += 1
    dealt = [np.array([where[g] for g in ids]) for ids in known]
    if any(len(np.unique(f)) < cut for f in dealt):
        return by_rows, "row"
    return dealt, "group"


def probe_auc(
    a: Tensor, b: Tensor, groups_a: Groups = None, groups_b: Groups = None, *, c: float = 0.01, seed: int = 0,
    shuffled: bool = False,
) -> float:  # fmt: skip
    """Mean held-out AUC of a standardised logistic regression that tells rows of ``a`` from rows of ``b``.

    Args:
        a: ``[n, d]`` states, n >= 2.
        b: ``[m, d]`` states, m >= 2.
        groups_a: person or author id per row; folds then never share one. By row where an id is missing or there is
            only one: rows of one person then sit on both sides of the split, and the number says less about membership.
        groups_b: the same for ``b``.
        c: inverse regularisation.
        seed: of the folds.
        shuffled: control with the labels dealt at random, about 0.5.

    Returns:
        Mean over folds of the AUC within the fold (scores of different folds are never compared); 0.5 = cannot tell.

    Source:
        Probing: Alain and Bengio, 1610.01644; settings ours.

    Example:
        >>> import torch
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> probe_auc(x + 5, x)
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(a), len(b)) < 2:
        raise ValueError("a probe needs two rows on each side")
    x = np.concatenate((_array(a), _array(b)))
    y = np.arange(len(x)) < len(a)
    if shuffled:
        # Rows move, groups stay with their rows: the control keeps the split by group and loses only the label.
        order = np.random.default_rng(seed).permutation(len(x))
        ids = None if groups_a is None or groups_b is None else np.concatenate((groups_a, groups_b))[order]
        x = x[order]
        groups_a, groups_b = (None, None) if ids is None else (ids[: len(a)], ids[len(a) :])
    fold = np.concatenate(assign_folds([len(a), len(b)], [groups_a, groups_b], seed=seed)[0])
    values = []
    for k in np.unique(fold):
        test = fold == k
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        model.fit(x[~test], y[~test])
        values.append(roc_auc_score(y[test], model.decision_function(x[test])))
    return float(np.mean(values))


def projection_auc(
    forget: Tensor, never_seen: Tensor, retain: Tensor, groups: Groups = None, *, folds: int = FOLDS, seed: int = 0
) -> float:
    """AUC of forget against never-seen rows along the direction mean(forget) - mean(retain).

    The direction is fitted without the fold of forget rows that it then ranks, and never sees the never-seen rows:
    otherwise any noise in the forget rows would count as membership. About 0.5 means that nothing sets forgotten rows
    apart from rows that were never trained on; 1 means that the model marks them.

    Args:
        forget: ``[n, d]`` states, n >= 2.
        never_seen: ``[m, d]``.
        retain: ``[r, d]``.
        groups: person or author id per forget row.
        folds: at most this many.
        seed: of the folds.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> projection_auc(x + 5, x[:20], x[20:])
        1.0
    """
    from sklearn.metrics import roc_auc_score

    if len(forget) < 2 or not len(never_seen) or not len(retain):
        raise ValueError("needs two forget rows, a never-seen row and a retain row")
    f, n, r = _array(forget), _array(never_seen), _array(retain)
    fold = assign_folds([len(f)], [groups], folds, seed)[0][0]
    values = []
    for k in np.unique(fold):
        direction = f[fold != k].mean(0) - r.mean(0)
        test = f[fold == k]
        labels = np.repeat([1, 0], [len(test), len(n)])
        values.append((roc_auc_score(labels, np.concatenate((test, n)) @ direction), len(test)))
    return float(np.average([v for v, _ in values], weights=[w for _, w in values]))
