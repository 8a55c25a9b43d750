"""What runs in a process of its own, which `worker` starts: it writes files of networks, or runs one in one runtime.

`main` reads requests, one JSON list each line, and answers each with a line. Functions come by name, as
`module:function`. Nothing is imported that they do not need, so that the peak memory is that of the runtime.

An opener takes the file, k (0 for the teacher), the number of threads and the batch size. It gives the array that the
network reads, (batch, 3, 32, 32), bytes or float32 as the file wants them, and the call to be timed, which takes
nothing and gives the logits. `fill` puts images into the array beforehand: only the network is timed.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

KIBIBYTE = 1.024e-3  # in megabytes

Call = Callable[[], object]
Opener = Callable[[Path, int, int, int], tuple[np.ndarray, Call]]


def read_network(weights: Path, k: int, threads: int) -> "torch.nn.Module":
    """The network of a safetensors file: the teacher for k = 0, else the student without `k` blocks.

    So many threads read it, and run it later: a larger pool, once made, would stay in the process.
    """
    import torch

    from kdig_utils.method import artifacts, models

    torch.set_num_threads(threads)
    return artifacts.read_weights(models.student(k) if k else models.teacher(), weights)


def open_eager(path: Path, k: int, threads: int, batch: int) -> tuple[np.ndarray, Call]:
    """PyTorch as one writes it; the teacher so is the 1.0 of all speed-ups.

    Weights are channels-last (`artifacts.read_weights`), images contiguous. On the book's machine that is as fast as
    with channels-last images, and faster than with contiguous weights, for one image and for 64.
    """
    return _in_torch(read_network(path, k, threads), batch)


def open_compiled(path: Path, k: int, threads: int, batch: int) -> tuple[np.ndarray, Call]:
    """PyTorch compiled by TorchInductor, which needs a C++ compiler."""
    import torch

    return _in_torch(torch.compile(read_network(path, k, threads), dynamic=False), batch)


def _in_torch(network: "Callable[[torch.Tensor], torch.Tensor]", batch: int) -> tuple[np.ndarray, Call]:
    import torch

    images = torch.zeros(batch, 3, 32, 32)
    return images.numpy(), torch.inference_mode()(lambda: network(images))


def open_onnxruntime(path: Path, _k: int, threads: int, batch: int) -> tuple[np.ndarray, Call]:
    """ONNX Runtime on the CPU: all graph optimisations, input and output bound to memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kind = np.uint8 if session.get_inputs()[0].type == "tensor(uint8)" else np.float32
    images, logits = np.zeros((batch, 3, 32, 32), kind), np.empty((batch, 10), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("images", images)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def call(_bound_by_address: np.ndarray = images) -> np.ndarray:
        session.run_with_iobinding(binding)
        return logits

    return images, call


def open_openvino(path: Path, _k: int, threads: int, batch: int) -> tuple[np.ndarray, Call]:
    """OpenVINO on the CPU, told to mind latency and not to round float32 to bfloat16."""
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    network.reshape([batch, 3, 32, 32])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    kind = np.uint8 if network.input().get_element_type() == openvino.Type.u8 else np.float32
    images = np.zeros((batch, 3, 32, 32), kind)
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

    def call(_shared: np.ndarray = images) -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    return images, call


def open_executorch(path: Path, _k: int, threads: int, batch: int) -> tuple[np.ndarray, Call]:
    """ExecuTorch with its XNNPACK kernels."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # "unsafe" while a network runs; none does
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    images = torch.zeros(batch, 3, 32, 32)

    def call(_kept_for_method: object = program) -> object:
        return method.execute([images])[0]

    return images.numpy(), call


def fill(images: np.ndarray, pixels: np.ndarray) -> None:
    """Put bytes where a network reads them, as bytes or as float32 in [0, 1]."""
    images[:] = pixels if images.dtype == np.uint8 else pixels / np.float32(255)


class Server:
    """What a process can be asked: `write`, or `open` and then the rest."""

    def __init__(self) -> None:
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def write(self, writer: str, weights: str, k: int, path: str) -> None:
        """Write the network of a safetensors file with a writer of `exporting`."""
        gc.disable()  # an export makes millions of small objects that live until the end of this short process
        network = read_network(Path(weights), k, threads=1)  # another process is writing the other network
        pkgutil.resolve_name(writer)(network, Path(path))

    def open(self, opener: str, packages: Sequence[str], path: str, k: int, pixels: str) -> dict[str, float | None]:
        """Import the packages, open the file for one image and one thread, and call the network four times.

        Args:
            pixels: a file of images for all calls, uint8 of (N, 3, 32, 32).

        Returns:
            import_ms, load_ms, first_ms, each_ms (the best of the calls after the first), peak_mb.
        """
        self.path, self.k, self.pixels = Path(path), k, np.load(pixels, mmap_mode="r")
        (imported,) = block(lambda: [importlib.import_module(package) for package in packages], 1)
        self.opener: Opener = pkgutil.resolve_name(opener)
        loaded = self._load(1, 1)
        first, *later = self.times(4)
        found = {"import_ms": imported, "load_ms": loaded, "first_ms": first, "each_ms": min(later)}
        return {**found, "peak_mb": peak_megabytes()}

    def _load(self, batch: int, threads: int) -> float:
        """Milliseconds that opening the file took."""
        start = time.perf_counter_ns()
        self.images, self.call = self.opener(self.path, self.k, threads, batch)
        loaded = (time.perf_counter_ns() - start) / 1e6
        self.batch, self.threads = batch, threads
        fill(self.images, self.pixels[:batch])
        return loaded

    def ready(self, batch: int, threads: int, cpus: list[int]) -> None:
        """Let the file be open for `batch` images and so many threads, and from then on use these CPUs only."""
        _use(self.cpus)  # a runtime that opens a file may start threads, which may use all
        if (self.batch, self.threads) != (batch, threads):
            self._load(batch, threads)
        _use(cpus)

    def times(self, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls in a row."""
        return block(self.call, calls)

    def logits(self, images: int) -> list[list[float]]:
        """The logits of the first `images` images, in batches."""
        found: list[list[float]] = []
        while len(found) < images:
            part = self.pixels[len(found) : min(len(found) + self.batch, images)]
            fill(self.images[: len(part)], part)  # what the last batch has too much is not looked at
            found += np.array(self.call(), dtype=float)[: len(part)].tolist()
        return found


def _use(cpus: Iterable[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def block(call: Call, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls in a row, the first included."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def peak_megabytes(status: Path = Path("/proc/self/status")) -> float | None:
    """The most memory that this process has held, in megabytes; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return KIBIBYTE * float(line.split()[1])
    with contextlib.suppress(ModuleNotFoundError):
        import resource  # not on Windows

        unit = 1e-6 if sys.platform == "darwin" else KIBIBYTE  # macOS counts bytes
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def main() -> None:
    """Answer the requests on standard input; what goes wrong is an answer, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints goes elsewhere
    server = Server()
    for line in sys.stdin:
        try:
            do, *arguments = json.loads(line)
            reply = {"answer": getattr(server, do)(*arguments)}
        except Exception as error:  # to be told in the row of this network
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)
