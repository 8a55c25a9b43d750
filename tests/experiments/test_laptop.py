"""The laptop protocol: what is registered is what runs, from the repository alone, apart from all other runs."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from kdig_utils.analysis import claims
from kdig_utils.experiments import frozen_signals, laptop
from kdig_utils.experiments.laptop import BASE, CONDITIONS
from kdig_utils.method import artifacts, cifar10, models, precompute
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
    found = frozen_signals.read(laptop.signals_folder(), images)
    assert models.weights_sha256(teacher) == found.manifest["teacher_sha256"] == REGISTERED["teacher_sha256"]
    few = torch.tensor([3, 1200, 2499])
    again, kept = precompute.compute_signals(teacher, images.subset(few), tmp_path, laptop.SIGNALS), found.rows(few)
    assert torch.allclose(kept.logits, again.logits, atol=1e-3)
    assert torch.allclose(kept.maps.float(), again.maps.float(), atol=0.01)
    assert torch.allclose(kept.attention, again.attention, atol=1e-3)


def test_frozen_signals_come_back(tmp_path: Path) -> None:
    images = cifar10.load_laptop()
    found = frozen_signals.read(laptop.signals_folder(), images)
    frozen_signals.freeze(found, tmp_path)
    again = frozen_signals.read(tmp_path, images)
    for one, other in zip(found.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)
