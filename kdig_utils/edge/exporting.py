"""Networks as files for the edge: ONNX and ExecuTorch, in float32 and in 8 bits, calibrated on training images.

A writer takes a network in evaluation mode, for pixels in [0, 1], (N, 3, 32, 32), and the path of its file. Each
imports its packages itself: the others do without them.
"""

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdig_utils.method import cifar10
from kdig_utils.paths import replacing

if TYPE_CHECKING:
    import onnx

OPSET = 17
CALIBRATION_IMAGES = 500
CALIBRATION_BATCH = 50
LARGEST_BATCH = 64  # of an ExecuTorch file, which plans its memory when it is written


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write `images` → `logits`, (N, 10), in float32, batch norm folded into the convolutions, any batch size."""
    import onnx  # noqa: F401  # the exporter needs it, and says so in words of its own

    with replacing(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that needs no further package
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, 32, 32),),
            str(part),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def export_onnx_int8(model: nn.Module, path: Path) -> None:
    """Write the same in 8 bits, calibrated on `calibration_images`; its `images` are bytes, 0 to 255."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fp32 = Path(folder) / "fp32.onnx"
        export_onnx(model, fp32)
        quantise_onnx(fp32, path, takes_bytes=True)


def calibration_images() -> Tensor:
    """The training images that calibrate, (500, 3, 32, 32) in [0, 1]: half of those that come with the repository."""
    train = cifar10.load_sample("train")
    return train.images(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES])


def quantise_onnx(fp32_path: Path, int8_path: Path, takes_bytes: bool = False) -> None:
    """Write an ONNX file with 8-bit weights (a scale each channel) and activations (a scale each tensor).

    Integer arithmetic as in Jacob et al. (arXiv 1712.05877), a scale each channel and no retraining as in
    Krishnamoorthi (arXiv 1806.08342): the scales come from the ranges that the calibration images reach; weights are
    symmetric, biases have 32 bits. Input and output stay float32. Only what computes is kept.

    Args:
        takes_bytes: `images` are the bytes of the pixels, 0 to 255; the logits stay the same.

    Raises:
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    import onnx
    from onnxruntime import quantization

    batches = iter([{"images": batch.numpy()} for batch in calibration_images().split(CALIBRATION_BATCH)])
    with replacing(int8_path) as part, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # it recommends a step that this export does not need
        quantization.quantize_static(
            str(fp32_path),
            str(part),
            SimpleNamespace(get_next=lambda: next(batches, None)),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        network = _slimmed(onnx.load(part))
        if takes_bytes:
            _take_bytes(network.graph)
        onnx.save(network, part)


def _take_bytes(graph: "onnx.GraphProto") -> None:
    """Let `images` be bytes: to turn n into n / 255, which the first layer turns back into n, is work for nothing."""
    from onnx import TensorProto, helper, numpy_helper

    first = next(node for node in graph.node if "images" in node.input)
    quantised = first.op_type == "QuantizeLinear"  # else it is the teacher, which normalises first, in float32
    if quantised:
        scale = next(value for value in graph.initializer if value.name == first.input[1])
        graph.node.remove(first)
        renamed = {first.output[0]: "images"}
    else:
        scale = graph.initializer.add(name="byte")
        renamed = {"images": "pixels"}
    scale.CopyFrom(numpy_helper.from_array(np.array(1 / 255, np.float32), scale.name))
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    if not quantised:
        graph.node.insert(0, helper.make_node("DequantizeLinear", ["images", "byte"], ["pixels"]))
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _slimmed(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same network without what does not compute: in 8 bits, names and shapes are a sixth of the file."""
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    for node in graph.node:
        constant = node.op_type == "DequantizeLinear" and node.input[0] in constants and len(node.input) == 3
        if constant and not numpy_helper.to_array(constants[node.input[2]]).any():
            del node.input[2]  # symmetric: a zero point of 0 goes without saying
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in graph.node if used.intersection(node.output)]
    kept = [value for value in graph.initializer if value.name in used]
    names = {"": ""} | {value.name: value.name for value in (*graph.input, *graph.output)}
    for node in nodes:
        node.name = node.doc_string = ""
        for slots in (node.input, node.output):
            slots[:] = [names.setdefault(name, f"{len(names):x}") for name in slots]
    for value in kept:
        value.name = names[value.name]
    slim = onnx.helper.make_graph(nodes, "kdig", graph.input, graph.output, kept)
    return onnx.helper.make_model(slim, opset_imports=model.opset_import, ir_version=model.ir_version)


def export_executorch(model: nn.Module, path: Path) -> None:
    """Write a network for ExecuTorch, PyTorch's own runtime for devices, with its XNNPACK kernels, in float32."""
    _lower(_traced(model.to(memory_format=torch.contiguous_format)), path)


def export_executorch_int8(model: nn.Module, path: Path) -> None:
    """Write the same in 8 bits, weights with a scale each channel, calibrated on `calibration_images`."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import quantize_pt2e

    settings = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(settings)
    graph = _traced(model.to(memory_format=torch.contiguous_format)).module()
    watched = quantize_pt2e.prepare_pt2e(graph, quantizer)
    with torch.inference_mode():
        for batch in calibration_images().split(CALIBRATION_BATCH):
            watched(batch)
    _lower(_traced(quantize_pt2e.convert_pt2e(watched)), path)


def _traced(model: nn.Module) -> torch.export.ExportedProgram:
    images, batch = torch.zeros(LARGEST_BATCH, 3, 32, 32), torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))


def _lower(program: torch.export.ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with replacing(path) as part:
        part.write_bytes(lowered.buffer)
