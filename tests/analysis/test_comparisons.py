"""Comparisons on runs whose truth was planted: what is there is found as often as promised, what is not is not."""

import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import bare
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from kdig_utils.analysis import comparisons
from kdig_utils.analysis.comparisons import equivalence, family, paired, unpaired
from kdig_utils.analysis.sample_size import power
from kdig_utils.experiments import campaigns
from kdig_utils.method.spec import METHODS, RunSpec

paired_equivalence = partial(equivalence, by_pairs=True)
AGAINST_STUDENT = [(method, "student") for method in METHODS[1:]]
DEVIATION = 0.32  # about the paper's, from seed to seed


def drawn(rng: np.random.Generator, gains: dict[str, float], n: int = 10) -> pd.DataFrame:
    return bare({method: 91 + gain + DEVIATION * rng.normal(size=n) for method, gain in gains.items()})


def two(seed: int = 0, n: int = 10, gain: float = 0.4, shared: float = 0.0) -> tuple[pd.Series, pd.Series]:
    """Runs of two methods; `shared` is the standard deviation of what runs with one seed have in common."""
    rng = np.random.default_rng(seed)
    common = shared * rng.normal(size=n)
    first = 91 + gain + common + DEVIATION * rng.normal(size=n)
    second = 91 + common + DEVIATION * rng.normal(size=n)
    return pd.Series(first, name="kd"), pd.Series(second, name="student")


# Equal to the libraries


def test_the_unpaired_comparison_is_welchs_test_of_scipy():
    a, b = two()
    found, direct = unpaired(a, b[:7]), stats.ttest_ind(a, b[:7], equal_var=False)
    assert found.p == pytest.approx(direct.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(direct.confidence_interval()))
    assert found.difference == pytest.approx(a.mean() - b[:7].mean())
    assert found.runs == 7


def test_the_paired_comparison_is_the_one_sample_test_of_the_differences():
    a, b = two(shared=1.0)
    found, direct = paired(a, b), stats.ttest_1samp(a - b, 0)
    assert found.p == pytest.approx(direct.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(direct.confidence_interval()))


def test_hedges_g_is_that_of_statsmodels():
    a, b = two()
    effect, _variance = effectsize_smd(a.mean(), a.std(ddof=1), len(a), b.mean(), b.std(ddof=1), len(b))
    assert unpaired(a, b).g == pytest.approx(effect, rel=1e-3)  # statsmodels approximates the correction


def test_the_interval_of_g_holds_the_true_effect_in_19_of_20_studies():
    true = 0.4 / DEVIATION
    rng, studies, inside = np.random.default_rng(1), 4000, 0
    a, b = rng.normal(true, 1, (studies, 10)), rng.normal(0, 1, (studies, 10))
    pooled = stats.ttest_ind(a, b, axis=1)
    for t in pooled.statistic:
        _g, low, high = comparisons._hedges_g(float(t), 18.0, math.sqrt(2 / 10))
        correction = 1 - 3 / (4 * 18 - 1)
        inside += low / correction < true < high / correction
    print(f"{inside} of {studies} intervals of g hold the true effect")
    assert 0.94 < inside / studies < 0.96


def test_equivalence_is_that_of_statsmodels_with_unequal_variances():
    a, b = two(gain=0.0)
    assert equivalence(a, b, 0.3).p == pytest.approx(ttost_ind(a, b, -0.3, 0.3, usevar="unequal")[0])
    assert paired_equivalence(a, b, 0.3).p == pytest.approx(ttost_paired(a, b, -0.3, 0.3)[0])


@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.sampled_from([equivalence, paired_equivalence]))
@settings(max_examples=60, deadline=None)
def test_two_methods_are_equivalent_exactly_if_the_90_percent_interval_lies_in_the_margin(seed, margin, test):
    found = test(*two(seed, gain=0.1), margin)
    assert (found.p < 0.05) == (-margin < found.low and found.high < margin)


# Found as often as promised


@pytest.mark.parametrize(("compare", "shared", "studies"), [(unpaired, 0.0, 120), (paired, DEVIATION, 250)])
def test_a_null_is_found_in_one_study_of_twenty_by_every_test_and_interval(compare, shared, studies):
    found = [compare(*two(seed, gain=0.0, shared=shared)) for seed in range(studies)]
    rates = {
        "t": np.mean([one.p < 0.05 for one in found]),
        "interval": np.mean([not one.low < 0 < one.high for one in found]),
        "permutation": np.mean([one.p_permutation < 0.05 for one in found]),
        "bootstrap": np.mean([not one.bootstrap_low < 0 < one.bootstrap_high for one in found]),
    }
    print(f"{compare.__name__}, {studies} studies of nothing: ", {name: f"{rate:.1%}" for name, rate in rates.items()})
    slack = 3 * math.sqrt(0.05 * 0.95 / studies)
    assert rates["t"] == rates["interval"] == pytest.approx(0.05, abs=slack)
    assert rates["permutation"] == pytest.approx(0.05, abs=slack)
    assert rates["t"] <= rates["bootstrap"] < 0.12, "the bootstrap of ten runs is too narrow, but not by much"


def test_pairing_finds_more_when_the_pairs_share_something():
    studies = [two(seed, gain=0.3, shared=0.8) for seed in range(30)]
    by_pairs, apart = (np.mean([compare(*pair).p < 0.05 for pair in studies]) for compare in (paired, unpaired))
    print(f"found paired {by_pairs:.0%}, unpaired {apart:.0%}")
    assert by_pairs > apart + 0.2


def p_of_welch(gains: list[float], studies: int, seed: int) -> np.ndarray:
    """p of each method's gain over a baseline in simulated studies of ten runs, (methods, studies)."""
    rng = np.random.default_rng(seed)
    runs = [91 + gain + DEVIATION * rng.normal(size=(studies, 10)) for gain in (0.0, *gains)]
    return np.array([stats.ttest_ind(one, runs[0], axis=1, equal_var=False).pvalue for one in runs[1:]])


def test_holm_keeps_a_family_of_nulls_at_one_false_finding_in_twenty():
    p, studies = p_of_welch([0.0] * 7, 4000, seed=3), 4000
    raw, corrected = ((one < 0.05).any(axis=0).mean() for one in (p, comparisons.holm(p)))
    print(f"{studies} families of 7 nulls, at least one false: {raw:.1%} as they are, {corrected:.1%} after Holm")
    assert raw > 0.12
    assert 0.02 < corrected < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_holm_keeps_the_nulls_of_a_family_with_a_true_effect():
    studies = 4000
    corrected = comparisons.holm(p_of_welch([0.8, *[0.0] * 6], studies, seed=4))
    found, false = (corrected[0] < 0.05).mean(), (corrected[1:] < 0.05).any(axis=0).mean()
    print(f"planted gain found in {found:.0%}, a null in {false:.1%} of {studies} families")
    assert found > power(0.8, DEVIATION, 10, alpha=0.05 / 7) - 0.02
    assert false < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_equivalence_is_claimed_wrongly_in_one_study_of_twenty_at_most():
    studies = 400
    wrong = np.mean([equivalence(*two(seed, gain=0.4), margin=0.4).p < 0.05 for seed in range(studies)])
    right = np.mean([equivalence(*two(seed, gain=0.0), margin=0.8).p < 0.05 for seed in range(studies)])
    print(f"equivalent at the margin: {wrong:.1%}; truly equal, wide margin: {right:.1%} of {studies} studies")
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert right > 0.98


# The paper's own runs


def test_the_leads_of_the_story_hold_on_the_papers_own_runs():
    pairs = [("kd_ig", "student"), ("kd_ig", "kd"), ("ig", "student")]
    table = family(comparisons.paper_rows(), pairs).set_index(["first", "second"])
    assert list(table["difference"].round(2)) == [0.83, 0.40, 0.17]
    assert table.loc[("kd_ig", "student"), ["p_holm", "p_permutation_holm"]].max() < 0.001
    weak = table.loc[("kd_ig", "kd")]
    assert weak["p"] < 0.05 < weak["p_holm"]
    assert table.loc[("ig", "student"), "p"] > 0.2
    assert comparisons.runs_by_method(comparisons.paper_rows())["kd_ig"].mean() == pytest.approx(92.018)


# Families


def test_a_family_corrects_each_p_value_over_its_pairs():
    table = family(drawn(np.random.default_rng(5), dict.fromkeys(METHODS, 0.0)), AGAINST_STUDENT)
    for name in ("p", "p_permutation"):
        assert list(table[f"{name}_holm"]) == pytest.approx(list(multipletests(table[name], method="holm")[1]))
    table = family(comparisons.paper_rows(), AGAINST_STUDENT, partial(equivalence, margin=0.3))
    assert set(table.columns) == {"first", "second", "runs", "difference", "low", "high", "p", "p_holm"}


def test_rows_in_any_order_give_the_same_family():
    rows = drawn(np.random.default_rng(6), {"student": 0.0, "kd": 0.2})
    shuffled = rows.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        family(rows, [("kd", "student")], paired), family(shuffled, [("kd", "student")], paired)
    )


def test_teachers_are_no_students_and_an_empty_ledger_has_no_methods():
    rows = drawn(np.random.default_rng(7), {"student": 0.0, "teacher": 3.0})
    assert list(comparisons.runs_by_method(rows)) == ["student"]
    assert comparisons.runs_by_method(bare({})) == {}


# Refusals


@pytest.mark.parametrize(("name", "value"), [("k", 7), ("epochs", 3), ("pairing", "shuffled"), ("train_fraction", 0.8)])
def test_runs_of_two_experiments_are_not_mixed(name, value):
    rows = drawn(np.random.default_rng(8), {"student": 0.0, "kd": 0.0})
    other = rows.assign(**{name: value}, seed=rows["seed"] + 100)
    with pytest.raises(ValueError, match=f"mix {name}.*choose rows with one {name}"):
        comparisons.runs_by_method(pd.concat([rows, other]))


def with_specs(rows: pd.DataFrame, **changes: object) -> pd.DataFrame:
    """The rows as the ledger has them: with the spec of each run, and its teacher, which `student` has not."""
    specs = []
    for row in rows.to_dict("records"):
        teacher = {} if row["method"] == "student" else {"teacher_sha256": "a"}
        specs.append(asdict(RunSpec(row["method"], seed=row["seed"], data_md5="d", **{**teacher, **changes})))
    taught = [spec["teacher_sha256"] for spec in specs]
    return rows.assign(spec=[json.dumps(spec) for spec in specs], teacher_sha256=taught)


@pytest.mark.parametrize(
    ("name", "value", "read_by"),
    [
        ("alpha", 0.3, "kd"),
        ("temperature", 4.0, "kd"),
        ("answers", "online", "kd_at"),
        ("overlay_probability", 0.4, "ig"),
        ("n_steps", 20, "kd_ig"),
        ("gamma", 8.0, "at"),
        ("pairing", "shuffled", "ig_at"),
        ("precision", "float32", "student"),
        ("sample_seed", 3, "student"),
        ("validation_images", 5000, "student"),
        ("batch_size", 32, "student"),
        ("teacher_sha256", "b", "at"),
    ],
)
def test_runs_that_differ_in_any_field_that_their_method_reads_are_not_mixed(name, value, read_by):
    rows = drawn(np.random.default_rng(8), {read_by: 0.0}, n=2)
    one, other = with_specs(rows), with_specs(rows.assign(seed=rows["seed"] + 100), **{name: value})
    with pytest.raises(ValueError, match=f"mix {name} .*{value}: choose rows with one {name}$"):
        comparisons.runs_by_method(pd.concat([one, other]))


def test_everything_that_differs_is_named():
    rows = drawn(np.random.default_rng(8), {"kd": 0.0}, n=2)
    other = with_specs(rows.assign(seed=rows["seed"] + 100), alpha=0.3, precision="float32")
    with pytest.raises(ValueError, match=r"alpha 0\.01, 0\.3; precision native, float32: .*alpha and one precision"):
        comparisons.runs_by_method(pd.concat([with_specs(rows), other]))


def test_fields_that_a_method_does_not_read_are_no_settings():
    rows = drawn(np.random.default_rng(8), {"student": 0.0, "at": 0.0})
    student = with_specs(rows[rows["method"] == "student"], pairing="matched", alpha=0.3, gamma=8.0)
    at = with_specs(rows[rows["method"] == "at"], pairing="shuffled", n_steps=5, alpha=0.6, answers="online")
    assert list(comparisons.runs_by_method(pd.concat([student, at]))) == ["student", "at"]


def test_the_runs_of_each_campaign_of_comparisons_are_of_one_setting():
    for name in ("ablation", "pairing", "monte-carlo"):
        runs = pd.DataFrame({"method": spec.method, "spec": json.dumps(asdict(spec))} for spec in campaigns.specs(name))
        assert comparisons.mixed(runs) == {}
    sizes = pd.DataFrame({"method": s.method, "spec": json.dumps(asdict(s))} for s in campaigns.specs("compression"))
    assert list(comparisons.mixed(sizes)) == ["k"]


def test_a_seed_that_stands_there_twice_is_refused():
    rows = drawn(np.random.default_rng(8), {"student": 0.0})
    with pytest.raises(ValueError, match="student has seed 0 twice"):
        comparisons.runs_by_method(pd.concat([rows, rows]))


def test_a_missing_method_is_named():
    rows = drawn(np.random.default_rng(9), {"student": 0.0, "kd": 0.0})
    with pytest.raises(ValueError, match=r"no run of at, ig: .*compare only student, kd"):
        family(rows, [("ig", "student"), ("at", "student")])


@pytest.mark.parametrize("compare", [unpaired, paired, partial(equivalence, margin=0.3)])
def test_one_run_has_no_spread(compare):
    a, b = two(n=1)
    with pytest.raises(ValueError, match=r"kd has 1 run.*train more seeds"):
        compare(a, b)


def test_runs_that_all_end_alike_are_refused():
    same = pd.Series([91.0, 91.0, 91.0], name="kd")
    with pytest.raises(ValueError, match=r"all runs of kd and of kd end alike, at 91\.00"):
        unpaired(same, same)
    varied = pd.Series([90.0, 91.0, 92.0], name="student")
    with pytest.raises(ValueError, match=r"differ by \+1\.00 with every seed"):
        paired(varied + 1, varied)


@pytest.mark.parametrize("compare", [equivalence, paired_equivalence])
def test_a_margin_of_nothing_is_refused(compare):
    with pytest.raises(ValueError, match="margin 0 is not above 0"):
        compare(*two(), margin=0)


def test_only_runs_with_the_same_seeds_are_paired():
    a, b = two(n=3)
    with pytest.raises(ValueError, match=r"kd has seeds \[0, 1, 2\] and student has \[1, 2, 3\]"):
        paired(a, b.rename(lambda seed: seed + 1))


@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_runs_give_an_interval(n):
    for found in (unpaired(*two(n=n)), paired(*two(n=n))):
        assert found.low < found.difference < found.high
        assert 0 < found.p <= 1
    assert np.isnan(paired(*two(n=2)).g)
    assert np.isfinite(unpaired(*two(n=2)).g)


@pytest.mark.parametrize("synergy", [0.0, 0.5])
def test_the_interaction_is_what_is_beyond_the_sum(synergy):
    """Planted without luck: 0.4 from one part, 0.2 from the other."""
    means = {"student": 91.0, "kd": 91.4, "ig": 91.2, "kd_ig": 91.6 + synergy, "at": 80.0}
    spread = np.array([-0.1, 0.0, 0.1])
    found = comparisons.interaction(bare({method: mean + spread for method, mean in means.items()}))
    assert found.difference == pytest.approx(synergy)
    assert found.low < synergy < found.high
    with pytest.raises(ValueError, match="four methods"):
        comparisons.interaction(bare({method: means[method] + spread for method in ("student", "kd", "ig")}))
