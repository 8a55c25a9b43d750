"""Where the book keeps its files: the repository, its ledger and artifacts, and the workspace for large things."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import reprlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, SoftFileLock, Timeout
from pydantic import ValidationError

LOCK_SECONDS = 60.0  # how long a process waits for another to end its writing
LEASE_SECONDS = 60.0  # a claim without a sign of life for so long is free; all machines must agree
NOBODY = "a process that has just ended"
EMPTY_SECONDS = 2.0  # a marker that is empty for longer is of a process that was killed while it made it
PART_SECONDS = 24 * 3600.0  # after which a part of a file is of nobody
ELSEWHERE = "set KDIG_WORKSPACE (for ledger and artifacts KDIG_ROOT) to a folder that can be written"
REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: f"the folder is read-only: {ELSEWHERE}",
    errno.EACCES: f"the folder may not be written: {ELSEWHERE}",
    errno.ENOENT: f"the folder is not there and cannot be made: name another one, or {ELSEWHERE}",
}


FOLDERS = ("KDIG_ROOT", "KDIG_WORKSPACE", "KDIG_DATA", "KDIG_RELEASED")


def named_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, absolute, as the shell that set it means it; None without it."""
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value)).resolve() if value else None


def absolute_folders() -> dict[str, str]:
    """Those of `FOLDERS` that are set, made absolute: for a process that works in another folder than this one."""
    return {variable: str(folder) for variable in FOLDERS if (folder := named_folder(variable))}


def repository_root() -> Path:
    """The book's folder: `KDIG_ROOT` if set, else the nearest folder upwards that holds `notebooks` and `kdig_utils`.

    Raises:
        FileNotFoundError: no such folder was found.
    """
    if root := named_folder("KDIG_ROOT"):
        return root
    here = Path.cwd()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        if (folder / "notebooks").is_dir() and (folder / "kdig_utils").is_dir():
            return folder
    raise FileNotFoundError(
        f"no folder with notebooks and kdig_utils above {here}: "
        "run this inside a clone of the book, or set KDIG_ROOT to it"
    )


def ledger_path() -> Path:
    """The committed ledger, one line a run."""
    return repository_root() / "results" / "runs.csv"


def curves_folder() -> Path:
    """The committed learning curves, one CSV file a run."""
    return repository_root() / "results" / "curves"


def artifacts_folder() -> Path:
    """The committed weights, with their manifest."""
    return repository_root() / "artifacts"


def workspace() -> Path:
    """The folder for data sets, teacher signals and checkpoints: `KDIG_WORKSPACE`, else `.kdig` in the repository."""
    return named_folder("KDIG_WORKSPACE") or repository_root() / ".kdig"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path`, or what it links to, only when the block ends well.

    A reader sees the old file or the new one, never a part, and a failure leaves the old file as it was. What is
    replaced is on the disk. Parts that killed processes left in the folder are removed.

    Raises:
        OSError: the folder is read-only or the disk is full; the message names the folder and the remedy.
    """
    path = path.resolve() if path.is_symlink() else path
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        prefix = f".{path.name}.{_host()}~{os.getpid()}~"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(0o644)
            _to_disk(part)
            os.replace(part, path)
            with contextlib.suppress(OSError):  # some file systems keep folders their own way
                _to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    """This machine, and the container where process ids are its own."""
    with contextlib.suppress(OSError):
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()


def _sweep(folder: Path) -> None:
    """Remove parts of files whose process is dead, or that are older than a day."""
    ours = re.compile(re.escape(f".{_host()}~") + r"(\d+)~")
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            process = ours.search(part.name)
            if (process and not _lives(int(process[1]))) or time.time() - part.stat().st_mtime > PART_SECONDS:
                part.unlink()


def _lives(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # of another user's, which lives
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


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


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Let a full disk or a read-only folder, met while `path` is written, name the folder and the remedy.

    Raises:
        OSError: with the system's errno.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        told = f"cannot write {path.name} in {path.parent}; {REMEDIES[error.errno]} and run it again"
        raise OSError(error.errno, told) from error


def committed(folder: Path, *names: str) -> list[io.BytesIO]:
    """These files of `folder`, opened, each with the SHA-256 that the folder's `sha256.json` names.

    Raises:
        FileNotFoundError: one is missing or damaged.
    """
    try:
        expected = json.loads((folder / "sha256.json").read_bytes())
        contents = [(folder / name).read_bytes() for name in names]
        for name, content in zip(names, contents, strict=True):
            if hashlib.sha256(content).hexdigest() != expected[name]:
                raise ValueError(f"{name} has another SHA-256")
    except (OSError, ValueError, LookupError, TypeError) as error:
        files = f"{', '.join(names)} in {folder} are missing or damaged"
        raise FileNotFoundError(f"{files} ({type(error).__name__} {error}): restore them from git") from error
    return [io.BytesIO(content) for content in contents]


@contextlib.contextmanager
def reading(path: Path, remedy: str = "restore it from git") -> Iterator[None]:
    """Let what a parser or pydantic says of a damaged file be one sentence: file, place, what is wrong, remedy.

    Raises:
        ValueError: the file is damaged, or not encoded in UTF-8.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f", row {step + 1}" if isinstance(step, int) else f", {step}" for step in first["loc"])
        said = f"{first['msg'].removeprefix('Value error, ')}; it is {reprlib.repr(first['input'])}"
        raise ValueError(f"{path.name}{place}: {said}: {remedy}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{path.name} is damaged ({said}): {remedy}") from error


def check_writable(folder: Path, needed: int = 0) -> None:
    """Make sure, before hours are spent, that `folder` takes files and has room for `needed` bytes.

    Raises:
        OSError: the folder is read-only or too full; the message names the folder, the figures and the remedy.
    """
    with explaining(folder / "files"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed; free some space, or set "
            "KDIG_WORKSPACE to a larger disk",
        )
