"""Timing, tested with networks that take a known time."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kdig_utils import latency, models


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
    steady = latency.steady_times({"a": Sleeps(2, first=60)}, images, seconds=0.01)
    assert steady["a"].median() < 30


def test_a_known_ratio_is_found(images):
    times = latency.measure({"slow": Sleeps(30), "fast": Sleeps(10)}, images, (4,), (1,), seconds=0.1)
    found = latency.speedup(times, "slow", "fast", batch_size=4, threads=1)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(3, rel=0.25)


def test_networks_are_timed_in_turn(images):
    times = latency.measure({"a": Sleeps(0), "b": Sleeps(0)}, images, (1, 4), (1,), seconds=0)
    assert times.groupby(["network", "batch_size"]).size().eq(latency.LEAST_ROUNDS).all()
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
