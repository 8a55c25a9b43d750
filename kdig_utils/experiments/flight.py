"""One command that flies: what a GPU that is lent for a quarter of an hour does, from its first minute to its last.

`STAGES` says what comes in which order. What takes long is a process of its own with a limit of time, so that nothing
that breaks in a stage stops the flight. Each stage goes on where it was stopped when the same command is given again.
What there is is packed after each stage, and now and then within the long ones.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from kdig_utils import paths
from kdig_utils.experiments import laptop, packs, probes, teachers
from kdig_utils.experiments.queue import CAMPAIGN
from kdig_utils.experiments.reports import first_line, print_line
from kdig_utils.experiments.study import TEACHER_RECIPE, Study
from kdig_utils.machine import start
from kdig_utils.method import artifacts
from kdig_utils.method.spec import TeacherSpec

# The part of the flight that is kept for a stage, and the most seconds; the other stages share what is left.
SHARES = {"check": (0.2, 120.0), "laptop": (0.2, 100.0), "explanations": (0.08, 40.0), "first calls": (0.1, 60.0)}
ENDLESS = ("check", "laptop", "first calls")  # they could go on for long: they get no more than their share
PROBE_SECONDS = {"cuda": 2.0, "cpu": 1.0}
# What is asked first decides if time is short; `called` is what always works.
PROBED = {"cuda": ("recorded", "compiled", "unbenchmarked", "called"), "cpu": ("called", "compiled")}
NAME = "flight"  # of the pack
LAPTOP_RUNS = "_laptop.csv"  # the ending of the copy of the laptop protocol's ledger
PACK_EVERY = 100.0  # seconds, within a stage
GRACE = 20.0  # seconds that a stage may take beyond its budget, to save and to end
END = 10.0  # seconds of the flight that are kept for its last pack
FIRST_CALLS_END = 30.0  # seconds that its processes take to start, and its last pair to end
PUBLISH_SECONDS = 60.0
LEAST = 5.0  # seconds within which no process does anything useful
OUT_OF_MEMORY = 3  # exit status of a command whose GPU was full
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONUNBUFFERED": "1"}  # many queues on a card


class Flight:
    """One flight: its time, its log and its pack.

    Args:
        seconds: from now on, everything included.
        folder: where the pack is written.
        goal: test accuracy, in per cent, that the claims on training need of their teacher.
    """

    def __init__(self, study: Study, seconds: float, folder: Path, goal: float) -> None:
        self.study, self.seconds, self.folder, self.goal = study, seconds, folder, goal
        self.started = self.packed_at = time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        self.known = set(study.ledger.read()["run_id"])
        self.ways = [("called", 1)]  # what always works, until the check has found better ones
        self.kept = study.folder / "flight"  # the part of the pack that is not in the workspace
        paths.check_writable(folder, 2 * packs.PACK_MOST_BYTES)
        paths.check_writable(study.folders["flights"])

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def time_for(self, stage: str) -> float:
        """Seconds for a stage from now on: all that are left, less the shares of the stages after it."""
        names = list(STAGES)
        later = sum(share(name, self.seconds) for name in names[names.index(stage) + 1 :])
        left = self.seconds - self.elapsed - later
        return min(left, share(stage, self.seconds)) if stage in ENDLESS else left

    def file(self, ending: str) -> Path:
        """A file of this flight, beside its log."""
        return self.study.folders["flights"] / f"{self.stamp}{ending}"

    def log(self, stage: str, line: str) -> None:
        """One line with its time, printed and kept."""
        text = f"{self.elapsed:6.1f} s  {stage}: {line.rstrip()}"
        print_line(text)
        with self.file(".log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def command(self, stage: str, *words: object, seconds: float) -> int:
        """Run one command of the package in a process of its own; return its exit status, negative if it was killed.

        It is killed when it takes longer than `seconds`, or when the flight is over, and dies with this process. Where
        no time is left, nothing is run, and the status is that of a killed process.
        """
        seconds = min(seconds, self.seconds - self.elapsed - END)
        if seconds < LEAST:
            self.log(stage, "no time is left for it")
            return -signal.SIGKILL
        begun, compiled = self.elapsed, self.study.folder.resolve() / "compiled"
        child = start(
            [sys.executable, "-m", "kdig_utils", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(compiled)},
            start_new_session=True,
        )
        limit = threading.Timer(seconds, kill_group, (child,))
        limit.start()
        try:
            for line in child.stdout or ():
                self.log(stage, line)
                if time.monotonic() - self.packed_at > PACK_EVERY:
                    self.pack()
            status = child.wait()
        finally:  # also where the disk is full: two processes must not train the same run
            limit.cancel()
            kill_group(child)
        self.log(stage, f"ended with status {status} after {self.elapsed - begun:.0f} s")
        return status

    def budgeted(self, stage: str, *words: object, grace: float = GRACE) -> int:
        """The same for a command that stops when the stage's time is over; `grace` seconds later it is killed."""
        seconds = max(self.time_for(stage), 0.0)
        options = ("--profile", self.study.profile, "--budget-minutes", seconds / 60)
        return self.command(stage, *words, *options, seconds=seconds + grace)

    def pack(self) -> None:
        """Write what this workspace has made into the pack, and say how much that is, or why it failed."""
        self.packed_at = time.monotonic()
        try:
            pack = self.write_pack()
        except Exception as error:  # a full disk, say: what is trained may still be packed later
            return self.log("pack", f"not written: {first_line(error)}")
        sizes = sum(path.stat().st_size for path in pack.pieces) / 1e6
        left_out = f", no room for {', '.join(path.name for path in pack.left_out)}" if pack.left_out else ""
        return self.log("pack", f"{len(pack.pieces)} files, {sizes:.1f} MB{left_out}")

    def write_pack(self) -> packs.Pack:
        """Log, tables, rows, curves, weights and open checkpoints, in this order, as far as they find room."""
        study, folders, ledger = self.study, self.study.folders, self.study.ledger.read()
        rows = ledger[ledger["run_id"].isin({path.stem for path in folders["weights"].glob("*.safetensors")})]
        table = study.explanations_path
        if table.is_file() and len(told := pd.read_csv(table, dtype=str).merge(rows["run_id"])):
            with paths.replacing(self.file("_explanations.csv")) as part:
                told.to_csv(part, index=False)
        if (laptop_runs := laptop.own_ledger_path(study.profile)).is_file():
            with paths.replacing(self.file(LAPTOP_RUNS)) as part:
                shutil.copyfile(laptop_runs, part)
        endings = ("Z.log", "Z_check.json", "Z_explanations.csv", LAPTOP_RUNS)
        flights = [path for ending in endings for path in sorted(folders["flights"].glob(f"2*{ending}"))]
        files = [*flights, *sorted(folders["first_calls"].glob("[a-z]*.csv")), *packs.belongings(rows, folders)]
        outside = [path for path in files if study.folder not in path.parents]
        packs.pack(rows, outside, self.kept, NAME)
        return packs.pack(rows, files, self.folder, NAME)


def share(stage: str, seconds: float) -> float:
    """The seconds of a flight of `seconds` that are kept for a stage; 0 if it lives on what is left."""
    part, most = SHARES.get(stage, (0.0, 0.0))
    return min(most, part * seconds)


def kill_group(child: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def restore(flight: Flight) -> None:
    """Take up what an earlier call on this machine made, where the repository's files came anew and the workspace not.

    The workspace has the weights and checkpoints; the rest is in the pack that was kept there.
    """
    if pieces := list(flight.kept.glob(f"{NAME}.tar.*")):
        added = packs.unpack(pieces, flight.study.ledger, flight.study.folders)
        flight.known |= set(added)
        flight.log("flight", f"goes on from an earlier call: {len(added)} rows that the ledger did not have")


def check(flight: Flight) -> None:
    """Probe the ways of training and put them in order, each with how many runs side by side.

    What was probed on this machine before, by an earlier call or by the command `probe`, is not probed again. Where an
    earlier flight measured such a device, the way that was the fastest then is probed alone.
    """
    over = flight.elapsed + flight.time_for("check")
    seconds = min(PROBE_SECONDS[flight.device], share("check", flight.seconds) / 40)
    found: dict[str, dict] = {}
    for name in probing_order(flight):
        if found and name == "called":
            continue
        path = flight.study.folder / "probes" / f"{name}.json"
        if not probes.of_this_device(path):
            words = ("probe", name, "--seconds", f"{seconds:.2f}", "--json", path)
            flight.command("check", *words, seconds=over - flight.elapsed)
        if facts := probes.of_this_device(path):
            found[name] = facts
    device = {"device": probes.device_name(), "torch": version("torch")}
    with paths.replacing(flight.file("_check.json")) as part:
        part.write_text(json.dumps({**device, "ways": found}, indent=1) + "\n")
    flight.ways = probes.by_speed(found)
    flight.log("check", "ways, the fastest first: " + ", ".join(f"{name} × {count}" for name, count in flight.ways))


def probing_order(flight: Flight) -> tuple[str, ...]:
    """The ways to probe: the fastest one of an earlier flight on such a device, and those that it did not measure."""
    for path in sorted(flight.study.folders["flights"].glob("*_check.json"), reverse=True):
        if found := probes.of_this_device(path).get("ways"):
            unknown = [name for name in PROBED[flight.device] if name not in found]
            return tuple(dict.fromkeys([probes.by_speed(found)[0][0], *unknown]))
    return PROBED[flight.device]


def teacher(flight: Flight) -> None:
    """Train and publish a teacher, unless there is one that is good enough; a trained one that is not gives way."""
    study, published = flight.study, artifacts.manifest().get(teachers.best(), {}).get("test_accuracy", 0.0)
    if study.profile != "smoke" and published >= flight.goal:
        return flight.log("teacher", f"the published one has {published:.2f} %")
    spec = next_teacher(study, flight.goal)
    for way in ("recorded", "called"):
        words = ("teacher", "--seed", spec.seed, "--campaign", CAMPAIGN, "--way", way)
        if study.ledger.find(spec) is not None or flight.budgeted("teacher", *words) == 0:
            break
    row = study.ledger.find(spec)
    if row is None:
        flight.log("teacher", "not finished; the same command goes on")
    elif study.profile == "smoke":
        flight.log("publish", "a rehearsal publishes nothing")
    elif row["test_accuracy"] > published:
        for _try in range(2):  # the students of another teacher would not count
            if flight.command("publish", "publish", row["run_id"], seconds=PUBLISH_SECONDS) == 0:
                break
    return None


def next_teacher(study: Study, goal: float) -> TeacherSpec:
    """The teacher to train: that of the first seed that did not end below the goal; a rehearsal has one only."""
    spec = replace(study.teacher_spec or TEACHER_RECIPE, data_md5=study.train.md5)
    while study.profile != "smoke" and (row := study.ledger.find(spec)) is not None and row["test_accuracy"] < goal:
        spec = replace(spec, seed=spec.seed + 1)
    return spec


def laboratory(flight: Flight) -> None:
    """The runs of the laptop protocol, which move a 250th of the bytes of a run at the paper's settings."""
    name, at_once = flight.ways[0]
    flight.budgeted("laptop", "campaign", laptop.NAME, "--way", name, "--at-once", at_once)


def train(flight: Flight) -> None:
    """Train the queue, by the next way where one breaks, with half as many side by side where the memory is full."""
    ways = list(flight.ways)
    while ways and flight.time_for("queue") > 1:
        name, at_once = ways.pop(0)
        status = flight.budgeted("queue", "campaign", CAMPAIGN, "--way", name, "--at-once", at_once)
        if status == 0:
            return
        if status == OUT_OF_MEMORY and at_once > 1:
            ways.insert(0, (name, at_once // 2))
        if ways:
            flight.log("queue", f"{name} × {at_once} broke off: goes on as {ways[0][0]} × {ways[0][1]}")


def first_calls(flight: Flight) -> None:
    """The released timing protocol on this device, unless its file is there."""
    device = probes.device_name() if flight.device == "cuda" else "cpu"
    path = flight.study.folders["first_calls"] / (re.sub(r"[\W_]+", "_", device.lower()).strip("_") + ".csv")
    if path.is_file():
        return flight.log("first calls", "measured before on this device")
    seconds = flight.time_for("first calls")
    words = ("first-calls", path, "--seconds", f"{max(seconds - FIRST_CALLS_END, 0):.0f}")
    flight.command("first calls", *words, seconds=seconds + GRACE)
    return None


def summary(flight: Flight) -> str:
    """What came of the flight: finished runs, and students an hour while the queue was trained."""
    rows = flight.study.ledger.read()
    new = rows[~rows["run_id"].isin(flight.known) & (rows["method"] != "teacher")]
    hours = new["seconds"].astype(float).sum() / 3600
    by_epochs = ", ".join(f"{number} of {epochs} epochs" for epochs, number in new["epochs"].value_counts().items())
    rate = f"; {len(new) / hours:.0f} an hour" if hours > 0 else ""
    return f"{len(new)} new students ({by_epochs or 'none'}){rate}"


STAGES: dict[str, Callable[[Flight], object]] = {
    "restore": restore,
    "check": check,
    "teacher": teacher,
    "laptop": laboratory,
    "signals": lambda flight: flight.budgeted("signals", "signals"),
    "queue": train,
    # The rows of each network are written when it is done: nothing to save.
    "explanations": lambda flight: flight.budgeted("explanations", "explain", grace=0.0),
    "first calls": first_calls,
}


def fly(study: Study, minutes: float, folder: Path, goal: float) -> Flight:
    """Fly for so many minutes, packs in `folder`; nothing that a stage does wrong ends the flight."""
    flight = Flight(study, 60 * minutes, folder, goal)
    flight.log("flight", f"{minutes:g} minutes on {flight.device}, profile {study.profile}")
    for name, stage in STAGES.items():
        try:
            stage(flight)
        except Exception as error:  # whatever it is, the stages after this one may still succeed
            flight.log(name, f"broke off: {first_line(error)}")
        flight.pack()
    flight.log("flight", summary(flight))
    flight.pack()
    return flight
