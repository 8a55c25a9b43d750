"""The scorecard on ledgers whose truth was planted: what is there is found, what is not there is not."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from kdig_utils import claims
from kdig_utils.latency import Speedup
from kdig_utils.paths import repository_root
from kdig_utils.runs import COLUMNS, RunSpec

TEACHER = "a good teacher"
FULL = {"train_images": 50000, "test_images": 10000}


def teacher_row(accuracy: float = 94.0, epochs: int = 200, **changes: object) -> dict:
    facts = {"method": "teacher", "k": 0, "seed": 0, "weights_sha256": TEACHER, "spec": "{}"}
    return {**facts, **FULL, "epochs": epochs, "test_accuracy": accuracy, **changes}


def student_rows(method: str, accuracies: list[float], train_images: int = 50000, **changes: object) -> list[dict]:
    rows = []
    for seed, accuracy in enumerate(accuracies):
        spec = RunSpec(method, seed=seed, teacher_sha256="" if method == "student" else TEACHER, **changes)
        facts = {
            name: getattr(spec, name)
            for name in ("run_id", "method", "k", "seed", "epochs", "pairing", "teacher_sha256")
        }
        images = {**FULL, "train_images": train_images}
        rows.append({**facts, **images, "test_accuracy": accuracy, "spec": json.dumps(asdict(spec))})
    return rows


def card(rows: list[dict], **measured: Speedup) -> pd.DataFrame:
    return claims.scorecard(pd.DataFrame(rows, columns=list(COLUMNS)), measured).set_index("name")


def drawn(mean: float, seed: int, n: int = 10) -> list[float]:
    """Accuracies with exactly this mean and the paper's spread."""
    noise = np.random.default_rng(seed).normal(size=n)
    return list(mean + 0.3 * (noise - noise.mean()) / noise.std())


def papers_own_runs() -> list[dict]:
    runs = {method: values for method, values in claims.paper()["ablation_runs"].items() if isinstance(values, list)}
    return [teacher_row(), *(row for method, values in runs.items() for row in student_rows(method, values))]


def test_every_claim_has_a_number_of_the_paper_and_a_chapter():
    for claim in claims.claims():
        assert np.isfinite(claim.claimed)
        assert claim.group in claims.groups()
        assert (repository_root() / "notebooks" / f"{claim.chapter}.ipynb").is_file()
    assert len({claim.name for claim in claims.claims()}) == len(claims.claims())


def test_a_path_that_the_paper_does_not_have_is_named():
    with pytest.raises(KeyError, match=r"headline\.nothing"):
        claims.lookup("headline.nothing")


def test_sizes_are_reproduced_without_any_run():
    table = card([])
    assert set(table.query("group == 'size'")["verdict"]) == {"reproduced"}
    others = table.query("group not in ('size', 'latency')")
    assert set(others["verdict"]) == {"not run yet"}
    assert others["value"].isna().all()
    assert others["short"].isna().all()


def test_the_papers_own_runs_give_the_storys_leads():
    table = card(papers_own_runs())
    assert table.loc["kd_ig_over_student", "verdict"] == "reproduced"
    assert table.loc["kd_ig_over_kd", "verdict"] == "reproduced with reservations"
    assert table.loc["ig_over_student", "verdict"] == "not reproduced"
    assert table.loc["headline_kd_ig", "verdict"] == "reproduced with reservations"
    assert set(table.query("group == 'ablation'")["verdict"]) == {"reproduced"}


def test_a_planted_effect_is_found():
    rows = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(92.0, 2))]
    row = card(rows).loc["kd_ig_over_student"]
    assert row["verdict"] == "reproduced"
    assert row["value"] == pytest.approx(0.8)
    assert row["low"] < 0.8 < row["high"]


def test_a_planted_null_is_not_found():
    rows = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(91.2, 2))]
    assert card(rows).loc["kd_ig_over_student", "verdict"] == "not reproduced"


def test_an_effect_of_another_size_is_reproduced_with_reservations():
    rows = [teacher_row(), *student_rows("student", drawn(90.0, 1)), *student_rows("kd_ig", drawn(92.0, 2))]
    assert card(rows).loc["kd_ig_over_student", "verdict"] == "reproduced with reservations"


def test_an_effect_in_the_other_direction_is_not_reproduced():
    rows = [teacher_row(), *student_rows("student", drawn(92.0, 1)), *student_rows("kd_ig", drawn(91.2, 2))]
    assert card(rows).loc["kd_ig_over_student", "verdict"] == "not reproduced"


def test_a_difference_is_judged_after_correcting_for_all_that_were_tested():
    base = [teacher_row(), *student_rows("student", drawn(91.2, 1)), *student_rows("kd_ig", drawn(91.52, 2))]
    alone = card(base).loc["kd_ig_over_student"]
    others = [*student_rows("kd", drawn(91.3, 3)), *student_rows("ig", drawn(91.2, 4))]
    among = card(base + others).loc["kd_ig_over_student"]
    assert alone["p_holm"] == alone["p"] < 0.05
    assert among["p_holm"] > 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 5}, "epochs 5, not 100"),
        ({"pairing": "shuffled"}, "pairing shuffled"),
        ({"alpha": 0.5}, "alpha 0.5, not 0.01"),
        ({"train_images": 500}, "500 train images, not 50,000"),
    ],
)
def test_runs_with_other_settings_are_shown_and_do_not_count(changes, reason):
    row = card([teacher_row(), *student_rows("kd_ig", drawn(92.0, 2), **changes)]).loc["mean_kd_ig"]
    assert row["verdict"] == "not run yet"
    assert reason in row["reason"]
    assert np.isnan(row["value"])
    assert row["short"] == pytest.approx(92.0)
    assert f"{changes.get('epochs', 100)} epochs" in row["short_budget"]


def test_a_weak_teacher_does_not_count_except_for_a_student_without_one():
    rows = [teacher_row(90.0), *student_rows("kd_ig", drawn(92.0, 2)), *student_rows("student", drawn(91.2, 1))]
    table = card(rows)
    assert table.loc["mean_kd_ig", "verdict"] == "not run yet"
    assert "teacher 90.0 %" in table.loc["mean_kd_ig", "reason"]
    assert table.loc["mean_student", "verdict"] == "reproduced"


def test_a_teacher_that_the_ledger_does_not_hold_does_not_count():
    assert "teacher not in the ledger" in card(student_rows("kd_ig", drawn(92.0, 2))).loc["mean_kd_ig", "reason"]


def test_too_few_seeds_do_not_count():
    row = card([teacher_row(), *student_rows("kd_ig", drawn(92.0, 2, n=9))]).loc["mean_kd_ig"]
    assert row["verdict"] == "not run yet"
    assert row["reason"] == "9 of 10 seeds"


def test_a_teacher_may_reach_its_number_early_but_fails_only_at_the_full_budget():
    assert card([teacher_row(94.2, epochs=60)]).loc["teacher", "verdict"] == "reproduced"
    assert card([teacher_row(90.0, epochs=5)]).loc["teacher", "verdict"] == "not run yet"
    assert card([teacher_row(92.0, epochs=200)]).loc["teacher", "verdict"] == "not reproduced"


def test_a_mean_far_away_is_not_reproduced_and_one_in_reach_is_with_reservations():
    far, near = (card([teacher_row(), *student_rows("kd_ig", drawn(mean, 2))]) for mean in (90.0, 92.45))
    assert far.loc["mean_kd_ig", "verdict"] == "not reproduced"
    assert near.loc["mean_kd_ig", "verdict"] == "reproduced with reservations"


def test_latency_is_judged_when_it_was_measured():
    assert card([]).loc["speedup", "verdict"] == "not run yet"
    assert card([], latency_ratio=Speedup(1.5, 1.4, 1.6)).loc["speedup", "verdict"] == "not reproduced"
    assert card([], latency_ratio=Speedup(10.0, 9.5, 10.5)).loc["speedup", "verdict"] == "reproduced"
    assert card([]).loc["student_ms", "verdict"] == "not testable here"


def test_effects_agree_with_scipy():
    from scipy import stats

    runs = {"a": drawn(91.0, 1), "b": drawn(91.4, 2)}
    row = claims.effects(runs, [("b", "a")]).iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_ind(runs["b"], runs["a"], equal_var=False).pvalue)
    assert row["value"] == pytest.approx(0.4)


def test_a_claim_with_an_unknown_measure_or_a_negative_tolerance_is_refused():
    known = asdict(claims.claims()[0])
    with pytest.raises(ValueError, match="unknown measure 'guess'"):
        claims.Claim(**{**known, "measure": "guess"})
    with pytest.raises(ValueError, match="tolerance -1"):
        claims.Claim(**{**known, "tolerance": -1})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (92.5, "%", "92.50 %"),
        (0.834, "points", "+0.83 points"),
        (543498.0, "", "543,498"),
        (10.8, "×", "10.8 ×"),
        (np.nan, "%", ""),
    ],
)
def test_numbers_are_written_with_their_unit(value, unit, text):
    assert claims.written(value, unit) == text
