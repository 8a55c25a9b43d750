"""A study: each run is made once, goes on after a stop, and is in the ledger only with all that belongs to it."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdig_utils import artifacts, cifar10, engine, models, paths, study, training
from kdig_utils.cifar10 import ImageSet
from kdig_utils.runs import COLUMNS, Ledger, RunSpec, TeacherSpec
from kdig_utils.study import MAIN_METHODS, PROFILES, Study, open_study

SPECS = tuple(RunSpec(method, k=17, epochs=1, batch_size=8) for method in ("student", "kd_ig"))


class Stop(Exception):
    pass


@pytest.fixture
def small_study(tmp_path: Path, sample_train: ImageSet, sample_test: ImageSet) -> Study:
    """Two tiny students on 16 images, beside a teacher with random weights."""
    made = Study("smoke", tmp_path, Ledger(tmp_path / "runs.csv"), tmp_path / "curves", specs=SPECS, n_steps=2)
    made.__dict__.update(  # what would be computed when first asked for
        train=sample_train.subset(torch.arange(16)),
        test=sample_test.subset(torch.arange(20)),
        teacher=models.teacher(1).eval(),
        device=torch.device("cpu"),
    )
    return made


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("student_run", "teacher_run"):
        monkeypatch.setattr(training, name, lambda *_arguments, **_options: pytest.fail("trained"))


def test_students_are_trained_once_and_everything_belongs_to_the_row(
    small_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = small_study.students()
    assert rows["method"].tolist() == ["student", "kd_ig"]
    assert (rows["campaign"] == "main").all()
    for _index, row in rows.iterrows():
        curve, student = small_study.curve(row["run_id"]), small_study.student(row["method"], k=17)
        assert len(curve) == row["epochs"] == 1
        assert row["test_accuracy"] == pytest.approx(curve["test_accuracy"].iloc[-1], abs=1e-6)
        assert row["test_accuracy"] == pytest.approx(engine.accuracy(student, small_study.test), abs=1e-4)
        assert row["weights_sha256"] == models.weights_sha256(student)
        assert (row["parameters"], row["macs"]) == (models.count_parameters(student), models.count_macs(student))
        assert (row["train_images"], row["test_images"]) == (16, 20)
        assert 0 <= row["test_accuracy"] <= 100
        assert row["data_md5"] == small_study.train.md5
        assert pd.notna(row["finished"])
    kd_ig = rows.iloc[1]
    assert kd_ig["teacher_sha256"] == models.weights_sha256(small_study.teacher)
    assert not rows.iloc[0]["teacher_sha256"]
    for name in ("student_run", "teacher_run"):
        monkeypatch.setattr(training, name, lambda *_arguments, **_options: pytest.fail("trained again"))
    assert small_study.students().equals(rows)
    assert not list((small_study.folder / "checkpoints").glob("*.pt"))


def test_students_carry_no_progress_of_another_campaign(small_study: Study) -> None:
    small_study.run(RunSpec("student", k=17, epochs=1, batch_size=8, seed=7), campaign="other")
    assert small_study.students()["seed"].tolist() == [0, 0]


@pytest.mark.parametrize("last_written", ["weights", "curve"])
def test_run_that_stops_before_its_row_is_made_again(
    small_study: Study, monkeypatch: pytest.MonkeyPatch, last_written: str
) -> None:
    spec = dataclasses.replace(SPECS[0], data_md5=small_study.train.md5)

    def stop(*_arguments: object, **_options: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(*((Ledger, "append") if last_written == "curve" else (paths, "replacing")), stop)
        if last_written == "weights":
            patch.setattr(engine, "save_checkpoint", lambda *_arguments: None)
        with pytest.raises(Stop):
            small_study.run(spec)
    assert small_study.ledger.read().empty
    row = small_study.run(spec)
    assert row["weights_sha256"] == models.weights_sha256(small_study.weights(spec))


def test_teacher_of_the_study_is_trained_once(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.replace(small_study, teacher_spec=TeacherSpec(epochs=1, batch_size=8))
    made.__dict__.update(train=small_study.train, test=small_study.test, device=torch.device("cpu"))
    first = models.weights_sha256(made.teacher)
    again = dataclasses.replace(made)
    again.__dict__.update(train=small_study.train, test=small_study.test, device=torch.device("cpu"))
    monkeypatch.setattr(training, "train_teacher", lambda *_arguments, **_options: pytest.fail("trained again"))
    assert models.weights_sha256(again.teacher) == first
    assert not again.teacher.training
    row = made.ledger.read().iloc[0]
    assert row["method"] == "teacher"
    assert row["weights_sha256"] == first


def test_unknown_student_lists_what_was_run(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Study, "students", lambda _study: pd.DataFrame({"method": ["student"], "k": [17], "run_id": ["x"]})
    )
    with pytest.raises(KeyError, match="no 'kd_at' with k = 17: it has student, kd_ig"):
        small_study.student("kd_at", k=17)


@pytest.mark.parametrize("profile", ["Published", "quick", ""])
def test_unknown_profile_lists_the_known_ones(profile: str) -> None:
    with pytest.raises(ValueError, match="choose one of published, smoke, full") as caught:
        open_study(profile)
    assert repr(profile) in str(caught.value)


def test_published_trains_nothing_and_reads_the_repository(no_training: None) -> None:
    published = open_study("published")
    assert published.specs == ()
    assert published.teacher_spec is None
    assert published.ledger.path == paths.ledger_path()
    assert published.curves == paths.curves_folder()
    assert (len(published.train), len(published.test)) == (1000, 2000)
    rows = published.students()
    assert set(COLUMNS) <= set(rows.columns)
    assert "teacher" not in set(rows["method"])
    for run_id in rows["run_id"]:
        assert not published.curve(run_id).empty


def test_published_names_what_the_repository_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    published = open_study("published")
    with pytest.raises(KeyError, match="no artifact 'kd_k5'"):
        published.student("kd")
    assert published.students().empty


def test_smoke_keeps_out_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path))
    smoke = open_study("smoke")
    for place in (smoke.folder, smoke.ledger.path, smoke.curves):
        assert tmp_path in place.parents
    assert smoke.train.labels.bincount().tolist() == smoke.test.labels.bincount().tolist() == [50] * 10
    assert "500" in smoke.train.name
    assert [spec.method for spec in smoke.specs] == list(MAIN_METHODS)


def test_full_is_the_papers_settings() -> None:
    full = open_study("full")
    assert full.specs == tuple(RunSpec(method) for method in MAIN_METHODS)
    assert full.n_steps == 50
    assert full.teacher_spec == study.TEACHER_RECIPE
    assert full.ledger.path == paths.ledger_path()


@pytest.mark.parametrize("profile", PROFILES)
def test_opening_a_study_does_nothing_yet(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_training: None
) -> None:
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "none"))
    monkeypatch.setattr(cifar10, "fetch", lambda *_arguments: pytest.fail("downloaded"))
    assert open_study(profile).profile == profile
    assert not (tmp_path / "none").exists()


def test_workspace_is_where_the_variable_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path))
    assert open_study("smoke").folder == tmp_path / "smoke"


def test_model_for_a_method() -> None:
    assert models.count_parameters(artifacts.model_for("teacher", 0)) == 2_236_682
    assert models.count_parameters(artifacts.model_for("kd_ig", 5)) == 543_498
