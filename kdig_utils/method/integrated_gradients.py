r"""Integrated Gradients (Sundararajan et al., arXiv 1703.01365), written to be read.

The attribution of input feature :math:`i` is the path integral of the gradient from a baseline :math:`x'` to :math:`x`:

.. math:: \mathrm{IG}_i(x) = (x_i - x'_i) \int_0^1 \frac{\partial F(x' + \alpha (x - x'))}{\partial x_i} \, d\alpha
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kdig_utils.method.checks import check_choice, check_number

QUADRATURES = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BASELINES = ("black", "mean_colour", "white", "blurred", "uniform")


def integrated_gradients(
    forward_func: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baselines: Tensor | float = 0.0,
    target: Tensor | int = 0,
    n_steps: int = 50,
    method: str = "gausslegendre",
    internal_batch_size: int = 64,
) -> Tensor:
    """Attributions of `inputs`, the same shape, in units of the output (arXiv 1703.01365, equation 1).

    Names and defaults are Captum's; `internal_batch_size` evaluations bound the memory, however many steps there are.

    Args:
        forward_func: differentiable model, (N, …) to (N, classes), in evaluation mode: as in Captum it is not switched
            for you; while batch norm or dropout train, answers would depend on the other points of the path.
        inputs: shape (N, …), floating point; the result has no graph, even if these require a gradient.
        baselines: a number, or a tensor that broadcasts to `inputs`.
        target: the class whose output is explained, one for all or one an input.
        n_steps: evaluations along the path, placed by `method`, one of `QUADRATURES`.
        internal_batch_size: evaluations in one forward and backward pass.

    Raises:
        ValueError: unknown `method`, a number or target out of its range, a model that is training, or inputs or
            baselines that are not finite, not there, or none that the model takes.
    """
    check_number("internal_batch_size", internal_batch_size)
    check_mode(forward_func)
    alphas, weights = quadrature(method, n_steps)
    inputs, baselines, targets = as_given(inputs, baselines, target)
    difference, total, pair = inputs - baselines, torch.zeros_like(inputs), torch.arange(len(inputs) * len(alphas))
    for pairs in pair.split(int(internal_batch_size)):
        i, s = (pairs // len(alphas)).to(inputs.device), pairs % len(alphas)
        alpha, weight = (values[s].to(inputs).view(-1, *[1] * (inputs.dim() - 1)) for values in (alphas, weights))
        gradients = input_gradients(forward_func, baselines[i] + alpha * difference[i], targets[i])
        total.index_add_(0, i, weight * gradients)
    check_finite(total, "gradients along the paths")
    return difference * total


def quadrature(method: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """Points and weights of a rule on [0, 1], float64 of shape (n_steps,); the weights sum to one.

    Captum 0.9 agrees, but for its trapezoid: those weights sum to (n_steps - 1) / n_steps.

    Raises:
        ValueError: unknown `method`, or fewer steps than the rule needs (1; the trapezoid needs 2).
    """
    check_choice("method", method, QUADRATURES)
    least = 2 if method == "riemann_trapezoid" else 1
    check_number("n_steps", n_steps)
    n_steps = int(n_steps)
    if n_steps < least:
        raise ValueError(f"n_steps = {n_steps} is too few for {method}: use at least {least}")
    if method == "gausslegendre":
        nodes, shares = np.polynomial.legendre.leggauss(n_steps)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(shares / 2)
    weights = torch.full((n_steps,), 1 / n_steps, dtype=torch.float64)
    if method == "riemann_trapezoid":
        weights = torch.full((n_steps,), 1 / (n_steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, n_steps, dtype=torch.float64), weights
    offset = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[method]
    return (torch.arange(n_steps, dtype=torch.float64) + offset) / n_steps, weights


def attribution_map(attributions: Tensor) -> Tensor:
    """The paper's map: absolute attributions summed over the channels, (N, C, H, W) to (N, H, W), else ValueError."""
    if attributions.dim() != 4:
        raise ValueError(f"attributions of shape {tuple(attributions.shape)} are no (N, C, H, W): add what is missing")
    return attributions.abs().sum(1)


def baseline(name: str, images: Tensor, mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465), seed: int = 0) -> Tensor:
    """A baseline for each image, (N, 3, H, W) in [0, 1].

    `mean_colour` is the paper's: zeros after normalisation are the mean colour in pixels, and not black.

    Raises:
        ValueError: unknown `name`, or images without the mean's channels.
    """
    check_choice("baseline", name, BASELINES)
    if name == "mean_colour":
        if images.dim() != 4 or images.shape[1] != len(mean):
            raise ValueError(f"images of shape {tuple(images.shape)} are no (N, {len(mean)}, H, W): give them a mean")
        return torch.tensor(mean, device=images.device).view(1, -1, 1, 1).expand_as(images).clone()
    if name == "blurred":
        from torchvision.transforms.functional import gaussian_blur

        return gaussian_blur(images, kernel_size=31, sigma=4.0)
    if name == "uniform":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(images.shape, generator=generator).to(images.device)
    return torch.full_like(images, 0.0 if name == "black" else 1.0)


def input_gradients(forward_func: Callable[[Tensor], Tensor], points: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each point's target output with respect to that point, the shape of `points`, (N, …).

    Raises:
        ValueError: a target outside the classes, or as `outputs_of`.
    """
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        outputs = outputs_of(forward_func, points)
        check_targets(targets, outputs.shape[1])
        return torch.autograd.grad(outputs.gather(1, targets.unsqueeze(1)).sum(), points)[0]


def outputs_of(forward_func: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The model's outputs, (N, classes); ValueError where it does not take the points, or gives something else."""
    try:
        outputs = forward_func(points.clone())  # a clone: a model may overwrite its input
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch says of another dtype, of grey images, of a batch that is not there
        what, why = f"inputs of shape {tuple(points.shape)} and {points.dtype}", str(error).partition("\n")[0]
        raise ValueError(f"the model does not take {what} ({why}): give what it was trained on, in a batch") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the model's output is a {type(outputs).__name__}: wrap it, so that it returns the logits")
    if outputs.dim() != 2 or len(outputs) != len(points):
        shape = tuple(outputs.shape)
        raise ValueError(f"the model's output has shape {shape}: wrap it, so that it is ({len(points)}, classes)")
    return outputs


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise ValueError unless each of `targets` is from 0 to `classes` - 1; the message names the first that is not."""
    if len(wrong := targets[(targets < 0) | (targets >= classes)]):
        raise ValueError(
            f"target {int(wrong[0])} is outside the {classes} outputs of the model: give 0 to {classes - 1}"
        )


def check_mode(forward_func: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError where a layer is training, so that outputs depend on the batch or on chance."""
    for name, module in forward_func.named_modules() if isinstance(forward_func, nn.Module) else ():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise ValueError(
                f"{type(module).__name__} {name!r} is in training mode, so that outputs depend on the batch or on "
                "chance: call model.eval() first"
            )


def as_given(inputs: Tensor, baselines: Tensor | float, target: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and baselines of the same shape and type, without a graph, and targets, (N,).

    Raises:
        ValueError: no inputs, values that are not finite or not floating point, or shapes that do not fit.
    """
    if inputs.dim() < 2 or not len(inputs):
        raise ValueError(f"there are no inputs in shape {tuple(inputs.shape)}: give at least one, in a batch (N, …)")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs are {inputs.dtype}: give floating point, as pixels in [0, 1]")
    try:
        start = torch.as_tensor(baselines, dtype=inputs.dtype, device=inputs.device).detach().expand_as(inputs)
        classes = torch.as_tensor(target, device=inputs.device).expand(len(inputs))
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = (tuple(getattr(value, "shape", ())) for value in (baselines, target))
        raise ValueError(
            f"baselines of shape {next(shapes)} and target of shape {next(shapes)} do not fit {len(inputs)} inputs of "
            f"shape {tuple(inputs.shape)}: give numbers, or baselines of that shape and one class an input, "
            f"({len(inputs)},)"
        ) from error
    if classes.dtype not in WHOLE:
        raise ValueError(f"target is {classes.dtype}, and no class: give whole numbers")
    check_finite(inputs, "inputs")
    check_finite(start, "baselines")
    return inputs.detach(), start, classes.long()


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError if rows of `values`, (N, …), hold NaN or infinity; the message counts them."""
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(values)} {what} hold NaN or infinity: remove or repair them first")
