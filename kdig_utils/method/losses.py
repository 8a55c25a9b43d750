r"""The terms of the loss (paper, section 3; Hinton et al., arXiv 1503.02531; arXiv 1612.03928).

`training.student_loss` adds them up for a batch, each method with the terms of its parts:

.. math:: L = \alpha T^2 \, \mathrm{KL}(p^T_\text{teacher} \,\|\, p^T_\text{student})
              + (1 - \alpha) \, \mathrm{CE}(y, p_\text{student}) + \gamma \, L_\text{AT}
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from kdig_utils.method.checks import check_number


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at this temperature, mean over the batch (arXiv 1503.02531, section 2).

    The factor T² keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes).
        temperature: above 0.

    Raises:
        ValueError: temperature ≤ 0, or logits of two shapes.
    """
    check_number("temperature", temperature)
    check_shapes("logits", student_logits, teacher_logits)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def attention_map(features: Tensor) -> Tensor:
    """Mean over channels of the squares, flattened, of length one: (N, C, H, W) to (N, H·W) (arXiv 1612.03928)."""
    return F.normalize(features.pow(2).mean(1).flatten(1), dim=1)


def attention_loss(student_features: Tensor, teacher_attention: Tensor) -> Tensor:
    """Mean squared difference between the student's attention map and the teacher's, (N, H·W)."""
    own = attention_map(student_features)
    check_shapes("attention", own, teacher_attention)
    return F.mse_loss(own, teacher_attention)


def check_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both have the same shape: torch would repeat the smaller one without a word."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of the student have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: compare "
            "the same images, classes and places"
        )


class Seen(NamedTuple):
    """What a term of the loss sees of a batch."""

    logits: Tensor  # of the student, (N, classes)
    features: Tensor  # of the student at the block that attention transfer compares, (N, C, H, W)
    answers: Tensor  # the teacher's logits, (N, classes); empty where no teacher is asked
    attention: Tensor  # the teacher's attention maps, (N, H·W); empty where no teacher is asked


class Weights(Protocol):
    """What the terms read of a run's spec."""

    @property
    def alpha(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def gamma(self) -> float: ...


def distillation(seen: Seen, spec: Weights) -> Tensor:
    return spec.alpha * distillation_loss(seen.logits, seen.answers, spec.temperature)


def attention_transfer(seen: Seen, spec: Weights) -> Tensor:
    return spec.gamma * attention_loss(seen.features, seen.attention)


class Part(NamedTuple):
    """A part of a method."""

    # The fields of a run's spec that mean something only to methods with it: `pairing`, if it asks for the teacher.
    reads: tuple[str, ...]
    term: Callable[[Seen, Weights], Tensor] | None = None  # of the loss; None for a part that changes the images


# By the name that a method has it under, in the order in which they are named: `kd_ig`, not `ig_kd`.
PARTS = {
    "kd": Part(("alpha", "temperature", "answers", "pairing"), distillation),
    "ig": Part(("overlay_probability", "n_steps", "pairing")),
    "at": Part(("gamma", "pairing"), attention_transfer),
}
