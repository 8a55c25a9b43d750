"""The flight: stages in their order, a budget that is kept, and nothing that a stage does wrong ends it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdig_utils import __main__ as command_line
from kdig_utils import machine
from kdig_utils.analysis import explanations
from kdig_utils.commands import make_runs
from kdig_utils.experiments import flight, laptop, packs, probes, study
from kdig_utils.experiments.flight import Flight
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.side_by_side import WAYS
from kdig_utils.experiments.steps import Steps
from kdig_utils.experiments.study import Study
from kdig_utils.method import artifacts, models
from kdig_utils.method.spec import RunSpec

GOAL = 93.9  # per cent, of a teacher
TWO_WAYS = {"compiled": [(1, 300.0), (4, 900.0)], "recorded": [(1, 200.0), (4, 700.0), (8, 800.0)]}


@pytest.fixture
def small(tmp_path: Path) -> Study:
    made = Study("full", tmp_path / "ws", Ledger(tmp_path / "runs.csv"), tmp_path / "curves")
    made.__dict__.update(train=type("Images", (), {"md5": "d" * 32})(), device=torch.device("cpu"))
    return made


class Commands:
    """Takes the place of the processes: notes each command and answers with the status that is wanted."""

    def __init__(self, statuses: dict[str, list[int]], takes: float = 0.0) -> None:
        self.statuses, self.takes, self.called = statuses, takes, []

    def __call__(self, flying: Flight, stage: str, *words: object, seconds: float) -> int:
        self.called.append((stage, tuple(map(str, words)), seconds))
        flying.started -= self.takes
        if stage == "check" and words[1] in TWO_WAYS:
            words[-1].parent.mkdir(parents=True, exist_ok=True)
            words[-1].write_text(json.dumps(facts(words[1])))
        waiting = self.statuses.get(stage, [])
        return waiting.pop(0) if waiting else 0

    def of(self, stage: str) -> list[tuple[str, ...]]:
        return [words for name, words, _seconds in self.called if name == stage]


def facts(way: str) -> dict:
    ladder = [{"at_once": count, "images_per_second": rate} for count, rate in TWO_WAYS[way]]
    return {"device": "A Card 80 GB", "torch": version("torch"), "first_step_seconds": 1.0, "ladder": ladder}


def fly(
    made: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, statuses: dict | None = None, takes: float = 0.0
) -> tuple[Commands, str]:
    """A flight of nine minutes on a device that is taken for a GPU; its commands and its log."""
    commands = Commands(statuses or {}, takes)
    monkeypatch.setattr(Flight, "command", lambda self, *words, **options: commands(self, *words, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Card 80 GB")
    flown = flight.fly(made, 9, folder, GOAL)
    return commands, flown.file(".log").read_text()


def test_stages_come_in_their_order_with_the_fastest_way(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, log = fly(small, tmp_path / "out", monkeypatch)
    stages = list(dict.fromkeys(stage for stage, *_rest in commands.called))
    assert stages == ["check", "teacher", "laptop", "signals", "queue", "explanations", "first calls"]
    (words,) = commands.of("queue")
    assert words[words.index("--way") + 1] == "compiled"
    assert words[words.index("--at-once") + 1] == "4"
    assert "compiled × 4, recorded × 8, called × 1" in log


def test_a_way_that_breaks_gives_way_to_the_next_and_full_memory_halves(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = flight.OUT_OF_MEMORY
    commands, log = fly(small, tmp_path / "out", monkeypatch, {"queue": [full, full, -9, 1, 1]})
    tried = [(w[w.index("--way") + 1], int(w[w.index("--at-once") + 1])) for w in commands.of("queue")]
    assert tried == [("compiled", 4), ("compiled", 2), ("compiled", 1), ("recorded", 8), ("called", 1)]
    assert log.count("broke off: goes on as") == 4
    assert commands.of("first calls")  # the flight went on


def test_a_check_that_finds_nothing_leaves_what_always_works(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "PROBED", {"cuda": ("none", "called")})
    commands, _log = fly(small, tmp_path / "out", monkeypatch, {"check": [-9, 1]})
    (words,) = commands.of("queue")
    assert words[words.index("--way") + 1] == "called"


@pytest.mark.parametrize("stage", list(flight.STAGES))
def test_a_stage_that_raises_is_noted_and_the_others_fly(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def broken(_flight: Flight) -> None:
        raise OSError("no such luck")

    monkeypatch.setitem(flight.STAGES, stage, broken)
    commands, log = fly(small, tmp_path / "out", monkeypatch)
    assert f"{stage}: broke off: OSError: no such luck" in log
    assert len({name for name, *_rest in commands.called}) >= 5


def test_the_budget_is_kept_and_the_last_stages_have_their_share(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command takes a minute: what it may take is never more than what is left, and saving."""
    commands, _log = fly(small, tmp_path / "out", monkeypatch, takes=60)
    for place, (stage, words, seconds) in enumerate(commands.called):
        left = 540 - 60 * place
        assert seconds <= left + flight.GRACE
        if stage == "queue":
            budget = 60 * float(words[words.index("--budget-minutes") + 1])
            assert budget == pytest.approx(left - 40 - 54, abs=2)  # explanations and first calls


@pytest.mark.parametrize(
    ("measured", "probed"),
    [(["recorded"], ["recorded", "compiled", "unbenchmarked"]), (list(WAYS), ["recorded"])],
    ids=["one way", "all ways"],
)
def test_an_earlier_flight_on_such_a_device_shortens_the_check(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], probed: list[str]
) -> None:
    """The fastest way then is looked at again, and what was not measured then; what always works only in need."""
    slower = {**facts("recorded"), "ladder": [{"at_once": 1, "images_per_second": 1.0}]}
    found = {way: facts("recorded") if way == "recorded" else slower for way in measured}
    earlier = small.folders["flights"] / "2026-01-01T00-00-00Z_check.json"
    earlier.parent.mkdir(parents=True)
    written = json.dumps({"device": "A Card 80 GB", "torch": version("torch"), "ways": found})
    earlier.write_text(written)
    commands, _log = fly(small, tmp_path / "out", monkeypatch)
    assert [words[1] for words in commands.of("check")] == probed
    assert earlier.read_text() == written


def test_what_was_probed_on_this_machine_is_not_probed_again(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fly(small, tmp_path / "out", monkeypatch)
    for path in small.folders["flights"].glob("*_check.json"):
        path.unlink()
    commands, log = fly(small, tmp_path / "out", monkeypatch)
    assert [words[1] for words in commands.of("check")] == ["unbenchmarked"]  # the one that never gave an answer
    assert "compiled × 4" in log


def test_the_command_trains_the_teacher_that_the_flight_waits_for(
    small: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the flight would never find its row."""
    asked = []
    monkeypatch.setattr(make_runs, "open_study", lambda _profile: small)
    monkeypatch.setattr(Study, "run", lambda _self, spec, *_rest: asked.append(spec))
    add_teacher(small, 0, 93.0)
    command_line.main(["teacher", "--seed", "1", "--campaign", "next", "--budget-minutes", "1"])
    assert asked == [flight.next_teacher(small, GOAL)]


def add_teacher(made: Study, seed: int, accuracy: float) -> str:
    spec = dataclasses.replace(study.TEACHER_RECIPE, seed=seed, data_md5="d" * 32)
    made.ledger.append(spec, test_accuracy=accuracy)
    return spec.run_id


def test_no_teacher_is_trained_where_one_is_good_enough(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "manifest", lambda: {"teacher": {"test_accuracy": 94.4}})
    commands, log = fly(small, tmp_path / "out", monkeypatch)
    assert not commands.of("teacher")
    assert "94.40 %" in log


def test_a_teacher_that_is_not_good_enough_gives_way_to_the_next_seed(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_teacher(small, 0, 93.5)
    commands, _log = fly(small, tmp_path / "out", monkeypatch)
    (words,) = commands.of("teacher")
    assert words[words.index("--seed") + 1] == "1"


def test_a_teacher_that_was_trained_and_not_published_is_published(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = add_teacher(small, 0, 94.2)
    commands, _log = fly(small, tmp_path / "out", monkeypatch)
    assert not commands.of("teacher")
    assert commands.of("publish") == [("publish", run_id)]


def test_the_flights_teacher_takes_at_most_100_epochs_and_can_be_recorded() -> None:
    """A recorded step cannot follow a momentum that moves."""
    assert study.TEACHER_RECIPE.epochs <= 100
    assert study.TEACHER_RECIPE.schedule == "cosine"


def test_a_teacher_that_cannot_be_recorded_is_called(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, _log = fly(small, tmp_path / "out", monkeypatch, {"teacher": [1, 0]})
    assert [words[words.index("--way") + 1] for words in commands.of("teacher")] == ["recorded", "called"]


def test_a_second_call_goes_on_where_the_repositorys_files_came_anew(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace is kept between two calls on a lent machine; ledger, curves and logs are those of the start."""
    run_id = trained(small)
    fly(small, tmp_path / "out", monkeypatch)
    small.ledger.path.unlink()
    (small.curves / f"{run_id}.csv").unlink()
    _commands, log = fly(small, tmp_path / "out", monkeypatch)
    assert small.ledger.read()["run_id"].tolist() == [run_id]
    assert (small.curves / f"{run_id}.csv").is_file()
    assert "1 rows that the ledger did not have" in log


def trained(made: Study) -> str:
    """A run with everything that belongs to it."""
    spec = RunSpec("student", k=17)
    artifacts.save_weights(models.student(17), made.folders["weights"] / f"{spec.run_id}.safetensors")
    made.curves.mkdir(exist_ok=True)
    (made.curves / f"{spec.run_id}.csv").write_text("epoch,test_accuracy\n1,50.0\n")
    made.ledger.append(spec, test_accuracy=50.0)
    return spec.run_id


# Real processes


def flying(made: Study, folder: Path) -> Flight:
    return Flight(made, 60, folder, GOAL)


def test_a_command_that_takes_too_long_is_killed_and_said_so(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "LEAST", 0.1)
    made = flying(small, tmp_path / "out")
    started = time.monotonic()
    status = made.command("check", "probe", "called", "--seconds", "1000", seconds=0.2)
    assert status == -signal.SIGKILL
    assert time.monotonic() - started < 10
    assert "status -9" in made.file(".log").read_text()


def test_a_bad_command_gives_its_error_to_the_log(small: Study, tmp_path: Path) -> None:
    made = flying(small, tmp_path / "out")
    assert made.command("queue", "campaign", "nonsense", "--budget-minutes", "1", seconds=60) == 2
    assert "unknown campaign 'nonsense'" in made.file(".log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process die with its parent")
def test_what_a_killed_flight_has_started_dies_with_it(tmp_path: Path) -> None:
    """Else the next call would train the same run beside it."""
    script = (
        "import time\nfrom kdig_utils.machine import start\n"
        "child = start(['sleep', '1000'])\n"
        "print(child.pid, flush=True)\ntime.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it lives
    parent.kill()
    parent.wait()
    for _second in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text(encoding="utf-8").split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child outlived its parent")


def test_what_a_thread_has_started_outlives_the_thread() -> None:
    """Linux takes the end of the thread that started a process for the end of its parent."""
    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(machine.start, ["sleep", "1000"]).result()
    time.sleep(0.2)
    assert child.poll() is None
    child.kill()
    child.wait()


# The pack


def test_a_pack_brings_log_rows_and_explanations_home(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = trained(small)
    table = pd.DataFrame([[run_id, "student", 17, 0, "spearman", 0.5, 0.4, 0.6, 100]], columns=explanations.COLUMNS)
    explanations.record(table, small.explanations_path)
    fly(small, tmp_path / "out", monkeypatch)
    home = Study("full", tmp_path / "home", Ledger(tmp_path / "home" / "runs.csv"), tmp_path / "home" / "curves")
    added = packs.unpack((tmp_path / "out").glob("flight.tar.*"), home.ledger, home.folders)
    assert added == [run_id]
    assert (home.folders["weights"] / f"{run_id}.safetensors").is_file()
    (log,) = home.folders["flights"].glob("*.log")
    assert "ways, the fastest first" in log.read_text()
    (told,) = home.folders["flights"].glob("*_explanations.csv")
    assert explanations.read(told)["run_id"].tolist() == [run_id]


def test_runs_of_the_laptop_protocol_come_home_into_a_ledger_of_their_own(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here, runs = tmp_path / "there.csv", tmp_path / "here.csv", laptop.runs(["student", "kd"], [0])
    for run in runs:
        Ledger(there).append(run, test_accuracy=55.0)
    Ledger(here).append(runs[0], test_accuracy=56.0)
    monkeypatch.setattr(laptop, "own_ledger_path", lambda _profile="full": there)
    fly(small, tmp_path / "out", monkeypatch)
    home = Study("full", tmp_path / "home", Ledger(tmp_path / "home" / "runs.csv"), tmp_path / "home" / "curves")
    monkeypatch.setattr(laptop, "own_ledger_path", lambda _profile="full": here)
    monkeypatch.setattr(make_runs, "open_study", lambda _profile: home)
    make_runs.unpack(list((tmp_path / "out").glob("flight.tar.*")))
    assert "1 runs added" in capsys.readouterr().out
    assert Ledger(here).read()[["run_id", "test_accuracy"]].to_numpy().tolist() == [
        [runs[0].run_id, 56.0],  # what is there already stays
        [runs[1].run_id, 55.0],
    ]
    assert home.ledger.read().empty


def test_a_smaller_pack_leaves_no_piece_of_a_larger_one_behind(tmp_path: Path) -> None:
    rows, big = Ledger(tmp_path / "runs.csv").read(), tmp_path / "weights" / f"{'a' * 12}.safetensors"
    big.parent.mkdir()
    big.write_bytes(bytes(2 * packs.PACK_BYTES))
    packs.pack(rows, [big], tmp_path, "flight")
    assert len(list(tmp_path.glob("flight.tar.*"))) == 3
    (tmp_path / ".flight.tar.01.part").write_bytes(b"of a pack that was killed")
    packs.pack(rows, [], tmp_path, "flight")
    assert [path.name for path in tmp_path.glob("*flight.tar.*")] == ["flight.tar.00"]


def test_all_pieces_together_fit_through_the_door(tmp_path: Path) -> None:
    """Eight files of 16 MB, and 64 MiB in all: a pack whose last piece stays behind holds nothing."""
    paths = [tmp_path / "weights" / f"{number:012x}.safetensors" for number in range(9)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(bytes(8_000_000))
    gone = tmp_path / "checkpoints" / f"{'b' * 12}.pt"  # of a run that has just ended
    pack = packs.pack(Ledger(tmp_path / "runs.csv").read(), [gone, *paths], tmp_path, "flight")
    assert len(pack.pieces) <= 8
    assert sum(path.stat().st_size for path in pack.pieces) < 64 * 2**20
    assert pack.left_out == paths[7:]


# The check


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest student, in batches of eight, alone and beside another."""
    monkeypatch.setattr(probes, "SPEC", RunSpec("kd_ig", k=17, batch_size=8, epochs=1000))
    monkeypatch.setattr(probes, "COUNTS", (1, 2))


def test_a_probe_measures_the_device(quick: None) -> None:
    found = list(probes.probe(WAYS["called"], 0.05))[-1]
    assert found["torch"] == version("torch")
    assert found["differences"]["all_steps"] < 1e-3
    assert all(step["images_per_second"] > 0 for step in found["ladder"])


def test_more_runs_side_by_side_are_tried_only_while_that_gains(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "COUNTS", (1, 2, 3, 4))
    rates = iter([100.0, 150.0, 152.0, 300.0])
    monkeypatch.setattr(probes, "images_a_second", lambda students, seconds: next(rates))
    steps = [probes.steps_of(probes.SPEC, WAYS["called"], models.logits_and_features, torch.device("cpu"))]
    *_shorter, ladder = probes.climb(steps, WAYS["called"], models.logits_and_features, 0.0)
    assert [step["at_once"] for step in ladder] == [1, 2, 3]


def test_a_way_that_computes_something_else_is_refused(quick: None) -> None:
    def wrong(model: models.Student, images: torch.Tensor, tap: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = models.logits_and_features(model, images, tap)
        return 1.05 * logits, features

    with pytest.raises(RuntimeError, match="more than rounding explains"):
        probes.disagreement(WAYS["called"], wrong, torch.device("cpu"))


def test_a_way_that_does_not_learn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loss is the right one: the sum of a dozen tells."""
    monkeypatch.setattr(probes, "SPEC", RunSpec("kd_ig", k=17, batch_size=16, epochs=1000, learning_rate=0.02))
    made = probes.steps_of

    def still(spec: RunSpec, *arguments: object) -> Steps:
        compared = spec.precision == "float32"  # with the CPU, whose steps are those of `probes.SPEC`
        return made(dataclasses.replace(spec, learning_rate=1e-12) if compared else spec, *arguments)

    monkeypatch.setattr(probes, "steps_of", still)
    with pytest.raises(RuntimeError, match="more than rounding explains"):
        probes.disagreement(WAYS["called"], models.logits_and_features, torch.device("cpu"))
