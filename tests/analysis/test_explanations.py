"""The table of explanations: rows that are never lost, and each network explained once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kdig_utils.analysis import explanations
from kdig_utils.analysis.examination import QUICK, Examination, Mean
from kdig_utils.experiments.study import open_study


def rows(run_id: str, method: str = "kd_ig", seed: int = 0, value: float = 0.5) -> pd.DataFrame:
    facts = (run_id, method, 5, seed, "spearman", value, value - 0.1, value + 0.1, 20)
    return pd.DataFrame([facts], columns=list(explanations.COLUMNS))


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


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that are examined, in their order; they are asked two measures only."""
    networks: list[nn.Module] = []

    def examine(network: nn.Module, _asked: Examination) -> dict[str, Mean]:
        networks.append(network)
        return dict.fromkeys(("spearman", "unexplained"), Mean(0.5, 0.4, 0.6, 20))

    monkeypatch.setattr(explanations, "prepare", lambda *_: None)
    monkeypatch.setattr(explanations, "control_measures", lambda _asked: {"edges": {"spearman": torch.zeros(20)}})
    monkeypatch.setattr(explanations, "examine", examine)
    return networks


def test_each_run_with_weights_is_explained_once_and_a_deadline_stops_between_networks(
    measured: list[nn.Module], tmp_path: Path
) -> None:
    study, path = open_study("published"), tmp_path / "explanations.csv"
    explanations.explain_runs(study, QUICK, path, deadline=-np.inf)
    assert measured == []
    ledger = study.ledger.read()
    first = explanations.explain_runs(study, QUICK, path, runs=ledger[ledger["method"] == "kd_ig"])
    assert set(first["method"]) == {"kd_ig", "edges"}
    table = explanations.explain_runs(study, QUICK, path)
    assert set(table["run_id"]) - {""} <= set(ledger["run_id"])
    assert {"teacher", "kd_ig", "edges"} <= set(table["method"])
    count = len(measured)
    pd.testing.assert_frame_equal(explanations.explain_runs(study, QUICK, path), table)
    assert len(measured) == count


def test_a_measure_that_a_machine_left_out_is_added_and_what_it_measured_stays(
    measured: list[nn.Module], tmp_path: Path
) -> None:
    study, path = open_study("published"), tmp_path / "explanations.csv"
    one = study.ledger.read().query("method == 'kd_ig'").head(1)
    explanations.record(rows(one["run_id"].iloc[0], value=0.7), path)
    table = explanations.explain_runs(study, QUICK, path, runs=one)
    its = table[table["run_id"] == one["run_id"].iloc[0]].set_index("measure")["value"]
    assert its.to_dict() == {"spearman": 0.7, "unexplained": 0.5}
    assert len(measured) == 1
