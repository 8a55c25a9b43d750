"""Integrated Gradients held to its axioms (arXiv 1703.01365, sections 2 to 4), to closed forms and to Captum."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils.method import cifar10, models
from kdig_utils.method.integrated_gradients import (
    BASELINES,
    QUADRATURES,
    attribution_map,
    baseline,
    integrated_gradients,
    quadrature,
)

CASES = 50
EXACT_DEGREE = {  # with n steps
    "gausslegendre": lambda n: 2 * n - 1,
    "riemann_left": lambda n: 0,
    "riemann_right": lambda n: 0,
    "riemann_middle": lambda n: 1,
    "riemann_trapezoid": lambda n: 1,
}


def output(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A model with one output, from a function of the features, (N, d) to (N,)."""
    return lambda inputs: function(inputs).unsqueeze(1)


def points(seed: int, d: int = 3, n: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and baselines, (n, d) each, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def weighted_sum(a: float, f: Callable[[Tensor], Tensor], b: float, g: Callable[[Tensor], Tensor]) -> Callable:
    return lambda x: a * f(x) + b * g(x)


class Swap(nn.Module):
    """Exchanges the first two of three features."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, [1, 0, 2]]


def smooth_network(seed: int, d: int = 3, classes: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, classes)).double()


def real_network(seed: int = 0) -> models.Student:
    """The paper's student with random weights and random batch-norm statistics, float64."""
    network = models.student(5, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values, low in ((layer.running_mean, -0.2), (layer.running_var, 0.5), (layer.weight.data, 0.8)):
                values.copy_(low + torch.rand(values.shape, generator=generator))
    return network.double().eval()


# The quadratures


@pytest.mark.parametrize("n_steps", [2, 3, 5, 10])
@pytest.mark.parametrize("method", QUADRATURES)
def test_rule_is_exact_up_to_its_degree_and_no_further(method: str, n_steps: int) -> None:
    alphas, weights = quadrature(method, n_steps)
    degree = EXACT_DEGREE[method](n_steps)
    for power in range(degree + 1):
        assert float((weights * alphas**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-13)
    assert abs(float((weights * alphas ** (degree + 1)).sum()) - 1 / (degree + 2)) > 1e-13


@pytest.mark.parametrize("method", QUADRATURES)
def test_points_lie_on_the_path_and_weights_sum_to_one(method: str) -> None:
    alphas, weights = quadrature(method, 50)
    assert alphas.shape == weights.shape == (50,)
    assert alphas.dtype == weights.dtype == torch.float64
    assert float(alphas.min()) >= 0
    assert float(alphas.max()) <= 1
    assert bool((weights > 0).all())
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("method", "order"), [("riemann_left", 1), ("riemann_right", 1), ("riemann_middle", 2), ("riemann_trapezoid", 2)]
)
def test_error_falls_with_the_rules_order(method: str, order: int) -> None:
    def error(n_steps: int) -> float:
        alphas, weights = quadrature(method, n_steps)
        return abs(float((weights * alphas.exp()).sum()) - (np.e - 1))

    assert np.log2(error(64) / error(128)) == pytest.approx(order, abs=0.1)


# Closed forms


def test_product_by_hand() -> None:
    """F = x₁ x₂² from the origin: the integrals are x₁x₂²/3 and 2x₁x₂²/3."""
    inputs = points(0, d=2)[0]
    found = integrated_gradients(output(lambda x: x[:, 0] * x[:, 1] ** 2), inputs, n_steps=2)
    value = inputs[:, 0] * inputs[:, 1] ** 2
    assert torch.allclose(found, torch.stack([value / 3, 2 * value / 3], 1), rtol=1e-12)


def test_exponential_by_hand() -> None:
    """F = exp(w·x): each feature gets its share of the exponent's rise, times the rise of F."""
    for seed in range(CASES):
        inputs, baselines = points(seed)
        w = points(seed + 1000)[0][0]
        share = (inputs - baselines) * w / ((inputs - baselines) @ w).unsqueeze(1)
        expected = share * ((inputs @ w).exp() - (baselines @ w).exp()).unsqueeze(1)
        found = integrated_gradients(output(lambda x, w=w: (x @ w).exp()), inputs, baselines, n_steps=40)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    print(f"{CASES} random directions of 4 points, seeds 0 to {CASES - 1}")


def test_linear_model_gets_weight_times_difference_with_one_step() -> None:
    inputs, baselines = points(1)
    w = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    for method in ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle"):
        found = integrated_gradients(output(lambda x: x @ w + 7), inputs, baselines, n_steps=1, method=method)
        assert torch.allclose(found, w * (inputs - baselines), rtol=1e-12)


# The axioms


def test_completeness_on_random_networks() -> None:
    for seed in range(CASES):
        network, (inputs, baselines) = smooth_network(seed), points(seed)
        found = integrated_gradients(network, inputs, baselines, target=1, n_steps=60)
        rise = (network(inputs) - network(baselines))[:, 1].detach()
        assert torch.allclose(found.sum(1), rise, atol=1e-9)
    print(f"{CASES} random networks, 4 points each, seeds 0 to {CASES - 1}")


@pytest.mark.parametrize("method", QUADRATURES)
def test_completeness_error_vanishes_with_the_steps(method: str) -> None:
    network, (inputs, baselines) = smooth_network(0), points(0)
    rise, errors = (network(inputs) - network(baselines))[:, 0].detach(), []
    for n_steps in (4, 16, 64, 256):
        found = integrated_gradients(network, inputs, baselines, 0, n_steps, method)
        errors.append(float((found.sum(1) - rise).abs().max()))
    assert errors[-1] < 0.05 * errors[0]
    assert errors[-1] < 0.02


def test_sensitivity_where_the_gradient_is_blind() -> None:
    """F = 1 - relu(1 - x) is flat at x = 2, so its gradient is 0; yet F rises by 1 from 0 to x (section 2.1)."""
    model = output(lambda x: 1 - torch.relu(1 - x[:, 0]))
    inputs = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(model(inputs.requires_grad_()).sum(), inputs)
    found = integrated_gradients(model, inputs.detach(), n_steps=1000)
    assert float(gradient[0, 0]) == 0
    assert float(found[0, 0]) == pytest.approx(1, abs=1e-3)


def test_a_feature_that_alone_differs_and_matters_gets_all_of_the_rise() -> None:
    for seed in range(CASES):
        network, (inputs, other) = smooth_network(seed), points(seed)
        baselines = inputs.clone()
        baselines[:, 1] = other[:, 1]
        rise = (network(inputs) - network(baselines))[:, 0].detach()
        found = integrated_gradients(network, inputs, baselines, n_steps=60)
        assert torch.allclose(found[:, 1], rise, atol=1e-9)
        assert bool((found[:, [0, 2]] == 0).all())
    print(f"{CASES} random networks, 4 points each, seeds 0 to {CASES - 1}")


def test_dummy_feature_gets_nothing() -> None:
    network, (inputs, baselines) = smooth_network(1, d=2), points(1, d=3)
    found = integrated_gradients(lambda x: network(x[:, :2]) + 0 * x[:, 2:], inputs, baselines)
    assert torch.equal(found[:, 2], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (
            lambda x: x[:, 0] + x[:, 1] * x[:, 2],
            lambda x: torch.relu(x[:, 0]) - torch.relu(-x[:, 0]) + x[:, 2] * x[:, 1],
        ),
        (lambda x: (x[:, 0] - x[:, 1]) ** 2, lambda x: x[:, 0] ** 2 - 2 * x[:, 0] * x[:, 1] + x[:, 1] ** 2),
        (lambda x: torch.sigmoid(x.sum(1)), lambda x: 0.5 * (1 + torch.tanh(x.sum(1) / 2))),
        (lambda x: torch.log(x[:, 0].exp() + x[:, 1].exp()), lambda x: torch.logsumexp(x[:, :2], 1)),
    ],
    ids=["relu", "square", "sigmoid", "logsumexp"],
)
def test_implementation_invariance_on_formulas(one: Callable, same: Callable) -> None:
    inputs, baselines = points(2)
    first, second = (integrated_gradients(output(f), inputs, baselines) for f in (one, same))
    assert torch.allclose(first, second, atol=1e-10)


def test_implementation_invariance_when_batch_norm_is_folded() -> None:
    """What the teacher's signals rest on: folding batch norm into the convolutions changes nothing."""
    network = real_network()
    images = cifar10.load_sample("test").images(slice(0, 2)).double()
    first, second = (integrated_gradients(f, images, 0.5, 3, n_steps=4) for f in (network, fuse(network)))
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-9 * float(first.abs().max()))


def test_linearity() -> None:
    for seed in range(CASES):
        f, g, (inputs, baselines) = smooth_network(seed), smooth_network(seed + 1000), points(seed)
        a, b = np.random.default_rng(seed).normal(size=2)
        both = weighted_sum(a, f, b, g)
        of_f, of_g, of_sum = (integrated_gradients(h, inputs, baselines, 0, 7) for h in (f, g, both))
        assert torch.allclose(of_sum, a * of_f + b * of_g, atol=1e-11)
    print(f"{CASES} random pairs of networks, seeds 0 to {CASES - 1}")


def test_symmetric_features_with_equal_values_get_the_same() -> None:
    for seed in range(CASES):
        network, (inputs, baselines) = smooth_network(seed), points(seed)
        inputs[:, 1], baselines[:, 1] = inputs[:, 0], baselines[:, 0]
        swapped = nn.Sequential(Swap(), network)
        found = integrated_gradients(weighted_sum(1, network, 1, swapped), inputs, baselines, 0, 9)
        assert torch.allclose(found[:, 0], found[:, 1], atol=1e-11)
    print(f"{CASES} random symmetric functions, seeds 0 to {CASES - 1}")


def test_swapping_input_and_baseline_turns_the_sign() -> None:
    network, (inputs, baselines) = smooth_network(3), points(3)
    forth, back = integrated_gradients(network, inputs, baselines), integrated_gradients(network, baselines, inputs)
    assert torch.allclose(forth, -back, atol=1e-12)


# Captum


@pytest.mark.parametrize("method", QUADRATURES)
def test_equals_captum_on_the_real_architecture(method: str) -> None:
    network, sample, n_steps = real_network(), cifar10.load_sample("test"), 5
    images, target = sample.images(slice(0, 2)).double(), sample.labels[:2]
    baselines = baseline("mean_colour", images).double()
    captum = IntegratedGradients(network).attribute(
        images, baselines, target, n_steps=n_steps, method=method, internal_batch_size=20
    )
    found = integrated_gradients(network, images, baselines, target, n_steps, method)
    if method == "riemann_trapezoid":
        # Captum divides n points by n, so that its weights sum to (n - 1) / n; here they sum to one.
        found = found * (n_steps - 1) / n_steps
    assert relative_difference(found, captum) < 1e-5


@pytest.mark.parametrize("name", BASELINES)
def test_equals_captum_from_every_baseline(name: str) -> None:
    network, sample = real_network(1), cifar10.load_sample("test")
    images, target = sample.images(slice(2, 4)).double(), sample.labels[2:4]
    baselines = baseline(name, images).double()
    captum = IntegratedGradients(network).attribute(images, baselines, target, n_steps=6)
    assert relative_difference(integrated_gradients(network, images, baselines, target, 6), captum) < 1e-5


def test_equals_captum_in_single_precision() -> None:
    network, sample = real_network(2).float(), cifar10.load_sample("test")
    images, target = sample.images(slice(0, 2)), sample.labels[:2]
    captum = IntegratedGradients(network).attribute(images, 0.5, target, n_steps=20)
    assert relative_difference(integrated_gradients(network, images, 0.5, target, 20), captum) < 1e-3


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Memory and side effects


def test_forward_never_sees_more_than_the_internal_batch_size() -> None:
    network, (inputs, baselines) = smooth_network(0), points(0, n=7)
    sizes = []

    def counting(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return network(x)

    reference = integrated_gradients(network, inputs, baselines, 0, 13, internal_batch_size=1000)
    for limit in (1, 5, 13, 64, 90, 91, 1000):
        sizes.clear()
        found = integrated_gradients(counting, inputs, baselines, 0, 13, internal_batch_size=limit)
        assert max(sizes) <= limit
        assert sum(sizes) == 7 * 13
        assert torch.allclose(found, reference, rtol=1e-12, atol=1e-14)


def test_memory_is_bounded_by_default() -> None:
    sizes = []

    def counting(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.sum(1, keepdim=True)

    integrated_gradients(counting, torch.ones(100, 2))
    assert max(sizes) <= 64
    assert sum(sizes) == 5000


def test_model_and_inputs_stay_as_they_were() -> None:
    network, (inputs, baselines) = smooth_network(0), points(0)
    before = inputs.clone()
    with torch.no_grad():  # as in the teacher's signals
        integrated_gradients(network, inputs, baselines)
    assert torch.equal(inputs, before)
    assert not inputs.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_each_input_has_its_own_target() -> None:
    network, (inputs, baselines) = smooth_network(4, classes=3), points(4, n=3)
    together = integrated_gradients(network, inputs, baselines, torch.tensor([2, 0, 1]))
    alone = [integrated_gradients(network, inputs[i : i + 1], baselines[i : i + 1], t) for i, t in enumerate((2, 0, 1))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


def test_map_is_the_papers() -> None:
    attributions = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    assert torch.equal(attribution_map(attributions), torch.full((2, 32, 32), 6.0))


# Baselines


def test_the_papers_baseline_is_zero_after_normalisation_and_not_black() -> None:
    images = cifar10.load_sample("test").images(slice(0, 2))
    mean_colour, black = baseline("mean_colour", images), baseline("black", images)
    assert torch.equal(models.teacher().normalise(mean_colour), torch.zeros_like(images))
    assert torch.equal(black, torch.zeros_like(images))
    assert float(models.teacher().normalise(black).abs().min()) > 1


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_is_an_image(name: str) -> None:
    images = cifar10.load_sample("test").images(slice(0, 3))
    values = baseline(name, images)
    assert values.shape == images.shape
    assert float(values.min()) >= 0
    assert float(values.max()) <= 1
    assert torch.equal(values, baseline(name, images))


def test_blurring_keeps_a_plain_image_and_smooths_a_busy_one() -> None:
    images = cifar10.load_sample("test").images(slice(0, 3))
    assert torch.allclose(baseline("blurred", torch.full_like(images, 0.3)), torch.full_like(images, 0.3), atol=1e-6)
    assert bool((baseline("blurred", images).std((1, 2, 3)) < images.std((1, 2, 3))).all())


# Bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_counted(bad: float) -> None:
    inputs = torch.zeros(3, 2)
    inputs[1, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 inputs hold NaN or infinity"):
        integrated_gradients(lambda x: x, inputs)


def test_baselines_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        integrated_gradients(lambda x: x, torch.zeros(3, 2), float("nan"))


def test_unknown_method_and_baseline_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'simpson'.*gausslegendre, riemann_left"):
        integrated_gradients(lambda x: x, torch.zeros(1, 2), method="simpson")
    with pytest.raises(ValueError, match=r"'grey'.*black, mean_colour"):
        baseline("grey", torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("target", [2, -1, torch.tensor([0, 5])])
def test_target_outside_the_classes_is_named(target: Tensor | int) -> None:
    with pytest.raises(ValueError, match="outside the 2 outputs"):
        integrated_gradients(lambda x: x, torch.zeros(2, 2), target=target)


@pytest.mark.parametrize(("n_steps", "method"), [(0, "gausslegendre"), (-1, "riemann_left"), (1, "riemann_trapezoid")])
def test_too_few_steps_are_named(n_steps: int, method: str) -> None:
    with pytest.raises(ValueError, match=rf"n_steps = {n_steps} is (no whole number|too few for {method}).*(give|use)"):
        integrated_gradients(lambda x: x, torch.zeros(1, 2), n_steps=n_steps, method=method)
