"""Is one method better than another? Differences between methods with intervals, tests, effect sizes and power.

Every function takes test accuracies in per cent: rows of the ledger, or the runs of two methods. The tests are SciPy's
and statsmodels'; this module chooses among them, and corrects for how many were made.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special, stats
from statsmodels.formula.api import ols
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from kdig_utils.analysis.claims import SIGNIFICANCE, paper
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method.spec import METHODS

RESAMPLES = 9999
ENUMERATED = 200_000  # permutations up to which all are tried: ten runs against ten have 184,756, ten pairs 1,024
TIED = 1e-9  # relative: sums that differ by less are the same, but for rounding
# What tells runs of the paper apart, which have no spec.
SETTINGS = ("k", "epochs", "pairing", "train_fraction")


class Comparison(NamedTuple):
    """First method minus second, in points of test accuracy.

    Attributes:
        runs: of the method that has fewer.
        difference: of the means.
        low, high: its 95 % interval from the t distribution.
        bootstrap_low, bootstrap_high: the same from 9,999 bootstrap samples (BCa).
        p: of the t-test.
        p_permutation: of the permutation test of the difference of means: exact where all can be enumerated, else
            from 9,999 drawn ones.
        g, g_low, g_high: standardised effect, corrected for small samples (Hedges), and its 95 % interval; NaN for two
            pairs.
    """

    runs: int
    difference: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    p: float
    p_permutation: float
    g: float
    g_low: float
    g_high: float


class Equivalence(NamedTuple):
    """Two one-sided tests: is the difference, in points, smaller than a margin in both directions?

    Attributes:
        runs: of the method that has fewer.
        difference: of the means.
        low, high: its 90 % interval; it lies inside the margin exactly if p < 0.05.
        p: the larger one of the two one-sided tests.
    """

    runs: int
    difference: float
    low: float
    high: float
    p: float


def paper_rows() -> pd.DataFrame:
    """The paper's ten runs of each method, in the columns of the ledger.

    The paper gives no seeds: `seed` is the place in its list, and two methods share nothing but that number.
    """
    training = paper()["training"]
    rows = [
        {"campaign": "paper", "method": method, "k": 5, "seed": place, "test_accuracy": accuracy}
        for method in METHODS
        for place, accuracy in enumerate(paper()["ablation_runs"][method])
    ]
    return pd.DataFrame(rows).assign(pairing="", epochs=training["epochs"], train_fraction=1.0)


def mixed(students: pd.DataFrame) -> dict[str, list]:
    """Where runs of students have more than one setting: the names, with all values; a second teacher counts too.

    A field that not all methods read is compared among those that do.
    """
    found: dict[str, list] = {}
    for run in students.to_dict("records"):
        setting = spec_of(run).setting() if "spec" in run else {name: run[name] for name in SETTINGS}
        taught = {"teacher_sha256": run["teacher_sha256"]} if run.get("teacher_sha256") else {}
        for name, value in {**setting, **taught}.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: values for name, values in found.items() if len(values) > 1}


def runs_by_method(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Test accuracies of each method that was run, in per cent, by seed; methods in the book's order.

    Raises:
        ValueError: the rows mix settings or teachers, or hold a seed twice.
    """
    students = rows[rows["method"].isin(METHODS)]
    if several := mixed(students):
        named = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in several.items())
        raise ValueError(f"the runs mix {named}: choose rows with one {' and one '.join(several)}")
    if (twice := students.duplicated(["method", "seed"])).any():
        row = students[twice].iloc[0]
        raise ValueError(f"{row['method']} has seed {row['seed']} twice: choose the rows of one campaign")
    found = [method for method in METHODS if (students["method"] == method).any()]
    accuracy = students.set_index("seed").sort_index()
    return {m: accuracy.loc[accuracy["method"] == m, "test_accuracy"].astype(float).rename(m) for m in found}


def complete(rows: pd.DataFrame, methods: Iterable[str] = METHODS, runs: int = 2) -> bool:
    """Whether each of `methods` has at least so many runs: below two there is no spread, and no statistics."""
    return bool((rows["method"].value_counts().reindex(list(methods), fill_value=0) >= runs).all())


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean of runs, and its 95 % t-interval: NaN for a single one."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(1 - SIGNIFICANCE)
    return float(values.mean()), float(low), float(high)


def against(baseline: str, methods: Iterable[str] = METHODS) -> list[tuple[str, str]]:
    """The pairs that compare each of the other methods with one baseline."""
    return [(method, baseline) for method in methods if method != baseline]


def unpaired(first: pd.Series, second: pd.Series) -> Comparison:
    """Compare two methods whose runs share nothing: Welch's t-test, and permutations of all runs.

    g is in units of the pooled standard deviation of the runs.

    Raises:
        ValueError: fewer than two runs of a method, or no spread in either.
    """
    a, b = _samples(first, second)
    test = stats.ttest_ind(a, b, equal_var=False)
    size = math.sqrt(1 / len(a) + 1 / len(b))
    pooled = stats.ttest_ind(a, b)
    effect = _hedges_g(float(pooled.statistic), float(pooled.df), size)
    return _comparison(a, b, test, effect, paired=False)


def paired(first: pd.Series, second: pd.Series) -> Comparison:
    """Compare two methods seed by seed: for runs that share initial weights, order of the images and crops.

    In this book's ledger they do. g is in units of the standard deviation of the differences between paired runs.

    Raises:
        ValueError: the seeds differ, there are fewer than two, or every pair has the same difference.
    """
    a, b = _pairs(first, second)
    test = stats.ttest_rel(a, b)
    effect = _hedges_g(float(test.statistic), float(test.df), 1 / math.sqrt(len(a)))
    return _comparison(a, b, test, effect, paired=True)


def equivalence(first: pd.Series, second: pd.Series, margin: float) -> Equivalence:
    """Test whether two methods differ by less than `margin` points: runs that share nothing, unequal variances.

    A large p of an ordinary test is no evidence for equality; a small p of this one is. The margin is chosen before
    looking (Lakens 2017, doi 10.1177/1948550617697177).

    Raises:
        ValueError: the margin is not above 0, fewer than two runs of a method, or no spread in either.
    """
    _check_margin(margin)
    a, b = _samples(first, second)
    p, *_sides = ttost_ind(a, b, -margin, margin, usevar="unequal")
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * SIGNIFICANCE)
    return Equivalence(min(len(a), len(b)), float(a.mean() - b.mean()), float(low), float(high), float(p))


def paired_equivalence(first: pd.Series, second: pd.Series, margin: float) -> Equivalence:
    """The same, seed by seed, for runs that share their seeds.

    Raises:
        ValueError: as in `paired`, or the margin is not above 0.
    """
    _check_margin(margin)
    a, b = _pairs(first, second)
    p, *_sides = ttost_paired(a, b, -margin, margin)
    low, high = stats.ttest_rel(a, b).confidence_interval(1 - 2 * SIGNIFICANCE)
    return Equivalence(len(a), float((a - b).mean()), float(low), float(high), float(p))


def family(
    rows: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    compare: Callable[[pd.Series, pd.Series], NamedTuple] = unpaired,
    tests: int | None = None,
) -> pd.DataFrame:
    """Compare every pair of methods, and correct for how many tests the family has (Holm 1979).

    Args:
        rows: of the ledger, one experiment.
        pairs: methods to compare, first minus second.
        tests: how many the family has, if these pairs are a part of it.
        compare: `unpaired`, `paired`, or one of the equivalence tests with its margin filled in.

    Returns:
        Columns first, second, the fields of the comparison, and for each p-value its correction, as p_holm.

    Raises:
        ValueError: a method was not run, or cannot be compared.
    """
    runs = runs_by_method(rows)
    if missing := sorted({method for pair in pairs for method in pair} - set(runs)):
        instead = f", or compare only {', '.join(runs)}" if runs else ""
        raise ValueError(f"no run of {', '.join(missing)}: train these first{instead}")
    return _corrected([{"first": a, "second": b, **compare(runs[a], runs[b])._asdict()} for a, b in pairs], tests)


def interaction(rows: pd.DataFrame, parts: tuple[str, str] = ("kd", "ig")) -> Comparison:
    """What two parts add together beyond the sum of what each adds: synergy, in points, without the third part.

    Of runs that share nothing: the interaction in a linear model of four methods. NaN for what only pairs have.

    Raises:
        ValueError: one of the four methods has fewer than two runs.
    """
    four = rows[rows["method"].isin(("student", *parts, "_".join(parts)))]
    if not complete(four, ("student", *parts, "_".join(parts))):
        raise ValueError(f"an interaction of {' and '.join(parts)} needs two runs or more of four methods: train these")
    switches = {
        part: four["method"].str.split("_").map(lambda its, part=part: part in its).astype(int) for part in parts
    }
    fit = ols(f"test_accuracy ~ {' * '.join(parts)}", four.astype({"test_accuracy": float}).assign(**switches)).fit()
    term = ":".join(parts)
    numbers = dict.fromkeys(Comparison._fields, math.nan)
    numbers |= dict(zip(("low", "high"), fit.conf_int(SIGNIFICANCE).loc[term], strict=True))
    runs = int(four["method"].value_counts().min())
    return Comparison(**numbers | {"runs": runs, "difference": fit.params[term], "p": fit.pvalues[term]})


def between(
    first: pd.DataFrame,
    second: pd.DataFrame,
    methods: Sequence[str] = METHODS[1:],
    compare: Callable[[pd.Series, pd.Series], NamedTuple] = paired,
) -> pd.DataFrame:
    """Compare each method with itself in another setting, and correct for how many methods there are (Holm 1979).

    Args:
        first, second: rows of the ledger, one experiment each; first minus second.
        methods: without `student` where the settings concern a teacher: its runs would be compared with themselves.
        compare: as in `family`.

    Returns:
        Columns method, the fields of the comparison, and for each p-value its correction, as p_holm.

    Raises:
        ValueError: a method was not run in both, or cannot be compared.
    """
    a, b = runs_by_method(first), runs_by_method(second)
    if missing := [method for method in methods if method not in a or method not in b]:
        raise ValueError(f"no run of {', '.join(missing)} in one of the two settings: train these first")
    return _corrected([{"method": method, **compare(a[method], b[method])._asdict()} for method in methods])


def _corrected(lines: list[dict], tests: int | None = None) -> pd.DataFrame:
    table = pd.DataFrame(lines)
    for name in [name for name in table.columns if name == "p" or name.startswith("p_")]:
        table[f"{name}_holm"] = holm(table[name], tests)
    return table


def holm(p_values: ArrayLike, tests: int | None = None) -> np.ndarray:
    """Holm's correction (1979) of p-values, (tests, ...), for a family of fixed size: NaN stays NaN.

    A test that was not made yet counts as if it showed nothing. So one that arrives later may help the others, and
    never undoes what they have shown.

    Args:
        tests: how many belong to the family, made or not; None takes those that are given, NaN included.

    Raises:
        ValueError: more p-values are given than the family has tests.
    """
    # As statsmodels' multipletests, which a test holds it to: that one takes 30 ms a call, and one family at a time.
    given = np.asarray(p_values, dtype=float)
    if (tests := len(given) if tests is None else tests) < len(given):
        raise ValueError(f"{len(given)} p-values for a family of {tests} tests: count all tests of the family")
    order = np.argsort(given, axis=0)  # NaN last
    steps = np.arange(tests, tests - len(given), -1).reshape(-1, *[1] * (given.ndim - 1))
    ascending = np.maximum.accumulate(np.take_along_axis(given, order, 0) * steps, axis=0)
    return np.minimum(np.take_along_axis(ascending, np.argsort(order, axis=0), 0), 1)


def papers_procedure(rows: pd.DataFrame, baseline: str = "student") -> pd.DataFrame:
    """What the paper reports: the best run of each method, and a paired t-test on runs in the order of their list.

    Returns:
        Index method; columns mean, best, best_above_mean (points), p (NaN for the baseline).
    """
    runs = {method: values.to_numpy() for method, values in runs_by_method(rows).items()}
    table = pd.DataFrame({m: {"mean": values.mean(), "best": values.max()} for m, values in runs.items()}).T
    table["best_above_mean"] = table["best"] - table["mean"]
    table["p"] = [
        np.nan if method == baseline else stats.ttest_rel(values, runs[baseline]).pvalue
        for method, values in runs.items()
    ]
    return table.rename_axis("method")


def p_values_of_listings(first: pd.Series, second: pd.Series, listings: int = 5000, seed: int = 0) -> np.ndarray:
    """p-values of the paired t-test on the same runs, each time with the first method's listed in another order."""
    a, b = _samples(first, second)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} runs cannot be paired: give as many of each method")
    orders = np.random.default_rng(seed).permuted(np.tile(a, (listings, 1)), axis=1)
    return stats.ttest_rel(orders, b, axis=1).pvalue


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


def power(gain: float, deviation: float, runs: int, alpha: float = SIGNIFICANCE) -> float:
    """Chance, from 0 to 1, that the two-sample t-test sees a true `gain` with `runs` runs of each method.

    Args:
        gain: true difference of the means, points.
        deviation: standard deviation from seed to seed, points; a value fixed beforehand, not the runs' own.
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


def _power(noncentrality: float, df: int, alpha: float) -> float:
    """Power of a two-sided t-test."""
    # t² is F. statsmodels goes through SciPy's noncentral t, which gives NaN for some large effects.
    critical = special.fdtri(1, df, 1 - alpha)
    return float(1 - special.ncfdtr(1, df, noncentrality**2, critical))


def _fewest(power_of: Callable[[int], float], chance: float) -> int:
    """The smallest number of runs, at least two, whose power reaches `chance`; power grows with the runs."""
    enough = 2
    while power_of(enough) < chance:
        enough *= 2
    few = max(enough // 2, 1)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if power_of(middle) >= chance else (middle, enough)
    return enough


def _comparison(a: np.ndarray, b: np.ndarray, test: object, effect: Sequence[float], paired: bool) -> Comparison:
    """The parts that both designs share; `paired` says to both resampling methods what may be exchanged."""
    bootstrap = stats.bootstrap(
        (a, b), _difference, paired=paired, n_resamples=RESAMPLES, vectorized=True, rng=np.random.default_rng(0)
    )
    numbers = (
        a.mean() - b.mean(),
        *test.confidence_interval(1 - SIGNIFICANCE),
        *bootstrap.confidence_interval,
        test.pvalue,
        sign_flips(a - b) if paired else reshuffled(a, b),
        *effect,
    )
    return Comparison(min(len(a), len(b)), *map(float, numbers))


def sign_flips(differences: np.ndarray) -> float:
    """p of the permutation test for pairs, which flips the sign of each pair's difference; NaN for one pair.

    Exact where all ways can be tried (arXiv 2511.19794 on few seeds), else from 9,999 drawn ones.
    """
    pairs = len(differences)
    if pairs < 2:
        return math.nan
    if 2**pairs > ENUMERATED:
        return _drawn_p((differences,), np.mean, "samples")
    return _two_sided(_signs(pairs) @ differences, differences.sum())


def reshuffled(first: np.ndarray, second: np.ndarray) -> float:
    """p of the permutation test for runs that share nothing: exact where all splits can be tried, else drawn."""
    if math.comb(len(first) + len(second), len(first)) > ENUMERATED:
        return _drawn_p((first, second), _difference, "independent")
    means = np.concatenate([first, second])[_splits(len(first), len(second))].mean(1)
    return _two_sided(means, first.mean())


def _drawn_p(samples: tuple[np.ndarray, ...], statistic: Callable, kind: str) -> float:
    drawn = np.random.default_rng(0)
    options = {"permutation_type": kind, "n_resamples": RESAMPLES, "vectorized": True, "rng": drawn}
    return float(stats.permutation_test(samples, statistic, **options).pvalue)


@cache
def _signs(pairs: int) -> np.ndarray:
    """All ways to flip signs, a row each."""
    return np.array(list(product((1, -1), repeat=pairs)), dtype=np.int8)


@cache
def _splits(first: int, second: int) -> np.ndarray:
    """All choices of `first` positions out of both, a row each: a list that SciPy makes anew each time."""
    return np.array(list(combinations(range(first + second), first)), dtype=np.uint8)


def _two_sided(null: np.ndarray, observed: float) -> float:
    """Twice the smaller tail, as SciPy has it."""
    slack = TIED * np.abs(null).max()
    return float(min(1.0, 2 * min((null >= observed - slack).mean(), (null <= observed + slack).mean())))


def _difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis=axis) - b.mean(axis=axis)


def _hedges_g(t: float, df: float, size: float) -> tuple[float, float, float]:
    """Standardised effect of a t statistic, times Hedges' exact correction; the interval inverts the noncentral t."""
    # Hedges 1981, doi 10.3102/10769986006002107.
    if df == 1:
        return math.nan, math.nan, math.nan  # two pairs: the expectation does not exist
    correction = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    limits = special.nctdtrinc(df, (1 - SIGNIFICANCE / 2, SIGNIFICANCE / 2), t)
    return tuple(correction * size * float(shift) for shift in (t, *limits))


def _samples(first: pd.Series, second: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    for values, given in ((a, first), (b, second)):
        if len(values) < 2:
            raise ValueError(f"{_name(given)} has {len(values)} run: a spread needs two or more, train more seeds")
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        raise ValueError(
            f"all runs of {_name(first)} and of {_name(second)} end alike, at {a[0]:.2f} and {b[0]:.2f} %: there is no "
            "spread to compare with; check that their seeds differ"
        )
    return a, b


def _pairs(first: pd.Series, second: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    if sorted(first.index) != sorted(second.index):
        raise ValueError(
            f"{_name(first)} has seeds {sorted(first.index)} and {_name(second)} has {sorted(second.index)}: pair only "
            "runs with the same seeds, or use unpaired"
        )
    a, b = _samples(first.sort_index(), second.sort_index())
    if math.isclose(np.ptp(a - b), 0, abs_tol=1e-9):
        raise ValueError(
            f"{_name(first)} and {_name(second)} differ by {a[0] - b[0]:+.2f} with every seed: the differences have no "
            "spread; check that these are different runs"
        )
    return a, b


def _name(values: pd.Series) -> str:
    return str(getattr(values, "name", None) or "a method")


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ValueError(
            f"margin {margin} is not above 0: give the largest difference, in points, that is of no interest"
        )


def _check_deviation(deviation: float) -> None:
    if not deviation > 0:
        raise ValueError(f"deviation {deviation} is not above 0: give the spread from seed to seed, in points")


def _check_plan(gain: float, deviation: float, chance: float, alpha: float) -> None:
    _check_deviation(deviation)
    if gain == 0:
        raise ValueError("gain 0 is never seen, however many seeds: give the smallest gain that is worth finding")
    if not alpha < chance < 1:
        raise ValueError(f"chance {chance} is outside ({alpha}, 1): 0.8 is usual")
