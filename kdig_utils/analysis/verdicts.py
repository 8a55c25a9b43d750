"""What a verdict means: the rules, each on one screen, and how often each of them errs.

Two things decide about accuracies. **Chance**: the paper's number is itself one draw. If its recipe and ours are the
same, the gap between its number and ours stays within the *reach* in 19 of 20 studies: the prediction interval of a
replication (Patil, Peng & Leek 2016, doi 10.1177/1745691616646366). **The margin**: a smaller difference is of no
interest.

The rules work on numbers and on arrays alike: the scorecard gives them one claim, `operating_characteristics` thousands
of simulated studies. They were fixed before the first run that counts (`registrations` in claims.yml).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from kdig_utils.analysis.claims import SIGNIFICANCE, SIGNS, Claim, claims, interim_significance, lookup, margin
from kdig_utils.analysis.comparisons import best_of_normal, holm
from kdig_utils.method.spec import MAIN_METHODS, METHODS

REPRODUCED = "reproduced"
RESERVATIONS = "reproduced with reservations"
UNDECIDED = "undecided"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"
NOT_RUN = "not run yet"
VERDICTS = (REPRODUCED, RESERVATIONS, UNDECIDED, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN)
NOTHING = 1e-9  # points: a spread below is rounding
DECIDED = (REPRODUCED, RESERVATIONS, NOT_REPRODUCED)


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
    if claim.measure in ("accuracy", "teacher_gap"):
        return judge_accuracy(found["gap"], found["reach"], claim.tolerance)
    if claim.measure in ("difference", "interaction"):
        absent = np.asarray(found["p_level"]) < significance
        size = (found["value"], np.asarray(found["value"]) - found["gap"], found["reach"])
        return judge_difference(*size, np.asarray(found["p_holm"]) < significance, absent)
    if claim.measure == "no_difference":
        shown, alike = (np.asarray(found[name]) < significance for name in ("p_holm", "p_level_holm"))
        return _first([(alike, REPRODUCED), (shown, NOT_REPRODUCED)])
    if claim.measure == "direction":
        shown, absent = (np.asarray(found[name]) < significance for name in ("p_holm", "p_level"))
        return judge_direction(found["value"], shown, absent)
    if claim.measure == "map_similarity":
        return judge_direction(found["value"], np.asarray(found["p"]) < significance)
    if claim.measure == "imagenet":  # one network a method, however many images: that says nothing about the methods
        return np.full(np.shape(found["value"]), UNDECIDED)
    if claim.measure == "latency_ratio":
        return judge_time(found["gap"], found["low"], found["high"], claim)
    if claim.measure == "teacher":
        return np.where(np.asarray(found["gap"]) >= -claim.tolerance, REPRODUCED, NOT_REPRODUCED)
    if claim.measure == "explaining_over_training":  # "at most": the number is a bound
        return np.where(np.asarray(found["gap"]) <= claim.tolerance, REPRODUCED, NOT_REPRODUCED)
    return np.where(np.abs(found["gap"]) <= claim.tolerance, REPRODUCED, NOT_REPRODUCED)


def judge_accuracy(gap: ArrayLike, reach: ArrayLike, tolerance: float) -> NDArray:
    """A number is the same if chance explains the gap, and if the reach is narrow enough to have shown a larger one.

    Beyond chance it is not reproduced, or with reservations if it is off by less than the margin. Else undecided.
    """
    beyond, close = np.abs(gap) > np.asarray(reach), np.abs(gap) <= margin()
    narrow = np.asarray(reach) <= tolerance
    return _first([(beyond & close, RESERVATIONS), (beyond, NOT_REPRODUCED), (narrow, REPRODUCED)])


def judge_difference(
    value: ArrayLike, claimed: ArrayLike, reach: ArrayLike, shown: ArrayLike, absent: ArrayLike
) -> NDArray:
    """A difference is the same if it is shown, with the claimed sign, and chance explains the gap to the paper's size.

    With reservations if it is shown in another size. Not reproduced if it is absent where more than the margin was
    claimed, if the opposite is shown, or if it is not shown and falls short by more than chance explains. Otherwise
    undecided.

    Args:
        shown: whether the test, corrected for its family, shows a difference.
        absent: whether two one-sided tests show that it is smaller than the margin.
    """
    agrees = np.sign(value) == np.sign(claimed)
    beyond = np.abs(np.asarray(value) - claimed) > np.asarray(reach)
    short = (np.asarray(value) - claimed) * np.sign(claimed) < 0
    missing = np.asarray(absent) & (np.abs(claimed) > margin())
    return _first(
        [
            (missing | (shown & ~agrees), NOT_REPRODUCED),
            (shown & beyond, RESERVATIONS),
            (shown, REPRODUCED),
            (beyond & short, NOT_REPRODUCED),
        ]
    )


def judge_direction(value: ArrayLike, shown: ArrayLike, absent: ArrayLike = False) -> NDArray:
    """More of something, where the paper gives no number: it is shown; not reproduced if the opposite is shown.

    Not reproduced, too, if two one-sided tests show that it is absent: smaller than the margin. With reservations if
    they show that of a difference that is there.
    """
    there = shown & (np.asarray(value) > 0)
    small = [(there & absent, RESERVATIONS), (there, REPRODUCED), (absent, NOT_REPRODUCED)]
    return _first([(shown & ~there, NOT_REPRODUCED), *small])


def judge_time(gap: ArrayLike, low: ArrayLike, high: ArrayLike, claim: Claim) -> NDArray:
    """What is timed is the same within the tolerance, its interval within twice; undecided if it reaches there."""
    below, above = claim.claimed - np.asarray(low), np.asarray(high) - claim.claimed
    same = (np.abs(gap) <= claim.tolerance) & (np.maximum(below, above) <= 2 * claim.tolerance)
    away = (below < -claim.tolerance) | (above < -claim.tolerance)
    return _first([(same, REPRODUCED), (away, NOT_REPRODUCED)])


def _first(rules: Sequence[tuple[ArrayLike, str]]) -> NDArray:
    """The verdict of the first rule that holds; undecided if none does, as where a number is NaN."""
    conditions, verdicts = zip(*rules, strict=True)
    return np.select([np.asarray(holds, bool) for holds in conditions], verdicts, UNDECIDED)


def measure(
    claim: Claim, runs: Sequence[ArrayLike], claimed: ArrayLike, deviation: ArrayLike, df: int, significance: float
) -> dict[str, NDArray]:
    """What runs say of a claim on accuracies: the numbers that `judge` looks at.

    Args:
        runs: accuracies of each of the claim's methods, (..., runs); of several methods in the same order of seeds.
        claimed: the paper's number.
        deviation: from run to run, pooled over the methods, and `df`, its degrees of freedom. Both sides are taken to
            spread alike, as they do if they have one recipe.

    Returns:
        value, gap to the paper's number, its reach, low and high (interval of the value), and of differences p (paired
        t-test), p_level (two one-sided tests), else NaN. NaN also where there is no spread.
    """
    values = [np.asarray(one, float) for one in runs]
    if len(values) == 1:
        return _accuracy(claim, values[0], claimed, np.asarray(deviation, float), df, significance)
    difference = sum(sign * one for sign, one in zip(SIGNS, values, strict=False))
    return _difference(claim, difference, claimed, deviation, df, significance)


def _accuracy(
    claim: Claim, ours: NDArray, claimed: ArrayLike, deviation: NDArray, df: int, significance: float
) -> dict[str, NDArray]:
    """A mean; or the best that n of our runs would have, as for normal runs, against the paper's best of n."""
    runs = ours.shape[-1]
    above, wobble = best_of_normal(claim.paper_runs)
    if claim.statistic == "mean":
        value, own, theirs = ours.mean(-1), 1 / runs, 1 / claim.paper_runs
    else:
        value, own, theirs = ours.mean(-1) + above * deviation, 1 / runs + above**2 / (2 * max(df, 1)), wobble**2
    if claim.measure == "teacher_gap":
        theirs += 2  # one teacher a side, and each is a draw, too
    half, reach = (_quantile(significance, df) * deviation * part**0.5 for part in (own, own + theirs))
    nothing = np.full_like(value, np.nan)
    found = {"value": value, "gap": value - claimed, "reach": reach, "low": value - half, "high": value + half}
    return found | {"p": nothing, "p_level": nothing}


def _difference(
    claim: Claim, differences: NDArray, claimed: ArrayLike, deviation: ArrayLike, df: int, significance: float
) -> dict[str, NDArray]:
    """Paired by seed. The reach joins our interval and the paper's, in squares (Zou & Donner 2008, MOVER)."""
    own_df = differences.shape[-1] - 1
    value = differences.mean(-1)
    error = differences.std(-1, ddof=1) / (own_df + 1) ** 0.5 if own_df else np.full_like(value, np.nan)
    error = np.where(error > NOTHING, error, np.nan)  # no spread is no evidence
    half = _quantile(significance, own_df) * error
    luck = best_of_normal(claim.paper_runs)[1] if claim.statistic == "best" else claim.paper_runs**-0.5
    theirs = _quantile(significance, df) * np.asarray(deviation) * luck * len(claim.methods) ** 0.5
    found = {"value": value, "gap": value - claimed, "reach": np.hypot(half, theirs)}
    found |= {"low": value - half, "high": value + half, "p": 2 * stats.t.sf(np.abs(value) / error, max(own_df, 1))}
    return found | {"p_level": stats.t.sf((margin() - np.abs(value)) / error, max(own_df, 1))}


def _quantile(significance: float, df: int) -> float:
    return float(stats.t.ppf(1 - significance / 2, df)) if df > 0 else np.nan


def implied_mean(claim: Claim, deviation: float) -> tuple[float, float]:
    """The mean of the runs behind the paper's number, and its variance, if runs deviate so from one another."""
    above, wobble = best_of_normal(claim.paper_runs) if claim.statistic == "best" else (0, claim.paper_runs**-0.5)
    return claim.claimed - above * deviation, (wobble * deviation) ** 2


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


# The claims that stand for their kinds, and what would be false: (claim, distance of the truth from the claim).
KINDS_OF_CLAIM = {
    "a mean of ten": "mean_kd_ig",
    "a best of ten": "headline_kd_ig",
    "a best of sixty": "resampled_kd_ig",
    "a single run": "sweep_k9",
    "a large difference": "kd_ig_over_student",
    "a small difference": "kd_ig_over_kd",
    "an interaction": "kd_ig_together",
    "no difference": "at_like_student",
}
TRUTHS = {"exactly true": 1.0, "off by half": 0.5, "false": 0.0}
OTHER_SIZE = 2.0  # points: what a single run of the sweep is off by where its claim is false


def operating_characteristics(
    seeds: Sequence[int] = (1, 3, 5, 10),
    studies: int = 1000,
    correlation: float = 0.0,
    seed: int = 0,
    kinds: Mapping[str, str] = MappingProxyType(KINDS_OF_CLAIM),
) -> pd.DataFrame:
    """How often each verdict falls where the truth is known: simulated studies, judged as the scorecard judges runs.

    Both sides are simulated, normal with the deviation of the paper's ten runs: the paper's number is one draw too.
    The truth is the paper's table: of a method its gain over `student`, of a difference itself; none of it where the
    claim is false. Of no difference: 0, half the smallest direct effect of the table, all of it. Each number of seeds
    is taken as the registered one.

    Args:
        correlation: of two methods' runs with one seed.
        kinds: the claims to judge, each by the name of its kind.

    Returns:
        A row for each kind of claim, truth and number of seeds: kind, claim, truth, seeds, and a share of the studies
        for each of the four verdicts on runs.
    """
    rng, rows = np.random.default_rng(seed), []
    for runs in seeds:
        for truth, share in TRUTHS.items():
            for kind, found in _judged_studies(kinds, share, runs, studies, correlation, rng).items():
                shares = {verdict: float((found == verdict).mean()) for verdict in (*DECIDED, UNDECIDED)}
                facts = {"kind": kind, "claim": kinds[kind], "truth": truth, "seeds": runs}
                rows.append(facts | shares)
    return pd.DataFrame(rows)


def _judged_studies(
    kinds: Mapping[str, str], share: float, runs: int, studies: int, correlation: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    registered = {claim.name: claim for claim in claims()}
    found = {}
    for kind, name in kinds.items():
        claim = registered[name]
        table = _true_means(claim)
        theirs = _draws(table, claim.paper_runs, studies, 0.0, rng)
        ours = _draws(_moved(claim, table, share), runs, studies, correlation, rng)
        found[kind] = _judge_study(claim, theirs, ours, runs)
    return found


def _true_means(claim: Claim) -> dict[str, float]:
    """What the paper's table says of the methods that its kind of claim is made on, as the truth of a simulation."""
    if claim.group == "compression":
        place = claim.value[0].rpartition(".")[2]
        return {method: lookup(f"compression_sweep_accuracy.{method}.{place}") for method in MAIN_METHODS}
    if claim.group == "resampling":
        return dict(lookup("monte_carlo.best"))  # shifted alike by the height of a best of sixty
    return {method: float(np.mean(lookup(f"ablation_runs.{method}"))) for method in METHODS}


def _moved(claim: Claim, table: Mapping[str, float], share: float) -> dict[str, float]:
    """The same table with this share of what is claimed."""
    if claim.measure == "no_difference":
        effect = (1 - share) * (table["kd_ig"] - table["kd"])
        return {**table, claim.methods[0]: table["student"] + effect}
    if claim.group == "compression":
        return {method: mean - (1 - share) * OTHER_SIZE for method, mean in table.items()}
    return {method: table["student"] + share * (mean - table["student"]) for method, mean in table.items()}


def _draws(
    means: Mapping[str, float], runs: int, studies: int, correlation: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Accuracies of each method, (studies, runs), normal with the paper's deviation."""
    deviation, _df = papers_spread()
    common = correlation**0.5 * rng.normal(size=(studies, runs))
    own = (1 - correlation) ** 0.5
    return {name: mean + deviation * (common + own * rng.normal(size=(studies, runs))) for name, mean in means.items()}


def papers_spread() -> tuple[float, int]:
    """The paper's deviation from run to run, in points, pooled over its eight methods, and its degrees of freedom."""
    return pooled_deviation([lookup(f"ablation_runs.{method}") for method in METHODS])


def pooled_deviation(samples: Sequence[ArrayLike]) -> tuple[NDArray, int]:
    """Standard deviation within samples of runs, (..., runs) each, and its degrees of freedom; NaN if these are 0."""
    several = [values for values in (np.asarray(sample, float) for sample in samples) if values.shape[-1] > 1]
    df = sum(values.shape[-1] - 1 for values in several)
    squares = sum((values.var(-1, ddof=1) * (values.shape[-1] - 1) for values in several), 0.0)
    deviation = np.sqrt(np.asarray(squares) / max(df, 1))
    return np.where(deviation > NOTHING, deviation, np.nan), df  # no spread is no evidence


def _judge_study(claim: Claim, theirs: dict[str, NDArray], ours: dict[str, NDArray], runs: int) -> NDArray:
    significance = level(runs, runs)
    spread = pooled_deviation(list(ours.values()))
    claimed = _number_of(claim, theirs)
    found = measure(claim, [ours[method] for method in claim.methods], claimed, *spread, significance)
    return judge(claim, found | _corrected(claim, found, ours, spread, significance), significance)


def _number_of(claim: Claim, theirs: dict[str, NDArray]) -> NDArray:
    """The number that the simulated paper prints."""
    statistic = np.max if claim.statistic == "best" else np.mean
    signs = zip(SIGNS, claim.methods, strict=False)
    return sum(sign * statistic(theirs[method], -1) for sign, method in signs)


def _corrected(claim: Claim, found: dict, ours: dict[str, NDArray], spread: tuple, significance: float) -> dict:
    """Holm's correction in each simulated study, over its whole family."""
    if not claim.family:
        return {}
    family = families()[claim.family]
    tests = [
        measure(_with(claim, test), [ours[method] for method in test[0]], 0.0, *spread, significance)["p"]
        for test in family
    ]
    corrected = holm(np.stack(tests), len(family))
    alike = [other for other in claims() if other.family == claim.family and other.measure == "no_difference"]
    level_p = np.minimum(np.asarray(found["p_level"]) * len(alike), 1)  # the strictest step of Holm's
    return {"p_holm": corrected[family.index(comparison_of(claim))], "p_level_holm": level_p}


def _with(claim: Claim, test: tuple) -> Claim:
    return replace(claim, methods=test[0], k=test[1])
