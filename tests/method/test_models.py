"""Teacher and students: the paper's numbers, torchvision's names, and the authors' own weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.transforms.functional import normalize

import kdig_utils
from kdig_utils.method import models

PAPER = json.loads((Path(kdig_utils.__file__).parent / "paper.json").read_text())
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def reference_mobilenet() -> MobileNetV2:
    """torchvision's network with the paper's setting and the stem's stride set to 1."""
    network = MobileNetV2(
        num_classes=10, inverted_residual_setting=PAPER["teacher"]["inverted_residual_setting_t_c_n_s"]
    )
    network.features[0][0].stride = (PAPER["teacher"]["stem_stride"],) * 2
    return network


def lively(network: nn.Module) -> nn.Module:
    """The network in evaluation mode with answers of order one: freshly initialised, they are 1e-9 and look alike."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        network.classifier[1].weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
        assert float(network.eval()(IMAGES).std()) > 0.1
    return network


# Sizes


def test_teacher_has_the_papers_size() -> None:
    network = models.teacher()
    assert models.count_parameters(network) == PAPER["teacher"]["parameters"] == 2_236_682
    assert models.count_macs(network) / 1e6 == pytest.approx(PAPER["teacher_million_macs"], abs=0.005)


@pytest.mark.parametrize("row", PAPER["compression"], ids=lambda row: f"k={row['k']}")
def test_student_has_the_papers_size(row: dict[str, float]) -> None:
    network = models.student(row["k"])
    assert models.count_parameters(network) == row["parameters"]
    assert models.count_macs(network) / 1e6 == pytest.approx(row["million_macs"], abs=0.005)
    factor = PAPER["teacher"]["parameters"] / models.count_parameters(network)
    assert factor == pytest.approx(row["factor"], abs=0.01)
    assert network(IMAGES).shape == (4, 10)


def test_every_k_of_the_paper_can_be_built() -> None:
    assert [row["k"] for row in PAPER["compression"]] == list(models.REMOVABLE_BLOCKS)


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32), 3 * 3 * 3 * 8 * 32 * 32),
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), (3, 32, 32), 3 * 3 * 3 * 8 * 16 * 16),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 16, 16), 3 * 3 * 8 * 16 * 16),
        (nn.Conv2d(8, 24, 1), (8, 16, 16), 8 * 24 * 16 * 16),
        (nn.Linear(96, 10), (96,), 960),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
            (3, 2, 2),
            48 + 32,
        ),
    ],
    ids=["dense", "stride", "depthwise", "pointwise", "linear", "sequence"],
)
def test_macs_of_a_known_layer(layer: nn.Module, shape: tuple[int, ...], by_hand: int) -> None:
    assert models.count_macs(layer, shape) == by_hand


def test_counting_leaves_the_model_as_it_was() -> None:
    network = models.student(17).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    models.count_macs(network)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


# Architecture


def test_teacher_is_torchvisions_network_on_normalised_input() -> None:
    reference = lively(reference_mobilenet())
    network = models.load_state(models.teacher(seed=1), reference.state_dict()).eval()
    input_of = PAPER["teacher"]["input"]
    mean, std = (
        [float(x) for x in re.search(rf"{word} \(([^)]+)\)", input_of)[1].split(",")] for word in ("mean", "std")
    )
    with torch.no_grad():
        assert torch.allclose(network(IMAGES), reference(normalize(IMAGES, mean, std)), atol=1e-5)
        assert not torch.allclose(network(IMAGES), reference(IMAGES), atol=0.1)


def test_state_dict_names_are_torchvisions() -> None:
    expected = reference_mobilenet().state_dict()
    assert list(models.teacher().state_dict()) == list(expected)
    for k in models.REMOVABLE_BLOCKS:
        blocks = {f"features.{i}." for i in range(19 - k)}
        kept = [name for name in expected if any(name.startswith(block) for block in blocks)]
        assert list(models.student(k).state_dict()) == [*kept, "classifier.1.weight", "classifier.1.bias"]


def test_student_is_the_front_of_the_teacher() -> None:
    whole, cut = lively(models.teacher()), models.student(5).eval()
    front = {
        name: value
        for name, value in whole.state_dict().items()
        if name in cut.state_dict() and "classifier" not in name
    }
    cut.load_state_dict(front, strict=False)
    with torch.no_grad():
        assert torch.equal(cut.features(IMAGES), whole.features[:14](IMAGES))


def test_student_takes_pixels_as_they_are() -> None:
    network = lively(models.student(5))
    with torch.no_grad():
        pooled = network.features(IMAGES).mean((2, 3))
        assert torch.allclose(network(IMAGES), network.classifier[1](pooled), atol=1e-5)


def test_attention_tap_is_the_papers() -> None:
    for k, divider in PAPER["attention_transfer"]["divider_by_k"].items():
        assert models.attention_tap(int(k)) == 19 // divider
        assert models.attention_tap(int(k)) < 19 - int(k)  # the student has that block


@pytest.mark.parametrize("k", models.REMOVABLE_BLOCKS)
def test_teacher_and_student_have_attention_maps_of_one_size(k: int) -> None:
    tap = models.attention_tap(k)
    student, teacher = lively(models.student(k)), lively(models.teacher())
    with torch.no_grad():
        logits, features = models.logits_and_features(student, IMAGES, tap)
        assert torch.allclose(logits, student(IMAGES), atol=1e-5)
        assert torch.equal(features, student.features[: tap + 1](IMAGES))
        teacher_logits, teacher_features = models.logits_and_features(teacher, IMAGES, tap)
        assert torch.allclose(teacher_logits, teacher(IMAGES), atol=1e-5)
    assert features.shape == teacher_features.shape


def test_seed_fixes_the_weights_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = (models.weights_sha256(models.student(17, seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("k", [0, 1, 4, 6, 18, 19, -3, 5.5, "5", None])
def test_k_out_of_range_is_named(k: object) -> None:
    with pytest.raises(ValueError, match="choose one of 3, 5, 7, 9, 11, 13, 15, 17") as caught:
        models.student(k)
    assert repr(k) in str(caught.value)


# Weights


@pytest.mark.parametrize(
    ("network", "other"),
    [
        (models.student(5), models.student(7)),
        (models.student(5), models.teacher()),
        (models.teacher(), models.student(5)),
        (models.teacher(), MobileNetV2(num_classes=100, inverted_residual_setting=models.INVERTED_RESIDUALS)),
        (models.student(5), nn.Linear(2, 2)),
    ],
    ids=["other k", "teacher into student", "student into teacher", "100 classes", "something else"],
)
def test_weights_of_another_architecture_are_refused(network: nn.Module, other: nn.Module) -> None:
    before = models.weights_sha256(network)
    with pytest.raises(ValueError, match=r"these weights are not those of (Student|Teacher) with [\d,]+ parameters"):
        models.load_state(network, other.state_dict())
    assert models.weights_sha256(network) == before


def test_one_missing_tensor_is_named() -> None:
    state = models.student(5).state_dict()
    del state["features.3.conv.0.0.weight"]
    with pytest.raises(ValueError, match=r"1 tensors differ, first features\.3\.conv\.0\.0\.weight"):
        models.load_state(models.student(5), state)


def test_identity_of_weights_sees_every_tensor() -> None:
    network = models.student(17)
    identities = {models.weights_sha256(network)}
    for value in network.state_dict().values():
        value.flatten()[0] += 1
        identities.add(models.weights_sha256(network))
    assert len(identities) == 1 + len(network.state_dict())


# Memory


def test_kept_bytes_are_those_counted_by_hand() -> None:
    """Each convolution and each ReLU6 keeps its input, four bytes a value; weights do not grow with the images."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 2, 1, stride=2), nn.ReLU6())
    network.requires_grad_(False)
    by_hand = 4 * ((3 + 4 + 4) * 32 * 32 + 2 * 16 * 16)
    assert models.kept_bytes(network, (3, 32, 32), torch.device("cpu")) == by_hand


def held_bytes(network: nn.Module, images: int, side: int) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of one forward pass."""
    storages = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: storages.append(kept.untyped_storage()), lambda _: None):
        network(torch.rand(images, 3, side, side).requires_grad_())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("side", [32, 64])
def test_teacher_and_student_hold_no_more_of_an_image_than_is_reckoned(side: int) -> None:
    for network in (models.teacher().eval(), models.student(5).eval()):
        reckoned = models.kept_bytes(network, (3, side, side), torch.device("cpu"))
        assert held_bytes(network, 2, side) - held_bytes(network, 1, side) <= reckoned


@pytest.mark.parametrize("free", [0, 10**6, 10**9, 80 * 10**9])
def test_what_a_gpu_gets_at_once_fits_into_half_of_its_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(models.machine, "free_memory", lambda _device: free)
    monkeypatch.setattr(models, "kept_bytes", lambda _model, _shape, _device: 7 * 10**6)
    images = models.most_at_once(models.teacher(), (3, 32, 32), torch.device("cuda"))
    assert 1 <= images <= 2048
    assert images == 1 or images * 7 * 10**6 <= free / 2
    assert images == 2048 or (images + 1) * 7 * 10**6 > free / 2
