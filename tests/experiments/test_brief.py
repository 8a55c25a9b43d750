"""The brief protocol: which setting it has, who chose it, and what can no longer change it."""

import dataclasses
import json
from dataclasses import asdict

import pandas as pd
import pytest

from kdig_utils.experiments import brief
from kdig_utils.experiments.ledger import COLUMNS
from kdig_utils.method.spec import RunSpec

FIRST, SECOND, THIRD = brief.ALTERNATIVES


def ledger(*runs: tuple[RunSpec, dict]) -> pd.DataFrame:
    rows = [
        {
            **asdict(spec),
            "run_id": spec.run_id,
            "finished": "2099-01-01T00:00Z",
            "spec": json.dumps(asdict(spec)),
            **facts,
        }
        for spec, facts in runs
    ]
    return pd.DataFrame([{"method": "teacher", "finished": "2098-01-01T00:00Z", "spec": "{}"}, *rows], columns=COLUMNS)


def tried(setting: brief.Setting, accuracy: float, **changes: object) -> tuple[RunSpec, dict]:
    run = next(run for run in brief.candidates() if (run.learning_rate, run.batch_size) == setting)
    return dataclasses.replace(run, **changes), {"validation_accuracy": accuracy}


def used(setting: brief.Setting, finished: str, method: str = "student", **changes: object) -> tuple[RunSpec, dict]:
    return brief.spec(method, 0, setting, **changes), {"finished": finished, "test_accuracy": 91.0}


def test_where_nothing_was_tried_it_has_the_default():
    assert brief.chosen(ledger()) == brief.DEFAULT
    assert brief.chosen(pd.DataFrame(columns=COLUMNS)) == brief.DEFAULT
    assert brief.chosen(ledger((RunSpec("student"), {"validation_accuracy": 99.0}))) == brief.DEFAULT


def test_of_those_tried_the_best_on_validation_images_is_chosen():
    assert brief.chosen(ledger(tried(FIRST, 89.0), tried(THIRD, 91.0), tried(SECOND, 90.0))) == THIRD
    assert brief.chosen(ledger(tried(FIRST, 89.0))) == FIRST
    assert brief.chosen(ledger(tried(FIRST, float("nan")), tried(SECOND, 80.0))) == SECOND
    assert brief.chosen(ledger(tried(FIRST, 89.0, data_md5="that of the images"))) == FIRST


def test_test_accuracy_other_seeds_and_other_images_choose_nothing():
    by_test = [(run, {**facts, "test_accuracy": 99.0}) for run, facts in [tried(FIRST, 89.0)]]
    assert brief.chosen(ledger(*by_test, tried(SECOND, 90.0))) == SECOND
    for other in ({"seed": 0}, {"validation_images": 100}, {"method": "kd_ig"}, {"k": 17}):
        assert brief.chosen(ledger(tried(FIRST, 99.0, **other), tried(SECOND, 90.0))) == SECOND


@pytest.mark.parametrize("method", brief.METHODS)
def test_the_first_run_in_use_settles_it_whatever_is_tried_or_trained_later(method):
    first, later = used(FIRST, "2099-01-02T00:00Z", method), used(SECOND, "2099-01-03T00:00:00+00:00")
    undated = used(SECOND, None)
    for rows in ([first], [later, first], [tried(SECOND, 99.0), first], [undated, later, first, tried(THIRD, 99.9)]):
        assert brief.chosen(ledger(*rows)) == FIRST


def test_a_study_that_trains_less_finds_its_own_runs():
    def scaled(spec: RunSpec) -> RunSpec:
        return dataclasses.replace(spec, epochs=1, batch_size=spec.batch_size // 4)

    runs = [(scaled(run), facts) for run, facts in (tried(FIRST, 30.0), tried(THIRD, 20.0))]
    assert brief.chosen(ledger(*runs), scaled) == FIRST
    assert brief.chosen(ledger(*runs)) == brief.DEFAULT
    small = (scaled(brief.spec("kd", 0, THIRD)), {"finished": "2099-01-02T00:00Z"})
    assert brief.chosen(ledger(*runs, small), scaled) == THIRD


def test_a_run_of_the_paper_is_never_brief_and_a_run_that_makes_the_choice_is_not_in_use():
    assert not brief.includes(RunSpec("kd_ig"))
    assert brief.setting_of(RunSpec("kd_ig")) is None
    for setting in brief.SETTINGS:
        assert brief.setting_of(brief.spec("kd_ig", 3, setting, pairing="shuffled")) == setting
        for changes in ({"epochs": 100}, {"schedule": "constant"}, {"learning_rate": 1e-3}):
            assert brief.setting_of(dataclasses.replace(brief.spec("kd", 0, setting), **changes)) is None
    assert {brief.setting_of(run) for run in brief.candidates()} == {None}
    assert all(map(brief.includes, brief.candidates()))


def test_the_protocol_has_each_run_once_and_no_claim_uses_the_seed_of_the_choice():
    runs = brief.specs(SECOND)
    assert len({run.run_id for run in runs}) == len(runs) == brief.SEEDS * (1 + 3 * len(brief.PAIRINGS))
    assert {brief.setting_of(run) for run in runs} == {SECOND}
    assert brief.CHOICE_SEED not in {run.seed for run in runs}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
