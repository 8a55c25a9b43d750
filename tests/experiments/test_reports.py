"""Lines and events: several processes share a log, a torn line is passed over, and a divergence stops nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from kdig_utils.experiments import reports
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.reports import Line, TrainingDiverged
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.study import Study
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import RunSpec

LINES, WRITERS = 300, 4
WRITER = """
import sys
from pathlib import Path
from kdig_utils.experiments import reports
for number in range(int(sys.argv[3])):
    reports.append(Path(sys.argv[1]), {"time": "2026-11-28T12:00:00+00:00", "host": "h", "pid": 1, "campaign": "c",
                                       "kind": "line", "words": "x" * 500, "writer": sys.argv[2], "number": number})
"""


def words(folder: Path) -> list[str]:
    return [event["words"] for event in reports.events([folder])]


def test_each_line_is_an_event_with_time_host_process_and_what_is_known_of_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    begun = datetime.now(UTC)
    with reports.logged(told.append, tmp_path, "pairing") as report:
        report("the teacher is loaded")
        report(Line("epoch 3 of 20", kind="epoch", run_id="0123456789ab", epoch=3, seconds=1.5))
    assert told == ["the teacher is loaded", "epoch 3 of 20"]
    (file,) = (tmp_path / "logs").iterdir()
    assert all(isinstance(json.loads(line), dict) for line in file.read_text().splitlines())
    first, second = reports.events([tmp_path])
    assert (first["kind"], first["words"], first["campaign"]) == ("line", "the teacher is loaded", "pairing")
    assert second["run_id"] == "0123456789ab"
    assert (second["epoch"], second["seconds"], second["pid"]) == (3, 1.5, os.getpid())
    assert all(abs((event["time"] - begun).total_seconds()) < 60 and event["host"] for event in (first, second))


def test_processes_that_share_a_log_lose_and_mix_nothing(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "h.jsonl"
    command = [sys.executable, "-c", WRITER, str(log)]
    writers = [subprocess.Popen([*command, str(number), str(LINES)]) for number in range(WRITERS)]
    assert [writer.wait() for writer in writers] == [0] * WRITERS
    found = {(event["writer"], event["number"]) for event in reports.events([tmp_path])}
    assert found == {(str(writer), number) for writer in range(WRITERS) for number in range(LINES)}
    print(f"{WRITERS} processes, {len(found)} events")


def test_a_log_keeps_its_newest_events_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "LOG_BYTES", 2_000)
    with reports.logged(lambda line: None, tmp_path, "c") as report:
        for number in range(200):
            report(f"line {number}")
    assert sum(path.stat().st_size for path in (tmp_path / "logs").iterdir()) < 2 * 2_000 + 500
    kept = words(tmp_path)
    assert kept == [f"line {number}" for number in range(200 - len(kept), 200)]
    assert len(kept) > 10


@pytest.mark.parametrize("torn", [b'{"time": "2026-11-28T', b"\xff\x00", b"[1, 2]", b"7", b'{"kind": "line"}'])
def test_a_torn_line_is_passed_over_and_takes_no_other_with_it(tmp_path: Path, torn: bytes) -> None:
    with reports.logged(lambda line: None, tmp_path, "c") as report:
        report("before")
        (log,) = (tmp_path / "logs").iterdir()
        log.write_bytes(log.read_bytes() + torn)
        assert words(tmp_path) == ["before"]
        report("after")
    assert words(tmp_path) == ["before", "after"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    told: list[str] = []
    with reports.logged(told.append, tmp_path, "c") as report:
        report("goes on")
    assert told == ["goes on"]


def test_what_ends_a_training_is_an_event(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), reports.logged(print, tmp_path, "c"):
        raise OSError("the disk is full")
    (event,) = reports.events([tmp_path])
    assert event["kind"] == reports.FAILED
    assert "the disk is full" in event["words"]


def test_a_divergence_is_printed_however_much_there_is_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    report = reports.print_now_and_then(3600)
    for line in ("first", "second", Line("run x has diverged", kind=reports.DIVERGED), "third"):
        report(line)
    assert capsys.readouterr().out.splitlines() == ["first", "run x has diverged"]


# A run that diverges


@pytest.fixture
def study(tmp_path: Path, sample_train: ImageSet, sample_test: ImageSet) -> Study:
    """Fifty images, no teacher."""
    made = Study("smoke", tmp_path, Ledger(tmp_path / "runs.csv"), tmp_path / "curves")
    made.__dict__.update(
        train=sample_train.subset(torch.arange(50)),
        test=sample_test.subset(torch.arange(20)),
        device=torch.device("cpu"),
    )
    return made


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_of_three_diverges_is_marked_and_the_others_end(study: Study, at_once: int) -> None:
    tame = RunSpec("student", k=17, epochs=1, batch_size=16)
    specs = [tame, dataclasses.replace(tame, seed=1, learning_rate=1e39), dataclasses.replace(tame, seed=2)]
    completed = [study.completed(spec).run_id for spec in specs]
    lines: list[str] = []
    for again in (False, True):
        lines.clear()
        with pytest.raises(TrainingDiverged, match=rf"run {completed[1]}: .*learning rate"):
            study.run_all(specs, "tiny", Way(at_once), report=lines.append)
        assert set(study.ledger.read()["run_id"]) == {completed[0], completed[2]}
        assert (lines == []) == again  # it is not tried again
    (event,) = [event for event in reports.events([study.folder]) if event["kind"] == reports.DIVERGED]
    assert (event["run_id"], event["campaign"]) == (completed[1], "tiny")
    finished = [event for event in reports.events([study.folder]) if event["kind"] == "epoch"]
    assert {event["run_id"] for event in finished} == {completed[0], completed[2]}
    assert study.run_all([specs[0], specs[2]]) == [completed[0], completed[2]]  # who asks for others is not told of it


def test_a_run_is_tried_again_when_its_mark_is_deleted(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = RunSpec("student", k=17, epochs=1, batch_size=16, learning_rate=1e39)
    with pytest.raises(TrainingDiverged):
        study.run_all([wild])
    (mark,) = (study.folder / "diverged").iterdir()
    with pytest.raises(TrainingDiverged, match=f"delete {mark}"):
        study.run_all([wild])
    mark.unlink()
    with pytest.raises(TrainingDiverged):
        study.run_all([wild])
    assert sum(event["kind"] == reports.DIVERGED for event in reports.events([study.folder])) == 2
