"""What a device is and does, measured within seconds, before anything rests on it: the first minute of a flight."""

import json
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from kdig_utils import machine
from kdig_utils.experiments import runs
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.steps import Steps
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet, load_sample
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec

SPEC = RunSpec("kd_ig", epochs=1000)  # the paper's student, and no end of epochs
COUNTS = (1, 4, 8, 16)  # side by side
GAIN = 1.03  # more runs side by side are tried as long as each step of the ladder gives this much
FIRST_STEPS, ALL_STEPS = 3, 13  # compared with the CPU's: single steps, then those of a whole recording
# Of the loss of the first step, and of the sum of all, relative. Nothing but rounding moves the first. Adam turns the
# rounding of small gradients into whole steps, so that the others drift: by 0.3 % in three steps between two ways of
# adding up on one CPU. A way that trains on other images is farther off, and one that does not learn by 5 %.
TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (1e-2, 3e-2)}


def device_name() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor()


def device_facts() -> dict[str, object]:
    """What runs here: device, its memory and what it copies in a second, processors, compiler, versions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = machine.free_memory(device) if device.type == "cuda" else None
    return {
        "device": device_name(),
        "free_gigabytes": free and round(free / 1e9, 1),
        "copied_gigabytes_a_second": round(copied_bytes(device) / 1e9, 1),
        "threads": torch.get_num_threads(),
        "compiler": bool(shutil.which("gcc") or shutil.which("cc")),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def copied_bytes(device: torch.device, size: int = 1 << 28, copies: int = 5) -> float:
    """Bytes a second that a copy within the memory of `device` reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = source.clone()
    wait(device)
    started = time.perf_counter()
    for _copy in range(copies):
        target.copy_(source)
    wait(device)
    return 2 * size * copies / (time.perf_counter() - started)


def probe(way: Way, seconds: float, counts: Sequence[int] = COUNTS) -> Iterator[dict[str, object]]:
    """Whether a way of training computes what the CPU computes, and what it does in a second, runs side by side.

    Yields what is known so far, whenever that is more: who stops it early keeps the rest.

    Args:
        seconds: of measuring, for each number of runs side by side.

    Yields:
        facts of the device; differences: of the losses from the CPU's (`disagreement`); first_step_seconds, with
        everything that comes before it; and ladder: for each number of runs, at_once and images_per_second.

    Raises:
        RuntimeError: the losses are not the CPU's, or nothing fits into the memory.
    """
    torch.backends.cudnn.benchmark = way.benchmark
    network = runs.compiled_network(print) if way.compiled else models.logits_and_features
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    first, all_steps = disagreement(way, network, device)
    students = [steps_of(SPEC, way, network, device)]
    images_a_second(students, 0.0)
    found = {
        **device_facts(),
        "differences": {"first_step": float(f"{first:.3g}"), "all_steps": float(f"{all_steps:.3g}")},
        "first_step_seconds": round(time.perf_counter() - started, 2),
    }
    ladder = []
    for step in climb(students, way, network, seconds, counts):
        ladder.append(step)
        yield {**found, "ladder": ladder}


def facts_in(path: Path) -> dict:
    """What a probe, or a check, wrote into a file; empty if there is none, or half of one."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def is_of_this_device(facts: dict) -> bool:
    """Whether a probe measured a device like this one, under this version of PyTorch."""
    return facts.get("device") == device_name() and facts.get("torch") == version("torch")


def by_speed(found: dict[str, dict]) -> list[tuple[str, int]]:
    """Ways, each with its fastest number of runs side by side, the fastest first; then what always works."""
    best = {name: max(facts["ladder"], key=lambda step: step["images_per_second"]) for name, facts in found.items()}
    names = sorted(best, key=lambda name: -best[name]["images_per_second"])
    return [(name, best[name]["at_once"]) for name in names] + ([("called", 1)] if "called" not in best else [])


def climb(
    students: list[Steps], way: Way, network: models.Network, seconds: float, counts: Sequence[int]
) -> Iterator[dict[str, float]]:
    """Images a second with more and more runs side by side, until that gains nothing or the memory is full."""
    best, device = 0.0, students[0].run.device
    for count in counts:
        try:
            students += [
                steps_of(replace(SPEC, seed=seed), way, network, device) for seed in range(len(students), count)
            ]
        except torch.OutOfMemoryError:
            return
        rate = images_a_second(students, seconds)
        yield {"at_once": count, "images_per_second": round(rate, 1)}
        if rate < GAIN * best:
            return
        best = rate


def steps_of(spec: RunSpec, way: Way, network: models.Network, device: torch.device) -> Steps:
    """The steps of a student on the images of the repository and random signals, ready to be called."""
    images, test = load_sample("train"), load_sample("test")
    signals = random_signals(images, spec.k).to(device)
    run = runs.student_run(spec, images.to(device), test, signals, device=device, network=network)
    steps = Steps(run, print, way.recorded)
    steps.load_epoch()
    wait(device)  # for what is on another stream than the steps
    return steps


@models.exact_float32()
def images_a_second(students: list[Steps], seconds: float) -> float:
    """Images that all students together train on in a second; in turns, as `side_by_side.train_round` lets them."""
    piece = students[0].pieces(0)[0]
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        for steps in students:
            with torch.cuda.stream(steps.stream):
                steps.place.zero_()  # no way comes to an epoch's end
            steps.advance(*piece)
            done += piece[0] * piece[1]
        wait(students[0].run.device)
    return done / (time.perf_counter() - started)


@models.exact_float32()
def disagreement(way: Way, network: models.Network, device: torch.device) -> list[float]:
    """How far the losses of a run are from those of the CPU, relative: of the first step, and of the sum of a dozen.

    In float32; what is compiled in its own precision, as a second compilation takes too long.

    Raises:
        RuntimeError: farther than rounding explains.
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
    """The loss of the first step, and the sum over single steps and as many as a recording holds."""
    size, sums = steps.run.spec.batch_size, []
    rest = ALL_STEPS - FIRST_STEPS
    for piece in [*[(1, size)] * FIRST_STEPS, *([(rest, size)] if steps.graphs else [(1, size)] * rest)]:
        steps.advance(*piece)
        wait(steps.run.device)
        sums.append(steps.run.loss_sum.double().cpu().clone())
    return torch.stack([sums[0], sums[-1]])


def random_signals(images: ImageSet, k: int) -> TeacherSignals:
    """Numbers of the shapes of a teacher's signals; nothing that takes time depends on their values."""
    generator, n = torch.Generator().manual_seed(0), len(images)
    with torch.inference_mode():
        _logits, features = models.logits_and_features(models.student(k), images.images([0]), models.attention_tap(k))
    return TeacherSignals(
        torch.randn(n, 10, generator=generator),
        torch.rand(n, 32, 32, generator=generator).half(),
        torch.rand(n, features[0, 0].numel(), generator=generator),
        torch.zeros(n),
        {"teacher_sha256": "", "indices": images.indices.tolist(), "settings": {"tap": models.attention_tap(k)}},
    )


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
