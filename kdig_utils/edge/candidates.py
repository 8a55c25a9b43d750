"""Every network in every runtime, each in a process of its own: opened, timed in turn, asked for its logits.

What is lost on the way loses its own figures only, and says why.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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
NO_CALLS = pd.DataFrame({"batch_size": [], "threads": [], "network": [], "ms": []}, dtype=float)


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

    @property
    def running(self) -> Process:
        """Its process.

        Raises:
            Lost: there is none.
        """
        if self.process is None:
            raise Lost(self.missing, self.name)
        return self.process

    def open(self, pixels: Path, opening: float, answers: float) -> None:
        """Start its process and open its file by `opening`, a moment of `time.monotonic`; what it is asked then has
        until `answers`."""
        try:
            self.process = Process(self.name, opening)
            opener, packages = name_of(self.entry.open), self.entry.packages
            file = {"path": str(self.file), "k": self.k, "pixels": str(pixels)}
            self.loaded = self.process.ask("open", opener=opener, packages=packages, **file)
            self.process.end = answers
        except (Lost, OSError) as error:
            self.give_up(error)

    def times(self, calls: int) -> Sequence[float]:
        """Milliseconds of so many calls in a row."""
        return self.running.ask("times", calls=calls)

    def status(self, batch: int, threads: int) -> str:
        """Why there is no figure for this setting; empty if nothing speaks against it."""
        compiled = ONE_COMPILATION if self.entry.opened_once and (batch, threads) != (1, 1) else ""
        return self.left_out.get((batch, threads)) or self.missing or compiled

    def lose(self, lost: Lost, batch: int, threads: int) -> None:
        """Go on without it: at this setting if it has refused, at all that follow if its process is dead."""
        if self.running.is_alive():
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


def _at_once(ask: Callable[[Candidate], None], candidates: list[Candidate]) -> None:
    """Ask all candidates, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(ask, candidates))


def measured(candidates: list[Candidate], batch: int, threads: int, seconds: float, end: float) -> pd.DataFrame:
    """The calls of all at one setting: round, network, call, ms, batch_size, threads.

    Who is lost is told why, and the others are measured again.

    Args:
        seconds: for all of them together, without opening and warming up.
        end: the moment of `time.monotonic` by which it must have ended; else nothing is measured.
    """
    calls, least = (timing.BLOCK_CALLS, timing.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    while present := {each.name: each for each in candidates if not each.status(batch, threads)}:
        every = batch * sum(each.loaded["each_ms"] for each in present.values()) / 1e3
        if time.monotonic() + (WARM_UP + calls * least) * every > end:
            for each in present.values():
                each.left_out[batch, threads] = NO_TIME
            break
        try:
            prepare(list(present.values()), batch, threads)
            timed = {name: each.times for name, each in present.items()}
            left = min(seconds, end - time.monotonic())
            found = timing.interleave(timed, left, calls, least, seconds / len(timed))
            return found.assign(batch_size=batch, threads=threads)
        except Lost as lost:
            present[lost.name].lose(lost, batch, threads)
    return NO_CALLS


def prepare(candidates: list[Candidate], batch: int, threads: int) -> None:
    """Let all networks be open for this setting; with one thread, on one CPU.

    Raises:
        Lost: a network cannot be.
    """
    cpus = usable_cpu_numbers()

    def prepare_one(candidate: Candidate) -> None:
        process = candidate.running
        process.stay(cpus)  # threads that a runtime starts when it opens a file may use all
        process.ready(batch, threads)
        process.stay([machine.fastest_cpu(cpus)] if threads == 1 else cpus)

    _at_once(prepare_one, candidates)


def classify(candidates: list[Candidate], images: int, batch: int, end: float) -> None:
    """Let every network give its logits, one thread each; who gives none says why.

    They are of `images` images, or of as many as the time until `end` allows, the same for all; of 500 at most where
    a runtime is opened once, for one image.
    """
    present = [each for each in candidates if not each.missing]
    cpus, every = usable_cpu_numbers(), sum(each.loaded["each_ms"] for each in present) / 1e3
    fit = math.floor(len(cpus) * max(0.0, end - time.monotonic()) / every) if present else 0
    chosen = min(images, max(batch, fit))

    def classify_one(candidate: Candidate) -> None:
        alone = candidate.entry.opened_once
        try:
            candidate.running.stay(cpus)
            candidate.running.ready(1 if alone else batch, 1)
            few = min(chosen, FEW_IMAGES) if alone else chosen
            candidate.logits = np.array(candidate.running.ask("logits", images=few))
        except Lost as lost:
            candidate.give_up(lost)

    _at_once(classify_one, present)
