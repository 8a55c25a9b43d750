"""Attribution maps of real images a second: Captum against this package, at what error, one lever after the other.

The ways take their turns in one process, warmed up; medians over the rounds. Two errors are reported: that of
completeness, and the distance (sum of absolute differences, relative) to a reference of 1,024 midpoints, because a
rule can be complete and wrong. The reference's gradients are in single precision and its sums in double: PyTorch's
double-precision convolutions would need half an hour. Prints the table and writes
`benchmarks/results/integrated_gradients.json`.

    python benchmarks/integrated_gradients.py
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils import artifacts
from kdig_utils.attribution import attribute, half_pays, secant_attributions
from kdig_utils.cifar10 import load_sample
from kdig_utils.integrated_gradients import baseline, integrated_gradients
from kdig_utils.secants import SecantNetwork

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from captum.attr import IntegratedGradients

IMAGES, ROUNDS, REFERENCE_STEPS = 16, 3, 1024
CAPTUM_BATCHES = (16, 32, 64)
RESULTS = Path(__file__).parent / "results" / "integrated_gradients.json"
Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]


def ways(teacher: nn.Module) -> dict[str, Way]:
    """Each way takes images, baselines and labels; it gives attributions and its evaluations an image."""
    captum = IntegratedGradients(teacher)
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    half = half_pays(torch.device("cpu"))
    exact, fast = SecantNetwork(folded), SecantNetwork(folded, half, compiled=True)
    fused = f"secants, compiled{', bfloat16 backward' if half else ''}"

    def by_captum(size: int) -> Way:
        return lambda x, x0, y: (captum.attribute(x, x0, y, n_steps=50, internal_batch_size=size), 50)

    def by_secants(network: SecantNetwork, steps: int) -> Way:
        return lambda x, x0, y: (secant_attributions(network, x, x0[:1], y, steps), steps)

    def by_contract(error: float) -> Way:
        def way(x: Tensor, x0: Tensor, y: Tensor) -> tuple[Tensor, float]:
            found = attribute(folded, x, x0, y, error=error)
            return found.attributions, round(float(found.evaluations.float().mean()), 1)

        return way

    return {
        **{f"Captum, 50 steps, internal_batch_size={size}": by_captum(size) for size in CAPTUM_BATCHES},
        "this package, 50 steps, as trained": lambda x, x0, y: (integrated_gradients(teacher, x, x0, y), 50),
        "folded, frozen, channels-last, 50 steps": lambda x, x0, y: (
            integrated_gradients(folded, x, x0, y, internal_batch_size=32),
            50,
        ),
        "secants, 16 intervals": by_secants(exact, 16),
        **{f"{fused}, {steps} intervals": by_secants(fast, steps) for steps in (16, 14, 9, 6)},
        **{f"attribute(error={error})": by_contract(error) for error in (0.1, 0.05)},
    }


def reference(teacher: nn.Module, images: Tensor, starts: Tensor, labels: Tensor) -> Tensor:
    """Attributions by `REFERENCE_STEPS` midpoints, summed in double precision."""
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    total, parts = torch.zeros_like(images, dtype=torch.float64), 8
    for part in range(parts):  # each part has its own midpoints: the sums in single precision stay short
        low, high = part / parts, (part + 1) / parts
        left, right = starts + low * (images - starts), starts + high * (images - starts)
        total += integrated_gradients(folded, right, left, labels, REFERENCE_STEPS // parts, "riemann_middle", 32)
    return total


def peak_megabytes(name: str) -> int:
    """Memory that one way adds to a fresh process, for 8 images."""
    command = [sys.executable, __file__, "--memory", name]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))


def added_by(name: str) -> float:
    teacher, sample = artifacts.load("teacher"), load_sample("train")
    images, labels = sample.images(slice(0, 8)), sample.labels[:8]
    starts, way = baseline("mean_colour", images), ways(teacher)[name]
    teacher(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    way(images, starts, labels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    teacher, sample = artifacts.load("teacher"), load_sample("train")
    images, labels = sample.images(slice(0, IMAGES)), sample.labels[:IMAGES]
    starts = baseline("mean_colour", images)
    with torch.no_grad():
        rise = (teacher(images) - teacher(starts)).gather(1, labels.unsqueeze(1)).squeeze(1)
    all_ways = ways(teacher)
    results = {name: way(images, starts, labels) for name, way in all_ways.items()}  # the warm-up, too
    times: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(ROUNDS):
        for name, way in all_ways.items():
            started = time.perf_counter()
            way(images, starts, labels)
            times[name].append(time.perf_counter() - started)
    best = min((name for name in times if name.startswith("Captum")), key=lambda name: statistics.median(times[name]))
    truth = reference(teacher, images, starts, labels)
    rows = [row(name, *result, times[name], times[best], rise, truth) for name, result in results.items()]
    for entry in rows:
        print_row(entry)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def row(
    name: str,
    result: Tensor,
    evaluations: float,
    times: list[float],
    captum: list[float],
    rise: Tensor,
    truth: Tensor,
) -> dict:
    """One line of the table; errors in per cent."""
    completeness = 100 * ((result.flatten(1).sum(1) - rise) / rise).abs()
    distance = 100 * (result - truth).abs().flatten(1).sum(1) / truth.abs().flatten(1).sum(1)
    return {
        "method": name,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "images_per_second": round(IMAGES / statistics.median(times), 2),
        "ratio": round(statistics.median(c / t for c, t in zip(captum, times, strict=True)), 2),
        "evaluations_per_image": evaluations,
        "completeness_error_median": round(float(completeness.median()), 4),
        "completeness_error_p95": round(float(completeness.quantile(0.95)), 4),
        "attribution_error_median": round(float(distance.median()), 3),
        "attribution_error_p95": round(float(distance.quantile(0.95)), 3),
        "peak_megabytes": peak_megabytes(name),
        "images": IMAGES,
        "rounds": ROUNDS,
        "torch": torch.__version__,
    }


def print_row(entry: dict) -> None:
    print(
        f"{entry['method']:52} {entry['images_per_second']:6.2f} images/s {entry['ratio']:5.2f} x "
        f"{entry['evaluations_per_image']:5} evaluations   completeness {entry['completeness_error_median']:6.3f} % "
        f"(95th {entry['completeness_error_p95']:6.3f})   attributions {entry['attribution_error_median']:5.2f} % "
        f"(95th {entry['attribution_error_p95']:5.2f})   {entry['peak_megabytes']:5} MB",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(added_by(sys.argv[2]))
    else:
        main()
