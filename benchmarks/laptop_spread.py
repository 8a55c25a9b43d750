"""By how much a run of the laptop protocol moves on another machine: other threads, instructions, or versions.

Trains some runs of results/laptop.csv again in this environment and adds a line each to results/laptop_spread.csv.
`rerun` and chapter 06 say from these lines whether a difference is one that machines make.

    python benchmarks/laptop_spread.py "two threads" --threads 2
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/laptop_spread.py "AVX2 instructions"
    OTHER_ENVIRONMENT/bin/python benchmarks/laptop_spread.py "torch 2.11"
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from kdig_utils.experiments import laptop
from kdig_utils.experiments.ledger import Ledger, student_spec
from kdig_utils.experiments.reports import print_line
from kdig_utils.machine import keep_freed_memory
from kdig_utils.paths import replacing

CONDITIONS = ("student", "kd", "ig")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="what is other than where the committed rows were made, in words")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    keep_freed_memory()
    for run in laptop.runs(CONDITIONS, range(given.seeds)):
        add_line(given.what, run.bare_id, given.threads)


def add_line(what: str, bare_id: str, threads: int) -> None:
    """Train the committed run of this bare identity again and note its accuracy beside the committed one."""
    rows = Ledger(laptop.ledger_path()).read()
    (stored,) = (row for _index, row in rows.iterrows() if student_spec(row).bare_id == bare_id)
    with tempfile.TemporaryDirectory() as folder:
        study = laptop.open_laboratory(Path(folder) / "runs.csv", Path(folder))
        torch.set_num_threads(threads)
        study.run_all([student_spec(stored)], laptop.NAME, report=lambda line: None)
        again = study.ledger.read().iloc[0]
    path = laptop.spread_path()
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    line = {
        "run_id": stored["run_id"],
        "what": what,
        "committed": float(stored["sample_accuracy"]),
        "again": float(again["sample_accuracy"]),
        "same_weights": bool(stored["weights_sha256"] == again["weights_sha256"]),
        "torch": again["torch"],
        "device": again["device"],
    }
    with replacing(path) as part:
        pd.concat([table, pd.DataFrame([line])]).to_csv(part, index=False)
    print_line(f"{what}: {line}")


if __name__ == "__main__":
    main()
