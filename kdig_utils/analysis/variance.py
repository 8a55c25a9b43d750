"""Where does the spread come from? Luck: the seed's, and the training images'.

Every function takes rows of the ledger of one experiment; accuracies are in per cent, variances in points squared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.diagnostic import lilliefors

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import runs_by_method
from kdig_utils.analysis.permutation import check_known

LEAST_RUNS = 4  # of statsmodels' Lilliefors


class Components(NamedTuple):
    """Variance between groups and within them, in points squared."""

    between: float  # of the groups' true means; the unbiased estimate, which may fall below 0 and then means 0
    within: float  # of runs in one group
    share: float  # between / (between + within)
    low: float  # of the 95 % interval of the share, exact for normal values
    high: float
    groups: int
    runs: int  # in each group


def normality(rows: pd.DataFrame) -> pd.DataFrame:
    """Two tests of whether the runs of each method are normally distributed: Lilliefors, as in the paper, and Shapiro.

    Returns:
        Index method; columns runs, mean, deviation, lilliefors_p, shapiro_p. statsmodels interpolates a table for the
        former, from 0.001 to 0.99.

    Raises:
        ValueError: a method has fewer than `LEAST_RUNS` runs, all its runs end alike, or as in `runs_by_method`.
    """
    tested = {}
    for method, values in runs_by_method(rows).items():
        if len(values) < LEAST_RUNS:
            raise ValueError(f"{method} has {len(values)} runs: normality needs {LEAST_RUNS} or more, train more seeds")
        check_spread(values, f"all runs of {method}")
        p_values = {"lilliefors_p": lilliefors(values)[1], "shapiro_p": stats.shapiro(values).pvalue}
        tested[method] = {"runs": len(values), "mean": values.mean(), "deviation": values.std(), **p_values}
    return pd.DataFrame.from_dict(tested, orient="index").rename_axis("method")


def variance_components(rows: pd.DataFrame, group: str, fixed: Sequence[str] = ()) -> Components:
    """Split the variance of test accuracies in two: between groups, and within them (classical analysis of variance).

    Seed against training images needs several seeds on each resample: `group` is the column that names the resample.
    With `group="seed"` and `fixed=["method"]` it splits what runs with one seed share from what they do not.

    Args:
        rows: with test_accuracy, `group` and `fixed`; each group with the same number of runs.
        group: the column whose values are a random sample.
        fixed: columns whose effect is taken out first; every group must have each of their values as often.

    Raises:
        ValueError: fewer than two groups, one run in each, groups of different sizes, a run without its accuracy, or
            runs that all end alike.
    """
    counts = pd.crosstab(rows[group], [rows[name] for name in fixed] or [np.zeros(len(rows))]).to_numpy()
    groups, runs = len(counts), int(counts.sum(axis=1).max(initial=0))
    if groups < 2 or runs < 2 or counts.min() < counts.max():
        raise ValueError(
            f"{groups} groups by {group}, of up to {runs} runs: the split needs two groups or more, alike, with two "
            "runs or more each: finish the campaign, or leave out the incomplete groups"
        )
    check_known(rows["test_accuracy"], "test accuracy")
    check_spread(rows["test_accuracy"].astype(float))
    formula = " + ".join(["test_accuracy ~ 1", *(f"C({name})" for name in fixed), f"C({group})"])
    table = anova_lm(ols(formula, rows.astype({"test_accuracy": float})).fit()).loc[[f"C({group})", "Residual"]]
    # The expected mean square between groups is within + runs × between.
    above, within = table["mean_sq"]
    low, high = map(float, share_limits(above, within, runs, *table["df"]))
    between = (above - within) / runs
    return Components(between, within, between / (between + within), low, high, groups, runs)


def share_limits(above: ArrayLike, within: ArrayLike, runs: int, df_above: float, df_below: float) -> NDArray:
    """The 95 % interval of `Components.share`, (2, ...), from the mean squares between groups of `runs` and within."""
    limits = np.multiply.outer(1 / f_limits(df_above, df_below), above)
    return np.maximum(0.0, (limits - within) / (limits + np.multiply(runs - 1, within)))


def check_spread(accuracies: pd.Series, whose: str = "all runs") -> None:
    """Raise ValueError unless the runs differ: no variance can be taken of them."""
    if np.ptp(accuracies) == 0:
        raise ValueError(f"{whose} end alike, at {accuracies.iloc[0]:.2f} %: check that their seeds differ")


def f_limits(df_above: float, df_below: float) -> NDArray:
    """Between which F lies with 95 % chance, the upper limit first."""
    return stats.f(df_above, df_below).ppf([1 - SIGNIFICANCE / 2, SIGNIFICANCE / 2])
