"""What every network is asked: about its maps, its confidence, and pictures that get worse.

All networks get the same questions. Each answer is a mean over images with an interval; `explanations` keeps them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from kdig_utils.analysis import calibration, corruptions, faithfulness
from kdig_utils.analysis.faithfulness import Mosaics, ig_maps
from kdig_utils.method import cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map
from kdig_utils.method.models import predict
from kdig_utils.method.pairings import another, permuted

CONTROLS = ("untrained", "edges", "difference")
RESAMPLES = 2000
PART = 32  # images at a time where each becomes many


@dataclass(frozen=True)
class Effort:
    """On how many images each measure is taken, as many of each class, and how finely."""

    images: int = 100  # explained: all measures of maps are taken on these
    n_steps: int = 16  # evaluations along the path of IG, of all maps
    curve_steps: int = 10  # of deletion and insertion
    mosaics: int = 100  # of the pointing game, made of the explained images
    corrupted: int = 50  # images under each corruption at each severity
    classified: int = 2000  # for calibration


QUICK = Effort(images=10, n_steps=6, curve_steps=6, mosaics=6, corrupted=10, classified=60)


@dataclass(frozen=True)
class Examination:
    """The questions, made once, from images that no network was trained on."""

    effort: Effort
    explained: ImageSet  # the images whose maps are compared
    teacher_maps: Tensor  # the teacher's IG maps of them, (N, 32, 32)
    mosaics: Mosaics  # of the pointing game
    corrupted: dict[tuple[str, int], ImageSet]  # by corruption and severity
    clean: ImageSet  # the same images without corruption
    classified: ImageSet  # for calibration


def prepare(teacher: nn.Module, images: ImageSet, effort: Effort) -> Examination:
    """The examination of networks beside this teacher, on the device of both."""
    explained, clean, classified = (
        first_images(images, count) for count in (effort.images, effort.corrupted, effort.classified)
    )
    corrupted = {
        (name, severity): corruptions.corrupt(clean, name, severity)
        for name in corruptions.CORRUPTIONS
        for severity in corruptions.SEVERITIES
    }
    maps, game = ig_maps(teacher, explained, effort.n_steps), faithfulness.mosaics(explained, effort.mosaics)
    return Examination(effort, explained, maps, game, corrupted, clean, classified)


def first_images(images: ImageSet, count: int) -> ImageSet:
    """The first `count` of the images, as many of each class; fewer if there are fewer.

    Raises:
        ValueError: `count` is no multiple of the ten classes.
    """
    each, rest = divmod(count, len(cifar10.CLASSES))
    if each < 1 or rest:
        raise ValueError(f"{count} images are no multiple of ten: give as many of each class, as 100")
    return images.subset(cifar10.first_of_each_class(images.labels, each))


class Mean(NamedTuple):
    """A mean over images with its 95 % interval."""

    value: float
    low: float
    high: float
    images: int


def mean_over_images(values: Tensor, scale: Tensor | None = None, seed: int = 0) -> Mean:
    """The mean of one number an image, (N,), divided by that of `scale` if given; NaN, if not defined, is left out.

    Truth values get Wilson's interval, numbers that of 2,000 bootstrap samples of the images (percentiles). It covers
    the choice of images and nothing else: for another training of the same network there is another seed.
    """
    if values.dtype == torch.bool:
        right, count = int(values.sum()), len(values)
        if not count:
            return Mean(np.nan, np.nan, np.nan, 0)
        low, high = proportion_confint(right, count, method="wilson")
        return Mean(right / count, float(low), float(high), count)
    pairs = torch.stack([values, torch.ones_like(values) if scale is None else scale]).detach().cpu().double().numpy()
    above, below = pairs[:, ~np.isnan(pairs).any(0)]
    if len(above) < 2:
        return Mean(np.nan, np.nan, np.nan, len(above))
    how = {"paired": True, "vectorized": True, "n_resamples": RESAMPLES, "method": "percentile"}
    found = stats.bootstrap((above, below), _ratio, **how, rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return Mean(float(_ratio(above, below)), float(low), float(high), len(above))


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return above.mean(axis) / below.mean(axis)


def examine(network: nn.Module, asked: Examination) -> dict[str, Mean]:
    """All measures of one network, in evaluation mode, on the device of the examination's images.

    For their names see `of_images`, `means`, `corruption_measures` and `calibration_measures`.
    """
    values = of_images(network, asked) | corruption_measures(network, asked)
    return means(values) | calibration_measures(network, asked.classified)


def of_images(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """All measures of a network's maps, one value an image or a mosaic, in the same order for every network.

    For their names see `map_measures`, `pointing_measures` and `perturbation_measures`.
    """
    return map_measures(network, asked) | pointing_measures(network, asked) | perturbation_measures(network, asked)


def means(values: dict[str, Tensor]) -> dict[str, Mean]:
    """The mean of each; where infidelity is among them `unexplained`, the share that a map does not foretell."""
    found = {name: mean_over_images(of_image) for name, of_image in values.items()}
    if "infidelity" in values:
        found["unexplained"] = mean_over_images(values["infidelity"], values["infidelity_of_zeros"])
    return found


def control_measures(asked: Examination) -> dict[str, dict[str, Tensor]]:
    """How like the teacher's maps are maps that know nothing of it: for each of `CONTROLS` its measures of likeness.

    `untrained` are the maps of a student with random weights; `edges` and `difference` look at the image alone.
    """
    untrained = models.student(5).eval().to(asked.teacher_maps.device)
    maps = {"untrained": ig_maps(untrained, asked.explained, asked.effort.n_steps)}
    maps |= faithfulness.blind_maps(asked.explained)
    return {name: likeness(maps[name], asked) for name in CONTROLS}


def map_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """Measures of the network's maps, one value an image.

    Returns:
        `spearman`, `cosine`, `top_tenth`, to the teacher's map, and with `_shuffled` and `_random` to its controls;
        `spearman_partial`; `deletion` and `insertion`: areas, with `_random` those of a random order, with `_gain` how
        much better than it.
    """
    maps = ig_maps(network, asked.explained, asked.effort.n_steps)
    values = likeness(maps, asked)
    shuffled = asked.teacher_maps[another(len(maps), seed=0).to(maps.device)]
    for name, others in (("shuffled", shuffled), ("random", permuted(asked.teacher_maps, seed=0))):
        values |= {f"{key}_{name}": value for key, value in faithfulness.similarity(maps, others).items()}
    pixels, labels = asked.explained.images(), asked.explained.labels
    for suffix, ranked in {"": maps, "_random": permuted(maps, seed=0)}.items():
        curves = faithfulness.deletion_and_insertion(network, pixels, labels, ranked, asked.effort.curve_steps)
        values |= {f"{name}{suffix}": faithfulness.area(curve) for name, curve in curves.items()}
    values["deletion_gain"] = values["deletion_random"] - values["deletion"]
    values["insertion_gain"] = values["insertion"] - values["insertion_random"]
    return values


def likeness(maps: Tensor, asked: Examination) -> dict[str, Tensor]:
    """`spearman`, `cosine`, `top_tenth` to the teacher's maps, and `spearman_partial`: what |image - baseline| leaves.

    That factor stands in every IG map, whatever the network.
    """
    factor = faithfulness.blind_maps(asked.explained)["difference"]
    partial = faithfulness.partial_spearman(maps, asked.teacher_maps, factor)
    return faithfulness.similarity(maps, asked.teacher_maps) | {"spearman_partial": partial}


def perturbation_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """Measures for which each image becomes many, one value an image.

    Returns:
        `sensitivity`: how far the IG map moves under noise that is hardly seen (`faithfulness.map_sensitivity`);
        `infidelity` and `infidelity_of_zeros`, which is that of a map that foretells nothing
        (`faithfulness.infidelity_and_scale`).
    """
    n_steps, values = asked.effort.n_steps, []
    for seed, part in enumerate(torch.arange(len(asked.explained)).to(asked.explained.labels.device).split(PART)):
        pixels, labels = asked.explained.images(part), asked.explained.labels[part]
        found = faithfulness.attributions(network, pixels, labels, n_steps)
        moved = faithfulness.map_sensitivity(network, pixels, labels, n_steps, seed=seed)
        values.append((moved, *faithfulness.infidelity_and_scale(network, pixels, found, labels, seed)))
    names = ("sensitivity", "infidelity", "infidelity_of_zeros")
    return dict(zip(names, map(torch.cat, zip(*values, strict=True)), strict=True))


def pointing_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """The pointing game on mosaics, one value a mosaic; chance is 1/4.

    Returns:
        `peak` and `share`, and with `_shuffled` for another mosaic's question, of the paper's map, which drops the
        sign; with `signed_` in front of the sum over the channels with its sign.
    """
    game = asked.mosaics
    found = faithfulness.attributions(network, game.images, game.target, asked.effort.n_steps)
    signed = {f"signed_{name}": value for name, value in faithfulness.pointing(found.sum(1), game.asked).items()}
    return faithfulness.pointing(attribution_map(found), game.asked) | signed


def corruption_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """Whether images under corruption are classified rightly, one value an image.

    Returns:
        `severity_0` (no corruption) to `severity_5`, each the mean over all corruptions; the name of each corruption,
        the mean over its severities.
    """
    right = {key: _right(network, images).double() for key, images in asked.corrupted.items()}

    def mean_of(wanted: str | int) -> Tensor:
        return torch.stack([value for key, value in right.items() if wanted in key]).mean(0)

    by_severity = {f"severity_{level}": mean_of(level) for level in corruptions.SEVERITIES}
    by_name = {name: mean_of(name) for name in corruptions.CORRUPTIONS}
    return {"severity_0": _right(network, asked.clean), **by_severity, **by_name}


def _right(network: nn.Module, images: ImageSet) -> Tensor:
    return (predict(network, images).argmax(1) == images.labels).cpu()


def calibration_measures(network: nn.Module, images: ImageSet) -> dict[str, Mean]:
    """`accuracy`; `ece`, the expected calibration error; `ece_calibrated`, what it were if the network were calibrated.

    Their intervals are those of `calibration.Calibration`.
    """
    confidence, classes = predict(network, images).softmax(1).cpu().max(1)
    right, count = classes == images.labels.cpu(), len(classes)
    found = calibration.calibration(confidence.double().numpy(), right.numpy())
    ece, null = Mean(*found[:3], count), Mean(*found[3:], count)
    return {"accuracy": mean_over_images(right), "ece": ece, "ece_calibrated": null}
