"""Quadratic weighted kappa against values worked out by hand, and its interval."""

import numpy as np
import pytest

from twice_rec.evaluation.agreement import agreement


@pytest.mark.parametrize(
    ("a", "b", "kappa", "same"),
    [
        # Squared distances 0, 0, 1, 0: mean 1/4. By chance: 23/4 + 18/4 - 2 * 9/4 * 2 = 5/4. 1 - (1/4) / (5/4) = 4/5.
        ([1, 2, 3, 3], [1, 2, 2, 3], 4 / 5, 3 / 4),
        # Mean 4; by chance 5 + 5 - 2 * 2 * 2 = 2. 1 - 4 / 2.
        ([1, 3], [3, 1], -1.0, 0.0),
        # Mean 1; by chance 4 + 5 - 2 * 2 * 2 = 1.
        ([2, 2], [1, 3], 0.0, 0.0),
        # Mean 9/3; by chance 9/3 + 18/3 - 2 * 1 * 2 = 5.
        ([0, 0, 3], [0, 3, 3], 2 / 5, 2 / 3),
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0, 1.0),
    ],
)
def test_kappa_by_hand(a, b, kappa, same):
    found = agreement(a, b)
    assert found.kappa == pytest.approx(kappa, abs=1e-12)
    assert found.same == pytest.approx(same)
    assert found.n == len(a)
    assert agreement(b, a).kappa == pytest.approx(kappa, abs=1e-12)


def test_where_chance_would_agree_wholly_there_is_no_kappa():
    found = agreement([2, 2, 2], [2, 2, 2])
    assert (found.n, found.same, found.kappa, found.ci95) == (3, 1.0, None, None)
    assert agreement([], []).n == 0
    with pytest.raises(ValueError, match="got 1 and 2"):
        agreement([1], [1, 2])


def test_the_interval_is_that_of_resampled_rows():
    """Rows drawn one by one give the same quantiles as cells drawn from the table."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 200)
    b = np.clip(a + rng.integers(-1, 2, 200), 0, 3)
    found = agreement(a.tolist(), b.tolist(), seed=1, samples=4000)
    assert found.ci95[0] < found.kappa < found.ci95[1]
    kappas = []
    for _ in range(2000):
        rows = rng.integers(0, 200, 200)
        x, y = a[rows].astype(float), b[rows].astype(float)
        by_chance = (x**2).mean() + (y**2).mean() - 2 * x.mean() * y.mean()
        kappas.append(1 - ((x - y) ** 2).mean() / by_chance)
    assert found.ci95 == pytest.approx(tuple(np.quantile(kappas, [0.025, 0.975])), abs=0.01)
    assert agreement(a.tolist(), b.tolist(), seed=1, samples=4000) == found
