"""Finished students an hour: the authors' way of training, and each step from there to many students side by side.

The paper's settings: k = 5, batch 64, Adam, 50,000 images, 100 epochs, method kd_ig. Nobody trains 100 epochs
here: after a warm-up the ways take turns for some seconds each, and the median time of their steps is extrapolated.
What comes between two epochs is timed once for each way: the draws of the next epoch, and the accuracy on 10,000 test
images (on a CPU extrapolated from 500), which the authors' way measures through worker processes too. Images are the
1,000 of the repository, repeated; the teacher's signals are random numbers of the right shape, which takes the same
time. Prints the table and writes `benchmarks/results/training.json`; rows of other devices that are there stay.

    python benchmarks/training.py
    python benchmarks/training.py --compiled --seconds 30
    python benchmarks/training.py --quick    # a rehearsal with the smallest student; writes nothing
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils import benchmark
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from kdig_utils import machine
from kdig_utils.experiments import profiling, runs
from kdig_utils.experiments.probes import random_signals, wait
from kdig_utils.experiments.runs import Run
from kdig_utils.experiments.side_by_side import has_room
from kdig_utils.experiments.steps import MEASURE_EVERY, STEPS_A_GRAPH, Steps, check_weights, measure
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import losses, models
from kdig_utils.method.cifar10 import ImageSet, load_sample
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec
from kdig_utils.paths import replacing

RESULTS = Path(__file__).parent / "results" / "training.json"
POSITIONS = 50_000
ROUNDS = 5
TEST_POSITIONS = 10_000
TEST_IMAGES = {"cpu": 500, "cuda": TEST_POSITIONS}  # that are measured; the time of the others is extrapolated
WARM_UP = {"cpu": 2, "cuda": 30}  # steps
LONGEST_CHUNK = POSITIONS // RunSpec.batch_size  # steps, all within one epoch
STEPS_AN_EPOCH = math.ceil(POSITIONS / RunSpec.batch_size)
SIDE_BY_SIDE = {"cpu": (2,), "cuda": (2, 4, 6, 8)}
CHANNELS, SIDE = 512, 32  # of the convolution that the rate of multiply-accumulates is measured on
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # larger than any cache
RATE_IMAGES = {"cpu": 4, "cuda": 64}


@dataclass
class Way:
    """A way of training, ready to be timed.

    Attributes:
        train: does so many steps of each of its students and waits for the device.
        between: makes one student ready for the next epoch and measures it; seconds that its test images took.
        workers: processes that load the images.
        value_bytes: of an activation, as it is trained.
        traffic: what moves through memory, see `profiling`.
        measured_every: epochs between two looks at the test images.
        ahead: batches that wait when a chunk begins; they are used up before the clock starts.
        multiple: steps come in multiples of it.
        megabytes: the students' memory on a GPU; None on the CPU, where it is not measured.
        seconds: a step of one student in each round, its share if there are several.
    """

    name: str
    at_once: int
    train: Callable[[int], None]
    between: Callable[[], float]
    workers: int = 0
    value_bytes: int = 4
    traffic: dict[str, tuple[int, int]] = field(default_factory=lambda: profiling.EAGER)
    ahead: int = 0
    measured_every: int = 1
    multiple: int = 1
    megabytes: float | None = None
    chunk: int = 0
    seconds: list[float] = field(default_factory=list)
    epoch_end: float = 0.0

    def epochs(self) -> list[float]:
        """Seconds of a whole epoch of one student in each round."""
        return [STEPS_AN_EPOCH * step + self.epoch_end for step in self.seconds]


class AuthorsImages(Dataset):
    """Image, label and the teacher's logits by index; now and then the map of that index blended in."""

    def __init__(self, images: ImageSet, signals: TeacherSignals, probability: float) -> None:
        self.images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.pixels]
        self.labels, self.logits, self.probability = images.labels.tolist(), signals.logits, probability
        self.maps = signals.maps.float().numpy()
        self.transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor()])

    def __len__(self) -> int:
        return POSITIONS

    def __getitem__(self, position: int) -> tuple[Tensor, int, Tensor]:
        index = position % len(self.images)
        image = self.transform(self.images[index])
        if np.random.rand() < self.probability:
            powered = self.maps[index] ** math.exp(np.random.uniform(0, math.log(2)))
            scaled = (powered - powered.min()) / (powered.max() - powered.min())
            image = 0.5 * image + 0.5 * torch.from_numpy(scaled).repeat(3, 1, 1)
        return image, self.labels[index], self.logits[index]


def authors_way(spec: RunSpec, images: ImageSet, signals: TeacherSignals, device: torch.device) -> Way:
    """Image by image in worker processes, one student, contiguous, float32 as PyTorch has it if nobody says otherwise.

    A GPU then rounds the inputs of float32 convolutions to TF32.
    """
    workers = loading_processes()
    loader = DataLoader(
        AuthorsImages(images, signals, spec.overlay_probability), spec.batch_size, shuffle=True, num_workers=workers
    )
    tested = DataLoader(TestImages(images, device), spec.batch_size, num_workers=workers)
    batches = endless(loader)
    model = models.student(spec.k).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=spec.learning_rate)

    def train(steps: int) -> None:
        for _step in range(steps):
            inputs, labels, logits = (tensor.to(device) for tensor in next(batches))
            answers = model(inputs)
            loss = (1 - spec.alpha) * F.cross_entropy(answers, labels)
            loss = loss + spec.alpha * losses.distillation_loss(answers, logits, spec.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device)

    @torch.inference_mode()
    def between() -> float:
        model.eval()
        waiting, right = iter(tested), torch.zeros((), dtype=torch.int64, device=device)
        next(waiting)  # the processes have started now
        started = time.perf_counter()
        for inputs, labels in waiting:
            right += (model(inputs.to(device)).argmax(1) == labels.to(device)).sum()
        wait(device)
        model.train()
        return (time.perf_counter() - started) * len(tested) / (len(tested) - 1)

    return Way("the authors' way", 1, train, between, workers, ahead=workers * loader.prefetch_factor)


class TestImages(Dataset):
    """Test images one by one, as torchvision loads them."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.pixels]
        self.labels, self.transform, self.count = images.labels.tolist(), ToTensor(), TEST_IMAGES[device.type]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = position % len(self.images)
        return self.transform(self.images[index]), self.labels[index]


def loading_processes() -> int:
    """All processors but one, which feeds the device; at least two and at most eight."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(8, processors - 1))


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def contiguous(run: Run) -> Run:
    """The run with channels first, as PyTorch has them if nobody says otherwise."""
    run.model.to(memory_format=torch.contiguous_format)
    run.model.normalise.register_forward_hook(lambda _layer, _inputs, output: output.contiguous())
    return run


def called(run: Run) -> Steps:
    """The run's steps, called one by one by Python on every device."""
    steps = Steps(run, print, recorded=False)
    steps.load_epoch()
    return steps


def our_way(name: str, students: list[Steps], **attributes: object) -> Way:
    """The package's steps, the students in turns; `STEPS_A_GRAPH` steps a turn where they are recorded."""
    device = students[0].run.device
    graphs = students[0].stream is not None

    @models.exact_float32()
    def train(steps: int) -> None:
        for student in students:
            with torch.cuda.stream(student.stream):
                student.place.zero_()  # a chunk begins at the first image again: no way comes to an epoch's end
        for _turn in range(steps // STEPS_A_GRAPH if graphs else steps):
            for student in students:
                take_turn(student, graphs)
        wait(device)

    def between() -> float:
        with torch.cuda.stream(students[0].stream):
            students[0].load_epoch()
        wait(device)
        students[0].run.epoch = MEASURE_EVERY - 1  # after such an epoch a run is measured
        started = time.perf_counter()
        measure(students[0].run)
        wait(device)
        seconds = time.perf_counter() - started
        students[0].run.epoch = 0
        check_weights(students[0].run)
        students[0].run.model.train()
        return seconds

    value_bytes = 2 if students[0].run.uses_bfloat16 else 4
    taken = sum(student.bytes for student in students) / 1e6 if graphs else None
    multiple = STEPS_A_GRAPH if graphs else 1
    every = {"measured_every": MEASURE_EVERY}
    return Way(
        name, len(students), train, between, 0, value_bytes, multiple=multiple, megabytes=taken, **every, **attributes
    )


def take_turn(student: Steps, graphs: bool) -> None:
    if graphs:
        student.advance(STEPS_A_GRAPH, student.run.spec.batch_size)
    else:
        student.step(student.run.spec.batch_size)


def all_ways(spec: RunSpec, device: torch.device, compiled: bool) -> list[Way]:
    """The ways that this device has, the authors' first."""
    sample = load_sample("train")
    signals = random_signals(sample)
    repeated = torch.arange(POSITIONS) % len(sample)
    images = sample.subset(repeated).to(device)
    their_signals = signals_at(signals, images, repeated).to(device)
    test = sample.subset(torch.arange(TEST_IMAGES[device.type]) % len(sample)).to(device)
    float32 = dataclasses.replace(spec, precision="float32")

    def new(which: RunSpec, **arguments: object) -> Run:
        return runs.student_run(which, images, test, their_signals, device=device, **arguments)

    native = "bfloat16, " if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else ""
    network = runs.compiled_network(print)
    ways = [
        authors_way(spec, sample, signals, device),
        our_way("batches from tensors", [called(contiguous(new(float32)))]),
        our_way(f"{native}channels last", [called(new(spec))]),
    ]
    if compiled:
        ways.append(our_way("compiled", [called(new(spec, network=network))], traffic=profiling.FUSED))
    if device.type == "cuda":
        ways += side_by_side("recorded", lambda: Steps(new(spec), print), (1, *SIDE_BY_SIDE["cuda"]))
        if compiled:
            counts, fused = (1, *SIDE_BY_SIDE["cuda"]), {"traffic": profiling.FUSED}
            both = "compiled and recorded"
            ways += side_by_side(both, lambda: Steps(new(spec, network=network), print), counts, **fused)
    else:
        ways += side_by_side("channels last", lambda: called(new(spec)), SIDE_BY_SIDE["cpu"])
    return ways


def signals_at(signals: TeacherSignals, images: ImageSet, positions: Tensor) -> TeacherSignals:
    """The signals of `images`, which are those at `positions`, row by row."""
    rows = signals.rows(positions)
    return TeacherSignals(*rows.tensors(), {**signals.manifest, "indices": images.indices.tolist()})


def side_by_side(name: str, new: Callable[[], Steps], counts: tuple[int, ...], **attributes: object) -> list[Way]:
    """Ways with the first 1, 2, … of the same students, as many as the memory holds."""
    students: list[Steps] = []
    while len(students) < max(counts) and has_room(students):
        students.append(new())
    return [our_way(name, students[:count], **attributes) for count in counts if count <= len(students)]


def time_ways(ways: list[Way], device: torch.device, seconds: float, rounds: int) -> None:
    """Warm up, then let the ways take turns, each `seconds` in all."""
    for way in ways:
        warm_up(way, device)
        each = chunk_seconds(way, way.multiple)
        fitting = max(1, round(seconds / rounds / each / way.multiple))
        way.chunk = min(fitting, LONGEST_CHUNK // way.multiple) * way.multiple
    for _round in range(rounds):
        for way in ways:
            way.seconds.append(chunk_seconds(way, way.chunk) / way.at_once)
    for way in ways:
        way.epoch_end = epoch_end_seconds(way, device)


def epoch_end_seconds(way: Way, device: torch.device) -> float:
    """Seconds between two epochs of a student, the second time; measured alone, as students are measured in turn."""
    way.between()
    started = time.perf_counter()
    measuring = way.between()
    others = time.perf_counter() - started - measuring if way.workers == 0 else 0.0  # not their processes' start
    return others + measuring * TEST_POSITIONS / TEST_IMAGES[device.type] / way.measured_every


def warm_up(way: Way, device: torch.device) -> None:
    """The first steps; on a GPU also the memory that they take for a while, where no recording keeps it."""
    way.train(WARM_UP[device.type])
    if device.type == "cpu":
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way.train(way.multiple)
    if way.megabytes is None:
        way.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6


def chunk_seconds(way: Way, steps: int) -> float:
    """Seconds a step, all students of the way together."""
    way.train(way.ahead)
    started = time.perf_counter()
    way.train(steps)
    return (time.perf_counter() - started) / steps


class Rates(NamedTuple):
    """What a device does in a second, measured: multiply-accumulates and bytes read or written."""

    macs: float
    bytes: float


def measured_rates(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Rates:
    """What the device reaches, median of many calls: a large 1 × 1 convolution, a copy larger than its caches.

    Args:
        seconds: for each of the two.
    """
    n = RATE_IMAGES[device.type]
    images = torch.randn(n, CHANNELS, SIDE, SIDE, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    macs = n * SIDE**2 * CHANNELS**2
    return Rates(
        macs / call_seconds(lambda: F.conv2d(images, weight), seconds),
        2 * len(source) / call_seconds(lambda: target.copy_(source), seconds),  # read and written
    )


def call_seconds(function: Callable[[], object], seconds: float) -> float:
    """Median time of a call, warmed up, the device waited for."""
    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def rows_of(ways: list[Way], spec: RunSpec, device: torch.device, seconds: float) -> list[dict[str, object]]:
    """What goes into the table: one row a way."""
    model = models.student(spec.k)
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    rates = {size: measured_rates(device, dtypes[size], seconds) for size in {way.value_bytes for way in ways}}
    rows = []
    for way in ways:
        step, moved = statistics.median(way.seconds), (spec.batch_size, way.value_bytes, way.traffic)
        hourly, rate = profiling.students_per_hour(step, spec, epoch_end_seconds=way.epoch_end), rates[way.value_bytes]
        arithmetic = profiling.step_macs(model, spec.batch_size) / rate.macs
        floor = max(arithmetic, profiling.step_bytes(model, *moved) / rate.bytes)
        ratios = (theirs / ours for theirs, ours in zip(ways[0].epochs(), way.epochs(), strict=True))
        rows.append(
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor(),
                "kind": device.type,
                "threads": torch.get_num_threads(),
                "way": way.name,
                "method": spec.method,
                "k": spec.k,
                "at_once": way.at_once,
                "students_per_hour": significant(hourly),
                "ratio": significant(statistics.median(ratios)),
                "ms_per_step": significant(1000 * step),
                "images_per_second": significant(spec.batch_size / step),
                "epoch_end_seconds": significant(way.epoch_end),
                "workers": way.workers,
                "megabytes": way.megabytes and round(way.megabytes),
                "floor_students_per_hour": significant(profiling.students_per_hour(floor, spec)),
                "share_of_floor": significant(floor / step),
                "value_bytes": way.value_bytes,
                "gigabytes_per_step": significant(profiling.step_bytes(model, *moved) / 1e9),
                "gigamacs_per_step": significant(profiling.step_macs(model, spec.batch_size) / 1e9),
                "gigabytes_per_second": significant(rate.bytes / 1e9),
                "gigamacs_per_second": significant(rate.macs / 1e9),
                "steps": way.chunk * len(way.seconds) * way.at_once,
                "torch": torch.__version__,
            }
        )
    return rows


def significant(value: float) -> float:
    """Three significant digits: more were not measured."""
    return float(f"{value:.3g}")


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Put the rows into the file in place of those of this device."""
    others = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    others = [row for row in others if row["device"] != rows[0]["device"]]
    with replacing(path) as part:
        part.write_text(json.dumps([*others, *rows], indent=1) + "\n")


def printed(rows: list[dict[str, object]]) -> str:
    """The table for people."""
    columns = (
        "way", "at_once", "workers", "students_per_hour", "ratio", "ms_per_step", "epoch_end_seconds", "share_of_floor",
        "megabytes", "steps",
    )  # fmt: skip
    first = rows[0]
    return (
        f"{first['device']}, threads: {first['threads']}, torch {first['torch']}, {first['method']} k={first['k']}\n"
        f"{pd.DataFrame(rows)[list(columns)].to_string(index=False)}\n"
        "students an hour: extrapolated from that many steps and one end of an epoch to 100 epochs of 50,000 images\n"
        f"floor, of steps alone: a step's bytes at {first['gigabytes_per_second']:g} GB/s, its multiply-accumulates at "
        f"{first['gigamacs_per_second']:g} G/s (measured; of the first row)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each way; default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="torch.compile on the CPU too; a minute more")
    parser.add_argument("--quick", action="store_true", help="a rehearsal with the smallest student; writes nothing")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    seconds, rounds = (0.2, 2) if arguments.quick else (arguments.seconds, ROUNDS)
    spec = RunSpec("kd_ig", k=17 if arguments.quick else 5)
    ways = all_ways(spec, device, arguments.compiled or (device.type == "cuda" and not arguments.quick))
    time_ways(ways, device, seconds, rounds)
    rows = rows_of(ways, spec, device, seconds=min(1.0, seconds))
    print(printed(rows))
    if not arguments.quick:
        write(rows, RESULTS)


if __name__ == "__main__":
    main()
