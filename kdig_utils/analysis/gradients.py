"""What alpha and T do to a gradient: the teacher's answers beside the labels, with respect to all parameters."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
