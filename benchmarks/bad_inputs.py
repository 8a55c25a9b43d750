"""Generated bad inputs: what the package says of each, and whether what is harmless gives the right result.

Specs, ledgers, latency files, images, attributions, stores, packs, networks, checkpoints and the command line. Each bad
input must end in an exception that the package documents, which names value and remedy: not in a wrong number, an
internal traceback or a silent success. Prints the counts by surface and writes `benchmarks/results/bad_inputs.json`.

    python benchmarks/bad_inputs.py
    python benchmarks/bad_inputs.py --quick    # few of each surface; writes nothing
    python benchmarks/bad_inputs.py --only packs
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import torch

from kdig_utils.experiments.ledger import code_commit

RESULTS = Path(__file__).parent / "results" / "bad_inputs.json"
EXAMPLES, QUICK = 1500, 100  # of each surface; two that are alike count once

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
generated: Any = importlib.import_module("generated_inputs")


def tallies(only: str, count: int) -> Iterator[tuple[str, Any]]:
    """What came of each surface whose name contains `only`, printed."""
    for surface, cases in generated.SURFACES.items():
        if only in surface:
            tally = generated.tried(cases, count)
            print(generated.line(surface, tally), flush=True)
            yield surface, tally


def report(found: dict[str, Any]) -> dict[str, object]:
    """The counts, with the commit and the machine."""
    return {
        "commit": code_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "seed": generated.SEED,
        "seconds": round(sum(tally.seconds for tally in found.values())),
        "refused": sum(tally.refused for tally in found.values()),
        "right": sum(tally.right for tally in found.values()),
        "surfaces": {surface: {**vars(tally), "faults": dict(tally.faults)} for surface, tally in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few of each surface, and write no results")
    parser.add_argument("--only", default="", metavar="WORDS", help="surfaces whose names have these words in them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = dict(tallies(given.only, QUICK if given.quick else EXAMPLES))
    faults = sum(tally.faults.total() for tally in found.values())
    refused, right = (sum(getattr(tally, name) for tally in found.values()) for name in ("refused", "right"))
    print(f"in all: {refused} bad inputs refused, {right} harmless ones right, {faults} faults")
    if not (given.quick or given.only):
        RESULTS.write_text(json.dumps(report(found), indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
