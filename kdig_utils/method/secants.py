r"""Integrated Gradients by secants: a network of affine layers and elementwise nonlinearities, interval by interval.

A gradient sees one point of the path. Between two points, the part of an interval on which a unit passes its signal on
is known from the unit's values at both ends: it is the secant :math:`(y_1 - y_0) / (z_1 - z_0)` instead of the
derivative. Backpropagating secants gives multipliers whose product with :math:`x_1 - x_0` adds up to
:math:`F(x_1) - F(x_0)` exactly, on every interval; as the intervals shrink they become the gradient. One interval from
the baseline to the input is DeepLIFT's rescale rule (Shrikumar et al., arXiv 1704.02685; Ancona et al., arXiv
1711.06104); many are Integrated Gradients by a rule that knows where the ReLUs switch.
"""

import copy
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

# Monotone with slopes 0 and 1 only: the secant of rounded values is as exact as they are, however close they lie.
_EXACT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH = (nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid)
_SMOOTH += (nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink)
_AFFINE = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_AFFINE += (nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_AFFINE += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d)
_EXACT_NAMES = {"relu", "relu6", "hardtanh", "clamp"}
_SMOOTH_NAMES = {"leaky_relu", "elu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "exp"}
_SMOOTH_NAMES |= {"hardswish", "hardsigmoid", "logsigmoid", "sin", "cos"}
_AFFINE_NAMES = {"add", "sub", "flatten", "reshape", "view", "mean", "sum", "neg", "permute", "transpose", "contiguous"}
_AFFINE_NAMES |= {"adaptive_avg_pool2d", "avg_pool2d", "dropout", "cat", "squeeze", "unsqueeze", "getitem", "pad"}
_SCALING_NAMES = {"mul", "truediv", "div"}  # affine if one factor is a constant
_SHAPE_NAMES = {"size", "getattr"}


class NotASecantNetwork(ValueError):
    """The network has an operation for which there is no secant; gradients work for it."""


@dataclass
class _Step:
    kind: str  # "affine", "exact", "smooth" or "shape"
    name: str
    call: Callable
    args: tuple
    kwargs: dict
    inputs: list[str]  # the tensors that it depends on and that depend on the path
    bounds: tuple[float, float] | None = None  # of a layer that is a clamp


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

    def __init__(self, model: nn.Module, half: bool = False, compiled: bool = False) -> None:
        self.half, self.compiled = half, compiled
        self.graph = _folded(model)
        modules = dict(self.graph.named_modules())
        users = Counter(argument for node in self.graph.graph.nodes for argument in node.all_input_nodes)
        self.steps: list[_Step] = []
        varying: set[str] = set()
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if varying:
                    raise NotASecantNetwork(f"it takes more than one input ({node.name})")
                self.source = node.name
                varying.add(node.name)
            elif node.op == "output":
                (self.result,) = _one(node.args, "output")
            elif any(argument.name in varying for argument in node.all_input_nodes):
                step = _step(node, modules, varying, users)
                self.steps.append(step)
                if step.kind != "shape":
                    varying.add(node.name)
            else:
                self.steps.append(_step(node, modules, varying, users))
        self.uses = Counter(name for step in self.steps for name in _names(step)) + Counter([self.result])
        self.adjoints = {step.name: _Adjoint(step.call) for step in self.steps if half and _Adjoint.serves(step.call)}
        self.prefix = self._affine_prefix()

    def _affine_prefix(self) -> int:
        """Number of first steps through which the path stays a straight line, if only one value leaves them."""
        for position, step in enumerate(self.steps):
            if step.kind in ("exact", "smooth"):
                inner = {self.source, *(earlier.name for earlier in self.steps[:position])}
                leaving = {name for later in self.steps[position:] for name in _names(later) if name in inner}
                return position if leaving == set(step.inputs) else 0
        return 0

    def entrance(self, inputs: Tensor) -> Tensor:
        """The value at which the path first meets a nonlinearity; affine in `inputs`, so the path is straight there."""
        if not self.prefix:
            return inputs
        with torch.no_grad():
            return self._run(self.steps[: self.prefix], {self.source: inputs})[self._entrance_name]

    def entrance_vjp(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Pull multipliers at the entrance back to the inputs; linear, so done once for a weighted sum of them."""
        if not self.prefix:
            return gradients
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            value = self._run(self.steps[: self.prefix], {self.source: leaf})[self._entrance_name]
            return torch.autograd.grad(value, leaf, gradients.to(value.dtype))[0]

    @property
    def _entrance_name(self) -> str:
        return self.steps[self.prefix].inputs[0] if self.prefix else self.source

    def _run(self, steps: list[_Step], values: dict) -> dict:
        for step in steps:
            values[step.name] = step.call(*_filled(step.args, values), **_filled(step.kwargs, values))
        return values

    def values(self, entrance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs (N, classes), and each nonlinearity's input, for points given at the entrance."""
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            values = {self._entrance_name: entrance}
            for step in self.steps[self.prefix :]:
                if step.kind in ("exact", "smooth"):
                    kept[step.name] = values[step.inputs[0]]
                values[step.name] = step.call(*_filled(step.args, values), **_filled(step.kwargs, values))
        return values[self.result], kept

    def advance(self, entrance: Tensor, left: dict[str, Tensor], images: int) -> tuple[Tensor, _Tape]:
        """Outputs at the right ends of intervals, and what their multipliers need; `left` moves to the last points.

        Args:
            entrance: points, step by step: the first `images` rows are the first step of each image, and so on.
            left: the nonlinearities' inputs one step before the first, of `images` rows or of one for all.
        """
        tape, left_uses = _Tape(), dict(self.uses)
        values = {self._entrance_name: entrance}
        for step in self.steps[self.prefix :]:
            if step.kind in ("exact", "smooth"):
                z = values[step.inputs[0]].detach()
                with torch.no_grad():
                    values[step.name], tape.slopes[step.name] = self._secant(step, z, left[step.name], images)
                left[step.name] = z[-images:].clone()
            elif step.kind == "shape" or step.name in self.adjoints or _is_sum(step, values):
                with torch.no_grad():
                    values[step.name] = step.call(*_filled(step.args, values), **_filled(step.kwargs, values))
            else:
                values[step.name], tape.graphs[step.name] = _recorded(step, values)
            for name in _names(step):  # free each value after its last use
                left_uses[name] -= 1
                if not left_uses[name]:
                    del values[name]
        return values[self.result].detach(), tape

    def _secant(self, step: _Step, z: Tensor, left: Tensor, images: int) -> tuple[Tensor, Tensor]:
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
            gradient, names = gradients.pop(step.name), step.inputs
            if step.name in tape.slopes:
                parts = [_product(gradient, tape.slopes.pop(step.name))]
            elif step.name in self.adjoints:
                parts = [self.adjoints[step.name](gradient)]
            elif step.name in tape.graphs:
                names, value = tape.graphs.pop(step.name)
                parts = torch.autograd.grad(value, list(names.values()), gradient.to(value.dtype))
            else:  # a sum
                parts = [gradient] * len(step.inputs)
            for name, part in zip(names, parts, strict=True):
                gradients[name] = gradients[name] + part if name in gradients else part
        return gradients[self._entrance_name]


class _Adjoint:
    """The transposed convolution or linear layer in bfloat16, laid out for the fastest kernels of the CPU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.depthwise = layer.groups > 1
        weight = layer.weight.detach().bfloat16()
        self.weight = (
            weight.flip(2, 3).contiguous(memory_format=torch.channels_last) if self.depthwise else weight[:, :, 0, 0]
        )
        self.padding, self.groups = layer.padding, layer.groups

    @staticmethod
    def serves(layer: Callable) -> bool:
        """Pointwise convolutions, and depthwise ones that keep the size."""
        if type(layer) is not nn.Conv2d or layer.stride != (1, 1) or layer.dilation != (1, 1):
            return False
        if layer.kernel_size == (1, 1) and layer.groups == 1:
            return layer.padding == (0, 0)
        same = all(2 * p == k - 1 for p, k in zip(layer.padding, layer.kernel_size, strict=True) if p != "same")
        return layer.groups == layer.in_channels == layer.out_channels and same and layer.padding_mode == "zeros"

    def __call__(self, gradient: Tensor) -> Tensor:
        gradient = gradient.bfloat16()
        if self.depthwise:
            return F.conv2d(gradient, self.weight, None, 1, self.padding, 1, self.groups)
        rows, channels, height, width = gradient.shape
        flat = gradient.permute(0, 2, 3, 1).reshape(-1, channels) @ self.weight
        return flat.view(rows, height, width, -1).permute(0, 3, 1, 2)


def _secant(step: _Step, z: Tensor, left: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The nonlinearity's values at `z`, and the slope of its secant from the point before to each."""
    y, first = step.call(z), step.call(left)
    rise, run = _differences(y, first, images), _differences(z, left, images)
    if step.kind == "exact":
        return y, _where_it_moved(rise.div_(run), step, z)
    middle = z - run / 2
    close = run.abs() <= torch.finfo(z.dtype).eps ** (1 / 3) * (1 + middle.abs())  # there rounding would speak
    return y, torch.where(close, derivative(step.call, middle), rise / run)


def _differences(values: Tensor, left: Tensor, images: int) -> Tensor:
    """Each row minus the row one step before, which is `images` rows above it, or in `left`."""
    out = torch.empty_like(values)
    torch.sub(values[:images], left, out=out[:images])
    torch.sub(values[images:], values[:-images], out=out[images:])
    return out


def _where_it_moved(slope: Tensor, step: _Step, z: Tensor) -> Tensor:
    """Put the derivative where a unit stood still and its secant is 0 / 0."""
    if slope.sum().isfinite():
        return slope
    return torch.where(slope.isnan(), derivative(step.call, z), slope)


def _product(gradient: Tensor, slope: Tensor) -> Tensor:
    """Their product, in the memory of the slope, which is not needed again; a gradient may have a second reader."""
    return slope.mul_(gradient) if slope.dtype == gradient.dtype else gradient * slope


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


def _recorded(step: _Step, values: dict) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
    """The value of an affine step, and the little graph through which autograd transposes it."""
    with torch.enable_grad():
        leaves = {name: values[name].detach().requires_grad_() for name in dict.fromkeys(step.inputs)}
        known = {**values, **leaves}
        value = step.call(*_filled(step.args, known), **_filled(step.kwargs, known))
    return value.detach(), (leaves, value)


def _folded(model: nn.Module) -> fx.GraphModule:
    if not isinstance(model, nn.Module):
        raise NotASecantNetwork(f"a {type(model).__name__} is not a torch.nn.Module, whose operations can be read")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    try:
        folded = fuse(model)
    except Exception as error:  # whatever a module does that symbols cannot follow
        raise NotASecantNetwork(f"it cannot be traced by torch.fx ({error})") from error
    if any(isinstance(module, nn.Conv2d) for module in folded.modules()):
        folded = folded.to(memory_format=torch.channels_last)
    return folded


def _step(node: fx.Node, modules: dict[str, nn.Module], varying: set[str], users: Counter) -> _Step:
    kwargs = dict(node.kwargs)
    if kwargs.pop("inplace", False) and users[node.all_input_nodes[0]] > 1:
        raise NotASecantNetwork(f"{node.name} overwrites a value that is used again")
    inputs = [argument.name for argument in _flat_nodes(node.args, node.kwargs) if argument.name in varying]
    if node.op == "call_module":
        module = modules[node.target]
        kind = "exact" if isinstance(module, _EXACT) else "smooth" if isinstance(module, _SMOOTH) else ""
        kind = kind or ("affine" if isinstance(module, _AFFINE) else "")
        what, call = type(module).__name__, module
    elif node.op == "get_attr":
        value = operator.attrgetter(node.target)(modules[""])
        kind, what, call = "shape", node.target, lambda: value
        return _Step(kind, node.name, call, (), {}, [])
    else:
        what = node.target if isinstance(node.target, str) else node.target.__name__
        call = _method(node.target) if isinstance(node.target, str) else node.target
        kind = _kind_of_function(what, inputs)
    if not inputs:
        return _Step("shape", node.name, call, node.args, kwargs, [])
    if not kind or _moves_the_batch(what, node.args[1:]):
        raise NotASecantNetwork(f"{what} is neither affine nor elementwise")
    if kind in ("exact", "smooth"):
        return _elementwise(node, kind, call, kwargs, inputs)
    return _Step(kind, node.name, call, node.args, kwargs, [] if kind == "shape" else inputs)


def _elementwise(node: fx.Node, kind: str, call: Callable, kwargs: dict, inputs: list[str]) -> _Step:
    rest = node.args[1:]
    if len(inputs) != 1 or not node.args or getattr(node.args[0], "name", None) != inputs[0]:
        raise NotASecantNetwork(f"{node.name} takes more than one value that moves along the path")
    if any(isinstance(argument, fx.Node) for argument in (*rest, *kwargs.values())):
        raise NotASecantNetwork(f"{node.name} has a computed parameter")
    bounds = None
    if isinstance(call, nn.ReLU | nn.Hardtanh):  # ReLU6 is a Hardtanh
        bounds = (0.0, math.inf) if isinstance(call, nn.ReLU) else (float(call.min_val), float(call.max_val))
    return _Step(kind, node.name, lambda z: call(z, *rest, **kwargs), node.args[:1], {}, inputs, bounds)


def _kind_of_function(name: str, inputs: list[str]) -> str:
    if name in _SHAPE_NAMES:
        return "shape"
    if name in _EXACT_NAMES:
        return "exact"
    if name in _SMOOTH_NAMES:
        return "smooth"
    return "affine" if name in _AFFINE_NAMES or (name in _SCALING_NAMES and len(inputs) == 1) else ""


def _moves_the_batch(name: str, rest: tuple) -> bool:
    """Whether the first dimension, the intervals', goes elsewhere, or another attribute than a shape is read."""
    dimensions = rest[0] if rest and isinstance(rest[0], tuple | list) else rest
    if name == "getattr":
        return rest[0] not in ("shape", "ndim", "dtype", "device")
    return (name == "permute" and dimensions[0] != 0) or (name == "transpose" and 0 in dimensions)


def _method(name: str) -> Callable:
    name = "reshape" if name == "view" else name  # the folded network's layout may be another
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _is_sum(step: _Step, values: dict) -> bool:
    """Whether it adds two values of one shape, whose multipliers are then the sum's."""
    if step.call not in (operator.add, torch.add) or len(step.inputs) != 2 or step.kwargs:
        return False
    first, second = (values[name].shape for name in step.inputs)
    return first == second


def _flat_nodes(*structures: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(structures, lambda node: found.append(node) or node)
    return found


def _names(step: _Step) -> list[str]:
    return [node.name for node in _flat_nodes(step.args, step.kwargs)]


def _filled(structure: object, values: dict) -> object:
    return fx.node.map_arg(structure, lambda node: values[node.name])


def _one(arguments: tuple, what: str) -> tuple[str]:
    if len(arguments) != 1 or not isinstance(arguments[0], fx.Node):
        raise NotASecantNetwork(f"it has more than one {what}")
    return (arguments[0].name,)
