"""Timing, tested with networks that take a known time."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kdig_utils import cifar10, latency, models


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
    first, *later = latency.call_times(Sleeps(2, first=60), images, 6)
    assert first > 50
    assert np.median(later) < 30
    steady = latency.measure({"a": Sleeps(2, first=60)}, images, (4,), (1,), seconds=0.01)
    assert steady["ms"].max() < 50


def test_a_known_ratio_is_found(images):
    times = latency.measure({"slow": Sleeps(30), "fast": Sleeps(10)}, images, (4,), (1,), seconds=0.1)
    found = latency.speedup(times, "slow", "fast", batch_size=4, threads=1)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(3, rel=0.25)


def test_networks_are_timed_in_turn(images):
    times = latency.measure({"a": Sleeps(0), "b": Sleeps(0)}, images, (1, 4), (1,), seconds=0)
    assert times.groupby(["network", "batch_size"])["round"].nunique().to_dict() == {
        (name, batch): rounds for name in "ab" for batch, rounds in ((1, latency.LEAST_ROUNDS), (4, 5))
    }
    table = latency.summary(times)
    assert list(table["network"]) == ["a", "b", "a", "b"]
    assert (table["median_ms"] <= table["p95_ms"]).all()


def test_the_interval_is_that_of_the_rounds():
    rounds = pd.DataFrame({"network": ["a", "b"] * 20, "round": np.repeat(range(20), 2), "ms": [20.0, 10.0] * 20})
    found = latency.speedup(rounds.assign(batch_size=1, threads=1), "a", "b", 1, 1)
    assert found == (2, 2, 2)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with latency.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_sizes_of_the_networks():
    table = latency.sizes({"teacher": models.teacher(), "student": models.student(5)}).set_index("network")
    assert table.loc["teacher", "parameters"] == 2236682
    assert table.loc["student", "million_macs"] == pytest.approx(58.70, abs=0.005)
    # Four bytes a parameter, and the statistics of batch norm on top.
    assert 1 < table.loc["student", "megabytes"] / (4e-6 * 543498) < 1.05


def test_too_few_images_and_unmeasured_settings_are_named(images):
    with pytest.raises(ValueError, match="4 images cannot fill a batch of 64"):
        latency.measure({"a": Sleeps(0)}, images, (64,))
    times = latency.measure({"a": Sleeps(0)}, images, (1,), (1,), seconds=0)
    with pytest.raises(ValueError, match="'a' and 'b' at batch size 1"):
        latency.speedup(times, "a", "b", 1, 1)


def test_the_processor_has_a_name():
    assert latency.processor()


def test_a_planted_ratio_lies_in_its_interval():
    rng = np.random.default_rng(1)
    covered = 0
    for _repeat in range(40):
        rounds = pd.DataFrame(
            {"network": name, "round": range(40), "ms": ms * rng.lognormal(0, 0.1, 40)}
            for name, ms in (("slow", 12.0), ("fast", 1.0))
        ).explode(["round", "ms"])
        times = rounds.astype({"ms": float, "round": int}).assign(batch_size=1, threads=1)
        found = latency.speedup(times, "slow", "fast", 1, 1)
        covered += found.low <= 12 <= found.high
    assert covered >= 34  # 95 % of 40, less three standard deviations


def test_a_slow_moment_meets_all_networks():
    clock = iter(range(10**6))

    def drifting(factor: float) -> latency.Times:
        return lambda calls: [factor * (1 + next(clock) / 2000) for _call in range(calls)]

    times = latency.settled(latency.interleave({"slow": drifting(3), "fast": drifting(1)}, 0, 12, 40))
    found = latency.speedup(times.assign(batch_size=1, threads=1), "slow", "fast", 1, 1)
    assert found.value == pytest.approx(3, rel=0.02)


def test_the_first_calls_of_a_block_are_not_settled():
    timed = {"a": lambda calls: [9.0, 9.0, 9.0] + [1.0] * (calls - 3)}
    times = latency.interleave(timed, 0, 12, 3)
    assert (latency.settled(times)["ms"] == 1).all()
    assert len(latency.settled(times)) == 3 * 9


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    pytest.importorskip("onnxruntime")
    from kdig_utils import court, runtimes

    assert "sleeping" not in runtimes.OPENERS
    kinds = (
        ("eager", "fp32", "weights.safetensors", ""),
        ("onnxruntime", "int8", "int8.onnx", "onnx"),
        ("sleeping", "fp32", "weights.safetensors", ""),
    )
    networks = {"teacher": models.student(17).eval()}
    test = cifar10.load_sample("test").subset(torch.arange(100))
    return court.latency_rows(networks, test, (1,), (1, 4), kinds, seconds=0.2, patience=120, report=lambda _line: None)


def test_every_setting_has_a_row(rows):
    assert len(rows) == 2 * 3
    settings = {(row["model"], row["runtime"], row["precision"], row["batch"], row["threads"]) for row in rows}
    assert len(settings) == len(rows)


def test_rows_of_the_schema(rows):
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == 4
    for row in good:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 <= row["accuracy"] <= 100
        assert row["accuracy_images"] == 100
        assert row["bytes"] > 0
        assert row["load_ms"] > 0
        assert row["peak_mb"] > 10
        assert 0 < row["predicted_ms"] < row["p50_ms"]
    eager = next(row for row in good if (row["model"], row["runtime"]) == ("teacher", "eager"))
    assert eager["speedup"] == 1
    assert eager["agreement"] == 100
    assert eager["max_difference"] == 0


def test_what_cannot_be_had_is_said_in_its_row(rows):
    words = {row["runtime"]: row["status"] for row in rows if row["status"] != "ok"}
    assert "sleeping" in words["sleeping"]
    assert all("p50_ms" not in row for row in rows if row["status"] != "ok")


def test_rows_survive_the_file_and_the_table(rows, tmp_path):
    import json

    from kdig_utils import court

    court.write(rows, tmp_path / "here.json")
    again = json.loads((tmp_path / "here.json").read_text())
    assert [row["p50_ms"] for row in again if "p50_ms" in row] == pytest.approx(
        [row["p50_ms"] for row in rows if "p50_ms" in row], rel=1e-3
    )
    assert "sleeping" in court.table(again)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ModuleNotFoundError: No module named 'openvino'", "pip install openvino"),
        ("ModuleNotFoundError: No module named 'executorch.exir'", "pip install executorch"),
        ("InvalidCxxCompiler: No working C++ compiler found", "install one"),
    ],
)
def test_errors_say_what_to_do(error, words):
    from kdig_utils import court

    assert words in court.in_words(error)


def test_a_runtime_that_is_not_installed_gives_words(tmp_path, monkeypatch):
    from kdig_utils import court

    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.save(tmp_path / "pixels.npy", np.zeros((2, 3, 32, 32), np.uint8))
    variant = court.Variant("student", 5, "openvino", "fp32", "fp32.onnx")
    process = court.Process()
    try:
        with pytest.raises(RuntimeError, match="openvino is not installed: pip install openvino"):
            process.open(variant, tmp_path, tmp_path / "pixels.npy", 60)
    finally:
        process.close()


def test_a_dead_process_gives_words():
    from kdig_utils import court

    process = court.Process()
    process.process.kill()
    with pytest.raises(RuntimeError, match="the process ended with status -9"):
        process.ask("times", calls=1)
    process.close()


def test_the_machine_is_described():
    from kdig_utils import court

    facts = court.machine()
    assert facts["cpus"] >= 1
    assert "perf_counter" in facts["clock"]
    assert f"torch {torch.__version__.partition('+')[0]}" in facts["versions"]


def test_first_calls_come_from_fresh_processes():
    times = latency.first_calls(("student", "teacher"), 1, 2, 2)
    assert len(times) == 2 * 2 * 2
    assert times["order"].unique().tolist() == ["student first, teacher"]
    assert (times["ms"] > 0).all()


def test_an_export_that_fails_is_said_in_words(tmp_path):
    pytest.importorskip("onnxruntime")
    from kdig_utils import court

    words = court._export(tmp_path, 5, ["onnx"], time.monotonic() + 60)
    assert "the export failed" in words["onnx"]
    assert "no weights at" in words["onnx"]


def test_an_export_that_is_late_is_said_in_words(tmp_path):
    from kdig_utils import court

    assert court._export(tmp_path, 5, ["onnx"], time.monotonic()) == {"onnx": court.LATE}


def test_what_was_exported_is_kept():
    pytest.importorskip("onnxruntime")
    from kdig_utils import court

    variants = [court.Variant("student", 17, "onnxruntime", "int8", "int8.onnx", "onnx")]
    networks = {"student": models.student(17).eval()}
    folders, problems = court.export(networks, variants, time.monotonic() + 60)
    assert problems == {}
    written = (folders["student"] / "int8.onnx").stat().st_mtime_ns
    again, problems = court.export(networks, variants, end=time.monotonic())  # no time to write anything
    assert problems == {}
    assert (again["student"] / "int8.onnx").stat().st_mtime_ns == written
    with torch.no_grad():
        next(networks["student"].parameters()).add_(1)
    assert court.export(networks, variants, time.monotonic())[1] == {("student", "onnx"): court.LATE}


def test_what_comes_too_late_is_left_out_in_words():
    from kdig_utils import court

    kinds = (("eager", "fp32", "weights.safetensors", ""), ("compile", "fp32", "weights.safetensors", ""))
    test = cifar10.load_sample("test").subset(torch.arange(4))
    networks = {"teacher": models.student(17).eval()}
    rows = court.latency_rows(networks, test, (1,), (1, 4), kinds, patience=0, report=lambda _line: None)
    assert [row["status"] for row in rows] == [court.LATE] * 4
    assert all("p50_ms" not in row for row in rows)
    assert court.LATE in court.table(rows)


def test_compilation_is_asked_for_once():
    from kdig_utils import court

    compiled = court.Variant("student", 5, "compile", "fp32", "weights.safetensors")
    assert court.status(compiled, 1, 1, {}) == "ok"
    assert court.status(compiled, 64, 1, {}) == court.status(compiled, 1, 2, {}) == court.ONE_COMPILATION
    # Why it is not there at all comes before why it was not tried again.
    assert court.status(compiled, 64, 1, {(compiled.name,): "no compiler"}) == "no compiler"
