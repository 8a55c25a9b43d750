"""Commands of the laptop protocol, whose runs need no GPU and no data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import torch

from kdig_utils.experiments import laptop
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.queue import RunAll
from kdig_utils.experiments.reports import Report, print_line, print_now_and_then
from kdig_utils.experiments.side_by_side import SIDE_BY_SIDE, Way
from kdig_utils.experiments.study import Study
from kdig_utils.machine import keep_freed_memory


def laptop_campaign(profile: str, way: Way, deadline: float, report: Report, run_all: RunAll) -> int:
    """Train what is left of the protocol; return the exit status."""
    keep_freed_memory()
    ledger = laptop.own_ledger_path(profile)
    run_ids = laptop.train(ledger, way, deadline, report, run_all)
    done = Ledger(ledger).read().query("run_id in @run_ids")
    print(f"{laptop.NAME}: {len(done)} of {len(run_ids)} runs done, in {ledger.name}")
    return 0


@contextmanager
def trainer(scheduler: str | None, workers: int) -> Iterator[tuple[RunAll, str]]:
    """What trains the runs, and on which kind of device: this process, several, or those of a scheduler."""
    if scheduler is None and workers == 1:
        yield Study.run_all, "cuda" if torch.cuda.is_available() else "cpu"
        return
    from kdig_utils.experiments import cluster

    with cluster.connected(scheduler, workers) as client:
        yield partial(cluster.run_all, client), cluster.device(client)


def rerun(run_id: Annotated[str, "of a row of results/laptop.csv"]) -> None:
    """Train one run of the laptop protocol again, in a minute or two, and compare it with its committed row.

    The images and the teacher's signals come with the repository: no data set is needed. The committed ledger stays as
    it is.
    """
    keep_freed_memory()
    stored, again = laptop.rerun(run_id, print_now_and_then(10.0))
    print_line(laptop.compared(stored, again))


def side_by_side(way: Way, at_once: int | None, device: str) -> Way:
    """The way with as many runs at once as the command says, or as suits the device."""
    return way._replace(at_once=at_once or SIDE_BY_SIDE[device])
