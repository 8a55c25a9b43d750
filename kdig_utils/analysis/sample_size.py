"""What the number of runs does: how many a question needs, and how high the best of several stands."""

import math
from bisect import bisect_left
from functools import cache

from scipy import special, stats

from kdig_utils.analysis.claims import SIGNIFICANCE

LARGEST_EFFECT = 1e9  # standard errors: seen for certain; its square is still a number
MOST_RUNS = 10**9


@cache
def best_of_normal(n: int) -> tuple[float, float]:
    """Mean and standard deviation of the highest of `n` normal values, in standard deviations above their mean.

    Raises:
        ValueError: `n` is no whole number from 1 on.
    """
    if not (n >= 1 and n == int(n)):
        raise ValueError(f"n = {n} values have no highest one: give a whole number from 1 on")
    highest = stats.order_statistic(stats.Normal(mu=0.0, sigma=1.0), r=n, n=n)
    return float(highest.mean()), float(highest.standard_deviation())


def power(
    gain: float, deviation: float, runs: float, alpha: float = SIGNIFICANCE, correlation: float | None = None
) -> float:
    """Chance, from 0 to 1, that a two-sided t-test sees a true `gain` with `runs` runs of each method.

    Args:
        gain: true difference of the means, points.
        deviation: standard deviation from seed to seed, points, above 0; a value fixed beforehand, not the runs' own.
        alpha: level of the test; for the strictest step of Holm's correction the level divided by the family's size.
        correlation: between two methods' runs with one seed, above -1 and below 1: the test is paired. None: the
            two-sample test.

    Raises:
        ValueError: a value is out of its range: there is no test of one run.
    """
    if not math.isfinite(gain):
        raise ValueError(f"gain {gain} is no difference in points: give a finite number")
    if not 0 < deviation < math.inf:
        raise ValueError(f"deviation {deviation} is not above 0 and finite: give the runs' spread, in points")
    if not 2 <= runs < math.inf:
        raise ValueError(f"{runs} runs of each method make no test: plan two or more")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} is outside (0, 1): 0.05 is usual")
    if correlation is not None and not -1 < correlation < 1:
        raise ValueError(f"correlation {correlation} is outside (-1, 1): 0 means that pairing does not help")
    df = 2 * runs - 2 if correlation is None else runs - 1
    error = deviation * math.sqrt(2 * (1 - (correlation or 0)) / runs)
    # t² is F. statsmodels goes through SciPy's noncentral t, which gives NaN for some large effects.
    effect = min(abs(gain / error), LARGEST_EFFECT) ** 2
    return float(1 - special.ncfdtr(1, df, effect, special.fdtri(1, df, 1 - alpha)))


def seeds_needed(
    gain: float,
    deviation: float,
    chance: float = 0.8,
    alpha: float = SIGNIFICANCE,
    correlation: float | None = None,
) -> int:
    """Runs of each method, at least two, with which the t-test of `power` sees a true `gain` with this chance.

    Raises:
        ValueError: as in `power`; the gain is 0 or needs more than `MOST_RUNS`, or the chance is outside (alpha, 1).
    """
    if gain == 0:
        raise ValueError("gain 0 is never seen, however many seeds: give the smallest gain that is worth finding")
    if not alpha < chance < 1:
        raise ValueError(f"chance {chance} is outside ({alpha}, 1): 0.8 is usual")
    runs = range(2, MOST_RUNS)
    least = bisect_left(runs, chance, key=lambda runs: power(gain, deviation, runs, alpha, correlation))
    if least == len(runs):
        raise ValueError(f"gain {gain} at deviation {deviation} needs more than {MOST_RUNS:,} runs: give a larger one")
    return runs[least]
