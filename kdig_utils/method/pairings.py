"""Whose signals an image gets: its own, another image's, or a control; and what is blended in instead of the own map.

Each control keeps something of the overlay and takes something away: its place, its image, its form, its teacher.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.locks import claimed
from kdig_utils.method.checks import check_choice
from kdig_utils.method.cifar10 import MEAN, ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, input_gradients
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.paths import replacing

# What is blended onto an image: its own map, moved with its crop or not; another image's, as the released scripts do;
# noise with its map's histogram; the image's edges; the teacher's plain gradient; mean grey; another image in grey;
# black, which halves brightness and contrast and adds nothing.
PAIRINGS = ("matched", "index-matched", "shuffled", "random", "edges", "gradient", "uniform", "mixup-grey", "black")
UNMOVED = ("index-matched", "shuffled")
FLAT = {"uniform": sum(MEAN) / len(MEAN), "black": 0.0}  # one value for every pixel of the map
CHUNK = 2048  # images at a time: memory stays small, however many there are
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def signal_positions(n_images: int, pairing: str, seed: int) -> Tensor:
    """For each image, the position of the image whose teacher signal it gets, (N,).

    `shuffled`: a fixed random permutation, as if the store were saved in shuffled order. All others: its own.
    """
    check_choice("pairing", pairing, PAIRINGS)
    if pairing != "shuffled":
        return torch.arange(n_images)
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))


def paired_signals(
    signals: TeacherSignals, train: ImageSet, positions: Tensor, pairing: str, seed: int
) -> TeacherSignals:
    """The rows of `signals` for the images at `positions` of `train` under a pairing, which draws from `seed`.

    The released scripts save maps in one shuffled order, logits and attention maps in another: two permutations.
    """
    if pairing == "matched" and positions.equal(torch.arange(len(signals.logits))):
        return signals
    maps_of = signal_positions(len(signals.logits), pairing, seed=2 * seed)[positions]
    answers_of = signal_positions(len(signals.logits), pairing, seed=2 * seed + 1)[positions]
    maps, answers = signals.rows(maps_of), signals.rows(answers_of)
    blended = control_maps(pairing, maps.maps, train, positions, seed)
    return replace(answers, maps=blended, error=maps.error)


def control_maps(pairing: str, maps: Tensor, images: ImageSet, positions: Tensor, seed: int) -> Tensor:
    """The maps of the images at `positions` under a pairing, (n, 32, 32), float16 in [0, 1].

    Args:
        pairing: one of `pairings.PAIRINGS`; those without a map of their own get `maps` back.
        maps: the teacher's maps of these images, (n, 32, 32).
        images: all training images, on the device of `maps`.
        positions: where the n images stand among them.
        seed: of the noise and of the other images.
    """
    if pairing == "random":
        return permuted(maps, seed)
    if pairing == "edges":
        return torch.cat([edges(images.pixels[part]) for part in positions.split(CHUNK)])
    if pairing == "mixup-grey":
        others = another(len(images), seed)[positions].split(CHUNK)
        return torch.cat([grey(images.pixels[part]).half() for part in others])
    return maps


def permuted(maps: Tensor, seed: int) -> Tensor:
    """Each map with its pixels in random order: noise with the map's own histogram, (N, H, W) to the same."""
    generator = torch.Generator().manual_seed(seed)
    flat = maps.flatten(1)
    orders = (torch.rand(part.shape, generator=generator).argsort(1) for part in flat.split(CHUNK))
    shuffled = [part.gather(1, order.to(maps.device)) for part, order in zip(flat.split(CHUNK), orders, strict=True)]
    return torch.cat(shuffled).view(maps.shape)


def edges(pixels: Tensor) -> Tensor:
    """Length of the Sobel gradient of the grey image, divided by its maximum, (N, 3, H, W) to (N, H, W), float16."""
    kernel = torch.tensor(SOBEL, device=pixels.device)
    whole = pixels.float().sum(1, keepdim=True)  # whole numbers: where nothing changes, the length is exactly zero
    padded = F.pad(whole, [1, 1, 1, 1], mode="replicate")
    length = F.conv2d(padded, torch.stack([kernel, kernel.T]).unsqueeze(1)).norm(dim=1)
    return _divided_by_maximum(length)


def grey(pixels: Tensor) -> Tensor:
    """Mean over the colours of images as bytes, in [0, 1], (N, 3, H, W) to (N, H, W)."""
    return pixels.float().mean(1) / 255


def another(n_images: int, seed: int) -> Tensor:
    """For each image the position of another one, (N,): a random permutation in which nobody keeps its place."""
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)  # one cycle through all images
    return partners


def saliency_maps(teacher: nn.Module, images: ImageSet, batch_size: int = 64) -> Tensor:
    """Plain gradients instead of integrated ones: |∂ logit of the true class / ∂ pixel|, summed over the colours.

    Simonyan et al. (arXiv 1312.6034) take the largest colour; the sum is what the IG maps do.

    Returns:
        Maps divided by their maximum, (N, 32, 32), float16, in memory.
    """
    device = next(teacher.parameters()).device
    teacher.eval()
    maps = []
    for part in torch.arange(len(images)).split(batch_size):
        gradients = input_gradients(teacher, images.images(part).to(device), images.labels[part].to(device))
        maps.append(_divided_by_maximum(attribution_map(gradients)).cpu())
    return torch.cat(maps)


def stored_saliency_maps(teacher: nn.Module, images: ImageSet, path: Path, say: Callable[[str], None]) -> Tensor:
    """The same from the file `path`, made now, or earlier, by one process while others wait.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        with claimed(path, say):
            if not path.is_file():  # else another process has just made it
                say(f"plain gradients of {len(images):,} images")
                maps = saliency_maps(teacher, images)
                with replacing(path) as part, part.open("wb") as file:
                    np.save(file, maps.numpy())
    try:
        maps = torch.from_numpy(np.load(path))
        if maps.shape != (len(images), 32, 32) or not bool(((maps >= 0) & (maps <= 1)).all()):
            raise ValueError("it holds no maps of these images")
    except Exception as error:  # NumPy raises many types for a damaged header
        raise ValueError(f"{path} is damaged ({error}): delete it to compute it again") from error
    return maps


def _divided_by_maximum(maps: Tensor) -> Tensor:
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)).half()
