r"""Integrated Gradients (Sundararajan et al., arXiv 1703.01365), written to be read.

The attribution of input feature :math:`i` is the path integral of the gradient from a baseline :math:`x'` to :math:`x`:

.. math:: \mathrm{IG}_i(x) = (x_i - x'_i) \int_0^1 \frac{\partial F(x' + \alpha (x - x'))}{\partial x_i} \, d\alpha
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kdig_utils.method.checks import check_choice

QUADRATURES = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")
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

    The names and the defaults of the quadrature are Captum's; memory is bounded by `internal_batch_size` evaluations,
    however many images and steps there are.

    Args:
        forward_func: differentiable model in evaluation mode, (N, …) to (N, classes).
        inputs: shape (N, …).
        baselines: a number, or a tensor that broadcasts to `inputs`.
        target: the class whose output is explained, one for all or one an input.
        n_steps: evaluations along the path.
        method: one of `QUADRATURES`.
        internal_batch_size: evaluations in one forward and backward pass.

    Raises:
        ValueError: unknown `method`, `n_steps` below 1, a target outside the classes, or inputs or baselines
            that are not finite.
    """
    check_finite(inputs, "inputs")
    alphas, weights = quadrature(method, n_steps)
    baselines = torch.as_tensor(baselines, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
    check_finite(baselines, "baselines")
    difference, total = inputs - baselines, torch.zeros_like(inputs)
    image, step = torch.arange(len(inputs)).repeat_interleave(n_steps), torch.arange(n_steps).repeat(len(inputs))
    targets = torch.as_tensor(target, device=inputs.device).expand(len(inputs))
    for pairs in torch.arange(len(image)).split(internal_batch_size):
        i, s = image[pairs].to(inputs.device), step[pairs]
        alpha, weight = (values[s].to(inputs).view(-1, *[1] * (inputs.dim() - 1)) for values in (alphas, weights))
        gradients = input_gradients(forward_func, baselines[i] + alpha * difference[i], targets[i])
        total.index_add_(0, i, weight * gradients)
    return difference * total


def quadrature(method: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """Points and weights of a rule on [0, 1], float64 of shape (n_steps,); the weights sum to one.

    Captum 0.9 agrees, but for its trapezoid: those weights sum to (n_steps - 1) / n_steps.

    Raises:
        ValueError: unknown `method`, or fewer steps than the rule needs (1; the trapezoid needs 2).
    """
    check_choice("method", method, QUADRATURES)
    least = 2 if method == "riemann_trapezoid" else 1
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
    """The paper's map: absolute attributions summed over the channels, (N, C, H, W) to (N, H, W)."""
    return attributions.abs().sum(1)


def baseline(name: str, images: Tensor, mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465), seed: int = 0) -> Tensor:
    """A baseline for each image, (N, 3, H, W) in [0, 1].

    `mean_colour` is the paper's: zeros after normalisation are the mean colour in pixels, and not black.

    Raises:
        ValueError: unknown `name`.
    """
    check_choice("baseline", name, BASELINES)
    if name == "mean_colour":
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
        ValueError: a target outside the classes.
    """
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        outputs = forward_func(points.clone())  # a clone: a model may overwrite its input
        if not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]:
            raise ValueError(f"target {targets.tolist()} is outside the {outputs.shape[1]} outputs of the model")
        return torch.autograd.grad(outputs.gather(1, targets.unsqueeze(1)).sum(), points)[0]


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError if rows of `values`, (N, …), hold NaN or infinity; the message counts them."""
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(values)} {what} hold NaN or infinity: remove or repair them before attributing"
        )
