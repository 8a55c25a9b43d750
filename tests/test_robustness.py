"""Calibration against cases by hand and classifiers of known calibration; corruptions against their definition."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdig_utils import robustness
from kdig_utils.cifar10 import ImageSet


def two_classes(confidence: Tensor) -> Tensor:
    return torch.stack([confidence, 1 - confidence], 1)


def test_calibration_error_by_hand() -> None:
    # Bin (14/15, 1]: 0.95, 0.97 right, right: gap 0.04. Bin (9/15, 10/15]: 0.62, 0.64 right, wrong: gap 0.13.
    probabilities = two_classes(torch.tensor([0.95, 0.97, 0.62, 0.64], dtype=torch.float64))
    found = robustness.expected_calibration_error(probabilities, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx(0.5 * 0.04 + 0.5 * 0.13)
    table = robustness.reliability(probabilities, torch.tensor([0, 0, 0, 1]))
    assert table["images"].tolist() == [0] * 9 + [2] + [0] * 4 + [2]
    assert table["accuracy"].dropna().tolist() == [0.5, 1.0]


def test_a_bin_is_closed_above() -> None:
    edge = two_classes(torch.tensor([0.6], dtype=torch.float64))
    assert robustness.reliability(edge, torch.tensor([0]), bins=5)["images"].tolist() == [0, 0, 1, 0, 0]


def test_a_calibrated_classifier_has_the_error_of_noise_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(20_000, generator=generator, dtype=torch.float64)
    labels = (torch.rand(20_000, generator=generator) > confidence).long()
    found = robustness.expected_calibration_error(two_classes(confidence), labels)
    null = robustness.error_if_calibrated(two_classes(confidence))
    assert np.quantile(null, 0.005) <= found <= np.quantile(null, 0.995)
    # By hand: the gap of a bin is about normal, its mean size √(2 / π) standard errors.
    table = robustness.reliability(two_classes(confidence), labels).query("images > 0")
    c = table["confidence"]
    expected = (np.sqrt(2 / np.pi) * np.sqrt(c * (1 - c) * table["images"])).sum() / 20_000
    assert null.mean() == pytest.approx(expected, rel=0.1)


def test_an_overconfident_classifier_has_its_gap() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(50_000, generator=generator) > 0.7).long()
    probabilities = two_classes(torch.full((50_000,), 0.9, dtype=torch.float64))
    assert robustness.expected_calibration_error(probabilities, labels) == pytest.approx(0.2, abs=0.01)


def test_logits_are_no_probabilities_and_labels_must_match() -> None:
    with pytest.raises(ValueError, match="softmax"):
        robustness.reliability(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="one label for each"):
        robustness.reliability(torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_a_higher_severity_distorts_more(name: str, sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(0, 2000, 50))

    def distortion(severity: int) -> float:
        changed = robustness.corrupt(images, name, severity)
        return float((changed.pixels.double() - images.pixels.double()).square().mean())

    found = [distortion(severity) for severity in robustness.SEVERITIES]
    assert found[0] > 0
    assert found == sorted(found)


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_the_seed_decides_and_labels_stay(name: str, sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(10))
    first, again, other = (robustness.corrupt(images, name, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    random = name in ("gaussian_noise", "shot_noise", "impulse_noise", "fog")
    assert torch.equal(first.pixels, other.pixels) != random
    assert torch.equal(first.labels, images.labels)
    assert torch.equal(first.indices, images.indices)


def test_ten_of_the_fifteen_corruptions_are_here_and_the_others_say_so(sample_test: ImageSet) -> None:
    assert len(robustness.CORRUPTIONS) + len(robustness.NOT_HERE) == 15
    with pytest.raises(ValueError, match="'snow' is not implemented here"):
        robustness.corrupt(sample_test, "snow", 1)
    with pytest.raises(ValueError, match="'rain' is unknown"):
        robustness.corrupt(sample_test, "rain", 1)
    with pytest.raises(ValueError, match="severity 6"):
        robustness.corrupt(sample_test, "fog", 6)


def test_noise_has_the_moments_of_its_definition() -> None:
    grey, rng = np.full((50, 3, 32, 32), 0.5), np.random.default_rng(0)
    assert robustness.gaussian_noise(grey, 5, rng).std() == pytest.approx(0.10, rel=0.01)
    assert robustness.shot_noise(grey, 5, rng).var() == pytest.approx(0.5 / 50, rel=0.02)  # Poisson: variance is mean
    hit = robustness.impulse_noise(grey, 5, rng)
    assert (hit != 0.5).mean() == pytest.approx(0.07, rel=0.05)
    assert set(np.unique(hit)) == {0.0, 0.5, 1.0}


def test_what_each_corruption_keeps(sample_test: ImageSet) -> None:
    pixels, rng = sample_test.images(slice(0, 20)).double().numpy(), np.random.default_rng(0)
    np.testing.assert_allclose(robustness.contrast(pixels, 4, rng).mean((2, 3)), pixels.mean((2, 3)), atol=1e-12)
    brighter = robustness.brightness(pixels, 2, rng)
    np.testing.assert_allclose(brighter.max(1), np.minimum(pixels.max(1) + 0.1, 1))
    flat = np.full((2, 3, 32, 32), 0.4)
    for name in ("defocus_blur", "zoom_blur", "contrast", "pixelate"):
        np.testing.assert_allclose(robustness.CORRUPTIONS[name](flat, 5, rng), flat, atol=1e-6)
    clouds = robustness._clouds(3, 32, 2.0, rng)
    assert clouds.min((1, 2)).tolist() == [0, 0, 0]
    assert clouds.max((1, 2)).tolist() == [1, 1, 1]


class AlwaysClass(nn.Module):
    """Says the same class whatever it sees."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(10)[self.answer].expand(len(images), 10)


def test_what_does_not_look_is_right_as_often_under_any_corruption(sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(30))
    corrupted = robustness.corruptions_of(images)
    assert len(corrupted) == 10 * 5
    for changed in corrupted.values():
        assert torch.equal(robustness.correct(AlwaysClass(3), changed), images.labels == 3)
