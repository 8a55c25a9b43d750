"""Integrated Gradients of inputs by secants: the path in graded intervals, some at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdig_utils.method.integrated_gradients import integrated_gradients
from kdig_utils.method.secants import SecantNetwork, derivative

GRADING = 0.2  # the points' density falls as 1 / (a + GRADING); tried on the teacher (chapter 04), harmless elsewhere


def graded_points(steps: int) -> Tensor:
    """Ends of `steps` intervals of [0, 1], float64 of shape (steps + 1,), denser near the baseline.

    Their density is proportional to 1 / (a + `GRADING`): a step changes the contrast by the same factor.
    """
    exponents = torch.arange(steps + 1, dtype=torch.float64) / steps
    points = GRADING * ((1 + 1 / GRADING) ** exponents - 1)
    points[-1] = 1
    return points


@torch.no_grad()
def secant_attributions(
    network: SecantNetwork,
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    steps: int,
    output: str = "logit",
    internal_batch_size: int = 48,
) -> Tensor:
    """Integrated Gradients by the secants of `steps` graded intervals, the shape of `inputs`.

    Args:
        baselines: broadcasts to `inputs`; one for all of them is evaluated only once.
    """
    baselines = with_batch(baselines.to(inputs), inputs)
    points, found = graded_points(steps), torch.empty_like(inputs)
    chunk = min(steps, internal_batch_size)
    shared = _start(network, baselines) if len(baselines) == 1 else None
    for part in torch.arange(len(inputs)).split(max(1, internal_batch_size // chunk)):
        start = shared or _start(network, baselines[part])
        total = _along(network, network.entrance(inputs[part]), start, targets[part], points, output, chunk)
        origin = baselines if len(baselines) == 1 else baselines[part]
        found[part] = (inputs[part] - origin) * network.entrance_vjp(inputs[part], total)
    return found


class _Start(NamedTuple):
    """The baselines, seen from inside the network."""

    entrance: Tensor
    outputs: Tensor
    left: dict[str, Tensor]


def _start(network: SecantNetwork, baselines: Tensor) -> _Start:
    entrance = network.entrance(baselines)
    return _Start(entrance, *network.values(entrance))


def _along(
    network: SecantNetwork, end: Tensor, start: _Start, targets: Tensor, points: Tensor, output: str, chunk: int
) -> Tensor:
    """The average of the multipliers at the entrance over the path, for images (n, …); `chunk` steps at a time."""
    n, total = len(end), torch.zeros_like(end)
    left, before = dict(start.left), start.outputs.expand(n, -1)
    layout = torch.channels_last if end.dim() == 4 else torch.contiguous_format
    for steps in torch.arange(1, len(points)).split(chunk):
        alpha = points[steps].to(end).view(-1, *[1] * end.dim())
        rows = (start.entrance + alpha * (end - start.entrance)).flatten(0, 1).contiguous(memory_format=layout)
        outputs, tape = network.advance(rows, left, n)
        above = torch.cat([before, outputs[:-n]])
        multipliers = network.multipliers(tape, _output_multipliers(above, outputs, targets.repeat(len(steps)), output))
        widths = (points[steps] - points[steps - 1]).to(end).view(-1, *[1] * end.dim())
        total += (widths * multipliers.to(end.dtype).view(len(steps), *end.shape)).sum(0)
        before = outputs[-n:]
    return total


def _output_multipliers(before: Tensor, after: Tensor, targets: Tensor, output: str) -> Tensor:
    """What each logit's move contributes to the output's, (rows, classes); their sum over the moves is exact."""
    if output == "logit":
        return torch.zeros_like(after).scatter_(1, targets.unsqueeze(1), 1)
    moved = after - before
    mean = integrated_gradients(
        lambda logits: output_of(logits, output), after, before, targets, 8, internal_batch_size=len(after) * 8
    )
    # What the quadrature leaves of the exact rise goes where the logits moved most, unless it is but rounding.
    ends = [picked(logits, targets, output) for logits in (before, after)]
    rest = ends[1] - ends[0] - mean.sum(1)
    rounding = 8 * torch.finfo(moved.dtype).eps * torch.maximum(ends[0].abs(), ends[1].abs())
    rest = torch.where(rest.abs() <= rounding, 0, rest)
    mean = mean + (moved**2 / (moved**2).sum(1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)) * rest[:, None]
    still = moved == 0
    slopes = derivative(lambda logits: picked(logits, targets, output), before + moved / 2)
    return torch.where(still, slopes, mean / torch.where(still, 1, moved))


def output_of(logits: Tensor, output: str) -> Tensor:
    if output == "log_probability":
        return logits.log_softmax(1)
    return logits.softmax(1) if output == "probability" else logits


def picked(logits: Tensor, targets: Tensor, output: str) -> Tensor:
    return output_of(logits, output).gather(1, targets.unsqueeze(1)).squeeze(1)


def with_batch(baselines: Tensor, inputs: Tensor) -> Tensor:
    """(1, …) if the baseline is one for all inputs, else (N, …)."""
    if baselines.dim() == inputs.dim() and len(baselines) > 1:
        same = bool((baselines == baselines[:1]).all())
        return baselines[:1] if same else baselines.expand_as(inputs)
    return baselines.expand(len(baselines) if baselines.dim() == inputs.dim() else 1, *inputs.shape[1:])
