"""What the authors' released networks say when they are measured: four files `results/released*`.

`benchmarks/released_networks.py` makes them; all networks get the same questions. Where a teacher is asked, it is ours:
theirs is not public under its own name, so a likeness to its maps is a likeness to a teacher that these students never
saw.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils import paths
from kdig_utils.analysis.examination import Mean, mean_over_images
from kdig_utils.method import losses, released
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.overlay import draw_epoch, overlay
from kdig_utils.method.pairings import another

CORRUPTED = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
SEVERITIES = (1, 3, 5)
ALPHAS = (0.01, 0.1, 0.5, 0.9)
TEMPERATURE = 2.5  # the paper's
BATCHES, BATCH_SIZE = 2, 64  # of the gradients with respect to all parameters


def overlays(images: ImageSet, maps: Tensor) -> dict[str, Tensor]:
    """The images without overlay, black, and under their own map and another's: not cropped, nothing else changes."""
    centred = draw_epoch(len(images), overlay_probability=1.0, seed=0, epoch=0)
    centred = replace(centred, shifts=torch.full_like(centred.shifts, 4), flips=torch.zeros_like(centred.flips))
    pixels = images.images()
    return {
        "no overlay": pixels,
        "black": overlay(pixels, maps, centred, "black"),
        "own map": overlay(pixels, maps, centred),
        "another's map": overlay(pixels, maps[another(len(maps), seed=0)], centred),
    }


def logits_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Logits of crops, (N, 3, 32, 32) to (N, 10), with the network as it is."""
    with torch.inference_mode():
        return torch.cat([network(part) for part in pixels.split(50)])


def gradient_measures(
    network: nn.Module, crops: Tensor, labels: Tensor, answers: dict[str, Tensor], alphas: tuple[float, ...] = ALPHAS
) -> dict[str, Mean]:
    r"""What the teacher's answers weigh in the gradient of the loss with respect to the logits.

    Of :math:`(1-\alpha)\,\mathrm{CE} + \alpha T^2 \mathrm{KL}`: `share, ANSWERS, alpha A` is the mean length of the
    second part, divided by that of both lengths together; `angle, ANSWERS` the mean angle between the two parts of an
    image, in degrees, which alpha does not change.
    """
    logits, found = logits_of(network, crops).clone().requires_grad_(), {}
    (label,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    for name, told in answers.items():
        loss = len(labels) * losses.distillation_loss(logits, told, TEMPERATURE)  # the mean over the batch, undone
        (answer,) = torch.autograd.grad(loss, logits)
        angles = torch.rad2deg(F.cosine_similarity(answer, label).clamp(-1, 1).arccos())
        found[f"angle, {name}"] = mean_over_images(angles)
        for alpha in alphas:
            ours, theirs = alpha * answer.norm(dim=1), (1 - alpha) * label.norm(dim=1)
            found[f"share, {name}, alpha {alpha:g}"] = mean_over_images(ours, ours + theirs)
    return found


def is_asked_closely(network: Any) -> bool:
    """Whether this row of the catalogue gets all questions; the others are asked for predictions, also under overlays.

    The last commit, and the plain students with k = 5: it has none that was trained on all images.
    """
    return network.group == "last commit" or (network.method, network.k) == ("student", 5)


def file(name: str) -> Path:
    """One of the files `results/released*`."""
    return paths.repository_root() / "results" / name


def read() -> pd.DataFrame:
    """The committed measures, with what the catalogue says of each network.

    `sha256` has its first twelve digits; for the teacher and the controls it is their name, as `method` is.
    """
    known = released.catalogue().assign(sha256=lambda its: its["sha256"].str[:12])
    with paths.reading(file("released.csv")):
        table = pd.read_csv(file("released.csv")).merge(known, on="sha256", how="left", validate="many_to_one")
    return table.assign(method=table["method"].fillna(table["sha256"]))


def predictions() -> pd.DataFrame:
    """The committed predictions, a row a test image.

    Columns label, teacher, and the first twelve digits of each network's SHA-256; with `_confidence` behind it, the
    probability of the predicted class.
    """
    return pd.read_csv(file("released_predictions.csv.xz"))


def maps() -> dict[str, Tensor]:
    """The committed IG maps, each divided by its maximum: `SHA256.shown`, (10, 32, 32), `SHA256.game`, (2, 64, 64)."""
    return {name: values.float() for name, values in load_file(file("released_maps.safetensors")).items()}


def images() -> dict[str, Tensor]:
    """The committed values image by image, (images,), by `SHA256.MEASURE`: the same images for all networks."""
    return {name: values.float() for name, values in load_file(file("released_images.safetensors")).items()}


def agreement(predicted: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Of each pair of these columns: the share of images on which they agree, both are wrong, make the same mistake.

    Returns:
        Columns first, second, agree, both_wrong, same_mistake, error_correlation.
    """
    wrong = {name: predicted[name] != predicted["label"] for name in names}
    rows = []
    for first, second in itertools.combinations(names, 2):
        alike, both = predicted[first] == predicted[second], wrong[first] & wrong[second]
        shares = (alike.mean(), both.mean(), (both & alike).mean())
        rows.append((first, second, *shares, float(np.corrcoef(wrong[first], wrong[second])[0, 1])))
    return pd.DataFrame(rows, columns=["first", "second", "agree", "both_wrong", "same_mistake", "error_correlation"])
