"""How long the teacher's signals take: maps by Integrated Gradients, logits and attention maps.

Maps in the paper's 50 steps of Gauss-Legendre, and in 6 intervals by secants, as complete as those (chapter 17).

`compute_signals` as a training needs it, into a folder that is thrown away, after a warm-up: on a GPU all 50,000 (the
1,000 of the repository, repeated), on a CPU a few, from which the time of 50,000 is extrapolated. Prints the row and
writes `benchmarks/results/signals.json`; rows of other devices that are there stay.

    python benchmarks/signals.py
    python benchmarks/signals.py --quick    # a rehearsal; writes nothing
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from kdig_utils import machine
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import artifacts
from kdig_utils.method.cifar10 import ImageSet, load_sample
from kdig_utils.method.precompute import compute_signals
from kdig_utils.method.signals import SignalSettings
from kdig_utils.paths import replacing

RESULTS = Path(__file__).parent / "results" / "signals.json"
WHOLE = 50_000
IMAGES = {"cpu": 128, "cuda": WHOLE}
WARM_UP = {"cpu": 8, "cuda": 4096}
RULES = (SignalSettings(), SignalSettings(n_steps=6, method="secant"))


def seconds_for(images: ImageSet, teacher: torch.nn.Module, settings: SignalSettings) -> float:
    """Seconds until the signals of these images are on disk."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compute_signals(teacher, images, Path(folder), settings)
        return time.perf_counter() - started


def measured(count: int, warm_up: int, settings: SignalSettings) -> dict[str, object]:
    """The row of this device, from `count` images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, sample = artifacts.load("teacher").to(device), load_sample("train")
    seconds_for(sample.subset(torch.arange(warm_up) % len(sample)), teacher, settings)
    images = sample.subset(torch.arange(count) % len(sample))
    seconds = seconds_for(images, teacher, settings)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "method": settings.method,
        "n_steps": settings.n_steps,
        "images": count,
        "seconds": float(f"{seconds:.3g}"),
        "images_per_second": float(f"{count / seconds:.3g}"),
        "seconds_for_50000": float(f"{WHOLE * seconds / count:.3g}"),
        "torch": torch.__version__,
    }


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Put the rows into the file in place of those of this device."""
    others = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [each for each in others if each["device"] != rows[0]["device"]]
    with replacing(path) as part:
        part.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a rehearsal; writes nothing")
    arguments = parser.parse_args()
    keep_freed_memory()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        print(json.dumps(measured(4, 1, SignalSettings(n_steps=2)), indent=1))
        return
    rows = [measured(IMAGES[kind], WARM_UP[kind], settings) for settings in RULES]
    print(json.dumps(rows, indent=1))
    write(rows, RESULTS)


if __name__ == "__main__":
    main()
