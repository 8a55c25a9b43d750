"""What long work says while it runs: a line for a person, and the same as an event, one line of JSON, for a program.

Events go to a log of each host, `logs/HOST.jsonl` in the folder of a study: time (UTC), host, pid, campaign, kind and
words, and of a line about a run its identity, epoch, epochs, images an epoch and seconds.
"""

import contextlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kdig_utils import paths
from kdig_utils.locks import locked

Report = Callable[[str], None]
LOG_BYTES = 5_000_000  # then a log is put aside as `.old.jsonl`, in place of the one before
EVENT = {"time", "host", "pid", "campaign", "kind", "words"}  # what each event has
DIVERGED, FAILED = "diverged", "failed"  # kinds of events


class TrainingDiverged(RuntimeError):
    """The loss is not finite; the last checkpoint was made before that."""


class Line(str):
    """A line about a run, with what its event says beside the words: kind, run_id and more."""

    facts: dict[str, Any]

    def __new__(cls, words: str, **facts: Any) -> "Line":
        line = super().__new__(cls, words)
        line.facts = facts
        return line


def print_line(line: str) -> None:
    """Print at once, also into a pipe or a file."""
    print(line, flush=True)


def print_now_and_then(seconds: float) -> Report:
    """A report that prints a line if `seconds` have passed since the last one, or if a run has diverged."""
    printed = -math.inf

    def report(line: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= seconds or kind_of(line) == DIVERGED:
            print_line(line)
            printed = time.monotonic()

    return report


def first_line(error: Exception) -> str:
    """What an error says, in one line for a log."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def kind_of(line: str) -> str:
    """The kind of a line's event."""
    return line.facts["kind"] if isinstance(line, Line) else "line"


@contextlib.contextmanager
def logged(report: Report, folder: Path, campaign: str) -> Iterator[Report]:
    """A report each of whose lines is an event too; what ends the block is one, and a divergence is noted for good.

    A disk that takes no more events stops no training.
    """
    host = platform.node()
    path = folder / "logs" / f"{re.sub(r'[^A-Za-z0-9-]', '_', host)}.jsonl"

    def note(line: str) -> None:
        facts = {"kind": kind_of(line), **getattr(line, "facts", {})}
        now = datetime.now(UTC).isoformat()
        event = {"time": now, "host": host, "pid": os.getpid(), "campaign": campaign, **facts, "words": str(line)}
        with contextlib.suppress(OSError):
            append(path, event)
            if facts["kind"] == DIVERGED:
                with paths.replacing(folder / DIVERGED / f"{facts['run_id']}.txt") as part:
                    part.write_text(f"run {facts['run_id']}: {facts['reason']}\n", encoding="utf-8")

    def both(line: str) -> None:
        note(line)
        report(line)

    try:
        yield both
    except TrainingDiverged:
        raise
    except Exception as error:
        note(Line(first_line(error), kind=FAILED))
        raise


def append(path: Path, event: dict[str, Any]) -> None:
    """Append an event in one write, so that those of several processes do not mix; a log that is full is put aside."""
    text = json.dumps(event).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_full(path):
        with locked(path):
            if _is_full(path):  # no other process has done it meanwhile
                path.replace(path.with_suffix(".old.jsonl"))
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            text = b"\n" + text  # the last line is torn, by a full disk, and stays alone
        file.write(text)


def _is_full(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > LOG_BYTES


def events(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The events in the logs of these studies' folders, by time; a line that is torn is passed over."""
    found = []
    for path in (path for folder in folders for path in sorted((folder / "logs").glob("*.jsonl"), reverse=True)):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                event = json.loads(line)
                if event.keys() >= EVENT:
                    found.append({**event, "time": datetime.fromisoformat(event["time"])})
    return sorted(found, key=lambda event: event["time"])


def noted_runs(folder: Path) -> set[str]:
    """The runs of a study that diverged, which are not tried again as long as `diverged/RUN_ID.txt` is there."""
    return {path.stem for path in (folder / DIVERGED).glob("*.txt")}


def divergences(folder: Path, run_ids: set[str]) -> list[str]:
    """Why those of these runs diverged that are noted, and how to try one again."""
    paths_of = [folder / DIVERGED / f"{run_id}.txt" for run_id in sorted(run_ids & noted_runs(folder))]
    return [f"{path.read_text(encoding='utf-8').strip()} (to try it again, delete {path})" for path in paths_of]


@contextlib.contextmanager
def postponed(diverged: list[str]) -> Iterator[None]:
    """Add what diverged in the block to a list, so that the work after it goes on; `raise_diverged` comes last."""
    try:
        yield
    except TrainingDiverged as error:
        diverged.append(str(error))


def raise_diverged(diverged: list[str]) -> None:
    """Raise TrainingDiverged, with all their words, if any runs have diverged."""
    if diverged:
        raise TrainingDiverged("; ".join(diverged))
