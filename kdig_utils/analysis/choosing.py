"""What choosing on the test images may cost, by simulation, and what alpha and T do to a gradient."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.analysis.sample_size import best_of_normal
from kdig_utils.experiments.hyperparameters import LEVELS, VALIDATION_IMAGES
from kdig_utils.method import losses

REPEATS = 2000
TEST_IMAGES = 10_000


class Noise(NamedTuple):
    """What makes the accuracy of a run differ from that of its setting: standard deviations, in points.

    Attributes:
        seed: of the accuracy that each network would have on endless images.
        test: of its luck on these test images, beyond the luck that all networks share.
        validation: the same on the validation images.
    """

    seed: float
    test: float
    validation: float


def noise_of_runs(deviation: float, accuracy: float, correlation: float) -> Noise:
    """Split the spread of runs on the 10,000 test images into better networks and luck on these images.

    A network is right on each image or not, which gives a binomial variance of accuracy · (1 - accuracy) / images.
    What networks have in common, the hard images, moves all of them together and is no part of the spread.

    Args:
        deviation: of the test accuracy from seed to seed, in points.
        accuracy: in per cent.
        correlation: of two networks' being right, over the images, in [0, 1].

    Raises:
        ValueError: a value outside its range.
    """
    if not (deviation > 0 and 0 < accuracy < 100 and 0 <= correlation <= 1):
        raise ValueError(
            f"deviation {deviation}, accuracy {accuracy}, correlation {correlation}: give points above 0, per cent "
            "between 0 and 100, and a correlation in [0, 1]"
        )
    own = (1 - correlation) * accuracy * (100 - accuracy)
    test, validation = math.sqrt(own / TEST_IMAGES), math.sqrt(own / VALIDATION_IMAGES)
    return Noise(math.sqrt(max(deviation**2 - test**2, 0.0)), test, validation)


def expected_optimism(n: int, noise: Noise) -> dict[str, float]:
    """Reported test accuracy minus that of fresh seeds, in points, for the best of `n` equally good settings.

    Chosen by what it reports, a run owes it all its luck. Chosen by validation, it owes it only the part that is in
    both accuracies, its seed's. By the mean of the highest of n normal values (`sample_size.best_of_normal`).

    Returns:
        By chooser, `test` and `validation`.
    """
    highest, _deviation = best_of_normal(n)
    by_validation = noise.seed**2 / math.hypot(noise.seed, noise.validation)
    return {"test": highest * math.hypot(noise.seed, noise.test), "validation": highest * by_validation}


def simulate_choices(settings: Sequence[float], noise: Noise, repeats: int = REPEATS, seed: int = 0) -> pd.DataFrame:
    """SIMULATED: train one network a setting, choose by test and by validation accuracy, again and again.

    Args:
        settings: true mean accuracy of each, in per cent.

    Returns:
        One row a chooser and repeat: chosen_by, reported (test accuracy of the chosen run), setting (true mean of the
        chosen setting, which fresh seeds would show), lost (best setting's mean minus that, in points).
    """
    means = np.asarray(settings, dtype=float)
    networks, test, validation = np.random.default_rng(seed).standard_normal((3, repeats, len(means)))
    networks = means + noise.seed * networks
    seen = {"test": networks + noise.test * test, "validation": networks + noise.validation * validation}
    tables = []
    for name, accuracies in seen.items():
        best = accuracies.argmax(axis=1)
        reported = seen["test"][np.arange(repeats), best]
        tables.append(pd.DataFrame({"chosen_by": name, "reported": reported, "setting": means[best]}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(lost=means.max() - table["setting"])


def gradient_plane(
    student: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    alphas: Sequence[float] = LEVELS["alpha"],
    temperatures: Sequence[float] = LEVELS["temperature"],
) -> pd.DataFrame:
    """What distillation contributes to one training step at each alpha and temperature, exactly.

    The gradient with respect to the student's parameters is (1 - alpha) g + alpha h_T, with g that of cross-entropy
    and h_T that of T² KL: one backward pass for g and one for each T give the whole plane.

    Args:
        inputs: a batch of crops, (N, 3, 32, 32).
        labels: (N,).
        teacher_logits: (N, classes).

    Returns:
        Columns alpha, temperature; share, of distillation in the sum of the two lengths, per cent; angle between the
        whole gradient and that of cross-entropy alone, degrees, which is what an optimiser such as Adam notices:
        it hardly asks for the length.
    """
    student = copy.deepcopy(student).train()  # the batch norm of training; the caller's statistics stay
    logits = student(inputs)
    hard = parameter_gradient(student, F.cross_entropy(logits, labels))
    rows = []
    for temperature in temperatures:
        soft = parameter_gradient(student, losses.distillation_loss(logits, teacher_logits, temperature))
        for alpha in alphas:
            taught, labelled = alpha * soft, (1 - alpha) * hard
            share = 100 * float(taught.norm() / (taught.norm() + labelled.norm()))
            rows.append((alpha, temperature, share, degrees_between(taught + labelled, hard)))
    return pd.DataFrame(rows, columns=["alpha", "temperature", "share", "angle"])


def label_gradient(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of cross-entropy on a batch with respect to all parameters, with the batch norm of training."""
    student = copy.deepcopy(student).train()
    return parameter_gradient(student, F.cross_entropy(student(inputs), labels))


def parameter_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """Gradient of `loss` with respect to all parameters, one vector in float64; the graph is kept."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def degrees_between(first: Tensor, second: Tensor) -> float:
    """Angle between two vectors, from 0 to 180 degrees."""
    return math.degrees(F.cosine_similarity(first, second, dim=0).clamp(-1, 1).acos())
