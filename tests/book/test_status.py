"""A line of the status, and of the tables that the book makes of it, tells apart what was trained apart."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from ledgers import student_rows, table

from kdig_utils import __main__ as command_line
from kdig_utils import paths
from kdig_utils.analysis import plan
from kdig_utils.book import status
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method import artifacts, models
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


# Damaged files


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a network, a store of signals and a checkpoint, all whole."""
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    (tmp_path / "artifacts").mkdir()
    facts = {"method": "student", "k": 17, "test_accuracy": 50.0, "run_id": "0123456789ab"}
    artifacts.publish("student_k17", models.student(17), half=False, **facts)
    store = tmp_path / "workspace" / "full" / "signals" / "abc_50_9"
    store.mkdir(parents=True)
    for name, array in {"logits": np.ones((40, 10)), "done": np.arange(40) < 30}.items():
        np.save(store / f"{name}.npy", array)
    checkpoint = tmp_path / "workspace" / "full" / "checkpoints" / "0123456789ab.pt"
    checkpoint.parent.mkdir()
    spec, empty = RunSpec("kd", epochs=9), {"model": {}, "optimizer": {}, "generator": {}, "curve": []}
    moving = {"epoch": 4, "position": 0, "loss_sum": 0.0, "seconds": 1.0}
    torch.save({"run_id": spec.run_id, "spec": asdict(spec), **empty, **moving}, checkpoint)
    return tmp_path


def test_status_of_whole_files_says_how_far_they_are(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "abc_50_9 (full): 30 of 40 images" in shown
    assert "0123456789ab (full): kd seed 0, 4 of 9 epochs done" in shown
    assert "student_k17: whole" in shown


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("**/done.npy", "delete"),
        ("**/logits.npy", "delete"),
        ("**/*.pt", "delete"),
        ("**/*.safetensors", "git"),
        ("**/manifest.json", "git"),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.99])
def test_status_says_which_file_is_damaged_and_goes_on(
    reader: Path, pattern: str, remedy: str, kept: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = reader.glob(pattern)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert command_line.main(["status"]) == 1
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "damaged" in line]
    assert any(path.stem in line or path.parent.name in line for line in lines)
    assert all(remedy in line for line in lines)
    assert len(lines) == 1 or path.name == "manifest.json", "what lists the artifacts is asked more than once"
    sections = ("ledger", "queue", "campaigns", "runs in progress", "teacher signals", "artifacts")
    assert [line for line in shown.splitlines() if not line.startswith(" ")] == list(sections)


@pytest.mark.parametrize("text", ["", "claims: [", "rules: 7\n"])
def test_status_goes_on_without_the_claims(
    reader: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what needs them it says that claims.yml is damaged."""
    monkeypatch.setattr(plan, "progress_lines", lambda _ledger: yaml.safe_load(text)["claims"])
    assert command_line.main(["status"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"claims\.yml .*damaged .*git", shown)
    assert "student_k17: whole" in shown


def test_the_box_of_a_chapter_counts_the_runs_that_are_missing_and_goes_when_none_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    paths.ledger_path().parent.mkdir()
    of_methods = [student_rows(method, [90.0] * 3, "matched", precision="float32") for method in ("student", "kd_ig")]
    runs = [run for its in of_methods for run in its]
    table(runs[1:]).to_csv(paths.ledger_path(), index=False)
    assert "1 of 6 runs" in status.waiting_box("precision")
    table(runs).to_csv(paths.ledger_path(), index=False)
    assert status.waiting_box("precision") == ""
