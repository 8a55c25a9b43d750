r"""Integrated Gradients by secants: a network of affine layers and elementwise nonlinearities, interval by interval.

A gradient sees one point of the path. Between two points, the part of an interval on which a unit passes its signal on
is known from the unit's values at both ends: it is the secant :math:`(y_1 - y_0) / (z_1 - z_0)` instead of the
derivative. Backpropagating secants gives multipliers whose product with :math:`x_1 - x_0` adds up to
:math:`F(x_1) - F(x_0)` exactly, on every interval; as the intervals shrink they become the gradient. One interval from
the baseline to the input is DeepLIFT's rescale rule (Shrikumar et al., arXiv 1704.02685; Ancona et al., arXiv
1711.06104); many are Integrated Gradients by a rule that knows where the ReLUs switch.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kdig_utils.method.tracing import NONLINEAR, NotASecantNetwork, trace

GRADING = 0.2  # the points' density falls as 1 / (a + GRADING); tried on the teacher (chapter 17), harmless elsewhere

# What the backward pass needs of an operation: slopes of secants, or the little graph by which autograd transposes it.
Tape = dict[fx.Node, Tensor | tuple[list[Tensor], Tensor]]
Elementwise = Callable[[Tensor], Tensor]


def graded_points(steps: int) -> Tensor:
    """Ends of `steps` intervals of [0, 1], float64 of shape (steps + 1,), denser near the baseline.

    Their density is proportional to 1 / (a + `GRADING`): a step changes the contrast by the same factor.
    """
    exponents = torch.arange(steps + 1, dtype=torch.float64) / steps
    points = GRADING * ((1 + 1 / GRADING) ** exponents - 1)
    points[-1] = 1
    return points


class SecantNetwork(fx.Interpreter):
    """A frozen copy of `model`, batch norm folded, that gives values and multipliers along a path.

    Args:
        model: affine layers and elementwise nonlinearities in evaluation mode, (N, …) to (N, classes).
        half: backpropagate in bfloat16 (the values and the secants stay in float32). The multipliers then carry a
            relative rounding error of about one per cent at random; twice as fast on a processor with AVX512-BF16.
        compiled: fuse the elementwise work of ReLU and ReLU6 with torch.compile; ask `compiles` first.

    Raises:
        NotASecantNetwork: it cannot be traced, or has an operation that is neither affine nor elementwise.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], half: bool = False, compiled: bool = False) -> None:
        network, self.kinds = trace(model)
        super().__init__(network)
        self.slope_dtype = torch.bfloat16 if half else None
        layers = {n: self.submodules[str(n.target)] for n in self.graph.nodes if n.op == "call_module"}
        self.adjoints = {node: _Adjoint(layer) for node, layer in layers.items() if half and _has_adjoint(layer)}
        self.bounds = {node: bounds for node, layer in layers.items() if compiled and (bounds := _bounds(layer))}
        *steps, output = (node for node in self.graph.nodes if node.op != "placeholder")
        # The first steps, through which the path stays a straight line, if only one value leaves them.
        first = next((at for at, node in enumerate(steps) if self.kinds.get(node) in NONLINEAR), 0)
        later = {value for node in steps[first:] for value in node.all_input_nodes}
        straight = bool(first) and later - set(steps[first:]) == {steps[first].args[0]}
        self.prefix, self.steps = (steps[:first], steps[first:]) if straight else ([], steps)
        self.source, self.result = next(iter(self.kinds)), output.args[0]
        self.entry = steps[first].args[0] if straight else self.source

    def entrance(self, inputs: Tensor) -> Tensor:
        """The value at which the path first meets a nonlinearity; affine in `inputs`, so the path is straight there."""
        self.env = {self.source: inputs}
        for node in self.prefix:
            self.env[node] = self.run_node(node)
        if len(self.env[self.entry]) != len(inputs):
            raise NotASecantNetwork(f"{self.entry} takes another dimension for the batch")
        return self.env[self.entry]

    def entrance_vjp(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Pull multipliers at the entrance back to the inputs; linear, so done once for a weighted sum of them."""
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            value = self.entrance(leaf)
            return torch.autograd.grad(value, leaf, gradients.to(value.dtype))[0]

    def advance(self, entrance: Tensor, left: dict[fx.Node, Tensor], images: int) -> tuple[Tensor, Tape]:
        """Outputs at the right ends of intervals, and what their multipliers need; `left` moves to the last points.

        Args:
            entrance: points, step by step: the first `images` rows are the first step of each image, and so on.
            left: the nonlinearities' inputs one step before the first, of `images` rows or of one for all; empty at
                the path's first point, which stands for the one before it.

        Raises:
            NotASecantNetwork: the rows of a batch become those of another dimension.
        """
        tape: Tape = {}
        self.env = {self.entry: entrance.detach().requires_grad_()}
        for node in self.steps:
            kind = self.kinds.get(node)
            if kind in NONLINEAR and len(self.env[self._moving(node)[0]]) != len(entrance):
                raise NotASecantNetwork(f"{node.name} takes another dimension for the batch")
            recorded = kind == "affine" and node not in self.adjoints and not self._is_sum(node)
            with torch.set_grad_enabled(recorded):
                value = self._nonlinear(node, tape, left, images) if kind in NONLINEAR else self.run_node(node)
            if recorded:
                tape[node] = [self.env[source] for source in self._moving(node)], value
            self.env[node] = value.detach().requires_grad_() if kind else value
            for used in self.user_to_last_uses.get(node, []):
                del self.env[used]
        return self.env[self.result].detach(), tape

    def multipliers(self, tape: Tape, output: Tensor) -> Tensor:
        """Multipliers of each interval at the entrance, from those at the output, (rows, classes)."""
        gradients = {self.result: output}
        for node in reversed(self.steps):
            if node in gradients:
                for source, part in self._transposed(node, tape, gradients.pop(node)):
                    gradients[source] = gradients[source] + part if source in gradients else part
        return gradients[self.entry]

    def _transposed(self, node: fx.Node, tape: Tape, gradient: Tensor) -> Iterable[tuple[fx.Node, Tensor]]:
        """What the gradient of an operation's result means for each of its inputs."""
        needed = tape.pop(node, None)
        if isinstance(needed, tuple):
            leaves, value = needed
            parts = torch.autograd.grad(value, leaves, gradient.to(value.dtype))
            return zip(self._moving(node), parts, strict=True)
        if needed is not None:  # a slope, not needed again; the gradient may have a second reader
            gradient = needed.mul_(gradient) if needed.dtype == gradient.dtype else gradient * needed
        elif node in self.adjoints:
            gradient = self.adjoints[node](gradient)
        return [(source, gradient) for source in self._moving(node)]  # a sum has two

    def _moving(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of an operation that move along the path."""
        return [source for source in node.all_input_nodes if source in self.kinds]

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether it adds two values of one shape, whose multipliers are then the sum's."""
        moving = self._moving(node)
        if node.target not in (operator.add, torch.add) or len(moving) != 2 or node.kwargs:
            return False
        return self.env[moving[0]].shape == self.env[moving[1]].shape

    def _nonlinear(self, node: fx.Node, tape: Tape, left: dict[fx.Node, Tensor], images: int) -> Tensor:
        """Values of an elementwise operation; the slopes of its secants go on the tape, and `left` moves on."""

        def function(values: Tensor) -> Tensor:
            return getattr(self, node.op)(node.target, (values, *node.args[1:]), node.kwargs)

        z = self.env[self._moving(node)[0]].detach()
        if node in self.bounds and node in left:
            y, slope = _fused_secant(z, left[node], images, self.bounds[node], self.slope_dtype or z.dtype)
        else:
            y, slope = _secant(function, self.kinds[node] == "exact", z, left.get(node, z), images)
        tape[node], left[node] = slope.to(self.slope_dtype or z.dtype), z[-images:].clone()
        return y


@torch.no_grad()
def secant_attributions(
    network: SecantNetwork,
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    steps: int,
    internal_batch_size: int = 48,
) -> Tensor:
    """Integrated Gradients by the secants of `steps` graded intervals, the shape of `inputs`.

    Args:
        baselines: broadcasts to `inputs`; one for all of them is evaluated only once.
    """
    baselines = baselines.to(inputs).expand_as(inputs)
    shared = bool((baselines == baselines[:1]).all())
    points, found = graded_points(steps), torch.empty_like(inputs)
    chunk = min(steps, internal_batch_size)
    start, left = inputs.new_empty(0), dict[fx.Node, Tensor]()
    for part in torch.arange(len(inputs)).split(max(1, internal_batch_size // chunk)):
        origin = baselines[:1] if shared else baselines[part]
        if not shared or not left:
            start, left = network.entrance(origin), {}
            network.advance(start, left, len(origin))
        total = _along(network, start, network.entrance(inputs[part]), dict(left), targets[part], points, chunk)
        found[part] = (inputs[part] - origin) * network.entrance_vjp(inputs[part], total)
    return found


def _along(
    network: SecantNetwork,
    start: Tensor,
    end: Tensor,
    left: dict[fx.Node, Tensor],
    targets: Tensor,
    points: Tensor,
    chunk: int,
) -> Tensor:
    """The average of the multipliers at the entrance over the path, for images (n, …); `chunk` steps at a time."""
    total = torch.zeros_like(end)
    for steps in torch.arange(1, len(points)).split(chunk):
        alpha, width = (
            values.to(end).view(-1, *[1] * end.dim()) for values in (points[steps], points[steps] - points[steps - 1])
        )
        rows = (start + alpha * (end - start)).flatten(0, 1)
        outputs, tape = network.advance(rows.contiguous(memory_format=_layout(rows)), left, len(end))
        explained = F.one_hot(targets.repeat(len(steps)), outputs.shape[1]).to(outputs)
        multipliers = network.multipliers(tape, explained)
        total += (width * multipliers.to(end.dtype).view(len(steps), *end.shape)).sum(0)
    return total


class _Adjoint:
    """The transposed convolution in bfloat16, laid out for the fastest kernels of the CPU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.depthwise, self.padding, self.groups = layer.groups > 1, layer.padding, layer.groups
        weight = layer.weight.detach().bfloat16()
        flipped = weight.flip(2, 3).contiguous(memory_format=torch.channels_last)
        self.weight = flipped if self.depthwise else weight[:, :, 0, 0]

    def __call__(self, gradient: Tensor) -> Tensor:
        gradient = gradient.bfloat16()
        if self.depthwise:
            return F.conv2d(gradient, self.weight, None, 1, self.padding, 1, self.groups)
        return (gradient.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2)


def _has_adjoint(layer: nn.Module) -> bool:
    """Whether it is a pointwise convolution, or a depthwise one that keeps the size."""
    if type(layer) is not nn.Conv2d or layer.stride != (1, 1) or layer.dilation != (1, 1):
        return False
    if layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.padding == (0, 0)
    same = layer.padding == tuple((k - 1) / 2 for k in layer.kernel_size)
    return layer.groups == layer.in_channels == layer.out_channels and same and layer.padding_mode == "zeros"


def _bounds(layer: nn.Module) -> tuple[float, float] | None:
    """Between which values a layer lets its input pass, if it is a clamp."""
    if isinstance(layer, nn.Hardtanh):  # ReLU6 is one
        return float(layer.min_val), float(layer.max_val)
    return (0.0, math.inf) if isinstance(layer, nn.ReLU) else None


def _secant(function: Elementwise, exact: bool, z: Tensor, left: Tensor, images: int) -> tuple[Tensor, Tensor]:
    y = function(z)
    rise, run = _differences(y, function(left), images), _differences(z, left, images)
    if exact:
        slope = rise.div_(run)
        stood_still = not slope.sum().isfinite()  # some did, and their secant is 0 / 0
        return y, torch.where(slope.isnan(), _derivative(function, z), slope) if stood_still else slope
    middle = z - run / 2
    close = run.abs() <= torch.finfo(z.dtype).eps ** (1 / 3) * (1 + middle.abs())  # there rounding would speak
    return y, torch.where(close, _derivative(function, middle), rise / run)


def _differences(values: Tensor, left: Tensor, images: int) -> Tensor:
    """Each row minus the row one step before, which is `images` rows above it, or in `left`."""
    out = torch.empty_like(values)
    torch.sub(values[:images], left, out=out[:images])
    torch.sub(values[images:], values[:-images], out=out[images:])
    return out


def _derivative(function: Elementwise, z: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def _clamp_secant(z: Tensor, before: Tensor, low: float, high: float, y: Tensor, slope: Tensor) -> None:
    """Write `_secant` of a clamp on rows of numbers to `y` and `slope`, in one pass over the memory once compiled."""
    inside = ((z > low) & (z < high)).to(z.dtype)
    run = z - before
    y.copy_(z.clamp(low, high))
    slope.copy_(torch.where(run == 0, inside, (z.clamp(low, high) - before.clamp(low, high)) / run))


@functools.cache
def _compiled() -> Callable:
    """The elementwise kernel, compiled on first use in some seconds; needs a C++ compiler."""
    return torch.compile(_clamp_secant, dynamic=True)


@functools.cache
def compiles() -> bool:
    """Whether torch.compile works here: tried once, on two numbers, in the seconds that the kernel needs anyway."""
    two = torch.ones(2, 2)
    try:
        _compiled()(two, two, 0.0, 6.0, two.clone(), two.clone())
    except Exception:  # no C++ compiler, no headers of Python, an unknown system: each fails in its own way
        return False
    return True


def _fused_secant(
    z: Tensor, left: Tensor, images: int, bounds: tuple[float, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    z = z.contiguous(memory_format=_layout(z))
    y, slope = torch.empty_like(z), torch.empty_like(z, dtype=dtype)
    # As .data: for views the compiler would make one kernel for each shape of what they view.
    here, there, secant = (_rows(values) for values in (z, y, slope))
    # Two calls: a join of the points before, in the kernel or ahead of it, costs as much as the kernel.
    first = _rows(left).expand(images, -1)
    for before, rows in ((first, slice(images)), (here[:-images], slice(images, None))):
        if len(here[rows]):
            _compiled()(here[rows].data, before.data, *bounds, there[rows].data, secant[rows].data)
    return y, slope


def _rows(values: Tensor) -> Tensor:
    """The numbers of each row in the order of the memory, (N, …) to (N, K), a view."""
    return (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).reshape(len(values), -1)


def _layout(values: Tensor) -> torch.memory_format:
    return torch.channels_last if values.dim() == 4 else torch.contiguous_format
