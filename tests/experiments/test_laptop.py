"""The laptop protocol: what is registered is what runs, from the repository alone, apart from all other runs."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdig_utils.analysis import claims
from kdig_utils.experiments import laptop
from kdig_utils.experiments.laptop import BASE, CONDITIONS
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.method import artifacts, cifar10, losses, models, precompute, training
from kdig_utils.method.spec import RunSpec

REGISTERED = claims.protocols()[laptop.NAME]


def test_the_conditions_are_the_registered_ones() -> None:
    assert {name: getattr(BASE, name) for name in REGISTERED["base"]} == REGISTERED["base"]
    assert {name: dataclasses.replace(BASE, **its) for name, its in REGISTERED["conditions"].items()} == CONDITIONS


def test_every_run_of_every_contrast_is_in_the_queue_once() -> None:
    queue = laptop.queue()
    assert len({run.run_id for run in queue}) == len(queue)
    for contrast in REGISTERED["contrasts"]:
        assert set(laptop.runs(contrast["weights"], range(contrast["seeds"]))) <= set(queue)


def test_surface_and_crossed_runs_are_as_registered() -> None:
    l5, l6 = REGISTERED["questions"]["L5"], REGISTERED["questions"]["L6"]
    cells = Counter((run.alpha, run.temperature) for run in laptop.surface())
    assert cells == dict.fromkeys([(a, t) for a in l5["alphas"] for t in l5["temperatures"]], l5["seeds"])
    assert {(run.train_images, run.validation_images) for run in laptop.surface()} == {(2000, 500)}
    crossed = Counter(run.sample_seed for run in laptop.crossed())
    assert crossed == dict.fromkeys(range(l6["draws"]), l6["seeds"])


def test_runs_that_need_no_data_set_come_first() -> None:
    pooled = [laptop.needs_the_pool(run) for run in laptop.queue()]
    assert not any(pooled[: pooled.index(True)])
    first = laptop.queue()[: len(laptop.MAIN) * laptop.SEEDS]
    assert {run.seed for run in first[: len(laptop.MAIN)]} == {0}  # seeds outermost: a part is balanced
    assert Counter(run.seed for run in first) == dict.fromkeys(range(laptop.SEEDS), len(laptop.MAIN))


def test_no_run_is_one_of_the_papers_or_shares_its_setting() -> None:
    for name, run in CONDITIONS.items():
        assert run.setting() != RunSpec(run.method).setting(), name


def test_the_student_has_the_registered_size() -> None:
    network = models.student(BASE.k, stem_stride=BASE.stem_stride)
    assert (models.count_parameters(network), models.count_macs(network)) == (185_738, 9_089_664)
    student_tap, teacher_tap = models.attention_taps(BASE.k, BASE.stem_stride)
    small, large = network.eval(), models.teacher().eval()
    images = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        ours, theirs = small.features[: student_tap + 1](images), large.features[: teacher_tap + 1](images)
    assert ours.shape[2:] == theirs.shape[2:] == (8, 8)


def test_the_images_come_with_the_repository_and_are_the_first_of_each_class() -> None:
    images, sample = cifar10.load_laptop(), cifar10.load_sample("train")
    assert images.labels.bincount().tolist() == [250] * 10
    assert images.md5 == REGISTERED["data_md5"]
    assert images.subset(cifar10.first_of_each_class(images.labels, 100)).md5 == sample.md5


def test_the_frozen_signals_are_those_of_their_teacher(tmp_path: Path) -> None:
    images, teacher = cifar10.load_laptop(), artifacts.load("laptop_teacher")
    found = laptop.frozen_signals(images)
    assert models.weights_sha256(teacher) == found.manifest["teacher_sha256"] == REGISTERED["teacher_sha256"]
    few = torch.tensor([3, 1200, 2499])
    again, kept = precompute.compute_signals(teacher, images.subset(few), tmp_path, laptop.SIGNALS), found.rows(few)
    assert torch.allclose(kept.logits, again.logits, atol=1e-3)
    assert torch.allclose(kept.maps.float(), again.maps.float(), atol=0.01)
    assert torch.allclose(kept.attention, again.attention, atol=1e-3)


# Runs


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The protocol with two runs of a moment, on the images of the repository; the ledger they go to."""
    few = {"epochs": 1, "train_images": 80}
    runs = [laptop.spec("kd_ig_at", **few), laptop.spec("student", **few, initial="teacher")]
    ledger = tmp_path / "laptop.csv"
    monkeypatch.setattr(laptop, "queue", lambda: runs)
    monkeypatch.setattr(laptop, "has_cifar10", lambda: False)
    monkeypatch.setattr(laptop, "ledger_path", lambda: ledger)
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    threads = torch.get_num_threads()
    yield ledger
    torch.set_num_threads(threads)


def test_a_run_that_is_trained_again_is_the_same_bit_for_bit(tiny: Path) -> None:
    run_ids = laptop.train(tiny, Way(), math.inf, lambda line: None)
    rows = Ledger(tiny).read()
    assert rows["run_id"].tolist() == run_ids
    assert set(rows["test_images"]) == {2000}
    assert rows["sample_accuracy"].tolist() == rows["test_accuracy"].tolist()
    for run_id in run_ids:
        stored, again = laptop.rerun(run_id, lambda line: None)
        assert stored["weights_sha256"] == again["weights_sha256"]
        assert "bit for bit" in laptop.compared(stored, again)
    assert len(Ledger(tiny).read()) == 2, "a run made again is not entered"


def test_a_difference_as_large_as_between_machines_is_told_from_a_larger_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = pd.DataFrame(
        {"committed": [50.0, 50, 50], "again": [51.0, 49, 50], "same_weights": [False, False, True]}
    )
    measured.to_csv(tmp_path / "laptop_spread.csv", index=False)
    monkeypatch.setattr(laptop, "ledger_path", lambda: tmp_path / "laptop.csv")
    assert laptop.spread() == pytest.approx(2.0)
    stored, near, far = (
        pd.Series({"method": "kd", "seed": 0, "sample_accuracy": accuracy, "weights_sha256": sha})
        for accuracy, sha in ((50.0, "a"), (51.9, "b"), (52.1, "c"))
    )
    assert "within the 2.0 points" in laptop.compared(stored, near)
    assert "more than the 2.0 points" in laptop.compared(stored, far)
    (tmp_path / "laptop_spread.csv").unlink()
    assert "not measured yet" in laptop.compared(stored, far)


def test_a_run_that_the_ledger_does_not_have_cannot_be_made_again(tiny: Path) -> None:
    with pytest.raises(ValueError, match="0123456789ab"):
        laptop.rerun("0123456789ab", lambda line: None)


def test_more_images_than_there_are_of_a_class_are_refused() -> None:
    labels = cifar10.load_laptop().labels
    with pytest.raises(ValueError, match="5000"):
        training.training_positions(labels, RunSpec("student", train_images=5000))
    drawn, _held_out = training.training_positions(labels, RunSpec("student", train_images=500, sample_seed=3))
    assert labels[drawn].bincount().tolist() == [50] * 10
    first, held_out = training.training_positions(labels, RunSpec("student", train_images=2000, validation_images=500))
    assert len(first) == 2000
    assert not set(first.tolist()) & set(held_out.tolist())


def test_label_smoothing_is_distillation_from_a_teacher_that_knows_nothing() -> None:
    """The loss that trains the small teachers has the gradient of PyTorch's own label smoothing."""
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, blank = torch.arange(16) % 10, torch.zeros(16, 10)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    ours = 0.9 * plain + 0.1 * losses.distillation_loss(logits, blank, temperature=1.0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, smoothed)]
    torch.testing.assert_close(*gradients)


def test_the_small_teachers_are_as_accurate_as_their_record_says_and_the_smoothed_one_is_less_sure() -> None:
    record = json.loads((laptop.signals_folder() / "small_teachers.json").read_text())
    images, sure = cifar10.load_sample("test"), {}
    for name, entry in record.items():
        network = laptop.small_teacher(float(name))
        assert abs(models.accuracy(network, images) - entry["test_accuracy"]) < 3  # 2,000 images in place of 10,000
        sure[name] = float(models.predict(network, images).softmax(1).amax(1).mean())
    assert sure["0.1"] < sure["0"] - 0.05
