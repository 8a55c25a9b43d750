"""The runtimes that the latency court hears: how each opens a network's file, and calls it with images in place.

An opener takes the file, the number of threads and the batch size, and gives a function that binds a batch of pixels,
uint8 of (batch, 3, 32, 32), and gives the call to be timed, which takes nothing and gives the logits. What a file
takes as floats is turned into floats when it is bound: only the network is timed.

As a program it serves one network in a process of its own (`served`). Nothing is imported that its runtime does not
need, so that the peak memory of the process is that of the runtime.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Call = Callable[[], object]
Bind = Callable[[np.ndarray], Call]


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)


def open_eager(path: Path, k: int, threads: int, _batch: int) -> Bind:
    """PyTorch as one writes it; the teacher so is the 1.0 of all speed-ups.

    Weights are channels-last (`artifacts.read_weights`), images contiguous. On the book's machine that is as fast as
    with channels-last images, and faster than with contiguous weights, for one image and for 64.
    """
    return _bind_torch(_network(path, k, threads))


def open_compiled(path: Path, k: int, threads: int, _batch: int) -> Bind:
    """PyTorch compiled by TorchInductor, which needs a C++ compiler."""
    import torch

    return _bind_torch(torch.compile(_network(path, k, threads), dynamic=False))


def _network(path: Path, k: int, threads: int) -> Callable:
    import torch

    from kdig_utils.method import artifacts, models

    torch.set_num_threads(threads)
    return artifacts.read_weights(models.student(k) if k else models.teacher(), path)


def _bind_torch(network: Callable) -> Bind:
    import torch

    def bind(pixels: np.ndarray) -> Call:
        images = torch.from_numpy(as_floats(pixels))

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
        images = np.ascontiguousarray(pixels) if takes_bytes else as_floats(pixels)
        logits, binding = np.empty((batch, 10), np.float32), session.io_binding()
        binding.bind_cpu_input("images", images)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

        def call() -> np.ndarray:
            session.run_with_iobinding(binding)
            return logits

        call.keeps = images  # bound by address
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
        images = np.ascontiguousarray(pixels) if takes_bytes else as_floats(pixels)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

        def call() -> np.ndarray:
            request.infer()
            return request.get_output_tensor().data

        call.keeps = images  # its memory is shared, not copied
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
        images = [torch.from_numpy(as_floats(pixels))]

        def call() -> object:
            return method.execute(images)[0]

        call.keeps = program
        return call

    return bind


OPENERS = {
    "eager": open_eager,
    "compile": open_compiled,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "executorch": open_executorch,
}


PACKAGES = {
    "eager": ("torch", "kdig_utils.method.artifacts"),
    "compile": ("torch", "kdig_utils.method.artifacts"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("torch", "executorch.extension.pybindings.portable_lib", "executorch.runtime"),
}
KIBIBYTE = 1.024e-3  # in megabytes


def peak_megabytes(status: Path = Path("/proc/self/status")) -> float | None:
    """The most memory that this process has held, in megabytes; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return KIBIBYTE * float(line.split()[1])
    with contextlib.suppress(ModuleNotFoundError):
        import resource  # not on Windows

        unit = 1e-6 if sys.platform == "darwin" else KIBIBYTE  # macOS counts bytes
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def block(call: Call, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls in a row, the first included."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


class Served:
    """A network opened in one runtime, for one batch size and number of threads at a time.

    The packages of the runtime are imported at once; `import_ms` is what that took.
    """

    def __init__(self, runtime: str, path: str, k: int, pixels: str) -> None:
        self.open = OPENERS[runtime]
        self.path, self.k, self.pixels = Path(path), k, np.load(pixels, mmap_mode="r")
        start = time.perf_counter_ns()
        for package in PACKAGES[runtime]:
            importlib.import_module(package)
        self.import_ms = (time.perf_counter_ns() - start) / 1e6

    def load(self, batch: int, threads: int) -> float:
        """Open the file for `batch` images and so many threads; the milliseconds it took."""
        start = time.perf_counter_ns()
        self.bind = self.open(self.path, self.k, threads, batch)
        loaded = (time.perf_counter_ns() - start) / 1e6
        self.batch, self.call = batch, self.bind(np.array(self.pixels[:batch]))
        return loaded

    def meet(self, batch: int, threads: int) -> dict[str, float]:
        """The first opening of this process, and four calls.

        Returns:
            import_ms, load_ms, first_ms, each_ms (the best of the calls after the first), peak_mb.
        """
        loaded = self.load(batch, threads)
        first, *later = self.times(4)
        found = {"import_ms": self.import_ms, "load_ms": loaded, "first_ms": first}
        return {**found, "each_ms": min(later), "peak_mb": peak_megabytes()}

    def stay(self, cpus: list[int]) -> None:
        """Use these CPUs only."""
        os.sched_setaffinity(0, cpus)

    def times(self, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls in a row."""
        return block(self.call, calls)

    def logits(self, images: int) -> list[list[float]]:
        """The logits of the first `images` images, in batches."""
        found = []
        for start in range(0, images, self.batch):
            part = self.pixels[start : min(start + self.batch, images)]
            whole = np.concatenate([part, np.zeros((self.batch - len(part), *part.shape[1:]), np.uint8)])
            found += np.array(self.bind(whole)(), dtype=float)[: len(part)].tolist()
        return found


def serve() -> None:
    """Read requests, one JSON line each, from standard input; answer each with one JSON line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints goes elsewhere
    served = None
    for line in sys.stdin:
        request = json.loads(line)
        name, arguments = request.pop("do"), request
        try:
            if served is None:
                served = Served(**arguments)
                answer = None
            else:
                answer = getattr(served, name)(**arguments)
            reply = {"answer": answer}
        except Exception as error:  # to be told in the row of this network
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve()
