"""Processes that fail in known ways, and what they leave behind: nothing."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdig_utils import machine
from kdig_utils.edge import serving, worker


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ModuleNotFoundError: No module named 'openvino'", r"pip install '.[edge]'"),
        ("ModuleNotFoundError: No module named 'executorch.exir'", "pip install executorch"),
        ("InvalidCxxCompiler: No working C++ compiler found", "install one"),
    ],
)
def test_errors_say_what_to_do(error: str, words: str) -> None:
    assert words in worker.in_words(worker.Lost(error))


@pytest.fixture
def process() -> Iterator[worker.Process]:
    started = worker.Process(time.monotonic() + 60)
    yield started
    started.close()


def test_a_dead_process_gives_words(process):
    process.process.kill()
    with pytest.raises(worker.Lost, match="the process ended with status -9"):
        process.ask("times", 1)
    assert not process.is_alive()


def starts(program: str, monkeypatch) -> None:
    """Let the next process run this program."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **how: start([sys.executable, "-c", program], **how))


def test_the_last_words_of_a_process_are_kept(monkeypatch):
    starts("import sys; input(); sys.exit('first\\nno such instruction')", monkeypatch)
    process = worker.Process(time.monotonic() + 60)
    with contextlib.closing(process), pytest.raises(worker.Lost, match="status 1: no such instruction"):
        process.ask("times", 1)


def test_an_answer_that_breaks_off_is_a_death(monkeypatch):
    starts("input(); print('{\"answer\": [1.0, 2.', end='', flush=True)", monkeypatch)
    process = worker.Process(time.monotonic() + 60)
    with contextlib.closing(process), pytest.raises(worker.Lost, match="the process ended"):
        process.ask("times", 2)


def test_an_answer_that_does_not_come_is_late(monkeypatch):
    starts("import time; time.sleep(600)", monkeypatch)
    process, start = worker.Process(time.monotonic() + 0.5), time.monotonic()
    with contextlib.closing(process), pytest.raises(worker.Lost, match="not ready in time"):
        process.ask("times", 1)
    assert time.monotonic() - start < 30


def state(number: int) -> str:
    """T is stopped, S sleeps; empty if there is no such process."""
    path = Path(f"/proc/{number}/stat")
    return path.read_text(encoding="utf-8").rpartition(")")[2].split()[0] if path.is_file() else ""


def within_seconds(seconds: float, expected: set[str], number: int) -> bool:
    end = time.monotonic() + seconds
    while state(number) not in expected and time.monotonic() < end:
        time.sleep(0.02)
    return state(number) in expected


linux = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux shows the state of a process")
ECHO = "for line in iter(input, None): print('{\"answer\": 1}', flush=True)"


@linux
def test_who_has_no_turn_is_stopped(monkeypatch):
    starts(ECHO, monkeypatch)
    process = worker.Process(time.monotonic() + 60)
    with contextlib.closing(process):
        for _turn in range(3):
            assert process.ask("times", 1) == 1
            assert within_seconds(10, {"T"}, process.process.pid)
    assert state(process.process.pid) == ""


@linux
def test_what_a_process_has_started_ends_with_it(monkeypatch):
    compiles = (
        "import subprocess, sys, time; input(); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('{\"answer\": %d}' % child.pid, flush=True); time.sleep(600)"
    )
    starts(compiles, monkeypatch)
    process = worker.Process(time.monotonic() + 60)
    with contextlib.closing(process):
        compiler = process.ask("times", 1)
        assert state(compiler)
    assert within_seconds(10, {"", "Z"}, compiler)


@linux
def test_no_stopped_process_outlives_this_program():
    program = (
        "import sys, time\nfrom kdig_utils.edge import worker\n"
        "process = worker.Process(time.monotonic() + 60)\n"
        "try:\n    process.ask('nothing')\n"
        "except worker.Lost:\n    print(process.process.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=machine.process_environment(),
        start_new_session=True,
    )
    number = int(parent.stdout.readline())
    assert within_seconds(10, {"T"}, number)
    parent.kill()
    parent.communicate()
    assert within_seconds(10, {"", "Z"}, number)


def test_memory_is_told_in_megabytes(tmp_path):
    (tmp_path / "status").write_text("Name: python\nVmHWM:\t  100000 kB\n")
    assert serving.peak_megabytes(tmp_path / "status") == pytest.approx(102.4)
    (tmp_path / "status").write_text("Name: python\n")  # some containers say no more
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = resident / 1e6 if sys.platform == "darwin" else 1024 * resident / 1e6
    assert serving.peak_megabytes(tmp_path / "status") == pytest.approx(expected, rel=0.1)


def test_a_network_that_is_opened_for_one_thread_leaves_no_pool_in_its_process(tmp_path: Path) -> None:
    """Peak memory and time to load are those of one thread: a larger pool, once made, stays."""
    program = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom kdig_utils.edge import serving\n"
        "from kdig_utils.method import artifacts, models\n"
        "artifacts.save_weights(models.student(17), Path(sys.argv[1]))\n"
        "torch.set_num_threads(4)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "serving.open_eager(Path(sys.argv[1]), 17, 1, 1)\n"
        "print(before, len(os.listdir('/proc/self/task')))"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "weights.safetensors")]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=machine.process_environment())
    before, after = map(int, ran.stdout.split())
    assert after <= before
