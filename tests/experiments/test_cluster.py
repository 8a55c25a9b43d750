"""A campaign on a cluster: whatever dies, the ledger ends as that of one process, with each run once."""

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from distributed import Client
from small_laboratory import small_laboratory, small_run

from kdig_utils import machine
from kdig_utils.__main__ import main
from kdig_utils.experiments import cluster
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.steps import TrainingDiverged
from kdig_utils.method.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]
RUNS = [small_run(seed) for seed in range(4)]
# The command itself, with four short runs in place of the protocol's.
COMMAND = """
import sys
from pathlib import Path
from small_laboratory import small_laboratory, small_run
from kdig_utils.__main__ import main
from kdig_utils.experiments import laptop
laptop.open_laboratory = lambda ledger, images: small_laboratory(ledger.parent)
laptop.queue = lambda: [small_run(seed) for seed in range(4)]
sys.exit(main(["campaign", "laptop", "--report-seconds", "0.5", *sys.argv[1:]]))
"""
SAME = ["run_id", "test_accuracy", "train_loss", "weights_sha256", "train_images", "device", "spec"]
LONG = 240  # seconds: for a machine that does much else


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The ledger of one process."""
    study = small_laboratory(tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(1)
    study.run_all(RUNS, report=lambda line: None)
    return study.ledger.read()


def same(rows: pd.DataFrame, others: pd.DataFrame) -> None:
    ours, theirs = (table.sort_values("run_id")[SAME].reset_index(drop=True) for table in (rows, others))
    pd.testing.assert_frame_equal(ours, theirs)


# Processes


class Loopback:
    """A scheduler, workers and the command, each a process; all share one workspace."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        own = {"KDIG_WORKSPACE": str(folder), "KDIG_DATA": str(folder / "none"), "KDIG_ROOT": str(ROOT)}
        self.environment = {**os.environ, **own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(self, *words: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started = machine.start([sys.executable, *words], env=self.environment, cwd=self.folder, **pipes)
        self.stack.callback(started.wait)
        self.stack.callback(started.kill)
        return started

    def scheduler(self) -> subprocess.Popen:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"]
        return self.start("-m", "distributed.cli.dask_scheduler", *where)

    def worker(self) -> subprocess.Popen:
        how = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--host", "127.0.0.1"]
        return self.start("-m", "distributed.cli.dask_worker", self.address, *how)

    def command(self, *words: str) -> subprocess.Popen:
        return self.start("-c", COMMAND, *words)

    @property
    def laboratory(self) -> Path:
        return self.folder / "laptop"

    def rows(self) -> pd.DataFrame:
        return Ledger(self.laboratory / "runs.csv").read()

    def checkpoints(self) -> set[str]:
        return {path.stem for path in self.laboratory.glob("checkpoints/*.pt")}


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    with ExitStack() as stack:
        yield Loopback(tmp_path, stack)


def until(happened: Callable[[], object], process: subprocess.Popen) -> None:
    begun = time.monotonic()
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < LONG
        time.sleep(0.05)


@pytest.mark.slow
def test_workers_killed_and_a_scheduler_lost_leave_the_ledger_of_one_process(
    loopback: Loopback, alone: pd.DataFrame
) -> None:
    words = ["--scheduler", loopback.address]
    scheduler, workers, command = loopback.scheduler(), [loopback.worker(), loopback.worker()], loopback.command(*words)
    until(lambda: len(loopback.checkpoints()) == 2, command)
    workers[0].kill()  # in the middle of a run
    until(lambda: len(loopback.rows()) and loopback.checkpoints(), command)  # the other one is in its next
    scheduler.kill()
    _output, told = command.communicate(timeout=LONG)
    assert command.returncode == 2
    assert "same command again" in told
    assert len(told.splitlines()) == 1
    assert workers[1].wait(timeout=LONG) is not None  # a worker without a scheduler ends
    before = loopback.rows()
    assert 1 <= len(before) < len(RUNS)

    _again = loopback.scheduler(), loopback.worker()
    resumed = loopback.command(*words)
    assert resumed.wait(timeout=LONG) == 0, resumed.stderr.read()
    same(loopback.rows(), alone)
    assert loopback.rows()["run_id"].is_unique
    pd.testing.assert_frame_equal(loopback.rows()[: len(before)], before)  # what was in the ledger stays as it was
    assert not loopback.checkpoints()


@pytest.mark.slow
def test_several_workers_are_processes_of_this_machine_that_end_with_the_command(
    loopback: Loopback, alone: pd.DataFrame
) -> None:
    command = loopback.command("--workers", "2")
    until(lambda: len(loopback.checkpoints()) == 2, command)
    workers = psutil.Process(command.pid).children(recursive=True)
    assert len(workers) >= 2
    _output, told = command.communicate(timeout=LONG)
    assert command.returncode == 0, told
    assert not psutil.wait_procs(workers, timeout=LONG)[1]
    same(loopback.rows(), alone)


# One process: what a task does


@contextmanager
def one_worker(resources: dict[str, int] | None = None) -> Iterator[Client]:
    how = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with Client(**how, resources=resources, set_as_default=False) as client:
        yield client


def run_all(client: Client, folder: Path, specs: list[RunSpec], deadline: float = math.inf, at_once: int = 1) -> list:
    lines: list[str] = []
    study = small_laboratory(folder)
    return cluster.run_all(client, study, specs, "laptop", Way(at_once), deadline, lines.append)


def test_a_run_that_diverges_is_named_and_stops_no_other(tmp_path: Path) -> None:
    bad = small_run(0, 1, learning_rate=1e30)
    with one_worker() as client, pytest.raises(TrainingDiverged) as caught:
        run_all(client, tmp_path, [bad, small_run(0, 1), small_run(1, 1)])
    study = small_laboratory(tmp_path)
    assert study.completed(bad).run_id in str(caught.value)
    assert sorted(study.ledger.read()["seed"]) == [0, 1]


def test_a_bundle_is_as_many_runs_as_train_side_by_side_on_a_slot(tmp_path: Path) -> None:
    specs = [small_run(seed, 1) for seed in range(3)]
    with one_worker({"GPU": 1}) as client:
        assert cluster.device(client) == "cuda"
        ids = run_all(client, tmp_path, specs, at_once=2)
    rows = small_laboratory(tmp_path).ledger.read()
    assert sorted(rows["run_id"]) == sorted(ids)


def test_a_task_that_is_run_twice_trains_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = cluster.train
    monkeypatch.setattr(cluster, "train", lambda words, signals: once(words, signals) + once(words, signals))
    specs = [small_run(seed, 1) for seed in range(2)]
    with one_worker() as client:
        run_all(client, tmp_path, specs, at_once=2)
    assert sorted(small_laboratory(tmp_path).ledger.read()["seed"]) == [0, 1]


def test_the_signals_of_the_teacher_come_first(tmp_path: Path) -> None:
    with one_worker() as client:
        run_all(client, tmp_path, [small_run(0, 1, "kd_ig_at"), small_run(0, 1)])
    assert set(small_laboratory(tmp_path).ledger.read()["method"]) == {"kd_ig_at", "student"}


def test_after_the_deadline_nothing_is_trained(tmp_path: Path) -> None:
    with one_worker() as client:
        run_all(client, tmp_path, [small_run(0)], time.monotonic())
    assert small_laboratory(tmp_path).ledger.read().empty


def test_a_worker_without_the_shared_folder_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Path("/nowhere/shared")
    monkeypatch.setattr(cluster, "Path", lambda _name: elsewhere)
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with one_worker() as client, pytest.raises(RuntimeError, match="/nowhere"):
        run_all(client, tmp_path, [small_run(0, 1)])


def test_where_no_scheduler_answers_one_sentence_says_so(capsys: pytest.CaptureFixture) -> None:
    assert main(["campaign", "laptop", "--scheduler", "no address"]) == 2
    told = capsys.readouterr().err
    assert "no address" in told
    assert "dask scheduler" in told


def test_without_dask_one_sentence_says_what_to_install(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdig_utils.experiments

    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "kdig_utils.experiments.cluster")
    monkeypatch.delattr(kdig_utils.experiments, "cluster")
    assert main(["campaign", "laptop", "--workers", "2"]) == 2
    assert "'.[cluster]'" in capsys.readouterr().err
