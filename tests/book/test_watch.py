"""The watch says what the ledgers and the events say, at a given moment."""

import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import SoftFileLease
from rich.console import Console

from kdig_utils import __main__ as command_line
from kdig_utils.book import watch
from kdig_utils.experiments import campaigns, laptop, reports

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
COUNTED = {"pairing": (10, 70), "laptop": (475, 475), "next": (0, 976)}
Tell = Callable[..., None]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Writes an event, so many minutes before now, into the log of a study in a workspace of its own."""
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path))
    monkeypatch.setattr(watch, "counts", lambda: COUNTED)

    def told(minutes: float, kind: str, run_id: str = "", epoch: int = 0, campaign: str = "pairing", **more) -> None:
        about = {"run_id": run_id, "method": "kd", "k": 5, "seed": 3, "epoch": epoch, "epochs": 2, "images": 50_000}
        event = {"time": (NOW - timedelta(minutes=minutes)).isoformat(), "host": "card-7", "pid": 4711}
        its = {"campaign": campaign, "kind": kind, "words": f"{run_id} {kind}", **(about if run_id else {}), **more}
        reports.append(tmp_path / "full" / "logs" / "card-7.jsonl", {**event, **its})

    return told


def shown(now: datetime = NOW) -> list[list[str]]:
    """The lines of what is shown, each as its cells."""
    console = Console(file=io.StringIO(), width=watch.WIDTH)
    console.print(watch.state(now))
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_speed_and_time_left_are_those_of_the_last_hour(tell: Tell) -> None:
    """In half an hour three runs of two epochs of 50,000 images: 6 runs an hour, 167 images a second, 10 h for 60."""
    tell(600, "epoch", "old", 2)  # yesterday's speed tells nothing
    tell(30, "line")
    for minutes, (run_id, epoch) in zip(range(29, 0, -5), itertools.product("abc", (1, 2)), strict=False):
        tell(minutes, "epoch", run_id, epoch)
    rows = shown()
    assert ["campaign", "done", "left", "runs an hour", "images a second", "time left"] in rows
    assert ["pairing", "10", "60", "6.0", "167", "10.0 h"] in rows
    assert ["laptop", "475", "0", "", "", ""] in rows
    assert ["next", "0", "976", "", "", ""] in rows


def test_a_campaign_that_only_the_events_know_is_shown(tell: Tell) -> None:
    tell(60, "epoch", "a", 2, campaign="search")
    assert ["search", "", "", "1.0", "14", ""] in shown()


def test_who_trains_what(tell: Tell, tmp_path: Path) -> None:
    """Held by a process, or heard of lately and not finished."""
    tell(300, "epoch", "forgotten", 1)
    tell(9, "epoch", "finished", 2)
    tell(8, "diverged", "wild", 1)
    tell(2, "progress", "heard", 1)
    tell(30, "epoch", "held", 1)
    folder = tmp_path / "full" / "reserved"
    folder.mkdir()
    (folder / "left.lock").touch()
    held = SoftFileLease(folder / "held.lock")
    with held:
        rows = shown()
        owner = held.owner
    assert [row for row in rows if row[0] in ("forgotten", "finished", "wild", "left")] == []
    assert ["heard", "kd k=5 seed 3", "1 of 2", "card-7", "4711", "120 s ago"] in rows
    assert ["held", "kd k=5 seed 3", "1 of 2", owner.hostname, str(owner.pid), "1800 s ago"] in rows
    assert not any(row[0] == "held" for row in shown())


def test_the_last_failures_are_shown_the_newest_first(tell: Tell) -> None:
    for minute in range(70, 60, -1):
        tell(minute, "diverged", f"run{minute}")
    tell(5, "failed", campaign="laptop", words="ValueError: tensor([nan, [/] 3]) failed")
    rows = shown()
    found = [row for row in rows if row[-1].endswith(("diverged", "failed"))]
    assert len(found) == watch.FAILURES
    assert found[0] == ["11-28 11:55", "laptop", "ValueError: tensor([nan, [/] 3]) failed"]
    assert [row[2] for row in found[1:]] == [f"run{minute} diverged" for minute in range(61, 65)]


def test_nothing_to_show_is_said(tell: Tell) -> None:
    assert ["runs under way: none"] in shown()
    assert ["last failures: none"] in shown()


def test_into_a_pipe_goes_one_snapshot(tell: Tell, capsys: pytest.CaptureFixture[str]) -> None:
    tell(1, "epoch", "a", 1)
    assert command_line.main(["status", "--watch", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("pairing") == 1
    assert "\x1b" not in out


def test_on_a_terminal_it_is_shown_anew_until_it_is_interrupted(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends in each pause, until it is interrupted in the third."""
    paused: list[float] = []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            raise KeyboardInterrupt
        monkeypatch.setattr(watch, "counts", lambda: {"pairing": (10 + len(paused), 70)})

    monkeypatch.setattr(watch.time, "sleep", sleep)
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=watch.WIDTH)
    watch.watch(3, terminal)
    assert paused == [3, 3, 3]
    assert all(f"│ pairing  │ {done}   │ {70 - done} " in terminal.file.getvalue() for done in (10, 11, 12))


def test_counts_are_those_of_the_committed_ledgers() -> None:
    found = watch.counts()
    assert set(campaigns.CAMPAIGNS) < set(found)
    assert found["pairing"][1] == 70
    assert found["laptop"][1] == len(laptop.queue())
    assert all(0 <= done <= runs for done, runs in found.values())
