"""Permutation tests of means: exact where all permutations can be tried, else from drawn ones.

Both are two-sided, as SciPy's `permutation_test`; the lists that it makes anew at each call are kept.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 9999
ENUMERATED = 200_000  # permutations up to which all are tried: ten runs against ten have 184,756, ten pairs 1,024
TIED = 1e-9  # relative: sums that differ by less are the same, but for rounding


def check_known(numbers: ArrayLike, what: str) -> None:
    """Raise ValueError if one of `numbers`, (N,), is missing (NaN) or infinite; the message names it and its place.

    Of a table's column the place is the row's label, as the seed.
    """
    values = np.asarray(numbers, dtype=float)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        place = numbers.index[bad[0]] if isinstance(numbers, pd.Series) else bad[0]
        raise ValueError(
            f"{what}: {values[bad[0]]} at {place}, {len(bad)} of {len(values)} are missing or infinite: leave these "
            "out, or measure them again"
        )


def sign_flips(differences: NDArray) -> float:
    """p of the permutation test for pairs, which flips the sign of each pair's difference; NaN for one pair.

    Exact where all ways can be tried (arXiv 2511.19794 on few seeds), else from 9,999 drawn ones.
    """
    check_known(differences, "difference")
    pairs = len(differences)
    if pairs < 2:
        return math.nan
    if 2**pairs > ENUMERATED:
        return _drawn_p((differences,), np.mean, "samples")
    return _two_sided(_signs(pairs) @ differences, differences.sum())


def reshuffled(first: NDArray, second: NDArray) -> float:
    """p of the permutation test for runs that share nothing: exact where all splits can be tried, else drawn.

    Raises:
        ValueError: a method has no run, or one is NaN.
    """
    for runs in (first, second):
        check_known(runs, "test accuracy")
    if not min(len(first), len(second)):
        raise ValueError(f"{len(first)} runs against {len(second)}: a permutation test needs one or more of each")
    if math.comb(len(first) + len(second), len(first)) > ENUMERATED:
        return _drawn_p((first, second), difference, "independent")
    means = np.concatenate([first, second])[_splits(len(first), len(second))].mean(1)
    return _two_sided(means, first.mean())


def _drawn_p(samples: tuple[NDArray, ...], statistic: Callable, kind: str) -> float:
    options = {"n_resamples": RESAMPLES, "vectorized": True, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test(samples, statistic, permutation_type=kind, **options).pvalue)


@cache
def _signs(pairs: int) -> NDArray:
    """All ways to flip signs, a row each."""
    return np.array(list(product((1, -1), repeat=pairs)), dtype=np.int8)


@cache
def _splits(first: int, second: int) -> NDArray:
    """All choices of `first` positions out of both, a row each: a list that SciPy makes anew each time."""
    kind = np.min_scalar_type(first + second)
    return np.array(list(combinations(range(first + second), first)), dtype=kind)


def _two_sided(null: NDArray, observed: float) -> float:
    """Twice the smaller tail, as SciPy has it."""
    slack = TIED * np.abs(null).max()
    return float(min(1.0, 2 * min((null >= observed - slack).mean(), (null <= observed + slack).mean())))


def difference(a: NDArray, b: NDArray, axis: int = -1) -> NDArray:
    """Of the means of two samples, along an axis."""
    return a.mean(axis=axis) - b.mean(axis=axis)
