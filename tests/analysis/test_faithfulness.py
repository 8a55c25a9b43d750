"""Faithfulness: measures and their controls on maps and models whose answer is known beforehand."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from kdig_utils.analysis import faithfulness
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, baseline
from kdig_utils.method.pairings import another, permuted


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """Logit of class 0: a weighted sum of the pixels; class 1: nothing."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        logit = (images * self.weights).flatten(1).sum(1)
        return torch.stack([logit, torch.zeros_like(logit)], 1)


class OneTile(nn.Module):
    """The logits of class c are the brightness of tile c alone: a model that provably looks at one tile."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def test_a_map_is_perfectly_like_itself_and_like_itself_scaled() -> None:
    maps = noise(5, 32, 32)
    for others in (maps, 7 * maps):
        for value in faithfulness.similarity(maps, others).values():
            torch.testing.assert_close(value, torch.ones(5, dtype=torch.float64))


def test_spearman_is_scipys_also_with_ties_and_reversed_maps_are_opposite() -> None:
    maps, others = (noise(4, 8, 8, seed=seed).mul(20).round() for seed in (1, 2))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(maps, others, strict=True)]
    np.testing.assert_allclose(faithfulness.similarity(maps, others)["spearman"], expected)
    np.testing.assert_allclose(faithfulness.similarity(maps, -maps)["spearman"], -1)


def test_likeness_by_a_common_cause_vanishes_and_own_likeness_stays() -> None:
    cause, own = noise(300, 16, 16, seed=1), noise(300, 16, 16, seed=2)
    maps, others = (cause + noise(300, 16, 16, seed=seed) for seed in (3, 4))
    assert float(faithfulness.similarity(maps, others)["spearman"].mean()) > 0.4
    assert abs(float(faithfulness.partial_spearman(maps, others, cause).mean())) < 0.02
    kept = faithfulness.partial_spearman(maps + 2 * own, others + 2 * own, cause)
    assert float(kept.mean()) > 0.5


def test_permuted_maps_give_the_permutation_null() -> None:
    maps = noise(200, 32, 32)
    random = permuted(maps, seed=0)
    found = faithfulness.similarity(maps, random)
    assert abs(float(found["spearman"].mean())) < 4 / np.sqrt(200 * 1024)
    assert float(found["spearman"].var()) == pytest.approx(1 / (1024 - 1), rel=0.4)  # Kendall: var = 1 / (n - 1)
    assert float(found["top_tenth"].mean()) == pytest.approx(102 / 1024, abs=0.01)  # hypergeometric mean
    torch.testing.assert_close(random.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)


def test_maps_of_other_shapes_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="equal shape"):
        faithfulness.similarity(noise(2, 8, 8), noise(2, 4, 4))


def test_deletion_of_a_linear_model_is_the_sum_of_what_is_left() -> None:
    weights, images = noise(1, 1, 4, 4, seed=5), noise(3, 1, 4, 4, seed=6)
    model, start = Linear(weights), torch.zeros(3, 1, 4, 4)
    maps = (weights * images)[:, 0]
    curve = faithfulness.perturbation_curve(model, images, start, maps, torch.zeros(3, dtype=torch.long), n_steps=16)
    ordered = maps.flatten(1).sort(1, descending=True).values
    left = torch.cat([torch.zeros(3, 1), ordered.cumsum(1)], 1)
    torch.testing.assert_close(curve, ordered.sum(1, keepdim=True) - left)
    uneven = (torch.arange(16, 0, -1) - 0.5) / 16  # trapezoids: the pixel that goes k-th stays for k - 1/2 steps
    torch.testing.assert_close(faithfulness.area(curve), (ordered * (1 - uneven)).sum(1))


def test_no_order_deletes_a_linear_model_faster_than_its_own_attributions() -> None:
    weights, images = noise(1, 1, 6, 6, seed=1) - 0.3, noise(8, 1, 6, 6, seed=2)
    model, target = Linear(weights), torch.zeros(8, dtype=torch.long)
    grey = torch.zeros_like(images)

    def deletion(maps: Tensor) -> Tensor:
        return faithfulness.area(faithfulness.perturbation_curve(model, images, grey, maps, target, n_steps=36))

    best = deletion((weights * images)[:, 0])
    for seed in range(20):
        assert (deletion(noise(8, 6, 6, seed=seed)) >= best - 1e-5).all()


def test_curves_begin_and_end_where_they_should(sample_test: ImageSet) -> None:
    images, labels = sample_test.images(slice(0, 4)), torch.tensor([0, 1, 2, 3])
    maps = noise(4, 32, 32)
    found = faithfulness.deletion_and_insertion(OneTile(), images, labels, maps, n_steps=5)
    expected = OneTile()(images).softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found["deletion"][:, 0], expected)
    torch.testing.assert_close(found["insertion"][:, -1], expected)
    with pytest.raises(ValueError, match="2000"):
        faithfulness.perturbation_curve(OneTile(), images, 0 * images, maps, labels, 2000)


def test_attributions_of_a_linear_model_leave_nothing_unexplained_and_zeros_leave_all(sample_test: ImageSet) -> None:
    images, target = sample_test.images(slice(0, 6)), torch.zeros(6, dtype=torch.long)
    model = Linear(noise(3, 32, 32) - 0.5)
    found = faithfulness.attributions(model, images, target, n_steps=2)
    error, scale = faithfulness.infidelity_and_scale(model, images, found, target)
    assert (error < 1e-6 * scale).all()
    error, scale = faithfulness.infidelity_and_scale(model, images, torch.zeros_like(found), target)
    torch.testing.assert_close(error, scale)
    error, scale = faithfulness.infidelity_and_scale(model, images, -found, target)
    torch.testing.assert_close(error, 4 * scale, rtol=1e-4, atol=0)  # (-d - d)² is 4 d²


def test_squares_have_their_side_lie_inside_and_reach_every_corner() -> None:
    taken = faithfulness.squares(noise(4000, 3, 12, 12), torch.Generator().manual_seed(0))
    assert (taken.flatten(1).sum(1) == 64).all()
    assert (taken[:, 0].any(1).sum(1) == 8).all()
    assert taken[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].any(0).all()


@pytest.mark.filterwarnings("ignore")  # Captum's progress bars ask for widgets
def test_infidelity_and_sensitivity_are_those_of_captum(sample_test: ImageSet) -> None:
    from captum.metrics import infidelity, sensitivity_max

    images, target, n_steps = sample_test.images(slice(0, 6)), sample_test.labels[:6], 4
    student = models.student(17, seed=0).eval()
    found = faithfulness.attributions(student, images, target, n_steps)
    error, _scale = faithfulness.infidelity_and_scale(student, images, found, target, seed=3)

    def removed(inputs: Tensor, grey: Tensor) -> tuple[Tensor, Tensor]:
        taken = faithfulness.squares(inputs, torch.Generator().manual_seed(3)).expand_as(inputs).float()
        return taken, inputs - taken * (inputs - grey)

    grey, copies = baseline("mean_colour", images), faithfulness.SQUARES
    theirs = infidelity(student, removed, images, found, grey, target=target, n_perturb_samples=copies)
    torch.testing.assert_close(error, theirs, rtol=1e-3, atol=1e-9)

    def maps(inputs: Tensor | tuple[Tensor], target: Tensor) -> tuple[Tensor]:
        (inputs,) = inputs if isinstance(inputs, tuple) else (inputs,)  # Captum passes both
        return (attribution_map(faithfulness.attributions(student, inputs, target, n_steps)),)

    def noisy(inputs: Tensor, radius: float) -> Tensor:
        return inputs + radius * (2 * noise(*inputs.shape, seed=3) - 1)

    theirs = sensitivity_max(maps, images, noisy, 0.02, faithfulness.NOISY_COPIES, target=target)
    torch.testing.assert_close(faithfulness.map_sensitivity(student, images, target, n_steps, 0.02, seed=3), theirs)


def test_maps_of_a_linear_model_move_as_its_factor_moves(sample_test: ImageSet) -> None:
    images, target = sample_test.images(slice(0, 3)), torch.zeros(3, dtype=torch.long)
    model = Linear(torch.ones(3, 32, 32))
    found = faithfulness.map_sensitivity(model, images, target, n_steps=1, radius=0.02)
    # The map is Σ |x - x'|: noise moves each pixel by at most 3 · 0.02, over 1,024 pixels.
    norms = attribution_map(images - baseline("mean_colour", images)).flatten(1).norm(dim=1)
    assert (found > 0).all()
    assert (found <= 3 * 0.02 * 32 / norms).all()
    still = faithfulness.map_sensitivity(model, images, target, n_steps=1, radius=0.0)
    torch.testing.assert_close(still, torch.zeros(3))


def test_the_asked_tile_of_a_mosaic_is_the_image_of_its_class(sample_test: ImageSet) -> None:
    game = faithfulness.mosaics(sample_test, 40)
    assert all(len(set(row)) == 4 for row in game.labels.tolist())
    tiles = nn.functional.unfold(game.images, 32, stride=32).view(40, 3, 32, 32, 4)
    known = {
        image.numpy().tobytes(): int(label) for image, label in zip(sample_test.pixels, sample_test.labels, strict=True)
    }
    for row in range(40):
        for tile in range(4):
            pixels = (tiles[row, ..., tile] * 255).round().byte().contiguous()
            assert known[pixels.numpy().tobytes()] == game.labels[row, tile]
    assert torch.equal(game.target, game.labels[torch.arange(40), game.asked])


def test_a_model_that_looks_at_one_tile_always_points_at_it(sample_test: ImageSet) -> None:
    game = faithfulness.mosaics(sample_test, 30)
    found = faithfulness.attributions(OneTile(), game.images, game.asked, n_steps=2)
    values = faithfulness.pointing(attribution_map(found), game.asked)
    assert values["peak"].all()
    torch.testing.assert_close(values["share"], torch.ones(30))
    expected = float((game.asked == game.asked[another(30, 0)]).double().mean())
    assert float(values["share_shuffled"].mean()) == pytest.approx(expected)


def test_maps_that_ignore_the_question_point_once_in_four_times(sample_test: ImageSet) -> None:
    game = faithfulness.mosaics(sample_test, 2000, seed=1)
    contrast = attribution_map(game.images - baseline("mean_colour", game.images))
    values = faithfulness.pointing(contrast, game.asked)
    for value in values.values():
        assert float(value.double().mean()) == pytest.approx(0.25, abs=0.04)


def test_shares_add_up_and_ignore_what_speaks_against() -> None:
    maps = noise(5, 64, 64) - 0.5
    shares = faithfulness.tile_shares(maps)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    torch.testing.assert_close(faithfulness.tile_shares(torch.where(maps < 0, -99.0, maps)), shares)
    assert faithfulness.tile_shares(-torch.ones(1, 64, 64)).isnan().all()


def test_three_classes_make_no_mosaic(sample_test: ImageSet) -> None:
    few = sample_test.subset(torch.nonzero(sample_test.labels < 3).flatten())
    with pytest.raises(ValueError, match="3 classes make no mosaic"):
        faithfulness.mosaics(few, 2)
