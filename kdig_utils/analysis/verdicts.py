"""What a verdict means: the rules, each on one screen.

Two things decide about accuracies. **Chance**: the paper's number is itself one draw. If its recipe and ours are the
same, the gap between its number and ours stays within the *reach* in 19 of 20 studies: the prediction interval of a
replication (Patil, Peng & Leek 2016, doi 10.1177/1745691616646366). **The margin**: a smaller difference is of no
interest.

The rules work on numbers and on arrays alike: the scorecard gives them one claim, `operating_characteristics` thousands
of simulated studies. They were fixed before the first run that counts (`registrations` in claims.yml).
"""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from kdig_utils.analysis.claims import SIGNIFICANCE, Claim, claims, interim_significance, lookup, margin, signed_sum
from kdig_utils.analysis.sample_size import best_of_normal
from kdig_utils.method.spec import METHODS

REPRODUCED = "reproduced"
RESERVATIONS = "reproduced with reservations"
UNDECIDED = "undecided"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"
NOT_RUN = "not run yet"
VERDICTS = (REPRODUCED, RESERVATIONS, UNDECIDED, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN)
DECIDED = (REPRODUCED, RESERVATIONS, NOT_REPRODUCED)
NOTHING = 1e-9  # points: a spread below is rounding
Numbers = float | NDArray
Truths = bool | NDArray


def level(runs: int, planned: int) -> float:
    """The level of a look at `runs` runs of each method where `planned` are registered.

    Whoever looks before, and once more at the planned number, has two chances to be fooled. An early look needs far
    more evidence, so that the last one keeps its level (Haybittle 1971, Peto 1976). It can refute, never confirm.
    """
    return SIGNIFICANCE if runs >= planned else interim_significance()


def judge(claim: Claim, found: Mapping[str, ArrayLike], significance: float) -> NDArray:
    """The verdict on what `measure` found, or many verdicts on arrays of it.

    Args:
        found: as `measure` returns it, and for a difference or a direction p_holm, for no difference also p_level_holm.
        significance: the level of this look, from `level`.
    """
    value, gap = (np.asarray(found[name]) for name in ("value", "gap"))

    def holds(p: str) -> NDArray:
        return np.asarray(found[p]) < significance

    match claim.measure:
        case "accuracy" | "teacher_gap":
            return judge_accuracy(gap, np.asarray(found["reach"]), claim.tolerance)
        case "difference" | "interaction":
            reach = np.asarray(found["reach"])
            return judge_difference(value, value - gap, reach, holds("p_holm"), holds("p_level"))
        case "no_difference":
            return _first([(holds("p_level_holm"), REPRODUCED), (holds("p_holm"), NOT_REPRODUCED)])
        case "direction":
            return judge_direction(value, holds("p_holm"), holds("p_level"))
        case "map_similarity":
            return judge_direction(value, holds("p"))
        case "printed_imagenet":  # one network a method, however many images: that says nothing about the methods
            return np.full(value.shape, UNDECIDED)
        case "latency_ratio":
            return judge_time(gap, np.asarray(found["low"]), np.asarray(found["high"]), claim)
        case "teacher":
            return np.where(gap >= -claim.tolerance, REPRODUCED, NOT_REPRODUCED)
        case "explaining_over_training":  # "at most": the number is a bound
            return np.where(gap <= claim.tolerance, REPRODUCED, NOT_REPRODUCED)
        case _:
            return np.where(np.abs(gap) <= claim.tolerance, REPRODUCED, NOT_REPRODUCED)


def judge_accuracy(gap: Numbers, reach: Numbers, tolerance: float) -> NDArray:
    """A number is the same if chance explains the gap, and if the reach is narrow enough to have shown a larger one.

    Beyond chance it is not reproduced, or with reservations if it is off by less than the margin. Else undecided.
    """
    beyond, close = np.abs(gap) > reach, np.abs(gap) <= margin()
    return _first([(beyond & close, RESERVATIONS), (beyond, NOT_REPRODUCED), (reach <= tolerance, REPRODUCED)])


def judge_difference(value: Numbers, claimed: Numbers, reach: Numbers, shown: Truths, absent: Truths) -> NDArray:
    """A difference is the same if it is shown, with the claimed sign, and chance explains the gap to the paper's size.

    With reservations if it is shown in another size. Not reproduced if it is absent where more than the margin was
    claimed, if the opposite is shown, or if it is not shown and falls short by more than chance explains. Otherwise
    undecided.

    Args:
        shown: whether the test, corrected for its family, shows a difference.
        absent: whether two one-sided tests show that it is smaller than the margin.
    """
    agrees, gap = np.sign(value) == np.sign(claimed), value - claimed
    beyond, short = np.abs(gap) > reach, gap * np.sign(claimed) < 0
    missing = absent & (np.abs(claimed) > margin())
    return _first(
        [
            (missing | (shown & ~agrees), NOT_REPRODUCED),
            (shown & beyond, RESERVATIONS),
            (shown, REPRODUCED),
            (beyond & short, NOT_REPRODUCED),
        ]
    )


def judge_direction(value: Numbers, shown: Truths, absent: Truths = False) -> NDArray:
    """More of something, where the paper gives no number: it is shown; not reproduced if the opposite is shown.

    Not reproduced, too, if two one-sided tests show that it is absent: smaller than the margin. With reservations if
    they show that of a difference that is there.
    """
    there = shown & np.greater(value, 0)
    small = [(there & absent, RESERVATIONS), (there, REPRODUCED), (absent, NOT_REPRODUCED)]
    return _first([(shown & ~there, NOT_REPRODUCED), *small])


def judge_time(gap: Numbers, low: Numbers, high: Numbers, claim: Claim) -> NDArray:
    """What is timed is the same within the tolerance, its interval within twice; undecided if it reaches there."""
    below, above = claim.claimed - low, high - claim.claimed
    same = (np.abs(gap) <= claim.tolerance) & (np.maximum(below, above) <= 2 * claim.tolerance)
    away = np.less(below, -claim.tolerance) | np.less(above, -claim.tolerance)
    return _first([(same, REPRODUCED), (away, NOT_REPRODUCED)])


def _first(rules: Sequence[tuple[Truths, str]]) -> NDArray:
    """The verdict of the first rule that holds; undecided if none does, as where a number is NaN."""
    conditions, verdicts = zip(*rules, strict=True)
    return np.select([np.asarray(holds, bool) for holds in conditions], verdicts, UNDECIDED)


def measure(
    claim: Claim, runs: Sequence[ArrayLike], claimed: Numbers, spread: tuple[Numbers, int], significance: float
) -> dict[str, NDArray]:
    """What runs say of a claim on accuracies: the numbers that `judge` looks at.

    Args:
        runs: accuracies of each of the claim's methods, (..., runs); of several methods in the same order of seeds.
        claimed: the paper's number.
        spread: the deviation from run to run, pooled over the methods, and its degrees of freedom. Both sides are
            taken to spread alike, as they do if they have one recipe.

    Returns:
        value, gap to the paper's number, its reach, low and high (interval of the value), and of differences p (paired
        t-test), p_level (two one-sided tests), else NaN. NaN also where there is no spread.
    """
    of = _accuracy if len(runs) == 1 else _difference
    return of(claim, signed_sum(runs), claimed, spread, significance)


def _accuracy(
    claim: Claim, ours: NDArray, claimed: Numbers, spread: tuple[Numbers, int], significance: float
) -> dict[str, NDArray]:
    """A mean; or the best that n of our runs would have, as for normal runs, against the paper's best of n."""
    (deviation, df), runs = spread, ours.shape[-1]
    value, own, theirs = ours.mean(-1), 1 / runs, 1 / claim.paper_runs
    if claim.statistic == "best":
        above, wobble = best_of_normal(claim.paper_runs)
        value, own, theirs = value + above * deviation, own + above**2 / (2 * max(df, 1)), wobble**2
    if claim.measure == "teacher_gap":
        theirs += 2  # one teacher a side, and each is a draw, too
    half, reach = (_quantile(significance, df) * deviation * part**0.5 for part in (own, own + theirs))
    nothing = np.full_like(value, np.nan)
    found = {"value": value, "gap": value - claimed, "reach": np.asarray(reach), "low": value - half}
    return found | {"high": value + half, "p": nothing, "p_level": nothing}


def _difference(
    claim: Claim, differences: NDArray, claimed: Numbers, spread: tuple[Numbers, int], significance: float
) -> dict[str, NDArray]:
    """Paired by seed. The reach joins our interval and the paper's, in squares (Zou & Donner 2008, MOVER)."""
    (deviation, df), own_df = spread, differences.shape[-1] - 1
    value = differences.mean(-1)
    error = differences.std(-1, ddof=1) / (own_df + 1) ** 0.5 if own_df else np.full_like(value, np.nan)
    error = np.where(error > NOTHING, error, np.nan)  # no spread is no evidence
    half = _quantile(significance, own_df) * error
    luck = best_of_normal(claim.paper_runs)[1] if claim.statistic == "best" else claim.paper_runs**-0.5
    theirs = _quantile(significance, df) * deviation * luck * len(claim.methods) ** 0.5
    found = {"value": value, "gap": value - claimed, "reach": np.hypot(half, theirs)}
    found |= {"low": value - half, "high": value + half, "p": 2 * stats.t.sf(np.abs(value) / error, max(own_df, 1))}
    return found | {"p_level": stats.t.sf((margin() - np.abs(value)) / error, max(own_df, 1))}


def _quantile(significance: float, df: int) -> float:
    return float(stats.t.ppf(1 - significance / 2, df)) if df > 0 else np.nan


def papers_spread() -> tuple[float, int]:
    """The paper's deviation from run to run, in points, pooled over its eight methods, and its degrees of freedom."""
    deviation, df = pooled_deviation([lookup(f"ablation_runs.{method}") for method in METHODS])
    return float(deviation), df


def pooled_deviation(samples: Sequence[ArrayLike]) -> tuple[NDArray, int]:
    """Standard deviation within samples of runs, (..., runs) each, and its degrees of freedom; NaN if these are 0."""
    several = [values for values in (np.asarray(sample, float) for sample in samples) if values.shape[-1] > 1]
    df = sum(values.shape[-1] - 1 for values in several)
    squares = sum((values.var(-1, ddof=1) * (values.shape[-1] - 1) for values in several), np.zeros(()))
    deviation = np.sqrt(squares / max(df, 1))
    return np.where(deviation > NOTHING, deviation, np.nan), df  # no spread is no evidence


def comparison_of(claim: Claim) -> tuple:
    """What tells tests apart: two claims on one comparison of the same runs are one test."""
    return claim.methods, claim.k, claim.settings.get("train_images")


@cache
def families() -> dict[str, list[tuple]]:
    """The distinct comparisons of each family, as the claims register them, whether they were made or not."""
    found: dict[str, list[tuple]] = {}
    for claim in claims():
        if claim.family and comparison_of(claim) not in found.setdefault(claim.family, []):
            found[claim.family].append(comparison_of(claim))
    return found
