"""What a training step must do at least.

The floor of a step is a model: the multiply-accumulates of its layers at the rate of a large convolution, or the bytes
that its operations read and write at the rate of a large copy, whichever takes longer. Operations on the same values in
a row find some of them in the caches, which a copy that is larger than the caches does not: a step may beat its floor.
"""

import math

import pandas as pd
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from kdig_utils.experiments.evidence import TRAIN_IMAGES
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


def layer_elements(model: nn.Module) -> pd.DataFrame:
    """Values that go into and come out of each layer for one image: columns layer, kind, inputs, outputs.

    A row for each convolution, batch norm, ReLU6 and residual sum; a block without a shortcut only calls its layers.
    """
    calls = models.layer_calls(model, nn.Conv2d | nn.BatchNorm2d | nn.ReLU6 | InvertedResidual)
    return pd.DataFrame(
        {"layer": call.name, "kind": KINDS[type(call.layer)], "inputs": call.inputs, "outputs": call.outputs}
        for call in calls
        if getattr(call.layer, "use_res_connect", True)
    )


def step_macs(model: nn.Module, batch_size: int) -> int:
    """Multiply-accumulates of a training step; a little too many, as nobody needs the gradient of the pixels."""
    return PASSES * batch_size * models.count_macs(model)


def step_bytes(model: nn.Module, batch_size: int, value_bytes: int, traffic: dict[str, tuple[int, int]]) -> int:
    """Bytes that a training step reads and writes, batch preparation, head and loss left out.

    Args:
        value_bytes: of an activation and its gradient, 2 in bfloat16 and 4 in float32.
        traffic: `EAGER`, `FUSED` or `WITHIN`.
    """
    sums = layer_elements(model).groupby("kind")[["inputs", "outputs"]].sum()
    values = sum(int((sums.loc[kind] * times).sum()) for kind, times in traffic.items() if kind in sums.index)
    return batch_size * value_bytes * values + ADAM_BYTES * models.count_parameters(model)


def students_per_hour(step_seconds: float, spec: RunSpec, epoch_end_seconds: float = 0.0) -> float:
    """Finished runs of `spec` an hour, if a step of one student, and what comes between two epochs, cost this much."""
    return 3600 / (spec.epochs * (step_seconds * math.ceil(TRAIN_IMAGES / spec.batch_size) + epoch_end_seconds))
