"""One command that flies: what a GPU that is lent for a quarter of an hour does, from its first minute to its last.

Stages: check, teacher, its publication, signals, queue, explanations, first calls. Each is a process of its own with a
limit of time, so that nothing that breaks in one stops the flight; each goes on where it was stopped when the same
command is given again; and what there is is packed after each, and now and then within the long ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from kdig_utils import paths
from kdig_utils.experiments import packs, probes, teachers
from kdig_utils.experiments.packs import Pack
from kdig_utils.experiments.queue import CAMPAIGN
from kdig_utils.experiments.reports import first_line
from kdig_utils.experiments.study import TEACHER_RECIPE, Study, print_line
from kdig_utils.machine import start
from kdig_utils.method import artifacts
from kdig_utils.method.spec import TeacherSpec

PROBE_SECONDS = {"cuda": 2.0, "cpu": 1.0}
# What is asked first decides if time is short; `called` is what always works.
PROBED = {"cuda": ("recorded", "compiled", "unbenchmarked", "called"), "cpu": ("called", "compiled")}
SHARES = {"check": 0.2, "explanations": 0.08, "first calls": 0.1}  # of the flight; the others share what is left
MOST_SECONDS = {"check": 120.0, "explanations": 40.0, "first calls": 60.0}
LAST = ("explanations", "first calls")
NAME = "flight"  # of the pack
PACK_EVERY = 100.0  # seconds, within a stage
GRACE = 20.0  # seconds that a stage may take beyond its budget, to save and to end
END = 10.0  # seconds of the flight that are kept for its last pack
FIRST_CALLS_END = 30.0  # seconds that its processes take to start, and its last pair to end
LEAST = 5.0  # seconds within which no process does anything useful
OUT_OF_MEMORY = 3  # exit status of a command whose GPU was full
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONUNBUFFERED": "1"}


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
        paths.check_writable(folder, 2 * packs.PACK_MOST_BYTES)
        paths.check_writable(study.folders["flights"])

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left for teacher, signals and queue: those of the stages after them are kept."""
        return self.seconds - self.elapsed - sum(share(name, self.seconds) for name in LAST)

    def file(self, ending: str) -> Path:
        """A file of this flight, beside its log."""
        return self.study.folders["flights"] / f"{self.stamp}{ending}"

    def log(self, stage: str, line: str) -> None:
        """One line with its time, printed and kept."""
        text = f"{self.elapsed:6.1f} s  {stage}: {line.rstrip()}"
        print_line(text)
        with self.file(".log").open("a") as file:
            file.write(text + "\n")

    def command(self, stage: str, *words: object, seconds: float, report: bool = True) -> int:
        """Run one command of the package in a process of its own; return its exit status, negative if it was killed.

        It is killed when it takes longer than `seconds`, or when the flight is over, and dies with this process. Where
        no time is left, nothing is run, and the status is that of a killed process.
        """
        seconds = min(seconds, self.seconds - self.elapsed - END)
        if seconds < LEAST:
            self.log(stage, "no time is left for it")
            return -signal.SIGKILL
        command = [sys.executable, "-m", "kdig_utils", *map(str, words)]
        begun = self.elapsed
        child = start(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        limit = threading.Timer(seconds, kill_group, (child,))
        limit.daemon = True
        limit.start()
        try:
            for line in child.stdout:
                self.log(stage, line)
                if time.monotonic() - self.packed_at > PACK_EVERY:
                    self.pack()
            status = child.wait()
        finally:  # also where the disk is full: two processes must not train the same run
            kill_group(child)
            limit.cancel()
        self.log(stage, f"ended with status {status} after {self.elapsed - begun:.0f} s")
        if report:
            self.log("pack", self.pack())
        return status

    @property
    def environment(self) -> dict[str, str]:
        """What the processes find in theirs: many queues on a card, and one cache of compiled code for all of them."""
        return {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(self.study.folder.resolve() / "compiled")}

    def pack(self) -> str:
        """Write what this workspace has made into the pack, and say how much that is, or why it failed."""
        self.packed_at = time.monotonic()
        try:
            pack = self.write_pack()
        except Exception as error:  # a full disk, say: what is trained may still be packed later
            return f"not written: {first_line(error)}"
        sizes = sum(path.stat().st_size for path in pack.pieces) / 1e6
        left_out = f", no room for {', '.join(path.name for path in pack.left_out)}" if pack.left_out else ""
        return f"{len(pack.pieces)} files, {sizes:.1f} MB{left_out}"

    def write_pack(self) -> Pack:
        """Log, tables, rows, curves, weights and open checkpoints, in this order, as far as they find room."""
        ledger = self.study.ledger.read()
        made = {path.stem for path in self.study.folders["weights"].glob("*.safetensors")}
        rows = ledger[ledger["run_id"].isin(made)]
        self.write_explanations(made)
        endings = ("Z.log", "Z_check.json", "Z_explanations.csv")
        flights = [path for ending in endings for path in sorted(self.study.folders["flights"].glob(f"2*{ending}"))]
        calls = sorted(self.study.folders["first_calls"].glob("[a-z]*.csv"))
        files = [*flights, *calls, *self.study.files(rows)]
        pack = packs.pack(self.study.ledger, rows["run_id"], files, self.folder, NAME)
        self.kept.mkdir(parents=True, exist_ok=True)
        for path in {*self.kept.iterdir()} - {self.kept / piece.name for piece in pack.pieces}:
            path.unlink()
        for piece in pack.pieces:
            with paths.replacing(self.kept / piece.name) as part:
                shutil.copyfile(piece, part)
        return pack

    @property
    def kept(self) -> Path:
        """A copy of the pack, in the workspace."""
        return self.study.folder / "flight"

    def write_explanations(self, run_ids: set[str]) -> None:
        """The explanations of these runs, in a file of this flight."""
        path = self.study.explanations_path
        table = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame(columns=["run_id"])
        if len(mine := table[table["run_id"].isin(run_ids)]):
            with paths.replacing(self.file("_explanations.csv")) as part:
                mine.to_csv(part, index=False)


def fly(study: Study, minutes: float, folder: Path, goal: float) -> Flight:
    """Fly for so many minutes, packs in `folder`; nothing that a stage does wrong ends the flight."""
    flight = Flight(study, 60 * minutes, folder, goal)
    flight.log("flight", f"{minutes:g} minutes on {flight.device}, profile {study.profile}")
    for stage in (restore, check, teacher, teacher_signals, train, explain, first_calls):
        try:
            stage(flight)
        except Exception as error:  # whatever it is, the stages after this one may still succeed
            flight.log(stage.__name__, f"broke off: {first_line(error)}")
    flight.log("flight", summary(flight))
    flight.log("pack", flight.pack())
    return flight


def restore(flight: Flight) -> None:
    """Take up what an earlier call on this machine has packed, where the machine got the repository's files anew.

    The workspace is still there then, with weights and checkpoints, which stay as they are.
    """
    if pieces := sorted(flight.kept.glob(f"{NAME}.tar.*")):
        with tempfile.TemporaryDirectory() as folder:
            older = {**flight.study.folders, "checkpoints": Path(folder)}
            added = packs.unpack(pieces, flight.study.ledger, older)
        flight.known |= set(added)
        flight.log("flight", f"goes on from an earlier call: {len(added)} rows that the ledger did not have")


def share(stage: str, seconds: float) -> float:
    """The most seconds that a stage gets of a flight of `seconds`."""
    return min(MOST_SECONDS[stage], SHARES[stage] * seconds)


def of_profile(study: Study) -> tuple[str, str]:
    return "--profile", study.profile


def check(flight: Flight) -> None:
    """Probe the ways of training and put them in order, each with how many runs side by side.

    What was probed on this machine before, by an earlier call or by the command `probe`, is not probed again. Where an
    earlier flight measured such a device, the way that was the fastest then is probed alone.
    """
    limit = share("check", flight.seconds)
    seconds = min(PROBE_SECONDS[flight.device], limit / 40)
    found: dict[str, dict] = {}
    for name in probing_order(flight):
        if (found and name == "called") or limit - flight.elapsed < LEAST:
            continue
        path = flight.study.folder / "probes" / f"{name}.json"
        if not is_of_this_device(facts := facts_in(path)):
            words = ("probe", name, "--seconds", f"{seconds:.2f}", "--json", path)
            flight.command("check", *words, seconds=limit - flight.elapsed, report=False)
            facts = facts_in(path)
        if is_of_this_device(facts):
            found[name] = facts
    with paths.replacing(flight.file("_check.json")) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    flight.ways = by_speed(found)
    flight.log("check", "ways, the fastest first: " + ", ".join(f"{name} × {count}" for name, count in flight.ways))
    flight.log("pack", flight.pack())


def probing_order(flight: Flight) -> tuple[str, ...]:
    """The ways to probe: the fastest one of an earlier flight on such a device, and those that it did not measure."""
    for path in sorted(flight.study.folders["flights"].glob("*_check.json"), reverse=True):
        found = facts_in(path)
        if found and all(map(is_of_this_device, found.values())):
            unknown = [name for name in PROBED[flight.device] if name not in found]
            return tuple(dict.fromkeys([by_speed(found)[0][0], *unknown]))
    return PROBED[flight.device]


def facts_in(path: Path) -> dict:
    """What a probe, or a check, wrote into a file; empty if there is none, or half of one."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def is_of_this_device(facts: dict) -> bool:
    """Whether a probe measured a device like this one, under this version of PyTorch."""
    return facts.get("device") == probes.device_name() and facts.get("torch") == version("torch")


def by_speed(found: dict[str, dict]) -> list[tuple[str, int]]:
    """Ways, each with its fastest number of runs side by side, the fastest first; then what always works."""
    best = {name: max(facts["ladder"], key=lambda step: step["images_per_second"]) for name, facts in found.items()}
    names = sorted(best, key=lambda name: -best[name]["images_per_second"])
    return [(name, best[name]["at_once"]) for name in names] + ([("called", 1)] if "called" not in best else [])


def teacher(flight: Flight) -> None:
    """Train and publish a teacher, unless there is one that is good enough; a trained one that is not gives way."""
    study = flight.study
    if study.profile != "smoke" and published_accuracy() >= flight.goal:
        return flight.log("teacher", f"the published one has {published_accuracy():.2f} %")
    spec = next(candidates(study, flight.goal))
    row = study.ledger.find(spec)
    if row is None:
        words = ("teacher", *of_profile(study), "--seed", spec.seed, "--campaign", CAMPAIGN)
        for way in ("recorded", "called"):
            left = flight.left
            timed = ("--way", way, "--budget-minutes", left / 60)
            if not flight.command("teacher", *words, *timed, seconds=left + GRACE):
                break
        row = study.ledger.find(spec)
    if row is None:
        return flight.log("teacher", "not finished; the same command goes on")
    if study.profile == "smoke":
        return flight.log("publish", "a rehearsal publishes nothing")
    if row["test_accuracy"] > published_accuracy():
        for _try in range(2):  # the students of another teacher would not count
            if not flight.command("publish", "publish", row["run_id"], seconds=60):
                break
    return None


def candidates(study: Study, goal: float) -> Iterator[TeacherSpec]:
    """The teachers to train, one seed after the other: those that ended below the goal are passed over."""
    if study.profile == "smoke":
        yield replace(study.teacher_spec, data_md5=study.train.md5)
    for seed in range(1000):
        spec = replace(TEACHER_RECIPE, seed=seed, data_md5=study.train.md5)
        row = study.ledger.find(spec)
        if row is None or row["test_accuracy"] >= goal:
            yield spec


def published_accuracy() -> float:
    """Test accuracy of the best published teacher, in per cent; 0 if there is none."""
    return float(artifacts.manifest().get(teachers.best(), {}).get("test_accuracy", 0.0))


def teacher_signals(flight: Flight) -> None:
    """The teacher's logits, maps and attention, from which the students learn."""
    left = flight.left
    flight.command("signals", "signals", *of_profile(flight.study), "--budget-minutes", left / 60, seconds=left + GRACE)


def train(flight: Flight) -> None:
    """Train the queue, by the next way where one breaks, with half as many side by side where the memory is full."""
    ways = flight.ways
    while ways and (left := flight.left) > 1:
        name, at_once = ways[0]
        words = ("campaign", CAMPAIGN, *of_profile(flight.study), "--way", name, "--at-once", at_once)
        status = flight.command("queue", *words, "--budget-minutes", left / 60, seconds=left + GRACE)
        if status == 0:
            return
        ways = after_failure(ways, status)
        if ways:
            flight.log("queue", f"{name} × {at_once} broke off: goes on as {ways[0][0]} × {ways[0][1]}")


def after_failure(ways: list[tuple[str, int]], status: int) -> list[tuple[str, int]]:
    """The ways that are left when the first one ended with `status`."""
    (name, at_once), *others = ways
    return [(name, at_once // 2), *others] if status == OUT_OF_MEMORY and at_once > 1 else others


def explain(flight: Flight) -> None:
    """Measure the explanations of the new networks."""
    seconds = flight.seconds - flight.elapsed - share("first calls", flight.seconds)
    words = ("explain", *of_profile(flight.study), "--budget-minutes", seconds / 60)
    flight.command("explanations", *words, seconds=seconds)  # each network's rows are written when it is done


def first_calls(flight: Flight) -> None:
    """The released timing protocol on this device, unless its file is there."""
    if list(flight.study.folders["first_calls"].glob(f"{device_file(flight.device)}.csv")):
        return flight.log("first calls", "measured before on this device")
    path = flight.study.folders["first_calls"] / f"{device_file(flight.device)}.csv"
    seconds = share("first calls", flight.seconds)
    words = ("first-calls", path, "--seconds", f"{max(seconds - FIRST_CALLS_END, 0):.0f}")
    flight.command("first calls", *words, seconds=seconds + GRACE)
    return None


def device_file(device: str) -> str:
    """A file name for what was measured on this device."""
    name = probes.device_name() if device == "cuda" else "cpu"
    return "_".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def summary(flight: Flight) -> str:
    """What came of the flight: finished runs, and students an hour while the queue was trained."""
    rows = flight.study.ledger.read()
    new = rows[~rows["run_id"].isin(flight.known) & (rows["method"] != "teacher")]
    hours = new["seconds"].astype(float).sum() / 3600
    by_epochs = ", ".join(f"{count} of {epochs} epochs" for epochs, count in new["epochs"].value_counts().items())
    rate = f"; {len(new) / hours:.0f} an hour" if hours > 0 else ""
    return f"{len(new)} new students ({by_epochs or 'none'}){rate}"


def kill_group(child: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
