"""Effects and variances that were planted in synthetic ledgers are recovered; what cannot be split is refused."""

import ledgers
import numpy as np
import pandas as pd
import pytest
from chapters import cells_of
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.diagnostic import lilliefors

from kdig_utils.analysis import variance
from kdig_utils.analysis.comparisons import paper_rows
from kdig_utils.experiments import campaigns
from kdig_utils.experiments.ledger import Ledger, spec_of
from kdig_utils.method.spec import METHODS

CHAPTER_08, CHAPTER_09 = cells_of("08", "factor_effects"), cells_of("09", "added_variance")
factor_effects = CHAPTER_08.factor_effects
PLANTED = {"kd": 0.5, "ig": 0.25, "at": -0.1, "kd:ig": 0.3, "kd:at": 0.0, "ig:at": -0.2, "kd:ig:at": 0.7}


def accuracy(method: str) -> float:
    """The accuracy, in per cent, in which exactly `PLANTED` is hidden."""
    sign = {factor: 1 if factor in method.split("_") else -1 for factor in CHAPTER_08.FACTORS}
    return 91 + sum(effect * np.prod([sign[f] / 2 for f in term.split(":")]) for term, effect in PLANTED.items())


def factorial_ledger(noise: float, seeds: int = 10, shared: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    luck = shared * rng.normal(size=seeds)
    return ledgers.bare({method: accuracy(method) + luck + noise * rng.normal(size=seeds) for method in METHODS})


def nested_ledger(between: float, within: float, groups: int, runs: int, seed: int = 0) -> pd.DataFrame:
    """Resamples with several seeds each; `between` and `within` are standard deviations in points."""
    rng = np.random.default_rng(seed)
    values = 90 + between * rng.normal(size=(groups, 1)) + within * rng.normal(size=(groups, runs))
    resample, place = np.indices(values.shape).reshape(2, -1)
    return pd.DataFrame({"method": "student", "resample": resample, "seed": place, "test_accuracy": values.ravel()})


def one_method(values: np.ndarray, method: str = "student", **changes: object) -> pd.DataFrame:
    return ledgers.bare({method: values}, **changes)


# Factors


def test_planted_effects_are_recovered_exactly_where_there_is_no_noise():
    table = factor_effects(factorial_ledger(noise=0.0, seeds=2))
    assert dict(table["effect"]) == pytest.approx(PLANTED, abs=1e-9)


def test_effects_are_contrasts_of_means():
    rows = factorial_ledger(noise=0.3)
    mean = rows.groupby("method")["test_accuracy"].mean()
    table = factor_effects(rows)
    with_ig, without = mean[["ig", "kd_ig", "ig_at", "kd_ig_at"]], mean[["student", "kd", "at", "kd_at"]]
    assert table.loc["ig", "effect"] == pytest.approx(with_ig.mean() - without.mean())
    alone = mean["kd_ig"] - mean["kd"] - mean["ig"] + mean["student"]
    with_at = mean["kd_ig_at"] - mean["kd_at"] - mean["ig_at"] + mean["at"]
    assert table.loc["kd:ig", "effect"] == pytest.approx((alone + with_at) / 2)
    assert table.loc["kd:ig:at", "effect"] == pytest.approx(with_at - alone)


def test_the_interval_of_each_effect_holds_it_in_19_of_20_studies():
    studies = 150
    inside = []
    for seed in range(studies):
        table = factor_effects(factorial_ledger(noise=0.32, seed=seed))
        truth = pd.Series(PLANTED)
        inside.append((table["low"] < truth) & (truth < table["high"]))
    covered = np.mean(inside)
    print(f"{covered:.1%} of {studies} × {len(PLANTED)} intervals hold the planted effect")
    assert 0.93 < covered < 0.97


def test_blocking_by_seed_narrows_the_intervals_when_runs_with_one_seed_share_luck():
    rows = factorial_ledger(noise=0.1, shared=1.0)
    plain, blocked = factor_effects(rows), factor_effects(rows, blocks=["seed"])
    assert dict(plain["effect"]) == pytest.approx(dict(blocked["effect"]))
    assert ((plain["high"] - plain["low"]) > 4 * (blocked["high"] - blocked["low"])).all()


def test_the_papers_eighty_runs_show_main_effects_of_kd_and_ig_and_no_synergy():
    table = factor_effects(paper_rows())
    assert set(table.index[table["p_holm"] < 0.05]) == {"kd", "ig"}
    assert table.loc["kd:ig", "low"] < 0 < table.loc["kd:ig", "high"]


def test_a_factorial_analysis_needs_all_eight_methods_and_two_runs():
    rows = factorial_ledger(noise=0.3, seeds=2)
    with pytest.raises(ValueError, match="no run of kd, ig_at: "):
        factor_effects(rows[~rows["method"].isin(["kd", "ig_at"])])
    with pytest.raises(ValueError, match="each method has 1 run"):
        factor_effects(rows[rows["seed"] == 0])


# Normality


def test_normality_is_that_of_the_libraries_and_finds_what_is_skewed():
    values = np.random.default_rng(0).normal(size=60)
    skewed = np.random.default_rng(1).exponential(size=60)
    table = variance.normality(pd.concat([one_method(values), one_method(skewed, "kd")]))
    assert table.loc["student", "lilliefors_p"] == pytest.approx(lilliefors(values)[1])
    assert table.loc["student", "shapiro_p"] == pytest.approx(stats.shapiro(values).pvalue)
    assert table.loc["student", ["lilliefors_p", "shapiro_p"]].min() > 0.05
    assert table.loc["kd", ["lilliefors_p", "shapiro_p"]].max() < 0.01
    assert variance.normality(one_method(values)[:0]).empty


def test_normality_refuses_too_few_runs_and_runs_that_end_alike():
    with pytest.raises(ValueError, match=r"3 runs.* needs 4"):
        variance.normality(one_method(np.array([90.0, 91.0, 92.0])))
    with pytest.raises(ValueError, match=r"all runs of student end alike, at 91\.00"):
        variance.normality(one_method(np.full(5, 91.0)))


# Variances


def test_planted_components_are_recovered_within_monte_carlo_error():
    studies, between, within = 200, 0.3, 0.4
    found = [
        variance.variance_components(nested_ledger(between, within, 12, 5, seed), "resample") for seed in range(studies)
    ]
    means = np.mean([one.between for one in found]), np.mean([one.within for one in found])
    errors = [np.std([getattr(one, name) for one in found]) / np.sqrt(studies) for name in ("between", "within")]
    true_share = between**2 / (between**2 + within**2)
    covered = np.mean([one.low < true_share < one.high for one in found])
    print(
        f"variances {means[0]:.4f} and {means[1]:.4f}, planted {between**2:.4f} and {within**2:.4f}; {covered:.1%} held"
    )
    assert abs(means[0] - between**2) < 3 * errors[0]
    assert abs(means[1] - within**2) < 3 * errors[1]
    assert 0.91 < covered < 0.99


def test_the_classical_estimator_is_the_restricted_likelihood_of_statsmodels():
    rows = nested_ledger(0.5, 0.3, groups=15, runs=4)
    mixed = MixedLM.from_formula("test_accuracy ~ 1", groups="resample", data=rows).fit(reml=True)
    found = variance.variance_components(rows, "resample")
    assert found.between == pytest.approx(float(mixed.cov_re.iloc[0, 0]), rel=1e-3)
    assert found.within == pytest.approx(mixed.scale, rel=1e-3)


def test_what_runs_with_one_seed_share_is_found_below_the_difference_of_the_methods():
    rows = factorial_ledger(noise=0.1, seeds=300, shared=0.4)
    found = variance.variance_components(rows, "seed", fixed=["method"])
    assert found.between == pytest.approx(0.16, rel=0.25)
    assert found.within == pytest.approx(0.01, rel=0.1)
    assert (found.groups, found.runs) == (300, 8)
    # Without taking the methods out, their differences count as luck.
    assert variance.variance_components(rows, "seed").within > 2 * found.within


def test_crossed_components_are_recovered_from_the_ledger_of_their_campaign(tmp_path):
    """Seed and draw each by itself, and what neither explains: the three parts of a crossed design."""
    planted, specs = {"draw": 0.3, "seed": 0.5, "both": 0.2}, campaigns.specs("components")
    ledger = Ledger(tmp_path / "runs.csv")
    ledger.merge(ledgers.table(ledgers.row_of(spec, 90.0) for spec in specs))
    rows = campaigns.rows(ledger.read(), "components")
    rows["draw"] = [spec_of(row).sample_seed for _index, row in rows.iterrows()]
    assert len(rows) == campaigns.COMPONENT_DRAWS * campaigns.COMPONENT_SEEDS
    found = []
    for study in range(60):
        rng = np.random.default_rng(study)
        luck = {name: planted[name] * rng.normal(size=rows[name].nunique()) for name in ("draw", "seed")}
        noise = planted["both"] * rng.normal(size=len(rows))
        rows["test_accuracy"] = 90 + luck["draw"][rows["draw"]] + luck["seed"][rows["seed"].astype(int)] + noise
        of_draws = variance.variance_components(rows, "draw", fixed=["seed"])
        of_seeds = variance.variance_components(rows, "seed", fixed=["draw"])
        found.append((of_draws.between, of_seeds.between, of_draws.within))
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    print(f"variances of draw, seed, both: {means.round(4)}, planted {[round(s**2, 4) for s in planted.values()]}")
    assert (np.abs(means - np.square(list(planted.values()))) < 3 * errors).all()
    assert (errors < np.square(list(planted.values())) / 5).all(), "else the test could not fail"


def test_no_difference_between_groups_is_a_share_whose_interval_holds_zero():
    shares = [variance.variance_components(nested_ledger(0, 0.3, 10, 4, seed), "resample") for seed in range(200)]
    at_zero = np.mean([one.low == 0 for one in shares])
    print(f"{at_zero:.1%} of 200 intervals of a share of 0 reach 0")
    assert at_zero > 0.94
    assert np.mean([one.between for one in shares]) == pytest.approx(0, abs=0.003), (
        "unbiased only if it may be negative"
    )


def test_groups_without_spread_inside_have_the_whole_variance():
    found = variance.variance_components(nested_ledger(0.5, 0.0, 6, 3), "resample")
    assert (found.share, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-6)


def test_a_split_needs_several_runs_in_each_of_several_groups_of_one_size():
    rows = nested_ledger(0.3, 0.3, 5, 3)
    for few in (rows[rows["seed"] == 0], rows[rows["resample"] == 0], rows[:0]):
        with pytest.raises(ValueError, match="needs two groups or more, alike, with two runs or more each"):
            variance.variance_components(few, "resample")
    with pytest.raises(ValueError, match="5 groups by resample, of up to 3 runs"):
        variance.variance_components(rows[1:], "resample")


def test_runs_that_all_end_alike_cannot_be_split():
    with pytest.raises(ValueError, match=r"all runs end alike, at 10\.00 %"):
        variance.variance_components(nested_ledger(0, 0, 4, 3).assign(test_accuracy=10.0), "resample")
    with pytest.raises(ValueError, match=r"all runs end alike, at 10\.00 %"):
        factor_effects(factorial_ledger(0).assign(test_accuracy=10.0))


def test_what_resampling_adds_is_found_by_subtraction():
    rng = np.random.default_rng(0)
    alone = one_method(rng.normal(91, 0.3, 4000))
    together = one_method(rng.normal(90, 0.5, 4000), train_fraction=0.8)
    row = CHAPTER_09.added_variance(together, alone).loc["student"]
    assert row["added"] == pytest.approx(0.5**2 - 0.3**2, rel=0.1)
    assert row["low"] < (0.5 / 0.3) ** 2 < row["high"]
    assert row["p"] < 1e-6


def test_the_interval_of_the_ratio_of_variances_holds_it_in_19_of_20_studies():
    rng, studies, inside = np.random.default_rng(1), 1000, 0
    for _ in range(studies):
        together, alone = (pd.Series(rng.normal(0, spread, n)) for spread, n in ((0.5, 60), (0.3, 10)))
        found = CHAPTER_09.ratio_of_variances(together, alone)
        inside += found["low"] < (0.5 / 0.3) ** 2 < found["high"]
    print(f"{inside} of {studies} intervals hold the ratio of variances")
    assert inside / studies == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / studies))


def test_variances_cannot_be_subtracted_without_two_runs_in_both_tables():
    with pytest.raises(ValueError, match="no method has two runs or more in both tables"):
        CHAPTER_09.added_variance(one_method(np.array([90.0, 91.0])), one_method(np.array([90.0])))
    with pytest.raises(ValueError, match=r"all runs of student end alike, at 91\.00"):
        CHAPTER_09.added_variance(one_method(np.array([90.0, 91.0])), one_method(np.full(3, 91.0)))
