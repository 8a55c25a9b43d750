"""How each runtime opens a network's file, and calls it with images in place.

An opener takes the file, k (0 for the teacher), the number of threads and the batch size. It gives a function that
binds a batch of pixels, uint8 of (batch, 3, 32, 32), and gives the call to be timed, which takes nothing and gives the
logits. What a file takes as floats is turned into floats when it is bound: only the network is timed.

An opener imports its runtime itself: a process holds what its own runtime needs and nothing else (`serving`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
Bind = Callable[[np.ndarray], Call]
Opener = Callable[[Path, int, int, int], Bind]


def read_network(weights: Path, k: int) -> "torch.nn.Module":
    """The network of a safetensors file: the teacher for k = 0, else the student without `k` blocks."""
    from kdig_utils.method import artifacts, models

    return artifacts.read_weights(models.student(k) if k else models.teacher(), weights)


def open_eager(path: Path, k: int, threads: int, _batch: int) -> Bind:
    """PyTorch as one writes it; the teacher so is the 1.0 of all speed-ups.

    Weights are channels-last (`artifacts.read_weights`), images contiguous. On the book's machine that is as fast as
    with channels-last images, and faster than with contiguous weights, for one image and for 64.
    """
    return _bind_torch(_read_with(threads, path, k))


def open_compiled(path: Path, k: int, threads: int, _batch: int) -> Bind:
    """PyTorch compiled by TorchInductor, which needs a C++ compiler."""
    import torch

    return _bind_torch(torch.compile(_read_with(threads, path, k), dynamic=False))


def _read_with(threads: int, path: Path, k: int) -> "torch.nn.Module":
    """The network, read by so many threads: a pool that is larger would stay in the process."""
    import torch

    torch.set_num_threads(threads)
    return read_network(path, k)


def _bind_torch(network: "Callable[[torch.Tensor], torch.Tensor]") -> Bind:
    import torch

    def bind(pixels: np.ndarray) -> Call:
        images = torch.from_numpy(_as_floats(pixels))

        def call() -> torch.Tensor:
            with torch.inference_mode():
                return network(images)

        return call

    return bind


def open_onnxruntime(path: Path, _k: int, threads: int, batch: int) -> Bind:
    """ONNX Runtime on the CPU: all graph optimisations, input and output bound to memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    takes_bytes = session.get_inputs()[0].type == "tensor(uint8)"

    def bind(pixels: np.ndarray) -> Call:
        images = np.ascontiguousarray(pixels) if takes_bytes else _as_floats(pixels)
        logits, binding = np.empty((batch, 10), np.float32), session.io_binding()
        binding.bind_cpu_input("images", images)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

        def call(_bound_by_address: np.ndarray = images) -> np.ndarray:
            session.run_with_iobinding(binding)
            return logits

        return call

    return bind


def open_openvino(path: Path, _k: int, threads: int, batch: int) -> Bind:
    """OpenVINO on the CPU, told to mind latency and not to round float32 to bfloat16."""
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    network.reshape([batch, 3, 32, 32])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(network, "CPU", settings)
    takes_bytes = compiled.input().get_element_type() == openvino.Type.u8

    def bind(pixels: np.ndarray) -> Call:
        images = np.ascontiguousarray(pixels) if takes_bytes else _as_floats(pixels)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

        def call(_shared: np.ndarray = images) -> np.ndarray:
            request.infer()
            return request.get_output_tensor().data

        return call

    return bind


def open_executorch(path: Path, _k: int, threads: int, _batch: int) -> Bind:
    """ExecuTorch with its XNNPACK kernels."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # "unsafe" while a network runs; none does
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")

    def bind(pixels: np.ndarray) -> Call:
        images = [torch.from_numpy(_as_floats(pixels))]

        def call(_kept_for_method: object = program) -> object:
            return method.execute(images)[0]

        return call

    return bind


def _as_floats(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)
