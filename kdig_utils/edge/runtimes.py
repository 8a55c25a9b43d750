"""The runtimes, one entry each in one table, and every network in every runtime, each in a process of its own.

They are opened, timed in turn, and asked for their logits. What is lost on the way loses its own figures only, and
says why.
"""

import contextlib
import hashlib
import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils.edge import exporting, serving, timing
from kdig_utils.edge.worker import LATE, Lost, Process, in_words
from kdig_utils.machine import fastest_cpu, usable_cpu_numbers
from kdig_utils.method import artifacts, models
from kdig_utils.paths import workspace

LARGE_CALLS, LARGE_ROUNDS = 2, 6  # of batches larger than one; fewer rounds give no interval that covers
WARM_UP = 4  # calls at the least, as `timing.warm_up` makes them
FEW_IMAGES = 500  # to compare the outputs of a file that takes one image at a time
ONE_COMPILATION = "left out: each further batch size and number of threads costs another compilation"
NO_TIME = "left out: there was no time left to measure it; --patience SECONDS gives more"
NO_CALLS = pd.DataFrame(columns=["round", "network", "call", "ms", "batch_size", "threads"])

Writer = Callable[[nn.Module, Path], None]


class File(NamedTuple):
    """A file by its name, and what writes it, as in `exporting`."""

    name: str
    write: Writer


class Runtime(NamedTuple):
    """All that the benchmark knows of a runtime."""

    open: serving.Opener  # another process finds it, and the writers, by name
    packages: tuple[str, ...]  # what is imported, and how long that takes, before a file is opened
    files: Mapping[str, File]  # by precision, in the order in which they are written
    opened_once: bool = False  # it is slow to open, and so is timed for one image and one thread alone


WEIGHTS = "weights.safetensors"
PYTORCH = ("torch", "kdig_utils.method.artifacts")
EXPORTERS = ("onnx", "torchao")  # further packages, which write the files
EXECUTORCH = ("torch", "executorch.extension.pybindings.portable_lib", "executorch.runtime")
STATE = {"fp32": File(WEIGHTS, artifacts.save_weights)}
ONNX = {"fp32": File("fp32.onnx", exporting.export_onnx), "int8": File("int8.onnx", exporting.export_onnx_int8)}
PTE = {  # 8 bits first: who has no time for both has the figure that is asked for
    "int8": File("int8.pte", exporting.export_executorch_int8),
    "fp32": File("fp32.pte", exporting.export_executorch),
}
RUNTIMES = {
    "eager": Runtime(serving.open_eager, PYTORCH, STATE),
    "compile": Runtime(serving.open_compiled, PYTORCH, STATE, opened_once=True),
    "onnxruntime": Runtime(serving.open_onnxruntime, ("onnxruntime",), ONNX),
    "openvino": Runtime(serving.open_openvino, ("openvino",), ONNX),
    "executorch": Runtime(serving.open_executorch, EXECUTORCH, PTE),
}


def versions(*tools: str) -> str:
    """The packages of all runtimes, and these `tools`, each with its version."""
    names = (*(name for runtime in RUNTIMES.values() for name in runtime.packages), *tools)
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    return ", ".join(f"{package} {_version(package)}" for package in packages if package != "kdig_utils")


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def name_of(function: Callable) -> str:
    """As `module:function`, for a process of its own."""
    return f"{function.__module__}:{function.__qualname__}"


@dataclass
class Candidate:
    """One network in one runtime and precision."""

    model: str
    k: int
    runtime: str
    precision: str
    file: Path  # what the runtime opens
    missing: str = ""  # why there is nothing, or nothing more, of it; empty while its process can be asked
    left_out: dict[tuple[int, int], str] = field(default_factory=dict)  # why no figure, by batch size and threads
    loaded: dict[str, float] = field(default_factory=dict)  # what `serving.Server.open` found
    logits: np.ndarray | None = None  # of the test images, (N, 10), when it has classified them
    process: Process | None = None

    @property
    def name(self) -> str:
        """As `student onnxruntime int8`."""
        return f"{self.model} {self.runtime} {self.precision}"

    @property
    def entry(self) -> Runtime:
        """The entry of its runtime in the table."""
        return RUNTIMES[self.runtime]

    def open(self, pixels: Path, opening: float, answers: float) -> None:
        """Start its process and open its file; moments of `time.monotonic` end this, and what it is asked later."""
        try:
            self.process = Process(opening)
            opener, file = name_of(self.entry.open), str(self.file)
            self.loaded = self.process.ask("open", opener, self.entry.packages, file, self.k, str(pixels))
            self.process.end = answers
        except (RuntimeError, OSError) as error:
            self.give_up(error)

    def status(self, batch: int, threads: int) -> str:
        """Why there is no figure for this setting; empty if nothing speaks against it."""
        compiled = ONE_COMPILATION if self.entry.opened_once and (batch, threads) != (1, 1) else ""
        return self.left_out.get((batch, threads)) or self.missing or compiled

    def times(self, setting: tuple[int, int], calls: int) -> Sequence[float]:
        """Milliseconds of so many calls; no numbers (NaN) once it is lost at this setting."""
        found = None if self.status(*setting) else self.attempt(setting, "times", calls)
        return found or [math.nan] * calls

    def attempt(self, setting: tuple[int, int] | None, do: str, *arguments: object) -> Any:
        """As `Process.ask`; None if it dies, or refuses, which leaves out this setting, or, for None, all that follows.

        The setting is a batch size and a number of threads.
        """
        if self.process is None:
            return None
        try:
            return self.process.ask(do, *arguments)
        except Lost as lost:
            if setting and self.process.is_alive():
                self.left_out[setting] = in_words(lost)
            else:
                self.give_up(lost)

    def give_up(self, error: Exception) -> None:
        """Ask it nothing more."""
        self.missing = in_words(error)
        self.close()

    def close(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.close()
            self.process = None


def exported(model: str, network: nn.Module, end: float) -> list[Candidate]:
    """A network in every runtime of the table; its files, if they are not there already, are written in a process.

    The files are in a folder of the workspace that is named by the weights and by all that writes them. `end` is the
    moment of `time.monotonic` by which they must be written.
    """
    files = dict.fromkeys(file for runtime in RUNTIMES.values() for file in runtime.files.values())
    sources = sorted({inspect.getfile(file.write) for file in files})
    texts = [Path(source).read_text(encoding="utf-8") for source in sources]
    identity = [models.weights_sha256(network), versions(*EXPORTERS), *texts]
    folder = workspace() / "exports" / hashlib.sha256("".join(identity).encode()).hexdigest()[:16]
    weights, k = folder / WEIGHTS, getattr(network, "k", 0)
    if not weights.is_file():
        artifacts.save_weights(network, weights)
    problems: dict[str, str] = {}
    with contextlib.closing(Process(end)) as process:
        for file in (file for file in files if not (folder / file.name).is_file()):
            try:
                process.ask("write", name_of(file.write), str(weights), k, str(folder / file.name))
            except Lost as lost:
                words = in_words(lost)
                problems[file.name] = words if words == LATE else f"the export failed: {words}"
    return [
        Candidate(model, k, name, precision, folder / file.name, problems.get(file.name, ""))
        for name, runtime in RUNTIMES.items()
        for precision, file in runtime.files.items()
    ]


def at_once(do: Callable[[Any], Any], items: Iterable[object]) -> list:
    """What `do` gives for all items, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(len(usable_cpu_numbers())) as pool:
        return list(pool.map(do, items))


def heard(
    candidates: list[Candidate],
    pixels: np.ndarray,
    settings: list[tuple[int, int]],
    ends: Mapping[str, float],
    seconds: float,
) -> dict[tuple[int, int], pd.DataFrame]:
    """Open all that can be opened; their calls by setting, batch size and threads; their logits are left with them.

    Args:
        pixels: of all images, uint8 of (N, 3, 32, 32).
        ends: moments of `time.monotonic` for `opening`, `measuring`, `classifying`, and any `answers`.
        seconds: for each setting, without opening and warming up.
    """
    wanted = sorted((c for c in candidates if not c.missing), key=lambda c: c.entry.opened_once)  # the slowest last
    times = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as at_the_end:
        np.save(Path(folder) / "pixels.npy", pixels)
        for each in wanted:
            at_the_end.callback(each.close)
        print(f"opening {len(candidates)} processes")
        at_once(lambda each: each.open(Path(folder) / "pixels.npy", ends["opening"], ends["answers"]), wanted)
        for batch, threads in settings:
            print(f"measuring batch {batch} with {threads} thread{'s' * (threads > 1)}")
            times[batch, threads] = measured(candidates, batch, threads, seconds, ends["measuring"])
        print("classifying test images")
        classify(candidates, len(pixels), max(batch for batch, _threads in settings), ends["classifying"])
    return times


def measured(candidates: list[Candidate], batch: int, threads: int, seconds: float, end: float) -> pd.DataFrame:
    """The calls of all at one setting, one thread on one CPU: round, network, call, ms, batch_size, threads.

    Who is lost says why, and has none; nothing is measured that would not end by `end`.
    """
    cpus, setting = usable_cpu_numbers(), (batch, threads)
    used = [fastest_cpu(cpus)] if threads == 1 else cpus
    calls, least = (timing.BLOCK_CALLS, timing.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    present = [each for each in candidates if not each.status(*setting)]
    every = batch * sum(each.loaded["each_ms"] for each in present) / 1e3
    if time.monotonic() + (WARM_UP + calls * least) * every > end:
        for each in present:
            each.left_out[setting] = NO_TIME
        return NO_CALLS
    at_once(lambda each: each.attempt(setting, "ready", batch, threads, used), present)
    timed = {each.name: partial(each.times, setting) for each in present if not each.status(*setting)}
    if not timed:
        return NO_CALLS
    found = timing.interleave(timed, min(seconds, end - time.monotonic()), calls, least, seconds / len(timed))
    whole = found.groupby("network").filter(lambda calls: calls["ms"].notna().all())
    return whole.assign(batch_size=batch, threads=threads)


def classify(candidates: list[Candidate], images: int, batch: int, end: float) -> None:
    """Let every network give its logits, one thread each; who gives none says why.

    They are of `images` images, or of as many as the time until `end` allows, the same for all; of 500 at most where
    a runtime is opened once, for one image.
    """
    present = [each for each in candidates if not each.missing]
    cpus, every = usable_cpu_numbers(), sum(each.loaded["each_ms"] for each in present) / 1e3
    fit = math.floor(len(cpus) * max(0.0, end - time.monotonic()) / every) if present else 0
    chosen = min(images, max(batch, fit))

    def classify_one(each: Candidate) -> None:
        size, count = (1, min(chosen, FEW_IMAGES)) if each.entry.opened_once else (batch, chosen)
        each.attempt(None, "ready", size, 1, cpus)
        found = each.attempt(None, "logits", count)
        each.logits = None if found is None else np.array(found)

    at_once(classify_one, present)
