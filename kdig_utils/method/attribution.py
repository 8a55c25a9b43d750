"""Integrated Gradients with a contract: ask for an accuracy, be told what was reached and what it cost.

The error is an estimate of the relative distance to the exact attributions, and never below the completeness error
that was measured. Completeness alone would not do: the secant rule is complete with any number of steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdig_utils.method.checks import check_number
from kdig_utils.method.integrated_gradients import (
    as_given,
    check_finite,
    check_mode,
    check_targets,
    integrated_gradients,
    outputs_of,
)
from kdig_utils.method.secants import SecantNetwork, secant_attributions
from kdig_utils.method.tracing import NotASecantNetwork

RISE_FLOOR = 1e-3
CHECK_REPEATS = 8
HALF_ERROR = 0.01  # the smallest error for which products in bfloat16 are exact enough
_ORDER = 1.67  # by which the error of the secant rule falls on the teacher; only a first guess of the steps rests on it

Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # attributions from inputs, baselines, targets and steps


@dataclass(frozen=True)
class Attribution:
    """Attributions of N inputs, and how far to trust them.

    Attributes:
        attributions: the shape of the inputs, in units of the output.
        error: (N,), the larger of `completeness` and of half the distance (sum of absolute differences, relative to the
            sum of absolute attributions) between the result and that of half as many steps. For rules whose error
            falls at least in proportion to the steps, that half is at least half of the true distance; on the teacher
            it is about the true distance, as tests and the benchmark measure.
        completeness: (N,), |sum of attributions - rise| / max(|rise|, `RISE_FLOOR` · sum of |attributions|). Where the
            output hardly changes from baseline to input, an error relative to the change would mean nothing.
        evaluations: (N,), forward and backward passes along the path of each input, those of refused attempts included;
            the few forward passes of the checks and at both ends come on top.
        converged: (N,), whether `error` is within what was asked for.
        rule: `secant`, or `gradient` where the network has operations without a secant.
    """

    attributions: Tensor
    error: Tensor
    completeness: Tensor
    evaluations: Tensor
    converged: Tensor
    rule: str


def attribute(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baselines: Tensor | float = 0.0,
    target: Tensor | int = 0,
    error: float = 0.01,
    max_steps: int = 512,
    internal_batch_size: int = 32,
    compiled: bool = False,
) -> Attribution:
    """Integrated Gradients of `inputs` to within a relative `error`, with as few evaluations as each input needs.

    Args:
        model: differentiable, in evaluation mode, (N, …) to (N, classes); it is left as it is.
        inputs: shape (N, …).
        baselines: a number, or a tensor that broadcasts to `inputs`.
        target: the class whose output is explained, one for all or one an input.
        error: what `Attribution.error` should be at most.
        max_steps: steps after which an input is given up and marked as not converged.
        internal_batch_size: points of the path in one forward and backward pass; bounds the memory.
        compiled: as for `SecantNetwork`; pays from some hundred images on.

    Raises:
        ValueError: batch norm in training mode, active dropout, an output that is not deterministic or depends on the
            rest of the batch, inputs, baselines or outputs that are not finite or of another type or shape, or a
            setting out of range.
    """
    for name, value in {"error": error, "max_steps": max_steps, "internal_batch_size": internal_batch_size}.items():
        check_number(name, value)
    max_steps, internal_batch_size = int(max_steps), int(internal_batch_size)
    check_mode(model)
    inputs, baselines, targets = as_given(inputs, baselines, target)
    check_model(model, inputs, baselines, targets)
    rise = _rise(model, inputs, baselines, targets, internal_batch_size)
    refine = partial(_refine, inputs, baselines, targets, rise, error, max_steps)
    try:
        network = _secant_network(model, inputs, error, compiled)
        return refine("secant", partial(secant_attributions, network, internal_batch_size=internal_batch_size))
    except NotASecantNetwork:
        return refine("gradient", partial(integrated_gradients, model, internal_batch_size=internal_batch_size))


def check_model(model: Callable[[Tensor], Tensor], inputs: Tensor, baselines: Tensor, targets: Tensor) -> None:
    """Raise ValueError where gradients of `model` would not be those of one function of one input."""
    pair = torch.cat([inputs[:1], baselines.expand_as(inputs)[:1]])
    pair = pair.repeat(CHECK_REPEATS, *[1] * (pair.dim() - 1))  # a layer that drops one row in ten must be noticed
    with torch.no_grad():
        once, again, alone = (outputs_of(model, rows) for rows in (pair, pair, pair[:1]))
    if not once.isfinite().all():
        raise ValueError(
            "the model's output holds NaN or infinity at the first input or its baseline: repair the model"
        )
    check_targets(targets, once.shape[1])
    tolerance = 1e-3 * float(once.abs().max()) + 1e-6
    if float((once - again).abs().max()) > tolerance:
        raise ValueError("the model gives two outputs for one input: switch off what is random in it")
    if float((once[:1] - alone).abs().max()) > tolerance:
        raise ValueError(
            "the output for an input depends on the rest of its batch: attribute a model that is in eval()"
        )


@torch.no_grad()
def _rise(
    model: Callable[[Tensor], Tensor], inputs: Tensor, baselines: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    high, low = (torch.cat([model(rows.clone()) for rows in part.split(batch_size)]) for part in (inputs, baselines))
    rise = (high - low).gather(1, targets.unsqueeze(1)).squeeze(1)
    check_finite(rise.unsqueeze(1), "outputs")
    return rise


def half_pays(device: torch.device) -> bool:
    """Whether bfloat16 products are faster on `device` and tried there: processors with AVX512-BF16."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _secant_network(model: Callable[[Tensor], Tensor], inputs: Tensor, error: float, compiled: bool) -> SecantNetwork:
    """Secants, where the network has them and then gives the same answer."""
    half = half_pays(inputs.device) and inputs.dtype == torch.float32 and error >= HALF_ERROR
    network = SecantNetwork(model, half, compiled)
    for rows in (inputs[:1], torch.cat([inputs[:1]] * 2)):  # another dimension has not both lengths of the batch
        with torch.no_grad():
            found, expected = network.advance(network.entrance(rows), {}, len(rows))[0], model(rows.clone())
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6):
            raise NotASecantNetwork("its frozen copy gives another answer")
    return network


def _refine(
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    rise: Tensor,
    error: float,
    max_steps: int,
    name: str,
    rule: Rule,
) -> Attribution:
    """Double the steps of those inputs whose error is still too large."""
    # Half of the steps that usually reach the error.
    n, steps = len(inputs), min(max(2, math.ceil(4 * (0.055 / error) ** (1 / _ORDER))), max_steps // 2)
    result, reached = torch.zeros_like(inputs), inputs.new_full((n,), math.inf)
    completeness, evaluations = reached.clone(), torch.full((n,), steps, device=inputs.device)
    open_, coarse = torch.arange(n, device=inputs.device), rule(inputs, baselines, targets, steps)
    while len(open_) and 2 * steps <= max_steps:
        steps *= 2
        fine = rule(inputs[open_], baselines[open_], targets[open_], steps)
        result[open_], evaluations[open_] = fine, evaluations[open_] + steps
        completeness[open_], reached[open_] = _errors(fine, coarse, rise[open_])
        keep = reached[open_] > error
        open_, coarse = open_[keep], fine[keep]
    return Attribution(result, reached, completeness, evaluations, reached <= error, name)


def _errors(fine: Tensor, coarse: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
    """Completeness error and estimated error of attributions, (N,) each."""
    tiny = torch.finfo(fine.dtype).tiny
    mass = fine.abs().flatten(1).sum(1)
    scale = torch.maximum(rise.abs(), RISE_FLOOR * mass).clamp_min(tiny)
    completeness = (fine.flatten(1).sum(1) - rise).abs() / scale
    return completeness, torch.maximum(completeness, (fine - coarse).abs().flatten(1).sum(1) / 2 / mass.clamp_min(tiny))
