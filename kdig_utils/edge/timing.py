"""How long a network takes on this machine: at steady state, the networks in turn, with an interval for their ratio.

Times depend on the machine and on what else it does; multiply-accumulates do not.
"""

import contextlib
import itertools
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from kdig_utils import paths
from kdig_utils.edge.serving import block
from kdig_utils.machine import processor
from kdig_utils.method import models

WARM_UP_CALLS = 3  # calls whose medians are compared
WARM_UP_CHANGE = 0.05  # medians closer than this are steady
WARM_UP_SECONDS = 2.0
LEAST_ROUNDS = 10
BLOCK_CALLS = 12  # in a row, before the next network has its turn
UNSETTLED_CALLS = 3  # of a block: they bring the weights back into the caches
RECORDED_CALLS = 10  # of each network in a process
MOST_PROCESSES = 20  # for each order of the networks

Times = Callable[[int], Sequence[float]]  # milliseconds of so many calls in a row


class Speedup(NamedTuple):
    """How many times faster: ratio of the median latencies with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@torch.inference_mode()
def call_times(network: nn.Module, images: Tensor, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls, the first included, without any warm-up; on a GPU until it is done."""
    network.eval()

    def call() -> None:
        network(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return block(call, calls)


def warm_up(times: Times, calls: int = WARM_UP_CALLS, seconds: float = WARM_UP_SECONDS) -> None:
    """Call until the median of `calls` calls is within 5 % of that of those before, for `seconds` at most."""
    end = time.perf_counter() + seconds
    before = np.median(times(calls))
    while time.perf_counter() < end:
        after = np.median(times(calls))
        if abs(after / before - 1) < WARM_UP_CHANGE:
            return
        before = after


def interleave(
    timed: Mapping[str, Times],
    seconds: float,
    calls: int = BLOCK_CALLS,
    least_rounds: int = LEAST_ROUNDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
) -> pd.DataFrame:
    """Let the networks take turns, after warming up: columns round, network, call, ms.

    In each round each network is called `calls` times in a row, in an order drawn anew: a slow moment of the machine
    meets all of them. The first calls of a block find the caches full of another network; `settled` leaves them out.

    Args:
        seconds: time for the rounds, without the warm-up; at least `least_rounds` are made.
        warm_up_seconds: of each network, at most.
    """
    for times in timed.values():
        warm_up(times, min(calls, WARM_UP_CALLS), warm_up_seconds)
    order = np.random.default_rng(0)
    rounds: list[dict[str, Sequence[float]]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < least_rounds or time.perf_counter() < end:
        rounds.append({name: timed[name](calls) for name in order.permutation(list(timed))})
    return pd.DataFrame(
        {"round": number, "network": name, "call": call, "ms": ms}
        for number, found in enumerate(rounds)
        for name in timed
        for call, ms in enumerate(found[name])
    )


def settled(times: pd.DataFrame) -> pd.DataFrame:
    """The calls of each block that come after its unsettled ones: the first three, or the first of a short block."""
    calls = times["call"].max() + 1
    return times[times["call"] >= min(UNSETTLED_CALLS, calls // 2)]


def measure(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    batch_sizes: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1,),
    seconds: float = 2.0,
) -> pd.DataFrame:
    """Latencies in eager PyTorch at steady state: columns network, batch_size, threads, round, ms.

    Args:
        images: at least as many as the largest batch.
        threads: numbers of CPU threads.
        seconds: for each batch size and number of threads.

    Raises:
        ValueError: fewer images than the largest batch.
    """
    if len(images) < max(batch_sizes):
        raise ValueError(f"{len(images)} images cannot fill a batch of {max(batch_sizes)}: give more images")
    parts = []
    for count, batch_size in itertools.product(threads, batch_sizes):
        timed = {name: partial(call_times, network, images[:batch_size]) for name, network in networks.items()}
        with torch_threads(count):
            times = settled(interleave(timed, seconds, *((BLOCK_CALLS,) if batch_size == 1 else (2, 5))))
        parts.append(times.assign(batch_size=batch_size, threads=count))
    return pd.concat(parts, ignore_index=True)[["network", "batch_size", "threads", "round", "ms"]]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads within the block.

    As in `torch.utils.benchmark`, whose import asks for a GPU: after that a fork cannot use one (`first_calls`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speedup(latencies: pd.DataFrame, slow: str, fast: str, batch_size: int, threads: int) -> Speedup:
    """Median latency of `slow` over that of `fast`, with a 95 % interval from resampling whole rounds.

    Raises:
        ValueError: there are no latencies of these networks at this batch size and number of threads.
    """
    chosen = latencies[(latencies["batch_size"] == batch_size) & (latencies["threads"] == threads)]
    rounds = chosen.pivot_table(index="round", columns="network", values="ms", aggfunc="median")
    if rounds.empty or not {slow, fast} <= set(rounds.columns):
        setting = f"batch size {batch_size} and {threads} threads"
        raise ValueError(f"no latencies of {slow!r} and {fast!r} at {setting}: measure them first")

    def ratio(slow: np.ndarray, fast: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(slow, axis=axis) / np.median(fast, axis=axis)

    samples = (rounds[slow].to_numpy(), rounds[fast].to_numpy())
    resampled = stats.bootstrap(samples, ratio, paired=True, n_resamples=2000, method="percentile", rng=0)
    return Speedup(float(ratio(*samples)), *map(float, resampled.confidence_interval))


def first_calls(order: Sequence[str], batch: int, calls: int, processes: int, device: str = "cpu") -> pd.DataFrame:
    """The released protocol, many times over: columns process, order, network, call, ms, threads, machine.

    Each time, in a process in which no network has run before, each network of `order` ("teacher" or "student", with
    random weights) is called `calls` times, without a warm-up, one network after the other. The processes are copies
    (forks) of one that has imported PyTorch and done nothing with it. `threads` are PyTorch's, in those processes.

    Args:
        device: "cpu", or "cuda": images and weights are there before the first call, which finds no kernel chosen yet.

    Raises:
        RuntimeError: the system cannot fork (Windows).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise RuntimeError(
            f"{platform.system()} has no forkserver, which makes the fresh processes: measure first calls on Linux or "
            "macOS, or in WSL"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(_first_calls, [(tuple(order), batch, calls, device)] * processes, chunksize=1)
    frames = [frame.assign(process=number) for number, frame in enumerate(found)]
    name = processor() if device == "cpu" else torch.cuda.get_device_name(device)
    times = pd.concat(frames, ignore_index=True).assign(order=" first, ".join(order), machine=name)
    return times[["process", "order", "network", "call", "ms", "threads", "machine"]]


def record_first_calls(path: Path, seconds: float) -> int:
    """Write the calls of fresh processes, batch 64, to a CSV file; return how many processes there were of each order.

    Teacher first and student first take turns for about `seconds`. The first call of a network is what the released
    script times; the last ones are warm.
    """
    device, started, found = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic(), []
    for number in range(MOST_PROCESSES):
        for order in (("teacher", "student"), ("student", "teacher")):
            found.append(first_calls(order, 64, RECORDED_CALLS, 1, device).assign(process=number))
        with paths.replacing(path) as part:
            pd.concat(found).round(3).to_csv(part, index=False)
        if time.monotonic() - started > seconds:
            break
    return number + 1


def _first_calls(order: Sequence[str], batch: int, calls: int, device: str) -> pd.DataFrame:
    networks = {name: (models.teacher() if name == "teacher" else models.student(5)).to(device) for name in order}
    images = torch.rand(batch, 3, 32, 32).to(device)
    return pd.DataFrame(
        {"network": name, "call": call, "ms": ms, "threads": torch.get_num_threads()}
        for name, network in networks.items()
        for call, ms in enumerate(call_times(network, images, calls))
    )
