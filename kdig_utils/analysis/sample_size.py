"""What the number of runs does: how many a question needs, and how high the best of several stands."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
from scipy import optimize, special, stats
from statsmodels.stats.power import TTestIndPower

from kdig_utils.analysis.claims import SIGNIFICANCE


def expected_best(accuracies: pd.Series, n: int) -> float:
    """The highest of `n` of these runs, in per cent, averaged over all ways of choosing them.

    Raises:
        ValueError: n is below 1 or above the number of runs.
    """
    ordered, total = np.sort(np.asarray(accuracies, dtype=float)), len(accuracies)
    if not 1 <= n <= total:
        raise ValueError(f"n = {n} is outside 1 to {total}: only {total} runs can be chosen from")
    # A run is the highest of n chosen ones if the others are chosen from those below it.
    ways = special.comb(np.arange(total), n - 1) / special.comb(total, n)
    return float(ways @ ordered)


@cache
def best_of_normal(n: int) -> tuple[float, float]:
    """Mean and standard deviation of the highest of `n` normal values, in standard deviations above their mean."""
    highest = stats.order_statistic(stats.Normal(mu=0.0, sigma=1.0), r=n, n=n)
    return float(highest.mean()), float(highest.standard_deviation())


def power(gain: float, deviation: float, runs: float, alpha: float = SIGNIFICANCE) -> float:
    """Chance, from 0 to 1, that the two-sample t-test sees a true `gain` with `runs` runs of each method.

    Args:
        gain: true difference of the means, points.
        deviation: standard deviation from seed to seed, points, above 0; a value fixed beforehand, not the runs' own.
        alpha: level of the test; for the strictest step of Holm's correction the level divided by the family's size.
    """
    _check_deviation(deviation)
    return _power(gain / deviation * math.sqrt(runs / 2), 2 * runs - 2, alpha)


def seeds_needed(gain: float, deviation: float, chance: float = 0.8, alpha: float = SIGNIFICANCE) -> int:
    """Runs of each method with which the two-sample t-test sees a true `gain` with this chance.

    Args:
        gain, deviation: in points, as in `power`.
        chance: between 0 and 1: the power that is wanted.

    Raises:
        ValueError: the gain is 0, the deviation not above 0, or the chance outside (alpha, 1).
    """
    _check_plan(gain, deviation, chance, alpha)
    return _fewest(lambda runs: power(gain, deviation, runs, alpha), chance)


def pairs_needed(
    gain: float, deviation: float, correlation: float, chance: float = 0.8, alpha: float = SIGNIFICANCE
) -> int:
    """Seeds with which the paired t-test sees a true `gain` with this chance, each seed run by both methods.

    Args:
        correlation: between two methods' runs with one seed, above -1 and below 1.

    Raises:
        ValueError: as in `seeds_needed`, or the correlation is out of range.
    """
    _check_plan(gain, deviation, chance, alpha)
    if not -1 < correlation < 1:
        raise ValueError(f"correlation {correlation} is outside (-1, 1): 0 means that pairing does not help")
    of_differences = deviation * math.sqrt(2 * (1 - correlation))
    return _fewest(lambda pairs: _power(gain / of_differences * math.sqrt(pairs), pairs - 1, alpha), chance)


def smallest_gain(runs: int, deviation: float, chance: float = 0.8, alpha: float = SIGNIFICANCE) -> float:
    """The true gain, in points, that the two-sample t-test sees with this chance when each method has `runs` runs."""
    _check_deviation(deviation)
    return deviation * float(TTestIndPower().solve_power(nobs1=runs, power=chance, alpha=alpha))


def _power(noncentrality: float, df: float, alpha: float) -> float:
    """Power of a two-sided t-test."""
    # t² is F. statsmodels goes through SciPy's noncentral t, which gives NaN for some large effects.
    critical = special.fdtri(1, df, 1 - alpha)
    return float(1 - special.ncfdtr(1, df, noncentrality**2, critical))


def _fewest(power_of: Callable[[float], float], chance: float) -> int:
    """The smallest number of runs, at least two, whose power reaches `chance`; power grows with the runs."""
    most = 2.0
    while power_of(most) < chance:
        most *= 2
    return 2 if most == 2 else math.ceil(optimize.brentq(lambda runs: power_of(runs) - chance, most / 2, most))


def _check_deviation(deviation: float) -> None:
    if not deviation > 0:
        raise ValueError(f"deviation {deviation} is not above 0: give the spread from seed to seed, in points")


def _check_plan(gain: float, deviation: float, chance: float, alpha: float) -> None:
    _check_deviation(deviation)
    if gain == 0:
        raise ValueError("gain 0 is never seen, however many seeds: give the smallest gain that is worth finding")
    if not alpha < chance < 1:
        raise ValueError(f"chance {chance} is outside ({alpha}, 1): 0.8 is usual")
