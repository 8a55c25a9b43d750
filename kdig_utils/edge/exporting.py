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
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        fp32, floats = Path(name) / "fp32.onnx", Path(name) / "int8.onnx"
        export_onnx(model, fp32)
        quantise_onnx(fp32, floats, calibration_images())
        take_bytes(floats, path)


def calibration_images() -> Tensor:
    """The training images that calibrate, (500, 3, 32, 32) in [0, 1]: half of those that come with the repository."""
    train = cifar10.load_sample("train")
    return train.images(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES])


def quantise_onnx(fp32_path: Path, int8_path: Path, calibration_images: Tensor) -> None:
    """Write an ONNX file with 8-bit weights (a scale each channel) and activations (a scale each tensor).

    Integer arithmetic as in Jacob et al. (arXiv 1712.05877), a scale each channel and no retraining as in
    Krishnamoorthi (arXiv 1806.08342): the scales come from the ranges that the calibration images, (N, 3, 32, 32) in
    [0, 1], reach; weights are symmetric, biases have 32 bits. Input and output stay float32. Only what computes is
    kept: no names of layers, no shapes, no zero points that are zero.

    Raises:
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    import onnx
    from onnxruntime import quantization

    batches = iter([{"images": batch.numpy()} for batch in calibration_images.split(CALIBRATION_BATCH)])
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
        onnx.save(_slimmed(onnx.load(part)), part)


def take_bytes(path: Path, bytes_path: Path) -> None:
    """Write the 8-bit network of `path` so that `images` are the bytes of the pixels, 0 to 255, (N, 3, 32, 32).

    A pixel is a byte to begin with: turning it into a float of n / 255, which the first layer turns back into the
    byte n, is work without a result. The logits stay the same.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    first = next(node for node in graph.node if "images" in node.input)
    if first.op_type == "QuantizeLinear":
        scale = next(value for value in graph.initializer if value.name == first.input[1])
        scale.CopyFrom(numpy_helper.from_array(np.array(1 / 255, np.float32), scale.name))
        graph.node.remove(first)
        _rename_input(graph, first.output[0], "images")
    else:  # the teacher normalises first, in float32
        graph.initializer.append(numpy_helper.from_array(np.array(1 / 255, np.float32), "byte"))
        _rename_input(graph, "images", "pixels")
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["images", "byte"], ["pixels"]))
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    with replacing(bytes_path) as part:
        onnx.save(model, part)


def _rename_input(graph: "onnx.GraphProto", before: str, after: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == before:
                node.input[place] = after


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
    slim = onnx.helper.make_graph(
        nodes, "kdig", graph.input, graph.output, [value for value in graph.initializer if value.name in used]
    )
    _shorten_names(slim)
    return onnx.helper.make_model(slim, opset_imports=model.opset_import, ir_version=model.ir_version)


def _shorten_names(graph: "onnx.GraphProto") -> None:
    names = {"": ""} | {value.name: value.name for value in (*graph.input, *graph.output)}

    def short(name: str) -> str:
        return names.setdefault(name, f"{len(names):x}")

    for node in graph.node:
        node.name = node.doc_string = ""
        for slots in (node.input, node.output):
            slots[:] = [short(name) for name in slots]
    for value in graph.initializer:
        value.name = short(value.name)


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
