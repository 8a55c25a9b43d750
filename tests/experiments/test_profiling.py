"""The floor of a training step: counts that can be checked by hand, and the benchmark that measures against it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdig_utils.experiments import profiling
from kdig_utils.method import models
from kdig_utils.method.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]
K = 17  # the smallest student: a stem, and one block of a depthwise and a linear convolution
FULL, HALF = 32 * 32, 16 * 16  # positions of the feature maps


@pytest.fixture(scope="module")
def smallest() -> models.Student:
    return models.student(K)


def test_layers_of_the_smallest_student_are_counted_as_by_hand(smallest: models.Student) -> None:
    """Stem 3 → 32, depthwise 32 → 32, linear 32 → 16 channels, all at 32 × 32 positions (paper.json, k = 17)."""
    layers = profiling.layer_elements(smallest)
    found = layers[layers["kind"] == "convolution"][["inputs", "outputs"]].to_numpy().tolist()
    assert found == [[3 * FULL, 32 * FULL], [32 * FULL, 32 * FULL], [32 * FULL, 16 * FULL]]
    assert layers["kind"].value_counts().to_dict() == {"convolution": 3, "batch norm": 3, "ReLU6": 2}


def test_a_block_adds_its_input_only_where_shapes_allow_it() -> None:
    """Stride 1 and as many channels out as in: of the 13 blocks of k = 5, eight."""
    layers = profiling.layer_elements(models.student(5))
    assert layers["kind"].value_counts()["residual sum"] == 8
    sums = layers[layers["kind"] == "residual sum"]
    assert (sums["inputs"] == sums["outputs"]).all()


def test_bytes_of_the_smallest_student_are_those_counted_by_hand(smallest: models.Student) -> None:
    inputs, outputs, activated = 67 * FULL, 80 * FULL, 64 * FULL
    eager = 3 * inputs + 3 * outputs + 8 * outputs + 5 * activated
    adam = 28 * models.count_parameters(smallest)
    assert profiling.step_bytes(smallest, 1, 2, profiling.EAGER) == 2 * eager + adam
    assert profiling.step_bytes(smallest, 64, 4, profiling.EAGER) == 64 * 4 * eager + adam


@pytest.mark.parametrize("k", models.REMOVABLE_BLOCKS)
def test_each_fusion_moves_fewer_bytes_and_no_other_work(k: int) -> None:
    student = models.student(k)
    moved = [profiling.step_bytes(student, 64, 2, traffic) for traffic in profiling.TRAFFIC.values()]
    assert moved == sorted(moved, reverse=True)
    assert profiling.step_macs(student, 64) == 3 * 64 * models.count_macs(student)


def test_students_an_hour_follow_from_the_papers_settings() -> None:
    """50,000 images in batches of 64 are 782 steps an epoch, the last one smaller; 100 epochs."""
    assert profiling.students_per_hour(3600 / 78_200, RunSpec("student")) == pytest.approx(1)
    assert profiling.students_per_hour(1.0, RunSpec("student", epochs=1)) == 3600 / 782
    assert profiling.students_per_hour(1.0, RunSpec("student", epochs=2), epoch_end_seconds=18.0) == 3600 / 1600


@pytest.mark.slow
def test_benchmark_measures_every_way_and_its_ratio() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDIG_ROOT": str(ROOT)}
    words = [sys.executable, ROOT / "benchmarks" / "training.py", "--quick"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "the authors' way" in ran.stdout
    assert "channels last" in ran.stdout
    assert "extrapolated" in ran.stdout


@pytest.mark.slow
def test_benchmark_of_the_signals_says_how_long_all_images_take() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDIG_ROOT": str(ROOT)}
    words = [sys.executable, ROOT / "benchmarks" / "signals.py", "--quick"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    row = json.loads(ran.stdout)
    assert row["seconds_for_50000"] == pytest.approx(50_000 / row["images"] * row["seconds"], rel=0.01)


def test_committed_rows_agree_with_themselves() -> None:
    """Students an hour follow from the milliseconds of a step, and the share from the floor, up to rounding."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    assert rows
    for row in rows:
        spec = RunSpec(row["method"], k=row["k"])
        step, between = row["ms_per_step"] / 1000, row["epoch_end_seconds"]
        hourly = profiling.students_per_hour(step, spec, epoch_end_seconds=between)
        assert row["students_per_hour"] == pytest.approx(hourly, rel=0.01)
        steps_alone = profiling.students_per_hour(step, spec)
        assert row["share_of_floor"] == pytest.approx(steps_alone / row["floor_students_per_hour"], rel=0.015)
        assert (row["workers"] > 0) == (row["way"] == "the authors' way")
        assert row["gigamacs_per_step"] * 1e9 == pytest.approx(
            profiling.step_macs(models.student(row["k"]), spec.batch_size), rel=0.005
        )
    first = {row["device"]: row for row in reversed(rows)}
    assert all(row["ratio"] == 1 and row["way"] == "the authors' way" for row in first.values())
