"""Augmentation and overlay on whole batches, where the data lives (paper, section 3; paper.json, `overlay`).

Every random number of an epoch is drawn first, by `draw_epoch`; applying them is then a pure function of the batch.
Crop and flip are applied to the image and, the same, to its map.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdig_utils.method.checks import check_choice, check_number
from kdig_utils.method.pairings import FLAT, PAIRINGS, UNMOVED

PADDING = 4


@dataclass(frozen=True)
class EpochDraws:
    """All random numbers of one epoch, row by row in the order in which the images are visited."""

    order: Tensor  # position of each image in the training set, (N,)
    shifts: Tensor  # row and column offset of the crop in the padded image, (N, 2), from 0 to 8
    flips: Tensor  # whether the image is mirrored, (N,)
    overlaid: Tensor  # whether the map is blended in, (N,)
    powers: Tensor  # exponent of the map, (N,), from 1 to 2

    def batch(self, start: int, size: int) -> "EpochDraws":
        """The rows from `start` on, at most `size` of them."""
        return EpochDraws(*(values[start : start + size] for values in vars(self).values()))

    def batches(self, size: int) -> Iterator["EpochDraws"]:
        """The epoch in batches of `size`, the last of what is left."""
        return (self.batch(start, size) for start in range(0, len(self.order), size))

    def rows(self, places: Tensor) -> "EpochDraws":
        """The rows at `places`, a tensor on the device of the draws: no host needs to know where an epoch stands."""
        return EpochDraws(*(values[places] for values in vars(self).values()))

    def to(self, device: torch.device | str) -> "EpochDraws":
        """The same numbers on `device`."""
        return EpochDraws(*(values.to(device) for values in vars(self).values()))


def draw_epoch(n_images: int, overlay_probability: float, seed: int, epoch: int) -> EpochDraws:
    """Draw order, crops, flips and overlays of one epoch; they depend on `seed` and `epoch` alone.

    The draws are the same for every overlay probability, so that two methods with one seed see the same crops.

    Raises:
        ValueError: the probability lies outside [0, 1].
    """
    check_number("overlay_probability", overlay_probability)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_images, generator=generator)
    shifts = torch.randint(0, 2 * PADDING + 1, (n_images, 2), generator=generator)
    flips = torch.rand(n_images, generator=generator) < 0.5
    overlaid = torch.rand(n_images, generator=generator) < overlay_probability
    powers = torch.exp(torch.rand(n_images, generator=generator) * torch.log(torch.tensor(2.0)))
    return EpochDraws(order, shifts, flips, overlaid, powers)


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Pad by 4 with zeros, cut out at `shifts`, mirror where `flips`: RandomCrop and RandomHorizontalFlip, batched.

    Args:
        images: (N, C, H, W), any dtype.
        shifts: (N, 2), row and column from 0 to 8; (4, 4) leaves the image where it is.
        flips: (N,), bool.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(flips.unsqueeze(1), width - 1 - columns, columns) + shifts[:, 1:]
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    # Indexing first and last axes moves the channels to the end.
    return padded[image, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def cutout(images: Tensor, side: int) -> Tensor:
    """Images with one square of `side` pixels set to zero in each, around a point drawn anywhere (arXiv 1708.04552).

    Draws from the global generator of the images' device, as dropout does; the square may reach over the edge.
    """
    height, width = images.shape[-2:]
    centre = torch.rand(len(images), 2, 1, device=images.device)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    hidden_rows = (rows + 0.5 - height * centre[:, 0]).abs() < side / 2
    hidden_columns = (columns + 0.5 - width * centre[:, 1]).abs() < side / 2
    return images.masked_fill((hidden_rows.unsqueeze(2) & hidden_columns.unsqueeze(1)).unsqueeze(1), 0.0)


def scale_map(maps: Tensor, powers: Tensor) -> Tensor:
    """Raise each map to its power, then scale it to [0, 1]; a constant map becomes zeros. (N, 1, H, W) to the same."""
    powered = maps.pow(powers.view(-1, 1, 1, 1))
    lowest, highest = powered.amin((1, 2, 3), keepdim=True), powered.amax((1, 2, 3), keepdim=True)
    return (powered - lowest) / (highest - lowest).clamp_min(torch.finfo(maps.dtype).tiny)


def blend(images: Tensor, maps: Tensor) -> Tensor:
    """0.5 · image + 0.5 · map, the map repeated over the colour channels."""
    return 0.5 * images + 0.5 * maps


def overlay(images: Tensor, maps: Tensor, batch: EpochDraws, pairing: str = "matched") -> Tensor:
    """Crop and flip `images` and blend the scaled map onto those that are drawn for it.

    Args:
        images: (N, 3, 32, 32) in [0, 1], floating point.
        maps: attribution maps, (N, 32, 32), finite and not negative, in any unit; already those that belong to the
            pairing.
        batch: the draws of this batch, on the same device.
        pairing: one of `PAIRINGS`. Those in `UNMOVED` leave the map where it is while the image moves, as the
            released scripts do; those in `FLAT` blend in one value instead of any map.

    Raises:
        ValueError: unknown pairing, images, maps or draws of other shapes, or values out of their range.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give floating point in [0, 1], as bytes / 255")
    for name, values, highest in (("images", images, 1.0), ("maps", maps, torch.inf)):
        if not (values.isfinite() & (values >= 0) & (values <= highest)).all():
            span = f"from {float(values.min()):g} to {float(values.max()):g}"
            raise ValueError(f"{name} go {span}: give pixels in [0, 1], and maps that are finite and not negative")
    return overlay_unchecked(images, maps.to(torch.promote_types(maps.dtype, torch.float32)), batch, pairing)


def overlay_unchecked(images: Tensor, maps: Tensor, batch: EpochDraws, pairing: str) -> Tensor:
    """`overlay` without a look at the values, for which a step of the training would have to wait for the device."""
    check_choice("pairing", pairing, PAIRINGS)
    draws = {len(values) for values in vars(batch).values()}
    if images.shape[1:] != (3, 32, 32) or maps.shape != (len(images), 32, 32) or draws != {len(images)}:
        raise ValueError(
            f"images must be (N, 3, 32, 32), maps (N, 32, 32) and draws (N,), got {tuple(images.shape)}, "
            f"{tuple(maps.shape)} and {tuple(draws)}: resize them, or select those of these images"
        )
    # Scaled before it is cropped: the padding is then the map's lowest value, and the crop cannot change the scale.
    scaled = scale_map(maps.unsqueeze(1), batch.powers)
    if pairing in FLAT:
        scaled = torch.full_like(scaled, FLAT[pairing])
    elif pairing not in UNMOVED:
        scaled = crop_and_flip(scaled, batch.shifts, batch.flips)
    cropped = crop_and_flip(images, batch.shifts, batch.flips)
    return torch.where(batch.overlaid.view(-1, 1, 1, 1), blend(cropped, scaled), cropped)
