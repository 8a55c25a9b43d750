"""A laboratory of moments: real runs on 80 images, judged on 20. Workers of a cluster import it, as the tests do."""

from functools import cached_property
from pathlib import Path

from torch import nn

from kdig_utils.experiments.laptop import Laboratory, spec
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method import cifar10
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import RunSpec


class SmallLaboratory(Laboratory):
    """The laptop protocol's images and signals, and few of its test images."""

    @cached_property
    def test(self) -> ImageSet:
        sample = cifar10.load_sample("test")
        return sample.subset(cifar10.first_of_each_class(sample.labels, 2))

    def _also_measured(self, _network: nn.Module) -> dict[str, float]:
        return {}


def small_laboratory(folder: Path) -> SmallLaboratory:
    return SmallLaboratory("laptop", folder, Ledger(folder / "runs.csv"), folder / "curves", n_steps=14)


def small_run(seed: int, epochs: int = 8, method: str = "student", **changes: object) -> RunSpec:
    return spec(method, seed=seed, epochs=epochs, train_images=80, **changes)
