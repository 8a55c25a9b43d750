"""Who trains which run: a process claims a run before it works on it, and others pass it over.

A claim is a lease (`locks.lease`): the end of a process, however it ends, frees what it had claimed.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from filelock import SoftFileLease

from kdig_utils import locks, paths
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.reports import Report, noted_runs
from kdig_utils.method.spec import RunSpec


def ended(ledger: Ledger, checkpoints: Path, folder: Path) -> set[str]:
    """The runs of the ledger, and those that diverged, of the study in `folder`; checkpoints that nobody needs go."""
    known = set(ledger.read()["run_id"])
    for path in checkpoints.glob("*.pt"):
        if path.stem in known:
            with contextlib.suppress(OSError):
                path.unlink()
    return known | noted_runs(folder)


def reserved(
    specs: Iterable[RunSpec], folder: Path, finished: Callable[[], set[str]], report: Report
) -> Generator[RunSpec]:
    """Those of the runs that no other process has claimed or ended.

    Each is claimed until it is finished or, unfinished, until this iterator is closed.

    Args:
        folder: of the claims, which all processes of a study share.
        finished: the identities of the runs that are in the ledger now.
    """
    held: dict[str, SoftFileLease] = {}
    try:
        for spec in specs:
            with paths.explaining(folder / spec.run_id):
                claim = locks.lease(folder / spec.run_id)
            if claim is None:
                report(f"{spec.run_id} is trained by {locks.holder(folder / spec.run_id)}: passed over")
                continue
            held[spec.run_id] = claim
            for run_id in held.keys() & (done := finished()):
                held.pop(run_id).release()
            if spec.run_id not in done:
                yield spec
    finally:
        for left in held.values():
            left.release()
