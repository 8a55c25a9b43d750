"""The figures of chapter 14 for this machine: the court with time for every runtime, and many first calls.

python benchmarks/latency.py NAME writes results/latency/NAME.json and results/latency/first_calls/NAME.csv. Run it
alone on the machine; with KDIG_DATA set, accuracies are those of all 10,000 test images. Takes some minutes.
"""

import sys

import pandas as pd

from kdig_utils import paths
from kdig_utils.edge import benchmark, timing

PROCESSES = 20
ORDERS = (("teacher", "student"), ("student", "teacher"))


def main(name: str) -> None:
    """Measure and write both files."""
    folder = paths.repository_root() / "results" / "latency"
    benchmark.run("kd_ig_k5", 600.0, folder / f"{name}.json")
    found = [timing.first_calls(order, 64, 3, PROCESSES) for order in ORDERS]
    with paths.replacing(folder / "first_calls" / f"{name}.csv") as part:
        pd.concat(found).round(3).to_csv(part, index=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/latency.py NAME    # of this machine, as in results/latency/NAME.json")
    main(sys.argv[1])
