"""Numbers do not drift: a tiny seeded run of each method, and IG maps, against numbers that were committed.

`golden.json` names the versions and instructions that were measured, with the largest deviations, and the tolerances,
several times the worst. From PyTorch 2.4.0 (Python 3.11) to 2.15.0 (Python 3.13) no loss moves by more than 3e-7; other
instructions of a CPU move it by 5e-6. `python tests/method/test_golden.py` prints what it finds here.
"""

import functools
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kdig_utils.experiments import laptop
from kdig_utils.method import artifacts, cifar10, integrated_gradients, losses, models, overlay, training
from kdig_utils.method.cifar10 import ImageSet, first_of_each_class
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import METHODS

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
IMAGES, BATCH, SHOWN, EXPLAINED, STEPS = 100, 16, 2, 4, 10
# The smallest student: in a deeper one seven steps make 0.1 of a deviation of 1e-6 in the first loss.
K = 17
Found = dict[str, list[float]]
Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def material() -> tuple[ImageSet, TeacherSignals, ImageSet]:
    """The images of the runs, what the frozen teacher says of them, and the test images."""
    images = cifar10.load_laptop()
    few = first_of_each_class(images.labels, IMAGES // 10)
    told = laptop.frozen_signals(images).rows(few)
    train = images.subset(few)
    settings = {**told.manifest["settings"], "tap": models.attention_tap(K)}
    manifest = {**told.manifest, "indices": train.indices.tolist(), "settings": settings}
    with torch.no_grad():
        teacher, pixels = artifacts.load("laptop_teacher"), train.images(torch.arange(IMAGES))
        _logits, features = models.logits_and_features(teacher, pixels, models.attention_tap(K))
    told = replace(told, attention=losses.attention_map(features), manifest=manifest)
    return train, told, cifar10.load_sample("test").subset(torch.arange(SHOWN))


def trained(method: str) -> Found:
    """The loss of each step of a run of one epoch, and what its student says of the first test images."""
    train, told, test = material()
    seen: list[float] = []
    loss_of = training.student_loss

    def noted(*arguments: object) -> torch.Tensor:
        loss = loss_of(*arguments)
        seen.append(float(loss.detach()))
        return loss

    spec = laptop.spec(method, k=K, stem_stride=1, epochs=1, train_images=IMAGES, batch_size=BATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "student_loss", noted)
        model, _epochs = training.train_student(spec, train, told)
    with torch.no_grad():
        logits = model(test.images(torch.arange(SHOWN)))
    return {"losses": seen, "logits": logits.flatten().tolist()}


def explained() -> Found:
    """The sum of the IG map of each of the first images, for the published teacher of the laptop protocol."""
    train, _told, _test = material()
    first = torch.arange(EXPLAINED)
    images, teacher = train.images(first), artifacts.load("laptop_teacher")
    start = integrated_gradients.baseline("mean_colour", images, cifar10.MEAN)
    attributions = integrated_gradients.integrated_gradients(teacher, images, start, train.labels[first], STEPS)
    return {"maps": integrated_gradients.attribution_map(attributions).flatten(1).sum(1).tolist()}


def deviations(found: Found, committed: Found) -> dict[str, float]:
    """The largest absolute deviation of each list of numbers; of `losses` the first step's stands apart."""
    found, committed = ({"first": its["losses"][:1], **its} if "losses" in its else its for its in (found, committed))
    return {
        name: max(abs(one - other) for one, other in zip(values, committed[name], strict=True))
        for name, values in found.items()
    }


def beyond(found: Found, committed: Found) -> list[str]:
    """What deviates from the committed numbers by more than its tolerance."""
    tolerated = GOLDEN["tolerance"]
    return [name for name, size in deviations(found, committed).items() if not size <= tolerated[name]]


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_run_of_each_method_gives_the_committed_numbers(method: str) -> None:
    found = trained(method)
    assert len(found["losses"]) == math.ceil(IMAGES / BATCH)
    assert beyond(found, GOLDEN["runs"][method]) == [], deviations(found, GOLDEN["runs"][method])


def test_ig_maps_have_the_committed_sums() -> None:
    assert beyond(explained(), GOLDEN["maps"]) == []


def test_tolerances_leave_room_for_all_that_was_measured() -> None:
    """Three times, at least, and no more than a tenth of a thousandth of a loss or a logit."""
    for measured in GOLDEN["versions"]:
        assert all(3 * size <= GOLDEN["tolerance"][name] for name, size in measured["deviation"].items())
    assert max(GOLDEN["tolerance"][name] for name in ("first", "losses", "logits")) <= 1e-4
    print(f"{len(GOLDEN['versions'])} installations and kinds of instructions")


# What is changed by a little is caught


def adam(**changed: object) -> Change:
    usual = torch.optim.Adam
    return lambda patch: patch.setattr(torch.optim, "Adam", lambda *its, **named: usual(*its, **named, **changed))


def batch_norm(name: str, value: float) -> Change:
    """Batch norms of the student with another constant."""
    usual = training.initial_student

    def initial(*its: object) -> models.Student:
        model = usual(*its)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(layer, name, value)
        return model

    return lambda patch: patch.setattr(training, "initial_student", initial)


def scaled(module: object, name: str, factor: float) -> Change:
    """A function of this module that returns so many times as much."""
    usual = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *its: factor * usual(*its))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        pytest.param("student", adam(eps=1e-6), id="Adam's epsilon"),
        pytest.param("student", adam(betas=(0.9, 0.99)), id="Adam's second decay"),
        pytest.param("student", batch_norm("momentum", 0.101), id="batch norm's momentum"),
        pytest.param("student", batch_norm("eps", 1.5e-5), id="batch norm's epsilon"),
        pytest.param("student", scaled(training, "crop_and_flip", 1.005), id="pixels"),
        pytest.param("kd", scaled(losses, "distillation_loss", 1.0001), id="temperature's factor"),
        pytest.param("ig", scaled(overlay, "blend", 1.002), id="overlay's blend"),
        pytest.param("at", scaled(losses, "attention_loss", 1.1), id="attention's weight"),
    ],
)
def test_a_small_change_is_caught(method: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    found = trained(method)
    print({name: f"{size:.1e}" for name, size in deviations(found, GOLDEN["runs"][method]).items()})
    assert beyond(found, GOLDEN["runs"][method])


def test_a_gradient_scaled_by_a_little_is_caught_in_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(integrated_gradients, "input_gradients", 1.001)(monkeypatch)
    assert beyond(explained(), GOLDEN["maps"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"runs": {method: trained(method) for method in METHODS}, "maps": explained()}
    versions = platform.python_version(), torch.__version__, torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"versions": versions, **found}, indent=1))
