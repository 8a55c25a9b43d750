"""Is an attribution true to its model, and does the student look where the teacher looks? Measures, each with controls.

Every function gives one number an image, so that means get intervals over the images. A measure without what chance
would give is no measure: for each one the control stands beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, baseline, check_finite, integrated_gradients
from kdig_utils.method.models import most_at_once
from kdig_utils.method.pairings import another, edges

Forward = Callable[[Tensor], Tensor]
SIMILARITIES = ("spearman", "cosine", "top_tenth")
TILES = 4
FORWARD = 256  # images in one forward pass
SQUARES, SIDE = 10, 8  # squares that are taken from each image for its infidelity, and their side in pixels
NOISY_COPIES = 4  # of each image for the sensitivity of its map


def attributions(model: Forward, images: Tensor, target: Tensor, n_steps: int) -> Tensor:
    """IG of the target's logit from the paper's baseline, the mean colour, (N, 3, H, W) to the same.

    The same baseline in pixels serves teacher and students: maps from two baselines answer two questions.
    """
    grey, at_once = baseline("mean_colour", images), most_at_once(model, tuple(images.shape[1:]), images.device)
    return integrated_gradients(model, images, grey, target, n_steps, internal_batch_size=at_once)


def ig_maps(model: Forward, images: ImageSet, n_steps: int) -> Tensor:
    """The maps of these attributions for the true class, (N, 32, 32)."""
    return attribution_map(attributions(model, images.images(), images.labels, n_steps))


def similarity(maps: Tensor, others: Tensor) -> dict[str, Tensor]:
    """How alike two sets of maps, each (N, H, W), are, image by image.

    Returns:
        `spearman`, the correlation of the ranks, in [-1, 1]; `cosine`, in [0, 1] for maps without negative values;
        `top_tenth`, in [0, 1], the share of the highest tenth of the pixels that the two have in common. Each of shape
        (N,). Spearman is NaN where a map is constant.

    Raises:
        ValueError: the maps have different shapes, or hold NaN.
    """
    for values in (maps, others):
        check_finite(values, "maps")
    if maps.shape != others.shape:
        raise ValueError(f"maps of shapes {tuple(maps.shape)} and {tuple(others.shape)}: compare maps of equal shape")
    a, b = maps.flatten(1).double().cpu(), others.flatten(1).double().cpu()
    count = max(1, round(a.shape[1] / 10))
    high = [torch.zeros_like(values).scatter_(1, values.topk(count).indices, 1.0) for values in (a, b)]
    top_tenth = (high[0] * high[1]).sum(1) / count
    return {"spearman": _spearman(maps, others), "cosine": F.cosine_similarity(a, b), "top_tenth": top_tenth}


def partial_spearman(maps: Tensor, others: Tensor, given: Tensor) -> Tensor:
    """What is left of the rank correlation of two sets of maps when both follow a third, (N,), in [-1, 1].

    0 where they are alike only because both are like `given`. All three (N, H, W).
    """
    ab, ac, bc = _spearman(maps, others), _spearman(maps, given), _spearman(others, given)
    return (ab - ac * bc) / ((1 - ac**2) * (1 - bc**2)).sqrt()


def _spearman(maps: Tensor, others: Tensor) -> Tensor:
    ranks = (torch.from_numpy(rankdata(values.flatten(1).cpu().numpy(), axis=1)) for values in (maps, others))
    first, second = (values - values.mean(1, keepdim=True) for values in ranks)
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def blind_maps(images: ImageSet) -> dict[str, Tensor]:
    """Two maps that no network has a part in, (N, 32, 32): `edges` (Sobel) and `difference`, |image - baseline|.

    The second is the factor that stands before the integral: whatever the network, its IG map contains it.
    """
    pixels = images.images()
    difference = attribution_map(pixels - baseline("mean_colour", pixels))
    return {"edges": edges(images.pixels).float(), "difference": difference}


def perturbation_curve(
    forward_func: Forward, start: Tensor, end: Tensor, maps: Tensor, target: Tensor, n_steps: int
) -> Tensor:
    """The target's output while pixels change from `start` to `end`, highest of the map first (RISE, arXiv 1806.07421).

    Args:
        forward_func: (N, C, H, W) to (N, classes); RISE takes probabilities.
        start, end: (N, C, H, W).
        maps: (N, H, W); pixels of equal height change in their order.
        target: classes, (N,).
        n_steps: how often some of the pixels change, always the same number up to rounding.

    Returns:
        (N, n_steps + 1), from no pixel changed to all.

    Raises:
        ValueError: n_steps is outside 1 to the number of pixels, or maps are not those of the images, or hold NaN.
    """
    check_finite(maps, "maps")
    if maps.shape != start[:, 0].shape:
        raise ValueError(f"maps of shape {tuple(maps.shape)} for images of {tuple(start.shape)}: give one an image")
    pixels = start[0, 0].numel()
    if not 1 <= n_steps <= pixels:
        raise ValueError(f"n_steps = {n_steps} is outside 1 to {pixels}: at least one pixel changes in a step")
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1).view_as(maps).unsqueeze(1)  # how many pixels change before this one
    columns = []
    for count in np.linspace(0, pixels, n_steps + 1).round():
        changed = torch.where(rank < int(count), end, start)
        with torch.no_grad():
            outputs = torch.cat([forward_func(part) for part in changed.split(FORWARD)])
        columns.append(outputs.gather(1, target.unsqueeze(1)))
    return torch.cat(columns, dim=1)


def area(curves: Tensor) -> Tensor:
    """Area under each curve, (N, points) to (N,): the mean height over the share of pixels changed, trapezoids."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def deletion_and_insertion(
    model: nn.Module, images: Tensor, target: Tensor, maps: Tensor, n_steps: int
) -> dict[str, Tensor]:
    """Two curves of the target's probability, each (N, n_steps + 1).

    `deletion` goes from the image to the mean colour, `insertion` from a blurred image to the image: a faithful map
    makes the first fall early and the second rise early.
    """
    probability = nn.Sequential(model, nn.Softmax(1))
    grey, blurred = baseline("mean_colour", images), baseline("blurred", images)
    return {
        "deletion": perturbation_curve(probability, images, grey, maps, target, n_steps),
        "insertion": perturbation_curve(probability, blurred, images, maps, target, n_steps),
    }


@torch.no_grad()
def infidelity_and_scale(
    model: Forward, images: Tensor, attributions: Tensor, target: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Infidelity (Yeh et al. 2019, arXiv 1901.09392) of attributions, and of an attribution of zeros, each (N,).

    Squares of the image are replaced by the mean colour; a faithful attribution foretells by how much the logit falls.
    The ratio of the two means is the share that it leaves unexplained: 0 for an attribution that foretells exactly, 1
    for one that is no better than saying that nothing changes.

    Args:
        attributions: with their signs, (N, 3, H, W), of the logit from the mean colour.
        seed: of the places of the squares, the same for every model.
    """
    copies = images.repeat_interleave(SQUARES, 0)
    taken = squares(copies, torch.Generator().manual_seed(seed))
    changed = torch.where(taken, baseline("mean_colour", copies), copies)
    after = model(changed).unflatten(0, (-1, SQUARES)).gather(2, target.view(-1, 1, 1).expand(-1, SQUARES, 1))
    fall = model(images).gather(1, target.unsqueeze(1)) - after.squeeze(2)
    foretold = (attributions.unsqueeze(1) * taken.unflatten(0, (-1, SQUARES))).flatten(2).sum(2)
    return (foretold - fall).square().mean(1), fall.square().mean(1)


def squares(images: Tensor, generator: torch.Generator) -> Tensor:
    """The pixels of one square anywhere in each image: (N, C, H, W) to booleans, (N, 1, H, W)."""
    sides = torch.tensor(images.shape[-2:])
    corners = (torch.rand(len(images), 2, generator=generator) * (sides - SIDE + 1)).long()
    places = (torch.arange(int(side)) - first[:, None] for side, first in zip(sides, corners.T, strict=True))
    in_rows, in_columns = ((place >= 0) & (place < SIDE) for place in places)
    return (in_rows[:, None, :, None] & in_columns[:, None, None, :]).to(images.device)


def map_sensitivity(
    model: Forward, images: Tensor, target: Tensor, n_steps: int, radius: float = 0.02, seed: int = 0
) -> Tensor:
    """The largest relative change of the IG map under noise, (N,): max-sensitivity of Yeh et al. 2019.

    Args:
        radius: of the noise, uniform, in units of pixels from 0 to 1.
        seed: of the noise, the same for every model.
    """
    copies = images.repeat_interleave(NOISY_COPIES, 0)
    noise = torch.rand(copies.shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
    noisy, targets = copies + radius * (2 * noise - 1), target.repeat_interleave(NOISY_COPIES)
    before, after = (
        attribution_map(attributions(model, inputs, classes, n_steps)).flatten(1)
        for inputs, classes in ((images, target), (noisy, targets))
    )
    moved = (after.unflatten(0, (-1, NOISY_COPIES)) - before.unsqueeze(1)).norm(dim=2)
    return moved.amax(1) / before.norm(dim=1)


@dataclass(frozen=True)
class Mosaics:
    """Two by two images of four different classes, and the tile that is asked about.

    It is drawn at random: a map that does not depend on it falls on it once in four times, whatever else it depends on.
    """

    images: Tensor  # (N, 3, 64, 64) in [0, 1]; the tiles in the order of reading
    labels: Tensor  # the classes of the tiles, (N, 4)
    asked: Tensor  # the tile whose class is explained, (N,), from 0 to 3

    @property
    def target(self) -> Tensor:
        """The class that is asked about, (N,)."""
        return self.labels.gather(1, self.asked.unsqueeze(1)).squeeze(1)


def mosaics(images: ImageSet, count: int, seed: int = 0) -> Mosaics:
    """`count` mosaics of images drawn at random; the networks take them as they are, pooling over more places.

    Raises:
        ValueError: the images have fewer than four classes.
    """
    of_images = images.labels.cpu()
    classes = of_images.unique()
    if len(classes) < TILES:
        raise ValueError(f"{len(classes)} classes make no mosaic of {TILES} different ones: give images of more")
    generator = torch.Generator().manual_seed(seed)
    labels = classes[torch.rand(count, len(classes), generator=generator).argsort(1)[:, :TILES]]
    draws = torch.rand(count, TILES, generator=generator).double()
    by_class, members = of_images.argsort(stable=True), of_images.bincount()
    before = members.cumsum(0) - members  # where a class begins in that order
    places = by_class[before[labels] + (draws * members[labels]).long()]
    tiles = images.images(places.flatten()).view(count, 2, 2, *images.pixels.shape[1:])
    whole = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    asked = torch.randint(TILES, (count,), generator=generator)
    return Mosaics(whole, labels.to(whole.device), asked.to(whole.device))


def tile_shares(maps: Tensor) -> Tensor:
    """The share of a map, without its negative values, on each tile, (N, H, W) to (N, 4), rows adding up to 1.

    The measure of the grid pointing game (Böhle et al. 2021, arXiv 2104.00032). NaN where nothing is positive.

    Raises:
        ValueError: maps hold NaN or infinity.
    """
    check_finite(maps, "maps")
    mass = F.adaptive_avg_pool2d(maps.clamp_min(0), 2).flatten(1)
    return mass / mass.sum(1, keepdim=True)


def pointing(maps: Tensor, asked: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Does a map fall on the tile that it was asked about? Chance is 1/4 for every value; maps are (N, H, W).

    Returns:
        `peak`, bool, whether the highest pixel lies on the tile (the pointing game, Zhang et al. 2016, arXiv
        1608.00507); `share`, of the map's positive part on it; the same with the question of another mosaic,
        `peak_shuffled` and `share_shuffled`. Each (N,).
    """
    peak, shares = F.adaptive_max_pool2d(maps, 2).flatten(1).argmax(1), tile_shares(maps)
    values = {}
    for suffix, tile in {"": asked, "_shuffled": asked[another(len(asked), seed).to(asked.device)]}.items():
        values[f"peak{suffix}"] = peak == tile
        values[f"share{suffix}"] = shares.gather(1, tile.unsqueeze(1)).squeeze(1)
    return values
