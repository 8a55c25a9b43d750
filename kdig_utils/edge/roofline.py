"""What a network could take at best: the machine's peaks, the network's work and traffic, and where its time goes.

The roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785): a layer cannot be faster than
its multiply-accumulates at the machine's peak, nor than its bytes at the machine's bandwidth.
"""

import importlib.util
import json
import tempfile
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from kdig_utils.edge.timing import torch_threads
from kdig_utils.method import models

MATRIX = 1024  # rows and columns of the product that shows the peak
BYTES = {"fp32": 4, "int8": 1}
PROFILE_CALLS = 400
WARM_CALLS = 100


class Peak(NamedTuple):
    """What this machine can do: multiply-accumulates a second in either precision, and bytes a second."""

    fp32: float
    int8: float
    bandwidth: float

    def seconds(self, macs: float, moved: float, precision: str) -> float:
        """The least time for so many multiply-accumulates and bytes."""
        return max(macs / getattr(self, precision), moved / self.bandwidth)


def peak(threads: int, moved: float, seconds: float = 0.3) -> Peak:
    """Measure the machine: products of 1024 × 1024 matrices in PyTorch and, if it is here, ONNX Runtime; a copy.

    In 8 bits ONNX Runtime alone is asked if it is here: PyTorch's product is a plain loop where oneDNN is absent.

    Args:
        moved: bytes that the copy reads and writes; as many as a layer moves, so that the same cache is met.
        seconds: for each of the four measurements.
    """
    rng = np.random.default_rng(0)
    floats = rng.random((MATRIX, MATRIX), np.float32)
    pixels, weights = (rng.integers(low, low + 255, (MATRIX, MATRIX)) for low in (0, -127))
    pixels, weights = pixels.astype(np.uint8), weights.astype(np.int8)
    first, second = torch.from_numpy(floats), torch.from_numpy(weights)
    products = {"fp32": [lambda: first @ first], "int8": [lambda: torch._int_mm(second, second)]}
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        products["fp32"].append(_product("MatMul", floats, floats, threads))
        products["int8"] = [_product("MatMulInteger", pixels, weights, threads)]
    macs = {
        precision: MATRIX**3 / min(_seconds(call, threads, seconds) for call in calls)
        for precision, calls in products.items()
    }
    source = torch.ones(int(moved / 8))
    target = torch.empty_like(source)
    copied = 8 * len(source) / _seconds(lambda: target.copy_(source), threads, seconds)
    return Peak(macs["fp32"], macs["int8"], copied)


def _seconds(call: Callable[[], object], threads: int, seconds: float) -> float:
    """The best of three means: a peak is what the machine can do when nothing disturbs it."""
    timer = timeit.Timer(call)
    with torch_threads(threads):
        timer.timeit(1)
        calls = max(1, int(seconds / 3 / timer.timeit(1)))
        return min(timer.repeat(3, calls)) / calls


def _product(kind: str, left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], object]:
    """A call that multiplies two matrices in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    code = helper.np_dtype_to_tensor_dtype(left.dtype)
    result = TensorProto.FLOAT if kind == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", code, left.shape)],
        [helper.make_tensor_value_info("product", result, left.shape)],
        [numpy_helper.from_array(right, "right")],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def layers(model: nn.Module) -> pd.DataFrame:
    """Each convolution and linear layer, in order, for one image: kind, macs, weights, activations (in and out)."""
    return pd.DataFrame(
        {
            "kind": kind(layer),
            "macs": layer.weight[0].numel() * outputs,
            "weights": layer.weight.numel() + len(layer.weight),
            "activations": inputs + outputs,
        }
        for _name, layer, inputs, outputs in models.layer_calls(model, nn.Conv2d | nn.Linear)
    )


def kind(layer: nn.Module) -> str:
    """What a layer is: linear, depthwise, pointwise (1 × 1), or a full convolution."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if layer.groups > 1:
        return "depthwise"
    return "pointwise" if layer.kernel_size == (1, 1) else "convolution"


def largest_traffic(table: pd.DataFrame, precision: str, batch: int) -> float:
    """Bytes that the busiest layer moves for a batch."""
    return float(((table["weights"] + batch * table["activations"]) * BYTES[precision]).max())


def predicted_ms(table: pd.DataFrame, precision: str, batch: int, machine: Peak) -> tuple[float, float]:
    """The least time of a batch in milliseconds: by multiply-accumulates alone, and by the roofline of each layer."""
    macs = batch * table["macs"]
    moved = (table["weights"] + batch * table["activations"]) * BYTES[precision]
    by_layer = [machine.seconds(*pair, precision) for pair in zip(macs, moved, strict=True)]
    return 1e3 * float(macs.sum()) / getattr(machine, precision), 1e3 * sum(by_layer)


def operator_profile(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Where a call of an ONNX file goes, one thread, one image: columns operator, nodes, us, macs.

    Convolutions are told apart by the layers of `table`, which come in the same order. `between operators` is what is
    left of the call: ONNX Runtime's own work, and the profiler's.
    """
    events = list(_profiled(path))
    calls = [event["dur"] for event in events if event["name"] == "model_run"][WARM_CALLS:]
    nodes = [event for event in events if event["name"].endswith("kernel_time")]
    frame = pd.DataFrame({"name": e["name"], "operator": e["args"]["op_name"], "us": e["dur"]} for e in nodes)
    frame = frame.groupby(["name", "operator"], sort=False)["us"].agg(_typical).reset_index()
    convolutions = frame["operator"].str.contains("Conv")
    of_layers = table[table["kind"] != "linear"]
    frame["macs"] = 0.0
    frame.loc[convolutions, "macs"] = of_layers["macs"].to_numpy(float)
    frame.loc[convolutions, "operator"] = of_layers["kind"].to_numpy()
    found = frame.groupby("operator").agg(nodes=("us", "size"), us=("us", "sum"), macs=("macs", "sum"))
    found.loc["between operators"] = [0, _typical(pd.Series(calls)) - found["us"].sum(), 0]
    return found.sort_values("us", ascending=False).reset_index()


def _typical(times: pd.Series) -> float:
    """The trimmed mean: finer than the median of whole microseconds."""
    return float(stats.trim_mean(times.iloc[WARM_CALLS:] if len(times) > PROFILE_CALLS // 2 else times, 0.2))


def _profiled(path: Path) -> Iterator[dict]:
    """The events of ONNX Runtime's profiler for 400 calls."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
    elements = onnx.load(path).graph.input[0].type.tensor_type.elem_type
    image = np.zeros((1, 3, 32, 32), onnx.helper.tensor_dtype_to_np_dtype(elements))
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _call in range(PROFILE_CALLS):
            session.run(None, {"images": image})
        yield from json.loads(Path(session.end_profiling()).read_text())
