"""Calibration against cases by hand and classifiers of known calibration; corruptions against their definition."""

import numpy as np
import pytest
import torch

from kdig_utils.analysis import calibration, corruptions
from kdig_utils.method.cifar10 import ImageSet


def test_calibration_error_by_hand() -> None:
    # Bin (14/15, 1]: 0.95, 0.97 right, right: gap 0.04. Bin (9/15, 10/15]: 0.62, 0.64 right, wrong: gap 0.13.
    found = calibration.expected_calibration_error(np.array([0.95, 0.97, 0.62, 0.64]), np.array([1, 1, 1, 0]))
    assert found == pytest.approx(0.5 * 0.04 + 0.5 * 0.13)


def test_a_bin_is_closed_above() -> None:
    assert calibration.bins_of(np.array([0.6, 0.601, 1.0, 0.0])).tolist() == [8, 9, 14, 0]


def test_a_calibrated_classifier_has_the_error_of_noise_and_no_more() -> None:
    rng = np.random.default_rng(0)
    confidence = 0.5 + 0.5 * rng.random(20_000)
    found = calibration.calibration(confidence, rng.random(20_000) < confidence)
    assert found.null_low * 0.8 <= found.error <= found.null_high * 1.2
    # By hand: the gap of a bin is about normal, its mean size √(2 / π) standard errors.
    places = calibration.bins_of(confidence)
    expected = sum(
        np.sqrt(2 / np.pi * its.mean() * (1 - its.mean()) * len(its))
        for its in (confidence[places == place] for place in np.unique(places))
    )
    assert found.null == pytest.approx(expected / 20_000, rel=0.1)


def test_an_overconfident_classifier_has_its_gap() -> None:
    right = np.random.default_rng(1).random(50_000) < 0.7
    found = calibration.calibration(np.full(50_000, 0.9), right)
    assert found.error == pytest.approx(0.2, abs=0.01)
    assert found.low < 0.2 < found.high
    assert found.null_high < 0.01


# Glass moves more often, or blurs more, which takes moved pixels back; the elastic bends more, but shears less.
BY_MORE_THAN_ONE_RULE = {"glass_blur", "elastic_transform"}


@pytest.mark.parametrize("name", [name for name in corruptions.CORRUPTIONS if name not in BY_MORE_THAN_ONE_RULE])
def test_a_higher_severity_distorts_more(name: str, sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(0, 2000, 50))

    def distortion(severity: int) -> float:
        changed = corruptions.corrupt(images, name, severity)
        return float((changed.pixels.double() - images.pixels.double()).square().mean())

    found = [distortion(severity) for severity in corruptions.SEVERITIES]
    assert found[0] > 0
    assert found == sorted(found)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_the_seed_decides_and_labels_stay(name: str, sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(10))
    first, again, other = (corruptions.corrupt(images, name, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(first.pixels, other.pixels) == (name in fixed)
    assert torch.equal(first.labels, images.labels)
    assert torch.equal(first.indices, images.indices)


def test_fourteen_of_the_fifteen_corruptions_are_here_and_frost_says_so(sample_test: ImageSet) -> None:
    assert len(corruptions.CORRUPTIONS) == 14
    with pytest.raises(ValueError, match="'frost'"):
        corruptions.corrupt(sample_test, "frost", 1)
    with pytest.raises(ValueError, match="severity 6"):
        corruptions.corrupt(sample_test, "fog", 6)


def test_noise_has_the_moments_of_its_definition() -> None:
    grey, rng = np.full((50, 3, 32, 32), 0.5), np.random.default_rng(0)
    assert corruptions.gaussian_noise(grey, 5, rng).std() == pytest.approx(0.10, rel=0.01)
    assert corruptions.shot_noise(grey, 5, rng).var() == pytest.approx(0.5 / 50, rel=0.02)  # Poisson: variance is mean
    hit = corruptions.impulse_noise(grey, 5, rng)
    assert (hit != 0.5).mean() == pytest.approx(0.07, rel=0.05)
    assert set(np.unique(hit)) == {0.0, 0.5, 1.0}


def test_what_each_corruption_keeps(sample_test: ImageSet) -> None:
    pixels, rng = sample_test.images(slice(0, 20)).double().numpy(), np.random.default_rng(0)
    np.testing.assert_allclose(corruptions.contrast(pixels, 4, rng).mean((2, 3)), pixels.mean((2, 3)), atol=1e-12)
    brighter = corruptions.brightness(pixels, 2, rng)
    np.testing.assert_allclose(brighter.max(1), np.minimum(pixels.max(1) + 0.1, 1))
    flat = np.full((2, 3, 32, 32), 0.4)
    for name in (
        "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"
    ):  # fmt: skip
        np.testing.assert_allclose(corruptions.CORRUPTIONS[name](flat, 5, rng), flat, atol=1e-6)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "elastic_transform"):  # means of pixels
        changed = corruptions.CORRUPTIONS[name](pixels, 5, rng)
        assert changed.min() >= pixels.min() - 1e-9
        assert changed.max() <= pixels.max() + 1e-9
    clouds = corruptions._clouds(3, 32, 2.0, rng)
    assert clouds.min((1, 2)).tolist() == [0, 0, 0]
    assert clouds.max((1, 2)).tolist() == [1, 1, 1]


def test_glass_is_the_ordered_exchange_of_the_authors_script() -> None:
    images = np.random.default_rng(1).random((2, 3, 32, 32))
    moved = corruptions._next_to_their_place(images, np.random.default_rng(2))
    steps = np.random.default_rng(2).integers(0, 2, (2, 2, 30, 30))
    for number, image in enumerate(images.transpose(0, 2, 3, 1).copy()):
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                up, left = steps[:, number, row - 2, column - 2]
                other = row - up, column - left
                image[row, column], image[other] = image[other], image[row, column]
        np.testing.assert_array_equal(moved[number], image.transpose(2, 0, 1))


@pytest.mark.parametrize(("degrees", "way"), [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0)), (45, (-1, -1))])
def test_motion_draws_a_point_out_into_a_line(degrees: float, way: tuple[int, int]) -> None:
    kernel = np.exp(-(np.arange(13) ** 2) / 8)
    kernel /= kernel.sum()
    point = np.zeros((1, 1, 32, 32))
    point[..., 16, 16] = 1
    (row, column), steps = way, np.arange(13)
    if degrees == 45:  # the way is measured along the line, and a diagonal step is √2 long
        steps = np.ceil(steps / np.sqrt(2) - 0.5).astype(int)
    expected = np.zeros((32, 32))
    np.add.at(expected, (16 + row * steps, 16 + column * steps), kernel)
    np.testing.assert_allclose(corruptions.smeared(point, 6, 2.0, np.array([degrees]))[0, 0], expected, atol=1e-12)


def test_snow_falls_on_black_as_bright_spots_with_their_half_turn() -> None:
    black, rng = np.zeros((20, 3, 32, 32)), np.random.default_rng(0)
    fallen = corruptions.snow(black, 3, rng) - (1 - 0.9) * 0.5  # what is black gets as pale as half of white
    assert fallen.min() >= -1e-12
    assert fallen.max() > 0.3
    np.testing.assert_allclose(fallen, fallen[..., ::-1, ::-1])
    np.testing.assert_allclose(fallen, fallen[:, :1].repeat(3, 1))
    assert corruptions.snow(np.ones((1, 3, 32, 32)), 1, rng).min() >= 1


def test_no_reach_and_no_moves_is_the_identity_and_a_shift_shifts() -> None:
    images, grid = np.random.default_rng(0).random((3, 3, 32, 32)), np.mgrid[:32, :32]
    np.testing.assert_allclose(corruptions._sheared(images, 0, np.random.default_rng(1)), images, atol=1e-12)
    still = np.broadcast_to(grid, (3, 2, 32, 32))
    np.testing.assert_array_equal(corruptions._between_pixels(images, still, "reflect"), images)
    down = corruptions._between_pixels(images, still - np.array([1, 0])[:, None, None], "reflect")
    np.testing.assert_allclose(down[:, :, 1:], images[:, :, :-1])


def test_the_elastic_shears_at_severity_1_and_bends_ever_more() -> None:
    # A ramp stays a ramp under an affine map: in the middle, what is left of the best plane is the bending.
    rows, columns = np.mgrid[:32, :32] / 31
    ramps = np.broadcast_to(np.stack([rows, columns, (rows + columns) / 2]), (30, 3, 32, 32))
    middle = (..., slice(10, 22), slice(10, 22))
    plane = np.stack([np.ones(144), rows[middle].ravel(), columns[middle].ravel()], 1)

    def bending(severity: int) -> float:
        changed = corruptions.elastic_transform(ramps, severity, np.random.default_rng(0))[middle].reshape(-1, 144).T
        return float(np.std(changed - plane @ np.linalg.lstsq(plane, changed)[0]))

    found = [bending(severity) for severity in corruptions.SEVERITIES]
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found == sorted(found)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_glass_and_the_elastic_distort_at_every_severity(severity: int, sample_test: ImageSet) -> None:
    images = sample_test.subset(torch.arange(0, 2000, 50))
    for name in BY_MORE_THAN_ONE_RULE:
        assert not torch.equal(corruptions.corrupt(images, name, severity).pixels, images.pixels)
