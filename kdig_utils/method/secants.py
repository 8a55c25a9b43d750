r"""Integrated Gradients by secants: a network of affine layers and elementwise nonlinearities, interval by interval.

A gradient sees one point of the path. Between two points, the part of an interval on which a unit passes its signal on
is known from the unit's values at both ends: it is the secant :math:`(y_1 - y_0) / (z_1 - z_0)` instead of the
derivative. Backpropagating secants gives multipliers whose product with :math:`x_1 - x_0` adds up to
:math:`F(x_1) - F(x_0)` exactly, on every interval; as the intervals shrink they become the gradient. One interval from
the baseline to the input is DeepLIFT's rescale rule (Shrikumar et al., arXiv 1704.02685; Ancona et al., arXiv
1711.06104); many are Integrated Gradients by a rule that knows where the ReLUs switch.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.method.tracing import Step, trace


@dataclass
class _Tape:
    """What the backward pass over one batch of intervals needs."""

    slopes: dict[str, Tensor] = field(default_factory=dict)
    graphs: dict[str, tuple[dict[str, Tensor], Tensor]] = field(default_factory=dict)


class SecantNetwork:
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
        self.half, self.compiled = half, compiled
        self.steps, self.source, self.result = trace(model)
        self.uses = Counter(name for step in self.steps for name in step.reads) + Counter([self.result])
        layers = {step.name: step.call for step in self.steps if half}
        self.adjoints = {name: _Adjoint(call) for name, call in layers.items() if _has_adjoint(call)}
        # The first steps, through which the path stays a straight line, and the one value that leaves them.
        self.prefix = self._affine_prefix()
        self.entry = self.steps[self.prefix].inputs[0] if self.prefix else self.source

    def _affine_prefix(self) -> int:
        """Number of steps before the first nonlinearity, if only one value leaves them; else 0."""
        for position, step in enumerate(self.steps):
            if step.nonlinear:
                inner = {self.source, *(earlier.name for earlier in self.steps[:position])}
                leaving = {name for later in self.steps[position:] for name in later.reads if name in inner}
                return position if leaving == set(step.inputs) else 0
        return 0

    def entrance(self, inputs: Tensor) -> Tensor:
        """The value at which the path first meets a nonlinearity; affine in `inputs`, so the path is straight there."""
        values = {self.source: inputs}
        for step in self.steps[: self.prefix]:
            values[step.name] = step.value(values)
        return values[self.entry]

    def entrance_vjp(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Pull multipliers at the entrance back to the inputs; linear, so done once for a weighted sum of them."""
        if not self.prefix:
            return gradients
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            value = self.entrance(leaf)
            return torch.autograd.grad(value, leaf, gradients.to(value.dtype))[0]

    @torch.no_grad()
    def values(self, entrance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs (N, classes), and each nonlinearity's input, for points given at the entrance."""
        kept, values = {}, {self.entry: entrance}
        for step in self.steps[self.prefix :]:
            if step.nonlinear:
                kept[step.name] = values[step.inputs[0]]
            values[step.name] = step.value(values)
        return values[self.result], kept

    def advance(self, entrance: Tensor, left: dict[str, Tensor], images: int) -> tuple[Tensor, _Tape]:
        """Outputs at the right ends of intervals, and what their multipliers need; `left` moves to the last points.

        Args:
            entrance: points, step by step: the first `images` rows are the first step of each image, and so on.
            left: the nonlinearities' inputs one step before the first, of `images` rows or of one for all.
        """
        tape, uses_left, values = _Tape(), dict(self.uses), {self.entry: entrance}
        for step in self.steps[self.prefix :]:
            if step.nonlinear:
                z = values[step.inputs[0]].detach()
                with torch.no_grad():
                    values[step.name], tape.slopes[step.name] = self._secant(step, z, left[step.name], images)
                left[step.name] = z[-images:].clone()
            elif step.kind == "shape" or step.name in self.adjoints or step.is_sum(values):
                with torch.no_grad():
                    values[step.name] = step.value(values)
            else:
                values[step.name], tape.graphs[step.name] = _recorded(step, values)
            for name in step.reads:  # free each value after its last use
                uses_left[name] -= 1
                if not uses_left[name]:
                    del values[name]
        return values[self.result].detach(), tape

    def _secant(self, step: Step, z: Tensor, left: Tensor, images: int) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.half else z.dtype
        if self.compiled and step.bounds:
            return _fused_secant(z, left, images, *step.bounds, dtype)
        y, slope = _secant(step, z, left, images)
        return y, slope.to(dtype)

    def multipliers(self, tape: _Tape, output: Tensor) -> Tensor:
        """Multipliers of each interval at the entrance, from those at the output, (rows, classes)."""
        gradients = {self.result: output}
        for step in reversed(self.steps[self.prefix :]):
            if not step.inputs or step.kind == "shape" or step.name not in gradients:
                continue
            gradient = gradients.pop(step.name)
            for name, part in self._transposed(step, tape, gradient):
                gradients[name] = gradients[name] + part if name in gradients else part
        return gradients[self.entry]

    def _transposed(self, step: Step, tape: _Tape, gradient: Tensor) -> Iterable[tuple[str, Tensor]]:
        """What the gradient of a step's result means for each of its inputs."""
        if step.name in tape.graphs:
            leaves, value = tape.graphs.pop(step.name)
            return zip(leaves, torch.autograd.grad(value, list(leaves.values()), gradient.to(value.dtype)), strict=True)
        if step.name in tape.slopes:
            slope = tape.slopes.pop(step.name)  # not needed again; the gradient may have a second reader
            gradient = slope.mul_(gradient) if slope.dtype == gradient.dtype else gradient * slope
        elif step.name in self.adjoints:
            gradient = self.adjoints[step.name](gradient)
        return [(name, gradient) for name in step.inputs]  # a sum has two


class _Adjoint:
    """The transposed convolution or linear layer in bfloat16, laid out for the fastest kernels of the CPU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.depthwise = layer.groups > 1
        weight = layer.weight.detach().bfloat16()
        self.weight = (
            weight.flip(2, 3).contiguous(memory_format=torch.channels_last) if self.depthwise else weight[:, :, 0, 0]
        )
        self.padding, self.groups = layer.padding, layer.groups

    def __call__(self, gradient: Tensor) -> Tensor:
        gradient = gradient.bfloat16()
        if self.depthwise:
            return F.conv2d(gradient, self.weight, None, 1, self.padding, 1, self.groups)
        rows, channels, height, width = gradient.shape
        flat = gradient.permute(0, 2, 3, 1).reshape(-1, channels) @ self.weight
        return flat.view(rows, height, width, -1).permute(0, 3, 1, 2)


def _has_adjoint(layer: Callable[..., Tensor]) -> TypeGuard[nn.Conv2d]:
    """Whether it is a pointwise convolution, or a depthwise one that keeps the size."""
    if type(layer) is not nn.Conv2d or layer.stride != (1, 1) or layer.dilation != (1, 1):
        return False
    if layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.padding == (0, 0)
    same = layer.padding == tuple((k - 1) / 2 for k in layer.kernel_size)
    return layer.groups == layer.in_channels == layer.out_channels and same and layer.padding_mode == "zeros"


def _secant(step: Step, z: Tensor, left: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The nonlinearity's values at `z`, and the slope of its secant from the point before to each."""
    y, first = step.call(z), step.call(left)
    rise, run = _differences(y, first, images), _differences(z, left, images)
    if step.kind == "exact":
        slope = rise.div_(run)
        stood_still = not slope.sum().isfinite()  # some did, and their secant is 0 / 0
        return y, torch.where(slope.isnan(), derivative(step.call, z), slope) if stood_still else slope
    middle = z - run / 2
    close = run.abs() <= torch.finfo(z.dtype).eps ** (1 / 3) * (1 + middle.abs())  # there rounding would speak
    return y, torch.where(close, derivative(step.call, middle), rise / run)


def _differences(values: Tensor, left: Tensor, images: int) -> Tensor:
    """Each row minus the row one step before, which is `images` rows above it, or in `left`."""
    out = torch.empty_like(values)
    torch.sub(values[:images], left, out=out[:images])
    torch.sub(values[images:], values[:-images], out=out[images:])
    return out


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


def _fused_secant(z: Tensor, left: Tensor, images: int, low: float, high: float, dtype: torch.dtype) -> tuple:
    flat = _rows(z)
    y, slope = torch.empty_like(flat), torch.empty_like(flat, dtype=dtype)
    # Two calls: a join of the points before, in the kernel or ahead of it, costs as much as the kernel.
    calls = [(flat[:images], _rows(left).expand(images, -1), y[:images], slope[:images])]
    if len(flat) > images:
        calls.append((flat[images:], flat[:-images], y[images:], slope[images:]))
    for call in calls:  # as .data: for views the compiler would make one kernel for each shape of what they view
        here, before, there, secant = (values.data for values in call)
        _compiled()(here, before, low, high, there, secant)
    return _unrows(y, z), _unrows(slope, z)


def _rows(values: Tensor) -> Tensor:
    """The numbers of each row in the order of the memory, (N, …) to (N, K), without a copy."""
    return (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).reshape(len(values), -1)


def _unrows(flat: Tensor, like: Tensor) -> Tensor:
    if like.dim() != 4:
        return flat.view(like.shape)
    n, channels, height, width = like.shape
    return flat.view(n, height, width, channels).permute(0, 3, 1, 2)


def derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Derivative of the sum of `function` at `z`, in the shape of `z`: elementwise if the function is."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def _recorded(step: Step, values: dict[str, Tensor]) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
    """The value of an affine step, and the little graph through which autograd transposes it."""
    with torch.enable_grad():
        leaves = {name: values[name].detach().requires_grad_() for name in step.inputs}
        value = step.value({**values, **leaves})
    return value.detach(), (leaves, value)
