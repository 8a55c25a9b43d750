"""Runs side by side: who trains when, and what starts or is put aside as time and memory allow.

A run ends as it would have ended alone: bit for bit on the CPU, and on a GPU as far as its libraries add up in the same
order.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from kdig_utils import machine
from kdig_utils.experiments import checkpoints
from kdig_utils.experiments.reports import Report, raise_diverged
from kdig_utils.experiments.runs import Run, Trained
from kdig_utils.experiments.steps import Steps, finish_epochs, line_about
from kdig_utils.method.models import exact_float32

SIDE_BY_SIDE = {"cpu": 1, "cuda": 4}  # runs at once, if nobody says otherwise
CAUTION = 1.1  # another run starts if all would end even this much slower: none is to be put aside soon after
MEMORY_MARGIN = 1.2  # another run starts if the free memory is this many times what the largest one took,
MEMORY_RESERVE = 1_500_000_000  # and this many bytes, which the evaluation of a network takes


class Way(NamedTuple):
    """How runs are trained; it changes how long they take, and what they are no more than rounding does."""

    at_once: int = 1  # runs side by side; they take turns, on a GPU each on a stream of its own
    recorded: bool = True  # a GPU replays recordings of the steps; else Python calls each step
    compiled: bool = False  # the network of a full batch is compiled (`torch.compile`)
    benchmark: bool = True  # cuDNN times its kernels and takes the fastest


# By the name that the command line knows, the likely fastest on a GPU first; a CPU never records.
WAYS = {
    "compiled": Way(compiled=True),
    "recorded": Way(),
    "unbenchmarked": Way(benchmark=False),
    "called": Way(recorded=False),
}


def fit(run: Run, report: Report = lambda line: None) -> Trained:
    """Train one run to its end, or go on from its checkpoint; raises what `train_together` does."""
    (finished,) = train_together([run], report=report)
    return finished.trained


def train_together(
    runs: Iterable[Run], way: Way = Way(), deadline: float = math.inf, report: Report = lambda line: None
) -> Iterator[Run]:
    """Train runs side by side, each as if it were alone, and yield each one when it is finished.

    A run is made (`next` of `runs`) when there is a place for it. It starts beside others only if, at the speed so far,
    all of them will end before `deadline` (`time.monotonic`); alone it always starts, so that no minute is lost. What
    does not end is saved in its checkpoint. Where the memory is full, half as many run side by side from then on.

    Raises:
        TrainingDiverged: losses were not finite; the message names their runs. All others are handed over before.
        ValueError: a checkpoint is damaged or of another run, or a run with dropout is to share the generator.
    """
    waiting, pace, places = Waiting(iter(runs)), Pace(deadline), Places(way, report)
    active: list[Steps] = []
    diverged: list[str] = []
    while True:
        with saved_if_it_fails(active):
            while places.left(active) and (run := waiting.next(active, pace)) is not None:
                if (steps := places.take(run)) is None:
                    waiting.aside.append(run)
                elif run.finished:
                    yield places.handed_over(steps)
                else:
                    active.append(steps)
                    check_generators(active)
        if not active:
            break
        pace.round_of(active, lambda now: train_round(now, deadline, report))
        diverged += [f"run {steps.run.spec.run_id}: {steps.diverged}" for steps in active if steps.diverged]
        active = [steps for steps in active if not steps.diverged]
        for steps in [steps for steps in active if steps.run.finished]:
            active.remove(steps)
            yield places.handed_over(steps)
        active = put_aside(active, pace, waiting, report)
    raise_diverged(diverged)


@contextlib.contextmanager
def saved_if_it_fails(active: list[Steps]) -> Iterator[None]:
    """Save the runs under way, all between two epochs, if another one cannot be made: nothing of theirs is lost."""
    try:
        yield
    except Exception:
        for steps in active:
            with contextlib.suppress(RuntimeError):  # of a GPU that can do nothing any more
                checkpoints.save(steps.run)
        raise


class Waiting:
    """The runs that have no place yet: those that were put aside, the most advanced first, then the new ones."""

    def __init__(self, new: Iterator[Run]) -> None:
        self.new = new
        self.aside: list[Run] = []

    def next(self, active: list[Steps], pace: "Pace") -> Run | None:
        """The next run that may start beside the active ones; None if there is none, or no time."""
        if pace.left <= 0:
            return None
        self.aside.sort(key=lambda run: run.epoch / run.spec.epochs)
        run = self.aside.pop() if self.aside else next(self.new, None)
        if run is None or not active or pace.another_ends(active, run):
            return run
        self.aside.append(run)
        return None


class Places:
    """The places for runs side by side, with the recordings of finished runs.

    A run that is alike goes on with such a recording: to record anew takes as long as a thousand steps.
    """

    def __init__(self, way: Way, report: Report) -> None:
        self.count, self.recorded, self.report = way.at_once, way.recorded, report
        self.free: list[Steps] = []

    def left(self, active: list[Steps]) -> bool:
        """Whether there is a place for one more run; the recordings that nobody uses make way for it."""
        if len(active) >= self.count:
            return False
        if has_room([*active, *self.free]):
            return True
        self.free.clear()
        return has_room(active)

    def take(self, run: Run) -> Steps | None:
        """The steps of a run, on the recording of a finished one if one is alike.

        None where the memory is full: there are half as many places from now on, and who has one keeps it.

        Raises:
            torch.OutOfMemoryError: not even one run fits.
        """
        try:
            for slot in self.free:
                if slot.run.alike == run.alike:
                    self.free.remove(slot)
                    slot.adopt(run, self.report)
                    return slot
            return Steps(run, self.report, self.recorded)
        except torch.OutOfMemoryError:
            if self.count == 1:
                message = "the GPU's memory does not hold one run: stop what else runs on it"
                raise torch.OutOfMemoryError(message) from None
        self.report(f"out of memory with {self.count} runs side by side: {self.count // 2} from now on")
        self.count //= 2
        return None

    def handed_over(self, steps: Steps) -> Run:
        """The finished run, with a network that no later run on the same recording will change."""
        if not steps.graphs or steps.run.alike is None:
            return steps.run
        self.free.append(steps)
        return replace(steps.run, model=copy.deepcopy(steps.run.model))


class Pace:
    """How long an epoch takes, measured, and what will therefore end before the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.seconds = 0.0  # an epoch of one run, its share of a round
        self.rounds = 0

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def round_of(self, active: list[Steps], train: Callable[[list[Steps]], None]) -> None:
        """Measure one round, an epoch of each active run; the first one, in which kernels are loaded, tells nothing."""
        started, begun = time.monotonic(), sum(steps.run.epoch for steps in active)
        train(active)
        epochs = sum(steps.run.epoch for steps in active) - begun
        if epochs and self.rounds:
            self.seconds = (time.monotonic() - started) / epochs
        self.rounds += 1

    def ending(self, active: list[Steps]) -> int:
        """How many of the active runs, the most advanced first, will end in time; each slows down the others."""
        if not active or not math.isfinite(self.deadline):
            return len(active)
        epochs = max(steps.run.epochs_left for steps in active)
        return min(len(active), int(self.left / max(epochs * self.seconds, 1e-9)))

    def another_ends(self, active: list[Steps], run: Run) -> bool:
        """Whether `run` has the time to end beside the active ones."""
        epochs = max(each.epochs_left for each in (run, *(steps.run for steps in active)))
        return self.left > 0 and CAUTION * (len(active) + 1) * epochs * self.seconds <= self.left


def put_aside(active: list[Steps], pace: Pace, waiting: Waiting, report: Report) -> list[Steps]:
    """Save the runs that will not end in time, the least advanced first, so that the others do; keep at least one.

    Those that are put aside go on when the others are done. After the deadline none is kept.
    """
    kept = sorted(active, key=lambda steps: steps.run.epochs_left)
    places = 0 if pace.left <= 0 else max(1, pace.ending(kept))
    for steps in kept[places:]:
        checkpoints.save(steps.run)
        waiting.aside.append(steps.run)
        words = f"{steps.run.spec.run_id} is put aside after {steps.run.epoch} of {steps.run.spec.epochs} epochs"
        report(line_about(steps.run, "aside", words))
    return [steps for steps in active if steps in kept[:places]]


def has_room(active: list[Steps]) -> bool:
    """Whether the GPU has the memory for one more run like the largest active one; always true elsewhere."""
    if not active or active[0].stream is None:
        return True
    torch.cuda.empty_cache()  # the pools of finished runs count as taken until then
    free = machine.free_memory(active[0].run.device)
    return free > MEMORY_MARGIN * max(steps.bytes for steps in active) + MEMORY_RESERVE


def check_generators(active: list[Steps]) -> None:
    """Raise ValueError if a run with dropout, which draws from the one global generator, has another beside it."""
    if len(active) > 1 and any(isinstance(m, nn.Dropout) for steps in active for m in steps.run.model.modules()):
        raise ValueError("a run with dropout shares its random numbers with the runs beside it: train it alone")


@exact_float32()
def train_round(active: list[Steps], deadline: float, report: Report) -> None:
    """The rest of the current epoch of every run, in turns; measured at its end, unless the deadline came first."""
    device = active[0].run.device
    with checkpoints.own_generator(active[0].run):
        turns = [steps.epoch(share=len(active), report=report) for steps in active]
        while turns and time.monotonic() < deadline:
            turns = [turn for turn in turns if next(turn, None) is not None]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for steps in active:
            steps.clock(len(active))
        finish_epochs([steps for steps in active if steps.run.position == steps.run.n_images], report)
