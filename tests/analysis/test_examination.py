"""What every network is asked: intervals of known coverage, and networks whose answers are known beforehand."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from kdig_utils.analysis import corruptions, examination
from kdig_utils.analysis.examination import QUICK, Examination, mean_over_images
from kdig_utils.method.cifar10 import ImageSet


def test_the_interval_over_images_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [mean_over_images(torch.randn(60, generator=generator), seed=trial) for trial in range(150)]
    covered = sum(mean.low <= 0 <= mean.high for mean in found)
    assert stats.binomtest(covered, 150, 0.95).pvalue > 0.001


def test_truth_values_get_wilsons_interval_and_undefined_ones_are_left_out() -> None:
    all_right = mean_over_images(torch.ones(20, dtype=torch.bool))
    assert (all_right.value, all_right.high) == pytest.approx((1, 1))
    assert all_right.low == pytest.approx(20 / (20 + stats.norm.ppf(0.975) ** 2))  # Wilson's limit, by hand
    some = mean_over_images(torch.tensor([1.0, float("nan"), 3.0]))
    assert (some.value, some.images) == (2.0, 2)
    assert np.isnan(mean_over_images(torch.tensor([float("nan")])).value)


def test_a_share_is_the_ratio_of_means_and_not_the_mean_of_ratios() -> None:
    error, scale = torch.tensor([1.0, 0.0, 8.0, 1.0]), torch.tensor([1.0, 4.0, 4.0, 1.0])
    found = mean_over_images(error, scale)
    assert found.value == 1.0
    assert found.low < 1 < found.high
    assert mean_over_images(3 * scale, scale)[:3] == pytest.approx((3, 3, 3))


class Bright(nn.Module):
    """Ten logits from the mean colours: fast, differentiable, and no reader of pictures."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) @ torch.linspace(-1, 1, 30).view(3, 10)


@pytest.fixture(scope="module")
def asked(sample_test: ImageSet) -> Examination:
    images = examination.first_images(sample_test, 100)
    return examination.prepare(Bright(), images, dataclasses.replace(QUICK, images=20))


def test_the_teacher_is_perfectly_like_itself_and_all_measures_are_there(asked: Examination) -> None:
    found = examination.examine(Bright(), asked)
    assert [found[name].value for name in ("spearman", "cosine", "top_tenth")] == pytest.approx([1, 1, 1])
    assert found["unexplained"].value == pytest.approx(0, abs=1e-6)  # a linear model
    assert found["severity_0"].images == QUICK.corrupted
    assert {"spearman_shuffled", "deletion_random", "signed_share", "ece", "severity_5", "fog", "sensitivity"} <= set(
        found
    )
    assert all(mean.low <= mean.value + 1e-9 for name, mean in found.items() if name != "ece")


def test_the_controls_have_no_perfect_likeness(asked: Examination) -> None:
    found = {name: examination.means(values) for name, values in examination.control_measures(asked).items()}
    assert set(found) == set(examination.CONTROLS)
    assert all(abs(mean.value) < 1 for of in found.values() for name, mean in of.items() if name != "spearman_partial")
    # A linear model of the mean colours weighs the difference to the baseline and nothing else.
    assert max(found, key=lambda name: found[name]["spearman"].value) == "difference"


class AlwaysClass(nn.Module):
    """Says the same class whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(10)[3].expand(len(images), 10)


def test_what_does_not_look_is_right_as_often_under_any_corruption(asked: Examination) -> None:
    found = examination.corruption_measures(AlwaysClass(), asked)
    assert set(corruptions.CORRUPTIONS) < set(found)
    assert len(found) == len(corruptions.CORRUPTIONS) + 1 + len(corruptions.SEVERITIES)
    for right in found.values():
        assert torch.equal(right.bool(), asked.clean.labels == 3)
