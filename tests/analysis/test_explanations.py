"""The table of explanations: intervals of known coverage, rows that are never lost, seeds before images."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from kdig_utils.analysis import explanations
from kdig_utils.analysis.explanations import QUICK, mean_over_images
from kdig_utils.experiments.study import open_study
from kdig_utils.method import models


def rows(run_id: str, method: str = "kd", seed: int = 0, value: float = 0.5, measure: str = "spearman") -> pd.DataFrame:
    facts = (run_id, method, 5, seed, measure, value, value - 0.1, value + 0.1, 20)
    return pd.DataFrame([facts], columns=list(explanations.COLUMNS))


def test_the_interval_over_images_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [mean_over_images(torch.randn(60, generator=generator), seed=trial) for trial in range(150)]
    covered = sum(mean.low <= 0 <= mean.high for mean in found)
    assert stats.binomtest(covered, 150, 0.95).pvalue > 0.001


def test_truth_values_get_wilsons_interval_and_undefined_ones_are_left_out() -> None:
    all_right = mean_over_images(torch.ones(20, dtype=torch.bool))
    assert (all_right.value, all_right.high) == pytest.approx((1, 1))
    assert all_right.low == pytest.approx(20 / (20 + stats.norm.ppf(0.975) ** 2))  # Wilson's limit, by hand
    some = mean_over_images(torch.tensor([1.0, float("nan"), 3.0]))
    assert (some.value, some.images) == (2.0, 2)
    assert np.isnan(mean_over_images(torch.tensor([float("nan")])).value)


def test_a_share_is_the_ratio_of_means_and_not_the_mean_of_ratios() -> None:
    error, scale = torch.tensor([1.0, 0.0, 8.0, 1.0]), torch.tensor([1.0, 4.0, 4.0, 1.0])
    found = mean_over_images(error, scale)
    assert found.value == 1.0
    assert found.low < 1 < found.high
    exact = mean_over_images(3 * scale, scale)
    assert exact[:3] == pytest.approx((3, 3, 3))


def test_rows_are_added_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "explanations.csv"
    assert explanations.read(path).empty
    for frame in (rows("12e45678", value=0.5), rows("b", seed=1), rows("", "edges"), rows("12e45678", value=0.9)):
        explanations.record(frame, path)
    table = explanations.read(path)
    assert table["run_id"].tolist() == ["12e45678", "b", ""]  # a hash is text, never a number
    assert table["value"].tolist() == [0.5, 0.5, 0.5]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of explanations"):
        explanations.read(path)


def test_one_seed_keeps_its_images_interval_and_several_get_that_of_the_seeds() -> None:
    values = [0.4, 0.5, 0.9]
    table = pd.concat(
        [rows(f"r{seed}", seed=seed, value=value) for seed, value in enumerate(values)] + [rows("x", "ig")]
    )
    found = explanations.by_method(table).set_index("method")
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found.loc["kd", ["value", "low", "high"]].tolist() == pytest.approx([0.6, low, high])
    assert found.loc["ig", ["value", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    assert found["seeds"].tolist() == [3, 1]


class Bright(nn.Module):
    """Ten logits from the mean colours: fast, differentiable, and no reader of pictures."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) @ torch.linspace(-1, 1, 30).view(3, 10)


@pytest.fixture(scope="module")
def asked() -> explanations.Examination:
    images = explanations.first_images(open_study("published").test, 100)
    return explanations.examination(Bright(), images, dataclasses.replace(QUICK, images=20))


def test_the_teacher_is_perfectly_like_itself_and_all_measures_are_there(asked: explanations.Examination) -> None:
    found = explanations.explain(Bright(), asked).set_index("measure")
    assert found.loc[["spearman", "cosine", "top_tenth"], "value"].tolist() == pytest.approx([1, 1, 1])
    assert found.loc["unexplained", "value"] == pytest.approx(0, abs=1e-6)  # a linear model
    assert found.loc["severity_0", "images"] == QUICK.corrupted
    names = {"spearman_shuffled", "deletion_random", "signed_share", "ece", "severity_5", "fog", "sensitivity"}
    assert names <= set(found.index)
    within = found.dropna()
    assert ((within["low"] <= within["value"] + 1e-9) | (within.index == "ece")).all()


def test_the_controls_have_no_run_and_no_perfect_likeness(asked: explanations.Examination) -> None:
    table = explanations.explain_controls(asked)
    assert set(table["method"]) == set(explanations.CONTROLS)
    assert (table["run_id"] == "").all()
    assert table["value"].between(-1, 1).all()
    # A linear model of the mean colours weighs the difference to the baseline and nothing else.
    assert (table.query("measure == 'spearman'").set_index("method")["value"].idxmax()) == "difference"


def test_each_run_with_weights_is_explained_once_and_a_deadline_stops_between_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, path, seen = open_study("published"), tmp_path / "explanations.csv", []

    def quick(network: nn.Module, _asked: explanations.Examination) -> pd.DataFrame:
        seen.append(models.weights_sha256(network))
        both = pd.concat([rows(""), rows("", measure="unexplained")])
        return both.loc[:, ["measure", "value", "low", "high", "images"]]

    monkeypatch.setattr(explanations, "explain", quick)
    monkeypatch.setattr(explanations, "examination", lambda *_: None)
    monkeypatch.setattr(explanations, "explain_controls", lambda _asked: rows("", "edges"))
    explanations.explain_runs(study, QUICK, path, deadline=-np.inf)
    assert seen == []
    ledger = study.ledger.read()
    asked = explanations.explain_runs(study, QUICK, path, runs=ledger[ledger["method"] == "kd"])
    assert set(asked["method"]) == {"kd", "edges"}
    table = explanations.explain_runs(study, QUICK, path)
    assert set(table["run_id"]) - {""} <= set(ledger["run_id"])
    assert {"teacher", "student", "kd", "ig", "kd_ig", "edges"} <= set(table["method"])
    count = len(seen)
    assert len(explanations.explain_runs(study, QUICK, path)) == len(table)
    assert len(seen) == count


def test_without_captum_two_measures_wait_and_a_later_call_adds_them(
    asked: explanations.Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lent machine lacks it; what it measured stays as it is."""
    study, path = open_study("published"), tmp_path / "explanations.csv"
    one = study.ledger.read().query("method == 'kd'")
    monkeypatch.setattr(explanations, "examination", lambda *_: asked)
    with monkeypatch.context() as bare:
        bare.setattr(explanations, "find_spec", lambda _name: None)
        there = explanations.explain_runs(study, QUICK, path, runs=one)
        assert len(explanations.explain_runs(study, QUICK, path, runs=one)) == len(there)
    here = explanations.explain_runs(study, QUICK, path, runs=one)
    pd.testing.assert_frame_equal(here.head(len(there)), there)
    assert set(here["measure"]) - set(there["measure"]) == {"sensitivity", "unexplained"}
    assert not here.duplicated(["run_id", "method", "measure"]).any()
