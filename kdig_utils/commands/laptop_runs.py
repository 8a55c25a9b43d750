"""Commands of the laptop protocol, whose runs need no GPU and no data set."""

import subprocess
import sys
import time
from typing import Annotated

import torch

from kdig_utils.experiments import laptop
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.reports import print_line, print_now_and_then
from kdig_utils.experiments.side_by_side import SIDE_BY_SIDE, WAYS, Way
from kdig_utils.machine import keep_freed_memory


def laptop_campaign(
    workers: int, at_once: int | None, way: str, budget_minutes: float, report_seconds: float, profile: str
) -> int:
    """Train what is left of the protocol, in this process or in several that share the runs; return the exit status."""
    if workers > 1:
        words = ["--budget-minutes", budget_minutes, "--report-seconds", report_seconds, "--profile", profile]
        command = [sys.executable, "-m", "kdig_utils", "campaign", laptop.NAME, *map(str, words)]
        started = [subprocess.Popen(command) for _worker in range(workers)]
        return max(process.wait() for process in started)
    keep_freed_memory()
    ledger, deadline = laptop.own_ledger_path(profile), time.monotonic() + 60 * budget_minutes
    how = side_by_side(WAYS[way], at_once, laptop.open_laboratory(ledger).device)
    run_ids = laptop.train(ledger, how, deadline, print_now_and_then(report_seconds))
    done = Ledger(ledger).read().query("run_id in @run_ids")
    print(f"{laptop.NAME}: {len(done)} of {len(run_ids)} runs done, in {ledger.name}")
    return 0


def rerun(run_id: Annotated[str, "of a row of results/laptop.csv"]) -> None:
    """Train one run of the laptop protocol again, in a minute or two, and compare it with its committed row.

    The images and the teacher's signals come with the repository: no data set is needed. The committed ledger stays as
    it is.
    """
    keep_freed_memory()
    stored, again = laptop.rerun(run_id, print_now_and_then(10.0))
    print_line(laptop.compared(stored, again))


def side_by_side(way: Way, at_once: int | None, device: torch.device) -> Way:
    """The way with as many runs at once as the command says, or as suits the device."""
    return way._replace(at_once=at_once or SIDE_BY_SIDE[device.type])
