"""Integrated Gradients under contract: exact integrals, an error that is the error, and no silent wrong map."""

import copy

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from kdig_utils.method import artifacts, cifar10
from kdig_utils.method.attribution import attribute
from kdig_utils.method.integrated_gradients import baseline, integrated_gradients
from kdig_utils.method.secants import SecantNetwork, compiles, graded_points, secant_attributions
from kdig_utils.method.tracing import NotASecantNetwork


class Formula(nn.Module):
    """A model with one output, from a function of the features, (N, d) to (N,)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs).unsqueeze(1)


def relu_network(seed: int = 0, depth: int = 3, width: int = 16) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(4, width)]
        for _ in range(depth - 1):
            layers += [nn.ReLU(inplace=True), nn.Linear(width, width)]
        return nn.Sequential(*layers, nn.ReLU6(), nn.Linear(width, 3)).double().eval()


def pairs(seed: int = 0, n: int = 5, d: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def distance(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs().flatten(1).sum(1) / expected.abs().flatten(1).sum(1)


@pytest.fixture(scope="module")
def real() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    sample = cifar10.load_sample("train")
    images = sample.images(slice(0, 2))
    return artifacts.load("teacher"), images, baseline("mean_colour", images), sample.labels[:2]


# Known integrals


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[:, 0] ** 3 + 2 * x[:, 1], lambda x: (x[:, 0] ** 3, 2 * x[:, 1])),
        (lambda x: x[:, 0] * x[:, 1], lambda x: (x[:, 0] * x[:, 1] / 2, x[:, 0] * x[:, 1] / 2)),
    ],
    ids=["polynomial", "product"],
)
def test_polynomials_by_hand(function, expected) -> None:
    inputs = pairs(d=2)[0]
    found = attribute(Formula(function), inputs, error=1e-6)
    assert found.rule == "gradient"
    assert bool(found.converged.all())
    assert torch.allclose(found.attributions, torch.stack(expected(inputs), 1), atol=1e-9)


def test_sigmoid_by_hand_also_when_saturated() -> None:
    """F = σ(w·x): each feature gets its share of the exponent's rise, times the rise of F, however steep."""
    inputs, baselines = pairs(1)
    for steepness in (1, 100):
        layer = nn.Linear(4, 1, bias=False).double()
        layer.weight.data = steepness * torch.tensor([[1.0, -2.0, 0.5, 1.5]], dtype=torch.float64)
        model, w = nn.Sequential(layer, nn.Sigmoid()).eval(), layer.weight[0].detach()
        rise = (model(inputs) - model(baselines)).detach()
        expected = (inputs - baselines) * w / ((inputs - baselines) @ w).unsqueeze(1) * rise
        found = attribute(model, inputs, baselines, error=0.001)
        assert found.rule == "secant"
        assert torch.allclose(found.attributions, expected, atol=1e-6)


def test_one_hidden_layer_of_relus_is_exact_with_one_interval() -> None:
    """One layer of kinks is integrated exactly: the secant is the mean of the derivative along a straight line."""
    network, (inputs, baselines) = relu_network(depth=1), pairs(2)
    found = secant_attributions(SecantNetwork(network), inputs, baselines, torch.zeros(5, dtype=torch.long), 1)
    expected = integrated_gradients(network, inputs, baselines, 0, 20_000, "riemann_middle", 4096)
    assert torch.allclose(found, expected, atol=1e-3)


def test_units_that_stand_still_pass_the_gradient_on() -> None:
    """ReLU(x₁ - x₂ + 1) with both moving alike: a secant would be 0 / 0, the answer is (d, -d)."""
    layer = nn.Linear(2, 1).double()
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, -1.0]]).double(), torch.ones(1).double()
    for activation in (nn.ReLU(), nn.SiLU()):
        model = nn.Sequential(layer, activation).eval()
        found = attribute(model, torch.full((1, 2), 3.0, dtype=torch.float64)).attributions[0]
        slope = 1.0 if isinstance(activation, nn.ReLU) else 0.9276705118714869
        assert found.tolist() == pytest.approx([3 * slope, -3 * slope])


# The rule


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_secants_are_complete_with_any_number_of_steps(steps: int) -> None:
    network, (inputs, baselines) = relu_network(), pairs(3)
    targets = torch.tensor([0, 1, 2, 0, 1])
    found = secant_attributions(SecantNetwork(network), inputs, baselines, targets, steps)
    ends = [network(x).gather(1, targets[:, None])[:, 0].detach() for x in (inputs, baselines)]
    assert torch.allclose(found.sum(1), ends[0] - ends[1], atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1)])
def test_secants_converge_to_a_fine_reference(activation: nn.Module) -> None:
    network, (inputs, baselines) = relu_network(1), pairs(4)
    network[1] = activation
    found = attribute(network, inputs, baselines, 0, 0.002)
    expected = integrated_gradients(network, inputs, baselines, 0, 4000, "riemann_middle", 4096)
    assert found.rule == "secant"
    assert float(distance(found.attributions, expected).max()) < 0.004


def test_streaming_along_the_path_changes_nothing() -> None:
    network, (inputs, baselines) = SecantNetwork(relu_network()), pairs(5)
    targets = torch.zeros(5, dtype=torch.long)
    whole = secant_attributions(network, inputs, baselines, targets, 12, internal_batch_size=1000)
    for size in (1, 5, 12, 25):
        assert torch.allclose(secant_attributions(network, inputs, baselines, targets, 12, size), whole, atol=1e-12)


def test_points_grow_towards_the_input() -> None:
    points = graded_points(14)
    assert points[0] == 0
    assert points[-1] == 1
    assert bool((points.diff().diff() > 0).all())


def test_memory_does_not_grow_with_images_or_steps() -> None:
    network, rows = SecantNetwork(relu_network()), []
    advance = network.advance
    network.advance = lambda entrance, left, images: rows.append(len(entrance)) or advance(entrance, left, images)
    inputs, _ = pairs(6, n=40)
    secant_attributions(
        network, inputs, torch.zeros(1, 4), torch.zeros(40, dtype=torch.long), 50, internal_batch_size=32
    )
    assert max(rows) <= 32
    assert sum(rows) == 40 * 50 + 1  # the baseline, once for all


# The contract


@pytest.mark.parametrize("error", [0.1, 0.02])
def test_asked_for_error_is_reached_and_true(error: float) -> None:
    network, (inputs, baselines) = relu_network(2, depth=5), pairs(7, n=12)
    found = attribute(network, inputs, baselines, 1, error)
    expected = integrated_gradients(network, inputs, baselines, 1, 20_000, "riemann_middle", 4096)
    assert bool(found.converged.all())
    assert bool((found.error <= error).all())
    assert bool((distance(found.attributions, expected) <= 2 * error).all())
    assert float(distance(found.attributions, expected).median()) <= error


def test_what_was_not_reached_is_marked() -> None:
    network, (inputs, baselines) = relu_network(2, depth=5), pairs(7, n=12)
    found = attribute(network, inputs, baselines, 1, 1e-4, max_steps=8)
    assert not bool(found.converged.all())
    assert bool((found.evaluations == 12).all())


def test_output_that_hardly_changes_has_a_finite_error() -> None:
    """F = relu(x₁) - relu(x₂) with x₁ = x₂: the rise is 0, the attributions are not."""
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, -1.0]]).double()
    found = attribute(nn.Sequential(nn.ReLU(), layer).eval(), torch.ones(1, 2, dtype=torch.float64))
    assert found.attributions.tolist() == [[1.0, -1.0]]
    assert bool(found.converged.all())
    nothing = attribute(relu_network(), torch.ones(1, 4, dtype=torch.float64), 1.0)
    assert bool(nothing.converged.all())
    assert torch.equal(nothing.attributions, torch.zeros(1, 4, dtype=torch.float64))


def test_each_input_as_if_it_were_alone() -> None:
    network, (inputs, baselines) = relu_network(3), pairs(8)
    targets = torch.tensor([0, 1, 2, 1, 0])
    together = attribute(network, inputs, baselines, targets)
    for i in range(5):
        alone = attribute(network, inputs[i : i + 1], baselines[i : i + 1], targets[i : i + 1])
        assert torch.allclose(alone.attributions[0], together.attributions[i], atol=1e-10)
        assert int(alone.evaluations) == int(together.evaluations[i])


def test_real_teacher_against_captum_at_300_steps(real) -> None:
    teacher, images, baselines, labels = (part[-1:] if isinstance(part, Tensor) else part for part in real)
    found = attribute(teacher, images, baselines, labels, error=0.02)
    captum = IntegratedGradients(teacher).attribute(images, baselines, labels, n_steps=300, internal_batch_size=32)
    assert found.rule == "secant"
    assert bool(found.converged.all())
    assert float(distance(found.attributions, captum).max()) < 0.03
    assert float(found.completeness.max()) < 0.01


@pytest.mark.slow
def test_real_teacher_against_double_precision(real) -> None:
    """The gradients of the reference are in float64: neither its sums nor a flipped ReLU6 owe anything to rounding."""
    teacher, images, baselines, labels = real
    image, start, label = images[:1], baselines[:1], labels[:1]
    found = attribute(teacher, image, start, label, error=0.05)
    precise = copy.deepcopy(teacher).double()
    reference = integrated_gradients(precise, image.double(), start.double(), label, 96, "riemann_middle", 32)
    assert bool(found.converged.all())
    assert float(distance(found.attributions, reference)) < 0.05 + 0.02  # 96 midpoints are about 0.02 off themselves
    single = integrated_gradients(teacher, image, start, label, 96, "riemann_middle", 32)
    assert float(distance(single, reference)) < 1e-3


# The engines


@pytest.mark.parametrize("half", [False, True])
def test_compiled_kernels_give_the_same_numbers(real, half: bool) -> None:
    """Fused elementwise work is the same arithmetic: equal to within a few units of the last place."""
    if not compiles():
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    teacher, images, baselines, labels = real
    plain, fused = (
        secant_attributions(SecantNetwork(teacher, half, compiled), images, baselines[:1], labels, 6)
        for compiled in (False, True)
    )
    assert float(distance(fused, plain).max()) < 1e-5
    asked = [attribute(teacher, images, baselines, labels, 0.3, compiled=compiled) for compiled in (False, True)]
    assert torch.equal(asked[0].evaluations, asked[1].evaluations)
    assert float(distance(asked[1].attributions, asked[0].attributions).max()) < 0.01


@pytest.mark.parametrize("steps", [2, 6])
def test_bfloat16_backward_costs_less_than_one_per_cent(real, steps: int) -> None:
    teacher, images, baselines, labels = real
    plain, half = (
        secant_attributions(SecantNetwork(teacher, half), images, baselines[:1], labels, steps)
        for half in (False, True)
    )
    apart = distance(half, plain)
    assert float(apart.max()) < 0.01
    assert float(apart.min()) > 1e-5  # it was in use
    with torch.no_grad():
        rise = (teacher(images) - teacher(baselines)).gather(1, labels.unsqueeze(1)).squeeze(1)
    assert bool(((half.flatten(1).sum(1) - rise).abs() < 0.01 * half.abs().flatten(1).sum(1)).all())


def test_compiled_kernels_serve_linear_layers_too() -> None:
    if not compiles():
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    network, (inputs, baselines) = relu_network().float(), (values.float() for values in pairs())
    targets = torch.zeros(5, dtype=torch.long)
    plain, fused = (
        secant_attributions(SecantNetwork(network, compiled=compiled), inputs, baselines, targets, 8)
        for compiled in (False, True)
    )
    assert torch.allclose(plain, fused, atol=1e-5)


# What has no one answer is refused, and what has no secant is integrated by gradients


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_training_mode_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        attribute(nn.Sequential(layer, nn.Linear(4, 2)).double(), pairs()[0])


def test_chance_and_dependence_on_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="two outputs for one input"):
        attribute(Formula(lambda x: x.sum(1) + torch.randn(len(x))), pairs()[0])
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="two outputs for one input"):  # stochastic depth: one row in ten is dropped
        attribute(Formula(lambda x: (x.T * (torch.rand(len(x)) > 0.1)).sum(0)), pairs()[0])
    with pytest.raises(ValueError, match="rest of its batch"):
        attribute(Formula(lambda x: (x - x.mean(0)).pow(2).sum(1)), pairs()[0])


def test_no_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        attribute(relu_network(), torch.zeros(0, 4, dtype=torch.float64))


def test_overwriting_its_input_does_no_harm() -> None:
    inputs = pairs()[0]
    before = inputs.clone()
    found = attribute(Formula(lambda x: x.relu_().sum(1)), inputs)
    assert torch.allclose(found.attributions, before.clamp_min(0))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(
    "layer", [nn.Softmax(1), nn.LayerNorm(4), nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten())]
)
def test_operations_without_a_secant_fall_back_to_gradients(layer: nn.Module) -> None:
    network, (inputs, baselines) = nn.Sequential(layer, nn.LazyLinear(2)).double(), pairs()
    network(inputs)
    found = attribute(network.eval(), inputs, baselines, error=0.05)
    assert found.rule == "gradient"
    expected = integrated_gradients(network, inputs, baselines, 0, 4000, "riemann_middle", 4096)
    assert bool(found.converged.all())
    assert float(distance(found.attributions, expected).max()) < 0.05


def test_value_that_is_overwritten_and_used_again_is_no_secant_network() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = 2 * x
            return nn.functional.relu(z, inplace=True) + z

    with pytest.raises(NotASecantNetwork, match="overwrites"):
        SecantNetwork(Overwrites())
    assert torch.allclose(attribute(Overwrites(), torch.ones(1, 1)).attributions, torch.tensor([[4.0]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error": 0.0}, "error = 0.0"),
        ({"max_steps": 2}, "max_steps = 2"),
        ({"target": 3}, "outside the 3"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(relu_network(), pairs()[0], **settings)


def test_inputs_and_outputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="1 of 1 inputs hold NaN"):
        attribute(relu_network(), torch.full((1, 4), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="output holds NaN"):
        attribute(Formula(lambda x: x.sum(1).log()), -torch.ones(1, 4))


# Any wiring, any padding, logits that stand still


class Wired(nn.Module):
    """Layers wired by a function of the layers and the inputs."""

    def __init__(self, wiring, *layers: nn.Module) -> None:
        super().__init__()
        self.wiring, self.layers = wiring, nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.wiring(self.layers, inputs)


def reads_a_size_late(layers, x: Tensor) -> Tensor:
    h = layers[0](x).relu()
    return layers[1](layers[2](h).relu().view(x.size(0), -1) + h.view(x.shape[0], -1))


def sum_of_two_shapes(layers, x: Tensor) -> Tensor:
    h = layers[0](x).relu()
    return layers[1]((h + h.mean(2, True)).flatten(1))


def three_readers(layers, x: Tensor) -> Tensor:
    h = x.relu()
    return layers[1]((h + layers[2](h).relu() - (h - 0.1).relu()).flatten(1))


WIRINGS = {
    "sizes of used values": reads_a_size_late,
    "joined with itself": lambda layers, x: layers[1](torch.cat([layers[0](x).relu()] * 2, 2).flatten(1)[:, :32]),
    "sum of two shapes": sum_of_two_shapes,
    "batch not first": lambda layers, x: layers[1](layers[0](x.transpose(0, 1)).relu().transpose(0, 1).flatten(1)),
    "three readers": three_readers,
}


MOVES_OF_THE_BATCH = {
    "merged with time": lambda layers, x: layers[1](layers[0](x.reshape(-1, 8)).relu().view(x.size(0), -1)),
    "by keyword": lambda layers, x: layers[1](layers[0](x.permute(dims=(1, 0, 2))).relu().transpose(0, 1).flatten(1)),
    "from the end": lambda layers, x: layers[1](layers[0](x.transpose(-3, -2)).relu().transpose(0, 1).flatten(1)),
    "under a moving value": lambda layers, x: layers[1](layers[0](1 / (6 + x)).relu().flatten(1)),
}


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", MOVES_OF_THE_BATCH)
def test_what_secants_cannot_follow_is_left_to_gradients(name: str, shared: bool, n: int) -> None:
    """Also where the other dimension is as long as the batch."""
    torch.manual_seed(0)
    network = Wired(MOVES_OF_THE_BATCH[name], nn.Linear(8, 8), nn.Linear(32, 2)).double().eval()
    inputs = torch.randn(n, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = attribute(network, inputs, 0.1 if shared else 0.1 * inputs.roll(1, 2), error=0.05)
    assert found.rule == "gradient"
    assert bool(found.converged.all())


class Uncopied(nn.Module):
    """Refuses to be copied."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.relu()

    def __deepcopy__(self, _memo: dict) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")


def test_a_model_that_cannot_be_copied_is_left_to_gradients() -> None:
    assert attribute(Uncopied().eval(), pairs()[0], error=0.1).rule == "gradient"


@pytest.mark.parametrize("name", WIRINGS)
def test_secants_follow_any_wiring(name: str) -> None:
    torch.manual_seed(0)
    network = Wired(WIRINGS[name], nn.Linear(8, 8), nn.Linear(32, 2), nn.Linear(8, 8)).double().eval()
    inputs = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = attribute(network, inputs, 0.1, error=0.005)
    expected = integrated_gradients(network, inputs, 0.1, 0, 4000, "riemann_middle", 4096)
    assert bool(found.converged.all())
    assert float(distance(found.attributions, expected).max()) < 0.01


@pytest.mark.parametrize("apart", [0.0, 1e-5])
def test_logits_that_hardly_move_pass_the_gradient_on(apart: float) -> None:
    """Logits in x₁ - x₂ alone, x₁ = x₂ along the path: the rise is 0 and the answer d·∂F/∂x."""
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[1.0, -1.0], [0.5, -0.5], [-0.2, 0.2]])
    layer.bias.data = torch.tensor([3.0, 1.0, 0.0])
    inputs = torch.tensor([[3.0, 3.0 + apart]])
    found = attribute(nn.Sequential(layer, nn.Softplus()).eval(), inputs)
    assert found.rule == "secant"
    slope = torch.tensor([1.0, -1.0]).double() * torch.tensor(3.0).double().sigmoid()
    assert torch.allclose(found.attributions.double(), slope * inputs, rtol=0.01)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_bfloat16_adjoint_of_a_depthwise_convolution_knows_its_padding(mode: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode=mode), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    inputs, target = torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.long)
    plain, half = (
        secant_attributions(SecantNetwork(network, half), inputs, torch.zeros(1, 3, 6, 6), target, 4)
        for half in (False, True)
    )
    assert float(distance(half, plain).max()) < 0.02


def test_output_that_is_not_finite_at_a_later_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 of 2 outputs hold NaN"):
        attribute(Formula(lambda x: x.sum(1).log()), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), 0.5)
