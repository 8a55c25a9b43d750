"""What a training step must do at least, what a device can do, and where a step's time goes.

The floor of a step is a model: the multiply-accumulates of its layers at the rate of a large convolution, or the bytes
that its operations read and write at the rate of a large copy, whichever takes longer. Operations on the same values in
a row find some of them in the caches, which a copy that is larger than the caches does not: a step may beat its floor.
"""

import functools
import math
import operator
import os
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.models.mobilenetv2 import InvertedResidual

from kdig_utils.method import models
from kdig_utils.method.spec import RunSpec

KINDS = {nn.Conv2d: "convolution", nn.BatchNorm2d: "batch norm", nn.ReLU6: "ReLU6", InvertedResidual: "residual sum"}
# Times that a step reads or writes each input and each output of a layer, forward and backward together, if
# every operation goes through memory:
# convolution: input read, read again for the weights' gradient, its gradient written; output written, its gradient
# read for the weights and for the input. Batch norm: read for the statistics, read, written; backward a reduction
# over two tensors, then two read and one written. ReLU6 in place: read, written; two read, one written.
# A residual sum: two read, one written; the same backward, where two gradients are added.
EAGER = {"convolution": (3, 3), "batch norm": (0, 8), "ReLU6": (0, 5), "residual sum": (0, 6)}
# ReLU6, its derivative and the sum are computed while batch norm has the value at hand, as torch.compile does.
FUSED = {"convolution": (3, 3), "batch norm": (0, 8), "ReLU6": (0, 0), "residual sum": (0, 3)}
# Batch norm and ReLU6 within the convolutions on both sides, by kernels that nobody has written here. Statistics and
# reductions are made while the values are written, and the next convolution normalises what it reads: inputs as above;
# the raw output written, then it and its gradient read, once for the input and once for the weights.
WITHIN = {"convolution": (3, 5), "batch norm": (0, 0), "ReLU6": (0, 0), "residual sum": (0, 3)}
TRAFFIC = {"every operation by itself": EAGER, "element-wise operations fused": FUSED, "within convolutions": WITHIN}
ADAM_BYTES = 28  # a parameter: weight, gradient and two moments read, weight and moments written, four bytes each
PASSES = 3  # of multiply-accumulates: forward, gradient of the inputs, gradient of the weights
CHANNELS, SIDE = 512, 32  # of the convolution that the rate of multiply-accumulates is measured on
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # larger than any cache
RATE_IMAGES = {"cpu": 4, "cuda": 64}
PARTS = {
    "convolution": ("conv",),
    "batch norm": ("batch_norm",),
    "ReLU6": ("hardtanh",),
    "optimiser": ("Optimizer",),
    "batch preparation": ("aten::index", "aten::pad", "aten::where", "aten::arange"),
}
OTHER = "everything else"


class Rates(NamedTuple):
    """What a device does in a second, measured: multiply-accumulates and bytes read or written."""

    macs: float
    bytes: float


def layer_elements(model: nn.Module) -> pd.DataFrame:
    """Values that go into and come out of each layer for one image: columns layer, kind, inputs, outputs.

    A row for each convolution, batch norm, ReLU6 and residual sum.
    """
    calls = models.layer_calls(model, functools.reduce(operator.or_, KINDS))
    return pd.DataFrame(
        {"layer": call.name, "kind": KINDS[type(call.layer)], "inputs": call.inputs, "outputs": call.outputs}
        for call in calls
        if type(call.layer) in KINDS and adds(call.layer)
    )


def adds(layer: nn.Module) -> bool:
    """Whether the layer does something of its own: a block without a shortcut only calls its layers."""
    return not isinstance(layer, InvertedResidual) or layer.use_res_connect


def step_macs(model: nn.Module, batch_size: int) -> int:
    """Multiply-accumulates of a training step: three times those of the forward pass.

    A little too many: nobody needs the gradient of the pixels.
    """
    return PASSES * batch_size * models.count_macs(model)


def step_bytes(model: nn.Module, batch_size: int, value_bytes: int, traffic: dict[str, tuple[int, int]]) -> int:
    """Bytes that a training step reads and writes, batch preparation, head and loss left out.

    Args:
        value_bytes: of an activation and its gradient, 2 in bfloat16 and 4 in float32.
        traffic: `EAGER`, `FUSED` or `WITHIN`.
    """
    layers = layer_elements(model)
    reads = layers["kind"].map({kind: times[0] for kind, times in traffic.items()})
    writes = layers["kind"].map({kind: times[1] for kind, times in traffic.items()})
    values = int((layers["inputs"] * reads + layers["outputs"] * writes).sum())
    return batch_size * value_bytes * values + ADAM_BYTES * models.count_parameters(model)


def floor_seconds(
    model: nn.Module, batch_size: int, value_bytes: int, traffic: dict[str, tuple[int, int]], rates: Rates
) -> float:
    """The least time of a training step: arithmetic or memory, whichever takes longer."""
    moved = step_bytes(model, batch_size, value_bytes, traffic)
    return max(step_macs(model, batch_size) / rates.macs, moved / rates.bytes)


def students_per_hour(
    step_seconds: float, spec: RunSpec, n_images: int = 50_000, epoch_end_seconds: float = 0.0
) -> float:
    """Finished runs of `spec` an hour, if a step of one student, and what comes between two epochs, cost this much."""
    return 3600 / (spec.epochs * (step_seconds * math.ceil(n_images / spec.batch_size) + epoch_end_seconds))


def measured_rates(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Rates:
    """What the device reaches, median of many calls: a large 1 × 1 convolution, a copy larger than its caches.

    Args:
        seconds: for each of the two.
    """
    n, kind = RATE_IMAGES[device.type], {"device": device, "dtype": dtype}
    images = torch.randn(n, CHANNELS, SIDE, SIDE, **kind).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, **kind).contiguous(memory_format=torch.channels_last)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    macs = n * SIDE**2 * CHANNELS**2
    return Rates(
        macs / call_seconds(lambda: F.conv2d(images, weight), seconds),
        2 * len(source) / call_seconds(lambda: target.copy_(source), seconds),  # read and written
    )


def call_seconds(function: Callable[[], object], seconds: float) -> float:
    """Median time of a call, warmed up, the device waited for."""
    from torch.utils import benchmark  # only where it is needed: it warns of a missing CUDA compiler

    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def profiled(step: Callable[[], object], steps: int) -> profile:
    """`steps` calls on the CPU under PyTorch's profiler, after as many without it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library writes into the chapter that calls it
    for _step in range(steps):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _step in range(steps):
            step()
    return found


def timeline(found: profile) -> pd.DataFrame:
    """When each part of a step was at work: columns part, start, milliseconds (both in ms since the first event).

    The outermost operations that `PARTS` names; what lies between them, Python and small operations, has no row.
    """
    events = found.events()
    first = min(event.time_range.start for event in events)
    rows = [
        {
            "part": part_of(event.name),
            "start": (event.time_range.start - first) / 1000,
            "milliseconds": event.time_range.elapsed_us() / 1000,
        }
        for event in events
        if part_of(event.name) != OTHER and not within_part(event)
    ]
    return pd.DataFrame(rows).sort_values("start", ignore_index=True)


def within_part(event: FunctionEvent) -> bool:
    """Whether an operation that `PARTS` names called this one."""
    caller = event.cpu_parent
    while caller is not None and part_of(caller.name) == OTHER:
        caller = caller.cpu_parent
    return caller is not None


def part_of(operation: str) -> str:
    """The part of a training step that an operation of the profiler belongs to, by its name."""
    for part, words in PARTS.items():
        if any(word in operation for word in words):
            return part
    return OTHER


def shares(found: profile) -> pd.DataFrame:
    """Where the time went: columns part, operations, share (per cent of the whole time), largest first."""
    parts, events = timeline(found), found.events()
    whole = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    table = parts.groupby("part")["milliseconds"].agg(operations="size", share=lambda ms: 100_000 * ms.sum() / whole)
    table.loc[OTHER] = [len(events) - len(parts), 100 - table["share"].sum()]
    return table.sort_values("share", ascending=False).astype({"operations": int}).reset_index()
