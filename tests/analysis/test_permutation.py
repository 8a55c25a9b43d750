"""Permutation tests: what counting by hand and SciPy give."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from kdig_utils.analysis import comparisons, permutation


def test_the_exact_permutation_test_is_what_counting_by_hand_gives():
    a, b = np.array([91.0, 91.5, 92.0]), np.array([90.8, 91.2, 91.1])
    everything, observed = np.array([*a, *b]), a.mean() - b.mean()
    splits = [list(chosen) for chosen in combinations(range(6), 3)]
    differences = np.array([everything[s].mean() - np.delete(everything, s).mean() for s in splits])
    assert permutation.reshuffled(a, b) == pytest.approx(np.mean(np.abs(differences) >= observed - 1e-12))


@pytest.mark.parametrize(
    ("differences", "p"), [([0.1] * 5, 2 / 2**5), ([1, 2, 3, -4], 14 / 2**4), (list(range(1, 11)), 2 / 2**10)]
)
def test_the_exact_test_counts_the_signs_that_are_as_extreme(differences, p):
    assert permutation.sign_flips(np.array(differences, float)) == pytest.approx(p)


@pytest.mark.parametrize("seed", range(4))
def test_exact_permutation_tests_are_the_ones_of_scipy(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, 6).round(1), rng.normal(0, 1, 6).round(1)  # with ties
    difference = {"statistic": lambda x, y: x.mean() - y.mean(), "n_resamples": np.inf}
    unpaired = stats.permutation_test((a, b), permutation_type="independent", **difference)
    paired = stats.permutation_test((a, b), permutation_type="samples", **difference)
    assert permutation.reshuffled(a, b) == pytest.approx(unpaired.pvalue)
    assert permutation.sign_flips(a - b) == pytest.approx(paired.pvalue)


def test_the_papers_best_method_is_beyond_all_but_two_of_184756_splits():
    runs = comparisons.runs_by_method(comparisons.paper_rows())
    assert permutation.reshuffled(*(runs[name].to_numpy() for name in ("kd_ig", "student"))) == pytest.approx(
        2 / 184_756, rel=0.01
    )
