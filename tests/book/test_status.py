"""A line of the status, and of the tables that the book makes of it, tells apart what was trained apart."""

import json
from dataclasses import asdict, replace

import pandas as pd
import pytest
from ledgers import student_rows, table

from kdig_utils import paths
from kdig_utils.book import status
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import RunSpec, TeacherSpec


def row_of(spec: RunSpec | TeacherSpec, accuracy: float, campaign: str = "ablation") -> dict:
    found = {name: getattr(spec, name) for name in ("run_id", "method", "k", "seed", "epochs", "pairing")}
    return {**found, "campaign": campaign, "test_accuracy": accuracy, "spec": json.dumps(asdict(spec))}


def lines(*specs: RunSpec | TeacherSpec) -> list[str]:
    return status.ledger_lines(pd.DataFrame(row_of(spec, 90.0 + place) for place, spec in enumerate(specs)))


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("kd", {"alpha": 0.3}, "alpha 0.3"),
        ("kd", {"temperature": 4.0}, "temperature 4.0"),
        ("kd", {"answers": "online"}, "answers online"),
        ("kd", {"pairing": "shuffled"}, "pairing shuffled"),
        ("ig", {"overlay_probability": 0.4}, "overlay probability 0.4"),
        ("at", {"gamma": 8.0}, "gamma 8.0"),
        ("student", {"validation_images": 5000}, "validation images 5000"),
        ("kd_ig", {"precision": "float32", "alpha": 0.1}, "alpha 0.1, precision float32"),
    ],
)
def test_no_mean_is_taken_over_two_settings(method, changes, words):
    spec = RunSpec(method)
    found = lines(spec, replace(spec, **changes), replace(spec, seed=1), replace(spec, teacher_sha256="b", seed=2))
    assert found == [
        f"ablation: {method} k=5, 100 epochs: 3 runs, mean {(90 + 92 + 93) / 3:.2f} % "
        f"({spec.run_id} {replace(spec, seed=1).run_id} {replace(spec, teacher_sha256='b', seed=2).run_id})",
        f"ablation: {method} k=5, 100 epochs, {words}: 1 run, mean 91.00 % ({replace(spec, **changes).run_id})",
    ]


def test_what_a_method_does_not_read_does_not_split_its_runs():
    assert len(lines(RunSpec("student"), RunSpec("student", alpha=0.3, pairing="shuffled", seed=1))) == 1


def test_teachers_with_cutout_held_out_images_or_earlier_epochs_are_told_apart():
    whole = TeacherSpec()
    others = [
        replace(whole, cutout=16),
        replace(whole, validation_images=5000),
        replace(whole, initial_sha256="a" * 64),
    ]
    found = lines(whole, *others)
    for words in ("200 epochs:", "cutout 16:", "validation images 5000:", "after earlier epochs:"):
        assert sum(words in line for line in found) == 1
    assert "aaaa" not in "".join(found)


def test_each_run_of_the_committed_ledger_stands_on_one_line():
    ledger = Ledger(paths.ledger_path()).read()
    found = status.ledger_lines(ledger)
    assert all(sum(run_id in line for line in found) == 1 for run_id in ledger["run_id"])


def test_the_box_of_a_chapter_counts_the_runs_that_are_missing_and_goes_when_none_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    paths.ledger_path().parent.mkdir()
    of_methods = [student_rows(method, [90.0] * 3, "matched", precision="float32") for method in ("student", "kd_ig")]
    runs = [run for its in of_methods for run in its]
    table(runs[1:]).to_csv(paths.ledger_path(), index=False)
    assert "1 of 6 runs" in status.waiting_box("precision")
    table(runs).to_csv(paths.ledger_path(), index=False)
    assert status.waiting_box("precision") == ""
