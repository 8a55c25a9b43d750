"""What can be computed of claims without any run: sizes, the work of explaining, axioms, the paper's own lists."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch.fx.experimental.optimization import fuse

from kdig_utils.analysis import claims
from kdig_utils.method import models
from kdig_utils.method.artifacts import model_for
from kdig_utils.method.integrated_gradients import integrated_gradients
from kdig_utils.method.spec import RunSpec


@cache
def _size(method: str, k: int) -> tuple[int, int]:
    model = model_for(method, k)
    return models.count_parameters(model), models.count_macs(model)


def explaining_over_training(_method: str, k: int) -> float:
    """Work to explain each training image once, over the work to train one student, in multiply-accumulates.

    A step of Integrated Gradients passes forward and back to the image; a step of training also to the weights.
    """
    epochs = claims.lookup("training.epochs")
    return RunSpec.n_steps * 2 * _size("teacher", 0)[1] / (epochs * 3 * _size("student", k)[1])


@cache
def sensitivity(_method: str, k: int) -> float:
    """Per cent of trials in which sensitivity holds (arXiv 1703.01365, section 2): a student with random weights.

    Image and baseline differ in one value. Where the answer differs, that value gets attribution; all others get none.
    """
    student, image = _random_student(k)
    trials = []
    for place in range(0, image.numel(), image.numel() // 8):
        baseline = image.clone()
        baseline.view(-1)[place] = 1 - baseline.view(-1)[place]
        found = integrated_gradients(student, image, baseline, torch.tensor([0]), n_steps=8).view(-1)
        changed = bool(student(image)[0, 0] != student(baseline)[0, 0])
        elsewhere = torch.cat([found[:place], found[place + 1 :]])
        trials.append(bool((found[place] != 0) == changed and not elsewhere.any()))
    return 100 * float(np.mean(trials))


@cache
def implementation_invariance(_method: str, k: int) -> float:
    """Largest difference of two attributions of one function, relative to the largest attribution, in float64.

    The function is a student with random weights; once with its batch normalisation, once with it in the convolutions.
    """
    student, image = _random_student(k)
    one, other = (
        integrated_gradients(network, image, torch.zeros_like(image), torch.tensor([0]), n_steps=16)
        for network in (student, fuse(student))
    )
    return float((one - other).abs().max() / one.abs().max())


def _random_student(k: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A student in float64 whose batch normalisation does something, and an image; the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        student = models.student(k)
        student(torch.rand(16, 3, 32, 32))  # moves the running statistics
        return student.double().eval().requires_grad_(False), torch.rand(1, 3, 32, 32, dtype=torch.float64)


# What can be computed without runs, from (method, k). The last four hold a sentence of the paper against its own list.
COMPUTED: dict[str, Callable[[str, int], float]] = {
    "parameters": lambda method, k: float(_size(method, k)[0]),
    "million_macs": lambda method, k: _size(method, k)[1] / 1e6,
    "compression_factor": lambda method, k: _size("teacher", 0)[0] / _size(method, k)[0],
    "explaining_over_training": explaining_over_training,
    "sensitivity": sensitivity,
    "implementation_invariance": implementation_invariance,
    "least_factor": lambda _method, _k: min(claims.lookup("literature_on_cifar10.factors")),
    "largest_factor": lambda _method, _k: max(claims.lookup("literature_on_cifar10.factors")),
    "least_change": lambda _method, _k: min(claims.lookup("literature_on_cifar10.accuracy_changes")),
    "largest_change": lambda _method, _k: max(claims.lookup("literature_on_cifar10.accuracy_changes")),
}
