"""Who trains which run: a process reserves a run before it works on it, and others pass it over.

A reservation is a lock on a file, so that the end of a process, however it ends, frees what it had reserved.
"""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from kdig_utils.experiments.reports import Report
from kdig_utils.method.spec import RunSpec


def reserved(
    specs: Iterable[RunSpec], folder: Path, finished: Callable[[], set[str]], report: Report
) -> Generator[RunSpec]:
    """Those of the runs that no other process has reserved or ended.

    Each is reserved until it is finished or, unfinished, until this iterator is closed.

    Args:
        folder: of the locks, which all processes of a study share.
        finished: the identities of the runs that are in the ledger now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, BaseFileLock] = {}
    try:
        for spec in specs:
            lock: BaseFileLock = FileLock(folder / f"{spec.run_id}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                report(f"{spec.run_id} is trained by another process: passed over")
                continue
            held[spec.run_id] = lock
            for run_id in held.keys() & (done := finished()):
                held.pop(run_id).release()
            if spec.run_id not in done:
                yield spec
    finally:
        for left in held.values():
            left.release()
