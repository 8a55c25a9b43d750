"""Timing, tested with networks that take a known time."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from kdig_utils import machine
from kdig_utils.edge import runtimes, timing


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


def test_too_few_images_and_unmeasured_settings_are_named(images):
    with pytest.raises(ValueError, match="4 images cannot fill a batch of 64"):
        timing.measure({"a": Sleeps(0)}, images, (64,))
    times = timing.measure({"a": Sleeps(0)}, images, (1,), (1,), seconds=0)
    with pytest.raises(ValueError, match="'a' and 'b' at batch size 1"):
        timing.speedup(times, "a", "b", 1, 1)


def test_the_fastest_cpu_is_chosen_where_the_system_tells_them_apart(tmp_path):
    assert machine.fastest_cpu([0, 1, 5], tmp_path) == 5
    for number, hertz in enumerate((3_000_000, 4_800_000, 4_800_000, 2_200_000)):
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").write_text(f"{hertz}\n")
    assert machine.fastest_cpu([0, 1, 2, 3], tmp_path) == 2
    assert machine.fastest_cpu([0, 3], tmp_path) == 0


@pytest.mark.parametrize("count", [40, runtimes.LARGE_ROUNDS])
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
