"""Attribution maps of real images a second: Captum against this package, at what error, one lever after the other.

The images are test images; the constants of the package were chosen on training images. The ways take their turns in
one process, warmed up; medians over the rounds. Two errors are reported: that of completeness, and the distance (sum
of absolute differences, relative) to a reference of 1,024 midpoints, because a rule can be complete and wrong. The
reference's gradients are in single precision and its sums in double; the last two rows tell what that does, on two
images with gradients in double precision, which are too slow for all. Peak memory is what a way adds to the process
(Linux only). Prints the table and writes `benchmarks/results/integrated_gradients.json`; some four minutes.

    python benchmarks/integrated_gradients.py
"""

import copy
import ctypes
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import artifacts
from kdig_utils.method.attribution import attribute, half_pays
from kdig_utils.method.cifar10 import load_sample
from kdig_utils.method.integrated_gradients import baseline, integrated_gradients
from kdig_utils.method.secants import SecantNetwork, secant_attributions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from captum.attr import IntegratedGradients

IMAGES, ROUNDS, REFERENCE_STEPS = 16, 3, 1024
DOUBLE_IMAGES, DOUBLE_STEPS = 2, 256
CAPTUM_BATCHES = (16, 32, 64)
RESULTS = Path(__file__).parent / "results" / "integrated_gradients.json"
Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]
Problem = tuple[Tensor, Tensor, Tensor]  # images, baselines, labels


def ways(teacher: nn.Module, folded: nn.Module) -> dict[str, Way]:
    """Each way takes images, baselines and labels; it gives attributions and its evaluations an image."""
    captum = IntegratedGradients(teacher)
    half = half_pays(torch.device("cpu"))
    exact, fast = SecantNetwork(folded), SecantNetwork(folded, half, compiled=True)
    fused = f"secants, compiled{', bfloat16 backward' if half else ''}"

    def by_captum(size: int) -> Way:
        return lambda x, x0, y: (captum.attribute(x, x0, y, n_steps=50, internal_batch_size=size), 50)

    def by_secants(network: SecantNetwork, steps: int) -> Way:
        return lambda x, x0, y: (secant_attributions(network, x, x0[:1], y, steps), steps)

    def by_contract(error: float) -> Way:
        def way(x: Tensor, x0: Tensor, y: Tensor) -> tuple[Tensor, float]:
            found = attribute(folded, x, x0, y, error=error, compiled=True)
            return found.attributions, round(float(found.evaluations.float().mean()), 1)

        return way

    return {
        **{f"Captum, 50 steps, internal_batch_size={size}": by_captum(size) for size in CAPTUM_BATCHES},
        "this package, 50 steps, as trained": lambda x, x0, y: (integrated_gradients(teacher, x, x0, y), 50),
        "folded, frozen, channels-last, 50 steps": lambda x, x0, y: (
            integrated_gradients(folded, x, x0, y, internal_batch_size=32),
            50,
        ),
        "secants, 14 intervals": by_secants(exact, 14),
        **{f"{fused}, {steps} intervals": by_secants(fast, steps) for steps in (14, 9, 6)},
        **{f"attribute(error={error}, compiled=True)": by_contract(error) for error in (0.1, 0.05)},
    }


def reference(folded: nn.Module, problem: Problem) -> Tensor:
    """Attributions by `REFERENCE_STEPS` midpoints, summed in double precision."""
    images, starts, labels = problem
    total, parts = torch.zeros_like(images, dtype=torch.float64), 8
    for part in range(parts):  # each part has its own midpoints: the sums in single precision stay short
        low, high = part / parts, (part + 1) / parts
        left, right = starts + low * (images - starts), starts + high * (images - starts)
        total += integrated_gradients(folded, right, left, labels, REFERENCE_STEPS // parts, "riemann_middle", 32)
    return total


def precisions(folded: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Attributions of the first images by midpoints in both precisions: what does rounding do to the reference?"""
    double = copy.deepcopy(folded).double()
    images, starts, labels = (values[:DOUBLE_IMAGES] for values in problem)
    name = f"{DOUBLE_STEPS} midpoints of {DOUBLE_IMAGES} images, {{}} precision"
    settings = {"target": labels, "n_steps": DOUBLE_STEPS, "method": "riemann_middle", "internal_batch_size": 32}
    return {
        name.format("double"): integrated_gradients(double, images.double(), starts.double(), **settings),
        name.format("single"): integrated_gradients(folded, images, starts, **settings),
    }


def memory(field: str) -> int:
    """A field of Linux's /proc/self/status in kilobytes: VmRSS is in use, VmHWM is the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0])


def run_with_peak(way: Way, problem: Problem) -> tuple[Tensor, float, int | None]:
    """Attributions, evaluations an image, and the megabytes that the run added to the process at its peak."""
    if platform.system() != "Linux":
        return *way(*problem), None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier ways freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = memory("VmRSS")
    result, evaluations = way(*problem)
    return result, evaluations, round((memory("VmHWM") - before) / 1024)


def timed(ways_: dict[str, Way], problem: Problem) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways_}
    for _ in range(ROUNDS):
        for name, way in ways_.items():
            started = time.perf_counter()
            way(*problem)
            times[name].append(time.perf_counter() - started)
    return times


def speeds(times: dict[str, list[float]]) -> dict[str, dict]:
    """Images a second, and the ratio to Captum at its best batch size, paired by rounds."""
    best = min((name for name in times if name.startswith("Captum")), key=lambda name: statistics.median(times[name]))
    return {
        name: {
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "images_per_second": round(IMAGES / statistics.median(seconds), 2),
            "ratio": round(statistics.median(c / t for c, t in zip(times[best], seconds, strict=True)), 2),
        }
        for name, seconds in times.items()
    }


def errors(attributions: Tensor, rise: Tensor, truth: Tensor) -> dict[str, float]:
    """Both errors of the images, in per cent."""
    completeness = 100 * ((attributions.flatten(1).sum(1) - rise) / rise).abs()
    distance = 100 * (attributions - truth).abs().flatten(1).sum(1) / truth.abs().flatten(1).sum(1)
    return {
        "completeness_error_median": round(float(completeness.median()), 4),
        "completeness_error_p95": round(float(completeness.quantile(0.95)), 4),
        "attribution_error_median": round(float(distance.median()), 3),
        "attribution_error_p95": round(float(distance.quantile(0.95)), 3),
    }


def one_threads(all_ways: dict[str, Way], problem: Problem) -> dict[str, dict]:
    """The speeds of Captum and of the compiled secants on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = {name: way for name, way in all_ways.items() if name.startswith(("Captum", "secants, compiled"))}
    found = speeds(timed(chosen, problem))
    torch.set_num_threads(threads)
    return found


def main() -> None:
    keep_freed_memory()  # for every way, as the command line does
    started = time.perf_counter()
    teacher, sample = artifacts.load("teacher"), load_sample("test")
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    images, labels = sample.images(slice(0, IMAGES)), sample.labels[:IMAGES]
    starts = baseline("mean_colour", images)
    problem, all_ways = (images, starts, labels), ways(teacher, folded)
    with torch.no_grad():
        rise = (teacher(images) - teacher(starts)).gather(1, labels.unsqueeze(1)).squeeze(1)
    for way in all_ways.values():  # compiles
        way(images[:2], starts[:2], labels[:2])
    results = {name: run_with_peak(way, problem) for name, way in all_ways.items()}
    rounds = [speeds(timed(all_ways, problem))]
    if torch.get_num_threads() > 1:
        rounds.append(one_threads(all_ways, problem))
    truth = reference(folded, problem)
    rows = []
    for name, speed in ((name, speed) for part in rounds for name, speed in part.items()):
        attributions, evaluations, peak = results[name]
        cost = {"evaluations_per_image": evaluations, "peak_megabytes": peak, "images": IMAGES, "rounds": ROUNDS}
        rows.append({"method": name, **speed, **cost, **errors(attributions, rise, truth)})
    for name, attributions in precisions(folded, problem).items():
        cost = {"device": rows[0]["device"], "evaluations_per_image": DOUBLE_STEPS, "images": DOUBLE_IMAGES}
        rows.append({"method": name, **cost, **errors(attributions, rise[:DOUBLE_IMAGES], truth[:DOUBLE_IMAGES])})
    for entry in rows:
        entry["torch"] = torch.__version__
        print_row(entry)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{time.perf_counter() - started:.0f} s in all")


def print_row(entry: dict) -> None:
    speed = (
        f"{entry['images_per_second']:6.2f} images/s {entry['ratio']:5.2f} x {entry['peak_megabytes']:5} MB"
        if "ratio" in entry
        else " " * 33
    )
    print(
        f"{entry['device'][-9:]}  {entry['method']:52} {speed} {entry['evaluations_per_image']:5} evaluations   "
        f"completeness {entry['completeness_error_median']:6.3f} % (95th {entry['completeness_error_p95']:6.3f})   "
        f"attributions {entry['attribution_error_median']:6.3f} % (95th {entry['attribution_error_p95']:6.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
