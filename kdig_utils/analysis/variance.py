"""Where does the spread come from? Factors that were switched, and luck: the seed's, and the training images'.

Every function takes rows of the ledger of one experiment; accuracies are in per cent, variances in points squared.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.diagnostic import lilliefors

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import holm, runs_by_method
from kdig_utils.analysis.finite import check_known
from kdig_utils.method.spec import METHODS

FACTORS = ("kd", "ig", "at")
LEAST_RUNS = 4  # of statsmodels' Lilliefors
TERMS = tuple(":".join(term) for order in (1, 2, 3) for term in combinations(FACTORS, order))


class Components(NamedTuple):
    """Variance between groups and within them, in points squared.

    Attributes:
        between: of the groups' true means; the unbiased estimate, which may fall below 0 and then means 0.
        within: of runs in one group.
        share: between / (between + within).
        low, high: 95 % interval of the share, exact for normal values.
        groups, runs: how many groups, and runs in each.
    """

    between: float
    within: float
    share: float
    low: float
    high: float
    groups: int
    runs: int


def factor_effects(rows: pd.DataFrame, blocks: Sequence[str] = ()) -> pd.DataFrame:
    """Main effects and interactions of KD, IG and AT, each switched off and on: a 2³ factorial analysis.

    A main effect is what switching a part on adds, averaged over the others. An interaction of two is what both add
    together beyond the sum of what each adds alone: synergy if positive. That of three is how much switching the third
    on changes the synergy of two. All are in points.

    Args:
        rows: runs of all eight methods.
        blocks: columns whose value is shared by runs of different methods, as `seed` in this book's runs.

    Returns:
        Index term (`kd`, ..., `kd:ig:at`); columns effect, low, high (95 %), p, p_holm.

    Raises:
        ValueError: a method is missing, each has only one run, or all runs end alike.
    """
    runs = runs_by_method(rows)
    if missing := [method for method in METHODS if method not in runs]:
        raise ValueError(f"no run of {', '.join(missing)}: the factorial analysis needs all eight methods")
    if max(map(len, runs.values())) < 2:
        raise ValueError("each method has 1 run: a factorial analysis needs two or more, train more seeds")
    _check_spread(rows["test_accuracy"].astype(float))
    students = rows[rows["method"].isin(METHODS)].astype({"test_accuracy": float})
    # Effect coding, +1 for methods that contain a part and −1 for the others.
    coded = {part: [1.0 if part in name.split("_") else -1.0 for name in students["method"]] for part in FACTORS}
    formula = " + ".join(["test_accuracy ~ kd * ig * at", *(f"C({block})" for block in blocks)])
    fit, terms = ols(formula, students.assign(**coded)).fit(), list(TERMS)
    # So a coefficient is half a main effect, a quarter or an eighth of an interaction.
    scale = pd.Series({term: 2.0 ** (1 + term.count(":")) for term in TERMS})
    low, high = (fit.conf_int(SIGNIFICANCE)[side][terms] * scale for side in (0, 1))
    columns = {"effect": fit.params[terms] * scale, "low": low, "high": high, "p": fit.pvalues[terms]}
    return pd.DataFrame(columns).assign(p_holm=holm(columns["p"])).rename_axis("term")


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
        _check_spread(values, f"all runs of {method}")
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
    _check_spread(rows["test_accuracy"].astype(float))
    formula = " + ".join(["test_accuracy ~ 1", *(f"C({name})" for name in fixed), f"C({group})"])
    table = anova_lm(ols(formula, rows.astype({"test_accuracy": float})).fit()).loc[[f"C({group})", "Residual"]]
    # The expected mean square between groups is within + runs × between.
    above, within = table["mean_sq"]
    low, high = map(float, share_limits(above, within, runs, *table["df"]))
    between = (above - within) / runs
    return Components(between, within, between / (between + within), low, high, groups, runs)


def share_limits(above: ArrayLike, within: ArrayLike, runs: int, df_above: float, df_below: float) -> NDArray:
    """The 95 % interval of `Components.share`, (2, ...), from the mean squares between groups of `runs` and within."""
    limits = np.multiply.outer(1 / _f_limits(df_above, df_below), above)
    return np.maximum(0.0, (limits - within) / (limits + np.multiply(runs - 1, within)))


def _check_spread(accuracies: pd.Series, whose: str = "all runs") -> None:
    if np.ptp(accuracies) == 0:
        raise ValueError(f"{whose} end alike, at {accuracies.iloc[0]:.2f} %: check that their seeds differ")


def _f_limits(df_above: float, df_below: float) -> NDArray:
    """Between which F lies with 95 % chance, the upper limit first."""
    return stats.f(df_above, df_below).ppf([1 - SIGNIFICANCE / 2, SIGNIFICANCE / 2])


def added_variance(together: pd.DataFrame, alone: pd.DataFrame) -> pd.DataFrame:
    """What drawing new training images adds to the seed's variance, by subtraction, for the methods in both tables.

    `together` holds runs in which seed and images change (`monte-carlo`), `alone` runs in which only the seed does
    (`ablation`). The subtraction assumes that the seed's variance is the same in both, although the resamples are
    smaller sets: several seeds on each resample and `variance_components` need no such assumption.

    Returns:
        Index method; columns together, alone, added (points squared; may fall below 0, and then means 0), ratio
        (together / alone), low, high (its 95 % interval, exact for normal values), p (of F, one-sided).

    Raises:
        ValueError: no method has two runs or more in both tables, or runs of `alone` all end alike.
    """
    first, second = runs_by_method(together), runs_by_method(alone)
    shared = [m for m in first if m in second and min(len(first[m]), len(second[m])) > 1]
    if not shared:
        raise ValueError("no method has two runs or more in both tables: train more seeds")
    table = {method: _ratio_of_variances(first[method], second[method]) for method in shared}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("method")


def _ratio_of_variances(together: pd.Series, alone: pd.Series) -> dict[str, float]:
    _check_spread(alone, f"all runs of {alone.name}")
    above, below, df = together.var(), alone.var(), (len(together) - 1, len(alone) - 1)
    ratio, (low, high) = above / below, above / below / _f_limits(*df)
    found = {"together": above, "alone": below, "added": above - below, "ratio": ratio, "low": low, "high": high}
    return {**found, "p": stats.f(*df).sf(ratio)}
