"""The controls of the alignment laboratory: each keeps what it says it keeps and takes away the rest."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.experiments.runs import student_run
from kdig_utils.method import models, overlay, pairings, training
from kdig_utils.method.cifar10 import MEAN, ImageSet
from kdig_utils.method.overlay import EpochDraws, crop_and_flip, draw_epoch, scale_map
from kdig_utils.method.pairings import PAIRINGS, UNMOVED, paired_signals
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec
from kdig_utils.method.training import student_loss

IMAGES = 40


@pytest.fixture(scope="module")
def train(sample_train: ImageSet) -> ImageSet:
    return sample_train.subset(torch.arange(IMAGES))


@pytest.fixture(scope="module")
def signals(train: ImageSet) -> TeacherSignals:
    generator = torch.Generator().manual_seed(0)
    return TeacherSignals(
        logits=4 * torch.randn(IMAGES, 10, generator=generator),
        maps=torch.rand(IMAGES, 32, 32, generator=generator).half(),
        attention=F.normalize(torch.rand(IMAGES, 1024, generator=generator), dim=1),
        error=torch.zeros(IMAGES),
        manifest={"teacher_sha256": "ab" * 32, "indices": train.indices.tolist(), "settings": {"tap": 0}},
    )


def maps_under(pairing: str, signals: TeacherSignals, train: ImageSet, seed: int = 0) -> Tensor:
    return paired_signals(signals, train, torch.arange(IMAGES), pairing, seed).maps


def test_noise_has_each_maps_own_histogram_and_not_its_form(signals: TeacherSignals, train: ImageSet) -> None:
    noise = maps_under("random", signals, train)
    assert torch.equal(noise.flatten(1).sort(1).values, signals.maps.flatten(1).sort(1).values)
    smooth = torch.linspace(0, 1, 1024).view(1, 32, 32).expand(IMAGES, 32, 32).half()
    scattered = pairings.permuted(smooth, seed=0).float().flatten(1)
    correlations = [float(torch.corrcoef(torch.stack([s, smooth[0].float().flatten()]))[0, 1]) for s in scattered]
    assert max(map(abs, correlations)) < 0.15  # 1,024 pixels: a standard deviation of 0.03
    assert len({tuple(row.tolist()) for row in scattered}) == IMAGES


def test_edges_of_a_plain_image_are_none_and_those_of_a_step_are_at_the_step() -> None:
    pixels = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    pixels[1, :, :, 16:] = 200
    found = pairings.edges(pixels)
    assert not found[0].any()
    assert found[1, :, 15:17].eq(1).all()
    assert not found[1, :, :15].any()
    assert not found[1, :, 17:].any()


def test_edges_equal_the_convolution_by_hand(train: ImageSet) -> None:
    image = train.pixels[3].float().mean(0) / 255
    row, column = 7, 20
    patch = image[row - 1 : row + 2, column - 1 : column + 2]
    across = (patch[:, 2] - patch[:, 0]) @ torch.tensor([1.0, 2.0, 1.0])
    down = (patch[2] - patch[0]) @ torch.tensor([1.0, 2.0, 1.0])
    whole = pairings.edges(train.pixels[3:4])[0].float()
    other = image[20:23, 8:11]
    there = torch.hypot(
        (other[:, 2] - other[:, 0]) @ torch.tensor([1.0, 2.0, 1.0]),
        (other[2] - other[0]) @ torch.tensor([1.0, 2.0, 1.0]),
    )
    assert float(whole[row, column] / whole[21, 9]) == pytest.approx(float(torch.hypot(across, down) / there), rel=5e-3)


def test_nobody_gets_its_own_image_in_grey(train: ImageSet, signals: TeacherSignals) -> None:
    for n in (2, 3, 40, 501):
        others = pairings.another(n, seed=n)
        assert others.sort().values.equal(torch.arange(n))
        assert not (others == torch.arange(n)).any()
    greys = train.pixels.float().mean(1) / 255
    found = maps_under("mixup-grey", signals, train, seed=5)
    assert torch.allclose(found.float(), greys[pairings.another(IMAGES, 5)], atol=1e-3)


def test_saliency_is_the_gradient_of_the_true_class(train: ImageSet) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1)))

        def forward(self, images: Tensor) -> Tensor:
            return torch.einsum("nchw,kchw->nk", images, self.weight)

    model = Linear()
    expected = model.weight.detach()[train.labels].abs().sum(1)
    found = pairings.saliency_maps(model, train, batch_size=7).float()
    assert torch.allclose(found, expected / expected.amax((1, 2), keepdim=True), atol=1e-3)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_what_is_blended_in_moves_with_its_image_or_stays(train: ImageSet, pairing: str) -> None:
    """A map that is the image's own position tells where it was: half of it, on a black image."""
    n = 6
    batch = draw_epoch(n, 1.0, seed=3, epoch=0)
    batch = EpochDraws(torch.arange(n), batch.shifts, batch.flips, batch.overlaid, batch.powers)
    ramp = torch.arange(1024.0).view(1, 32, 32).expand(n, 32, 32) / 1023
    found = overlay.overlay(torch.zeros(n, 3, 32, 32), ramp, batch, pairing)
    scaled = scale_map(ramp.unsqueeze(1), batch.powers)
    if pairing == "uniform":
        assert found.unique().tolist() == pytest.approx([sum(MEAN) / 6])
    elif pairing == "black":
        assert found.unique().tolist() == [0.0]
    elif pairing in UNMOVED:
        assert torch.allclose(found, 0.5 * scaled.expand_as(found))
    else:
        assert torch.allclose(found, 0.5 * crop_and_flip(scaled, batch.shifts, batch.flips).expand_as(found))


def test_black_halves_the_brightness_and_does_nothing_else(train: ImageSet, signals: TeacherSignals) -> None:
    batch = draw_epoch(IMAGES, 1.0, seed=3, epoch=0)
    images = train.images(batch.order)
    found = overlay.overlay(images, signals.maps.float(), batch, "black")
    assert torch.equal(found, crop_and_flip(images, batch.shifts, batch.flips) / 2)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_only_shuffling_changes_the_answers(signals: TeacherSignals, train: ImageSet, pairing: str) -> None:
    found = paired_signals(signals, train, torch.arange(IMAGES), pairing, 0)
    assert torch.equal(found.logits, signals.logits) == (pairing != "shuffled")
    own = pairing in ("matched", "index-matched", "gradient", "uniform", "black")
    assert torch.equal(found.maps, signals.maps) == own


def test_a_part_of_the_images_gets_the_maps_of_those_images(signals: TeacherSignals, train: ImageSet) -> None:
    positions = torch.tensor([31, 2, 17])
    for pairing in ("edges", "mixup-grey"):
        spec = RunSpec("ig", pairing=pairing)
        whole = paired_signals(signals, train, torch.arange(IMAGES), spec.pairing, spec.seed).maps
        assert torch.equal(paired_signals(signals, train, positions, spec.pairing, spec.seed).maps, whole[positions])


# Online answers


def test_online_teacher_is_asked_about_the_very_crop(signals: TeacherSignals, train: ImageSet) -> None:
    """With alpha = 1 the loss is that of the teacher's logits of the crops, and its weights get no gradient."""
    spec = RunSpec("kd", k=17, alpha=1.0, answers="online")
    student, teacher = models.student(17).eval(), models.teacher(3).eval()
    batch = draw_epoch(IMAGES, 0.0, 0, 0).batch(0, 16)
    crops = crop_and_flip(train.images(batch.order), batch.shifts, batch.flips)
    loss = student_loss(student, train, signals, batch, spec, teacher)
    p = (teacher(crops) / spec.temperature).softmax(1)
    q = (student(crops) / spec.temperature).log_softmax(1)
    expected = spec.temperature**2 * (p * (p.log() - q)).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_online_answers_without_a_teacher_are_refused(signals: TeacherSignals, train: ImageSet) -> None:
    with pytest.raises(ValueError, match="asks the teacher about each crop: pass the teacher"):
        student_run(RunSpec("kd", k=17, answers="online"), train, train, signals)


def test_unknown_answers_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown answers 'cached': choose one of stored, online"):
        RunSpec("kd", answers="cached")


def test_gradients_are_not_taken_for_ig_maps_nor_the_other_way(signals: TeacherSignals, train: ImageSet) -> None:
    gradients = dataclasses.replace(signals, manifest={**signals.manifest, "maps": "saliency"})
    training.check_signals(RunSpec("ig", k=17, pairing="gradient"), gradients, train)
    for spec, wrong in ((RunSpec("ig", k=17, pairing="gradient"), signals), (RunSpec("ig", k=17), gradients)):
        with pytest.raises(ValueError, match=r"blends in .*, the signals hold the others"):
            training.check_signals(spec, wrong, train)
