"""The program of a process that `worker` starts: it writes files of networks, or runs one network in one runtime.

`python -m kdig_utils.edge.serving` reads requests, one JSON line each, and answers each with one. Functions come by
name, as `module:function`. Nothing is imported that they do not need, so that the peak memory is that of the runtime.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kdig_utils.edge.openers import Call, Opener, read_network

KIBIBYTE = 1.024e-3  # in megabytes


class Server:
    """What a process can be asked: `write`, or `open` and then the rest."""

    def __init__(self) -> None:
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def write(self, writer: str, weights: str, k: int, path: str) -> None:
        """Write the network of a safetensors file with a writer of `exporting`."""
        import torch

        gc.disable()  # an export makes millions of small objects that live until the end of this short process
        torch.set_num_threads(1)  # another process is writing the other network
        pkgutil.resolve_name(writer)(read_network(Path(weights), k), Path(path))

    def open(self, opener: str, packages: Sequence[str], path: str, k: int, pixels: str) -> dict[str, float | None]:
        """Import the packages, open the file for one image and one thread, and call the network four times.

        Args:
            pixels: a file of images for all calls, uint8 of (N, 3, 32, 32).

        Returns:
            import_ms, load_ms, first_ms, each_ms (the best of the calls after the first), peak_mb.
        """
        self.path, self.k, self.pixels = Path(path), k, np.load(pixels, mmap_mode="r")
        start = time.perf_counter_ns()
        for package in packages:
            importlib.import_module(package)
        imported = (time.perf_counter_ns() - start) / 1e6
        self.opener: Opener = pkgutil.resolve_name(opener)
        loaded = self._load(1, 1)
        first, *later = self.times(4)
        found = {"import_ms": imported, "load_ms": loaded, "first_ms": first, "each_ms": min(later)}
        return {**found, "peak_mb": peak_megabytes()}

    def _load(self, batch: int, threads: int) -> float:
        """Milliseconds that opening the file took."""
        start = time.perf_counter_ns()
        self.bind = self.opener(self.path, self.k, threads, batch)
        loaded = (time.perf_counter_ns() - start) / 1e6
        self.batch, self.threads, self.call = batch, threads, self.bind(np.array(self.pixels[:batch]))
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
        for start in range(0, images, self.batch):
            part = self.pixels[start : min(start + self.batch, images)]
            whole = np.concatenate([part, np.zeros((self.batch - len(part), *part.shape[1:]), np.uint8)])
            found += np.array(self.bind(whole)(), dtype=float)[: len(part)].tolist()
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
        for line in status.read_text().splitlines():
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
        request = json.loads(line)
        try:
            reply = {"answer": getattr(server, request.pop("do"))(**request)}
        except Exception as error:  # to be told in the row of this network
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
