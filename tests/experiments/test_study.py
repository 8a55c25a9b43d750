"""A study: each run is made once, goes on after a stop, and is in the ledger only with all that belongs to it."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kdig_utils import locks, paths
from kdig_utils.analysis import explanations
from kdig_utils.experiments import packs, side_by_side, study
from kdig_utils.experiments.ledger import COLUMNS, Ledger
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.study import PROFILES, Study, open_study
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import MAIN_METHODS, RunSpec, TeacherSpec

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
        monkeypatch.setattr(study, name, lambda *_arguments, **_options: pytest.fail("trained"))


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
        assert row["test_accuracy"] == pytest.approx(models.accuracy(student, small_study.test), abs=1e-4)
        assert row["weights_sha256"] == models.weights_sha256(student)
        assert (row["parameters"], row["macs"]) == (models.count_parameters(student), models.count_macs(student))
        assert (row["train_images"], row["test_images"]) == (16, 20)
        assert 0 <= row["test_accuracy"] <= 100
        assert row["data_md5"] == small_study.train.md5
        assert pd.notna(row["finished"])
    kd_ig = rows.iloc[1]
    assert kd_ig["teacher_sha256"] == models.weights_sha256(small_study.teacher)
    assert not rows.iloc[0]["teacher_sha256"]
    monkeypatch.setattr(study, "student_run", lambda *_arguments, **_options: pytest.fail("trained again"))
    assert small_study.students().equals(rows)
    assert not list((small_study.folder / "checkpoints").glob("*.pt"))


def test_students_carry_no_progress_of_another_campaign(small_study: Study) -> None:
    small_study.run_all([dataclasses.replace(SPECS[0], seed=7)], campaign="other")
    assert small_study.students()["seed"].tolist() == [0, 0]


@pytest.mark.parametrize(("step", "curves"), [((pd.DataFrame, "to_csv"), 0), ((Ledger, "append"), 1)])
def test_run_that_stops_before_its_row_is_made_again(
    small_study: Study, monkeypatch: pytest.MonkeyPatch, step: tuple[type, str], curves: int
) -> None:
    """Weights are written first, then the curve, then the row."""

    def stop(*_arguments: object, **_options: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(*step, stop)
        with pytest.raises(Stop):
            small_study.run_all(SPECS[:1])
    assert small_study.ledger.read().empty
    assert small_study.weights(small_study.completed(SPECS[0]))
    assert len(list(small_study.curves.glob("*.csv"))) == curves
    (run_id,) = small_study.run_all(SPECS[:1])
    (row,) = small_study.ledger.read().to_dict("records")
    assert row["run_id"] == run_id
    assert row["weights_sha256"] == models.weights_sha256(small_study.weights(small_study.completed(SPECS[0])))


def test_teacher_of_the_study_is_trained_once(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.replace(small_study, teacher_spec=TeacherSpec(epochs=1, batch_size=8))
    made.__dict__.update(train=small_study.train, test=small_study.test, device=torch.device("cpu"))
    first = models.weights_sha256(made.teacher)
    again = dataclasses.replace(made)
    again.__dict__.update(train=small_study.train, test=small_study.test, device=torch.device("cpu"))
    monkeypatch.setattr(study, "teacher_run", lambda *_arguments, **_options: pytest.fail("trained again"))
    assert models.weights_sha256(again.teacher) == first
    assert not again.teacher.training
    assert models.weights_sha256(artifacts.rounded(again.teacher, "teacher", 0)) == first, "half a file holds it"
    row = made.ledger.read().iloc[0]
    assert row["method"] == "teacher"
    assert row["weights_sha256"] == first


def test_weights_that_are_not_the_ledgers_are_refused_everywhere(small_study: Study) -> None:
    (run_id,) = small_study.run_all(SPECS[:1])
    file, spec = small_study.folders["weights"] / f"{run_id}.safetensors", small_study.completed(SPECS[0])
    right = file.read_bytes()
    damaged = bytearray(right)
    damaged[-1000:] = bytes(1000)
    for content in (bytes(damaged), artifacts.content_of(models.student(17, seed=8), half=False)):
        file.write_bytes(content)
        for use in (lambda: small_study.weights(spec), lambda: small_study.student("student", k=17)):
            with pytest.raises(ValueError, match=rf"{run_id}.*delete the file") as caught:
                use()
            assert str(file) in str(caught.value)
        rows = small_study.ledger.read()
        with pytest.raises(ValueError, match="delete the file"):
            list(explanations._networks(small_study, rows))
    file.write_bytes(right)
    assert small_study.weights(spec)


def test_checkpoints_of_finished_runs_are_removed_when_met_and_not_packed(small_study: Study) -> None:
    (run_id,) = small_study.run_all(SPECS[:1])
    checkpoints = small_study.folders["checkpoints"]
    (checkpoints / f"{run_id}.pt").write_bytes(b"left by a kill")
    (checkpoints / "0123456789ab.pt").write_bytes(b"open")
    assert checkpoints / f"{run_id}.pt" not in packs.belongings(small_study.ledger.read(), small_study.folders)
    small_study.run_all(SPECS[:1])
    assert [path.name for path in checkpoints.glob("*.pt")] == ["0123456789ab.pt"]


def test_a_run_that_another_process_ended_meanwhile_keeps_its_row_and_weights(
    small_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process was stopped for longer than its lease; the other one trained with other threads, say."""
    spec, file = small_study.completed(SPECS[0]), None
    together = study.train_together

    def overtaken(*arguments: object) -> Iterator[object]:
        nonlocal file
        for run in together(*arguments):
            file = small_study.folders["weights"] / f"{spec.run_id}.safetensors"
            artifacts.save_weights(models.student(17, seed=5), file)
            sha256 = models.weights_sha256(models.student(17, seed=5))
            small_study.ledger.append(spec, test_accuracy=12.0, weights_sha256=sha256)
            yield run

    monkeypatch.setattr(study, "train_together", overtaken)
    small_study.run_all(SPECS[:1])
    assert small_study.ledger.read()["test_accuracy"].tolist() == [12.0]
    assert models.weights_sha256(small_study.weights(spec)) == models.weights_sha256(models.student(17, seed=5))


@pytest.mark.parametrize("ends", ["with the run", "without"])
def test_a_teacher_that_another_process_trains_is_waited_for(
    small_study: Study, no_training: None, capsys: pytest.CaptureFixture[str], ends: str
) -> None:
    spec = TeacherSpec(epochs=1, batch_size=8, data_md5=small_study.train.md5)
    held, over = threading.Event(), threading.Event()

    def other() -> None:
        claim = locks.lease(small_study.folder / "reserved" / spec.run_id)
        held.set()
        over.wait(1.0)
        if ends == "with the run":
            small_study.ledger.append(spec, test_accuracy=50.0)
        over.wait(0.0 if ends == "with the run" else 60.0)
        claim.release()

    worker = threading.Thread(target=other)
    worker.start()
    assert held.wait(60)
    row = small_study.run(spec, deadline=time.monotonic() + (60.0 if ends == "with the run" else 0.5))
    over.set()
    worker.join()
    assert (row is None) == (ends == "without")
    assert f"process {os.getpid()}" in capsys.readouterr().out


def test_plain_gradients_are_made_once_and_refused_if_damaged(small_study: Study) -> None:
    signals = small_study.signals
    maps = small_study.with_saliency(signals).maps
    (file,) = (small_study.folder / "signals").glob("*_saliency.npy")
    before = file.stat().st_mtime_ns
    assert torch.equal(small_study.with_saliency(signals).maps, maps)
    assert file.stat().st_mtime_ns == before
    content = file.read_bytes()
    np.save(file, maps.numpy()[:-1])
    for damaged in (content[:1000], b"", file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged .*delete it"):
            small_study.with_saliency(signals)


def test_weights_of_teachers_and_of_three_seeds_go_home_before_open_runs(small_study: Study) -> None:
    """A pack may be full before its end: an open run can be trained again, and a teacher is what all wait for."""
    teacher = TeacherSpec(seed=7, epochs=1, batch_size=8, data_md5=small_study.train.md5)
    small_study.run_all(RunSpec("student", k=17, epochs=1, batch_size=8, seed=seed) for seed in range(4))
    small_study.run(teacher)
    (small_study.folders["checkpoints"] / "0123456789ab.pt").write_bytes(b"open")
    rows = small_study.ledger.read()
    files = packs.belongings(rows, small_study.folders)
    assert [path.parent.name for path in files] == ["curves"] * 5 + ["weights"] * 4 + ["checkpoints"]
    chosen = rows.set_index("run_id").loc[[path.stem for path in files[5:9]]]
    assert chosen["seed"].tolist() == [7, 0, 1, 2]
    assert chosen.index[0] == teacher.run_id
    assert packs.belongings(rows[:0], small_study.folders) == [files[-1]]


def test_a_run_whose_time_is_over_is_put_aside_and_goes_on(small_study: Study) -> None:
    teacher = TeacherSpec(epochs=2, batch_size=8, data_md5=small_study.train.md5)
    assert small_study.run(teacher, deadline=time.monotonic()) is None
    calls = 1
    while (row := small_study.run(teacher, deadline=time.monotonic() + 0.1 * calls)) is None:
        calls += 1  # the slices grow: on a busy machine a short one may end before the first step
        assert {path.stem for path in small_study.folders["checkpoints"].glob("*.pt")} <= {teacher.run_id}
        assert calls < 100
    assert calls > 1
    assert row["run_id"] == teacher.run_id
    assert len(small_study.curve(teacher.run_id)) == 2


def test_runs_that_were_put_aside_go_on_before_the_others(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, made = [RunSpec("student", k=17, epochs=1, batch_size=8, seed=seed) for seed in range(4)], []
    checkpoints = small_study.folders["checkpoints"]
    checkpoints.mkdir(parents=True)
    (checkpoints / f"{small_study.completed(specs[2]).run_id}.pt").touch()
    monkeypatch.setattr(Study, "_student_run", lambda _study, spec, *_rest: spec.seed)
    monkeypatch.setattr(study, "train_together", lambda runs, *_rest: made.extend(runs) or [])
    small_study.run_all(specs)
    assert made == [2, 0, 1, 3]


def test_the_ledger_says_which_runs_were_compiled(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = (dataclasses.replace(SPECS[0], seed=seed) for seed in (1, 2))
    small_study.run_all([plain])
    monkeypatch.setattr(study, "compiled_network", lambda _report: models.logits_and_features)
    small_study.run_all([compiled], way=Way(compiled=True))
    assert small_study.ledger.read()["compiled"].tolist() == ["", "yes"]


def test_as_many_runs_side_by_side_as_suit_the_device(small_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(study, "train_together", lambda runs, way, *_rest: asked.append(way.at_once) or [])
    small_study.run_all([])
    small_study.run_all([], way=Way(3))
    assert asked == [side_by_side.SIDE_BY_SIDE["cpu"], 3]


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
