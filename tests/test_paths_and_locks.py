"""Files that several processes share: one writes at a time, a dead or stopped one blocks nobody, nothing is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdig_utils import locks, paths

CHILD = """
import os, sys, time
from pathlib import Path
from kdig_utils import locks, paths
path = Path(sys.argv[1])
"""
COUNT = """
for _turn in range(20):
    with locks.locked(path):
        number = int(path.read_text())
        with paths.replacing(path) as part:
            part.write_text(str(number + 1))
"""
HOLD = "with locks.locked(path):\n    print('held', flush=True); time.sleep(1000)"
CLAIM = "claim = locks.lease(path)\nprint('held', flush=True); time.sleep(1000)"
WRITE = "with paths.replacing(path) as part:\n    print('held', flush=True); time.sleep(1000)"


def child(code: str, path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD + code, path], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "runs.csv").write_text("0")
    return tmp_path / "runs.csv"


@pytest.fixture
def holding(file: Path) -> Iterator[list[subprocess.Popen]]:
    """Starts a child that holds something of `file`; those that still live are killed in the end."""
    started: list[subprocess.Popen] = []

    def start(code: str) -> subprocess.Popen:
        started.append(child(code, file))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_four_processes_change_one_file_and_no_change_is_lost(file: Path) -> None:
    counting = [child(COUNT, file) for _process in range(4)]
    assert [process.wait(120) for process in counting] == [0] * 4
    for process in counting:
        process.communicate()
    assert file.read_text(encoding="utf-8") == "80"
    assert left_in(file.parent) == {"runs.csv"}
    print("4 processes, 80 changes")


def test_no_lock_of_the_system_is_needed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems grant `flock` to everybody."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_arguments: None)
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    with locks.locked(file), pytest.raises(TimeoutError), locks.locked(file):
        pytest.fail("two hold one lock")


def test_a_lock_of_a_dead_process_is_free_and_of_a_stopped_one_is_told(
    file: Path, holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.2)
    other = holding(HOLD)
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=rf"process {other.pid} on {socket.gethostname()}.*kill -CONT") as caught:
        locks.locked(file).__enter__()
    assert str(file) in str(caught.value)
    other.kill()
    other.wait()
    monkeypatch.setattr(locks, "LOCK_SECONDS", 20)
    with locks.locked(file):
        assert locks.holder(file) == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("use", ["lock", "claim"])
def test_an_empty_marker_blocks_for_seconds_only(file: Path, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """It is of a process that was killed while it made it, or of an earlier version."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 4.0)
    marker = file.parent / ".runs.csv.lock"
    marker.touch()
    os.utime(marker, (time.time() - 60, time.time() - 60))
    if use == "lock":
        with locks.locked(file):
            pass
    else:
        assert locks.lease(file) is not None


def test_a_claim_is_one_processes_and_free_when_it_is_dead(file: Path, holding) -> None:
    other = holding(CLAIM)
    assert locks.lease(file) is None
    assert locks.holder(file) == f"process {other.pid} on {socket.gethostname()}"
    other.kill()
    other.wait()
    assert locks.lease(file) is not None


@pytest.mark.parametrize("gone", ["stopped", "another machine"])
def test_a_claim_without_a_sign_of_life_is_free_after_the_lease(
    file: Path, holding, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.5)
    marker = file.parent / ".runs.csv.lock"
    if gone == "stopped":
        other = holding("locks.LEASE_SECONDS = 1.5\n" + CLAIM)
        other.send_signal(signal.SIGSTOP)
    else:
        marker.write_text(
            f"filelock/2\npid={os.getpid()}\nhost=elsewhere\nmode=lease\ntoken=ab\nduration=1.5\nstart=1\n"
        )
        os.utime(marker)
    assert locks.lease(file) is None  # it may live
    time.sleep(1.6)
    claim = locks.lease(file)
    assert claim is not None
    assert claim.is_lock_held_by_us


def test_who_waits_for_a_claim_says_for_whom_and_then_has_it(file: Path, holding) -> None:
    other, lines = holding(CLAIM), []

    def say(line: str) -> None:
        lines.append(line)
        other.kill()
        other.wait()

    with locks.claimed(file, say):
        pass
    assert len(lines) == 1
    assert str(other.pid) in lines[0]
    holding(CLAIM)
    with pytest.raises(TimeoutError, match="time is over"), locks.claimed(file, print, time.monotonic() + 0.1):
        pytest.fail("claimed")


def test_parts_of_dead_processes_and_old_ones_are_swept_and_others_stay(file: Path, holding) -> None:
    living, dead = holding(WRITE), holding(WRITE)
    (of_living,) = [name for name in left_in(file.parent) if f"~{living.pid}~" in name]
    dead.kill()
    dead.wait()
    for name, age in ((".runs.csv.abc.part", 48 * 3600), (".runs.csv.abd.part", 60)):
        (file.parent / name).touch()
        os.utime(file.parent / name, (time.time() - age,) * 2)
    with paths.replacing(file.parent / "other.csv") as part:
        part.write_text("x")
    assert left_in(file.parent) == {"runs.csv", "other.csv", of_living, ".runs.csv.abd.part"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "far" / "runs.csv", tmp_path / "runs.csv"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with locks.locked(link), paths.replacing(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert left_in(target.parent) == {"runs.csv"}


def test_file_and_folder_are_on_the_disk_before_and_after_the_replacement(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("folder" if os.path.samestat(os.fstat(handle), file.parent.stat()) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replaced"), replace(*names)))
    with paths.replacing(file) as part:
        part.write_text("1")
    assert order == ["file", "replaced", "folder"]


def test_asking_for_room_leaves_nothing(tmp_path: Path) -> None:
    paths.check_writable(tmp_path / "new", 1000)
    assert left_in(tmp_path / "new") == set()


def test_a_disk_with_too_little_room_and_a_folder_without_the_book_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=rf"{tmp_path}.* free and .* needed.*larger disk"):
        paths.check_writable(tmp_path, 10**18)
    monkeypatch.delenv("KDIG_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "paths.py"))
    with pytest.raises(FileNotFoundError, match=rf"above {tmp_path}.*KDIG_ROOT"):
        paths.repository_root()
