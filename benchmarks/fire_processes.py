"""Processes for `under_fire`: forked from one that has everything loaded, killed at a chosen moment, crowded together.

A child says lines to its parent through a pipe; what it said before it was killed is what it has promised.
"""

import builtins
import contextlib
import ctypes
import fcntl
import io
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch

from kdig_utils.experiments.ledger import Ledger

Say = Callable[[str], None]
Work = Callable[[Say], None]
PATIENCE = 120.0  # seconds after which a process counts as hanging
CHANGES = (
    "replace", "rename", "unlink", "remove", "link", "symlink", "mkdir", "rmdir", "write", "pwrite", "fsync",
    "fdatasync", "truncate", "ftruncate", "chmod", "fchmod", "utime", "posix_fallocate",
)  # fmt: skip
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
_open, _write, _close = os.open, os.write, os.close  # as they were before `at_moment` watches them


class Child(NamedTuple):
    """A forked process, and where its lines are read."""

    pid: int
    lines: int


class Ended(NamedTuple):
    """What a process said, and how it ended: 0 by itself, 1 with an error that it said, below 0 by that signal."""

    said: list[str]
    how: int

    @property
    def killed(self) -> bool:
        return self.how in (-signal.SIGKILL, -signal.SIGXFSZ)

    def all_said(self, word: str) -> list[str]:
        """What stands behind `word` in the lines that begin with it."""
        return [line.removeprefix(word + " ") for line in self.said if line.startswith(word + " ")]


def forked(work: Work) -> Child:
    """Start `work` in a child; its prints go nowhere, and an error becomes a line."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    code = 1
    try:
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        work(lambda line: _write(writing, f"{line}\n".encode()) and None)
        code = 0
    except BaseException as error:
        told = " ".join(str(error).split())
        number = getattr(error, "errno", None) or 0
        _write(writing, f"ERROR {type(error).__name__} {number} {told[:2000]}\n".encode())
    finally:
        os._exit(code)


def ended(child: Child, seconds: float = PATIENCE) -> Ended:
    """Wait for a child, at most `seconds`, then kill it."""
    data, end, hanging = b"", time.monotonic() + seconds, False
    while True:
        ready, _, _ = select.select([child.lines], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child.pid, signal.SIGKILL)
            hanging = seconds == PATIENCE
            end = time.monotonic() + PATIENCE
        elif chunk := os.read(child.lines, 65536):
            data += chunk
        else:
            break
    os.close(child.lines)
    _pid, status = os.waitpid(child.pid, 0)
    said = data.decode().splitlines() + ["ERROR Hanging 0 nothing happened any more"] * hanging
    return Ended(said, os.waitstatus_to_exitcode(status))


def run(work: Work, seconds: float = PATIENCE) -> Ended:
    return ended(forked(work), seconds)


def crowd(works: list[Work]) -> list[Child]:
    """Start all of these at the same moment."""
    gate_out, gate_in = os.pipe()

    def waiting(work: Work) -> Work:
        def started(say: Say) -> None:
            os.close(gate_in)
            os.read(gate_out, 1)
            work(say)

        return started

    children = [forked(waiting(work)) for work in works]
    os.close(gate_in)
    os.close(gate_out)
    return children


def killed() -> None:
    """The end of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_moment(moment: int, say: Say, strikes: Callable[[], None] = killed) -> Callable[[], int]:
    """Let it strike this process at its `moment`-th one: each change of a file has one before and one after it.

    Returns:
        how many there were so far.
    """
    met, main = 0, threading.get_ident()

    def meet(label: str) -> None:
        nonlocal met
        if threading.get_ident() != main:  # a heartbeat comes when it likes
            return
        met += 1
        if met == moment:
            say(f"AT {label}")
            strikes()

    def watch(owner: Any, name: str, changes: Callable[..., bool] = lambda *_args, **_named: True) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **named: Any) -> Any:
            if not changes(*args, **named):
                return call(*args, **named)
            what = f"{name} {Path(str(args[0])).name}"
            meet(f"before {what}")
            result = call(*args, **named)
            meet(f"after {what}")
            return result

        setattr(owner, name, watched)
        for able in (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks):
            if call in able:
                able.add(watched)

    for name in CHANGES:
        watch(os, name)
    watch(os, "open", lambda _path, flags, *_args, **_named: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
    for owner in (builtins, io):
        watch(owner, "open", lambda _path, mode="r", *_args, **_named: bool(set(mode) & set("wax+")))
    watch(np.memmap, "flush")
    return lambda: met


def fill(folder: Path) -> None:
    """Take all the space of the disk that holds `folder`, as another process would."""
    file = _open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(OSError):
        while True:
            _write(file, bytes(4096))
    _close(file)


def kill_beyond(size: int) -> None:
    """Let the system kill this process when it writes into a file beyond `size` bytes: what it wrote is cut there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Mounts of one's own: they end with the process, and nobody else sees them


def own_mounts() -> None:
    """Give this process, and what it forks, mounts that nobody else sees; OSError where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", CLONE_NEWNS | (CLONE_NEWUSER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)


def mount_memory(folder: Path, size: int, again: bool = False) -> None:
    """Let `folder` be a disk of `size` bytes in memory; `again`: change the size of the one that is there."""
    flags = MS_REMOUNT if again else 0
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={size},mode=755".encode())


def make_read_only(folder: Path) -> None:
    _call("mount", bytes(folder), bytes(folder), None, MS_BIND, None)
    _call("mount", None, bytes(folder), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)


def unmount(folder: Path) -> None:
    _call("umount2", bytes(folder), 2)  # MNT_DETACH


def _call(name: str, *args: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args)):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# What a harness must catch: a package that is broken on purpose


def without_flock() -> None:
    """As on some network file systems: `flock` says yes to everybody."""
    fcntl.flock = lambda *_args: None


def no_lock() -> None:
    def acquire(self: filelock.BaseFileLock, *_args: object, **_named: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(self)

    filelock.BaseFileLock.acquire = acquire


def no_replace() -> None:
    """A file is written over where it stands, in two halves."""

    def replace(source: str | Path, target: str | Path, **_named: object) -> None:
        content = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                os.fsync(file.fileno())
                file.write(half)
        os.unlink(source)

    os.replace = replace


def no_optimizer() -> None:
    """A resume forgets the optimiser's state."""
    torch.optim.Optimizer.load_state_dict = lambda _self, _state: None


def late_append() -> None:
    """A row is said to be kept, and written with the next one."""
    append, late = Ledger.append, []

    def appended(self: Ledger, *args: Any, **measured: Any) -> None:
        for earlier in late:
            append(self, *earlier[0], **earlier[1])
        late[:] = [(args, measured)]

    Ledger.append = appended


BREAKS: dict[str, Callable[[], None]] = {
    "lock": no_lock,
    "replace": no_replace,
    "optimizer": no_optimizer,
    "append": late_append,
}


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder of one's own, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="under_fire_", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def moments(count: int, most: int, seed: int) -> list[int]:
    """`most` of the numbers from 1 to `count`, in order; all of them if there are no more."""
    every = range(1, count + 1)
    return sorted(random.Random(seed).sample(every, most)) if count > most else list(every)


def say_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
