"""One process at a time, on whatever machine: locks of files that are changed, claims of work that takes long.

Both are filelock's marker files, made exclusively, which hold where `flock` does nothing.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, SoftFileLock, Timeout

from kdig_utils.paths import explaining

LOCK_SECONDS = 60.0  # how long a process waits for another to end its writing
LEASE_SECONDS = 60.0  # a claim without a sign of life for so long is free; all machines must agree
NOBODY = "a process that has just ended"
EMPTY_SECONDS = 2.0  # a marker that is empty for longer is of a process that was killed while it made it


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time, on whatever machine, change `path`: its lock is a hidden marker beside it.

    Raises:
        TimeoutError: another process has held it for `LOCK_SECONDS`; the message names it and the remedy.
        OSError: as `replacing`.
    """
    path = path.resolve()
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = SoftFileLock(_marker(path), poll_interval=0.02)
        if not _acquired(lock, path, LOCK_SECONDS):
            raise TimeoutError(
                f"{path} has been locked for {LOCK_SECONDS:.0f} s by {holder(path)}: if it is stopped, let it go on "
                f"(kill -CONT) or end it (kill -KILL); if its machine is gone, delete {_marker(path)}"
            )
    try:
        yield
    finally:
        lock.release()


def lease(path: Path, seconds: float = 0.0) -> SoftFileLease | None:
    """Claim the work on `path`, waiting for at most `seconds`; None if another process has it.

    The claim is renewed while this process lives. It is free as soon as its process is dead, and after `LEASE_SECONDS`
    without a sign of life where that cannot be seen: of another machine, or stopped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = SoftFileLease(_marker(path), lease_duration=LEASE_SECONDS)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - os.stat(claim.lock_file).st_mtime > LEASE_SECONDS:  # as long as it takes to be sure
            seconds = max(seconds, LEASE_SECONDS + 1)
    return claim if _acquired(claim, path, seconds + 0.1) else None


def _acquired(lock: SoftFileLock | SoftFileLease, path: Path, seconds: float) -> bool:
    """Whether the lock was free within `seconds`, or a little later where a process was killed in its first moment."""
    end = time.monotonic() + (seconds if holder(path) != NOBODY else max(seconds, EMPTY_SECONDS + 3))
    while True:
        _marker(path)  # looks at it again: it may have been too young
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=max(0.0, min(0.5, end - time.monotonic())), poll_interval=0.02)
            return True
        if time.monotonic() >= end:
            return False


@contextlib.contextmanager
def claimed(path: Path, say: Callable[[str], None], deadline: float = math.inf) -> Iterator[SoftFileLease]:
    """Do the work on `path` alone: wait in words, until `deadline` (`time.monotonic`), for a process that is at it.

    Raises:
        TimeoutError: it was not done by then.
    """
    with explaining(path):
        if (claim := lease(path)) is None:
            say(f"{path.name} is being made by {holder(path)}: waiting for it")
            claim = lease(path, max(0.0, min(deadline - time.monotonic(), 1e8)))
    if claim is None:
        raise TimeoutError(f"time is over, {path} is still being made by {holder(path)}: run the same again to go on")
    try:
        yield claim
    finally:
        claim.release()


def holder(path: Path) -> str:
    """Who holds the lock of `path`, or has claimed it."""
    with contextlib.suppress(OSError, ValueError):
        # pid, host and start, one a line; of a claim, after the protocol's name, as pid=…, host=…
        text = Path(_marker(path)).read_text(encoding="utf-8")
        lines = [line for line in text.split() if text.endswith("\n") and not line.startswith("filelock/")]
        pid, host, *_start = (line.removeprefix("pid=").removeprefix("host=") for line in lines)
        return f"process {pid} on {host.partition('?pidns')[0]}"
    return NOBODY


def _marker(path: Path) -> Path:
    """The marker of `path`; one that is empty, of a process killed in between, is marked as nobody's.

    Locks of earlier versions left empty files, too. filelock takes an empty marker for a holder of unknown name, and
    one that says what no lock says, after two seconds, for nobody.
    """
    marker = path.parent / f".{path.name}.lock"
    with contextlib.suppress(OSError), marker.open("r+b", buffering=0) as file:
        found = os.fstat(file.fileno())
        if found.st_size == 0 and time.time() - found.st_mtime > EMPTY_SECONDS:
            file.write(b"nobody\n")
            os.utime(file.fileno(), (0, 0))
    return marker
