"""What a device does, measured within seconds, before anything rests on it: the first minute of a flight."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from kdig_utils import machine
from kdig_utils.experiments import runs
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.steps import STEPS_A_GRAPH, Steps
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet, load_sample
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec

SPEC = RunSpec("kd_ig", epochs=1000)  # the paper's student, and no end of epochs
COUNTS = (1, 4, 8, 16)  # side by side
GAIN = 1.03  # more runs side by side are tried as long as each step of the ladder gives this much
COMPARED = (1, 1, 1, STEPS_A_GRAPH)  # with the CPU's: single steps, then those of a whole recording
# Of the loss of the first step, and of the sum of all, relative. Nothing but rounding moves the first. Adam turns the
# rounding of small gradients into whole steps, so that the others drift: by 0.3 % in three steps between two ways of
# adding up on one CPU. A way that trains on other images is farther off, and one that does not learn by 5 %.
TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (1e-2, 3e-2)}


def device_name() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor()


def probe(way: Way, seconds: float) -> Iterator[dict[str, object]]:
    """Whether a way of training computes what the CPU computes, and what it does in a second, runs side by side.

    Args:
        seconds: of measuring, for each number of runs side by side.

    Yields:
        What is known so far, whenever that is more, so that who stops it early keeps the rest: device, its
        free_gigabytes, threads and torch; differences: of the losses from the CPU's (`disagreement`);
        first_step_seconds, with everything that comes before it; and ladder: for each number of runs, at_once and
        images_per_second.

    Raises:
        RuntimeError: the losses are not the CPU's, or nothing fits into the memory.
    """
    torch.backends.cudnn.benchmark = way.benchmark
    network = runs.compiled_network(print) if way.compiled else models.logits_and_features
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = machine.free_memory(device) if device.type == "cuda" else None
    started = time.perf_counter()
    first, all_steps = disagreement(way, network, device)
    students = [steps_of(SPEC, way, network, device)]
    images_a_second(students, 0.0)
    found = {
        "device": device_name(),
        "free_gigabytes": free and round(free / 1e9, 1),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "differences": {"first_step": float(f"{first:.3g}"), "all_steps": float(f"{all_steps:.3g}")},
        "first_step_seconds": round(time.perf_counter() - started, 2),
    }
    for ladder in climb(students, way, network, seconds):
        yield {**found, "ladder": ladder}


def of_this_device(path: Path) -> dict:
    """What a probe, or the check of a flight, wrote of a device like this one, under this PyTorch; empty if nothing."""
    with suppress(OSError, ValueError):  # no file, or half of one
        facts = json.loads(path.read_text(encoding="utf-8"))
        if (facts.get("device"), facts.get("torch")) == (device_name(), version("torch")):
            return facts
    return {}


def by_speed(found: dict[str, dict]) -> list[tuple[str, int]]:
    """Ways, each with its fastest number of runs side by side, the fastest first; then what always works."""
    best = {name: max(facts["ladder"], key=lambda step: step["images_per_second"]) for name, facts in found.items()}
    names = sorted(best, key=lambda name: -best[name]["images_per_second"])
    return [(name, best[name]["at_once"]) for name in names] + ([("called", 1)] if "called" not in best else [])


def climb(students: list[Steps], way: Way, network: models.Network, seconds: float) -> Iterator[list[dict]]:
    """A ladder of more and more runs side by side, after each rung, until one gains nothing or the memory is full."""
    ladder: list[dict] = []
    best, device = 0.0, students[0].run.device
    for count in COUNTS:
        try:
            for seed in range(len(students), count):
                students.append(steps_of(replace(SPEC, seed=seed), way, network, device))
        except torch.OutOfMemoryError:
            return
        rate = images_a_second(students, seconds)
        ladder.append({"at_once": count, "images_per_second": round(rate, 1)})
        yield ladder
        if rate < GAIN * best:
            return
        best = rate


def steps_of(spec: RunSpec, way: Way, network: models.Network, device: torch.device) -> Steps:
    """The steps of a student on the images of the repository and random signals, ready to be called."""
    images, test = load_sample("train"), load_sample("test")
    signals = random_signals(images).to(device)
    run = runs.student_run(spec, images.to(device), test, signals, device=device, network=network)
    steps = Steps(run, print, way.recorded)
    steps.load_epoch()
    wait(device)  # for what is on another stream than the steps
    return steps


@models.exact_float32()
def images_a_second(students: list[Steps], seconds: float) -> float:
    """Images that all students together train on in a second; in turns, as `side_by_side.train_round` lets them."""
    count, size = students[0].pieces(0)[0]
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        for steps in students:
            with torch.cuda.stream(steps.stream):
                steps.place.zero_()  # no way comes to an epoch's end
            steps.advance(count, size)
            done += count * size
        wait(students[0].run.device)
    return done / (time.perf_counter() - started)


@models.exact_float32()
def disagreement(way: Way, network: models.Network, device: torch.device) -> list[float]:
    """How far the losses of a run are from the CPU's, relative: of the first step, and of the sum of a dozen.

    In float32; what is compiled in its own precision, as a second compilation takes too long. Raises RuntimeError where
    they are farther than rounding explains.
    """
    precision = "native" if way.compiled else "float32"
    tolerances = TOLERANCES["bfloat16" if way.compiled and device.type == "cuda" else "float32"]
    here = losses(steps_of(replace(SPEC, precision=precision), way, network, device))
    there = losses(steps_of(SPEC, Way(recorded=False), models.logits_and_features, torch.device("cpu")))
    differences = ((here - there).abs() / there).tolist()
    for difference, tolerance in zip(differences, tolerances, strict=True):
        if not difference <= tolerance:
            raise RuntimeError(f"the losses differ from the CPU's by {difference:.1e}, more than rounding explains")
    return differences


def losses(steps: Steps) -> Tensor:
    """The loss of the first step, and the sum over all that are compared."""
    sums = []
    for count in COMPARED:
        steps.advance(count, steps.run.spec.batch_size)
        wait(steps.run.device)
        sums.append(steps.run.loss_sum.double().cpu())
    return torch.stack([sums[0], sums[-1]])


def random_signals(images: ImageSet) -> TeacherSignals:
    """Numbers for a teacher's logits and maps, on which no time depends; no attention maps: `SPEC` does without."""
    generator, n = torch.Generator().manual_seed(0), len(images)
    logits, maps = torch.randn(n, 10, generator=generator), torch.rand(n, 32, 32, generator=generator)
    manifest = {"teacher_sha256": "", "indices": images.indices.tolist(), "settings": {"tap": 0}}
    return TeacherSignals(logits, maps.half(), torch.zeros(n, 1), torch.zeros(n), manifest)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    torch.get_device_module(device).synchronize()
