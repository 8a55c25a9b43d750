"""Pictures that get worse: 14 of the 15 corruptions of CIFAR-10-C (Hendrycks & Dietterich, arXiv 1903.12261).

The parameters of all five severities are those of its authors' script for 32 × 32 images,
`ImageNet-C/create_c/make_cifar_c.py` of the repository hendrycks/robustness. What scikit-image, OpenCV and ImageMagick
do there, NumPy, SciPy, Pillow and torchvision do here. Frost is not here: it is made of photographs of ice.

Each corruption takes images in [0, 1], (N, 3, side, side), a severity from 1 to 5, and the source of what is drawn by
lot; values may come out beyond [0, 1].
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms import v2

from kdig_utils.method.checks import check_choice
from kdig_utils.method.cifar10 import ImageSet

SEVERITIES = (1, 2, 3, 4, 5)


def gaussian_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Normal noise, as in the dark."""
    return images + rng.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], size=images.shape)


def shot_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Poisson noise: light comes in photons."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return rng.poisson(images * photons) / photons


def impulse_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper, in each colour for itself."""
    hit = rng.random(images.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    return np.where(hit, rng.random(images.shape) < 0.5, images)


def defocus_blur(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """A disk instead of a point, its edge softened."""
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    rows, columns = np.mgrid[-3:4, -3:4]
    disk = (rows**2 + columns**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), sigma, mode="constant", radius=1)
    return ndimage.correlate(images, kernel[None, None], mode="mirror")


def glass_blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Rippled glass: each pixel from at most one pixel away, once or twice, between two soft blurs."""
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    soft = (0, 0, sigma, sigma)
    moved = _cut_off(ndimage.gaussian_filter(images, soft, mode="nearest"))
    for _round in range(rounds):
        moved = _next_to_their_place(moved, rng)
    return ndimage.gaussian_filter(moved, soft, mode="nearest")


def _next_to_their_place(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each pixel becomes itself or its neighbour above, to the left, or both; the first two rows and columns stay.

    The authors' script means to swap the two, from the last pixel to the first. But `a[i], a[j] = a[j], a[i]` exchanges
    views of a NumPy array: CIFAR-10-C has copies, and all are of what was there before.
    """
    count, _channels, side, _side = images.shape
    rows, columns = np.mgrid[2:side, 2:side][:, None] - rng.integers(0, 2, (2, count, side - 2, side - 2))
    moved = images.copy()
    moved[..., 2:, 2:] = _taken(images, rows, columns)
    return moved


def _taken(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of each image its own pixels: rows and columns are (N, height, width), or spread to it."""
    return np.moveaxis(images[np.arange(len(images))[:, None, None], :, rows, columns], -1, 1)


def motion_blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The camera moves, for each image in a direction of its own, at most 45 degrees from level."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return smeared(images, radius, sigma, rng.uniform(-45, 45, len(images)))


def smeared(images: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur (`MotionBlurImage`): each pixel is a mean of those ahead of it.

    Args:
        radius, sigma: the weights of the pixel and of 2 `radius` ahead are half a Gaussian, from its peak.
        degrees: the way ahead in each image, (N,), from right to down. It goes through the nearest pixels, without
            interpolation, as in ImageMagick; beyond the edge the pixel at the edge is repeated.
    """
    places, last = np.arange(images.shape[-1]), images.shape[-1] - 1
    ways = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    total, taps = np.zeros_like(images), np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    for step, weight in enumerate(taps / taps.sum()):
        down, right = (np.ceil(step * way - 0.5).astype(int)[:, None] for way in ways)
        rows, columns = np.clip(places + down, 0, last), np.clip(places + right, 0, last)
        total += weight * _taken(images, rows[:, :, None], columns[:, None, :])
    return total


def zoom_blur(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """The camera moves towards the thing: the mean over growing zooms."""
    zooms = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    return (images + sum(_zoomed(images, zoom) for zoom in zooms)) / (len(zooms) + 1)


def _zoomed(images: np.ndarray, zoom: float) -> np.ndarray:
    """The middle of the images, enlarged to their size."""
    side = images.shape[-1]
    kept = int(np.ceil(side / zoom))
    top = (side - kept) // 2
    larger = ndimage.zoom(images[..., top : top + kept, top : top + kept], (1, 1, zoom, zoom), order=1)
    trim = (larger.shape[-1] - side) // 2
    return larger[..., trim : trim + side, trim : trim + side]


def snow(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Flakes that fall, the same turned half round, and a paler world."""
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = _zoomed(rng.normal(mean, spread, (len(images), 1, *images.shape[2:])), zoom)
    flakes = _cut_off(np.where(flakes < least, 0, np.clip(flakes, 0, 1)))
    flakes = _cut_off(smeared(flakes, radius, sigma, rng.uniform(-135, -45, len(images))))
    grey = np.tensordot((0.299, 0.587, 0.114), images, (0, 1))[:, None]
    pale = kept * images + (1 - kept) * np.maximum(images, 1.5 * grey + 0.5)
    return pale + flakes + flakes[..., ::-1, ::-1]


def fog(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A veil with clouds of all sizes, the brightest value kept."""
    thickness, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    brightest = images.max((1, 2, 3), keepdims=True)
    veil = thickness * _clouds(len(images), images.shape[-1], decay, rng)[:, None]
    return (images + veil) * brightest / (brightest + thickness)


def _clouds(count: int, side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Fractal height maps from 0 to 1 by the diamond-square rule, on a torus, (count, side, side)."""
    heights, step, roughness = np.zeros((count, side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, 1)
        heights[:, half::step, half::step] = _middle(rows + np.roll(rows, -1, 2), roughness, rng)
        centres = heights[:, half::step, half::step]
        across = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 2)
        down = centres + np.roll(centres, 1, 2) + corners + np.roll(corners, -1, 1)
        heights[:, ::step, half::step] = _middle(across, roughness, rng)
        heights[:, half::step, ::step] = _middle(down, roughness, rng)
        step, roughness = half, roughness / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


def _middle(total: np.ndarray, roughness: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of four neighbours, given by their sum, and some noise: the rougher, the more."""
    return total / 4 + roughness * rng.uniform(-roughness, roughness, total.shape)


def brightness(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """The value of hue, saturation, value is raised."""
    value = images.max(1, keepdims=True)
    raised = np.minimum(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
    # Hue and saturation are ratios of the colours: they stay when all three grow alike. Black has neither.
    return np.where(value > 0, images * raised / np.where(value > 0, value, 1), raised)


def contrast(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """Each colour is drawn towards its mean."""
    mean = images.mean((2, 3), keepdims=True)
    return (images - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean


def elastic_transform(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Stretched and sheared, then every pixel moved a little for itself."""
    of_side = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    count, _channels, side, _side = images.shape
    strength, sigma, reach = (side * share for share in of_side[severity - 1])
    sheared = _sheared(images, reach, rng)
    moves = rng.uniform(-1, 1, (count, 2, side, side))
    moves = strength * ndimage.gaussian_filter(moves, (0, 0, sigma, sigma), truncate=3)
    return _between_pixels(sheared, np.mgrid[:side, :side] + moves, mode="reflect")


def _sheared(images: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    """The affine map that moves three corners of the middle by up to `reach` pixels along each axis."""
    side = images.shape[-1]
    low, high = side // 2 - side // 3, side // 2 + side // 3
    corners = np.array([[high, high], [low, high], [low, low]], dtype=float)
    moved = corners + rng.uniform(-reach, reach, (len(images), 3, 2))
    back = np.linalg.inv(np.concatenate([moved, np.ones((len(images), 3, 1))], -1)) @ corners
    linear, constant = back[:, :2].swapaxes(1, 2), back[:, 2, :, None, None]
    return _between_pixels(images, np.tensordot(linear, np.mgrid[:side, :side], 1) + constant, mode="mirror")


def _between_pixels(images: np.ndarray, places: np.ndarray, mode: str) -> np.ndarray:
    """The images at these rows and columns, (N, 2, side, side), linear between pixels; `mode` is SciPy's, outside."""
    return np.stack([
        [ndimage.map_coordinates(channel, where, order=1, mode=mode) for channel in image]
        for image, where in zip(images, places, strict=True)
    ])  # fmt: skip


def pixelate(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """Fewer pixels, and back."""
    side = int(images.shape[-1] * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    small, box = (side, side), Image.Resampling.BOX
    pictures = [Image.fromarray(image) for image in _as_bytes(images).transpose(0, 2, 3, 1)]
    coarse = np.stack([np.asarray(each.resize(small, box).resize(each.size, box)) for each in pictures])
    return coarse.transpose(0, 3, 1, 2) / 255


def jpeg_compression(images: np.ndarray, severity: int, _rng: np.random.Generator) -> np.ndarray:
    """Saved as JPEG and read again."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    return v2.functional.jpeg(torch.from_numpy(_as_bytes(images)), quality).numpy() / 255


def _cut_off(values: np.ndarray) -> np.ndarray:
    """Whole bytes by cutting off, as in the authors' script and ImageMagick; the small number undoes 254.99999."""
    return np.floor(values * 255 + 1e-9) / 255


def _as_bytes(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    change.__name__: change
    for change in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip


def corrupt(images: ImageSet, corruption: str, severity: int, seed: int = 0) -> ImageSet:
    """The images under one corruption of CIFAR-10-C, as bytes again; labels and indices stay.

    Args:
        corruption: one of `CORRUPTIONS`.
        severity: from 1 to 5.
        seed: of all that is drawn by lot. Each corruption at each severity starts from it anew.

    Raises:
        ValueError: unknown corruption, or a severity that there is not.
    """
    check_choice("corruption", corruption, CORRUPTIONS)
    check_choice("severity", severity, SEVERITIES)
    pixels = images.pixels.cpu().numpy() / 255
    changed = CORRUPTIONS[corruption](pixels, severity, np.random.default_rng(seed))
    whole = torch.from_numpy(_as_bytes(_cut_off(np.clip(changed, 0, 1))))
    return dataclasses.replace(images, pixels=whole.to(images.pixels.device))
