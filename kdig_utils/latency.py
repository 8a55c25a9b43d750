"""How long a network takes on this machine: at steady state, the networks in turn, with an interval for their ratio.

Eager PyTorch in float32 on the CPU. Times depend on the machine and on what else it does; multiply-accumulates do not.
"""

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from kdig_utils import models

WARM_UP_WINDOW = 3  # calls whose medians are compared
WARM_UP_CHANGE = 0.05  # medians closer than this are steady
WARM_UP_SECONDS = 2.0
LEAST_ROUNDS = 10


class Speedup(NamedTuple):
    """How many times faster: ratio of the median latencies with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def processor() -> str:
    """The model name of this machine's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sizes(networks: Mapping[str, nn.Module]) -> pd.DataFrame:
    """What needs no clock: parameters, million_macs for one image, megabytes of the state dict; one row a network."""
    return pd.DataFrame(
        {
            "network": name,
            "parameters": models.count_parameters(network),
            "million_macs": models.count_macs(network) / 1e6,
            "megabytes": sum(value.numel() * value.element_size() for value in network.state_dict().values()) / 1e6,
        }
        for name, network in networks.items()
    )


@torch.inference_mode()
def call_times(network: nn.Module, images: Tensor, calls: int) -> np.ndarray:
    """Milliseconds of each of `calls` calls, the first included, without any warm-up."""
    network.eval()
    return np.array([_call_time(network, images) for _call in range(calls)])


def _call_time(network: nn.Module, images: Tensor) -> float:
    start = time.perf_counter_ns()
    network(images)
    return (time.perf_counter_ns() - start) / 1e6


def steady_times(networks: Mapping[str, nn.Module], images: Tensor, seconds: float) -> pd.DataFrame:
    """Milliseconds a call, after warming up; one column a network, one row a round.

    In each round each network is called once: a slow moment of the machine meets all of them.

    Args:
        images: one batch, (N, 3, 32, 32) in [0, 1].
        seconds: time for the rounds, without the warm-up; at least ten rounds are made.
    """
    for network in networks.values():
        warm_up(network, images)
    rounds, end = [], time.perf_counter() + seconds
    with torch.inference_mode():
        while len(rounds) < LEAST_ROUNDS or time.perf_counter() < end:
            rounds.append({name: _call_time(network, images) for name, network in networks.items()})
    return pd.DataFrame(rounds)


def warm_up(network: nn.Module, images: Tensor) -> None:
    """Call until the median of three calls is within 5 % of that of the three before, for two seconds at most."""
    end = time.perf_counter() + WARM_UP_SECONDS
    before = np.median(call_times(network, images, WARM_UP_WINDOW))
    while time.perf_counter() < end:
        after = np.median(call_times(network, images, WARM_UP_WINDOW))
        if abs(after / before - 1) < WARM_UP_CHANGE:
            return
        before = after


def measure(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    batch_sizes: Sequence[int] = (1, 64),
    threads: Sequence[int] | None = None,
    seconds: float = 2.0,
) -> pd.DataFrame:
    """Latencies at steady state: columns network, batch_size, threads, round, ms.

    Args:
        images: at least as many as the largest batch.
        threads: numbers of CPU threads; by default one, and all that PyTorch uses.
        seconds: for each batch size and number of threads.

    Raises:
        ValueError: fewer images than the largest batch.
    """
    if len(images) < max(batch_sizes):
        raise ValueError(
            f"{len(images)} images cannot fill a batch of {max(batch_sizes)}: give more, or a smaller batch"
        )
    parts = []
    for count in threads or sorted({1, torch.get_num_threads()}):
        for batch_size in batch_sizes:
            with torch_threads(count):
                times = steady_times(networks, images[:batch_size], seconds)
            long = times.rename_axis("round").reset_index().melt("round", var_name="network", value_name="ms")
            parts.append(long.assign(batch_size=batch_size, threads=count))
    return pd.concat(parts, ignore_index=True)[["network", "batch_size", "threads", "round", "ms"]]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(latencies: pd.DataFrame) -> pd.DataFrame:
    """Calls, median_ms and p95_ms of each network, batch size and number of threads."""
    by_setting = latencies.groupby(["threads", "batch_size", "network"], sort=False)["ms"]
    table = by_setting.agg(calls="size", median_ms="median", p95_ms=lambda times: times.quantile(0.95))
    return table.reset_index()


def speedup(latencies: pd.DataFrame, slow: str, fast: str, batch_size: int, threads: int) -> Speedup:
    """Median latency of `slow` over that of `fast`, with a 95 % interval from resampling whole rounds.

    Raises:
        ValueError: there are no latencies of these networks at this batch size and number of threads.
    """
    chosen = latencies[(latencies["batch_size"] == batch_size) & (latencies["threads"] == threads)]
    rounds = chosen.pivot(index="round", columns="network", values="ms")
    if rounds.empty or not {slow, fast} <= set(rounds.columns):
        setting = f"batch size {batch_size} and {threads} threads"
        raise ValueError(f"no latencies of {slow!r} and {fast!r} at {setting}: measure them first")
    samples = (rounds[slow].to_numpy(), rounds[fast].to_numpy())
    resampled = stats.bootstrap(samples, _ratio_of_medians, paired=True, n_resamples=2000, method="percentile", rng=0)
    return Speedup(float(_ratio_of_medians(*samples)), *map(float, resampled.confidence_interval))


def _ratio_of_medians(slow: np.ndarray, fast: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(slow, axis=axis) / np.median(fast, axis=axis)
