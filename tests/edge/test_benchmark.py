"""The benchmark, with runtimes and processes that fail in known ways."""

import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdig_utils.edge import benchmark, records, roofline, runtimes
from kdig_utils.edge.runtimes import EXPORTERS, RUNTIMES, Candidate, File, Runtime, exported
from kdig_utils.edge.worker import EDGE, LATE, Lost
from kdig_utils.method import artifacts, cifar10, models

TOY = """
import numpy as np

def write(network, path):
    path.write_text(f"k = {network.k}")

def open_toy(path, k, threads, batch):
    assert path.read_text() == f"k = {k}"
    return np.zeros((batch, 3, 32, 32), np.uint8), lambda: np.zeros((batch, 10), np.float32)
"""


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The quick part of the table of runtimes."""
    for name in ("compile", "onnxruntime", "openvino", "executorch"):
        monkeypatch.delitem(RUNTIMES, name)
    return monkeypatch


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of PyTorch, ONNX Runtime in 8 bits, a toy that is one more entry of the table, and one that cannot be had."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        toy = importlib.import_module("toy")
        for name in ("compile", "openvino", "executorch"):
            patch.delitem(RUNTIMES, name)
        onnx = RUNTIMES["onnxruntime"]
        patch.setitem(RUNTIMES, "onnxruntime", onnx._replace(files={"int8": onnx.files["int8"]}))
        patch.setitem(RUNTIMES, "toy", Runtime(toy.open_toy, ("json",), {"fp16": File("toy.txt", toy.write)}))
        files = {"fp32": File("toy.txt", toy.write)}
        patch.setitem(RUNTIMES, "absent", Runtime(toy.open_toy, ("none_such",), files))
        patch.setattr(benchmark, "MEASURING", 0.005)
        networks = {"teacher": models.student(17).eval()}
        test = cifar10.load_sample("test").subset(torch.arange(100))
        return benchmark.latency_rows(networks, test, (1,), (1, 4), patience=60)


def test_a_runtime_is_one_entry_of_the_table(rows: list[dict]) -> None:
    toy = [row for row in rows if row["runtime"] == "toy"]
    assert [(row["precision"], row["status"], row["bytes"]) for row in toy] == [("fp16", "ok", len("k = 17"))] * 2
    assert all(row["speedup"] > 1 and row["predicted_ms"] is None for row in toy)


def test_every_setting_has_a_row(rows: list[dict]) -> None:
    assert len(rows) == 2 * 4
    assert len({(row["runtime"], row["precision"], row["batch"], row["threads"]) for row in rows}) == len(rows)


def test_rows_of_the_schema(rows: list[dict]) -> None:
    good = [row for row in rows if row["status"] == "ok" and row["runtime"] != "toy"]
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


def test_what_cannot_be_had_is_said_in_its_row(rows: list[dict]) -> None:
    assert all(set(row) == set(records.COLUMNS) for row in rows)
    absent = [row for row in rows if row["runtime"] == "absent"]
    assert all("none_such is not installed: pip install none_such" in row["status"] for row in absent)
    assert all(row["p50_ms"] is None for row in absent)


def test_rows_survive_the_file_and_the_table(rows: list[dict], tmp_path: Path) -> None:
    benchmark.write(rows, tmp_path / "here.json")
    again = json.loads((tmp_path / "here.json").read_text())
    assert [row["p50_ms"] for row in again if row["p50_ms"]] == pytest.approx(
        [row["p50_ms"] for row in rows if row["p50_ms"]], rel=1e-3
    )
    shown = benchmark.table(again)
    assert "none_such" in shown
    assert max(map(len, shown.splitlines()[:4])) <= 150


def test_the_group_that_is_advised_has_the_packages() -> None:
    text = (Path(__file__).parents[2] / "requirements.txt").read_text()
    listed = text.partition("\n# [edge]")[2].partition("\n\n")[0]
    assert all(f"\n{package}>=" in listed for package in EDGE)
    needed = {name.partition(".")[0] for runtime in RUNTIMES.values() for name in (*runtime.packages, *EXPORTERS)}
    assert {package for package in needed if f"\n{package}>=" in listed} == set(EDGE)


class Scripted:
    """A process that takes `ms` a call, and dies, or refuses, when it is asked for what it `cannot`."""

    def __init__(self, ms: float = 1.0, cannot: tuple = (), dies: bool = True) -> None:
        self.ms, self.cannot, self.dies, self.closed = ms, cannot, dies, False
        self.setting = (1, 1)

    def ask(self, do: str, *arguments: object) -> object:
        if do == "ready":
            self.setting = arguments[:2]
        if (do, self.setting) in self.cannot:
            self.closed = self.dies
            raise Lost("out of luck")
        return [self.ms] * arguments[0] if do == "times" else np.zeros((arguments[0], 10)).tolist()

    def is_alive(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


def scripted(name: str, ms: float = 1.0, cannot: tuple = (), dies: bool = True) -> Candidate:
    model, runtime, precision = name.split()
    process = Scripted(ms, cannot, dies)
    return Candidate(model, 0, runtime, precision, Path("none"), loaded={"each_ms": ms}, process=process)


@pytest.mark.parametrize("what", ["ready", "times"])
@pytest.mark.parametrize("dies", [True, False])
def test_one_network_that_is_lost_leaves_the_others_their_figures(dies: bool, what: str) -> None:
    names = ("teacher eager fp32", "teacher onnxruntime fp32", "student eager fp32")
    first, lost, last = present = [scripted(name, ms) for name, ms in zip(names, (8.0, 4.0, 2.0), strict=True)]
    lost.process = Scripted(4.0, ((what, (64, 1)),), dies)
    end = time.monotonic() + 1000
    times = [runtimes.measured(present, batch, 1, 0, end) for batch in (1, 64, 8)]
    assert set(times[0]["network"]) == set(names)
    assert set(times[1]["network"]) == {first.name, last.name}
    assert set(times[2]["network"]) == {first.name, last.name} | (set() if dies else {lost.name})
    assert lost.status(64, 1) == "out of luck"
    assert lost.status(8, 1) == ("out of luck" if dies else "")
    found = benchmark.statistics(times[1], last.name)
    assert found["speedup"] == 4
    assert "p95_ms" not in found  # six calls have no 95th percentile


def test_what_cannot_be_classified_is_said_in_words() -> None:
    present = [scripted("a eager fp32", cannot=(("logits", (4, 1)),)), scripted("b eager fp32")]
    runtimes.classify(present, 10, 4, time.monotonic() + 10)
    assert [each.missing for each in present] == ["out of luck", ""]
    assert [each.logits is None for each in present] == [True, False]
    assert benchmark.whole(present[0], 4, 1, {"p50_ms": 1.0})["status"] == "no accuracy: out of luck"
    assert benchmark.whole(present[1], 4, 1, {"p50_ms": 1.0, "accuracy": 90.0})["status"] == "ok"


def test_peaks_that_cannot_be_measured_leave_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise MemoryError("too small")

    monkeypatch.setattr(roofline, "peak", broken)
    tables = [roofline.layers(models.student(17))]
    assert roofline.peaks(tables, [(1, 1)], time.monotonic())[1].startswith("no time")
    found, words = roofline.peaks(tables, [(1, 1)], time.monotonic() + 60)
    assert found == {}
    assert "too small" in words


@pytest.mark.parametrize("patience", [0, -1, float("nan"), float("inf")])
def test_patience_is_a_time(patience):
    with pytest.raises(ValueError, match="--patience"):
        benchmark.run("kd_ig_k5", patience, None)


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "latency_rows", lambda *_arguments, **_more: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        benchmark.run("kd_ig_k5", 60, tmp_path / "file" / "here.json")


def test_what_was_exported_is_kept_and_what_could_not_be_says_why(patched: pytest.MonkeyPatch) -> None:
    good, bad = File("copy.safetensors", artifacts.save_weights), File("bad", models.count_parameters)
    patched.setitem(RUNTIMES, "toy", RUNTIMES["eager"]._replace(files={"fp32": good, "int8": bad}))
    network = models.student(17).eval()
    eager, kept, lost = exported("teacher", network, time.monotonic() + 60)
    assert kept.file.read_bytes() == eager.file.read_bytes()
    assert (eager.missing, kept.missing) == ("", "")
    assert lost.missing.startswith("the export failed: TypeError")
    again = exported("teacher", network, time.monotonic())  # no time to write anything
    assert [(each.file, each.missing) for each in again] == [(eager.file, ""), (kept.file, ""), (lost.file, LATE)]
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert [each.missing for each in exported("teacher", network, time.monotonic())] == ["", LATE, LATE]


def test_what_comes_too_late_is_left_out_in_words(patched: pytest.MonkeyPatch) -> None:
    patched.setitem(RUNTIMES, "compiled", RUNTIMES["eager"]._replace(opened_once=True))
    test = cifar10.load_sample("test").subset(torch.arange(4))
    networks = {"teacher": models.student(17).eval()}
    rows = benchmark.latency_rows(networks, test, (1,), (1, 4), patience=0)
    assert {row["status"] for row in rows} <= {LATE, runtimes.NO_TIME}
    assert all(row["p50_ms"] is None and set(row) == set(records.COLUMNS) for row in rows)
    assert rows[0]["status"] in benchmark.table(rows)


def test_compilation_is_asked_for_once() -> None:
    compiled = Candidate("student", 5, "compile", "fp32", Path("weights.safetensors"))
    assert compiled.status(1, 1) == ""
    assert compiled.status(64, 1) == compiled.status(1, 2) == runtimes.ONE_COMPILATION
    compiled.missing = "no compiler"  # comes before why it was not tried again
    assert compiled.status(64, 1) == "no compiler"
