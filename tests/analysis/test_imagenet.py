"""The folder of other images: read at the size and with the labels of CIFAR-10, and compared image by image."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from kdig_utils.analysis import imagenet
from kdig_utils.method.cifar10 import CLASSES


class ByRedness(nn.Module):
    """Says `ship` of red images, with the chance of a mistake, else `cat`."""

    def __init__(self, wrong: set[int]) -> None:
        super().__init__()
        self.wrong, self.seen = wrong, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0].mean((1, 2)) > 0.5
        for place in range(len(red)):
            if self.seen + place in self.wrong:
                red[place] = ~red[place]
        self.seen += len(red)
        return nn.functional.one_hot(torch.where(red, CLASSES.index("ship"), CLASSES.index("cat")), 10).float()


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cat", (0, 0, 255)), ("ship", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for place in range(20):
            PIL.Image.new("RGB", (64 + place, 50), colour).save(tmp_path / name / f"{place:02}.png")
    return tmp_path


def test_images_come_at_32_pixels_with_the_labels_of_cifar10(folder):
    images, labels = imagenet.read(folder)
    assert images.shape == (40, 3, 32, 32)
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert labels.tolist() == [CLASSES.index("cat")] * 20 + [CLASSES.index("ship")] * 20


def test_the_gain_is_the_difference_of_accuracies_tested_image_by_image(folder):
    better, worse = ByRedness({0}), ByRedness(set(range(8)))
    found = imagenet.gain(better, worse, *imagenet.read(folder))
    assert found["value"] == pytest.approx(100 * (8 - 1) / 40)
    assert found["low"] < found["value"] < found["high"]
    assert found["p"] < 0.05
    assert np.isnan(imagenet.gain(ByRedness(set()), ByRedness(set()), *imagenet.read(folder))["p"])


def test_a_folder_that_is_none_or_names_no_class_is_refused(folder, monkeypatch):
    monkeypatch.delenv("KDIG_IMAGENET", raising=False)
    assert imagenet.folder() is None
    monkeypatch.setenv("KDIG_IMAGENET", str(folder / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        imagenet.folder()
    (folder / "lynx").mkdir()
    PIL.Image.new("RGB", (40, 40)).save(folder / "lynx" / "0.png")
    with pytest.raises(ValueError, match="lynx"):
        imagenet.read(folder)
