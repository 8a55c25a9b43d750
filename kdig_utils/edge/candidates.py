"""Every network in every runtime, each in a process of its own: opened, timed in turn, asked for its logits.

What is lost on the way loses its own figures only, and says why.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils import machine
from kdig_utils.edge import timing
from kdig_utils.edge.runtimes import RUNTIMES, Runtime, name_of, write_files
from kdig_utils.edge.worker import Lost, Process, in_words
from kdig_utils.machine import usable_cpu_numbers, usable_cpus

LARGE_CALLS, LARGE_ROUNDS = 2, 6  # of batches larger than one; fewer rounds give no interval that covers
WARM_UP = 4  # calls at the least, as `timing.warm_up` makes them
FEW_IMAGES = 500  # to compare the outputs of a file that takes one image at a time
ONE_COMPILATION = "left out: each further batch size and number of threads costs another compilation"
NO_TIME = "left out: there was no time left to measure it; --patience SECONDS gives more"
NO_CALLS = pd.DataFrame(columns=["round", "network", "call", "ms", "batch_size", "threads"])


@dataclass
class Candidate:
    """One network in one runtime and precision.

    Attributes:
        file: what the runtime opens.
        missing: why there is nothing, or nothing more, of it; empty while its process can be asked.
        left_out: why there is no figure, by batch size and number of threads.
        loaded: what `serving.Server.open` found.
        logits: of the test images, (N, 10), when it has classified them.
    """

    model: str
    k: int
    runtime: str
    precision: str
    file: Path
    missing: str = ""
    left_out: dict[tuple[int, int], str] = field(default_factory=dict)
    loaded: dict[str, float] = field(default_factory=dict)
    logits: np.ndarray | None = None
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
            self.process = Process(self.name, opening)
            runtime = {"opener": name_of(self.entry.open), "packages": self.entry.packages}
            self.loaded = self.ask("open", **runtime, path=str(self.file), k=self.k, pixels=str(pixels))
            self.process.end = answers
        except (RuntimeError, OSError) as error:
            self.give_up(error)

    def ask(self, do: str, **arguments: object) -> Any:
        """As `Process.ask`."""
        assert self.process is not None, self.missing
        return self.process.ask(do, **arguments)

    def times(self, calls: int) -> Sequence[float]:
        """Milliseconds of so many calls in a row."""
        return self.ask("times", calls=calls)

    def status(self, batch: int, threads: int) -> str:
        """Why there is no figure for this setting; empty if nothing speaks against it."""
        compiled = ONE_COMPILATION if self.entry.opened_once and (batch, threads) != (1, 1) else ""
        return self.left_out.get((batch, threads)) or self.missing or compiled

    def lose(self, lost: Lost, batch: int, threads: int) -> None:
        """Go on without it: at this setting if it has refused, at all that follow if its process is dead."""
        if self.process and self.process.is_alive():
            self.left_out[batch, threads] = in_words(str(lost), self.entry.extra)
        else:
            self.give_up(lost)

    def give_up(self, error: Exception) -> None:
        """Ask it nothing more."""
        self.missing = in_words(str(error), self.entry.extra)
        self.close()

    def close(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.close()
            self.process = None


def exported(networks: Mapping[str, nn.Module], end: float) -> list[Candidate]:
    """Every network in every runtime of the table, its file written by `end`, a moment of `time.monotonic`."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        written = list(pool.map(lambda network: write_files(network, end), networks.values()))
    return [
        Candidate(model, getattr(network, "k", 0), name, precision, folder / file.name, problems.get(file.name, ""))
        for (model, network), (folder, problems) in zip(networks.items(), written, strict=True)
        for name, runtime in RUNTIMES.items()
        for precision, file in runtime.files.items()
    ]


@contextlib.contextmanager
def opened(candidates: list[Candidate], pixels: Path, opening: float, answers: float) -> Iterator[None]:
    """Within the block, every candidate that can be opened has its process."""
    wanted = sorted((c for c in candidates if not c.missing), key=lambda c: c.entry.opened_once)  # the slowest last
    try:
        _at_once(lambda candidate: candidate.open(pixels, opening, answers), wanted)
        yield
    finally:
        for candidate in candidates:
            candidate.close()


def _at_once(ask: Callable[[Candidate], object], candidates: Iterable[Candidate]) -> None:
    """Ask all candidates, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(ask, candidates))


def measured(candidates: list[Candidate], batch: int, threads: int, seconds: float, end: float) -> pd.DataFrame:
    """The calls of all at one setting, with one thread on one CPU: round, network, call, ms, batch_size, threads.

    Who is lost says why, and the others are measured again.

    Args:
        seconds: for all of them together, without opening and warming up.
        end: the moment of `time.monotonic` by which it must have ended; else nothing is measured.
    """
    cpus = usable_cpu_numbers()
    used = [machine.fastest_cpu(cpus)] if threads == 1 else cpus
    calls, least = (timing.BLOCK_CALLS, timing.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    while present := {each.name: each for each in candidates if not each.status(batch, threads)}:
        every = batch * sum(each.loaded["each_ms"] for each in present.values()) / 1e3
        if time.monotonic() + (WARM_UP + calls * least) * every > end:
            for each in present.values():
                each.left_out[batch, threads] = NO_TIME
            break
        try:
            _at_once(lambda each: each.ask("ready", batch=batch, threads=threads, cpus=used), present.values())
            timed = {name: each.times for name, each in present.items()}
            left = min(seconds, end - time.monotonic())
            found = timing.interleave(timed, left, calls, least, seconds / len(timed))
            return found.assign(batch_size=batch, threads=threads)
        except Lost as lost:
            present[lost.name].lose(lost, batch, threads)
    return NO_CALLS


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
        try:
            each.ask("ready", batch=size, threads=1, cpus=cpus)
            each.logits = np.array(each.ask("logits", images=count))
        except Lost as lost:
            each.give_up(lost)

    _at_once(classify_one, present)
