"""Is one method better than another? Differences between methods with intervals, tests and effect sizes.

Every function takes test accuracies in per cent: rows of the ledger, or the runs of two methods. The tests are SciPy's;
this module chooses among them, and corrects for how many were made.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from statsmodels.formula.api import ols
from statsmodels.regression.linear_model import RegressionResultsWrapper

from kdig_utils.analysis.claims import SIGNIFICANCE, paper
from kdig_utils.analysis.permutation import RESAMPLES, check_known, difference, reshuffled, sign_flips
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method.spec import METHODS

# What tells runs of the paper apart, which have no spec.
SETTINGS = ("k", "epochs", "pairing", "train_fraction")
TIED = 1e-9  # points: runs that differ by less end alike, but for rounding
_welch = partial(stats.ttest_ind, equal_var=False)
Compare = Callable[[pd.Series, pd.Series], NamedTuple]


class Comparison(NamedTuple):
    """First method minus second, in points of test accuracy."""

    runs: int  # of the method that has fewer
    difference: float  # of the means
    low: float  # of its 95 % interval from the t distribution
    high: float
    bootstrap_low: float  # the same from 9,999 bootstrap samples (BCa)
    bootstrap_high: float
    p: float  # of the t-test
    p_permutation: float  # of the difference of means: exact where all can be enumerated, else from 9,999 drawn ones
    g: float  # standardised effect, corrected for small samples (Hedges), and its 95 % interval; NaN for two pairs
    g_low: float
    g_high: float


class Equivalence(NamedTuple):
    """Two one-sided tests: is the difference, in points, smaller than a margin in both directions?"""

    runs: int  # of the method that has fewer
    difference: float  # of the means
    low: float  # of its 90 % interval, which lies inside the margin exactly if p < 0.05
    high: float
    p: float  # the larger one of the two one-sided tests


def paper_rows() -> pd.DataFrame:
    """The paper's ten runs of each method, in the columns of the ledger.

    The paper gives no seeds: `seed` is the place in its list, and two methods share nothing but that number.
    """
    rows = [
        {"campaign": "paper", "method": method, "k": 5, "seed": place, "test_accuracy": accuracy}
        for method in METHODS
        for place, accuracy in enumerate(paper()["ablation_runs"][method])
    ]
    return pd.DataFrame(rows).assign(pairing="", epochs=paper()["training"]["epochs"], train_fraction=1.0)


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
        ValueError: the rows mix settings or teachers, hold a seed twice, or one has no test accuracy.
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
    return {m: _known(accuracy.loc[accuracy["method"] == m, "test_accuracy"].rename(m)) for m in found}


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean of runs, and its 95 % t-interval: NaN for a single one, all three for none; no run may be NaN."""
    runs, low, high = _known(pd.Series(values, dtype=float)), math.nan, math.nan
    if len(runs) > 1:
        low, high = stats.ttest_1samp(runs, 0.0).confidence_interval(1 - SIGNIFICANCE)
    return float(runs.mean()), float(low), float(high)


def unpaired(first: pd.Series, second: pd.Series) -> Comparison:
    """Compare two methods whose runs share nothing: Welch's t-test, and permutations of all runs.

    g is in units of the pooled standard deviation of the runs.

    Raises:
        ValueError: fewer than two runs of a method, no spread in either, or one is NaN.
    """
    a, b = _samples(first, second)
    test, pooled = _welch(a, b), stats.ttest_ind(a, b)
    effect = _hedges_g(pooled.statistic, pooled.df, math.sqrt(1 / len(a) + 1 / len(b)))
    interval = (*test.confidence_interval(1 - SIGNIFICANCE), *_bootstrap(a, b, paired=False))
    numbers = (a.mean() - b.mean(), *interval, test.pvalue, reshuffled(a, b), *effect)
    return Comparison(min(len(a), len(b)), *map(float, numbers))


def paired(first: pd.Series, second: pd.Series) -> Comparison:
    """Compare two methods seed by seed: for runs that share initial weights, order of the images and crops.

    In this book's ledger they do. g is in units of the standard deviation of the differences between paired runs.

    Raises:
        ValueError: the seeds differ or come twice, there are fewer than two, every pair has the same difference, or an
            accuracy is NaN.
    """
    a, b = _pairs(first, second)
    test = stats.ttest_rel(a, b)
    effect = _hedges_g(test.statistic, test.df, 1 / math.sqrt(len(a)))
    interval = (*test.confidence_interval(1 - SIGNIFICANCE), *_bootstrap(a, b, paired=True))
    numbers = (a.mean() - b.mean(), *interval, test.pvalue, sign_flips(a - b), *effect)
    return Comparison(len(a), *map(float, numbers))


def equivalence(first: pd.Series, second: pd.Series, margin: float, by_pairs: bool = False) -> Equivalence:
    """Test whether two methods differ by less than `margin` points: unequal variances, or seed by seed.

    A large p of an ordinary test is no evidence for equality; a small p of this one is. The margin is chosen before
    looking (Lakens 2017, doi 10.1177/1948550617697177).

    Raises:
        ValueError: the margin is not above 0 and finite, or as in `unpaired` and `paired`.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin {margin} is not above 0 and finite: give the largest difference of no interest")
    (a, b), test = (_pairs(first, second), stats.ttest_rel) if by_pairs else (_samples(first, second), _welch)
    low, high = test(a, b).confidence_interval(1 - 2 * SIGNIFICANCE)
    above, below = test(a + margin, b, alternative="greater"), test(a - margin, b, alternative="less")
    numbers = (a.mean() - b.mean(), low, high, max(above.pvalue, below.pvalue))
    return Equivalence(min(len(a), len(b)), *map(float, numbers))


def family(rows: pd.DataFrame, pairs: Sequence[tuple[str, str]], compare: Compare = unpaired) -> pd.DataFrame:
    """Compare every pair of methods, and correct for how many tests the family has (Holm 1979).

    Args:
        rows: of the ledger, one experiment.
        pairs: methods to compare, first minus second.
        compare: `unpaired`, `paired`, or `equivalence` with its margin filled in.

    Returns:
        Columns first, second, the fields of the comparison, and for each p-value its correction, as p_holm.

    Raises:
        ValueError: a method was not run, or cannot be compared.
    """
    runs = runs_by_method(rows)
    if missing := sorted({method for pair in pairs for method in pair} - set(runs)):
        instead = f", or compare only {', '.join(runs)}" if runs else ""
        raise ValueError(f"no run of {', '.join(missing)}: train these first{instead}")
    table = pd.DataFrame([{"first": a, "second": b, **compare(runs[a], runs[b])._asdict()} for a, b in pairs])
    names = [name for name in table.columns if name == "p" or name.startswith("p_")]
    return table.assign(**{f"{name}_holm": holm(table[name]) for name in names})


def interaction(rows: pd.DataFrame, parts: tuple[str, str] = ("kd", "ig")) -> Comparison:
    """What two parts add together beyond the sum of what each adds: synergy, in points, without the third part.

    Of runs that share nothing: the interaction in a linear model of four methods. NaN for what only pairs have.

    Raises:
        ValueError: one of the four methods has fewer than two runs, or as in `runs_by_method` and `fitted`.
    """
    methods = ("student", *parts, "_".join(parts))
    four = rows[rows["method"].isin(methods)].astype({"test_accuracy": float})
    found = runs_by_method(four)
    runs = min(len(found.get(method, ())) for method in methods)
    if runs < 2:
        raise ValueError(f"an interaction of {' and '.join(parts)} needs two runs or more of four methods: train these")
    for part in parts:
        four[part] = [int(part in method.split("_")) for method in four["method"]]
    fit, term = fitted(f"test_accuracy ~ {' * '.join(parts)}", four), ":".join(parts)
    low, high = fit.conf_int(SIGNIFICANCE).loc[term]
    unknown = dict.fromkeys(Comparison._fields, math.nan)
    known = {"difference": fit.params[term], "low": low, "high": high, "p": fit.pvalues[term]}
    return Comparison(**{**unknown, **known, "runs": runs})


def fitted(formula: str, rows: pd.DataFrame) -> RegressionResultsWrapper:
    """Ordinary least squares; ValueError if runs of one kind all end alike: what does not vary shows nothing."""
    fit = ols(formula, rows, missing="raise").fit()
    if not (fit.df_resid >= 1 and np.abs(fit.resid).max() > TIED):
        raise ValueError(
            f"{len(rows)} runs leave no spread around {formula}: train more seeds, and check that their seeds differ"
        )
    return fit


def holm(p_values: ArrayLike, tests: int | None = None) -> NDArray:
    """Holm's correction (1979) of p-values, (tests, ...), for a family of fixed size: NaN stays NaN.

    A test that was not made yet counts as if it showed nothing. So one that arrives later may help the others, and
    never undoes what they have shown.

    Args:
        tests: how many belong to the family, made or not; None takes those that are given, NaN included.

    Raises:
        ValueError: more p-values are given than the family has tests, or one is outside [0, 1].
    """
    # As statsmodels' multipletests, which a test holds it to: that one takes 30 ms a call, and one family at a time.
    given = np.asarray(p_values, dtype=float)
    if (tests := len(given) if tests is None else tests) < len(given):
        raise ValueError(f"{len(given)} p-values for a family of {tests} tests: count all tests of the family")
    if ((given < 0) | (given > 1)).any():
        raise ValueError(f"p-values from {np.nanmin(given)} to {np.nanmax(given)} are no chances: give 0 to 1, or NaN")
    order = np.argsort(given, axis=0)  # NaN last
    steps = np.arange(tests, tests - len(given), -1).reshape(-1, *[1] * (given.ndim - 1))
    ascending = np.maximum.accumulate(np.take_along_axis(given, order, 0) * steps, axis=0)
    return np.minimum(np.take_along_axis(ascending, np.argsort(order, axis=0), 0), 1)


def _bootstrap(a: NDArray, b: NDArray, paired: bool) -> tuple[float, float]:
    options = {"paired": paired, "n_resamples": RESAMPLES, "vectorized": True, "rng": np.random.default_rng(0)}
    low, high = stats.bootstrap((a, b), difference, **options).confidence_interval
    return low, high


def _hedges_g(t: float, df: float, size: float) -> tuple[float, float, float]:
    """Standardised effect of a t statistic, times Hedges' exact correction; the interval inverts the noncentral t."""
    # Hedges 1981, doi 10.3102/10769986006002107.
    if df == 1:
        return math.nan, math.nan, math.nan  # two pairs: the expectation does not exist
    correction = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    low, high = special.nctdtrinc(df, (1 - SIGNIFICANCE / 2, SIGNIFICANCE / 2), t)
    return correction * size * t, correction * size * low, correction * size * high


def _samples(first: pd.Series, second: pd.Series) -> tuple[NDArray, NDArray]:
    for runs in (first, second):
        if len(runs) < 2:
            raise ValueError(f"{_name(runs)} has {len(runs)} run: a spread needs two or more, train more seeds")
    a, b = _known(first).to_numpy(), _known(second).to_numpy()
    if max(np.ptp(a), np.ptp(b)) < TIED:
        raise ValueError(
            f"all runs of {_name(first)} and of {_name(second)} end alike, at {a[0]:.2f} and {b[0]:.2f} %: there is no "
            "spread to compare with; check that their seeds differ"
        )
    return a, b


def _pairs(first: pd.Series, second: pd.Series) -> tuple[NDArray, NDArray]:
    if sorted(first.index) != sorted(second.index) or first.index.has_duplicates:
        raise ValueError(
            f"{_name(first)} has seeds {sorted(first.index)} and {_name(second)} has {sorted(second.index)}: pair only "
            "runs with the same seeds, each once, or use unpaired"
        )
    a, b = _samples(first.sort_index(), second.sort_index())
    if np.ptp(a - b) < TIED:
        raise ValueError(
            f"{_name(first)} and {_name(second)} differ by {a[0] - b[0]:+.2f} with every seed: the differences have no "
            "spread; check that these are different runs"
        )
    return a, b


def _known(runs: pd.Series) -> pd.Series:
    """The same runs as numbers: a missing one would make some tests NaN and others significant."""
    numbers = runs.astype(float)
    check_known(numbers, f"test accuracy of {_name(runs)}")
    return numbers


def _name(runs: pd.Series) -> str:
    return str(runs.name or "a method")
