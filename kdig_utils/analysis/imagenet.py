"""The follow-up's other data: images of ImageNet in CIFAR-10's classes. They may not be passed on: the reader has them.

`KDIG_IMAGENET` names a folder with one folder of images for each class that ImageNet shares with CIFAR-10, named as
there: airplane, automobile, bird, cat, dog, frog, ship, truck.
"""

import os
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.method.cifar10 import CLASSES


def folder() -> Path | None:
    """The folder that `KDIG_IMAGENET` names; None if it names none.

    Raises:
        ValueError: it is no folder.
    """
    if not (named := os.environ.get("KDIG_IMAGENET")):
        return None
    if not Path(named).is_dir():
        raise ValueError(f"KDIG_IMAGENET names {named}, which is no folder: give one with a folder for each class")
    return Path(named)


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Its images at 32 × 32 pixels, (N, 3, 32, 32) in [0, 1], and their labels as CIFAR-10 numbers them, (N,).

    Raises:
        ValueError: a folder is not named like a class of CIFAR-10.
    """
    found = ImageFolder(str(path))
    if unknown := sorted(set(found.classes) - set(CLASSES)):
        raise ValueError(f"{path} has a folder {unknown[0]!r}: name each folder like a class, {', '.join(CLASSES)}")
    shrink = v2.Compose([v2.ToImage(), v2.RGB(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])
    pairs = [(shrink(image), CLASSES.index(found.classes[label])) for image, label in found]
    return torch.stack([image for image, _label in pairs]), torch.tensor([label for _image, label in pairs])


@torch.no_grad()
def gain(first: nn.Module, second: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How much more of the images the first network gets right, in points: value, low, high (95 %) and p, paired."""
    right = [
        100 * (torch.cat([network(part).argmax(1) for part in images.split(256)]) == labels).double().numpy()
        for network in (first.eval(), second.eval())
    ]
    test = stats.ttest_rel(*right)
    low, high = test.confidence_interval(1 - SIGNIFICANCE)
    return {"value": float(np.subtract(*right).mean()), "low": float(low), "high": float(high), "p": float(test.pvalue)}
