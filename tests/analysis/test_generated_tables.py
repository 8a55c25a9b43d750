"""Tables with holes, and plans without a solution: each comparison is SciPy's number, or is refused in words."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import bare
from scipy import stats

from kdig_utils.analysis import calibration, comparisons, faithfulness, permutation, sample_size, variance
from kdig_utils.analysis.comparisons import (
    equivalence,
    family,
    holm,
    interaction,
    mean_interval,
    paired,
    runs_by_method,
    unpaired,
)
from kdig_utils.analysis.examination import mean_over_images
from kdig_utils.analysis.operating_characteristics import operating_characteristics
from kdig_utils.method.spec import METHODS

ACCURACY = st.integers(9000, 9300).map(lambda x: x / 100)
PAIRS = st.lists(st.tuples(ACCURACY, ACCURACY), max_size=6)
FLAWS = st.sampled_from(["", "", "", "missing", "infinite", "a seed twice", "a seed more", "all alike"])
COMPARISONS: dict[str, Callable] = {
    "unpaired": unpaired,
    "paired": paired,
    "equivalence": partial(equivalence, margin=0.5),
    "equivalence by pairs": partial(equivalence, margin=0.5, by_pairs=True),
}


def by_scipy(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """p of the comparison, from the plain call."""
    if name == "unpaired":
        return stats.ttest_ind(a, b, equal_var=False).pvalue
    if name == "paired":
        return stats.ttest_1samp(a - b, 0).pvalue
    test = (lambda x, **way: stats.ttest_1samp(x - b, 0, **way)) if "pairs" in name else None
    test = test or (lambda x, **way: stats.ttest_ind(x, b, equal_var=False, **way))
    return max(test(a + 0.5, alternative="greater").pvalue, test(a - 0.5, alternative="less").pvalue)


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_a_generated_table_with_holes_gives_scipys_number_or_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "RESAMPLES", 99)  # of the bootstrap, which is not what is asked here
    outcomes: Counter[str] = Counter()

    @given(PAIRS, FLAWS, st.sampled_from(list(COMPARISONS)), st.integers(0, 99))
    @settings(max_examples=200, deadline=None, derandomize=True)
    def holds(pairs: list[tuple[float, float]], flaw: str, name: str, order: int) -> None:
        first, second = [a for a, _b in pairs], [b for _a, b in pairs]
        second += [math.nan] * (flaw == "missing") + [90.5] * (flaw == "a seed more")
        first += [math.inf] * (flaw == "infinite")
        if flaw == "all alike":
            first, second = [90.0] * len(first), [90.0] * len(second)
        rows = bare({"kd": first, "student": second})
        rows = pd.concat([rows, rows.head(int(flaw == "a seed twice"))], ignore_index=True)
        try:
            table = family(rows.sample(frac=1, random_state=order), [("kd", "student")], COMPARISONS[name])
        except ValueError as refused:
            found, said = None, str(refused)
        else:
            found = table.iloc[0]
        outcomes["refused" if found is None else "right"] += 1
        if found is None:
            assert ": " in said
            return
        a, b = np.array(first), np.array(second)
        assert not flaw or (flaw == "a seed more" and name in ("unpaired", "equivalence"))
        assert found["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-9)
        assert found["p"] == pytest.approx(by_scipy(name, a, b), rel=1e-6, abs=1e-12)
        assert found["low"] <= found["difference"] <= found["high"]
        assert not found.drop(["first", "second"]).isin([math.inf, -math.inf]).any()
        assert 0 < found.get("p_permutation", 1) <= 1

    holds()
    print(f"generated tables: {dict(outcomes)}")
    assert min(outcomes["right"], outcomes["refused"]) > 50


def test_a_missing_accuracy_makes_nothing_significant() -> None:
    rows = bare({method: np.random.default_rng(0).normal(90, 0.3, 5) for method in METHODS})
    rows.loc[rows.index[7], "test_accuracy"] = math.nan
    method, seed = rows.iloc[7][["method", "seed"]]
    asked: list[Callable[[], object]] = [
        lambda: family(rows, [("kd", "student")]),
        lambda: interaction(rows),
        lambda: variance.normality(rows),
        lambda: runs_by_method(rows),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=rf"{method}: nan at {seed}.*leave these out"):
            ask()
    level = bare({name: [90.0, 90.0] for name in ("student", "kd", "ig", "kd_ig")})
    with pytest.raises(ValueError, match="no spread"):  # p would be 0, of nothing
        interaction(level.assign(test_accuracy=level["test_accuracy"] + (level["method"] == "kd")))
    with pytest.raises(ValueError, match="nan at 7"):
        variance.variance_components(rows.reset_index(drop=True), "seed", fixed=["method"])
    for numbers in ([91, math.nan], [91, math.inf]):
        for test in (mean_interval, permutation.sign_flips, lambda a: permutation.reshuffled(np.array([1.0]), a)):
            with pytest.raises(ValueError, match=r"(nan|inf) at 1"):
                test(np.array(numbers))


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_holms_correction_is_that_of_the_tests_that_were_made(p_values: list[float]) -> None:
    made = np.array([p for p in p_values if not math.isnan(p)])
    by_hand = [min(1, max(q * (made >= q).sum() for q in made[made <= p])) for p in made]
    np.testing.assert_allclose(holm(made), by_hand)
    np.testing.assert_array_equal(np.isnan(holm(p_values)), np.isnan(p_values))


@pytest.mark.parametrize("p", [-0.01, 1.5, math.inf])
def test_what_is_no_chance_is_not_corrected(p: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        holm([0.5, p])


def test_one_run_against_three_hundred_is_enumerated() -> None:
    found = permutation.reshuffled(np.array([1000.0]), np.arange(300.0))
    assert found == pytest.approx(2 / 301)
    with pytest.raises(ValueError, match="0 runs"):
        permutation.reshuffled(np.array([]), np.arange(3.0))


PLANS = {
    "gain NaN": (lambda: sample_size.seeds_needed(math.nan, 0.3), "gain nan"),
    "endless gain": (lambda: sample_size.seeds_needed(math.inf, 0.3), "gain inf"),
    "endless spread": (lambda: sample_size.seeds_needed(0.1, math.inf), "deviation inf.*finite"),
    "too many runs": (lambda: sample_size.seeds_needed(1e-9, 0.3), "more than 1,000,000,000 runs"),
    "certainty": (lambda: sample_size.seeds_needed(0.1, 0.3, chance=1.0), "chance 1"),
    "chance = level": (lambda: sample_size.seeds_needed(0.1, 0.3, chance=0.05), r"chance 0\.05"),
    "spread NaN": (lambda: sample_size.power(0.1, math.nan, 10), "deviation nan"),
    "chance NaN": (lambda: sample_size.seeds_needed(0.1, 0.3, chance=math.nan), "chance nan"),
    "power of no run": (lambda: sample_size.power(0.1, 0.3, 0), "0 runs"),
    "level of 0": (lambda: sample_size.power(0.1, 0.3, 10, alpha=0), "alpha 0"),
    "power of one run": (lambda: sample_size.power(0.1, 0.3, 1), "1 runs"),
    "best of none": (lambda: sample_size.best_of_normal(0), "n = 0"),
    "best of NaN": (lambda: sample_size.best_of_normal(math.nan), "n = nan"),
    "best of 2.5": (lambda: sample_size.best_of_normal(2.5), r"n = 2\.5"),
    "margin": (lambda: equivalence(pd.Series([1, 2]), pd.Series([1, 3]), math.inf), "margin inf"),
    "no studies": (lambda: operating_characteristics(studies=0), "studies 0"),
    "correlation": (lambda: operating_characteristics(correlation=-0.5), r"correlation -0\.5"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_without_a_solution_is_refused_in_words(name: str) -> None:
    ask, message = PLANS[name]
    with pytest.raises(ValueError, match=rf"{message}.*: "):
        ask()


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 2000, 10**6, 10**9])
def test_the_best_of_very_many_has_a_height(n: int) -> None:
    mean, deviation = sample_size.best_of_normal(n)
    middle = stats.norm.isf(-math.expm1(math.log(0.5) / n))  # the median of the highest, in closed form
    assert 0 <= mean - middle < 0.12 or n == 1
    assert 0 < deviation <= 1


@given(st.floats(1e-3, 1e200), st.floats(1e-200, 1e3), st.integers(2, 10**8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_power_is_a_chance_at_any_effect(gain: float, deviation: float, runs: int) -> None:
    assert 0.05 - 1e-9 <= sample_size.power(gain, deviation, runs) <= 1
    assert sample_size.power(-gain, deviation, runs) == sample_size.power(gain, deviation, runs)


@pytest.mark.parametrize(
    ("confidence", "right"), [([0.5, math.nan], [1, 0]), ([1.5], [1]), ([-0.1], [0]), ([], []), ([0.5, 0.6], [1])]
)
def test_a_confidence_that_is_none_has_no_calibration(confidence: list[float], right: list[int]) -> None:
    with pytest.raises(ValueError, match=r"give one in \[0, 1\]"):
        calibration.calibration(np.array(confidence), np.array(right, bool))


def test_maps_with_holes_are_compared_with_nothing() -> None:
    maps = torch.rand(2, 8, 8)
    holes = maps.clone()
    holes[1, 0, 0] = math.nan
    target = torch.tensor([0, 1])
    for ask in (
        lambda: faithfulness.similarity(maps, holes),
        lambda: faithfulness.pointing(holes, target),
        lambda: faithfulness.perturbation_curve(lambda x: x.flatten(1), maps[:, None], maps[:, None], holes, target, 2),
    ):
        with pytest.raises(ValueError, match="1 of 2 maps hold NaN"):
            ask()
    with pytest.raises(ValueError, match="give one an image"):
        faithfulness.perturbation_curve(lambda x: x.flatten(1), maps[:, None], maps[:, None], maps[:, :4], target, 2)
    assert math.isnan(mean_over_images(torch.tensor([], dtype=torch.bool)).value)
