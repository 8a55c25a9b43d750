"""The losses against torch, by hand, and in the limits that the sources state."""

import math

import pytest
import torch

from kdig_utils.method.losses import attention_loss, attention_map, distillation_loss

CASES = 100


def logits(seed: int, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, 10, generator=generator, dtype=torch.float64) for _ in range(2))


def test_distillation_loss_is_t_squared_times_kl_of_teacher_to_student() -> None:
    for seed in range(CASES):
        student, teacher = logits(seed)
        temperature = 0.5 + seed / 10
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        by_hand = temperature**2 * (p * (p.log() - q.log())).sum() / len(p)
        assert torch.allclose(distillation_loss(student, teacher, temperature), by_hand, rtol=1e-10)
    print(f"{CASES} random batches, seeds 0 to {CASES - 1}")


def test_distillation_loss_equals_torch_distributions() -> None:
    student, teacher = logits(0)
    p, q = (torch.distributions.Categorical(logits=values / 2.5) for values in (teacher, student))
    expected = 2.5**2 * torch.distributions.kl_divergence(p, q).mean()
    assert torch.allclose(distillation_loss(student, teacher, 2.5), expected, rtol=1e-10)


def test_the_teacher_comes_first_in_the_divergence() -> None:
    # p = (0.9, 0.1), q = (0.5, 0.5): KL(p ‖ q) = 0.9 ln 1.8 + 0.1 ln 0.2 = 0.368, and KL(q ‖ p) = 0.511.
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(distillation_loss(student, teacher, 1.0)) == pytest.approx(forward, rel=1e-5)
    assert float(distillation_loss(teacher, student, 1.0)) == pytest.approx(backward, rel=1e-5)
    assert abs(forward - backward) > 0.1


def test_distillation_loss_is_zero_exactly_for_equal_answers() -> None:
    student, teacher = logits(1)
    assert float(distillation_loss(teacher, teacher, 2.5)) == pytest.approx(0, abs=1e-15)
    assert float(distillation_loss(teacher + 7, teacher, 2.5)) == pytest.approx(
        0, abs=1e-12
    )  # softmax forgets a constant
    assert float(distillation_loss(student, teacher, 2.5)) > 0


def test_gradient_is_the_difference_of_the_soft_answers() -> None:
    """d/dz T² KL = T (q - p) / batch, which is why T² is there (arXiv 1503.02531, equation 2)."""
    student, teacher = logits(2)
    for temperature in (1.0, 2.5, 20.0):
        student = student.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        expected = (
            temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / len(student)
        )
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-14)


def test_hot_limit_is_the_difference_of_the_logits() -> None:
    """For zero-mean logits and T → ∞ the gradient is (z_student - z_teacher) / classes (arXiv 1503.02531, 2.1)."""
    student, teacher = (values - values.mean(1, keepdim=True) for values in logits(3))
    limit = (student - teacher) / 10 / len(student)
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        student = student.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        errors.append(float((gradient - limit).abs().max() / limit.abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # the error falls as 1 / T
    assert errors[2] < 5e-3


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_temperature_not_above_zero_is_refused(temperature: float) -> None:
    student, teacher = logits(0)
    with pytest.raises(ValueError, match=f"temperature = {temperature} "):
        distillation_loss(student, teacher, temperature)


def test_attention_map_is_the_mean_squared_activation_of_unit_length() -> None:
    features = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = attention_map(features)
    assert maps.shape == (5, 16)
    assert torch.allclose(maps.norm(dim=1), torch.ones(5))
    by_hand = torch.stack([(image**2).mean(0).flatten() for image in features])
    assert torch.allclose(maps, by_hand / by_hand.norm(dim=1, keepdim=True), atol=1e-7)


def test_attention_does_not_see_scale_sign_or_order_of_channels() -> None:
    features = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(1))
    maps = attention_map(features)
    for same in (3 * features, -features, features.flip(1)):
        assert torch.allclose(attention_map(same), maps, atol=1e-6)
    assert not torch.allclose(attention_map(features.flip(2)), maps, atol=1e-2)


def test_silent_features_give_no_nan() -> None:
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 16))


def test_attention_loss_is_the_mean_squared_difference() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(5, channels, 4, 4, generator=generator) for channels in (7, 9))
    expected = ((attention_map(student) - attention_map(teacher)) ** 2).mean()
    assert torch.allclose(attention_loss(student, attention_map(teacher)), expected)
    assert float(attention_loss(student, attention_map(student))) == 0
    # Two unit vectors without negative entries are at most √2 apart: the loss is at most 2 / (H·W).
    assert float(attention_loss(student, attention_map(teacher))) <= 2 / 16
