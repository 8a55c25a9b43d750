"""The overlay: torchvision's crop and flip, the paper's blend, and draws with the right frequencies."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scipy import stats
from torchvision.transforms import functional as vision

import kdig_utils
from kdig_utils.method.overlay import EpochDraws, blend, crop_and_flip, draw_epoch, overlay, scale_map
from kdig_utils.method.pairings import signal_positions

PAPER = json.loads((Path(kdig_utils.__file__).parent / "paper.json").read_text())["overlay"]
N = 50_000


def random_images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def every_move() -> tuple[torch.Tensor, torch.Tensor]:
    """All 81 crops, each mirrored and not."""
    rows, columns, flips = (
        values.flatten() for values in torch.meshgrid(torch.arange(9), torch.arange(9), torch.arange(2), indexing="ij")
    )
    return torch.stack([rows, columns], 1), flips.bool()


def draws(n: int, **changed: torch.Tensor) -> EpochDraws:
    """Draws that overlay every image with its map as it is, and move nothing."""
    still = EpochDraws(
        torch.arange(n),
        torch.full((n, 2), 4),
        torch.zeros(n, dtype=torch.bool),
        torch.ones(n, dtype=torch.bool),
        torch.ones(n),
    )
    return dataclasses.replace(still, **changed)


# Crop and flip


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_crop_and_flip_equal_torchvisions_at_every_offset(dtype: torch.dtype) -> None:
    shifts, flips = every_move()
    images = (255 * random_images(len(shifts))).to(dtype)
    moved = crop_and_flip(images, shifts, flips)
    for image, (row, column), flip, result in zip(images, shifts.tolist(), flips, moved, strict=True):
        expected = vision.crop(vision.pad(image, [4]), row, column, 32, 32)
        assert torch.equal(result, vision.hflip(expected) if flip else expected)
    assert moved.dtype == dtype


def test_the_middle_crop_without_a_flip_changes_nothing() -> None:
    images = random_images(3)
    assert torch.equal(crop_and_flip(images, torch.full((3, 2), 4), torch.zeros(3, dtype=torch.bool)), images)


# The blend


def test_blend_is_the_papers() -> None:
    assert PAPER["blend"] == "0.5 * image + 0.5 * map"
    images, maps = random_images(2), torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(blend(images, maps), 0.5 * images + 0.5 * maps.expand(-1, 3, -1, -1))


def test_overlay_by_hand() -> None:
    """Power, min-max to [0, 1], crop and flip as the image, half and half: one image at a time, by torchvision."""
    shifts, flips = every_move()
    n, generator = len(shifts), torch.Generator().manual_seed(2)
    images, maps = random_images(n), torch.rand(n, 32, 32, generator=generator)
    batch = draws(n, shifts=shifts, flips=flips, powers=1 + torch.rand(n, generator=generator))
    result = overlay(images, maps, batch)
    for i in range(n):
        powered = maps[i] ** batch.powers[i]
        scaled = (powered - powered.min()) / (powered.max() - powered.min())
        moved = [
            vision.crop(vision.pad(x, [4]), *shifts[i].tolist(), 32, 32) for x in (images[i], scaled.expand(3, 32, 32))
        ]
        image, heat = (vision.hflip(x) if flips[i] else x for x in moved)
        assert torch.allclose(result[i], 0.5 * image + 0.5 * heat, atol=1e-6)


def test_image_and_map_move_together() -> None:
    """An image whose channels are its own map stays equal to it, wherever the crop goes."""
    shifts, flips = every_move()
    maps = torch.rand(len(shifts), 32, 32, generator=torch.Generator().manual_seed(3))
    maps[:, 10, 10], maps[:, 20, 20] = 0.0, 1.0  # already scaled to [0, 1]
    images = maps.unsqueeze(1).expand(-1, 3, -1, -1)
    batch = draws(len(shifts), shifts=shifts, flips=flips)
    assert torch.allclose(overlay(images, maps, batch), crop_and_flip(images, shifts, flips), atol=1e-6)


def test_shuffled_pairing_leaves_the_map_where_it_is() -> None:
    shifts, flips = every_move()
    n = len(shifts)
    maps = scale_map(torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(4)), torch.ones(n))
    batch = draws(n, shifts=shifts, flips=flips)
    result = overlay(torch.zeros(n, 3, 32, 32), maps.squeeze(1), batch, pairing="shuffled")
    assert torch.allclose(result, 0.5 * maps.expand(-1, 3, -1, -1), atol=1e-6)


def test_overlay_of_pixels_in_range_stays_in_range() -> None:
    n = 64
    batch = draw_epoch(n, 0.5, seed=0, epoch=0)
    result = overlay(random_images(n), 50 * torch.rand(n, 32, 32, generator=torch.Generator().manual_seed(5)), batch)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_map_gives_zeros_and_no_nan(value: float) -> None:
    images = random_images(2)
    assert torch.equal(
        scale_map(torch.full((2, 1, 32, 32), value), torch.tensor([1.0, 2.0])), torch.zeros(2, 1, 32, 32)
    )
    assert torch.equal(overlay(images, torch.full((2, 32, 32), value), draws(2)), 0.5 * images)


def test_scaling_spans_zero_to_one_and_keeps_the_order_of_pixels() -> None:
    maps = 7 * torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(6))
    scaled = scale_map(maps, torch.linspace(1, 2, 20))
    assert torch.equal(scaled.amin((1, 2, 3)), torch.zeros(20))
    assert torch.equal(scaled.amax((1, 2, 3)), torch.ones(20))
    assert torch.equal(scaled.flatten(1).argmax(1), maps.flatten(1).argmax(1))
    assert torch.allclose(
        scale_map(1000 * maps, torch.linspace(1, 2, 20)), scaled, atol=1e-4
    )  # the map's unit does not matter


# The draws


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_of_overlaid_images_is_the_probability(probability: float) -> None:
    count = int(draw_epoch(N, probability, seed=0, epoch=0).overlaid.sum())
    low, high = stats.binom.interval(1 - 1e-6, N, probability)
    print(f"{count} of {N} images, seed 0; the binomial bound is {low:.0f} to {high:.0f}")
    assert low <= count <= high


def test_powers_are_log_uniform_from_one_to_two() -> None:
    powers = draw_epoch(N, 0.1, seed=0, epoch=0).powers.double()
    assert float(powers.min()) >= 1
    assert float(powers.max()) <= 2
    # log2 of it is uniform on [0, 1]: mean 1/2, deviation 1/√12.
    assert abs(float(powers.log2().mean()) - 0.5) < 5 / (12 * N) ** 0.5
    assert stats.kstest(powers.log2().numpy(), "uniform").pvalue > 1e-3
    print(f"{N} powers, seed 0")


def test_shifts_and_flips_are_uniform() -> None:
    epoch = draw_epoch(N, 0.1, seed=1, epoch=0)
    cells = (9 * epoch.shifts[:, 0] + epoch.shifts[:, 1]).bincount(minlength=81)
    assert len(cells) == 81
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3
    assert abs(float(epoch.flips.double().mean()) - 0.5) < 5 * 0.5 / N**0.5


def test_every_image_is_visited_once_an_epoch() -> None:
    first, second = (draw_epoch(1000, 0.1, seed=0, epoch=epoch).order for epoch in (0, 1))
    assert first.sort().values.equal(torch.arange(1000))
    assert second.sort().values.equal(torch.arange(1000))
    assert not first.equal(second)


def test_probability_zero_leaves_only_crop_and_flip() -> None:
    images, maps, batch = random_images(64), torch.rand(64, 32, 32), draw_epoch(64, 0.0, seed=0, epoch=0)
    assert torch.equal(overlay(images, maps, batch), crop_and_flip(images, batch.shifts, batch.flips))


def test_probability_one_touches_every_image() -> None:
    maps = torch.rand(64, 32, 32, generator=torch.Generator().manual_seed(7))
    images, batch = random_images(64), draw_epoch(64, 1.0, seed=0, epoch=0)
    changed = overlay(images, maps, batch) != crop_and_flip(images, batch.shifts, batch.flips)
    assert changed.flatten(1).any(1).all()


def test_two_methods_with_one_seed_see_the_same_crops() -> None:
    without, with_overlay, other_seed = (draw_epoch(1000, p, seed, 3) for p, seed in ((0.0, 5), (0.1, 5), (0.1, 6)))
    for name in ("order", "shifts", "flips", "powers"):
        assert torch.equal(getattr(without, name), getattr(with_overlay, name)), name
        assert not torch.equal(getattr(other_seed, name), getattr(with_overlay, name)), name


def test_images_overlaid_at_a_low_probability_are_overlaid_at_a_high_one() -> None:
    few, many = (draw_epoch(1000, p, seed=0, epoch=0).overlaid for p in (0.1, 0.4))
    assert bool(many[few].all())


def test_batches_are_consecutive_rows() -> None:
    epoch = draw_epoch(100, 0.1, seed=0, epoch=0)
    parts = [epoch.batch(start, 32) for start in range(0, 100, 32)]
    assert [len(part.order) for part in parts] == [32, 32, 32, 4]
    assert torch.cat([part.shifts for part in parts]).equal(epoch.shifts)


def test_drawing_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    draw_epoch(100, 0.1, seed=0, epoch=0), signal_positions(100, "shuffled", seed=0)
    assert torch.equal(before, torch.get_rng_state())


# Pairing


def test_matched_signals_are_the_images_own() -> None:
    assert signal_positions(1000, "matched", seed=0).equal(torch.arange(1000))


def test_shuffled_signals_are_a_fixed_permutation() -> None:
    first = signal_positions(1000, "shuffled", seed=0)
    assert first.sort().values.equal(torch.arange(1000))
    assert not first.equal(torch.arange(1000))
    assert first.equal(signal_positions(1000, "shuffled", seed=0))
    assert not first.equal(signal_positions(1000, "shuffled", seed=1))
    # A random permutation leaves about one image its own map.
    assert int((first == torch.arange(1000)).sum()) < 8


# Bad input


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_probability_outside_its_range_is_named(probability: float) -> None:
    with pytest.raises(ValueError, match=rf"overlay_probability = {probability} .*from 0 to 1"):
        draw_epoch(10, probability, seed=0, epoch=0)


@pytest.mark.parametrize("pairing", ["Matched", "noise", ""])
def test_unknown_pairing_is_named(pairing: str) -> None:
    with pytest.raises(ValueError, match="matched, shuffled"):
        overlay(random_images(2), torch.zeros(2, 32, 32), draws(2), pairing)
    with pytest.raises(ValueError, match="matched, shuffled"):
        signal_positions(10, pairing, seed=0)


@pytest.mark.parametrize(
    ("image_shape", "map_shape"),
    [
        ((2, 3, 28, 28), (2, 32, 32)),
        ((2, 1, 32, 32), (2, 32, 32)),
        ((2, 3, 32, 32), (2, 1, 32, 32)),
        ((2, 3, 32, 32), (3, 32, 32)),
    ],
)
def test_other_shapes_are_named(image_shape: tuple[int, ...], map_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, 3, 32, 32\)") as caught:
        overlay(torch.zeros(image_shape), torch.zeros(map_shape), draws(2))
    assert str(image_shape) in str(caught.value)
    assert str(map_shape) in str(caught.value)
