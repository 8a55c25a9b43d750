"""A network read by torch.fx: which of its operations are affine, and which elementwise and nonlinear."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

# "exact" is monotone with slopes 0 and 1 only: the secant of rounded values is as exact as they are, however close.
NONLINEAR = ("exact", "smooth")
_SMOOTH: tuple[type[nn.Module], ...] = (nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid)
_SMOOTH += (nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink)
_AFFINE: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
_AFFINE += (nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d)
_AFFINE += (nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d)
_KINDS_OF_MODULES = {"exact": (nn.ReLU, nn.ReLU6, nn.Hardtanh), "smooth": _SMOOTH, "affine": _AFFINE}
_KINDS_OF_FUNCTIONS = {
    "shape": "size getattr",
    "exact": "relu relu6 hardtanh clamp",
    "smooth": "leaky_relu elu selu gelu silu mish sigmoid tanh softplus exp hardswish hardsigmoid logsigmoid sin cos",
    "affine": "add sub flatten reshape mean sum neg permute transpose contiguous adaptive_avg_pool2d avg_pool2d "
    "dropout cat squeeze unsqueeze getitem pad",
    "scaling": "mul truediv div",  # affine in one value, the numerator of a quotient
}
_KIND_OF_FUNCTION = {name: kind for kind, names in _KINDS_OF_FUNCTIONS.items() for name in names.split()}


class NotASecantNetwork(ValueError):
    """The network has an operation for which there is no secant; gradients work for it."""


def trace(model: Callable[[Tensor], Tensor]) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """A frozen copy of `model`, batch norm folded, and the kind of each value in it that moves along the path.

    The kinds are "input", "affine", "exact" and "smooth".

    Raises:
        NotASecantNetwork: it cannot be traced, or has an operation that is neither affine nor elementwise.
    """
    network = _folded(model)
    kinds: dict[fx.Node, str] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            if kinds:
                raise NotASecantNetwork(f"it takes more than one input ({node.name})")
            kinds[node] = "input"
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise NotASecantNetwork("it has more than one output")
        elif any(argument in kinds for argument in node.all_input_nodes):
            kind = _kind_of(node, network, kinds)
            if kind != "shape":
                kinds[node] = kind
    return network, kinds


def _folded(model: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    if not isinstance(model, nn.Module):
        raise NotASecantNetwork(f"a {type(model).__name__} is not a torch.nn.Module, whose operations can be read")
    try:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        for module in frozen.modules():
            if "inplace" in vars(module):
                vars(module)["inplace"] = False
        folded = fuse(frozen, inplace=True)
    except Exception as error:  # whatever a module does that a copy or symbols cannot follow
        raise NotASecantNetwork(f"it cannot be copied and traced by torch.fx ({error})") from error
    assert isinstance(folded, fx.GraphModule)
    for node in folded.graph.nodes:
        if (node.op, node.target) == ("call_method", "view"):
            node.target = "reshape"  # the folded network's layout may be another
    if any(isinstance(module, nn.Conv2d) for module in folded.modules()):
        return folded.to(memory_format=torch.channels_last)
    return folded


def _kind_of(node: fx.Node, network: fx.GraphModule, moving: dict[fx.Node, str]) -> str:
    """The kind of an operation on a value that moves along the path; what would overwrite that value copies it."""
    if node.op == "call_module":
        layer = network.get_submodule(str(node.target))
        name = type(layer).__name__
        kind = next((kind for kind, classes in _KINDS_OF_MODULES.items() if isinstance(layer, classes)), "")
    else:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        kind = _KIND_OF_FUNCTION.get(name, "")
    if node.kwargs.get("inplace") and len(node.all_input_nodes[0].users) > 1:
        raise NotASecantNetwork(f"{node.name} overwrites a value that is used again")
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    given = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]
    if kind == "scaling" and not node.kwargs and sum(value in moving for value in given) == 1:
        kind = "affine" if name == "mul" or node.args[0] in moving else ""
    of_one_value = kind not in NONLINEAR or given == list(node.args[:1])
    is_shape = name != "getattr" or node.args[1] in ("shape", "ndim", "dtype", "device")
    if kind in ("", "scaling") or not of_one_value or not is_shape:
        raise NotASecantNetwork(f"{name} ({node.name}) is neither affine nor elementwise in what moves along the path")
    return kind
