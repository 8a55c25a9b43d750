"""Where the book keeps its files: the repository, its ledger and artifacts, and the workspace for large things."""

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import reprlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

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
