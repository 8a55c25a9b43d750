"""The scorecard on ledgers whose truth was planted: what is there is found, what is not there is not."""

from pathlib import Path

import ledgers
import numpy as np
import pandas as pd
import pytest
from chapters import cells_of
from ledgers import drawn, student_rows, teacher_row
from scipy import stats

from kdig_utils.analysis import claims, comparisons, counted, eligibility, scorecard, verdicts
from kdig_utils.analysis.operating_characteristics import TRUTHS, operating_characteristics
from kdig_utils.analysis.verdicts import NOT_REPRODUCED, NOT_RUN, NOT_TESTABLE, REPRODUCED, UNDECIDED
from kdig_utils.edge.timing import Speedup
from kdig_utils.experiments import brief, campaigns, evidence
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import METHODS

CELLS = ("or_unknown", "WORDS", "explained", "TESTS", "evidence_of", "price_of", "conceptual", "reasons")
CHAPTER = cells_of("16", *CELLS)
MEANS = {method: float(np.mean(claims.lookup(f"ablation_runs.{method}"))) for method in METHODS}


def card(rows: list[dict], speedups: dict | None = None, explanations: pd.DataFrame | None = None) -> pd.DataFrame:
    return scorecard.scorecard(ledgers.table(rows), speedups, explanations).set_index("name")


def planted(share: float, rng: np.random.Generator) -> list[dict]:
    """Eight methods, ten seeds, with this share of every gain over `student`.

    The gains are the paper's, but for the luck that its ten runs may have had: its number is one draw, too.
    """
    deviation = verdicts.papers_spread()[0]
    true = {method: mean - deviation * rng.normal() / 10**0.5 for method, mean in MEANS.items()}
    ours = {method: true["student"] + share * (mean - true["student"]) for method, mean in true.items()}
    runs = {method: list(rng.normal(mean, deviation, 10)) for method, mean in ours.items()}
    return [teacher_row(), *(row for method, values in runs.items() for row in student_rows(method, values))]


def typical(share: float) -> list[dict]:
    """The same, each method with exactly its mean."""
    true = {method: MEANS["student"] + share * (mean - MEANS["student"]) for method, mean in MEANS.items()}
    return [teacher_row(), *(row for n, m in enumerate(true) for row in student_rows(m, drawn(true[m], n)))]


def test_sizes_and_axioms_are_settled_without_any_run():
    table = card([])
    assert set(table[table["evidence"] == evidence.COUNTED]["verdict"]) == {REPRODUCED}
    trained = table[table["evidence"] == evidence.TRAINED]
    assert set(trained.drop("imagenet_subset")["verdict"]) == {NOT_RUN}
    assert trained[["value", "short"]].isna().all(axis=None)
    assert set(table[table["verdict"] == NOT_RUN]["found"]) == {evidence.NOT_RUN}


@pytest.fixture(scope="module")
def promised() -> pd.DataFrame:
    """The table of errors at ten seeds: a share for each verdict, by claim and truth."""
    table = operating_characteristics((10,), studies=4000).set_index(["claim", "truth"])
    return table[[*verdicts.DECIDED, UNDECIDED]].astype(float)


@pytest.mark.parametrize("truth", TRUTHS)
def test_typical_ledgers_get_the_verdict_that_the_table_of_errors_gives_most_often(truth, promised):
    found = card(typical(TRUTHS[truth]))["verdict"]
    for name in ("mean_kd_ig", "headline_kd_ig", "kd_ig_over_student", "kd_ig_together"):
        assert found[name] == promised.loc[(name, truth)].idxmax(), name


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS)
def test_planted_ledgers_get_each_verdict_as_often_as_the_table_of_errors_promises(truth, promised):
    studies, names = 25, ("mean_kd_ig", "headline_kd_ig", "kd_ig_over_student", "kd_ig_over_kd", "kd_ig_together")
    print(f"{studies} planted ledgers of 81 rows, seed 7")
    rng = np.random.default_rng(7)
    found = pd.DataFrame([card(planted(TRUTHS[truth], rng))["verdict"] for _study in range(studies)])
    for name in names:
        for verdict, expected in promised.loc[(name, truth)].items():
            seen = int((found[name] == verdict).sum())
            assert stats.binomtest(seen, studies, max(expected, 1e-3)).pvalue > 1e-4, (name, verdict, seen, expected)


def test_the_papers_own_runs_as_if_they_were_ours():
    """They agree with themselves, and show of their story what they show, no more."""
    rows = [row for method in METHODS for row in student_rows(method, claims.lookup(f"ablation_runs.{method}"))]
    table = card([teacher_row(), *rows])
    assert set(table[table["group"] == "ablation"]["verdict"]) == {REPRODUCED}
    assert table.loc["kd_ig_over_student", "verdict"] == REPRODUCED
    assert set(table.loc[["ig_over_student", "kd_ig_together", "at_like_student"], "verdict"]) == {UNDECIDED}
    # One recipe cannot give both tables: whoever reproduces the ten runs fails the sweep at k = 5.
    assert set(table.loc[["sweep_k5", "sweep_kd_k5", "sweep_ig_k5"], "verdict"]) == {NOT_REPRODUCED}


def test_claims_that_no_one_recipe_can_meet_are_marked_both_ways():
    conflicts = scorecard.conflicting()
    assert {"mean_kd_ig", "headline_kd_ig"} <= set(conflicts["sweep_k5"])
    assert set(conflicts["ig_at_like_student"]) == {"mean_ig_at", "mean_student"}  # 0.28 points are above the margin
    numbers = {name: others for name, others in conflicts.items() if name != "ig_at_like_student"}
    assert all(name in numbers[other] for name, others in numbers.items() for other in others)
    assert not {"mean_student", "headline_student"} & set(conflicts)
    table = card([])
    assert "sweep_k5" in table.loc["mean_kd_ig", "conflicts"]
    assert "One recipe can hardly give" in CHAPTER.reasons(table.loc["mean_kd_ig"])


def test_a_family_does_not_grow_with_what_was_run():
    """Two methods alone, and the same two among all eight: the correction of a single test is the same or milder."""
    base = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(91.52, 2))]
    absent = [method for method in METHODS if method not in ("student", "kd_ig")]
    others = [row for n, method in enumerate(absent) for row in student_rows(method, drawn(91.2, n + 3))]
    alone, among = card(base).loc["kd_ig_over_student"], card(base + others).loc["kd_ig_over_student"]
    assert alone["p"] == pytest.approx(among["p"])
    assert alone["p_holm"] == pytest.approx(min(9 * alone["p"], 1))
    assert among["p_holm"] <= alone["p_holm"]
    assert {name: len(tests) for name, tests in verdicts.families().items()} == {
        "ten runs": 9, "resamples": 3, "brief": 5,
    }  # fmt: skip


def test_chapters_08_and_16_make_the_same_nine_tests():
    rows = [row for n, method in enumerate(METHODS) for row in student_rows(method, drawn(MEANS[method], n))]
    table = card([teacher_row(), *rows])
    nine = scorecard.registered_comparisons(pd.DataFrame(rows), comparisons.paired)
    assert len(nine) == 9
    for claim in claims.claims():
        if claim.family == "ten runs":
            asked = (
                nine
                if len(claim.methods) == 4
                else nine.query("first == @claim.methods[0] and second == @claim.methods[1]")
            )
            row = asked.iloc[-1]
            assert (row["p"], row["p_holm"]) == pytest.approx(
                (table.loc[claim.name, "p"], table.loc[claim.name, "p_holm"])
            )
            assert row["p_permutation"] == pytest.approx(table.loc[claim.name, "p_exact"])


def test_methods_are_compared_seed_by_seed():
    """Seeds that move all methods alike do not hide a difference: the runs share initial weights, order and crops."""
    luck = np.random.default_rng(5).normal(0, 2, 10)
    runs = {"student": 91.2 + luck, "kd_ig": 92.0 + luck + np.array(drawn(0, 6, spread=0.1))}
    rows = [teacher_row(), *(row for method, values in runs.items() for row in student_rows(method, list(values)))]
    assert card(rows).loc["kd_ig_over_student", "p_holm"] < 0.001
    shifted = [row | {"seed": row["seed"] + 5} if row["method"] == "student" else row for row in rows]
    assert card(shifted).loc["kd_ig_over_student", "runs"] == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 5}, "5 epochs in place of 100"),
        ({"pairing": "edges"}, "the pairing edges"),
        ({"alpha": 0.5}, "alpha 0.5 in place of 0.01"),
        ({"batch_size": 256}, "batch size 256 in place of 64"),
        ({"train_images": 500}, "500 training images in place of 50,000"),
        ({"finished": "2026-11-22T22:29Z"}, "the claim was registered"),
        ({"finished": "27/11/2099 10:00"}, "the claim was registered"),
        ({"finished": None}, "the claim was registered"),
        ({"data_md5": "other data"}, "the MD5 other data"),
        ({"n_steps": 8}, "8 steps of Integrated Gradients in place of 50"),
        ({"validation_images": 5000}, "validation images 5000 in place of 0"),
        ({"train_fraction": 0.8}, "a share of 0.8 in place of 1.0"),
    ],
)
def test_runs_with_other_settings_are_shown_and_do_not_count(changes, reason):
    row = card([teacher_row(), *student_rows("kd_ig", drawn(92.0, 2), **changes)]).loc["mean_kd_ig"]
    assert row["verdict"] == NOT_RUN
    assert row["found"] == evidence.NOT_RUN
    assert reason in row["reason"]
    assert np.isnan(row["value"])
    assert row["short"] == pytest.approx(92.0)
    assert row["short_budget"].endswith("10 runs")


def test_no_rule_is_younger_than_a_run_that_it_judges():
    """In the ledger of this repository, too: whatever counts ended after its claim was registered."""
    rows = student_rows("kd_ig", drawn(92.0, 2))
    registered = pd.Timestamp(claims.claims()[0].registered)
    for row, minutes in zip(rows, (-9999, -1, 0, 1, 2, 3, 4, 5, 6, 7), strict=True):
        row["finished"] = (registered + pd.Timedelta(minutes=minutes)).isoformat()
    assert card([teacher_row(), *rows]).loc["mean_kd_ig", "runs"] == 7
    ledger = Ledger(Path(__file__).parents[2] / "results" / "runs.csv").read()
    here = scorecard.scorecard(ledger)
    counted_here = here[(here["evidence"] == evidence.TRAINED) & here["value"].notna()]
    late = ledger[pd.to_datetime(ledger["finished"], utc=True) > registered]
    assert counted_here["runs"].max() <= len(late) or counted_here.empty


def test_a_weak_teacher_does_not_count_except_for_a_student_without_one():
    rows = [teacher_row(90.0), *student_rows("kd_ig", drawn(92.0, 2)), *student_rows("student", drawn(91.2, 1))]
    table = card(rows)
    assert table.loc["mean_kd_ig", "verdict"] == NOT_RUN
    assert "a teacher of 90.0 %" in table.loc["mean_kd_ig", "reason"]
    assert table.loc["mean_student", "verdict"] == REPRODUCED
    assert "that is not in the ledger" in card(student_rows("kd_ig", drawn(92.0, 2))).loc["mean_kd_ig", "reason"]


@pytest.mark.parametrize("method", ["kd_ig", "at"])
def test_a_second_teacher_later_neither_joins_a_result_nor_takes_it_back(method):
    other = {"weights_sha256": "another good teacher"}
    later = {"teacher_sha256": other["weights_sha256"], "finished": "2099-02-02T00:00Z"}
    many = [row | later for row in student_rows(method, [80.0] * 30)]
    rows = [teacher_row(), teacher_row(**other), *many, *student_rows("kd_ig", drawn(92.0, 2))]
    row = card(rows).loc["mean_kd_ig"]
    assert (row["value"], row["runs"]) == (pytest.approx(92.0), 10)


def test_a_better_teacher_without_a_result_takes_none_back():
    later = teacher_row(95.0, weights_sha256="another", finished="2099-02-02T00:00Z")
    strays = [
        row | {"teacher_sha256": "another", "finished": "2098-01-01T00:00Z"} for row in student_rows("kd_ig", [80.0])
    ]
    table = card([later, teacher_row(), *strays, *student_rows("kd_ig", drawn(92.0, 2))])
    assert table.loc["mean_kd_ig", "value"] == pytest.approx(92.0)
    assert (
        card([teacher_row(data_md5="x"), *student_rows("kd_ig", drawn(92.0, 2))]).loc["mean_kd_ig", "verdict"]
        == NOT_RUN
    )


def test_an_interim_test_does_not_help_a_final_one():
    base = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(91.52, 2))]
    early = student_rows("kd", drawn(95.0, 3, 5))
    alone, helped = (card(rows).loc["kd_ig_over_student", "p_holm"] for rows in (base, base + early))
    assert helped == pytest.approx(alone)


@pytest.mark.parametrize("seed", [-1, 0.5, np.nan, 10])
def test_a_seed_that_was_not_planned_does_not_count(seed):
    odd = student_rows("kd_ig", [99.0])[0] | {"seed": seed}
    assert card([teacher_row(), odd, *student_rows("kd_ig", drawn(92.0, 2))]).loc["mean_kd_ig", "runs"] == 10


def test_runs_that_miss_each_others_seeds_or_pairing_are_told_truly():
    student = student_rows("student", drawn(91.2, 1), pairing="matched", epochs=5)
    short = card([teacher_row(), *student, *student_rows("kd_ig", drawn(92.0, 2), epochs=5)]).loc["kd_ig_over_student"]
    assert short["short"] == pytest.approx(0.8)
    apart = [row | {"seed": row["seed"] + 5} for row in student_rows("kd_ig", drawn(92.0, 2, 5))]
    rows = [teacher_row(), *student_rows("student", drawn(91.2, 1, 5)), *apart]
    assert "no seed that all methods have" in CHAPTER.explained(card(rows).loc["kd_ig_over_student"])


def test_seeds_beyond_the_planned_ones_change_no_verdict():
    base = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(91.2, 2))]
    more = [row | {"seed": 10 + row["seed"]} for row in student_rows("kd_ig", [95.0] * 30)]
    alone, later = (card(rows).loc["kd_ig_over_student"] for rows in (base, base + more))
    assert (later["value"], later["runs"], later["verdict"]) == (alone["value"], 10, alone["verdict"])


def test_a_seed_without_an_accuracy_does_not_hide_the_same_seed_with_one():
    rows = student_rows("kd_ig", drawn(92.0, 2))
    assert card([teacher_row(), rows[0] | {"test_accuracy": np.nan}, *rows]).loc["mean_kd_ig", "runs"] == 10


def test_every_claim_about_training_can_be_settled_by_the_campaigns():
    planned = {(spec.method, spec.k, spec.train_fraction, spec.pairing, spec.seed) for name in campaigns.CAMPAIGNS
               for spec in campaigns.specs(name) if not evidence.unlike(spec)}  # fmt: skip
    briefly = {(spec.method, spec.k, spec.train_fraction, spec.pairing, spec.seed) for spec in brief.specs()}
    for claim in claims.claims():
        for method in claim.methods if claim.measure in claims.ACCURACY_MEASURES and claim.name != "teacher" else ():
            for pairing in ("matched",) if method == "student" else ("matched", "shuffled"):
                wanted = {(method, claim.k, claim.settings["train_fraction"], pairing, n) for n in range(claim.seeds)}
                assert wanted <= (briefly if claim.protocol else planned), (claim.name, method, pairing)


def test_before_the_planned_seeds_a_look_is_an_interim_one_and_takes_far_more_evidence():
    def looked(n: int, gap: float) -> pd.Series:
        rows = [*student_rows("student", drawn(91.2, 1, n)), *student_rows("kd_ig", drawn(91.2 + gap, 2, n))]
        return card([teacher_row(), *rows]).loc["kd_ig_over_student"]

    assert (looked(5, 0.83)["verdict"], looked(5, 0.83)["interim"]) == (UNDECIDED, True)
    assert (looked(10, 0.83)["verdict"], looked(10, 0.83)["interim"]) == (REPRODUCED, False)
    assert "interim look, 5 of 10 seeds" in CHAPTER.explained(looked(5, 0.83))
    assert looked(9, -3.0)["verdict"] == NOT_REPRODUCED
    assert looked(9, 0.83)["verdict"] == UNDECIDED  # an early look refutes, and never confirms
    single = [teacher_row(), *student_rows("student", [91.2]), *student_rows("kd_ig", [92.0])]
    assert card(single).loc["kd_ig_over_student", "verdict"] == UNDECIDED


def test_a_teacher_may_reach_its_number_early_but_fails_only_at_the_full_budget():
    assert card([teacher_row(94.2, epochs=60)]).loc["teacher", "verdict"] == REPRODUCED
    assert card([teacher_row(90.0, epochs=5)]).loc["teacher", "verdict"] == NOT_RUN
    assert card([teacher_row(92.0, epochs=200)]).loc["teacher", "verdict"] == NOT_REPRODUCED
    later = teacher_row(94.2, weights_sha256="a better one", finished="2099-02-02T00:00Z")
    assert card([later, teacher_row(92.0)]).loc["teacher", "verdict"] == NOT_REPRODUCED  # no best of several


def test_a_mean_of_few_scattered_runs_is_undecided():
    exact = claims.lookup("compression_sweep_accuracy.kd_ig.3")
    steady, scattered = (
        card([teacher_row(), *student_rows("kd_ig", drawn(exact, 3, 5, spread), k=9)]).loc["sweep_k9"]
        for spread in (0.15, 2.0)
    )
    assert steady["verdict"] == REPRODUCED
    assert scattered["verdict"] == UNDECIDED
    assert scattered["value"] == pytest.approx(exact)


def test_direct_and_conceptual_replication_have_a_verdict_each():
    teacher, student = teacher_row(), student_rows("student", drawn(91.2, 1))
    matched = student_rows("kd_ig", drawn(91.2, 2), pairing="matched")
    released = student_rows("kd_ig", drawn(92.0, 3))
    alone = card([teacher, *student, *matched]).loc["kd_ig_over_student"]
    both = card([teacher, *student, *matched, *released]).loc["kd_ig_over_student"]
    assert (alone["verdict"], alone["matched_verdict"]) == (NOT_RUN, NOT_REPRODUCED)
    assert (both["verdict"], both["matched_verdict"]) == (REPRODUCED, NOT_REPRODUCED)
    assert (both["value"], both["matched_value"]) == pytest.approx((0.8, 0.0))
    assert "conceptual replication" in CHAPTER.reasons(both)


def test_a_student_is_measured_against_its_own_teacher():
    row = card([teacher_row(95.0), *student_rows("kd_ig", drawn(93.1, 2))]).loc["headline_gap"]
    assert row["value"] == pytest.approx(-1.9 + 1.54 * 0.316, abs=0.01)
    assert row["verdict"] == UNDECIDED  # one teacher a side: each of them is a draw, too
    assert (
        card([teacher_row(95.0), *student_rows("kd_ig", drawn(90, 2))]).loc["headline_gap", "verdict"] == NOT_REPRODUCED
    )


def test_campaigns_do_not_matter_and_resamples_are_kept_apart():
    deviation = verdicts.papers_spread()[0]
    rows = [teacher_row()]
    for seed, (method, best) in enumerate(claims.lookup("monte_carlo.best").items()):
        runs = drawn(best - 2.32 * deviation, seed, 60, deviation)
        rows += student_rows(method, runs, train_images=40000, train_fraction=0.8)
    table = card([{**row, "campaign": "monte-carlo"} for row in rows])
    assert set(table[table["group"] == "resampling"]["verdict"]) == {REPRODUCED}
    assert table.loc["resampled_kd_ig_over_student", "verdict"] == REPRODUCED
    assert set(table[table["group"] == "ablation"]["verdict"]) == {NOT_RUN}


def test_explained_students_are_compared_where_their_maps_were_measured():
    rows = [row | {"run_id": f"{row['method']}{row['seed']}"} for row in
            (*student_rows("student", drawn(91.2, 1, 5)), *student_rows("kd_ig", drawn(92, 2, 5)))]  # fmt: skip
    measured = [("student", 0.50, 3), ("kd_ig", 0.60, 4)]
    explanations = pd.DataFrame(
        {"run_id": f"{method}{seed}", "measure": "spearman", "value": value}
        for method, mean, luck in measured
        for seed, value in enumerate(drawn(mean, luck, 5, 0.01))
    )
    ledger = [teacher_row(), *rows]
    row = card(ledger, explanations=explanations).loc["maps_alike"]
    assert (row["verdict"], row["runs"]) == (REPRODUCED, 5)
    assert row["value"] == pytest.approx(0.1)
    swapped = explanations.assign(value=1 - explanations["value"])
    assert card(ledger, explanations=swapped).loc["maps_alike", "verdict"] == NOT_REPRODUCED
    assert card(ledger).loc["maps_alike", "verdict"] == NOT_RUN
    twice = pd.concat([explanations, explanations])
    assert card(ledger, explanations=twice).loc["maps_alike", "value"] == pytest.approx(0.1)
    own_maps = [row | {"pairing": "matched"} for row in ledger]
    assert card(own_maps, explanations=explanations).loc["maps_alike", "matched_verdict"] == REPRODUCED


def test_explaining_once_is_held_against_the_work_of_one_training():
    """50 steps forward and back for each image, against 100 epochs forward, back to the input and to the weights."""
    row = card([]).loc["explaining_once"]
    macs = {claim: claims.lookup(claim) for claim in ("teacher_million_macs", "compression.1.million_macs")}
    by_hand = 50 * 2 * macs["teacher_million_macs"] / (100 * 3 * macs["compression.1.million_macs"])
    assert row["value"] == pytest.approx(by_hand, rel=1e-3)
    assert row["verdict"] == REPRODUCED


def test_an_attribution_that_breaks_an_axiom_is_found(monkeypatch):
    """Gradient times input gives attribution where nothing changed."""
    for measured in (counted.sensitivity, counted.implementation_invariance):
        measured.cache_clear()
    monkeypatch.setattr(counted, "integrated_gradients", lambda _net, image, *_rest, **_more: image * 1.0)
    assert counted.sensitivity("student", 17) < 100
    for measured in (counted.sensitivity, counted.implementation_invariance):
        measured.cache_clear()


def test_what_only_others_have_is_not_testable_and_a_sentence_is_held_against_its_list():
    table = card([])
    outside = table[table["measure"].isin(claims.OUT_OF_REACH)]
    assert set(outside["verdict"]) == {NOT_TESTABLE}
    assert table.loc["literature_largest_gain", "value"] == max(claims.lookup("literature_on_cifar10.accuracy_changes"))
    assert table.loc["literature_largest_loss", "verdict"] == REPRODUCED


def test_the_authors_own_figures_on_imagenet_decide_nothing_and_point_the_other_way():
    row = card([]).loc["imagenet_printed"]
    assert row["verdict"] == UNDECIDED
    assert row["found"] == evidence.PAPER
    assert row["high"] < 0


def test_latency_is_judged_when_it_was_measured():
    assert card([]).loc["speedup", "verdict"] == NOT_RUN
    assert card([], {5: Speedup(1.5, 1.4, 1.6)}).loc["speedup", "verdict"] == NOT_REPRODUCED
    table = card([], {5: Speedup(10.0, 9.5, 10.5), 17: Speedup(100.0, 95.0, 105.0)})
    assert set(table.loc[["speedup", "speedup_k5", "speedup_k17"], "verdict"]) == {REPRODUCED}
    assert table.loc["speedup_k3", "verdict"] == NOT_RUN
    assert table.loc["speedup_k17", "claimed"] == pytest.approx(140 / 1.35)


BRIEF = evidence.protocol(brief.NAME)


def brief_rows(method: str, accuracies: list[float], setting: brief.Setting = brief.DEFAULT, **changes) -> list[dict]:
    own = {"epochs": brief.EPOCHS, "schedule": brief.SCHEDULE, **setting._asdict()}
    return student_rows(method, accuracies, **{**own, **changes})


def brief_study(gains: dict[str, float], **changes: object) -> list[dict]:
    """A teacher, and five seeds of each method of the brief protocol with these gains over `student`."""
    means = {method: 90.0 + gains.get(method, 0.0) for method in brief.METHODS}
    runs = [brief_rows(m, drawn(means[m], n, brief.SEEDS, 0.02), **changes) for n, m in enumerate(means)]
    return [teacher_row(), *(row for rows in runs for row in rows)]


def of_kind(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    return table[table["evidence"] == kind]


def test_brief_runs_settle_the_claims_on_their_protocol_and_tell_nothing_of_the_papers():
    table = card(brief_study({"kd": 0.4, "ig": 0.3, "kd_ig": 1.2}))
    its = of_kind(table, BRIEF)
    assert set(its["verdict"]) == {REPRODUCED}
    assert set(its["found"]) == {BRIEF}
    assert its.loc["brief_kd_ig_together", "value"] == pytest.approx(1.2 - 0.4 - 0.3)
    others = of_kind(table, evidence.TRAINED)
    assert set(others["verdict"]) <= {NOT_RUN, NOT_TESTABLE, REPRODUCED}
    assert list(others.index[others["verdict"] == REPRODUCED]) == ["teacher"]
    students = others.drop("teacher")
    assert students[["value", "short"]].isna().all(axis=None)
    assert not students["short_budget"].str.contains(brief.NAME).any()


def test_runs_at_the_papers_settings_tell_nothing_of_the_brief_claims():
    its = of_kind(card(typical(1.0)), BRIEF)
    assert set(its["verdict"]) == {NOT_RUN}
    assert its[["value", "short"]].isna().all(axis=None)


def test_brief_runs_change_nothing_in_a_scorecard_of_the_papers_claims():
    alone, beside = card(typical(1.0)), card([*typical(1.0), *brief_study({"kd": 5.0})[1:]])
    pd.testing.assert_frame_equal(of_kind(alone, evidence.TRAINED), of_kind(beside, evidence.TRAINED))
    assert campaigns.main_runs(pd.DataFrame(brief_study({}))).empty
    own_maps = student_rows("kd_ig", drawn(92.0, 1), pairing="matched")
    both = pd.DataFrame([*own_maps, *brief_rows("kd_ig", [99.0], pairing="matched")])
    assert campaigns.main_runs(both)["test_accuracy"].max() < 95
    assert not {name for name in scorecard.conflicting() if name in of_kind(alone, BRIEF).index}


def test_a_row_of_one_protocol_is_no_evidence_for_a_claim_of_the_other():
    rows = {"": student_rows("kd_ig", [92.0])[0], brief.NAME: brief_rows("kd_ig", [92.0])[0]}
    table = eligibility.prepared(ledgers.table([teacher_row(), *rows.values()]))
    lacks = {
        (own, claim.protocol): eligibility.shortfall(table.iloc[place], claim)
        for place, own in enumerate(rows, start=1)
        for claim in claims.claims()
        if claim.name in ("mean_kd_ig", "kd_ig_over_kd", "brief_kd_ig_over_kd")
    }
    assert (lacks["", ""], lacks[brief.NAME, brief.NAME]) == ("", "")
    assert "20 epochs in place of 100" in lacks[brief.NAME, ""]
    assert "schedule one_cycle in place of constant" in lacks[brief.NAME, ""]
    assert "100 epochs in place of 20" in lacks["", brief.NAME]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32"},
        {"epochs": 21},
        {"pairing": "edges"},
        {"train_images": 500},
        {"validation_images": 5000},
        {"data_md5": "other data"},
        {"finished": "2026-11-27T17:00Z"},
        {"teacher_sha256": "another"},
    ],
)
def test_a_brief_run_counts_at_the_registered_settings_only(changes):
    gains = {"kd": 0.4, "ig": 0.3, "kd_ig": 1.2}
    rows = brief_study(gains)
    others = [
        row
        for method, gain in gains.items()
        for row in brief_rows(method, drawn(80.0 + gain, 1, brief.SEEDS), **changes)
    ]
    student = [row for row in rows if row["method"] in ("student", "teacher")]
    assert set(of_kind(card([*student, *others]), BRIEF)["verdict"]) == {NOT_RUN}
    mixed = of_kind(card([*others, *rows]), BRIEF)
    assert mixed["value"].tolist() == pytest.approx(of_kind(card(rows), BRIEF)["value"].tolist())


def test_of_two_settings_the_first_one_in_use_counts_and_a_seed_that_was_not_planned_does_not():
    later = {"setting": brief.ALTERNATIVES[0], "finished": "2099-02-02T00:00Z"}
    first, second = brief_study({"kd_ig": 0.0}), brief_study({"kd_ig": 3.0}, **later)
    more = [row | {"seed": row["seed"] + brief.SEEDS} for row in brief_study({"kd_ig": 3.0})[1:]]
    alone, beside = (card(rows).loc["brief_kd_ig_over_kd"] for rows in (first, [*second, *more, *first]))
    assert (beside["value"], beside["runs"]) == (pytest.approx(alone["value"]), brief.SEEDS)
    assert alone["value"] == pytest.approx(0.0)


def test_direct_and_conceptual_brief_runs_have_a_verdict_each():
    rows = brief_study({"kd": 0.4, "ig": 0.3, "kd_ig": 1.2})
    own = brief_study({"kd": 0.4, "ig": 0.3, "kd_ig": 0.4}, pairing="matched")[1:]
    row = card([*rows, *own[brief.SEEDS :]]).loc["brief_kd_ig_over_kd"]  # `student` once: it takes nothing of a teacher
    assert (row["verdict"], row["matched_verdict"]) == (REPRODUCED, NOT_REPRODUCED)
    assert (row["value"], row["matched_value"]) == pytest.approx((0.8, 0.0))
    assert row["matched_low"] < row["matched_value"] < row["matched_high"]
    assert "conceptual replication" in CHAPTER.reasons(row)


@pytest.mark.parametrize(
    ("gain", "spread", "verdict"),
    [
        (0.5, 0.02, REPRODUCED),
        (0.1, 0.01, verdicts.RESERVATIONS),  # there, and smaller than the margin
        (0.0, 0.02, NOT_REPRODUCED),
        (-0.5, 0.02, NOT_REPRODUCED),
        (0.5, 1.0, UNDECIDED),
    ],
)
def test_a_direction_is_judged_by_its_sign_and_the_margin(gain, spread, verdict):
    runs = {"kd": drawn(90.0, 1, brief.SEEDS, spread), "kd_ig": drawn(90.0 + gain, 2, brief.SEEDS, spread)}
    rows = [teacher_row(), *(row for method, its in runs.items() for row in brief_rows(method, its))]
    assert card(rows).loc["brief_kd_ig_over_kd", "verdict"] == verdict


def test_a_brief_claim_that_waits_tells_its_own_price():
    paragraph = CHAPTER.reasons(card([]).loc["brief_kd_ig_over_kd"])
    assert "It takes 5 runs of `kd_ig` and `kd` with k = 5, 20 epochs and 50,000 images" in paragraph


def test_another_protocol_is_a_row_of_its_own():
    kinds = scorecard.by_kind(card(brief_study({"kd": 0.4, "ig": 0.3, "kd_ig": 1.2})))
    assert kinds.loc[BRIEF].sum() == kinds.loc[BRIEF, REPRODUCED] == 5
    assert evidence.PROTOCOL not in kinds.index
    assert list(kinds.index) == evidence.in_order(kinds.index)


def test_the_headline_counts_each_kind_by_itself():
    table = card([], {5: Speedup(1.5, 1.4, 1.6)})
    kinds = scorecard.by_kind(table)
    assert kinds.sum(axis=1).sum() == len(table)
    assert kinds.loc[evidence.TRAINED, [*verdicts.DECIDED, UNDECIDED]].sum() == 0
    trained = int((table["evidence"] == evidence.TRAINED).sum())
    assert f"{evidence.TRAINED}: 0 of {trained} claims tested" in cells_of("16", "headline").headline(table)


def test_every_verdict_comes_with_a_paragraph_that_names_it_and_its_numbers():
    rows = [*typical(1.0), *student_rows("kd_ig", drawn(92.0, 3), pairing="matched")]
    rows = [row for row in rows if row["method"] != "ig_at"] + student_rows("ig_at", drawn(92.0, 4, spread=0.01))
    table = card(rows, {5: Speedup(1.5, 1.4, 1.6)})
    assert set(table["verdict"]) >= {REPRODUCED, UNDECIDED, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN}
    for _name, row in table.iterrows():
        paragraph = CHAPTER.reasons(row)
        if any(isinstance(path, str) for path in row["paths"]):
            assert scorecard.written(row["claimed"], row["unit"]) in paragraph
        assert row["source"] in paragraph
        assert f"[chapter {row['chapter'][:2]}]({row['chapter']}.ipynb)" in paragraph
        if row["verdict"] in (*verdicts.DECIDED, UNDECIDED):
            assert f"*{row['verdict']}*" in paragraph
            assert row["found"] in paragraph
            assert scorecard.written(row["value"], row["unit"]) in paragraph


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (92.5, "%", "92.50 %"),
        (0.834, "points", "+0.83 points"),
        (543498.0, "", "543,498"),
        (4.6e-16, "relative", "5e-16 relative"),
        (10.8, "×", "10.8 ×"),
        (1121.706, "×", "1121.71 ×"),
        (140.0, "ms", "140 ms"),
        (np.nan, "%", ""),
    ],
)
def test_numbers_are_written_with_their_unit(value, unit, text):
    assert scorecard.written(value, unit) == text
