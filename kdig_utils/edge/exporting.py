"""Networks as files for the edge: ONNX and ExecuTorch, in float32 and in 8 bits, calibrated on training images.

As a program, `python -m kdig_utils.edge.exporting WEIGHTS K FOLDER FORMAT...`, it writes one network in a process of
its own.
"""

import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.paths import replacing

if TYPE_CHECKING:  # each format imports its packages when it is written: the others do without them
    import onnx


OPSET = 17
CALIBRATION_IMAGES = 500
CALIBRATION_BATCH = 50
LARGEST_BATCH = 64  # of an ExecuTorch file, which plans its memory when it is written


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write a network as ONNX in float32, batch norm folded into the convolutions, any batch size.

    Args:
        model: in evaluation mode; takes pixels in [0, 1], (N, 3, 32, 32), as `images`, and gives `logits`, (N, 10).
    """
    import onnx  # noqa: F401  # the exporter needs it, and says so in words of its own

    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    with replacing(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that needs no further package
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, 32, 32),),
            str(part),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )


def quantise_onnx(fp32_path: Path, int8_path: Path, calibration_images: Tensor) -> None:
    """Write an ONNX file with 8-bit weights (a scale each channel) and activations (a scale each tensor).

    Integer arithmetic as in Jacob et al. (arXiv 1712.05877), a scale each channel and no retraining as in
    Krishnamoorthi (arXiv 1806.08342): the scales come from the ranges that the calibration images reach; weights are
    symmetric, biases have 32 bits. Input and output stay float32: `images` in [0, 1], `logits`. Only what computes is
    kept: no names of layers, no shapes, no zero points that are zero.

    Args:
        calibration_images: training images, (N, 3, 32, 32) in [0, 1].

    Raises:
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    import onnx
    from onnxruntime import quantization

    logger = logging.getLogger()  # ONNX Runtime recommends a step that this export does not need
    before, _ = logger.level, logger.setLevel(logging.ERROR)
    with replacing(int8_path) as part:
        quantization.quantize_static(
            str(fp32_path),
            str(part),
            _Batches(calibration_images),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        onnx.save(slimmed(onnx.load(part)), part)
    logger.setLevel(before)


class _Batches:
    """A calibration data reader: ONNX Runtime asks for batches one by one, and for None at the end."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


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
        scale.CopyFrom(numpy_helper.from_array(np.float32(1 / 255), scale.name))
        graph.node.remove(first)
        _rename_input(graph, first.output[0], "images")
    else:  # the teacher normalises first, in float32
        graph.initializer.append(numpy_helper.from_array(np.float32(1 / 255), "byte"))
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


def slimmed(model: "onnx.ModelProto") -> "onnx.ModelProto":
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
    """Write a network for ExecuTorch, PyTorch's own runtime for devices, with its XNNPACK kernels, in float32.

    Raises:
        ModuleNotFoundError: executorch is not installed.
    """
    example, shapes = _example()
    program = torch.export.export(model.to(memory_format=torch.contiguous_format), example, dynamic_shapes=shapes)
    _lower(program, path)


def quantise_executorch(model: nn.Module, path: Path, calibration_images: Tensor) -> None:
    """The same in 8 bits, weights with a scale each channel, calibrated on `calibration_images`, (N, 3, 32, 32).

    Raises:
        ModuleNotFoundError: executorch or torchao is not installed.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import quantize_pt2e

    example, shapes = _example()
    settings = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(settings)
    graph = torch.export.export(model.to(memory_format=torch.contiguous_format), example, dynamic_shapes=shapes)
    watched = quantize_pt2e.prepare_pt2e(graph.module(), quantizer)
    with torch.inference_mode():
        for batch in calibration_images.split(CALIBRATION_BATCH):
            watched(batch)
    _lower(torch.export.export(quantize_pt2e.convert_pt2e(watched), example, dynamic_shapes=shapes), path)


def _example() -> tuple[tuple[Tensor], tuple[dict]]:
    return (torch.zeros(LARGEST_BATCH, 3, 32, 32),), ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)


def _lower(program: torch.export.ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with replacing(path) as part:
        part.write_bytes(lowered.buffer)


def calibration_images() -> Tensor:
    """The training images that calibrate, (500, 3, 32, 32) in [0, 1]: half of those that come with the repository."""
    train = cifar10.load_sample("train")
    return train.images(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES])


def write_onnx(model: nn.Module, folder: Path) -> None:
    """Write `fp32.onnx`, and `int8.onnx`, which takes bytes."""
    write_onnx_fp32(model, folder)
    write_onnx_int8(model, folder)


def write_onnx_fp32(model: nn.Module, folder: Path) -> None:
    """Write `fp32.onnx`."""
    export_onnx(model, folder / "fp32.onnx")


def write_onnx_int8(model: nn.Module, folder: Path) -> None:
    """Write `int8.onnx`, which takes bytes, from `fp32.onnx`, which is written if it is not there."""
    if not (folder / "fp32.onnx").is_file():
        write_onnx_fp32(model, folder)
    quantise_onnx(folder / "fp32.onnx", folder / "float_input.onnx", calibration_images())
    take_bytes(folder / "float_input.onnx", folder / "int8.onnx")


def write_executorch_fp32(model: nn.Module, folder: Path) -> None:
    """Write `fp32.pte`."""
    export_executorch(model, folder / "fp32.pte")


def write_executorch_int8(model: nn.Module, folder: Path) -> None:
    """Write `int8.pte`."""
    quantise_executorch(model, folder / "int8.pte", calibration_images())


FORMATS = {
    "onnx_fp32": write_onnx_fp32,
    "onnx_int8": write_onnx_int8,
    "executorch_int8": write_executorch_int8,
    "executorch_fp32": write_executorch_fp32,
}


def read_network(weights: Path, k: int) -> nn.Module:
    """The network of a safetensors file: the teacher for k = 0, else the student without `k` blocks."""
    return artifacts.read_weights(models.student(k) if k else models.teacher(), weights)


def write_formats(weights: Path, k: int, folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Write the formats in turn; after each, give its name, and "" or the error."""
    for name in names:
        try:
            FORMATS[name](read_network(weights, k), folder)
            error = ""
        except Exception as raised:  # to be told in the rows of this format
            error = f"{type(raised).__name__}: {raised}"
        yield name, error


def main(weights: str, k: str, folder: str, *names: str) -> None:
    """Write the formats; print one JSON line for each as soon as it is there."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an exporter prints goes elsewhere
    for answer in write_formats(Path(weights), int(k), Path(folder), list(names)):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    gc.disable()  # millions of small objects live until the end of this short process
    main(*sys.argv[1:])
