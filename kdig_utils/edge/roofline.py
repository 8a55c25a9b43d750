"""What a network could take at best: the machine's peaks, and the network's work and traffic.

The roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785): a layer cannot be faster than
its multiply-accumulates at the machine's peak, nor than its bytes at the machine's bandwidth.
"""

import importlib.util
import time
import timeit
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from kdig_utils.edge.timing import torch_threads
from kdig_utils.method import models

MATRIX = 1024  # rows and columns of the product that shows the peak
BYTES = {"fp32": 4, "int8": 1}
PEAK_SECONDS = 0.1  # for each measurement


class Peak(NamedTuple):
    """What this machine can do: multiply-accumulates a second in either precision, and bytes a second."""

    fp32: float
    int8: float
    bandwidth: float


def peaks(
    tables: list[pd.DataFrame], settings: Iterable[tuple[int, int]], end: float
) -> tuple[dict[tuple[int, int], Peak], str]:
    """The machine's peaks by (batch size, threads), and in words why there is none for some; empty if all are there.

    Args:
        tables: the `layers` of the networks; a copy shows the bandwidth for as many bytes as the busiest layer moves.
        end: the moment of `time.monotonic` after which no measurement begins.
    """
    found: dict[tuple[int, int], Peak] = {}
    try:
        for batch, threads in settings:
            if time.monotonic() > end:
                return found, "no time to measure all peaks of the machine"
            found[batch, threads] = peak(threads, max(float(_traffic(table, "fp32", batch).max()) for table in tables))
    except Exception as error:  # a machine whose peaks cannot be measured still has its benchmark
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return found, f"the peaks of the machine could not be measured: {why}"
    return found, ""


def peak(threads: int, moved: float, seconds: float = PEAK_SECONDS) -> Peak:
    """Measure the machine: products of 1024 × 1024 matrices in PyTorch and, if it is here, ONNX Runtime; a copy.

    In 8 bits ONNX Runtime alone is asked if it is here: PyTorch's product is a plain loop where oneDNN is absent.

    Args:
        moved: bytes that the copy reads and writes; as many as a layer moves, so that the same cache is met.
        seconds: for each of the four measurements.
    """
    rng = np.random.default_rng(0)
    floats = rng.random((MATRIX, MATRIX), np.float32)
    pixels, weights = (rng.integers(low, low + 255, (MATRIX, MATRIX)) for low in (0, -127))
    first, second = torch.from_numpy(floats), torch.from_numpy(weights.astype(np.int8))
    exact: list[Callable[[], object]] = [lambda: first @ first]
    eight_bits: list[Callable[[], object]] = [lambda: torch._int_mm(second, second)]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        exact.append(_product("MatMul", floats, floats, threads))
        eight_bits = [_product("MatMulInteger", pixels.astype(np.uint8), weights.astype(np.int8), threads)]
    fp32, int8 = (MATRIX**3 / min(_seconds(call, threads, seconds) for call in calls) for calls in (exact, eight_bits))
    source = torch.ones(int(moved / 8))
    target = torch.empty_like(source)
    return Peak(fp32, int8, 8 * len(source) / _seconds(lambda: target.copy_(source), threads, seconds))


def _seconds(call: Callable[[], object], threads: int, seconds: float) -> float:
    """The best of three means: a peak is what the machine can do when nothing disturbs it."""
    timer = timeit.Timer(call)
    with torch_threads(threads):
        timer.timeit(1)
        calls = max(1, int(seconds / 3 / timer.timeit(1)))
        return min(timer.repeat(3, calls)) / calls


def _product(operator: str, left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], object]:
    """A call that multiplies two matrices in ONNX Runtime."""
    import onnxruntime
    from onnx import numpy_helper, parser

    kind, result = ("float", "float") if operator == "MatMul" else ("uint8", "int32")
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({kind}[{MATRIX},{MATRIX}] left) => '
        f"({result}[{MATRIX},{MATRIX}] product) {{ product = {operator}(left, right) }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(right, "right"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def layers(model: nn.Module) -> pd.DataFrame:
    """Each convolution and linear layer, in order, for one image: kind, macs, weights, activations (in and out)."""
    rows = []
    for _name, layer, inputs, outputs in models.layer_calls(model, nn.Conv2d | nn.Linear):
        weight = layer.get_parameter("weight")
        kind = "linear" if isinstance(layer, nn.Linear) else "convolution"
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.kernel_size == (1, 1)):
            kind = "depthwise" if layer.groups > 1 else "pointwise"
        row = {"kind": kind, "macs": weight[0].numel() * outputs, "weights": weight.numel() + len(weight)}
        rows.append({**row, "activations": inputs + outputs})
    return pd.DataFrame(rows)


def _traffic(table: pd.DataFrame, precision: str, batch: int) -> pd.Series:
    """Bytes that each layer moves for a batch."""
    return (table["weights"] + batch * table["activations"]) * BYTES[precision]


def predicted(table: pd.DataFrame, precision: str, batch: int, machine: Peak) -> dict[str, float]:
    """The least time of a batch, by multiply-accumulates alone and by the roofline of each layer, and the peaks.

    Returns:
        predicted_macs_ms, predicted_ms, peak_gmacs and bandwidth_gb; nothing for a precision without a known peak.
    """
    if precision not in BYTES:
        return {}
    macs_per_second = machine.fp32 if precision == "fp32" else machine.int8
    working = batch * table["macs"] / macs_per_second
    moving = _traffic(table, precision, batch) / machine.bandwidth
    return {
        "predicted_macs_ms": 1e3 * float(working.sum()),
        "predicted_ms": 1e3 * float(np.maximum(working, moving).sum()),
        "peak_gmacs": macs_per_second / 1e9,
        "bandwidth_gb": machine.bandwidth / 1e9,
    }
