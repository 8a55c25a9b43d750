"""What alpha and T do to a gradient: the teacher's answers beside the labels, with respect to all parameters."""

import copy
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.experiments.hyperparameters import LEVELS
from kdig_utils.method import losses


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
