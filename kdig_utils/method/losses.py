r"""The losses of the eight methods (paper, section 3; Hinton et al., arXiv 1503.02531; arXiv 1612.03928).

.. math:: L = \alpha T^2 \, \mathrm{KL}(p^T_\text{teacher} \,\|\, p^T_\text{student})
              + (1 - \alpha) \, \mathrm{CE}(y, p_\text{student}) + \gamma \, L_\text{AT}
"""

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
        ValueError: temperature ≤ 0.
    """
    check_number("temperature", temperature)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def attention_map(features: Tensor) -> Tensor:
    """Mean over channels of the squares, flattened, of length one: (N, C, H, W) to (N, H·W) (arXiv 1612.03928)."""
    return F.normalize(features.pow(2).mean(1).flatten(1), dim=1)


def attention_loss(student_features: Tensor, teacher_attention: Tensor) -> Tensor:
    """Mean squared difference between the student's attention map and the teacher's, (N, H·W)."""
    return F.mse_loss(attention_map(student_features), teacher_attention)
