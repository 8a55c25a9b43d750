"""Power and order statistics: as the libraries and simulations have them."""

import math

import numpy as np
import pytest
from chapters import cells_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower

from kdig_utils.analysis import sample_size

DEVIATION = 0.32  # about the paper's, from seed to seed


@pytest.mark.parametrize("gain", [0.01, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("runs", [2, 3, 10, 60])
def test_power_is_that_of_statsmodels(gain, runs):
    expected = TTestIndPower().power(gain / DEVIATION, runs, 0.05)
    assert sample_size.power(gain, DEVIATION, runs) == pytest.approx(float(expected))


def test_power_stays_a_number_where_the_effect_is_huge():
    # statsmodels 0.15 with SciPy 1.17 gives NaN here.
    assert sample_size.power(1.0, 0.109375, 2) == pytest.approx(0.98, abs=0.01)
    assert sample_size.power(50, 1, 3) == pytest.approx(1)


def test_the_seeds_that_are_needed_are_those_of_statsmodels():
    solved = TTestIndPower().solve_power(effect_size=0.4 / DEVIATION, power=0.8, alpha=0.05)
    assert sample_size.seeds_needed(0.4, DEVIATION) == math.ceil(solved)
    of_differences = DEVIATION * math.sqrt(2 * (1 - 0.3))
    solved = TTestPower().solve_power(effect_size=0.4 / of_differences, power=0.8, alpha=0.05)
    assert sample_size.seeds_needed(0.4, DEVIATION, correlation=0.3) == math.ceil(solved)
    gain = cells_of("08", "smallest_gain").smallest_gain(10, DEVIATION)
    assert sample_size.power(gain, DEVIATION, 10) == pytest.approx(0.8, abs=1e-4)


@given(st.floats(0.02, 5), st.floats(0.1, 1), st.floats(0.3, 0.99))
@settings(max_examples=60, deadline=None)
def test_the_seeds_that_are_needed_are_enough_and_one_fewer_is_not(gain, deviation, chance):
    runs = sample_size.seeds_needed(gain, deviation, chance)
    assert sample_size.power(gain, deviation, runs) >= chance
    assert runs == 2 or sample_size.power(gain, deviation, runs - 1) < chance


def test_the_best_of_n_normal_values_stands_where_simulation_puts_it():
    values = np.random.default_rng(0).normal(size=(200_000, 10)).max(axis=1)
    mean, deviation = sample_size.best_of_normal(10)
    assert mean == pytest.approx(values.mean(), abs=0.006)
    assert deviation == pytest.approx(values.std(), abs=0.006)
    assert sample_size.best_of_normal(1) == pytest.approx((0, 1), abs=1e-6)


def test_a_planted_gain_is_found_as_often_as_the_power_says():
    rng, studies = np.random.default_rng(2), 5000
    a, b = (rng.normal(gain, DEVIATION, (studies, 10)) for gain in (0.4, 0.0))
    found = np.mean(stats.ttest_ind(a, b, axis=1).pvalue < 0.05)
    print(f"a gain of 0.4 points is found in {found:.1%} of {studies} studies")
    assert found == pytest.approx(sample_size.power(0.4, DEVIATION, 10), abs=0.02)


def test_plans_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="gain 0"):
        sample_size.seeds_needed(0, 0.3)
    with pytest.raises(ValueError, match="deviation 0 is not above 0"):
        sample_size.seeds_needed(0.4, 0)
    with pytest.raises(ValueError, match="chance 1"):
        sample_size.seeds_needed(0.4, 0.3, chance=1)
    with pytest.raises(ValueError, match="correlation 1"):
        sample_size.seeds_needed(0.4, 0.3, correlation=1)
