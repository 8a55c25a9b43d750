"""Sizes that can be counted by hand, means that SciPy confirms, and a frontier without dominated points."""

import ledgers
import numpy as np
import pandas as pd
import pytest
from chapters import cells_of
from ledgers import TEACHER, row_of, teacher_row
from scipy import stats
from torch import nn

from kdig_utils.analysis import claims
from kdig_utils.method.spec import RunSpec

CHAPTER = cells_of("10", "state_bytes", "accuracy_by_size")


def ledger(*rows: dict) -> pd.DataFrame:
    return ledgers.table([teacher_row(), *rows])


def row(method: str, accuracy: float, **changes: object) -> dict:
    spec = RunSpec(method, teacher_sha256="" if method == "student" else TEACHER, **changes)
    return row_of(spec, accuracy, train_images=50000)


def test_sizes_are_those_of_the_paper():
    table = CHAPTER.sizes.set_index("k")
    for listed in claims.lookup("compression"):
        assert table.loc[listed["k"], "parameters"] == listed["parameters"]
        assert table.loc[listed["k"], "factor"] == pytest.approx(listed["factor"], abs=0.005)
        assert table.loc[listed["k"], "million_macs"] == pytest.approx(listed["million_macs"], abs=0.005)
    assert (np.diff(table[["parameters", "million_macs", "fp32", "fp16", "int8"]], axis=0) < 0).all()


def test_bytes_are_counted_as_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    weights, others = 3 * 4 * 9 + 4 * 10, 4 * 4 + 10  # four numbers a channel in batch norm, ten biases
    assert CHAPTER.state_bytes(network, "fp32") == 4 * (weights + others)
    assert CHAPTER.state_bytes(network, "fp16") == 2 * (weights + others)
    assert CHAPTER.state_bytes(network, "int8") == weights + 4 * others


def test_means_have_the_interval_of_scipy_and_only_the_right_runs_count():
    accuracies = [91.0, 91.4, 91.6]
    right = [row("kd_ig", value, seed=seed, k=9) for seed, value in enumerate(accuracies)]
    wrong = [
        row("kd_ig", 50.0, seed=3, k=9, epochs=3),
        row("kd_ig", 50.0, seed=4, k=9, pairing="shuffled"),
        row("kd_ig", 50.0, seed=5, k=9, alpha=0.9),
        {**row("kd_ig", 50.0, seed=6, k=9), "train_images": 40000},
    ]
    (found,) = CHAPTER.accuracy_by_size(ledger(*right, *wrong), 100, 50000).itertuples()
    interval = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    assert (found.method, found.k, found.runs, found.teacher) == ("kd_ig", 9, 3, 94.0)
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.accuracy == pytest.approx(np.mean(accuracies))


def test_students_of_another_teacher_are_not_averaged_with_ours():
    mine = [row("kd_ig", 91.0 + seed, seed=seed) for seed in range(3)]
    others = [{**row("kd_ig", 50.0, seed=seed), "teacher_sha256": "another teacher"} for seed in (3, 4)]
    (found,) = CHAPTER.accuracy_by_size(ledger(*mine, *others), 100, 50000).itertuples()
    assert (found.runs, found.accuracy, found.teacher) == (3, 92.0, 94.0)


def test_one_run_has_no_interval_and_an_empty_ledger_no_rows():
    (single,) = CHAPTER.accuracy_by_size(ledger(row("student", 91.0)), 100, 50000).itertuples()
    assert np.isnan(single.low)
    assert np.isnan(single.teacher)
    assert CHAPTER.accuracy_by_size(ledger(), 100, 50000).empty
