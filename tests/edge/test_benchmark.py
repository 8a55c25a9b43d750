"""Timing, tested with networks that take a known time, and the court, with processes that fail in known ways."""

import contextlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from kdig_utils import machine
from kdig_utils.edge import benchmark, runtimes, timing, worker
from kdig_utils.method import cifar10, models


class Sleeps(nn.Module):
    """Takes `milliseconds` a call, and `first` more in the first one."""

    def __init__(self, milliseconds: float, first: float = 0.0) -> None:
        super().__init__()
        self.milliseconds, self.first = milliseconds, first

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep((self.milliseconds + self.first) / 1000)
        self.first = 0.0
        return images


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_first_call_is_kept_apart_from_the_steady_state(images):
    first, *later = timing.call_times(Sleeps(2, first=60), images, 6)
    assert first > 50
    assert np.median(later) < 30
    steady = timing.measure({"a": Sleeps(2, first=60)}, images, (4,), (1,), seconds=0.01)
    assert steady["ms"].max() < 50


def test_a_known_ratio_is_found(images):
    times = timing.measure({"slow": Sleeps(30), "fast": Sleeps(10)}, images, (4,), (1,), seconds=0.1)
    found = timing.speedup(times, "slow", "fast", batch_size=4, threads=1)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(3, rel=0.25)


def test_networks_are_timed_in_turn():
    called: list[str] = []

    def times(name: str) -> timing.Times:
        return lambda calls: called.append(name) or [1.0] * calls

    timing.interleave({name: times(name) for name in "abc"}, 0, 12, 20)
    rounds = np.array(called[-60:]).reshape(20, 3)
    assert (np.sort(rounds) == ["a", "b", "c"]).all()  # each once a round
    assert len({"".join(names) for names in rounds}) > 3  # in an order drawn anew


def test_every_setting_is_summarised(images):
    times = timing.measure({"a": Sleeps(0), "b": Sleeps(0)}, images, (1, 4), (1,), seconds=0)
    assert times.groupby(["network", "batch_size"])["round"].nunique().to_dict() == {
        (name, batch): rounds for name in "ab" for batch, rounds in ((1, timing.LEAST_ROUNDS), (4, 5))
    }
    table = timing.summary(times)
    assert list(table["network"]) == ["a", "b", "a", "b"]
    assert (table["median_ms"] <= table["p95_ms"]).all()


def test_the_interval_is_that_of_the_rounds():
    rng = np.random.default_rng(5)
    moment = rng.lognormal(0, 0.5, 15)  # slow moments meet both
    slow, fast = (factor * moment * rng.lognormal(0, 0.05, 15) for factor in (20, 10))
    rounds = pd.DataFrame({"network": name, "round": range(15), "ms": ms} for name, ms in (("a", slow), ("b", fast)))
    # Three calls in each round: it is their median that is resampled.
    calls = pd.concat([rounds.explode(["round", "ms"]).assign(shift=shift) for shift in (-1, 0, 1)])
    calls = calls.assign(ms=calls["ms"].astype(float) + calls["shift"], batch_size=1, threads=1)
    found = timing.speedup(calls, "a", "b", 1, 1)

    def ratio(first: np.ndarray, second: np.ndarray) -> float:
        return np.median(first) / np.median(second)

    expected = stats.bootstrap((slow, fast), ratio, paired=True, vectorized=False, method="percentile", rng=3)
    assert found.value == pytest.approx(ratio(slow, fast))
    assert [found.low, found.high] == pytest.approx(list(expected.confidence_interval), rel=0.02)
    assert found.high - found.low < 0.8 * found.value  # unpaired it would be far wider


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with timing.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_sizes_of_the_networks():
    table = timing.sizes({"teacher": models.teacher(), "student": models.student(5)}).set_index("network")
    assert table.loc["teacher", "parameters"] == 2236682
    assert table.loc["student", "million_macs"] == pytest.approx(58.70, abs=0.005)
    # Four bytes a parameter, and the statistics of batch norm on top.
    assert 1 < table.loc["student", "megabytes"] / (4e-6 * 543498) < 1.05


def test_too_few_images_and_unmeasured_settings_are_named(images):
    with pytest.raises(ValueError, match="4 images cannot fill a batch of 64"):
        timing.measure({"a": Sleeps(0)}, images, (64,))
    times = timing.measure({"a": Sleeps(0)}, images, (1,), (1,), seconds=0)
    with pytest.raises(ValueError, match="'a' and 'b' at batch size 1"):
        timing.speedup(times, "a", "b", 1, 1)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux has this file")
def test_the_processor_is_named_as_the_system_names_it():
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    known = {line.split(":", 1)[1].strip() for line in named} or {platform.processor(), platform.machine()}
    assert machine.processor() in known


def test_the_fastest_cpu_is_chosen_where_the_system_tells_them_apart(tmp_path):
    assert machine.fastest_cpu([0, 1, 5], tmp_path) == 5
    for number, hertz in enumerate((3_000_000, 4_800_000, 4_800_000, 2_200_000)):
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").write_text(f"{hertz}\n")
    assert machine.fastest_cpu([0, 1, 2, 3], tmp_path) == 2
    assert machine.fastest_cpu([0, 3], tmp_path) == 0


@pytest.mark.parametrize("count", [40, benchmark.LARGE_ROUNDS])
def test_a_planted_ratio_lies_in_its_interval(count):
    rng = np.random.default_rng(1)
    covered = 0
    for _repeat in range(40):
        rounds = pd.DataFrame(
            {"network": name, "round": range(count), "ms": ms * rng.lognormal(0, 0.1, count)}
            for name, ms in (("slow", 12.0), ("fast", 1.0))
        ).explode(["round", "ms"])
        times = rounds.astype({"ms": float, "round": int}).assign(batch_size=1, threads=1)
        found = timing.speedup(times, "slow", "fast", 1, 1)
        covered += found.low <= 12 <= found.high
    assert covered >= 34  # 95 % of 40, less three standard deviations


def test_a_slow_moment_meets_all_networks():
    clock = iter(range(10**6))

    def drifting(factor: float) -> timing.Times:
        return lambda calls: [factor * (1 + next(clock) / 2000) for _call in range(calls)]

    times = timing.settled(timing.interleave({"slow": drifting(3), "fast": drifting(1)}, 0, 12, 40))
    found = timing.speedup(times.assign(batch_size=1, threads=1), "slow", "fast", 1, 1)
    assert found.value == pytest.approx(3, rel=0.02)


def test_the_first_calls_of_a_block_are_not_settled():
    timed = {"a": lambda calls: [9.0, 9.0, 9.0] + [1.0] * (calls - 3)}
    times = timing.interleave(timed, 0, 12, 3)
    assert (timing.settled(times)["ms"] == 1).all()
    assert len(timing.settled(times)) == 3 * 9


def test_nothing_to_time_takes_no_time():
    found = timing.interleave({}, 3600)
    assert found.empty
    assert {"round", "network", "call", "ms"} <= set(found.columns)


def test_a_warm_up_ends_in_time():
    def drifts(calls: int) -> list[float]:  # never steady
        time.sleep(0.02)
        return [time.perf_counter_ns() ** 3 % 1000 + 1.0] * calls

    start = time.monotonic()
    timing.warm_up(drifts, seconds=0.1)
    assert time.monotonic() - start < 1


def test_first_calls_come_from_fresh_processes():
    times = timing.first_calls(("student", "teacher"), 1, 2, 2)
    assert len(times) == 2 * 2 * 2
    assert times["order"].unique().tolist() == ["student first, teacher"]
    assert (times["ms"] > 0).all()
    assert (times["threads"] >= 1).all()
    assert set(times["machine"]) == {machine.processor()}


@pytest.mark.parametrize(("seconds", "processes"), [(0.0, 1), (1000.0, timing.MOST_PROCESSES)])
def test_recorded_first_calls_take_turns_and_are_on_disk_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, processes: int
) -> None:
    path, orders = tmp_path / "calls.csv", []

    def one(order: tuple[str, ...], batch: int, calls: int, count: int, device: str) -> pd.DataFrame:
        orders.append(order)
        assert len(orders) < 3 or len(pd.read_csv(path)) == len(orders) - 1 - (len(orders) - 1) % 2
        return pd.DataFrame({"process": [0], "order": " first, ".join(order), "ms": 1.0})

    monkeypatch.setattr(timing, "first_calls", one)
    assert timing.record_first_calls(path, seconds) == processes
    assert orders == [("teacher", "student"), ("student", "teacher")] * processes
    assert pd.read_csv(path).groupby("order")["process"].nunique().tolist() == [processes] * 2


def test_without_a_forkserver_first_calls_say_what_to_do(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(RuntimeError, match="Linux or macOS"):
        timing.first_calls(("student", "teacher"), 1, 2, 2)


# What was submitted


def test_the_record_of_the_book_keeps_the_schema():
    record = timing.books_own(timing.submitted())
    assert len(record)
    assert set(benchmark.TABLE) <= set(record.columns)
    assert not record.duplicated(benchmark.SETTING).any()
    both = record.dropna(subset=["p50_ms", "p95_ms"])
    assert (both["p50_ms"] <= both["p95_ms"]).all()
    assert ((record["status"] == "ok") == record[["p50_ms", "accuracy", "bytes"]].notna().all(axis=1)).all()
    assert record.dropna(subset="p50_ms").groupby(["batch", "threads"])["model"].nunique().eq(2).all()


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results/latency in a repository of its own."""
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    folder = tmp_path / "results" / "latency"
    (folder / "first_calls").mkdir(parents=True)
    return folder


def test_without_a_record_there_are_columns_and_no_rows(results):
    record = timing.submitted()
    assert record.empty
    assert {*timing.COLUMNS, "file"} == set(record.columns)
    assert timing.books_own(record).empty


def test_the_record_of_the_book_comes_first_whatever_the_others_are_called(results):
    for name in ("aaa", timing.BOOK, "zzz"):
        (results / f"{name}.json").write_text(json.dumps([{"model": "teacher", "machine": name}]))
        (results / "first_calls" / f"{name}.csv").write_text(f"network,ms,machine\nteacher,1,{name}\n")
    record = timing.submitted()
    assert record["file"].tolist() == [timing.BOOK, "aaa", "zzz"]
    assert timing.books_own(record)["machine"].tolist() == [timing.BOOK]
    assert timing.submitted_first_calls()["file"].tolist() == [timing.BOOK, "aaa", "zzz"]


# The court


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    pytest.importorskip("onnxruntime")
    assert "sleeping" not in runtimes.OPENERS
    kinds = (
        ("eager", "fp32", "weights.safetensors", ""),
        ("onnxruntime", "int8", "int8.onnx", "onnx_int8"),
        ("sleeping", "fp32", "weights.safetensors", ""),
    )
    networks = {"teacher": models.student(17).eval()}
    test = cifar10.load_sample("test").subset(torch.arange(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "MEASURING", 0.005)
        return benchmark.latency_rows(networks, test, (1,), (1, 4), kinds, patience=60, report=lambda _line: None)


def test_every_setting_has_a_row(rows):
    assert len(rows) == 2 * 3
    settings = {(row["model"], row["runtime"], row["precision"], row["batch"], row["threads"]) for row in rows}
    assert len(settings) == len(rows)


def test_rows_of_the_schema(rows):
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == 4
    for row in good:
        assert row["p50_ms"] > 0
        if row["batch"] == 1:
            assert row["p50_ms"] <= row["p95_ms"]
        assert row["p95_ms"] is None or row["calls"] >= 20
        assert row["p99_ms"] is None or row["calls"] >= 100
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 <= row["accuracy"] <= 100
        assert row["accuracy_images"] == 100
        assert row["bytes"] > 0
        assert 0 < row["load_ms"] < 1000  # the runtime had been imported
        assert row["weights"] == rows[0]["weights"]
        assert row["k"] == 17
        assert row["peak_mb"] > 10
        assert 0 < row["predicted_ms"] < row["p50_ms"]
    eager = next(row for row in good if (row["model"], row["runtime"]) == ("teacher", "eager"))
    assert eager["speedup"] == 1
    assert eager["agreement"] == 100
    assert eager["max_difference"] == 0


def test_what_cannot_be_had_is_said_in_its_row(rows):
    words = {row["runtime"]: row["status"] for row in rows if row["status"] != "ok"}
    assert "sleeping" in words["sleeping"]
    assert all(set(row) == set(timing.COLUMNS) for row in rows)
    assert all(row["p50_ms"] is None for row in rows if row["status"] != "ok")


def test_rows_survive_the_file_and_the_table(rows, tmp_path):
    benchmark.write(rows, tmp_path / "here.json")
    again = json.loads((tmp_path / "here.json").read_text())
    assert [row["p50_ms"] for row in again if row["p50_ms"]] == pytest.approx(
        [row["p50_ms"] for row in rows if row["p50_ms"]], rel=1e-3
    )
    shown = benchmark.table(again)
    assert "sleeping" in shown
    assert max(map(len, shown.splitlines()[:4])) <= 150


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ModuleNotFoundError: No module named 'openvino'", r"pip install '.[edge]'"),
        ("ModuleNotFoundError: No module named 'onnx'", r"pip install '.[edge]'"),
        ("ModuleNotFoundError: No module named 'executorch.exir'", "pip install executorch"),
        ("InvalidCxxCompiler: No working C++ compiler found", "install one"),
    ],
)
def test_errors_say_what_to_do(error, words):
    assert words in worker.in_words(error)


def test_the_extra_that_is_advised_has_the_package():
    text = (Path(__file__).parents[2] / "requirements.txt").read_text()
    for package, extra in worker.EXTRAS.items():
        listed = text.partition(f"\n# [{extra}]")[2].partition("\n\n")[0]
        assert f"\n{package}>=" in listed


@pytest.fixture
def process():
    started = worker.Process("student openvino fp32", time.monotonic() + 60)
    yield started
    started.close()


def test_a_runtime_that_is_not_installed_gives_words(tmp_path, monkeypatch):
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.save(tmp_path / "pixels.npy", np.zeros((2, 3, 32, 32), np.uint8))
    variant = benchmark.Variant("student", 5, "openvino", "fp32", "fp32.onnx")
    process = worker.Process(variant.name, time.monotonic() + 60)
    with contextlib.closing(process), pytest.raises(worker.Lost, match="openvino is not installed: pip") as lost:
        benchmark.meet(process, variant, tmp_path, tmp_path / "pixels.npy")
    assert lost.value.name == variant.name


def test_a_dead_process_gives_words(process):
    process.process.kill()
    with pytest.raises(worker.Lost, match="the process ended with status -9"):
        process.ask("times", calls=1)
    assert not process.is_alive()


def starts(program: str, monkeypatch) -> None:
    """Let the next process run this program."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **how: start([sys.executable, "-c", program], **how))


def test_the_last_words_of_a_process_are_kept(monkeypatch):
    starts("import sys; input(); sys.exit('first\\nno such instruction')", monkeypatch)
    process = worker.Process("a", time.monotonic() + 60)
    with contextlib.closing(process), pytest.raises(worker.Lost, match="status 1: no such instruction"):
        process.ask("times", calls=1)


def test_an_answer_that_breaks_off_is_a_death(monkeypatch):
    starts("input(); print('{\"answer\": [1.0, 2.', end='', flush=True)", monkeypatch)
    process = worker.Process("a", time.monotonic() + 60)
    with contextlib.closing(process), pytest.raises(worker.Lost, match="the process ended"):
        process.ask("times", calls=2)


def test_an_answer_that_does_not_come_is_late(monkeypatch):
    starts("import time; time.sleep(600)", monkeypatch)
    process, start = worker.Process("a", time.monotonic() + 0.5), time.monotonic()
    with contextlib.closing(process), pytest.raises(worker.Lost, match="not ready in time"):
        process.ask("times", calls=1)
    assert time.monotonic() - start < 30


def state(number: int) -> str:
    """T is stopped, S sleeps; empty if there is no such process."""
    path = Path(f"/proc/{number}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.is_file() else ""


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
    process = worker.Process("a", time.monotonic() + 60)
    with contextlib.closing(process):
        for _turn in range(3):
            assert process.ask("times", calls=1) == 1
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
    process = worker.Process("a", time.monotonic() + 60)
    with contextlib.closing(process):
        compiler = process.ask("times", calls=1)
        assert state(compiler)
    assert within_seconds(10, {"", "Z"}, compiler)


@linux
def test_no_stopped_process_outlives_this_program():
    program = (
        "import sys, time\nfrom kdig_utils.edge import worker\n"
        "process = worker.Process('a', time.monotonic() + 60)\n"
        "try:\n    process.ask('open', runtime='none', path='', k=0, pixels='')\n"
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


class Scripted:
    """A process that takes `ms` a call, and dies, or refuses, when it is asked for what it `cannot`."""

    def __init__(self, name: str, ms: float = 1.0, cannot: tuple = (), dies: bool = True) -> None:
        self.name, self.ms, self.cannot, self.dies, self.closed = name, ms, cannot, dies, False
        self.loaded, self.setting = {"each_ms": ms}, (1, 1)

    def ask(self, do: str, **arguments: object) -> object:
        if (do, self.setting) in self.cannot:
            self.closed = self.dies
            raise worker.Lost("out of luck", self.name)
        return [self.ms] * arguments["calls"] if do == "times" else np.zeros((arguments["images"], 10)).tolist()

    def is_alive(self) -> bool:
        return not self.closed

    def stay(self, cpus: list[int]) -> None:
        pass

    def ready(self, batch: int, threads: int) -> None:
        self.setting = (batch, threads)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("dies", [True, False])
def test_one_network_that_is_lost_leaves_the_others_their_figures(dies):
    names = ("teacher eager fp32", "teacher onnxruntime fp32", "student eager fp32")
    present = {name: Scripted(name, ms) for name, ms in zip(names, (8.0, 4.0, 2.0), strict=True)}
    present[names[1]] = Scripted(names[1], 4.0, (("times", (64, 1)),), dies)
    problems: dict[tuple, str] = {}
    end = time.monotonic() + 1000
    times = [benchmark._times(present, problems, batch, 1, 0, end) for batch in (1, 64, 8)]
    assert set(times[0]["network"]) == set(names)
    assert set(times[1]["network"]) == {names[0], names[2]}
    assert set(times[2]["network"]) == {names[0], names[2]} | (set() if dies else {names[1]})
    lost = benchmark.Variant("teacher", 0, "onnxruntime", "fp32", "fp32.onnx", "onnx_fp32")
    assert benchmark.status(lost, 64, 1, problems) == "out of luck"
    assert benchmark.status(lost, 8, 1, problems) == ("out of luck" if dies else "")
    found = benchmark.row(pd.concat(times), lost._replace(model="student", runtime="eager"), 64, 1)
    assert found["speedup"] == 4
    assert "p95_ms" not in found  # six calls have no 95th percentile


def test_what_cannot_be_classified_is_said_in_words():
    present = {
        name: Scripted(name, cannot=(("logits", (4, 1)),) if "eager" in name else ()) for name in ("a eager", "b")
    }
    problems: dict[tuple, str] = {}
    logits = benchmark.classified(present, problems, 10, 4, time.monotonic() + 10)
    assert logits.keys() == {"b"}
    assert problems == {("a eager",): "out of luck"}
    timed = {"p50_ms": 1.0, "accuracy": None}
    assert benchmark._whole(timed, "out of luck")["status"] == "no accuracy: out of luck"
    assert benchmark._whole({**timed, "accuracy": 90.0}, "")["status"] == "ok"


def test_peaks_that_cannot_be_measured_leave_words(monkeypatch):
    def broken(*_arguments: object) -> None:
        raise MemoryError("too small")

    monkeypatch.setattr("kdig_utils.edge.roofline.peak", broken)
    networks = {"teacher": models.student(17)}
    found, words = benchmark.predictions(networks, (1,), (1,), time.monotonic() + 60)
    assert found == {}
    assert "too small" in words
    assert benchmark.predictions(networks, (1,), (1,), time.monotonic())[1].startswith("no time")


@pytest.mark.parametrize("patience", [0, -1, float("nan"), float("inf")])
def test_patience_is_a_time(patience):
    with pytest.raises(ValueError, match="--patience"):
        benchmark.run("kd_ig_k5", patience, None)


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "latency_rows", lambda *_arguments, **_more: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        benchmark.run("kd_ig_k5", 60, tmp_path / "file" / "here.json")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"compile": 500, "eager": 2000}, " (torch.compile on the first 500 images)"),
        (
            {"compile": 500, "eager": 900},
            " (torch.compile on the first 500 images, the others on the first 900 images)",
        ),
        ({"compile": 2000, "eager": 2000}, ""),
    ],
)
def test_the_accuracies_say_how_many_images_they_are_of(images, words):
    rows = [{"runtime": runtime, "accuracy_images": count} for runtime, count in images.items()]
    assert benchmark.few_images([*rows, {"runtime": "compile", "accuracy_images": None}], 2000) == words


def test_memory_is_told_in_megabytes(tmp_path):
    (tmp_path / "status").write_text("Name: python\nVmHWM:\t  100000 kB\n")
    assert runtimes.peak_megabytes(tmp_path / "status") == pytest.approx(102.4)
    (tmp_path / "status").write_text("Name: python\n")  # some containers say no more
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = resident / 1e6 if sys.platform == "darwin" else 1024 * resident / 1e6
    assert runtimes.peak_megabytes(tmp_path / "status") == pytest.approx(expected, rel=0.1)


def test_every_runtime_names_its_packages():
    assert set(runtimes.PACKAGES) == set(runtimes.OPENERS)


def test_the_machine_is_described():
    facts = benchmark.machine_facts()
    assert facts["cpus"] >= 1
    assert "perf_counter" in facts["clock"]
    assert f"torch {torch.__version__.partition('+')[0]}" in facts["versions"]


def test_an_export_that_fails_is_said_in_words(tmp_path):
    pytest.importorskip("onnxruntime")
    words = benchmark._export(tmp_path, 5, ["onnx_fp32"], time.monotonic() + 60)
    assert "the export failed" in words["onnx_fp32"]
    assert "no weights at" in words["onnx_fp32"]


def test_an_export_that_is_late_is_said_in_words(tmp_path):
    assert benchmark._export(tmp_path, 5, ["onnx_fp32"], time.monotonic()) == {"onnx_fp32": benchmark.LATE}


def test_what_was_exported_is_kept():
    pytest.importorskip("onnxruntime")
    variants = [benchmark.Variant("student", 17, "onnxruntime", "int8", "int8.onnx", "onnx_int8")]
    networks = {"student": models.student(17).eval()}
    folders, problems = benchmark.export(networks, variants, time.monotonic() + 60)
    assert problems == {}
    written = (folders["student"] / "int8.onnx").stat().st_mtime_ns
    again, problems = benchmark.export(networks, variants, end=time.monotonic())  # no time to write anything
    assert problems == {}
    assert (again["student"] / "int8.onnx").stat().st_mtime_ns == written
    with torch.no_grad():
        next(networks["student"].parameters()).add_(1)
    assert benchmark.export(networks, variants, time.monotonic())[1] == {("student", "onnx_int8"): benchmark.LATE}


def test_what_comes_too_late_is_left_out_in_words():
    kinds = (("eager", "fp32", "weights.safetensors", ""), ("compile", "fp32", "weights.safetensors", ""))
    test = cifar10.load_sample("test").subset(torch.arange(4))
    networks = {"teacher": models.student(17).eval()}
    rows = benchmark.latency_rows(networks, test, (1,), (1, 4), kinds, patience=0, report=lambda _line: None)
    assert {row["status"] for row in rows} <= {benchmark.LATE, benchmark.NO_TIME}
    assert all(row["p50_ms"] is None and set(row) == set(timing.COLUMNS) for row in rows)
    assert rows[0]["status"] in benchmark.table(rows)


def test_compilation_is_asked_for_once():
    compiled = benchmark.Variant("student", 5, "compile", "fp32", "weights.safetensors")
    assert benchmark.status(compiled, 1, 1, {}) == ""
    assert benchmark.status(compiled, 64, 1, {}) == benchmark.status(compiled, 1, 2, {}) == benchmark.ONE_COMPILATION
    # Why it is not there at all comes before why it was not tried again.
    assert benchmark.status(compiled, 64, 1, {(compiled.name,): "no compiler"}) == "no compiler"
