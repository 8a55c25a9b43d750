"""Long runs watched: how far each campaign is and how fast, who trains what, and what went wrong last."""

import contextlib
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import SoftFileLease
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kdig_utils import paths
from kdig_utils.experiments import brief, campaigns, laptop, queue, reports
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import RunSpec

WINDOW = timedelta(hours=1)  # of the events that tell the speed
HEARD = timedelta(minutes=15)  # a run of which nothing was heard for longer, and that nobody holds, is not under way
FAILURES = 5
WIDTH = 120  # of a snapshot that goes into a pipe or a file
Event = Mapping[str, Any]


def watch(every: float, console: Console | None = None) -> None:
    """Show the state again every so many seconds, until interrupted; once, where it goes into a pipe or a file."""
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDTH
        return console.print(state(datetime.now(UTC)))
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(state(datetime.now(UTC)), refresh=True)
            time.sleep(max(every, 1.0))
    return None


def state(now: datetime) -> Group:
    """Tables of the campaigns, of the runs under way and of the last failures."""
    folders = sorted(path for path in paths.workspace().glob("*") if path.is_dir())
    events = reports.events(folders)
    return Group(
        table(f"campaigns, {now:%Y-%m-%d %H:%M:%S} UTC", campaign_rows(counts(), events, now)),
        table("runs under way", under_way(folders, events, now)),
        table("last failures", failures(events)),
    )


def table(title: str, rows: Sequence[Mapping[str, str]]) -> Table | str:
    """Rows with the same keys, which are the columns' names; a line where there are none."""
    if not rows:
        return f"{title}: none"
    made = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        made.add_row(*map(escape, row.values()))
    return made


def counts() -> dict[str, tuple[int, int]]:
    """Runs done and runs in all of each campaign, of the queue `next` and of the laptop protocol."""
    ledgers = paths.ledger_path(), laptop.own_ledger_path()
    return _counts(*((path, path.stat().st_mtime_ns if path.is_file() else 0) for path in ledgers))


@functools.lru_cache(maxsize=1)  # counting takes a second, and the ledgers change now and then
def _counts(main: tuple[Path, int], own: tuple[Path, int]) -> dict[str, tuple[int, int]]:
    rows = Ledger(main[0]).read()
    queued = [spec for group in queue.groups(brief.chosen(rows)) for spec in group.specs]
    named = {row.campaign: (row.done, row.runs) for row in campaigns.progress(rows).itertuples()}
    laptop_done = _done(own[0], laptop.queue())
    return {queue.CAMPAIGN: _done(main[0], queued), **named, laptop.NAME: laptop_done}


def _done(ledger: Path, wanted: Sequence[RunSpec]) -> tuple[int, int]:
    return campaigns.rows_of(Ledger(ledger).read(), wanted)["run_id"].nunique(), len(wanted)


def campaign_rows(
    counted: Mapping[str, tuple[int, int]], events: Iterable[Event], now: datetime
) -> list[dict[str, str]]:
    """A row a campaign: done, left, and, if anything was heard of it within `WINDOW`, its speed and the time left."""
    recent = [event for event in events if now - event["time"] <= WINDOW]
    rows = []
    for name in dict.fromkeys([*counted, *(event["campaign"] for event in recent)]):
        its = [event for event in recent if event["campaign"] == name]
        epochs = [event for event in its if event["kind"] == "epoch"]
        hours = max((now - its[0]["time"]).total_seconds(), 1.0) / 3600 if its else 1.0
        rate = sum(event["epoch"] == event["epochs"] for event in epochs) / hours
        images = sum(event["images"] for event in epochs) / hours / 3600
        done, runs = counted.get(name, (0, 0))
        rows.append(
            {
                "campaign": name,
                "done": str(done) if runs else "",
                "left": str(runs - done) if runs else "",
                "runs an hour": f"{rate:.1f}" if its else "",
                "images a second": f"{images:,.0f}" if its else "",
                "time left": f"{(runs - done) / rate:.1f} h" if rate and runs else "",
            }
        )
    return rows


def under_way(folders: Iterable[Path], events: Iterable[Event], now: datetime) -> list[dict[str, str]]:
    """A row a run that a process has reserved, or that was heard of lately and is not finished."""
    last = {event["run_id"]: event for event in events if "run_id" in event}
    markers = [path for folder in folders for path in (folder / "reserved").glob("*.lock")]
    owners = {path.stem: owner for path in markers if (owner := SoftFileLease(path).owner)}
    heard = {
        run_id
        for run_id, event in last.items()
        if event["kind"] in ("epoch", "progress") and event["epoch"] < event["epochs"] and now - event["time"] < HEARD
    }
    rows = []
    for run_id in sorted(heard | owners.keys()):
        event, owner = last.get(run_id), owners.get(run_id)
        who = (owner.hostname, owner.pid) if owner else (event["host"], event["pid"]) if event else ("", "")
        rows.append(
            {
                "run": run_id,
                "what": f"{event['method']} k={event['k']} seed {event['seed']}" if event else "",
                "epochs": f"{event['epoch']} of {event['epochs']}" if event else "",
                "host": str(who[0]),
                "process": str(who[1]),
                "last heard of": f"{(now - event['time']).total_seconds():.0f} s ago" if event else "",
            }
        )
    return rows


def failures(events: Iterable[Event]) -> list[dict[str, str]]:
    """The last runs that diverged, and the last errors that ended a training, the newest first."""
    failed = [event for event in events if event["kind"] in (reports.DIVERGED, reports.FAILED)]
    return [
        {"when": f"{event['time']:%m-%d %H:%M}", "campaign": event["campaign"], "what": event["words"]}
        for event in reversed(failed[-FAILURES:])
    ]
