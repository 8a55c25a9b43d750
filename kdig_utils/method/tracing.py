"""A network read into steps: affine layers and elementwise nonlinearities, each with what it needs (torch.fx)."""

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.node import Argument, map_arg

# Monotone with slopes 0 and 1 only: the secant of rounded values is as exact as they are, however close they lie.
_EXACT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH: tuple[type[nn.Module], ...] = (nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid)
_SMOOTH += (nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink)
_AFFINE: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
_AFFINE += (nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d)
_AFFINE += (nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d)
_KINDS_OF_MODULES = {"exact": _EXACT, "smooth": _SMOOTH, "affine": _AFFINE}
_KINDS_OF_FUNCTIONS = {
    "shape": "size getattr",
    "exact": "relu relu6 hardtanh clamp",
    "smooth": "leaky_relu elu selu gelu silu mish sigmoid tanh softplus exp hardswish hardsigmoid logsigmoid sin cos",
    "affine": "add sub flatten reshape view mean sum neg permute transpose contiguous adaptive_avg_pool2d avg_pool2d "
    "dropout cat squeeze unsqueeze getitem pad",
    "scaling": "mul truediv div",  # affine if one factor is a constant
}
_KIND_OF_FUNCTION = {name: kind for kind, names in _KINDS_OF_FUNCTIONS.items() for name in names.split()}


class NotASecantNetwork(ValueError):
    """The network has an operation for which there is no secant; gradients work for it."""


@dataclass
class Step:
    """One operation of a network.

    Attributes:
        kind: "affine", "exact" or "smooth" (the two nonlinear kinds), or "shape".
        inputs: the names of the values that it depends on and that depend on the path.
        bounds: of a layer that is a clamp.
        reads: the names of all values that it needs, as often as it needs them.
    """

    kind: str
    name: str
    call: Callable[..., Tensor]
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    inputs: list[str]
    bounds: tuple[float, float] | None = None
    reads: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = [node.name for node in _nodes_in(self.args, self.kwargs)]

    @property
    def nonlinear(self) -> bool:
        return self.kind in ("exact", "smooth")

    def value(self, values: Mapping[str, Tensor]) -> Tensor:
        """Its result, from the values of the steps before, some of which may be sizes."""
        args = map_arg(self.args, lambda node: values[node.name])
        return self.call(*args, **map_arg(self.kwargs, lambda node: values[node.name]))

    def is_sum(self, values: Mapping[str, Tensor]) -> bool:
        """Whether it adds two values of one shape, whose multipliers are then the sum's."""
        if self.call not in (operator.add, torch.add) or len(self.inputs) != 2 or self.kwargs:
            return False
        first, second = (values[name].shape for name in self.inputs)
        return first == second


class Trace(NamedTuple):
    """The steps of a network in their order, and the names of what goes in and what comes out."""

    steps: list[Step]
    source: str
    result: str


def trace(model: Callable[[Tensor], Tensor]) -> Trace:
    """The steps of a frozen copy of `model`, batch norm folded.

    Raises:
        NotASecantNetwork: it cannot be traced, or has an operation that is neither affine nor elementwise.
    """
    graph = _folded(model)
    modules = dict(graph.named_modules())
    users = Counter(argument for node in graph.graph.nodes for argument in node.all_input_nodes)
    steps: list[Step] = []
    varying: list[str] = []  # what moves along the path, first the input
    result = ""
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if varying:
                raise NotASecantNetwork(f"it takes more than one input ({node.name})")
            varying.append(node.name)
        elif node.op == "output":
            if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
                raise NotASecantNetwork("it has more than one output")
            result = node.args[0].name
        else:
            steps.append(_step(node, modules, varying, users))
            if steps[-1].inputs:
                varying.append(node.name)
    return Trace(steps, varying[0], result)


def _folded(model: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    if not isinstance(model, nn.Module):
        raise NotASecantNetwork(f"a {type(model).__name__} is not a torch.nn.Module, whose operations can be read")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for module in frozen.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
    try:
        folded = fuse(frozen)
    except Exception as error:  # whatever a module does that symbols cannot follow
        raise NotASecantNetwork(f"it cannot be traced by torch.fx ({error})") from error
    assert isinstance(folded, fx.GraphModule)
    if any(isinstance(module, nn.Conv2d) for module in folded.modules()):
        return folded.to(memory_format=torch.channels_last)
    return folded


def _step(node: fx.Node, modules: dict[str, nn.Module], varying: list[str], users: Counter[fx.Node]) -> Step:
    kwargs = dict(node.kwargs)
    if kwargs.pop("inplace", False) and users[node.all_input_nodes[0]] > 1:
        raise NotASecantNetwork(f"{node.name} overwrites a value that is used again")
    inputs = [argument.name for argument in _nodes_in(node.args, node.kwargs) if argument.name in varying]
    kind, what, call = _operation(node, modules, len(inputs))
    if not inputs:
        return Step("shape", node.name, call, node.args, kwargs, [])
    if not kind or _moves_the_batch(what, node.args[1:]):
        raise NotASecantNetwork(f"{what} is neither affine nor elementwise")
    if kind in ("exact", "smooth"):
        return _elementwise(node, kind, call, kwargs, inputs)
    return Step(kind, node.name, call, node.args, kwargs, [] if kind == "shape" else inputs)


def _operation(node: fx.Node, modules: dict[str, nn.Module], inputs: int) -> tuple[str, str, Callable[..., Tensor]]:
    """Kind (empty if unknown), name and function of a node with so many inputs that move along the path."""
    target = node.target
    if node.op == "call_module":
        module = modules[str(target)]
        kinds = [kind for kind, classes in _KINDS_OF_MODULES.items() if isinstance(module, classes)]
        return kinds[0] if kinds else "", type(module).__name__, module
    if node.op == "get_attr":
        value = operator.attrgetter(str(target))(modules[""])
        return "shape", str(target), lambda: value
    name, call = (target, _method(target)) if isinstance(target, str) else (target.__name__, target)
    kind = _KIND_OF_FUNCTION.get(name, "")
    if kind == "scaling":
        kind = "affine" if inputs == 1 else ""
    return kind, name, call


def _elementwise(
    node: fx.Node, kind: str, call: Callable[..., Tensor], kwargs: dict[str, Argument], inputs: list[str]
) -> Step:
    rest = node.args[1:]
    if len(inputs) != 1 or not node.args or getattr(node.args[0], "name", None) != inputs[0]:
        raise NotASecantNetwork(f"{node.name} takes more than one value that moves along the path")
    if any(isinstance(argument, fx.Node) for argument in (*rest, *kwargs.values())):
        raise NotASecantNetwork(f"{node.name} has a computed parameter")
    bounds = None
    if isinstance(call, nn.ReLU | nn.Hardtanh):  # ReLU6 is a Hardtanh
        bounds = (0.0, math.inf) if isinstance(call, nn.ReLU) else (float(call.min_val), float(call.max_val))
    return Step(kind, node.name, lambda z: call(z, *rest, **kwargs), node.args[:1], {}, inputs, bounds)


def _moves_the_batch(name: str, rest: tuple[Argument, ...]) -> bool:
    """Whether the first dimension, the intervals', goes elsewhere, or another attribute than a shape is read."""
    if name == "getattr":
        return rest[0] not in ("shape", "ndim", "dtype", "device")
    dimensions = list(rest[0] if rest and isinstance(rest[0], tuple | list) else rest)
    return (name == "permute" and dimensions[0] != 0) or (name == "transpose" and 0 in dimensions)


def _method(name: str) -> Callable[..., Tensor]:
    name = "reshape" if name == "view" else name  # the folded network's layout may be another
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _nodes_in(*structures: Argument) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_arg(structures, note)
    return found
