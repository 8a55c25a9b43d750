"""A campaign on more than one machine: bundles of runs are tasks of Dask, for workers that share the study's folders.

Dask runs a task again whose worker was lost. Each run is reserved before it is trained (`reservations`), so that it is
trained once.
"""

import contextlib
import logging
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from distributed import Client, Future, LocalCluster

from kdig_utils import machine
from kdig_utils.experiments.reports import Report, TrainingDiverged, first_line, print_now_and_then, raise_diverged
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.study import Study
from kdig_utils.method.precompute import SignalsNotFinished
from kdig_utils.method.spec import RunSpec
from kdig_utils.paths import repository_root

HERE = {"host": "127.0.0.1", "dashboard_address": None, "memory_limit": 0, "silence_logs": logging.CRITICAL}
RETRIES = 2  # of a task that fails: a shared folder may be away for a moment
PAUSE, PATIENCE = 5, 90  # seconds: what a lost host had reserved is free after a while; workers save after the deadline


@contextlib.contextmanager
def connected(scheduler: str | None, workers: int) -> Iterator[Client]:
    """A client of the scheduler at an address; without one, of processes of one thread each on this machine."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what is wrong is said here, in a sentence
    with contextlib.ExitStack() as stack:
        new = None if scheduler else stack.enter_context(LocalCluster(None, workers, 1, **HERE))
        try:
            client = stack.enter_context(Client(scheduler or new, timeout=30, set_as_default=False))
        except (OSError, ValueError) as error:
            told = f"no scheduler answers at {scheduler} ({first_line(error)}): start one with `dask scheduler`"
            raise ConnectionError(told) from error
        yield client


def device(client: Client) -> str:
    """What the workers train on: `cuda` where one was started with `--resources GPU=1`, else `cpu`."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return "cuda" if any("GPU" in worker["resources"] for worker in workers) else "cpu"


def run_all(
    client: Client, study: Study, specs: Iterable[RunSpec], campaign: str, way: Way, deadline: float, report: Report
) -> list[str]:
    """As `Study.run_all`, by the workers of a cluster. Runs that others hold are asked for again, for a while.

    Raises:
        TrainingDiverged: as there; all other runs are in the ledger, as with a RuntimeError, for another reason.
        OSError: the scheduler was lost, or a worker does not answer long after the deadline.
    """
    specs, diverged, waited = [study.completed(spec) for spec in specs], [], 0
    left = unfinished(study, specs)
    variables = [("KDIG_ROOT", str(repository_root())), *os.environ.items()]
    study.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".shared_", dir=study.folder) as shared:
        until = time.time() + deadline - time.monotonic()  # machines agree on the former clock only
        told = {"campaign": campaign, "way": way, "until": until, "shared": Path(shared.name)}
        told["environment"] = {name: value for name, value in variables if name.startswith("KDIG_")}
        told["study"] = pickle.dumps(replace(study))  # without what it has loaded
        while left and waited <= PATIENCE and time.monotonic() < deadline:
            time.sleep(min(waited, PAUSE))
            diverged += ended(client, submitted(client, left, told), deadline, report)
            before, left = len(left), [run for run in unfinished(study, left) if run.run_id not in str(diverged)]
            waited = 0 if len(left) < before else waited + PAUSE
    raise_diverged(diverged)
    return [spec.run_id for spec in specs]


def unfinished(study: Study, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs that the ledger lacks, those first that have a checkpoint."""
    known, saved = set(study.ledger.read()["run_id"]), {path.stem for path in study.folders["checkpoints"].glob("*")}
    return sorted((spec for spec in specs if spec.run_id not in known), key=lambda spec: spec.run_id not in saved)


def submitted(client: Client, specs: list[RunSpec], told: dict[str, Any]) -> list[Future]:
    """Tasks for all runs, in this order; those with a teacher wait for its signals, which one worker computes."""
    usual = {"pure": False, "retries": RETRIES, "resources": {"GPU": 1} if device(client) == "cuda" else {}}
    size = told["way"].at_once
    bundles = [specs[place : place + size] for place in range(0, len(specs), size)]
    taught = [spec for spec in specs if spec.uses_teacher]
    signals = client.submit(compute_signals, pickle.dumps((taught, told)), **usual) if taught else None
    return [
        client.submit(train, pickle.dumps((its, told)), signals if {*its} & {*taught} else None, priority=-n, **usual)
        for n, its in enumerate(bundles)
    ]


def ended(client: Client, tasks: list[Future], deadline: float, report: Report) -> list[str]:
    """What diverged, when all tasks have ended; raises as `run_all` does."""
    begun, address = time.monotonic(), client.scheduler.address
    while "pending" in (states := [task.status for task in tasks]) and "cancelled" not in states:
        if time.monotonic() > deadline + PATIENCE:
            raise TimeoutError(f"a worker of {address} does not answer: see its log, then run the same command again")
        done = len(states) - states.count("pending")
        minutes = (time.monotonic() - begun) / 60 / max(done, 1) * (len(tasks) - done)
        report(f"{done} of {len(tasks)} bundles of runs done" + f", about {minutes:.1f} min left" * bool(done))
        time.sleep(0.5)
    if "cancelled" in states:
        raise ConnectionError(f"the scheduler at {address} was lost: start it, then run the same command again")
    if failed := [task.exception() for task in tasks if task.status == "error"]:
        raise RuntimeError(f"{len(failed)} bundles of runs failed, the first by {first_line(failed[0])}")
    return [diverged for task in tasks if (diverged := task.result())]


opened = lru_cache(1)(pickle.loads)  # on a worker: the images and signals of a study stay on the device


def received(words: bytes) -> tuple[Study, list[RunSpec], float, dict[str, Any]]:
    """On a worker: the study, the runs and the deadline (`time.monotonic`) of a task, and what else it was told."""
    specs, told = pickle.loads(words)
    if not told["shared"].is_file():
        raise FileNotFoundError(f"{platform.node()} does not see {told['shared'].parent}: mount it there at this path")
    os.environ.update(told["environment"])
    torch.set_num_threads(1)  # so that a run ends the same beside another
    machine.keep_freed_memory()
    return opened(told["study"]), specs, time.monotonic() + told["until"] - time.time(), told


def compute_signals(words: bytes) -> None:
    """On a worker: compute what these runs read of the teacher, as far as the deadline lets it."""
    study, specs, deadline, _told = received(words)
    with contextlib.suppress(SignalsNotFinished):  # then the runs have no time either
        for spec in specs:
            study.signals_of(spec, deadline)


def train(words: bytes, _signals: None) -> str:
    """On a worker: train those of these runs that nobody has trained or reserved; return what diverged."""
    study, specs, deadline, told = received(words)
    try:
        study.run_all(specs, told["campaign"], told["way"], deadline, print_now_and_then(30.0))
    except TrainingDiverged as error:
        return str(error)
    return ""
